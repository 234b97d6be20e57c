"""What a form shows of a job file. The text is the truth: everything here is read from it anew at each request."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, JsonValue

from detour import UserError, archs
from detour.archs.presets import START
from detour.config import aitoolkit, edit, form, form_edit
from detour.config.document import JobError, check_size, dotted, parse
from detour.config.explain import annotation_at, lookup
from detour.config.load import load_document
from detour.config.nodes import NAME
from detour.config.writing import block
from detour.web.presets import Choice, Difference, named

if TYPE_CHECKING:
    from detour.config.job import Process
    from detour.config.load import Loaded

_EXACT = 2**53  # whole numbers up to here are exact in a browser
_OPTION = re.compile(r"[a-z_0-9]+(\[\d+\])?(\.[a-z_0-9]+(\[\d+\])?)+|[a-z_]+(?=: )")


class Finding(BaseModel):
    """Something to put right."""

    where: str
    """`config.process[0].train.lr`; empty where no place is known."""
    line: int | None
    """From 1."""
    message: str


class FormState(BaseModel):
    """What a form shows."""

    text: str
    broken: bool
    """It cannot be read; there are no values."""
    foreign: bool
    """In ai-toolkit's layout: it runs and is shown, but it can be changed in its text alone."""
    kinds: list[str]
    """The types of its processes."""
    values: dict[str, JsonValue]
    """What the file gives, with short forms written out."""
    errors: list[Finding]
    warnings: list[str]
    notes: list[str]
    """What is done otherwise than by ai-toolkit."""
    defaults: dict[str, JsonValue]
    """What options that are not given come to, from the process down, where the schema alone does not say it."""
    preset: str | None
    """The model that the process trains."""
    differences: list[Difference]
    """In what the process is not as its preset says."""


def read(text: str, process: int = 0) -> FormState:
    """What a form shows of one process. What is wrong with the text is in `errors`."""
    try:
        check_size(text, NAME)
        document = parse(text, NAME)
    except UserError as error:
        return FormState(
            text=text, broken=True, foreign=False, kinds=[], values={}, errors=findings(error), warnings=[], notes=[],
            defaults={}, preset=None, differences=[],
        )  # fmt: skip
    loaded, errors = None, []
    try:
        loaded = load_document(document, Path(NAME))
    except UserError as error:
        errors = findings(error)
    foreign = aitoolkit.recognise(document.data)
    data = form_edit.expanded(document.data) if not foreign else {} if loaded is None else _short(loaded)
    resolved = _resolved(loaded, errors)
    choice = Choice(data, process)
    listed, shown = lookup(data, ("config", "process")), lookup(data, ("config", "process", process))
    return FormState(
        text=text,
        broken=False,
        foreign=foreign,
        kinds=[form_edit.kind_of(data, index) for index in range(len(listed) if isinstance(listed, list) else 0)],
        values=_sendable(data),
        errors=errors,
        warnings=archs.advice(resolved[process]) if process in resolved else [],
        notes=[] if loaded is None else loaded.notes,
        defaults=_sendable(choice.defaults() | _defaults(resolved.get(process), shown)),
        preset=None if choice.preset is None else choice.preset.name,
        differences=choice.differences(),
    )


def choose(text: str, name: str, process: int, overwrite: list[str]) -> str:
    """The text with a preset's values. What was changed by hand stays, but for the paths in `overwrite`."""
    check_size(text, NAME)
    data = form_edit.expanded(parse(text, NAME).data)
    for path, value in Choice(data, process).changes(name, overwrite).items():
        text = form_edit.set_value(text, f"config.process[{process}].{path}", value)
    return text


def add(text: str, path: str) -> str:
    """The text with a new entry in a list."""
    check_size(text, NAME)
    key = form_edit.key_of(path)
    process = form_edit.process_of(key)
    data = form_edit.expanded(parse(text, NAME).data)
    field = form_edit.field_of(data, key)
    return form_edit.add_entry(text, path, Choice(data, process).new_entry(field))


def beginning(dataset: str | None) -> str:
    """The text of an empty form: the first preset, and a dataset to be chosen."""
    process: dict[str, Any] = {"type": "train", "model": {}, "datasets": [], "train": {}, "sample": {}}
    preset, fields = named(START), form.fields("train")
    for path, value in preset.values.items():
        if value != fields[path].default:
            section, _, name = path.partition(".")
            process[section][name] = value
    process["datasets"] = [{"folder_path": dataset} | preset.other_resolution]
    process["sample"]["sample_every"] = 250
    return "\n".join(block({"config": {"output_name": "", "process": [process]}})) + "\n"


def translated(text: str) -> str:
    """A file in ai-toolkit's layout in Detour's own, with what is not the default."""
    check_size(text, NAME)
    return "\n".join(block(_short(load_document(parse(text, NAME), Path(NAME))))) + "\n"


def renamed(text: str, taken: set[str]) -> str:
    """The text of a copy: its `output_name` with a number that no other job has, where it can be changed from here."""
    data = parse(text, NAME).data
    path = "config.name" if aitoolkit.recognise(data) else "config.output_name"
    key = form_edit.key_of(path)
    name = lookup(data, key)
    if not isinstance(name, str) or name not in taken:
        return text
    stem = re.sub(r"_\d+$", "", name)
    number = next(number for number in range(2, len(taken) + 3) if f"{stem}_{number}" not in taken)
    try:
        return edit.put(text, key, f"{stem}_{number}")
    except UserError:
        return text


def findings(error: UserError) -> list[Finding]:
    """An error as a form shows it."""
    if isinstance(error, JobError):
        return [_finding(dotted(found.key), found.place, found.what) for found in error.mistakes]
    place, _, message = str(error).partition(": ")
    return [_finding("", place, message)] if place.startswith(NAME) else [_finding("", "", str(error))]


def _finding(where: str, place: str, message: str) -> Finding:
    line = place.rpartition(":")[2] if place.startswith(f"{NAME}:") else ""
    return Finding(where=where, line=int(line) if line.isdecimal() else None, message=message)


def _resolved(loaded: Loaded | None, errors: list[Finding]) -> dict[int, Process]:
    """The processes with every default filled in. What does not fit the architecture is added to the errors."""
    found = {}
    for index, process in enumerate(() if loaded is None else loaded.job.config.process):
        try:
            found[index] = archs.resolve(process)
        except UserError as error:
            assert loaded is not None
            errors += [_located(loaded, index, line) for line in str(error).splitlines()]
    return found


def _located(loaded: Loaded, process: int, line: str) -> Finding:
    """A line of an error that was found after the file was read, at the option that it begins with."""
    match = _OPTION.match(line)
    path = match[0] if match else ""
    where = f"config.process[{process}].{path}"
    if not path or annotation_at(form_edit.key_of(where)) is None:
        return Finding(where="", line=None, message=line)
    return _finding(where, loaded.place(path, process), line.removeprefix(path).removeprefix(": "))


def _defaults(process: Process | None, given: object) -> dict[str, Any]:
    """What the options come to that a job leaves to its architecture."""
    if process is None:
        return {}
    values = process.model_dump(mode="json")
    fields = form.fields(process.type).values()
    places = {field.path: tuple(field.path.split(".")) for field in fields if field.default is None}
    found = {path: lookup(values, place) for path, place in places.items() if lookup(given, place) is None}
    return {path: value for path, value in found.items() if value is not None}


def _short(loaded: Loaded) -> dict[str, Any]:
    """A job without what is the default."""
    return loaded.job.model_dump(mode="json", exclude_defaults=True)


def _sendable(value: Any) -> Any:  # noqa: ANN401
    """With numbers that a browser would change as text."""
    if isinstance(value, dict):
        return {name: _sendable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_sendable(inner) for inner in value]
    exact = not isinstance(value, int | float) or (math.isfinite(value) and abs(value) <= _EXACT)
    return value if exact else str(value)
