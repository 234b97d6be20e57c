"""Whether this machine has a browser: the only test in one that `make test` runs. The others: `make browser`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from browser_ui import DESKTOP, REQUIRED, Ui, opened


def test_the_login_link_opens_the_list_of_jobs(tmp_path: Path) -> None:
    with opened() as browser:  # not the fixture: other tests of the session cannot run an event loop beside it
        ui = Ui(tmp_path / "folder")
        ui.start()
        try:
            visit = ui.visit(browser, DESKTOP)
            visit.log_in(ui.link)
            visit.page.get_by_text("There are no jobs yet.").wait_for()
            visit.fine()
        finally:
            ui.end()


@pytest.mark.parametrize("required", [False, True])
def test_without_a_browser_tests_are_skipped_or_fail(required: bool, tmp_path: Path) -> None:
    """`.ci/run` requires one: there a skip would pass for a success."""
    environment = os.environ | {"PATH": str(Path(sys.executable).parent), REQUIRED: "required" if required else ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "browser",
        "-rs",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'base'}",
    ]
    tests = Path(__file__).parent / "test_browser_kills.py"
    done = subprocess.run(
        [*command, str(tests)], check=False, capture_output=True, text=True, env=environment, cwd=tests.parents[2]
    )
    assert "apt-get install chromium" in done.stdout
    assert (done.returncode != 0) == required, done.stdout
    assert ("1 skipped" in done.stdout) != required


def test_every_screenshot_is_in_the_manual_and_small() -> None:
    """And the manual names none that is not there."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    there = {path.name: path.stat().st_size for path in (docs / "screenshots").glob("*.png")}
    assert set(re.findall(r"\(screenshots/([\w-]+\.png)\)", (docs / "ui.md").read_text())) == set(there)
    assert max(there.values()) < 150_000
    assert sum(there.values()) < 2_000_000
