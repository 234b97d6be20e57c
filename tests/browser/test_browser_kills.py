"""Trainer, supervisor, worker and server are killed while a page looks on: what it shows is true soon after."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser_ui import DESKTOP, Ui
from queueing import SETTLED, kill

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

SOON = SETTLED * 1000  # milliseconds


def long_job(miniature: Path) -> str:
    """Thousands of steps without previews, saved every five."""
    process = {
        "type": "train",
        "device": "cpu",
        "model": {"arch": "zimage", "name_or_path": str(miniature)},
        "datasets": [{"folder_path": str(miniature / "dataset"), "resolution": 64}],
        "train": {"steps": 5000, "dtype": "fp32", "gradient_checkpointing": False, "cache_folder": "cache"},
        "network": {"linear": 4},
        "save": {"save_every": 5},
        "sample": {"disable_sampling": True},
    }
    return json.dumps({"config": {"output_name": "zig", "output_folder": "output", "process": [process]}})


def step_beyond(page: Page, step: int, timeout: float = 90_000) -> int:
    """Wait until the page shows a later step, without a reload; returns it."""
    figures = page.locator("#figures").filter(
        has_text=re.compile(rf"step (?!({'|'.join(map(str, range(step + 1)))}) of)\d+ of")
    )
    figures.wait_for(timeout=timeout)
    found = re.search(r"step (\d+) of", figures.inner_text())
    assert found
    return int(found[1])


def test_whoever_is_killed_the_page_says_what_is(browser: Browser, ui: Ui, miniature: Path) -> None:
    from playwright.sync_api import expect

    visit = ui.visit(browser, DESKTOP)
    page, state = visit.page, visit.page.locator("#state")
    visit.log_in(ui.link)
    with ui.store() as store:
        store.add(long_job(miniature), cwd=ui.folder)
        visit.open("/jobs/1")
        expect(state).to_have_text("running", timeout=90_000)
        step = step_beyond(page, 5)

        kill(store.worker())
        step = step_beyond(page, step + 1)
        expect(state).to_have_text("running")
        visit.fine()

        visit.forgiving = True  # the server's silence is in the console
        ui.kill()
        expect(page.locator("#trouble")).to_contain_text("The connection to the server is lost")
        ui.start()
        expect(page.locator("#trouble")).to_be_hidden()
        step = step_beyond(page, step)  # by the session that it had, without a reload
        expect(state).to_have_text("running")

        ui.kill()
        job = store.job(1)
        kill(job.supervisor)
        kill(job.process)
        ui.start()
        visit.open("/jobs")
        expect(page.locator('[data-job="1"] .state')).to_have_text("failed", timeout=SOON)
        expect(page.locator('[data-job="1"] .says')).to_contain_text("killed together with its supervisor")
        page.get_by_role("button", name="Go on job 1").click()
        page.get_by_role("link", name="zig", exact=True).click()
        expect(state).to_have_text("running", timeout=90_000)
        step = step_beyond(page, step)

        assert ui.stop() == ""  # a page that is open is no reason for a traceback
        expect(page.locator("#trouble")).to_contain_text("The connection to the server is lost")
        ui.start()
        step = step_beyond(page, step)
        visit.forgiving = False

        kill(store.job(1).process)
        expect(state).to_have_text("failed", timeout=SOON)
        expect(page.locator("#says")).to_contain_text("SIGKILL")
        expect(page.locator("#says")).to_contain_text(re.compile(r"goes on from step \d+"))
        visit.fine()
        page.get_by_role("tab", name="Timeline").click()
        expect(page.locator("#moments")).to_contain_text("broke off without a word")
        visit.fine()
        visit.close()
