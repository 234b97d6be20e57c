"""Job files: YAML text to a checked `Job` and back. Every mistake is reported in one go, with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import UserError, files
from detour.config import aitoolkit
from detour.config.document import MAX_BYTES, Document, JobError, Mistake, Problem, apply_override, parse, read
from detour.config.explain import check, lookup
from detour.config.job import Job

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detour.config.document import Key

__all__ = [
    "JobError", "Loaded", "Mistake",
    "changed_options", "dump_job", "json_schema", "load_job", "load_text", "run_folder",
]  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A job file that is right."""

    job: Job
    notes: list[str]
    """What a file of another trainer asks for and Detour does differently or leaves out, each with its line."""
    text: str
    path: Path
    document: Document
    """Knows the line of every option."""
    origins: dict[Key, Key]
    """For a translated file: the option here -> the one in the file."""

    def place(self, option: str, process: int = 0) -> str:
        """Where an option of a process stands (`model.arch` -> `job.yaml:12`), for errors found after loading."""
        parts = re.sub(r"\[(\d+)\]", r".\1", option).split(".")
        key = ("config", "process", process, *(int(part) if part.isdigit() else part for part in parts))
        return self.document.place(_origin(self.origins, key))


def load_job(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a job file in Detour's or in ai-toolkit's layout. `overrides` are `path=value`, as `--set` takes them.

    Raises `JobError` with every mistake, or another `UserError` when the file cannot be read at all.
    """
    return _load(read(path), path, overrides)


def load_text(text: str, name: str = "job.yaml") -> Loaded:
    """As `load_job`, for text that is at hand. `name` stands before the lines in messages."""
    if (size := len(text.encode(errors="surrogatepass"))) > MAX_BYTES:
        raise UserError(f"{name}: {size} bytes are too many for a job file (at most {MAX_BYTES})")
    return _load(parse(text, name), Path(name), ())


def run_folder(job: Job, index: int = 0) -> Path:
    """Where process `index` of a job leaves its files: `<output_folder>/<output_name>`, `..._2` for the second."""
    name = files.safe_name(job.config.output_name)
    return job.config.output_folder / (name if index == 0 else f"{name}_{index + 1}")


def _load(document: Document, path: Path, overrides: Sequence[str]) -> Loaded:
    for override in overrides:
        apply_override(document, override)
    problems, notes, origins, data = list(document.problems), [], {}, document.data
    said = {problem.key for problem in problems if lookup(data, problem.key) is None}
    if aitoolkit.recognise(data):
        translation = aitoolkit.translate(data)
        problems += translation.problems
        said |= {problem.key for problem in translation.problems}
        notes, origins, data = translation.notes, translation.origins, translation.data
    job, wrong = check(data)
    wrong = [Problem(_origin(origins, problem.key), problem.what) for problem in wrong]
    problems += [problem for problem in wrong if problem.key not in said]
    if job is None or problems:
        raise JobError(document.name, document.mistakes(problems))
    return Loaded(job, [str(note) for note in document.mistakes(notes)], document.text, path, document, origins)


def _origin(origins: dict[Key, Key], key: Key) -> Key:
    """The place in the file that a place in the translated job came from."""
    for size in range(len(key), 0, -1):
        if key[:size] in origins:
            return (*origins[key[:size]], *key[size:])
    return key


def changed_options(old: str, new: str) -> list[str]:
    """`train.lr: 0.0001 -> 0.001` for every option in which two texts of `dump_job` differ."""
    before, after = (parse(text, "job.yaml") for text in (old, new))
    then, now = dict(_leaves(before.data)), dict(_leaves(after.data))
    return [
        f"{after.option(key)}: {_scalar(then[key]) if key in then else 'not set'} -> "
        f"{_scalar(now[key]) if key in now else 'not set'}"
        for key in {**then, **now}
        if then.get(key) != now.get(key) or (key in then) != (key in now)
    ]


def _leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:  # noqa: ANN401
    """The options and their values. A list of plain values is one value."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*key, name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*key, index))
    else:
        yield key, value


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of job files, for editors and the web form."""
    schema = _on_one_line(Job.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Detour job file"}


def _on_one_line(schema: Any) -> Any:  # noqa: ANN401
    """The schema with its descriptions unwrapped (in the source they are docstrings)."""
    if isinstance(schema, list):
        return [_on_one_line(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: " ".join(part.split()) if name == "description" and isinstance(part, str) else _on_one_line(part)
        for name, part in schema.items()
    }


def dump_job(job: Job) -> str:
    """The job as YAML with every value visible. `load_job` reads it back to an equal job."""
    return "\n".join(_lines(job.model_dump(mode="json"))) + "\n"


def _lines(section: dict[str, Any]) -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield f"{_text(name)}:"
            yield from (f"  {line}" for line in _lines(value))
        elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            yield f"{_text(name)}:"
            yield from (f"  {line}" for item in value for line in _item(item))
        else:
            yield f"{_text(name)}: {_scalar(value)}"


def _item(value: object) -> Iterator[str]:
    """An entry of a list that holds sections."""
    if isinstance(value, dict) and value:
        marks = iter(["- "])
        yield from (next(marks, "  ") + line for line in _lines(value))
    else:
        yield f"- {_scalar(value)}"


def _scalar(value: object) -> str:
    """A value on one line, written so that YAML 1.1 and 1.2 readers agree on what it is."""
    match value:
        case None:
            return "null"
        case str():
            return _text(value)
        case list():
            return f"[{', '.join(map(_scalar, value))}]"
        case dict():
            return "{" + ", ".join(f"{_text(name)}: {_scalar(inner)}" for name, inner in value.items()) + "}"
    text = str(value).lower()
    # YAML 1.1 takes 1e-05 for text; 1.0e-05 is a number for every reader.
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.@+-]*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", ".inf", ".nan"}
_NUMBER = re.compile(r"\.?[0-9].*")


def _text(value: str) -> str:
    """Text, in double quotes unless it is a plain word that nobody could take for anything else."""
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS and not _NUMBER.fullmatch(value):
        return value
    return '"' + "".join(_escaped(character) for character in value) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return {"\n": "\\n", "\t": "\\t"}.get(character, f"\\U{ord(character):08X}")
