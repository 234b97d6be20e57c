"""What is wrong with a job, said in the user's words: pydantic's errors as problems with places and suggestions.

pydantic stops at the first level that fails: a rule across options is not tried while one of them has a wrong type.
So `check` takes out what it has reported and tries again, and the user sees everything at once.
"""

from __future__ import annotations

import copy
import re
import types
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from detour.config.document import Key, Problem, dotted, found
from detour.config.job import QTYPE_ALIASES, Job, QType, Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic_core import ErrorDetails

PROCESS: Key = ("config", "process", 0)

# Names from other trainers and from papers -> the option here, from the process down.
SYNONYMS: dict[str, str] = {
    "name": "config.output_name",
    "training_folder": "config.output_folder",
    "training_adapter": "model.assistant_lora_path",
    "training_adapter_path": "model.assistant_lora_path",
    "adapter": "model.assistant_lora_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "rank": "network.linear",
    "lora_rank": "network.linear",
    "alpha": "network.linear_alpha",
    "lora_alpha": "network.linear_alpha",
    "learning_rate": "train.lr",
    "max_train_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "train_batch_size": "train.batch_size",
    "content_or_style": "train.timestep_bias",
    "weight_decay": "train.optimizer_params",
    "betas": "train.optimizer_params",
    "dataset": "datasets",
    "samples": "sample.prompts",
    "network_kwargs": "network.exclude",
    "loss_multiplier": "datasets.loss_weight",
    "random_crop": "datasets.crop",
    "validation_config": "validation",
    "use_wandb": "logging.wandb",
}

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "dict": "a section (lines of 'name: value')",
    "model": "a section (lines of 'name: value')",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}


def check(data: dict[str, Any]) -> tuple[Job | None, list[Problem]]:
    """The job, or everything that is wrong with it (keys are those of `data`)."""
    problems: list[Problem] = []
    taken: set[Key] = set()
    data = copy.deepcopy(data)
    while True:
        try:
            job = Job.model_validate(data)
        except ValidationError as error:
            fresh = [
                problem
                for problem, concerned in _explained(error, data)
                if problem not in problems and not any(_related(key, other) for key in concerned for other in taken)
            ]
        else:
            return (None if problems else job), problems
        if not fresh:
            return None, problems
        problems += fresh
        for problem in fresh:
            _take_out(data, problem.key)
            taken.add(problem.key)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant: spelling aside from case and signs first, then the closest by letters."""
    names = list(choices)

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    same = [name for name in names if plain(name) == plain(word)]
    return next(iter(same or get_close_matches(word.lower(), names, n=1, cutoff=0.6)), None)


def one_of(value: object, choices: Iterable[str]) -> str:
    """The message for a value outside a fixed list."""
    names = list(choices)
    guess = nearest(value, names) if isinstance(value, str) else None
    hint = f"; did you mean {guess!r}?" if guess else ""
    shown = repr(value) if isinstance(value, str) else found(value)
    return f"{shown} is not one of {', '.join(names)}{hint}"


def options_of(section: type[Section]) -> list[str]:
    """The names a section has."""
    return list(section.model_fields)


def all_options(kinds: Iterable[type[Section]]) -> dict[str, list[str]]:
    """Name of every option of these processes -> where it lives, from the process down (`lr` -> `train.lr`)."""
    places: dict[str, list[str]] = {}

    def walk(section: type[Section], above: str) -> None:
        for name, option in section.model_fields.items():
            places.setdefault(name, []).append(above + name)
            for inner in sections_in(option.annotation):
                walk(inner, f"{above}{name}.")

    for process in kinds:
        walk(process, "")
    return places


def kinds_of_process(key: Key, data: dict[str, Any]) -> list[type[Section]]:
    """The kinds of process that the one around a place may be: the one that its `type` says, else all."""
    kinds = list(sections_in(annotation_at(PROCESS)))
    said = lookup(data, (*key[: len(PROCESS)], "type"))
    return [kind for kind in kinds if said in get_args(kind.model_fields["type"].annotation)] or kinds


def sections_in(annotation: object) -> Iterator[type[Section]]:
    """The sections that a field holds, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def _explained(error: ValidationError, data: dict[str, Any]) -> Iterator[tuple[Problem, list[Key]]]:
    """Each problem, with the options that it concerns."""
    groups: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        groups.setdefault(_key(detail, data), []).append(detail)
    for key, details in groups.items():
        first = details[0]
        if first["type"] == "value_error":
            what = str(first.get("ctx", {}).get("error", first["msg"]))
            named = _named(what, key)
            given = [option for option in named if lookup(data, option) is not None]
            # The rules of a process are those of its type: nothing follows from them when that was a guess.
            yield (
                Problem(given[0] if given else key, _unprefixed(what, named)),
                [*named, (*key, "type")] if named else [key],
            )
        elif not _said_inside(key, groups):
            yield Problem(key, _what(key, details, data)), [key]


def _said_inside(key: Key, groups: dict[Key, list[ErrorDetails]]) -> bool:
    """Whether a value that may be a list or something else has its mistake within the list."""
    return len(groups[key]) > 1 and any(other[:-1] == key for other in groups)


def _key(detail: ErrorDetails, data: dict[str, Any]) -> Key:
    """The place in the file: pydantic's location without the names of union members and validators."""
    location = list(detail["loc"])
    if location[:2] == ["config", "process"] and len(location) > 3 and not _one_kind_of_process():
        del location[3]  # the name of the kind of process
    key: list[str | int] = []
    here: Any = data
    for place, part in enumerate(location):
        if _holds(here, part):
            here = here[part]
            key.append(part)
        elif detail["type"] == "missing" and place == len(location) - 1:
            key.append(part)
    return (*key, "type") if detail["type"].startswith("union_tag") else tuple(key)


def _one_kind_of_process() -> bool:
    return len(list(sections_in(annotation_at(PROCESS)))) == 1


def _named(message: str, key: Key) -> list[Key]:
    """The options that a rule's message names: `train.steps` stands for the one of the same process."""
    names = re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b|\bdatasets\b", message) if len(key) >= len(PROCESS) else []
    return [(*key[: len(PROCESS)], *name.split(".")) for name in names]


def _unprefixed(message: str, named: list[Key]) -> str:
    """The message without the option in front, which the place already names."""
    return message.removeprefix(f"{dotted(named[0][len(PROCESS) :])}: ") if named else message


def _what(key: Key, details: list[ErrorDetails], data: dict[str, Any]) -> str:
    first = details[0]
    value, context = first["input"], first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            what = _unknown(key, data)
        case "missing" | "union_tag_not_found":
            what = "missing" + _allowed(key)
        case "union_tag_invalid":
            what = one_of(context["tag"], _choices(str(context["expected_tags"])))
        case "literal_error":
            what = one_of(value, _choices(str(context["expected"])))
        case "too_short" | "string_too_short":
            what = "must not be empty"
        case "string_pattern_mismatch":
            what = f"{found(value)} does not fit; allowed: {pattern_words(str(context['pattern']))}"
        case kind if kind in _BOUNDS:
            bound, words = _BOUNDS[kind]
            what = f"must be {words} {context[bound]:g}, found {found(value)}"
        case _:
            what = _wrong_type(details, lookup(data, key) if len(details) > 1 else value)
    return what


def _wrong_type(details: list[ErrorDetails], value: object) -> str:
    expected = dict.fromkeys(_KINDS[name] for detail in details if (name := detail["type"].split("_")[0]) in _KINDS)
    if not expected:
        return f"{details[0]['msg']}, found {found(value)}"
    quotes = "; put it in quotes" if "text" in expected and isinstance(value, int | float) else ""
    return f"expected {' or '.join(expected)}, found {found(value)}{quotes}"


def _unknown(key: Key, data: dict[str, Any]) -> str:
    """The message for an option that does not exist: what was meant, or where it belongs, or what there is."""
    name, kinds = str(key[-1]), kinds_of_process(key, data)
    owners = kinds if len(key) == len(PROCESS) + 1 else sections_in(annotation_at(key[:-1]))
    known = [name for section in owners for name in options_of(section)]
    elsewhere = all_options(kinds).get(name, [])
    if name in SYNONYMS and not elsewhere:
        return f"unknown option; here it is {SYNONYMS[name]}"
    guess = nearest(name, known)
    hints = [f"did you mean {guess!r}?"] if guess else []
    if elsewhere:
        above = "config.process[0]." if len(key) <= len(PROCESS) else ""
        hints.insert(0, f"it belongs elsewhere ({above}{elsewhere[0]})")
    return f"unknown option; {', or '.join(hints) or 'there are ' + ', '.join(known)}"


def _choices(expected: str) -> list[str]:
    """The values in pydantic's `'a', 'b' or 'c'`; quantisation types with their other names."""
    names = re.findall(r"'([^']*)'", expected)
    return (
        [*names, *(alias for alias in QTYPE_ALIASES if alias not in names)] if names == list(get_args(QType)) else names
    )


def _allowed(key: Key) -> str:
    names = get_args(annotation_at(key)) if get_origin(annotation_at(key)) is Literal else ()
    return f"; one of {', '.join(map(str, names))}" if names else "; it has no default"


def pattern_words(pattern: str) -> str:
    """`auto, cpu, cuda:N` out of `^(auto|cpu|cuda(:\\d+)?)$`."""
    return ", ".join(re.sub(r"\(:\\d\+\)\?", "[:N]", pattern).strip("^()$").split("|"))


def annotation_at(key: Key) -> Any:  # noqa: ANN401
    """The type of the value at a place, `None` where nothing is known."""
    here: Any = Job
    for part in key:
        here = _bare(here)
        if isinstance(part, int):
            here = next(iter(get_args(here)), None)
        else:
            kinds = [here, *get_args(here)]  # a section, or a choice of sections
            owners = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
            here = next((kind.model_fields[part].annotation for kind in owners if part in kind.model_fields), None)
    return _bare(here)


def _bare(annotation: Any) -> Any:  # noqa: ANN401
    """Without `Annotated` and `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _take_out(data: dict[str, Any], key: Key) -> None:
    """Remove a value that has been reported; where something must stand, put a stand-in."""
    parent = lookup(data, key[:-1]) if key else None
    if isinstance(parent, list):
        if annotation_at(key) is None:
            _take_out(data, key[:-1])
        else:
            parent[int(key[-1])] = _stand_in(annotation_at(key))
    elif isinstance(parent, dict):
        name = str(key[-1])
        owners = list(sections_in(annotation_at(key[:-1])))
        if owners and name in owners[0].model_fields and owners[0].model_fields[name].is_required():
            kind = _kind_meant(parent.get(name)) if name == "type" and len(key) == len(PROCESS) + 1 else None
            parent[name] = kind or _stand_in(annotation_at(key))
        else:
            parent.pop(name, None)


def _kind_meant(said: object) -> str | None:
    """The type of process that was meant, so that its own options are not unknown."""
    kinds = sections_in(annotation_at(PROCESS))
    names = [name for kind in kinds for name in get_args(kind.model_fields["type"].annotation)]
    return nearest(said, names) if isinstance(said, str) else None


def _stand_in(annotation: Any) -> Any:  # noqa: ANN401
    """Some value that passes as the type."""
    annotation = _bare(annotation)
    if get_origin(annotation) is Literal:
        return get_args(annotation)[0]
    if get_origin(annotation) is list:
        return [_stand_in(get_args(annotation)[0])]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {
            name: _stand_in(option.annotation)
            for name, option in annotation.model_fields.items()
            if option.is_required()
        }
    return 1024 if annotation in (int, float) else "x"


def lookup(data: object, key: Key) -> Any:  # noqa: ANN401
    """The value at a place, `None` where there is none."""
    here: Any = data
    for part in key:
        if not _holds(here, part):
            return None
        here = here[part]
    return here


def _holds(here: object, part: str | int) -> bool:
    """Whether a mapping has the name, or a list the place."""
    return part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))


def _related(one: Key, other: Key) -> bool:
    size = min(len(one), len(other))
    return one[:size] == other[:size]
