"""Figures in words that people read."""

from __future__ import annotations

import math
from datetime import UTC, datetime


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `1 h 02 min`, `2 d 03 h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(count: float) -> str:
    """Bytes: `512 bytes`, `3.1 MiB`, `12.3 GiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:g} bytes"


def speed(seconds: float) -> str:
    """Of a step: `1.24 s/step`, `5.0 steps/s`."""
    return f"{seconds:.2f} s/step" if seconds >= 1 else f"{1 / max(seconds, 1e-6):.1f} steps/s"


def figure(value: float | None) -> str:
    """Four digits; None stands for what was not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def moment(at: float) -> str:
    """Unix seconds as `2026-01-01 12:00:00 UTC`: the same on every machine."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def listed(names: list[str], most: int) -> str:
    """`a, b, c and 4 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def last_part(path: object) -> str:
    """The file's name in a path of any system: where a run lay when it was written down may not be where it lies."""
    return str(path).replace("\\", "/").rpartition("/")[2]
