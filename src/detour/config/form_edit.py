"""Changes to the text of a job file that come from a form: an option is set, a list gets or loses an entry."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from detour import UserError
from detour.config import aitoolkit, edit, form
from detour.config.document import Key, check_size, compose, document_of, dotted, has_half_characters
from detour.config.explain import annotation_at, lookup, options_of, sections_in
from detour.config.nodes import NAME, source_of
from detour.config.writing import Number, number

_PATH = re.compile(r"[a-z_0-9]+(\.[a-z_0-9]+|\[\d{1,6}\])*")


def key_of(path: str) -> Key:
    """The inverse of `dotted`. UserError where it is none."""
    if not _PATH.fullmatch(path):
        raise UserError(f"{path[:200]!r} is not the path of an option, such as config.process[0].train.lr")
    parts = re.sub(r"\[(\d+)\]", r".#\1", path).split(".")
    return tuple(int(part[1:]) if part.startswith("#") else part for part in parts)


def set_value(text: str, path: str, value: Any) -> str:  # noqa: ANN401
    """The text with an option set. None, or the default, takes it out, unless a comment would go with it.

    A value may come as it was typed: a number as text, a list on one line with commas, a mapping as YAML.
    """
    key, data, field = _looked_up(text, path)
    if has_half_characters(json.dumps(value, ensure_ascii=False)):
        raise UserError(f"{path}: the text holds half a character; type it again")
    if isinstance(value, str):
        check_size(value, NAME)
    value = _typed(field, value)
    if not field.required and _is_default(field, value):
        if not _is_given(data, key):
            return text
        going = _outermost(data, key)
        if not edit.has_comment(text, going):
            return edit.unset(text, going)
    text, key = _written_out(text, data, key)
    value = edit.Entries(value) if field.kind in ("rows", "texts") and value else value
    return edit.put(text, key, value, _order)


def add_entry(text: str, path: str, value: Any) -> str:  # noqa: ANN401
    """The text with an entry at the end of a list."""
    key, data, _ = _list_at(text, path)
    entries = lookup(data, key)
    return edit.put(text, (*key, len(entries) if isinstance(entries, list) else 0), value, _order)


def change_entry(text: str, path: str, action: Literal["remove", "move"], index: int, to: int = 0) -> str:
    """The text with an entry of a list taken out, or moved to another place."""
    key, _, _ = _list_at(text, path)
    return edit.remove(text, key, index) if action == "remove" else edit.move(text, key, index, to)


def expanded(data: dict[str, Any]) -> dict[str, Any]:
    """The values of a file with the short forms in it written out: `prompts: [a cat]`, `resolution: 512`."""
    processes = lookup(data, ("config", "process"))
    if not isinstance(processes, list):
        return data
    shown = [
        _expanded(process, "", form.fields(kind_of(data, index))) if isinstance(process, dict) else process
        for index, process in enumerate(processes)
    ]
    return data | {"config": data["config"] | {"process": shown}}


def kind_of(data: dict[str, Any], process: int) -> str:
    """The type of a process; what has none, or one that is not known, is taken for training."""
    said = lookup(data, ("config", "process", process, "type"))
    return said if isinstance(said, str) and said in form.kinds() else next(iter(form.kinds()))


def process_of(key: Key) -> int:
    """The process that a place belongs to."""
    return int(key[2]) if key[:2] == ("config", "process") and len(key) > 2 else 0


def field_of(data: dict[str, Any], key: Key) -> form.FormField:
    """The field of a place in a file."""
    field = form.field_at(key, kind_of(data, process_of(key)))
    if field is None:
        raise UserError(f"{dotted(key)}: there is no such option")
    return field


def _order(key: Key) -> list[str]:
    """The options of a section in the order of the schema."""
    return [name for section in sections_in(annotation_at(key)) for name in options_of(section)]


def _looked_up(text: str, path: str) -> tuple[Key, dict[str, Any], form.FormField]:
    """The key of a path, the file's values, and the field."""
    key = key_of(path)
    check_size(text, NAME)
    data = source_of(text).data
    if aitoolkit.recognise(data):
        raise UserError("this file has ai-toolkit's layout: change it in the YAML, or rewrite it in Detour's layout")
    return key, data, field_of(data, key)


def _list_at(text: str, path: str) -> tuple[Key, dict[str, Any], form.FormField]:
    key, data, field = _looked_up(text, path)
    if field.kind not in ("rows", "texts"):
        raise UserError(f"{path}: is not a list whose entries can be changed one by one")
    return key, data, field


def _typed(field: form.FormField, value: Any) -> Any:  # noqa: ANN401
    """What to write for what a form sends. What is no number stays the text that it is: a mistake to be shown."""
    if field.kind != "text" and isinstance(value, str) and not value.strip():
        return None
    if field.kind in ("number", "integer"):
        return _number(value)
    if field.kind in ("numbers", "choices"):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list):
            return value
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        parts = [part for part in parts if part != ""]
        return ([_number(part) for part in parts] if field.kind == "numbers" else parts) or None
    if field.kind == "mapping" and isinstance(value, str):
        return _mapping(value)
    return value


def _number(value: Any) -> Any:  # noqa: ANN401
    return number(value.strip()) or value if isinstance(value, str) else value


def _mapping(typed: str) -> Any:  # noqa: ANN401
    """The section that YAML in a field says, or the text where it says none."""
    try:
        node = compose(typed, NAME)
        found = None if node is None else document_of(node, typed, NAME)
    except UserError:
        return typed
    return None if found is None else typed if found.problems else found.data


def _is_default(field: form.FormField, value: Any) -> bool:  # noqa: ANN401
    if value is None or (value in ("", [], {}) and not field.default):
        return True
    plain = [_plain(item) for item in value] if isinstance(value, list) else _plain(value)
    return bool(plain == field.default and isinstance(plain, bool) == isinstance(field.default, bool))


def _plain(value: Any) -> Any:  # noqa: ANN401
    return value.value if isinstance(value, Number) else value


def _is_given(data: dict[str, Any], key: Key) -> bool:
    around = lookup(data, key[:-1])
    return isinstance(around, dict) and key[-1] in around


def _outermost(data: dict[str, Any], key: Key) -> Key:
    """The option, or the section around it that would be empty without it and need not be there."""
    needed = {tuple(group.name.split(".")) for group in form.kinds()[kind_of(data, process_of(key))] if group.required}
    while len(key) > 4 and isinstance(key[-2], str) and len(lookup(data, key[:-1])) == 1 and key[3:-1] not in needed:
        key = key[:-1]
    return key


def _written_out(text: str, data: dict[str, Any], key: Key) -> tuple[str, Key]:
    """The text with the entry around a key written out where that is needed, and the key to set in it."""
    for size, part in enumerate(key[:-1], start=1):
        entry = lookup(data, key[:size])
        if size < 4 or not isinstance(part, int) or entry is None or isinstance(entry, dict | list):
            continue
        field = form.field_at(key[: size - 1], kind_of(data, process_of(key)))
        short = field.short if field is not None else ()
        if (key[size],) == short:
            return text, key[:size]
        if len(short) == 1:
            return edit.wrap(text, key[:size], short[0]), key
        return edit.put(text, key[:size], dict.fromkeys(short, entry)), key
    return text, key


def _expanded(value: Any, path: str, fields: dict[str, form.FormField]) -> Any:  # noqa: ANN401
    """A value and everything in it, with short forms written out."""
    field = fields.get(path)
    if isinstance(value, dict):
        return {name: _expanded(inner, f"{path}.{name}".removeprefix("."), fields) for name, inner in value.items()}
    if field is not None and field.kind == "rows" and isinstance(value, list):
        return [
            _expanded(entry, f"{path}[]", fields)
            if isinstance(entry, dict) or entry is None or not field.short
            else dict.fromkeys(field.short, entry)
            for entry in value
        ]
    short_list = field is not None and field.kind == "numbers" and isinstance(value, int | float)
    return [value] if short_list else value
