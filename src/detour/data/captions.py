"""Captions: trigger word, dropout, shuffling, choice. Pure functions of a caption and a number drawn for the purpose.

A caption reaches the text encoder as it was written, byte for byte, but for what its options ask.
"""

from __future__ import annotations

import re

from detour.seeds import seed_for

PLACEHOLDER = "[trigger]"


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with its trigger word: in place of `[trigger]`, else in front unless it is there already."""
    if not trigger:
        return caption
    if PLACEHOLDER in caption:
        return caption.replace(PLACEHOLDER, trigger)
    if re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        return caption
    return f"{trigger} {caption}" if caption else trigger


def shuffled(caption: str, keep: int, draw: int) -> str:
    """The comma-separated parts in an order given by `draw`, but for the first `keep`; joined by ", "."""
    parts = [part.strip() for part in caption.split(",")]
    rest = parts[keep:]
    order = sorted(range(len(rest)), key=lambda index: seed_for("part", draw, index))
    return ", ".join(parts[:keep] + [rest[index] for index in order])


def variants(captions: tuple[str, ...], trigger: str | None) -> tuple[str, ...]:
    """Each of a picture's captions as it is trained, when nothing is shuffled or dropped."""
    return tuple(with_trigger(caption, trigger) for caption in captions)
