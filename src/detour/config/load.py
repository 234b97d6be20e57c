"""Job files: YAML text to a checked `Job` and back. Every mistake is reported in one go, with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import files
from detour.config import aitoolkit
from detour.config.document import Document, JobError, Mistake, Problem, apply_override, check_size, parse, read
from detour.config.explain import check, lookup
from detour.config.job import Job
from detour.config.writing import block, flow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detour.config.document import Key

__all__ = [
    "JobError", "Loaded", "Mistake",
    "changed_options", "differences", "dump_job", "job_differences", "json_schema", "load_document", "load_job",
    "load_text", "run_folder",
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
    return load_document(read(path), path, overrides)


def load_text(text: str, name: str = "job.yaml") -> Loaded:
    """As `load_job`, for text that is at hand. `name` stands before the lines in messages."""
    check_size(text, name)
    return load_document(parse(text, name), Path(name))


def run_folder(job: Job, index: int = 0) -> Path:
    """Where process `index` of a job leaves its files: `<output_folder>/<output_name>`, `..._2` for the second."""
    name = files.safe_name(job.config.output_name)
    return job.config.output_folder / (name if index == 0 else f"{name}_{index + 1}")


def load_document(document: Document, path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """As `load_job`, for a file that has been read."""
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


def differences(old: str, new: str) -> list[tuple[str, str | None, str | None]]:
    """Option, old and new value (as in a job file, None where it is not set) where two texts of `dump_job` differ."""
    return _differences(parse(old, "job.yaml"), parse(new, "job.yaml"))


def job_differences(old: Job, new: Job) -> list[tuple[str, str | None, str | None]]:
    """As `differences`, of two jobs that have been read: without parsing, which takes 40 ms a text."""

    def document(job: Job) -> Document:
        return Document(name="job.yaml", text="", data=job.model_dump(mode="json"), lines={}, problems=[])

    return _differences(document(old), document(new))


def _differences(before: Document, after: Document) -> list[tuple[str, str | None, str | None]]:
    then, now = dict(_leaves(before.data)), dict(_leaves(after.data))
    return [
        (after.option(key), flow(then[key]) if key in then else None, flow(now[key]) if key in now else None)
        for key in {**then, **now}
        if then.get(key) != now.get(key) or (key in then) != (key in now)
    ]


def changed_options(old: str, new: str) -> list[str]:
    """`train.lr: 0.0001 -> 0.001` for every option in which two texts of `dump_job` differ."""
    return [
        f"{option}: {'not set' if before is None else before} -> {'not set' if now is None else now}"
        for option, before, now in differences(old, new)
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
    schema = on_one_line(Job.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Detour job file"}


def on_one_line(schema: Any) -> Any:  # noqa: ANN401
    """The schema with its descriptions unwrapped (in the source they are docstrings)."""
    if isinstance(schema, list):
        return [on_one_line(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: " ".join(part.split()) if name == "description" and isinstance(part, str) else on_one_line(part)
        for name, part in schema.items()
    }


def dump_job(job: Job) -> str:
    """The job as YAML with every value visible. `load_job` reads it back to an equal job."""
    return "\n".join(block(job.model_dump(mode="json"))) + "\n"
