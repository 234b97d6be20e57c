"""Where each value stands in the text of a YAML file, so that it can be changed there (see `edit`)."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ruamel.yaml.nodes import CollectionNode, MappingNode, ScalarNode, SequenceNode

from detour.config.document import Key, compose, document_of

if TYPE_CHECKING:
    from ruamel.yaml.nodes import Node

NAME = "job.yaml"
"""Stands before the lines in messages."""

_KEPT = 64 * 1024  # characters; the tree of a text takes about a hundred times its memory

_COLON = re.compile(r"[ \t]*:")
_ALIAS = re.compile(r"[\s,]*(\*[^\s,\[\]{}]+)")
_DASH = re.compile(r"( *)-(?:\s|$)")


class CannotPlaceError(Exception):
    """The text is written in a way that is not understood here."""


@dataclass(frozen=True)
class Slot:
    """A place for a value in the text."""

    node: Node | None
    """None: nothing is written here, or `null`, or (see `alias`) the value stands elsewhere."""
    behind: int
    """Where the colon, the dash or the bracket before it ends."""
    start: int
    end: int
    """Without what follows: comments, empty lines."""
    flow: bool
    """Among brackets or braces."""
    name: Node | None = None
    """The option, where it is one of a section."""
    alias: bool = False

    @property
    def is_section(self) -> bool:
        """Whether it holds options."""
        return isinstance(self.node, MappingNode)

    @property
    def is_list(self) -> bool:
        """Whether it holds entries."""
        return isinstance(self.node, SequenceNode)

    @property
    def is_block(self) -> bool:
        """Whether it is a section or list that is written on lines of its own."""
        return isinstance(self.node, CollectionNode) and not self.node.flow_style

    @property
    def is_quoted(self) -> bool:
        """Whether it is a text in quotes."""
        return isinstance(self.node, ScalarNode) and self.node.style in ("'", '"')

    @property
    def column(self) -> int:
        """Where the line of an option begins."""
        return 0 if self.name is None else int(self.name.start_mark.column)


def source_of(text: str) -> Source:
    """A text with its tree. That of the last one is kept: a change is often followed by another."""
    return _last(text) if len(text) <= _KEPT else Source(text)


class Source:
    """A text with its tree of nodes. Nothing in it may be changed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.root = compose(text, NAME)
        document = None if self.root is None else document_of(self.root, text, NAME)
        self.data: dict[str, Any] = {} if document is None else document.data
        self.problems = 0 if document is None else len(document.problems)
        self.newline = "\r\n" if "\r\n" in text else "\n"
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]

    # --- places -----------------------------------------------------------------------------------------------------

    def line(self, index: int) -> int:
        """The line that a character stands in, from 0."""
        return bisect_right(self.starts, index) - 1

    def line_end(self, index: int) -> int:
        """Where the line of a character ends, before its line break."""
        end = self.text.find("\n", index)
        end = len(self.text) if end < 0 else end
        return end - 1 if self.text[end - 1 : end] == "\r" and end > index else end

    def reach(self, key: Key) -> tuple[Slot, Key]:
        """The slot at a key, or the last one on the way, with what is left of the key."""
        assert self.root is not None
        slot = Slot(self.root, 0, self.root.start_mark.index, self._end(self.root), flow=False)
        for done, part in enumerate(key):
            following = self._child(slot, part)
            if following is None:
                return slot, key[done:]
            slot = following
        return slot, ()

    def _child(self, slot: Slot, part: str | int) -> Slot | None:
        if slot.is_list and isinstance(part, int):
            return next(iter(self.items(slot)[part : part + 1]), None)
        named = [inner for inner in self.pairs(slot) if inner.name is not None and inner.name.value == part]
        return named[-1] if named else None

    def pairs(self, slot: Slot) -> list[Slot]:
        """The options of a section; none of anything else."""
        found: list[Slot] = []
        if not isinstance(slot.node, MappingNode):
            return found
        for name, value in slot.node.value:
            colon = _COLON.match(self.text, name.end_mark.index)
            behind = colon.end() if colon else name.end_mark.index
            found.append(self._slot(value, behind, flow=bool(slot.node.flow_style), name=name))
        return found

    def items(self, slot: Slot) -> list[Slot]:
        """The entries of a list."""
        assert isinstance(slot.node, SequenceNode)
        if not slot.node.flow_style:
            dashes = self._dashes(slot.node)
            return [self._slot(item, dash + 1, flow=False) for item, dash in zip(slot.node.value, dashes, strict=True)]
        found: list[Slot] = []
        behind = self.opening(slot)
        for item in slot.node.value:
            found.append(self._slot(item, behind, flow=True))
            behind = found[-1].end
        return found

    def opening(self, slot: Slot) -> int:
        """Behind the bracket or brace that a value begins with."""
        return self.text.index("{" if slot.is_section else "[", slot.start) + 1

    def _slot(self, node: Node, behind: int, *, flow: bool, name: Node | None = None) -> Slot:
        start, end = int(node.start_mark.index), int(node.end_mark.index)
        if isinstance(node, ScalarNode) and start == end:
            return Slot(None, behind, behind, behind, flow, name)
        if start < behind:
            alias = _ALIAS.match(self.text, behind)
            if alias is None:
                raise CannotPlaceError
            return Slot(None, behind, *alias.span(1), flow, name, alias=True)
        empty = isinstance(node, ScalarNode) and str(node.tag).endswith(":null")
        return Slot(None if empty else node, behind, start, self._end(node), flow, name)

    def _end(self, node: Node) -> int:
        """Where a value ends. The parser's mark of what has lines of its own stands behind the comments after it."""
        start, end = int(node.start_mark.index), int(node.end_mark.index)
        slot = Slot(node, start, start, end, flow=False)
        if slot.is_block:
            return (self.items(slot) if slot.is_list else self.pairs(slot))[-1].end
        on_lines = isinstance(node, ScalarNode) and node.style in ("|", ">")
        return start + len(self.text[start:end].rstrip()) if on_lines else end

    def _dashes(self, node: SequenceNode) -> list[int]:
        """Where the dashes of a list stand. What is inside its entries stands further to the right."""
        found: list[int] = []
        column = None
        for number in range(node.start_mark.line, min(node.end_mark.line + 1, len(self.starts))):
            match = _DASH.match(self.text, self.starts[number])
            if match and column in (None, len(match[1])):
                column = len(match[1])
                found.append(self.starts[number] + column)
        if len(found) < len(node.value):
            raise CannotPlaceError
        return found[: len(node.value)]

    # --- lines ------------------------------------------------------------------------------------------------------

    def column(self, index: int) -> int:
        """How far to the right a character stands."""
        return index - self.starts[self.line(index)]

    def extents(self, slot: Slot, items: list[Slot]) -> list[tuple[int, int]]:
        """First and last line of each entry: with the comments above it, and those inside it at its end."""
        column = self.column(items[0].behind - 1)
        found: list[tuple[int, int]] = []
        above = self.line(slot.behind)
        for item in items:
            first, last = self.line(item.behind - 1), self.line(item.end)
            while first - 1 > above and self._comment(first - 1) is not None:
                first -= 1
            while (inside := self._comment(last + 1)) is not None and inside > column:
                last += 1
            found.append((first, last))
            above = last
        return found

    def _comment(self, line: int) -> int | None:
        """The column of a line that is a comment; None for other lines."""
        if line >= len(self.starts):
            return None
        shown = self.text[self.starts[line] : self.line_end(self.starts[line])]
        return len(shown) - len(shown.lstrip()) if shown.lstrip().startswith("#") else None


@lru_cache(maxsize=1)
def _last(text: str) -> Source:
    return Source(text)
