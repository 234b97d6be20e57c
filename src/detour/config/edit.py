"""Changes single values in the text of a YAML file. Every other line stays as it is, comments and spaces included.

The parser says where each value stands; the text is changed there. Then it is read again: if anything but the one value
has become different (it has an alias, comes from a merge, or is written in a way that is not understood here), the
change is refused. So a change is right or is not made.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from detour import UserError
from detour.config import writing
from detour.config.document import JobError, Key, dotted
from detour.config.nodes import CannotPlaceError, Slot, source_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from detour.config.nodes import Source


Order = Callable[[Key], Sequence[str]]
"""The options of the section at a key, in the order in which they are written."""


_COMMENT = re.compile(r"\s#")


class Entries(list[Any]):
    """A list that is written with dashes, one entry a line."""


def put(text: str, key: Key, value: Any, order: Order | None = None) -> str:  # noqa: ANN401
    """Set a value, with the sections around it where they are missing. Appends where `key` ends one past a list.

    An option that is new in its section stands behind those that come before it in the section's `order`, else last.
    """
    return _changed(
        text, key, lambda source: _put(source, key, value, order), lambda data: _put_value(data, key, value)
    )


def unset(text: str, key: Key) -> str:
    """Take an option out. Its line goes, with a comment at the end of that line."""
    return _changed(text, key, lambda source: _unset(source, key), lambda data: _unset_value(data, key))


def remove(text: str, key: Key, index: int) -> str:
    """Take an entry out of a list, with the comments right above it. The last one takes the list with it."""

    def expected(data: Any) -> None:  # noqa: ANN401
        entries = _entries_at(data, key, index)
        if len(entries) == 1:
            _unset_value(data, key)
        else:
            del entries[index]

    return _changed(text, key, lambda source: _remove(source, key, index), expected)


def move(text: str, key: Key, index: int, to: int) -> str:
    """Put an entry of a list at another place, with the comments right above it."""

    def expected(data: Any) -> None:  # noqa: ANN401
        entries = _entries_at(data, key, max(index, to))
        entries.insert(to, entries.pop(index))

    return _changed(text, key, lambda source: _move(source, key, index, to), expected)


def wrap(text: str, key: Key, name: str) -> str:
    """Write a value's short form in full: `a cat` becomes `prompt: a cat`."""

    def expected(data: Any) -> None:  # noqa: ANN401
        _put_value(data, key, {name: _value_at(data, key)})

    return _changed(text, key, lambda source: _wrap(source, key, name), expected)


def has_comment(text: str, key: Key) -> bool:
    """Whether a comment stands at the end of the value's line, or among the lines of a section or list."""
    source = source_of(text)
    slot, rest = source.reach(key)
    return not rest and bool(
        _COMMENT.search(text, slot.behind if slot.is_block else slot.end, source.line_end(slot.end))
    )


def _changed(text: str, key: Key, change: Callable[[Source], str], expect: Callable[[Any], None]) -> str:
    """The text after a change, if it did what was expected and nothing else."""
    source = source_of(text)
    try:
        wanted = copy.deepcopy(source.data)
        expect(wanted)
        after = source_of(change(source))
        right = _same(after.data, wanted) and after.problems <= source.problems
    except (CannotPlaceError, JobError, RecursionError):
        right = False
    if not right:
        raise UserError(
            f"{dotted(key)}: cannot be changed from here because of the way in which it is written (an alias, a "
            f"merge, ...); change it in the YAML"
        )
    return after.text


# --- the text ---------------------------------------------------------------------------------------------------------


def _put(source: Source, key: Key, value: Any, order: Order | None) -> str:  # noqa: ANN401
    if source.root is None:
        return _with_lines(source, source.text, len(source.text), _lines(str(key[0]), _nested(key[1:], value)), 0)
    slot, rest = source.reach(key)
    if not rest:
        return _replace(source, slot, value)
    if slot.is_section and isinstance(rest[0], str):
        names = [] if order is None else order(key[: len(key) - len(rest)])
        return _insert(source, slot, rest[0], _nested(rest[1:], value), names)
    if slot.is_list and rest[0] == len(source.items(slot)):
        return _append(source, slot, _nested(rest[1:], value))
    if slot.node is None and not slot.alias:
        return _replace(source, slot, _nested(rest, value))
    raise CannotPlaceError


def _replace(source: Source, slot: Slot, value: Any) -> str:  # noqa: ANN401
    text = source.text
    on_lines = isinstance(value, Entries) or (isinstance(value, dict) and bool(value))
    if on_lines and slot.name is not None and not slot.flow:
        rest = text[: slot.behind] + text[slot.end :]
        return _with_lines(source, rest, slot.behind, _lines_below(value), slot.column + 2)
    written = writing.flow(value)
    if slot.is_quoted and isinstance(value, str) and not isinstance(value, writing.Number):
        written = writing.quoted(value)
    if slot.is_block or slot.start == slot.end:
        return f"{text[: slot.behind]} {written}{text[slot.end :]}"
    return text[: slot.start] + written + text[slot.end :]


def _insert(source: Source, slot: Slot, name: str, value: Any, order: Sequence[str]) -> str:  # noqa: ANN401
    """Add an option to a section."""
    pairs = source.pairs(slot)
    if slot.is_block:
        before = order[: order.index(name)] if name in order else ()
        above = [pair for pair in pairs if pair.name is not None and pair.name.value in before]
        return _with_lines(source, source.text, (above or pairs)[-1].end, _lines(name, value), pairs[0].column)
    return _among(source, slot, pairs, f"{writing.text(name)}: {writing.flow(value)}")


def _append(source: Source, slot: Slot, value: Any) -> str:  # noqa: ANN401
    """Add an entry at the end of a list."""
    items = source.items(slot)
    if slot.is_block:
        column = source.column(items[0].behind - 1)
        return _with_lines(source, source.text, items[-1].end, writing.entries([value]), column)
    if not items and not slot.flow:
        return _replace(source, slot, Entries([value]))
    return _among(source, slot, items, writing.flow(value))


def _among(source: Source, slot: Slot, others: Sequence[Slot], written: str) -> str:
    """Add something behind the others among brackets or braces."""
    at = others[-1].end if others else source.opening(slot)
    return source.text[:at] + (", " if others else "") + written + source.text[at:]


def _with_lines(source: Source, text: str, index: int, shown: Iterable[str], column: int) -> str:
    """Put lines below the line of a character."""
    end = text.find("\n", index)
    before, after = (text, "") if end < 0 else (text[: end + 1], text[end + 1 :])
    before += "" if before.endswith("\n") or not before else source.newline
    return before + "".join(" " * column + line + source.newline for line in shown) + after


def _unset(source: Source, key: Key) -> str:
    (slot, rest), (around, _) = source.reach(key), source.reach(key[:-1])
    if rest or slot.name is None:
        raise CannotPlaceError
    text, pairs = source.text, source.pairs(around)
    place = next(place for place, pair in enumerate(pairs) if pair.name is slot.name)
    begins = [int(pair.name.start_mark.index) for pair in pairs if pair.name is not None]
    if not around.is_block:
        return _without(source, around, list(zip(begins, [pair.end for pair in pairs], strict=True)), place)
    begin, last = begins[place], source.line(slot.end)
    if len(pairs) == 1:
        return text[:begin] + "{}" + text[slot.end :]
    if not text[source.starts[source.line(begin)] : begin].strip():
        return _without_lines(source, source.line(begin), last)
    if source.line(begins[place + 1]) == last + 1:  # behind a dash: the next option takes its place
        return text[:begin] + text[begins[place + 1] :]
    return text[:begin].rstrip(" ") + text[source.line_end(slot.end) :]


def _remove(source: Source, key: Key, index: int) -> str:
    slot, items = _list_at(source, key)
    if len(items) == 1:
        return _unset(source, key)
    if not slot.is_block:
        return _without(source, slot, [(item.start, item.end) for item in items], index)
    return _without_lines(source, *source.extents(slot, items)[index])


def _move(source: Source, key: Key, index: int, to: int) -> str:
    slot, items = _list_at(source, key)
    spans = [(item.start, item.end) for item in items]
    if slot.is_block:
        extents = source.extents(slot, items)
        spans = [(source.starts[first], source.line_end(source.starts[last])) for first, last in extents]
    order = list(range(len(items)))
    order.insert(to, order.pop(index))
    out, done = "", 0
    for (start, end), other in zip(spans, order, strict=True):
        out += source.text[done:start] + source.text[slice(*spans[other])]
        done = end
    return out + source.text[done:]


def _wrap(source: Source, key: Key, name: str) -> str:
    slot, rest = source.reach(key)
    if rest or slot.node is None:
        raise CannotPlaceError
    before, value, after = source.text[: slot.start], source.text[slot.start : slot.end], source.text[slot.end :]
    full = f"{writing.text(name)}: {value}"
    return before + (f"{{{full}}}" if slot.flow else full) + after


def _list_at(source: Source, key: Key) -> tuple[Slot, list[Slot]]:
    slot, rest = source.reach(key)
    if rest or not slot.is_list:
        raise CannotPlaceError
    return slot, source.items(slot)


def _without(source: Source, slot: Slot, spans: Sequence[tuple[int, int]], index: int) -> str:
    """Take something out from among brackets or braces."""
    start, end = spans[index]
    if len(spans) == 1:
        start, end = source.opening(slot), slot.end - 1
    elif index + 1 < len(spans):
        end = spans[index + 1][0]
    else:
        start = spans[index - 1][1]
    return source.text[:start] + source.text[end:]


def _without_lines(source: Source, first: int, last: int) -> str:
    after = source.starts[last + 1] if last + 1 < len(source.starts) else len(source.text)
    return source.text[: source.starts[first]] + source.text[after:]


def _nested(key: Key, value: Any) -> Any:  # noqa: ANN401
    """The value inside the sections and lists that a key leads through."""
    for part in reversed(key):
        value = {part: value} if isinstance(part, str) else Entries([value])
    return value


def _lines(name: str, value: Any) -> list[str]:  # noqa: ANN401
    """The lines of an option."""
    if isinstance(value, Entries) or (isinstance(value, dict) and value):
        return [f"{writing.text(name)}:", *("  " + line for line in _lines_below(value))]
    return list(writing.block({name: value}))


def _lines_below(value: Any) -> list[str]:  # noqa: ANN401
    """The lines of a section or a list."""
    if isinstance(value, list):
        return list(writing.entries(value))
    return [line for name, inner in value.items() for line in _lines(name, inner)]


# --- the values -------------------------------------------------------------------------------------------------------


def _value_at(data: Any, key: Key) -> Any:  # noqa: ANN401
    here = data
    for part in key:
        among = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if not among:
            raise UserError(f"{dotted(key)}: is not in the file")
        here = here[part]
    return here


def _entries_at(data: Any, key: Key, index: int) -> Any:  # noqa: ANN401
    entries = _value_at(data, key)
    if not isinstance(entries, list) or index not in range(len(entries)):
        raise UserError(f"{dotted((*key, index))}: is not in the file")
    return entries


def _put_value(data: Any, key: Key, value: Any) -> None:  # noqa: ANN401
    here = data
    for place, part in enumerate(key):
        if isinstance(here, dict) and isinstance(part, str):
            inner = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part <= len(here):
            inner = next(iter(here[part : part + 1]), None)
            here[part : part + 1] = [inner]
        else:
            raise UserError(f"{dotted(key)}: there is no such place in the file; change it in the YAML")
        if place == len(key) - 1:
            inner = value
        elif inner is None:
            inner = [] if isinstance(key[place + 1], int) else {}
        here[part] = inner
        here = inner


def _unset_value(data: Any, key: Key) -> None:  # noqa: ANN401
    _value_at(data, key)
    del _value_at(data, key[:-1])[key[-1]]


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Equal, and of the same types: 1 is neither 1.0 nor true."""
    return json.dumps(_plain(one), sort_keys=True) == json.dumps(_plain(other), sort_keys=True)


def _plain(value: Any) -> Any:  # noqa: ANN401
    """With typed numbers as what they are read as."""
    if isinstance(value, writing.Number):
        return value.value
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
