"""Draws every page of the web UI for docs/screenshots (`make screenshots`): real runs of the miniature, a real browser.

Minutes: two runs of 400 steps are trained first. Large pictures get 256 colours, so that they all stay small.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import web_jobs
from browser_ui import DESKTOP, PHONE, Ui, Visit, opened
from detour import nano
from detour.config.writing import block
from detour.jobs.store import Store
from detour.nano import concepts, world

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OUT = Path(__file__).resolve().parents[2] / "docs" / "screenshots"
STEPS = 400
MOST = 60_000
"""Bytes of a picture with all its colours; larger ones get 256."""
PROMPTS = [
    "a large plain red zig on a white background in the centre",
    "a small plain yellow zig on a blue background at the left",
    "a large plain blue circle on a yellow background in the centre",
    "a small striped white square on a red background at the right",
]


def job(folder: Path, name: str, *, strategy: str = "prior_anchor", **train: Any) -> str:
    """A job file for the miniature."""
    model = folder / "models" / "zimage-miniature"
    process = {
        "type": "train",
        "trigger_word": "zig",
        "device": "cpu",
        "model": {
            "arch": "zimage:turbo",
            "name_or_path": str(model),
            "assistant_lora_path": str(model / "training_adapter.safetensors"),
        },
        "datasets": [{"folder_path": "datasets/zigs", "resolution": 128}],
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "lr": 1e-3,
            "dtype": "fp32",
            "timestep_type": "sigmoid",
            "gradient_checkpointing": False,
        }
        | train,
        "network": {"linear": 16},
        "preserve": {"strategy": strategy, "drift": {"measure": True, "every": 100}}
        | ({"prompts": [prompt.text for prompt in world.prompts(24, seed=11)]} if strategy != "none" else {}),
        "validation": {"validate_every": 50, "holdout": 0.2},
        "save": {"save_every": 100},
        "sample": {"width": 128, "height": 128, "sample_every": 50, "prompts": PROMPTS},
    }
    return "\n".join(block({"config": {"output_name": name, "output_folder": "output", "process": [process]}}))


def fill(ui: Ui, model: Path) -> None:
    """Two finished runs, one that runs, one that waits, a draft, a failure; a dataset that is not without mistakes."""
    Store(ui.folder, create=True).close()
    shutil.copytree(model, ui.folder / "models" / "zimage-miniature")
    dataset = ui.folder / "datasets" / "zigs"
    shutil.copytree(model / "dataset", dataset)
    dataset = ui.folder / "datasets" / "as they came"
    shutil.copytree(model / "dataset", dataset)
    (dataset / "0007.txt").unlink()
    shutil.copy(dataset / "0003.png", dataset / "0003 copy.png")
    shutil.copy(dataset / "0003.txt", dataset / "0003 copy.txt")
    Image.open(dataset / "0011.png").resize((40, 40)).save(dataset / "0011.png")
    Image.open(dataset / "0012.png").crop((0, 40, 128, 72)).save(dataset / "0012.png")
    concepts.write_dataset(ui.folder / "datasets" / "a character", "mip")
    with ui.store() as store:
        web_jobs.ended(
            store, store.add(job(ui.folder, "zig-1536"), cwd=ui.folder, queued=False), "out_of_memory",
            "the card's memory ran out: CUDA out of memory. Tried to allocate 1.41 GiB",
        )  # fmt: skip
        store.add(job(ui.folder, "character", steps=2000), cwd=ui.folder, queued=False)
        store.add(job(ui.folder, "zig"), cwd=ui.folder)
        store.add(job(ui.folder, "zig-plain", strategy="none"), cwd=ui.folder)
        store.add(job(ui.folder, "zig-long", steps=4000), cwd=ui.folder)
        store.add(job(ui.folder, "zig-rank-64", steps=1000), cwd=ui.folder)
    ui.start()
    ui.look(lambda store: [store.job(number).state for number in (3, 4)] == ["finished"] * 2, "two runs", 3600)


class Album:
    """Takes pictures of pages."""

    def __init__(self, browser: Browser, ui: Ui) -> None:
        self.browser = browser
        self.ui = ui

    @contextmanager
    def visit(self, window: dict[str, Any], suffix: str = "", **more: Any) -> Iterator[Shots]:
        """Pages in a window, logged in."""
        visit = self.ui.visit(self.browser, window | {"device_scale_factor": 1}, **more)
        visit.log_in(self.ui.fresh_link())
        yield Shots(visit, suffix)
        visit.close()


class Shots:
    """Pictures of a visit."""

    def __init__(self, visit: Visit, suffix: str) -> None:
        self.visit = visit
        self.page: Page = visit.page
        self.suffix = suffix

    def go(self, address: str, sign: str) -> None:
        """Open a page and wait for what shows that it is there."""
        self.visit.open(address)
        self.page.locator(sign).first.wait_for()

    def tab(self, name: str, sign: str) -> None:
        """Choose a tab."""
        self.page.get_by_role("tab", name=name, exact=True).click()
        self.page.locator(sign).first.wait_for()

    def take(self, name: str, most: int = 1400) -> None:
        """Write docs/screenshots/NAME.png: the whole page, cut off below `most` pixels."""
        self.page.evaluate("scrollTo(0, 0)")
        height = self.page.evaluate("document.documentElement.scrollHeight")
        width = (self.page.viewport_size or {})["width"]
        self.window(name, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": min(height, most)})

    def window(self, name: str, **options: Any) -> None:
        """The same of what the window shows."""
        self.visit.fine(name)
        self.page.wait_for_timeout(1200)  # charts, pictures that are loaded when they come into view
        path = OUT / f"{name}{self.suffix}.png"
        self.page.screenshot(path=path, **options)
        with Image.open(path) as picture:
            whole = picture.convert("RGB")
        whole.save(path, optimize=True)
        if path.stat().st_size > MOST:
            whole.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE).save(
                path, optimize=True
            )
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB, {whole.width} x {whole.height}", flush=True)


def desk(shots: Shots) -> None:
    """Every page in light colours."""
    page = shots.page
    shots.go("/jobs", '[data-job="6"]')
    shots.take("jobs")
    shots.go("/jobs/4", "#loss-chart svg")  # plain training tells the loss by time too
    shots.take("job-overview", 1800)
    shots.go("/jobs/3", "#loss-chart svg")
    shots.tab("Samples", "#matrix img")
    shots.take("job-samples", 1200)
    page.get_by_role("button", name="Enlarge prompt 1").click()
    page.locator("#wipe").fill("50")
    shots.window("job-viewer")
    page.keyboard.press("Escape")
    shots.tab("Log", "#log-text")
    shots.take("job-log")
    shots.tab("Files", "#file-table")
    shots.take("job-files")
    shots.tab("Job file", "#text")
    shots.take("job-file")
    shots.tab("Timeline", "#moments li")
    shots.take("job-timeline")
    shots.go("/jobs/3/export", "#export:not([hidden])")
    page.locator("#card-facts").get_by_text("pictures").wait_for()
    shots.take("export")
    shots.go("/compare?a=3&b=4", "#previews img")
    page.locator("#loss-chart svg").first.wait_for()
    shots.take("compare", 2000)
    shots.go("/datasets", "#list li")
    shots.take("datasets")
    shots.go("/datasets/zigs", "[data-key] img")
    shots.take("dataset-pictures")
    shots.go("/datasets/as%20they%20came", "[data-key] img")
    shots.tab("Buckets", "#bucket-list img")
    page.get_by_label("Resolution").fill("128")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_timeout(1000)
    shots.take("dataset-buckets")
    shots.tab("All captions", "#figures .bars")
    page.get_by_label("Find", exact=True).fill("background")
    page.get_by_label("Replace with").fill("ground")
    page.locator("#replace-form button").click()
    page.locator("#preview-list li").first.wait_for()
    shots.take("dataset-captions")
    page.locator("#apply").click()
    page.locator("#preview").wait_for(state="hidden")
    shots.tab("Health", ".finding")
    shots.take("dataset-health")
    shots.tab("History", "#changes li")
    shots.take("dataset-history")
    shots.tab("Settings", "#settings-form")
    shots.take("dataset-settings")
    shots.go("/settings", "#theme")
    shots.take("settings")
    new_job(shots)


def new_job(shots: Shots) -> None:
    """The form, with what a person would fill in."""
    page = shots.page
    shots.go("/jobs/new?dataset=zigs", "#page:not([hidden])")
    first = page.locator("#first")
    for label, value in {"Name": "my-first-lora", "Trigger word": "zig", "Steps": 1500}.items():
        first.get_by_role("textbox", name=label, exact=True).fill(str(value))
    page.get_by_role("button", name="Add sample prompt").click()
    page.locator('[data-path="sample.prompts[0].prompt"] textarea').fill(PROMPTS[0])
    page.get_by_text("Everything that can be seen from here is right.").wait_for()
    shots.take("new-job", 1500)
    page.get_by_text("All options", exact=True).click()
    page.get_by_label("Find an option").fill("drift")
    page.get_by_label("Find an option").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('#more').scrollIntoView()")
    page.wait_for_timeout(300)
    shots.window("new-job-all-options")


def empty(browser: Browser, folder: Path) -> None:
    """What somebody sees first."""
    ui = Ui(folder)
    ui.start()
    try:
        visit = ui.visit(browser, DESKTOP)
        visit.open("/login")
        shots = Shots(visit, "")
        shots.take("login")
        visit.log_in(ui.link)
        shots.go("/jobs", "#nothing:not([hidden])")
        shots.take("empty-jobs")
        shots.go("/datasets", "#nothing:not([hidden])")
        shots.take("empty-datasets")
        visit.close()
    finally:
        ui.end()


def others(album: Album) -> None:
    """Dark colours, and a phone."""
    with album.visit(DESKTOP, "-dark", color_scheme="dark") as shots:
        shots.go("/jobs/3", "#loss-chart svg")
        shots.take("job-overview", 1800)
        shots.go("/datasets/zigs", "[data-key] img")
        shots.take("dataset-pictures", 1000)
        shots.go("/jobs/new?dataset=zigs", "#page:not([hidden])")
        shots.take("new-job", 1000)
    with album.visit(PHONE, "-phone") as shots:
        shots.go("/jobs", '[data-job="6"]')
        shots.take("jobs")
        shots.go("/jobs/3", "#loss-chart svg")
        shots.take("job-overview")
        shots.tab("Samples", "#matrix img")
        shots.take("job-samples")
        shots.go("/datasets/zigs", "[data-key] img")
        shots.take("dataset-pictures")
        shots.go("/jobs/new?dataset=zigs", "#page:not([hidden])")
        shots.take("new-job")


def main() -> None:
    """Draw them all."""
    OUT.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.gettempdir()) / "screenshots"  # the same each time: pages show it
    shutil.rmtree(root, ignore_errors=True)
    nano.write(root / "miniature")
    ui = Ui(root / "detour")
    try:
        fill(ui, root / "miniature")
        with opened() as browser:
            album = Album(browser, ui)
            with album.visit(DESKTOP) as shots:
                desk(shots)
            others(album)
            empty(browser, root / "empty")
    finally:
        ui.end()
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
