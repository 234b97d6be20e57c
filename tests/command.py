"""Runs the command line: in this process for most tests (imports take seconds), as the installed program for a few."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detour.cli import main

PROGRAM = Path(sys.executable).with_name("detour")
"""The script that installing Detour puts beside the interpreter."""


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """`detour run` takes SIGINT and SIGTERM for itself; the tests want them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def detour(*arguments: object) -> Ran:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _signals_kept():
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse: --help, or a wrong option
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def well(*arguments: object) -> Ran:
    """As `detour`, for a command that must succeed."""
    ran = detour(*arguments)
    assert ran.code == 0, f"exit code {ran.code}\n{ran.out}\n{ran.err}"
    return ran


def program(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed program, in a process of its own."""
    command = [str(PROGRAM), *(str(argument) for argument in arguments)]
    own = os.environ | environment
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=own, timeout=300)


def events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events of a run, all or those of a type."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if kind in (None, event["type"])]


def tree(folder: Path) -> list[str]:
    """Every file under a folder, as sorted relative names."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
