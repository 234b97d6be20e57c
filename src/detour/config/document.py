"""A YAML file as plain values that remember where they were written.

YAML 1.2: `no` and `on` are text, `1e-4` is a number, `2024-01-01` is text. Only mappings, lists and plain scalars
exist: a tag such as `!!python/object` is a mistake, not a constructor. The parser takes 45 ms to import, so that is
done inside `compose`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detour import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from ruamel.yaml.nodes import Node

Key = tuple[str | int, ...]
"""Where a value stands: `("config", "process", 0, "train", "lr")`."""

# The parser needs about 14 microseconds a token (measured), so the largest file takes 4 s at worst. Aliases can make a
# small file stand for a huge one, hence the second limit.
MAX_BYTES = 512 * 1024
MAX_VALUES = 50_000

_HALF = re.compile("[\ud800-\udfff]")
"""Halves of characters (surrogates): YAML can write one alone (`"\\ud800"`), and no file can hold it."""

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + kind for kind in ("str", "timestamp", "value", "merge")}
_SCALAR_TAGS = _TEXT_TAGS | {_TAG + kind for kind in ("int", "float", "bool", "null")}

# The first part of a `--set` path that does not lead into the file's only process.
_TOP = ("config", "meta", "job")
_CONFIG = ("process", "output_name", "output_folder", "name")


@dataclass(frozen=True)
class Problem:
    """One thing to put right, at a place in the file."""

    key: Key
    what: str


@dataclass(frozen=True)
class Mistake:
    """One thing to put right, as it is shown: `place` is `job.yaml:12`, `option` is `train.lr`."""

    place: str
    option: str
    what: str
    key: Key = field(default=(), compare=False)
    """Where it stands in the file, for forms."""

    def __str__(self) -> str:
        option = "" if self.what.startswith(self.option) else self.option
        return ": ".join(part for part in (self.place, option, self.what) if part)


class JobError(UserError):
    """Everything that is wrong with a job file, in one go."""

    def __init__(self, name: str, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = list(mistakes)
        lines = [str(mistake) for mistake in mistakes]
        super().__init__(lines[0] if len(lines) == 1 else "\n  ".join([f"{name}: {len(lines)} mistakes", *lines]))


@dataclass
class Document:
    """A file's values, and the line (or `--set`) that each came from."""

    name: str
    text: str
    data: dict[str, Any]
    lines: dict[Key, int]
    problems: list[Problem]
    sets: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """`job.yaml:12` for the value, or for the nearest section around it that is in the file."""
        for size in range(len(key), -1, -1):
            if key[:size] in self.sets:
                return f"--set {self.sets[key[:size]]}"
            if key[:size] in self.lines:
                return f"{self.name}:{self.lines[key[:size]]}"
        return self.name

    def option(self, key: Key) -> str:
        """The option's name as people write it: `train.lr` when there is one process, else `process[1].train.lr`."""
        if key[:2] == ("config", "process") and len(key) > 2:
            processes = self.data.get("config", {}).get("process")
            alone = len(key) > 3 and isinstance(processes, list) and len(processes) == 1
            key = key[3:] if alone else key[1:]
        return dotted(key)

    def mistakes(self, problems: Iterable[Problem]) -> list[Mistake]:
        """The problems as they are shown, in the order of the file, each once."""

        def order(problem: Problem) -> tuple[int, str]:
            place = self.place(problem.key)
            line = place.removeprefix(f"{self.name}:")
            return (int(line) if line.isdigit() else 0), place

        found = [
            Mistake(self.place(problem.key), self.option(problem.key), problem.what, problem.key)
            for problem in sorted(problems, key=order)
        ]
        return list(dict.fromkeys(found))


def dotted(key: Key) -> str:
    """`datasets[0].resolution` for `("datasets", 0, "resolution")`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def read(path: Path) -> Document:
    """Read a YAML file. Raises `UserError` when there is nothing to work on; other mistakes are in `problems`."""
    return parse(_read_text(path), str(path))


def parse(text: str, name: str) -> Document:
    """What `read` does, for text that is at hand. `name` stands before the lines in messages."""
    return document_of(compose(text, name), text, name)


def document_of(node: Node | None, text: str, name: str) -> Document:
    """The values of a tree of nodes."""
    if node is None:
        raise UserError(f"{name}: the file is empty; a job file begins with 'config:' (examples/ has ready ones)")
    builder = _Builder(name)
    data = builder.build(node)
    if not isinstance(data, dict):
        raise UserError(f"{name}:1: a job file is a mapping that begins with 'config:', found {found(data)}")
    return Document(name, text, data, builder.lines, builder.problems)


def has_half_characters(text: str) -> bool:
    """Whether a text cannot be written to a file."""
    return not text.isascii() and _HALF.search(text) is not None


def check_size(text: str, name: str) -> None:
    """Refuse a text that is no job file but something far larger."""
    if (size := len(text.encode(errors="surrogatepass"))) > MAX_BYTES:
        raise UserError(f"{name}: {size} bytes are too many for a job file (at most {MAX_BYTES})")


def found(value: object) -> str:
    """A value in words, for messages: `the text 'abc'`."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
        case list():
            return "a list"
        case _:
            return "a section"


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the job file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes are too many for a job file (at most {MAX_BYTES})")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None


def compose(text: str, name: str) -> Node | None:
    """The tree of nodes. A file with broken syntax has one mistake: the parser cannot go on behind it."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark is not None else name
        raise JobError(
            name, [Mistake(place, "", _syntax(error.problem or error.context or "", error.context))]
        ) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(text[error.position]):04X}" if error.position < len(text) else "at the end"
        raise JobError(name, [Mistake(f"{name}:{line}", "", f"the character {character} is not allowed")]) from None
    except (YAMLError, ValueError) as error:
        raise JobError(name, [Mistake(name, "", f"is not YAML ({str(error).splitlines()[0]})")]) from None
    except RecursionError:
        raise JobError(name, [Mistake(name, "", "is nested too deeply")]) from None
    return node


_HINTS = {
    "mapping values are not allowed here": "a text with ': ' in it needs quotes; nested names need deeper indentation",
    "'\\t'": "indent with spaces, not tabs",
    "expected <block end>": "the indentation does not line up",
    "found another document": "a job file holds one document; remove the '---'",
    "found undefined alias": "a text that begins with '*' needs quotes",
    "cannot start any token": "a text that begins with this character needs quotes",
}


def _syntax(problem: str, context: str | None) -> str:
    hint = next((text for sign, text in _HINTS.items() if sign in problem), None)
    where = f" ({context})" if context and context != problem else ""
    return f"not YAML: {problem}{where}" + (f"; {hint}" if hint else "")


class _Builder:
    """Turns nodes into values; collects lines and problems on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Key, int] = {}
        self.problems: list[Problem] = []
        self.count = 0

    def build(self, node: Node) -> Any:  # noqa: ANN401
        self.lines[()] = node.start_mark.line + 1
        try:
            return self._value(node, (), ())
        except RecursionError:
            raise UserError(f"{self.name}: is nested too deeply") from None

    def _value(self, node: Node, key: Key, around: tuple[int, ...]) -> Any:  # noqa: ANN401
        self.count += 1
        if self.count > MAX_VALUES:
            raise UserError(f"{self.name}: more than {MAX_VALUES} values, aliases counted; a job file is far smaller")
        if id(node) in around:
            self.problems.append(Problem(key, "an alias stands inside what it stands for"))
            return None
        around = (*around, id(node))
        kind = str(node.tag)
        if kind == _TAG + "map":
            return self._mapping(node, key, around)
        if kind == _TAG + "seq":
            values = []
            for index, item in enumerate(node.value):
                self.lines[(*key, index)] = item.start_mark.line + 1
                values.append(self._value(item, (*key, index), around))
            return values
        if kind in _SCALAR_TAGS and isinstance(node.value, str):
            return self._scalar(node, key)
        self.problems.append(Problem(key, f"the tag {kind.replace(_TAG, '!!')} is not allowed in a job file"))
        return None

    def _mapping(self, node: Node, key: Key, around: tuple[int, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        own: dict[str, int] = {}
        merges = [value for name, value in node.value if str(name.tag) == _TAG + "merge"]
        for value in merges:  # `<<: *other`, which YAML 1.2 dropped and other trainers' files still use
            for part in value.value if str(value.tag) == _TAG + "seq" else [value]:
                merged = self._value(part, key, around)
                if not isinstance(merged, dict):
                    self.problems.append(Problem(key, f"<<: takes a mapping, found {found(merged)}"))
                    continue
                values = merged | values
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if str(name_node.tag) == _TAG + "merge":
                continue
            if not isinstance(name_node.value, str):
                self.problems.append(Problem(key, f"a name must be text (line {line})"))
                continue
            name = name_node.value
            place = (*key, name)
            if has_half_characters(name):
                self.problems.append(Problem(key, f"a name holds half a character (line {line})"))
                continue
            if name in own:
                self.problems.append(Problem(place, f"given twice (lines {own[name]} and {line}); keep one"))
            own.setdefault(name, line)
            self.lines[place] = line
            values[name] = self._value(value_node, place, around)
        return values

    def _scalar(self, node: Node, key: Key) -> str | int | float | bool | None:
        text: str = node.value
        match str(node.tag).removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return self._integer(text, key)
            case "float":
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            case _:
                if has_half_characters(text):
                    self.problems.append(Problem(key, "the text holds half a character; write the whole one"))
                    return None
                return text

    def _integer(self, text: str, key: Key) -> int | None:
        digits = text.replace("_", "").lower()
        base = {"0x": 16, "0o": 8, "0b": 2}.get(digits.lstrip("+-")[:2], 10)
        try:
            return int(digits, base)
        except ValueError:  # more digits than Python converts (4300)
            self.problems.append(Problem(key, "the number has too many digits"))
            return None


def apply_override(document: Document, override: str) -> None:
    """Carry out one `--set path=value`. The value is YAML; the path may leave out `config.process.0.`."""
    path, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: write it as path=value, for example train.lr=1e-4")
    value = _override_value(text, override)
    parts = _from_the_top(document, parts, override)
    key: Key = ()
    here: Any = document.data
    for place, part in enumerate(parts):
        step = _step(here, part, f"--set {override}: {document.option(key) or 'the file'}")
        key = (*key, step)
        if place == len(parts) - 1:
            _put(here, step, value)
            continue
        if (isinstance(here, list) and step == len(here)) or (isinstance(here, dict) and here.get(part) is None):
            _put(here, step, [] if parts[place + 1].isdigit() else {})
            document.sets[key] = override
        here = here[step]
    _forget(document, key)
    document.sets[key] = override


def _override_value(text: str, override: str) -> object:
    builder = _Builder(f"--set {override}")
    try:
        node = compose(text, f"--set {override}")
    except JobError as error:
        raise UserError(f"--set {override}: the value is {error.mistakes[0].what}; or put it in quotes") from None
    value = None if node is None else builder.build(node)
    if builder.problems:
        raise UserError(f"--set {override}: {builder.problems[0].what}")
    return value


def _from_the_top(document: Document, parts: list[str], override: str) -> list[str]:
    """The path in full: `train.lr` means the only process."""
    if parts[0] in _TOP:
        return parts
    if parts[0] in _CONFIG:
        return ["config", *parts]
    config = document.data.get("config")
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list) or not processes:
        raise UserError(f"--set {override}: the file has no config.process for {parts[0]!r} to be set in")
    if len(processes) > 1:
        example = f"process.0.{'.'.join(parts)}"
        raise UserError(f"--set {override}: the file has {len(processes)} processes; say which: {example}")
    return ["config", "process", "0", *parts]


def _step(here: object, part: str, where: str) -> str | int:
    """The key or index by which `part` leads on from `here`."""
    if isinstance(here, dict):
        return part
    if isinstance(here, list):
        if part.isdigit() and int(part) <= len(here):
            return int(part)
        raise UserError(f"{where} is a list of {len(here)}; {part!r} is not a place in it (count from 0)")
    raise UserError(f"{where} is {found(here)}, which has no {part!r}")


def _put(here: dict[str, Any] | list[Any], step: str | int, value: object) -> None:
    if isinstance(here, list) and step == len(here):
        here.append(value)
    else:
        here[step] = value  # type: ignore[index]


def _forget(document: Document, key: Key) -> None:
    """What was known about the lines below a value that `--set` replaces."""
    size = len(key)
    document.lines = {other: line for other, line in document.lines.items() if other[:size] != key}
    document.sets = {other: text for other, text in document.sets.items() if other[:size] != key}
    document.problems = [problem for problem in document.problems if problem.key[:size] != key]
