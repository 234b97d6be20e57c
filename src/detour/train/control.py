"""Requests from outside a run: Ctrl-C, SIGTERM, and files that other programs put into `<run>/requests`.

A stop request lets the running step end, then saves. A second Ctrl-C stops at once, as does one while a run is still
being prepared: there is nothing to save, and what the caches hold stays.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from detour import steering

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType


class Control:
    """What has been asked of a job. `stop_reason` stays set once a stop was asked for."""

    def __init__(self, folder: Path | None = None, stop_at: int | None = None) -> None:
        """`folder` is the run's; `stop_at` is a step at which to stop as if asked (rehearsals)."""
        self.folder = folder
        self.stop_at = stop_at
        self.stop_reason: str | None = None
        self.process = 0
        """Which process of the job is at work."""
        self._training = False

    def begin(self, process: int, folder: Path) -> None:
        """A process of the job begins with its preparations, in which there is nothing to save."""
        self.process, self.folder, self._training = process, folder, False
        self._end_if_swallowed()

    def install(self) -> None:
        """Let SIGINT and SIGTERM ask for a stop. Call from the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        second = self.stop_reason is not None
        # Set before anything is raised: what an import or a destructor swallows still stops the run a little later.
        self.stop_reason = self.stop_reason or f"{name} received"
        if not self._training:
            raise KeyboardInterrupt(f"{name} before the first step")
        if second:
            raise KeyboardInterrupt(f"second request to stop ({name})")

    def poll(self, step: int) -> set[str]:
        """Requests that came since the last call. Their files are removed; a stop is remembered."""
        self._training = True
        if self.stop_at is not None and step >= self.stop_at and self.stop_reason is None:
            self.stop_reason = f"step {step} reached"
        found = self._take()
        if "stop" in found and self.stop_reason is None:
            self.stop_reason = "stop requested"
        return found

    def end_if_asked(self) -> None:
        """Between the parts of a long preparation whose results are kept: end it there where a stop was requested."""
        self._end_if_swallowed()
        if "stop" in self._take():
            self.stop_reason = "stop requested"
            raise KeyboardInterrupt("stop requested before the first step")

    def _end_if_swallowed(self) -> None:
        if self.stop_reason is not None:
            raise KeyboardInterrupt(f"{self.stop_reason} before the first step")

    def discard_old(self) -> None:
        """Forget requests that were meant for an earlier session of the run."""
        self._take()

    def _take(self) -> set[str]:
        return steering.take(self.folder) if self.folder is not None else set()
