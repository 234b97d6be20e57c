"""What every page works on: the folder of the UI, with its queue, datasets and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request  # FastAPI looks its name up when a route depends on `context`

if TYPE_CHECKING:
    from pathlib import Path

    from detour.jobs.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Given to the app once, when it is made. Clients name ids; these are the only folders that they reach."""

    store: Store
    comfyui: Path | None = None
    """ComfyUI's folder, in whose `models/loras` LoRAs may be put. Said on the command line, never by a page."""

    @property
    def folder(self) -> Path:
        """The queue's folder; relative paths of jobs that pages make count from it."""
        return self.store.folder

    @property
    def datasets(self) -> Path:
        """A folder for each dataset. A job file names them `datasets/NAME`."""
        return self.folder / "datasets"

    @property
    def output(self) -> Path:
        """What jobs made by pages train into (`training_folder: output`)."""
        return self.folder / "output"


def context(request: Request) -> Context:
    """Of the app that a request came to; for `Depends`."""
    found: Context = request.app.state.context
    return found
