"""The tools with which a section of an ai-toolkit file is read: checked names, values with their origin, notes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detour.config import aitoolkit_keys as keys
from detour.config.document import Key, Problem, dotted, found
from detour.config.explain import SYNONYMS, annotation_at, nearest, sections_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from detour.config.aitoolkit_keys import Rules

# PyYAML, which ai-toolkit reads with, takes these words for switches; YAML 1.2 takes them for text.
_SWITCHES = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}

_SECTIONS: dict[str, Rules] = {
    "model": keys.MODEL, "network": keys.NETWORK, "save": keys.SAVE, "datasets[0]": keys.DATASET, "train": keys.TRAIN,
    "logging": keys.LOGGING, "sample": keys.SAMPLE, "process[0]": keys.PROCESS, "config": keys.CONFIG,
    "train.ema_config": keys.EMA, "train.validation_config": keys.VALIDATION,
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A value for the job, and the place in the file that it came from."""

    value: Any
    key: Key
    given: bool = True
    """False: the file leaves it out, and this is ai-toolkit's default."""

    def map(self, change: Callable[[Any], Any]) -> Value:
        """The same place with another value."""
        return Value(change(self.value), self.key, self.given)


@dataclass
class Translation:
    """A file in ai-toolkit's layout as the values of a job."""

    data: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    origins: dict[Key, Key] = field(default_factory=dict)
    """Option of the job -> place in the file."""
    assumed: list[tuple[Key, Any]] = field(default_factory=list)
    """ai-toolkit's defaults that were taken and differ from Detour's."""

    def place(self, tree: Any, key: Key) -> Any:  # noqa: ANN401
        """Plain values out of a tree with `Value` leaves; remembers where each came from."""
        if isinstance(tree, dict):
            return {name: self.place(inner, (*key, name)) for name, inner in tree.items()}
        if isinstance(tree, list):
            return [self.place(inner, (*key, index)) for index, inner in enumerate(tree)]
        if not isinstance(tree, Value):
            return tree
        self.origins[key] = tree.key
        if not tree.given and tree.value != _default(key):
            self.assumed.append((tree.key, tree.value))
        return tree.value


def _default(key: Key) -> object:
    """Detour's default for an option of the job."""
    for section in sections_in(annotation_at(key[:-1])):
        if key[-1] in section.model_fields:
            return section.model_fields[str(key[-1])].get_default()
    return None


class Part:
    """One section of the file. Names that ai-toolkit does not know become problems when the part is made."""

    def __init__(self, out: Translation, rules: Rules, values: object, at: Key) -> None:
        self.out, self.rules, self.at = out, rules, at
        self.values: dict[str, Any] = values if isinstance(values, dict) else {}
        if values is not None and not isinstance(values, dict):
            out.problems.append(Problem(at, f"expected a section (lines of 'name: value'), found {found(values)}"))
        for name, value in self.values.items():
            self._judge(name, switched(value))

    def _judge(self, name: str, value: object) -> None:
        rule = self.rules.get(name)
        if rule is None:
            self.refuse(name, _unknown(name, self.rules))
        elif rule.asks_nothing(value):
            return
        elif rule.kind == "noted":
            self.note(name, f"{shown(value)}: {rule.why}")
        else:
            instead = f"remove it or set it to {shown(rule.fine[0])}" if rule.fine else "remove it"
            self.refuse(name, f"{shown(value)} is not available in Detour ({rule.why}); {instead}")

    def key(self, name: str) -> Key:
        """The place of an option, in the file or not."""
        return (*self.at, name)

    def refuse(self, name: str, what: str) -> None:
        """Something that must be put right."""
        self.out.problems.append(Problem(self.key(name), what))

    def note(self, name: str, what: str) -> None:
        """Something that works out differently here."""
        self.out.notes.append(Problem(self.key(name), what))

    def has(self, name: str) -> bool:
        """Whether the file gives the option a value."""
        assert self.rules[name].kind == "read", f"{name} is not marked as read"
        return self.values.get(name) is not None

    def raw(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """The value as it stands; an empty one is as good as none, for ai-toolkit's form writes `null`."""
        return self.values[name] if self.has(name) else default

    def value(self, name: str, default: Any = None) -> Value:  # noqa: ANN401
        """The value with its place, for an option that means the same here. The schema checks it."""
        return Value(self.raw(name, default), self.key(name), self.has(name))

    def flag(self, name: str, *, default: bool) -> bool:
        """A switch that decides something in the translation."""
        value = switched(self.raw(name, default))
        if not isinstance(value, bool):
            self.refuse(name, f"expected true or false, found {found(value)}")
            return default
        return value

    def number(self, name: str, default: float) -> float:
        """A number that the translation calculates with."""
        value = self.raw(name, default)
        try:
            return default if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            self.refuse(name, f"expected a number, found {found(value)}")
            return default

    def text(self, name: str, default: str) -> str:
        """A word that decides something in the translation."""
        value = self.raw(name, default)
        if not isinstance(value, str):
            self.refuse(name, f"expected text, found {found(value)}")
            return default
        return value

    def part(self, name: str, rules: Rules) -> Part:
        """A section within this one."""
        return Part(self.out, rules, self.raw(name), self.key(name))

    def parts(self, name: str, rules: Rules) -> list[Part]:
        """A list of sections."""
        values = self.raw(name, [])
        if not isinstance(values, list):
            self.refuse(name, f"expected a list (lines that begin with '- '), found {found(values)}")
            return []
        return [Part(self.out, rules, value, (*self.key(name), index)) for index, value in enumerate(values)]


def switched(value: object) -> object:
    """`yes` and `off` as the switches that PyYAML makes of them."""
    return _SWITCHES.get(value.lower(), value) if isinstance(value, str) else value


def shown(value: object) -> str:
    """A value as it would stand in the file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "what is set"
    return str(value)


def map_texts(value: Any, change: Callable[[str, Key], Any], key: Key = ()) -> Any:  # noqa: ANN401
    """The same tree with every text changed."""
    if isinstance(value, dict):
        return {name: map_texts(inner, change, (*key, name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [map_texts(inner, change, (*key, index)) for index, inner in enumerate(value)]
    return change(value, key) if isinstance(value, str) else value


def as_patterns(part: Part, name: str) -> Value:
    """ai-toolkit's words that a layer's name contains, as regular expressions for the names used here.

    There, names begin with `transformer.` and may be written with `$$` for the dots.
    """

    def pattern(word: object) -> object:
        if not isinstance(word, str):
            return word
        word = word.replace("$$", ".")
        anchored = word.startswith("transformer.")
        return ("^" if anchored else "") + re.escape(word.removeprefix("transformer.")).replace(r"\-", "-")

    def patterns(words: Any) -> Any:  # noqa: ANN401
        words = [words] if isinstance(words, str) else words
        return [pattern(word) for word in words] if isinstance(words, list) else words

    return part.value(name, []).map(patterns)


def _unknown(name: str, rules: Iterable[str]) -> str:
    if guess := nearest(name, rules):
        return f"ai-toolkit has no such option; did you mean {guess!r}?"
    if (synonym := SYNONYMS.get(name, "").rpartition(".")[2]) in rules:
        return f"ai-toolkit has no such option; there it is {synonym!r}"
    homes = [section for section, known in _SECTIONS.items() if name in known and known is not rules]
    if homes:
        return f"ai-toolkit has no such option here; it belongs in {homes[0]}"
    return "ai-toolkit has no such option (Detour's own options need Detour's own layout, see examples/)"


def assumed_note(out: Translation, process: Key) -> None:
    """One note about all defaults of ai-toolkit that were taken for a process."""
    taken = [(key, value) for key, value in out.assumed if key[: len(process)] == process]
    if taken:
        texts = ", ".join(f"{dotted(key[len(process) :])} {shown(value)}" for key, value in taken)
        out.notes.append(Problem(process, f"left out of the file, so that ai-toolkit's defaults hold: {texts}"))
