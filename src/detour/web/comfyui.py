"""ComfyUI's folder of LoRAs. Which one it is says the command line; pages give no more than a file's name."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from detour import UserError, files
from detour.jobs.states import StateError
from detour.report import words

if TYPE_CHECKING:
    from pathlib import Path


def place(folder: Path) -> Path:
    """Where its LoRAs lie."""
    return folder / "models" / "loras"


def target(folder: Path, name: str) -> Path:
    """The file for a name without ending. UserError if that cannot be, or the folder is not ComfyUI's."""
    name = name.removesuffix(".safetensors")
    if files.safe_name(name) != name:
        raise UserError(f"{name!r} cannot be the file's name on every system; {files.safe_name(name)!r} can")
    if not place(folder).is_dir():
        raise UserError(f"{place(folder)} is not there: {folder} is not a ComfyUI folder, or is not mounted")
    return place(folder) / f"{name}.safetensors"


def check_free(path: Path, *, replace: bool) -> None:
    """StateError where something has that name already, unless it is a file that is to be replaced."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise StateError(f"{path} is a link or a folder; choose another name")
    if not replace:
        found = path.stat()
        there = f"{words.size(found.st_size)} of {words.moment(found.st_mtime)}"
        raise StateError(f"{path.name} is there already ({there}); choose another name, or replace it")


def put(source: Path, path: Path, *, replace: bool) -> None:
    """Copy a file there, whole or not at all, readable as the umask says."""
    with files.new_file(path) as temporary:
        shutil.copyfile(source, temporary)
        check_free(path, replace=replace)  # again: copying takes seconds
