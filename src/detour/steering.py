"""Requests to a run from other programs: empty files in `<run>/requests`, which the run takes away between two steps.

They work across terminals, users and containers, outlive whoever asked, and asking twice is asking once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detour import files

if TYPE_CHECKING:
    from pathlib import Path

REQUESTS = ("stop", "save", "sample")


def request(folder: Path, name: str) -> None:
    """Ask the run in `folder` to `stop`, `save` or `sample` at its next step."""
    assert name in REQUESTS, name
    target = folder / "requests"
    with files.explained(target / name):
        target.mkdir(parents=True, exist_ok=True)
        (target / name).touch()


def take(folder: Path) -> set[str]:
    """The requests to the run in `folder`; their files are removed."""
    target = folder / "requests"
    if not target.is_dir():
        return set()
    found = {path.name for path in target.iterdir() if path.name in REQUESTS}
    for name in found:
        (target / name).unlink(missing_ok=True)
    return found
