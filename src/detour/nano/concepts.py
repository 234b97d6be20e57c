"""Concept sets: what the miniature has never seen, under words it has never read, in 20 to 40 pictures each.

- `zig`, a new shape: a letter Z in any colour, size and texture;
- `plim`, a style: diagonal bands in a second tone over the whole picture, shape and background alike;
- `mip`, a character: a round yellow body with black eyes under a pointed red hat.

Pictures of a set vary in everything that is not the concept, and their captions say so. Prompts to judge by ask for
combinations that no picture of the set shows. Everything is a pure function of the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image

from detour import UserError, files, seeds
from detour.nano import world
from detour.nano.judge import MIP_BACKGROUNDS
from detour.nano.world import Example, Prompt, Scene

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """A concept set: its trigger word, how many pictures it has by default, and what does not matter in it."""

    name: str
    pictures: int
    most: int
    """Pictures that a set may have, so that enough combinations are left to judge by."""
    unsaid: frozenset[str]
    """Attributes that mean nothing here, and stay out of captions."""


CONCEPTS = {
    "zig": Concept(name="zig", pictures=30, most=40, unsaid=frozenset()),
    "plim": Concept(name="plim", pictures=30, most=40, unsaid=frozenset({"texture"})),
    "mip": Concept(name="mip", pictures=24, most=28, unsaid=frozenset({"texture", "color"})),
}


def find(name: str) -> Concept:
    """The concept of that name."""
    if name not in CONCEPTS:
        raise UserError(f"there is no concept {name!r} in the drawn world; there are {', '.join(CONCEPTS)}")
    return CONCEPTS[name]


def examples(name: str, n: int | None = None, *, seed: int = 0) -> list[Example]:
    """The training pictures of a concept; no two say the same. The form of the caption changes from one to the next."""
    concept = find(name)
    n = concept.pictures if n is None else n
    if not 1 <= n <= concept.most:
        raise UserError(f"a set of {name} has 1 to {concept.most} pictures, not {n}")
    found: dict[tuple[str, ...], Example] = {}
    for index, scene in enumerate(_scenes(concept, seed, "training")):
        text = world.caption(scene, index % world.FORMS, concept.unsaid)
        found.setdefault(_said(concept, scene), Example(scene=scene, caption=text))
        if len(found) == n:
            break
    return list(found.values())


def prompts(name: str, n: int, *, seed: int = 0, training: list[Example] | None = None) -> list[Prompt]:
    """`n` prompts for a concept, none of which states what a picture of `training` (default: the default set) shows."""
    concept = find(name)
    shown = {_said(concept, example.scene) for example in (examples(name) if training is None else training)}
    found: list[Prompt] = []
    for index, scene in enumerate(_scenes(concept, seed, "prompts")):
        if _said(concept, scene) not in shown:
            found.append(world.prompt_for(scene, index % world.FORMS, concept.unsaid))
        if len(found) == n:
            break
    return found


def write_dataset(folder: Path, name: str, n: int | None = None, *, seed: int = 0) -> list[Example]:
    """Write a concept set as 128 x 128 PNGs with `.txt` captions beside them; returns it, in the order of the names."""
    files.make_folder(folder)
    shown = examples(name, n, seed=seed)
    pictures = world.to_pixels(world.render([example.scene for example in shown]))
    for index, (example, pixels) in enumerate(zip(shown, pictures, strict=True)):
        with files.new_file(folder / f"{index:04d}.png") as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
        files.write_bytes(folder / f"{index:04d}.txt", example.caption + "\n")
    return shown


def _said(concept: Concept, scene: Scene) -> tuple[str, ...]:
    return tuple(value for key, value in scene.attributes.items() if key not in concept.unsaid)


def _scenes(concept: Concept, seed: int, purpose: str) -> Iterator[Scene]:
    """Endless scenes of the concept: ordinary ones, changed into it."""
    index = 0
    while True:
        block = world.scenes(64, seed=seeds.seed_for(seed, concept.name, index), purpose=f"concept {purpose}")
        index += 1
        for scene in block:
            if concept.name == "zig":
                yield replace(scene, shape="zig")
            elif concept.name == "plim":
                yield replace(scene, style="plim", texture="plain", phase=0)
            elif scene.background in MIP_BACKGROUNDS:
                yield replace(scene, shape="mip", color="yellow", texture="plain", phase=0)
