"""One browser for all tests of pages, and a server of its own for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser_ui import Ui, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with opened() as browser:
        yield browser


@pytest.fixture
def ui(tmp_path: Path) -> Iterator[Ui]:
    ui = Ui(tmp_path / "folder")
    ui.start()
    yield ui
    ui.end()


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained Z-Image Turbo in miniature, with its training adapter and thirty drawn pictures."""
    from detour import nano

    folder = tmp_path_factory.mktemp("world") / "miniature"
    nano.write(folder)
    return folder
