"""Values as YAML, written so that YAML 1.1 and 1.2 readers agree on what they are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


class Number(str):
    """A number as a person typed it (`5e-5`), written as it is."""

    __slots__ = ()

    @property
    def value(self) -> int | float:
        """What YAML reads."""
        return float(self) if set(self) & set(".eE") else int(self)


_TYPED = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def number(typed: str) -> Number | None:
    """The number that a text is, None where it is none. At most 100 characters; nothing in a job file is longer."""
    return Number(typed) if len(typed) <= 100 and _TYPED.fullmatch(typed) else None


def block(section: dict[str, Any]) -> Iterator[str]:
    """The lines of a section, not indented."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield f"{text(name)}:"
            yield from (f"  {line}" for line in block(value))
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            yield f"{text(name)}:"
            yield from (f"  {line}" for line in entries(value))
        else:
            yield f"{text(name)}: {flow(value)}"


def entries(values: list[Any]) -> Iterator[str]:
    """The lines of a list, each entry after a dash."""
    for value in values:
        if isinstance(value, dict) and value:
            marks = iter(["- "])
            yield from (next(marks, "  ") + line for line in block(value))
        else:
            yield f"- {flow(value)}"


def flow(value: object) -> str:
    """A value on one line."""
    match value:
        case None:
            return "null"
        case Number():
            return value
        case str():
            return text(value)
        case list():
            return f"[{', '.join(map(flow, value))}]"
        case dict():
            return "{" + ", ".join(f"{text(name)}: {flow(inner)}" for name, inner in value.items()) + "}"
    written = str(value).lower()
    # YAML 1.1 takes 1e-05 for text; 1.0e-05 is a number for every reader.
    return written.replace("e", ".0e") if isinstance(value, float) and "." not in written else written


_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.@+-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", ".inf", ".nan"}
_NUMBER = re.compile(r"\.?[0-9].*")


def text(value: str) -> str:
    """Text, in double quotes unless it is a plain word that nobody could take for anything else."""
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not _NUMBER.fullmatch(value):
        return value
    return quoted(value)


def quoted(value: str) -> str:
    """Text in double quotes."""
    return '"' + "".join(_escaped(character) for character in value) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return {"\n": "\\n", "\t": "\\t"}.get(character, f"\\U{ord(character):08X}")
