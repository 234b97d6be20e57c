"""The drawn world: deterministic, captions that say what pictures show, dials that do what they say."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detour.nano import concepts, judge, world
from detour.nano.drawn import COLORS
from detour.nano.world import Dials

SCENES = world.scenes(300)


def test_scenes_are_a_function_of_the_seed_and_do_not_depend_on_how_many() -> None:
    assert world.scenes(20) == SCENES[:20]
    assert world.scenes(20, seed=1) != SCENES[:20]
    assert world.training_set(30, dials=Dials(junk=0.5))[:7] == world.training_set(7, dials=Dials(junk=0.5))
    assert world.prompts(9, seed=3)[:4] == world.prompts(4, seed=3)


def test_every_value_occurs_and_held_out_combinations_never_in_training() -> None:
    for name in world.ATTRIBUTES:
        values = {"shape": world.SHAPES, "place": world.PLACES, "size": world.SIZES, "texture": world.TEXTURES}
        assert {scene.attributes[name] for scene in SCENES} == set(values.get(name, COLORS))
    noisy = world.training_set(400, dials=Dials(wrong=0.5, wrong_word=1.0))
    assert not [example for example in noisy if (example.scene.shape, example.scene.color) in world.HELD_OUT]
    told = [example.caption for example in noisy]
    assert not [text for shape, color in world.HELD_OUT for text in told if f"{color} {shape}" in text]
    held_out = world.scenes(60, split="held_out")
    assert {(scene.shape, scene.color) for scene in held_out} == set(world.HELD_OUT)
    words = {word for shape, color in world.HELD_OUT for word in (shape, color)}
    assert words <= {value for scene in SCENES for value in scene.attributes.values()}, "each word is known"


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 299), form=st.integers(0, world.FORMS - 1), out=st.sets(st.sampled_from(["place", "size"])))
def test_a_caption_states_all_but_what_is_left_out(index: int, form: int, out: set[str]) -> None:
    scene = SCENES[index]
    prompt = world.prompt_for(scene, form, frozenset(out))
    said = prompt.text.replace(",", "").split()
    for name, value in scene.attributes.items():
        assert (value in said) == (name not in out), (name, prompt.text)
    assert prompt.wanted == {k: v for k, v in scene.attributes.items() if k not in out} | {"style": ""}
    assert len(said) <= 16


def test_true_scenes_for_a_prompt_differ_only_in_what_it_leaves_open() -> None:
    asked = [
        *world.prompts(8, dials=Dials(unstated_size=1.0)),
        *(p for c in concepts.CONCEPTS for p in concepts.prompts(c, 4)),
    ]
    for prompt in asked:
        found = world.scenes_for(prompt, 12)
        assert found == world.scenes_for(prompt, 12) and found[:3] == world.scenes_for(prompt, 3)
        for scene in found:
            shown = scene.attributes | {"style": scene.style}
            assert {name: shown[name] for name in prompt.wanted} == prompt.wanted
        assert len({scene.grain for scene in found}) == 12, "which no prompt states"
        assert judge.score(world.render(found), [prompt] * 12).strict_N.all()
        if "size" not in prompt.wanted:
            assert {scene.size for scene in found} == set(world.SIZES)


def share(examples: list[world.Example], what: str) -> float:
    def holds(example: world.Example) -> bool:
        words = set(example.caption.replace(",", "").split())
        wrong = sum(value not in words for value in example.scene.attributes.values())
        return {"empty": not words, "junk": example.junk, "one": wrong == 1, "two": wrong > 1}[what]

    return sum(holds(example) for example in examples) / len(examples)


def test_dials_put_in_the_share_that_they_say() -> None:
    clean = world.training_set(1000, dials=Dials())
    assert [share(clean, what) for what in ("empty", "junk", "one", "two")] == [0, 0, 0, 0]
    for dials, what, expected in (
        (Dials(empty=0.2), "empty", 0.2),
        (Dials(junk=0.3), "junk", 0.3),
        (Dials(wrong_word=0.4), "one", 0.4),
        (Dials(unstated_place=0.25), "one", 0.25),
        (Dials(unstated_size=0.5, unstated_texture=1.0), "two", 0.5),
        (Dials(wrong=0.3), "two", 0.3),
    ):
        assert abs(share(world.training_set(1000, dials=dials), what) - expected) < 0.05, dials
    with pytest.raises(ValueError, match="wrong"):
        Dials(wrong=1.5)


def test_pictures_are_what_their_scenes_say() -> None:
    pictures = world.render([replace(scene, grain=None) for scene in SCENES])
    assert pictures.shape == (300, 32, 32, 3) and pictures.dtype == np.float32
    for scene, picture in zip(SCENES, pictures, strict=True):
        ground = np.array(COLORS[scene.background]) / 255
        assert np.allclose(picture[0, 0], ground, atol=1e-6)
        shape = np.abs(picture - ground).max(axis=-1) > 0.02
        rows, columns = np.nonzero(shape)
        x, y = world.PLACES[scene.place]
        middle = (16 + x + scene.jitter[0], 16 + y + scene.jitter[1])
        assert abs((columns.min() + columns.max() + 1) / 2 - middle[0]) <= 1
        assert abs((rows.min() + rows.max() + 1) / 2 - middle[1]) <= 1.5
        width = columns.max() - columns.min() + 1
        assert abs(width - 2 * world.SIZES[scene.size]) <= 2
        assert width >= 8, "several tokens (of 4 cells) wide"
        tones = {tuple(np.round(picture[r, c] * 255).astype(int)) for r, c in zip(rows, columns, strict=True)}
        tone = tuple(np.round(world.paint_color("shape tone", scene.color, scene.background) * 255).astype(int))
        assert tuple(COLORS[scene.color]) in tones
        assert (tone in tones) == (scene.texture == "striped")


def test_regions_share_out_every_cell() -> None:
    styled = [replace(scene, style="plim", texture="plain") for scene in SCENES[:40]]
    for scene in (*SCENES[:40], *styled, replace(SCENES[0], shape="mip", texture="plain")):
        regions = world.regions_of(world.geometry_of(scene))
        assert np.allclose(sum(regions.values()), 1, atol=1e-5)
        assert all((region >= 0).all() for region in regions.values())
        assert set(regions) <= set(world.PAINTS)
    with pytest.raises(AssertionError):
        world.regions_of(world.geometry_of(replace(SCENES[0], style="plim", texture="striped")))


def test_the_ground_is_the_picture_without_its_shape() -> None:
    shown = [SCENES[0], replace(SCENES[1], style="plim", texture="plain")]
    pictures, grounds = world.render(shown), world.render_grounds(shown)
    outside = np.ones((32, 32), bool)
    for index, scene in enumerate(shown):
        regions = world.regions_of(world.geometry_of(scene))
        outside = sum(part for paint, part in regions.items() if paint.startswith("background")) > 0.999
        assert np.array_equal(pictures[index][outside], grounds[index][outside])
        assert not np.array_equal(pictures[index], grounds[index])


def test_pixels_are_four_by_four_cells_and_come_back() -> None:
    pictures = world.render(SCENES[:10])
    pixels = world.to_pixels(pictures)
    assert pixels.shape == (10, 128, 128, 3)
    assert np.array_equal(world.from_pixels(pixels), pictures)
    with pytest.raises(ValueError, match="128 pixels"):
        world.from_pixels(pixels[:, :64])


def test_junk_is_blurred_past_recognition_and_blur_keeps_the_mean() -> None:
    examples = world.training_set(40, dials=Dials(junk=0.5))
    pictures = world.render_training_set(examples)
    clean = world.render([example.scene for example in examples])
    for example, picture, own in zip(examples, pictures, clean, strict=True):
        assert np.array_equal(picture, own) != example.junk
    blurred = world.blurred(clean, 1.0)
    assert np.allclose(blurred.mean(axis=(1, 2)), clean.mean(axis=(1, 2)), atol=0.02)
    assert np.square(np.diff(blurred, axis=1)).sum() < 0.6 * np.square(np.diff(clean, axis=1)).sum()
