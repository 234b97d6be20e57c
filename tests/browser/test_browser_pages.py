"""Every page, at a desk and on a phone: nothing breaks, nothing is asked of others, everything can be reached."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import runs_made
import web_jobs
from browser_ui import DESKTOP, PHONE, Ui

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

pytestmark = pytest.mark.browser

WINDOWS = [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")]
LONG = "the-name-of-a-run-that-somebody-gave-all-the-settings-of-it-rank-32-lr-1e-4-" + "x" * 60
JOB_TABS = ("Overview", "Samples", "Log", "Files", "Job file", "Timeline")
DATASET_TABS = ("Pictures", "All captions", "Health", "Buckets", "History", "Settings")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, miniature: Path) -> Iterator[Ui]:
    """Two finished runs with curves and previews, a draft, a failure that has much to say, and a dataset."""
    ui = Ui(tmp_path_factory.mktemp("full") / "folder")
    run = runs_made.whole(ui.folder, ["a zig " + "in the wind " * 30, "a/very/long/word" * 12])
    shutil.copytree(run.folder, run.folder.parent / "zag")
    with_pictures = ui.folder / "datasets" / "zigs"
    shutil.copytree(miniature / "dataset", with_pictures)
    (with_pictures / "0001.txt").write_text("unbroken" * 40)
    (with_pictures / "0002.txt").unlink()
    ui.start()
    with ui.store() as store:
        web_jobs.ended(store, web_jobs.add(store, "zig"))
        web_jobs.ended(store, web_jobs.add(store, "zag"))
        web_jobs.add(store, LONG)
        web_jobs.ended(
            store, web_jobs.add(store, "torn"), "failed", "failed (exit code 1): " + "/a/path/without/end" * 20
        )
    yield ui
    ui.end()


@pytest.mark.parametrize("window", WINDOWS)
def test_every_page(window: dict[str, Any], browser: Browser, full: Ui) -> None:
    from playwright.sync_api import expect

    visit = full.visit(browser, window)
    page = visit.page

    def look(address: str, sign: str) -> None:
        visit.open(address)
        page.locator(sign).first.wait_for()
        visit.fine()
        visit.reachable()

    visit.open("/login")
    visit.fine()
    visit.log_in(full.fresh_link())
    look("/jobs", '[data-job="4"]')
    look("/settings", "#theme")
    look("/jobs/1/export", "#export:not([hidden])")
    look("/compare", "#a")
    look("/compare?a=1&b=2", "#previews img")
    for job in (3, 4):
        look(f"/jobs/{job}", "#says")
    look("/jobs/1", "#loss-chart svg")
    for tab in JOB_TABS:
        page.get_by_role("tab", name=tab, exact=True).click()
        visit.fine(tab)
        visit.reachable()
    page.get_by_role("tab", name="Samples").click()
    page.get_by_role("button", name="Enlarge prompt 1").click()
    visit.fine("the viewer")
    look("/datasets", "text=zigs")
    look("/datasets/zigs", "[data-key]")
    for tab in DATASET_TABS:
        page.get_by_role("tab", name=tab, exact=True).click()
        if tab == "Health":
            expect(page.locator("#findings .finding").first).to_be_visible()
        visit.fine(tab)
        visit.reachable()
    look("/jobs/new?edit=3", "#page:not([hidden])")
    look("/jobs/new?dataset=zigs", "#page:not([hidden])")
    page.get_by_text("All options", exact=True).click()
    for group in page.locator("#groups > details").all():
        group.evaluate("(one) => { one.open = true; }")
    visit.fine("all options")
    visit.reachable()
    visit.close()


def test_a_tab_that_is_left_while_its_chart_is_on_its_way(browser: Browser, full: Ui) -> None:
    """What is not shown has no width, and a chart that is drawn then comes out 700 pixels wide."""
    visit = full.visit(browser, PHONE)
    page = visit.page
    visit.log_in(full.fresh_link())
    held: list[Route] = []
    page.route("**/plotly.min.js", lambda route: held.append(route))  # noqa: PLW0108  # playwright wants a function
    page.goto(f"{full.address}/jobs/1", wait_until="commit")  # it is loaded once the library has come
    page.locator("#figures").get_by_text("step 10").wait_for()
    time.sleep(0.5)  # the curves are there, and wait for the library
    page.get_by_role("tab", name="Samples").click()
    held[0].continue_()
    page.get_by_role("button", name="Enlarge prompt 1").wait_for()
    page.wait_for_timeout(500)
    assert page.locator("#loss-chart svg").count() == 0
    page.get_by_role("tab", name="Overview").click()
    page.locator("#loss-chart svg").first.wait_for()
    visit.fine()
    visit.close()


def test_a_job_by_keyboard_alone(browser: Browser, full: Ui) -> None:
    """From the list to a new draft, to its tabs, and to a deletion that is thought over once."""
    from playwright.sync_api import expect

    visit = full.visit(browser, DESKTOP)
    page, keys = visit.page, visit.page.keyboard
    visit.log_in(full.fresh_link())
    page.locator('[data-job="1"]').wait_for()
    visit.tab_to(page.get_by_role("link", name="New job").last)
    keys.press("Enter")
    page.locator("#page:not([hidden])").wait_for()
    first = page.locator("#first")
    visit.tab_to(first.get_by_role("textbox", name="Name", exact=True))
    keys.type("by keyboard")
    visit.tab_to(first.get_by_role("combobox", name="Dataset", exact=True))
    keys.press("ArrowDown")
    expect(first.get_by_role("combobox", name="Dataset", exact=True).locator("option:checked")).to_have_text("zigs")
    visit.tab_to(page.get_by_role("button", name="Save as draft"))
    keys.press("Enter")
    page.wait_for_url("**/jobs/5")
    expect(page.locator("#state")).to_have_text("draft")
    visit.tab_to(page.get_by_role("tab", name="Overview"))
    keys.press("ArrowRight")
    expect(page.get_by_text("No previews yet.")).to_be_visible()
    keys.press("End")
    expect(page.get_by_role("tab", name="Timeline")).to_be_focused()
    keys.press("Shift+Tab")  # back over "The same on the command line"
    keys.press("Shift+Tab")
    expect(page.get_by_role("button", name="Delete …")).to_be_focused()
    keys.press("Enter")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()  # not what cannot be taken back
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Delete …")).to_be_focused()
    keys.press("Enter")
    visit.tab_to(page.get_by_role("dialog").get_by_role("button", name="Delete"))
    keys.press("Enter")
    page.wait_for_url("**/jobs")
    page.locator('[data-job="1"]').wait_for()
    expect(page.locator('[data-job="5"]')).to_have_count(0)
    visit.fine()
    visit.close()


def test_captions_by_keyboard_alone(browser: Browser, full: Ui) -> None:
    from playwright.sync_api import expect

    visit = full.visit(browser, DESKTOP)
    page, keys = visit.page, visit.page.keyboard
    visit.log_in(full.fresh_link())
    visit.open("/datasets/zigs")
    visit.tab_to(page.get_by_label("Caption of 0000"))
    for caption in ("one", "two"):
        keys.press("Control+a")
        keys.type(caption)
        keys.press("PageDown")
    expect(page.get_by_label("Caption of 0002")).to_be_focused()
    for key in ("0000", "0001"):
        expect(page.locator(f'[data-key^="{key}"] .saving')).to_have_attribute("data-state", "saved")
    dataset = full.folder / "datasets" / "zigs"
    assert [(dataset / f"000{place}.txt").read_text() for place in (0, 1)] == ["one", "two"]
    visit.fine()
    visit.close()
