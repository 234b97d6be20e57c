"""The whole way of a person: from the login link to a LoRA that diffusers loads, at a desk and on a phone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser_ui import DESKTOP, PHONE, Ui, Visit
from command import events

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

STEPS = 40
PROMPTS = [
    "a large plain red zig on a white background in the centre",
    "a small plain blue circle on a black background",
]


def create_dataset(visit: Visit, pictures: Path) -> None:
    """A dataset of twelve pictures with captions, one of which is edited."""
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("navigation", name="Main").get_by_role("link", name="Datasets").click()
    expect(page.get_by_text("There are no datasets yet.")).to_be_visible()
    visit.fine()
    page.get_by_label("New dataset").fill("zigs")
    page.get_by_role("button", name="Create").click()
    page.wait_for_url("**/datasets/zigs")
    expect(page.get_by_text("There are no pictures yet.")).to_be_visible()
    visit.fine()
    page.get_by_label("Add files").set_input_files(
        sorted(pictures.glob("000[0-9].*")) + sorted(pictures.glob("001[01].*"))
    )
    expect(page.locator("#counts")).to_contain_text("12 pictures")
    caption = page.get_by_label("Caption of 0003")
    expect(caption).to_have_value((pictures / "0003.txt").read_text())
    caption.fill("a zig that somebody has described anew")
    expect(page.locator('[data-key^="0003"] .saving')).to_have_attribute("data-state", "saved")
    visit.fine()


def fill_form(visit: Visit, miniature: Path, dataset: Path) -> None:
    """The preset of Z-Image Turbo with its training adapter; the miniature stands in for the model."""
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("link", name="New job with it").click()
    page.locator("#page:not([hidden])").wait_for()
    expect(page.get_by_label("Model", exact=True).locator("option:checked")).to_have_text(
        "Z-Image Turbo (with training adapter)"
    )
    expect(page.locator("#first").get_by_label("Dataset", exact=True).locator("option:checked")).to_have_text("zigs")
    page.get_by_role("button", name="Add to the queue").click()  # too early: it says what is missing
    expect(page.locator('[data-path="config.output_name"] .error')).to_be_visible()
    visit.fine()
    for label, value in {
        "Name": "zig", "Model path": miniature, "Adapter path": miniature / "training_adapter.safetensors",
        "Resolution": 128, "Steps": STEPS, "Learning rate": "1e-3", "Rank": 8, "Sample every": 8, "Save every": 10,
        "Trigger word": "zig",
    }.items():  # fmt: skip
        page.locator("#first").get_by_role("textbox", name=label, exact=True).fill(str(value))
    visit.fine()
    for place, prompt in enumerate(PROMPTS):
        page.get_by_role("button", name="Add sample prompt").click()
        page.locator(f'[data-path="sample.prompts[{place}].prompt"] textarea').fill(prompt)
    page.get_by_text("All options", exact=True).click()
    for path, value in {
        "device": "cpu", "sample.width": 128, "sample.height": 128, "sample.sample_steps": 3,
        "train.cache_folder": dataset.parent / "cache",
    }.items():  # fmt: skip
        page.get_by_label("Find an option").fill(path)
        page.locator(f'#groups [data-path="{path}"] input').fill(str(value))
    page.get_by_label("Find an option").fill("gradient checkpointing")
    page.get_by_label("Gradient checkpointing", exact=True).uncheck()
    if not page.locator("#text").is_visible():
        page.locator("#yaml > summary").click()
    expect(page.locator("#text")).to_have_value(re.compile(r"lr: 1e-3"))
    expect(page.get_by_text("Everything that can be seen from here is right.")).to_be_visible()
    visit.fine()


def loss_step(page: Page) -> int:
    """The last step of the loss that the page draws."""
    label = page.get_by_role("img", name=re.compile(r"^Loss: ")).first.get_attribute("aria-label")
    found = re.search(r"at step (\d+)", label or "")
    assert found, label
    return int(found[1])


def watch(visit: Visit) -> None:
    """Loss and previews come by themselves, without a reload."""
    from playwright.sync_api import expect

    page = visit.page
    expect(page.locator("#state")).to_have_text("running", timeout=90_000)
    chart = page.get_by_role("img", name=re.compile(r"^Loss: .* at step \d+"))
    expect(chart).to_be_visible(timeout=90_000)
    assert page.locator("#loss-chart svg .scatterlayer path.js-line").count() > 0, "there is a curve"
    before = loss_step(page)
    expect(chart).not_to_have_attribute("aria-label", chart.get_attribute("aria-label"))
    assert loss_step(page) > before
    visit.fine()
    page.get_by_role("tab", name="Samples").click()
    first = page.get_by_role("button", name=re.compile(r"^Enlarge prompt 1 at step ")).locator("img")
    expect(first).to_be_visible()
    expect(page.get_by_role("button", name="Prompt 2 at step 8", exact=True)).to_be_visible(timeout=90_000)
    assert first.evaluate("(one) => one.decode().then(() => one.naturalWidth)") == 128
    visit.fine()


def stop_and_go_on(visit: Visit) -> int:
    """Stopped with everything saved; from the list it goes on. Returns the step at which it stopped."""
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("button", name="Stop (saves)").click()
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.locator("#says")).to_contain_text(re.compile(r"at step \d+"))
    stopped = int(re.search(r"at step (\d+)", page.locator("#says").inner_text())[1])  # type: ignore[index]
    assert 8 <= stopped < STEPS
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.get_by_role("button", name="Go on job 1").click()
    expect(page.locator('[data-job="1"] .state')).to_have_text("finished", timeout=120_000)
    visit.fine()
    page.get_by_role("link", name="zig", exact=True).click()
    expect(page.locator("#says")).to_have_text(f"finished at step {STEPS}")
    return stopped


def download(visit: Visit, folder: Path) -> Path:
    """The LoRA in diffusers' format, made on the export page."""
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("link", name="Export").click()
    page.get_by_label("Format").select_option("diffusers")
    page.get_by_role("button", name="Make the file").click()
    expect(page.locator("#download")).to_be_visible(timeout=90_000)
    expect(page.locator("#file-facts")).to_contain_text("proven by loading with diffusers")
    visit.fine()
    with page.expect_download() as coming:
        page.locator("#download").click()
    path = folder / coming.value.suggested_filename
    coming.value.save_as(path)
    return path


@pytest.mark.parametrize("window", [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")])
def test_from_the_login_link_to_the_lora(
    window: dict[str, Any], browser: Browser, ui: Ui, miniature: Path, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    visit = ui.visit(browser, window, accept_downloads=True)
    page = visit.page
    visit.log_in(ui.link)
    expect(page.get_by_text("There are no jobs yet.")).to_be_visible()
    visit.fine()
    create_dataset(visit, miniature / "dataset")
    dataset = ui.folder / "datasets" / "zigs"
    assert (dataset / "0003.txt").read_text() == "a zig that somebody has described anew"

    fill_form(visit, miniature, dataset)
    page.get_by_role("button", name="Add to the queue").click()
    page.wait_for_url("**/jobs/1")
    watch(visit)
    stopped = stop_and_go_on(visit)

    run = ui.folder / "output" / "zig"
    steps = [event["step"] for event in events(run, "step")]
    assert steps == list(range(1, STEPS + 1)), "no step twice, none left out"
    assert [event["step"] for event in events(run, "start")] == [0, stopped]

    visit.page.get_by_role("tab", name="Samples").click()
    expect(page.get_by_role("button", name=f"Prompt 2 at step {STEPS}", exact=True)).to_be_visible()
    page.get_by_role("button", name=f"Enlarge prompt 1 at step {STEPS}").click()
    expect(page.get_by_role("dialog").get_by_text("Hold to compare")).to_be_visible()
    visit.fine()
    page.keyboard.press("Escape")
    for tab in ("Log", "Files", "Job file", "Timeline", "Overview"):
        page.get_by_role("tab", name=tab, exact=True).click()
        visit.fine(tab)
    lora = download(visit, tmp_path)
    assert draws_otherwise(miniature, lora)
    visit.fine()
    visit.close()


def draws_otherwise(model: Path, lora: Path) -> bool:
    """Load the LoRA with diffusers as anybody does; whether the pipeline draws another picture with it."""
    import torch
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> Any:
        generator = torch.Generator().manual_seed(1)
        options = {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "np"}
        return pipeline(PROMPTS[0], generator=generator, **options).images

    before = picture()
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    assert pipeline.get_active_adapters()
    return float(abs(picture() - before).mean()) > 1e-3
