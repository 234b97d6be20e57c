"""The judge on drawings that were spoilt in a known way: each figure changes when and only when it should."""

from dataclasses import replace

import numpy as np
import pytest

from detour.nano import concepts, judge, world
from detour.nano.drawn import COLORS
from detour.nano.judge import Scores
from detour.nano.world import Scene

N = 96
SHOWN = world.scenes(N, seed=5)
PROMPTS = [world.prompt_for(scene) for scene in SHOWN]
CLEAN = world.render(SHOWN)
GROUNDS = world.render_grounds(SHOWN)
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "centre": "left"}


def scores(pictures: np.ndarray) -> Scores:
    return judge.score(np.asarray(pictures, np.float32), PROMPTS)


def figures(pictures: np.ndarray) -> dict[str, float]:
    return scores(pictures).summary()


def noise(sigma: float) -> np.ndarray:
    return sigma * np.random.default_rng(0).standard_normal(CLEAN.shape)


def test_clean_drawings_are_perfect() -> None:
    found = figures(CLEAN)
    for name in (*world.ATTRIBUTES, "style", "present", "clean", "strict"):
        assert found[name] == 1, name
    assert found["fit"] < 1e-4 and abs(found["mud"]) < 1e-3
    assert found["sharpness"] == pytest.approx(1, abs=1e-2)
    assert found["grain"] == pytest.approx(1, abs=0.03)
    assert [found[f"shows_{name}"] for name in concepts.CONCEPTS] == [0, 0, 0]
    assert max(found[f"pull_{name}"] for name in concepts.CONCEPTS) < 0.02


def changed(name: str) -> tuple[list[Scene], list[int]]:
    """The scenes with another value of one attribute, and which of them have it (colours must stay apart)."""
    values = {
        "shape": world.SHAPES, "color": tuple(COLORS), "background": tuple(COLORS), "place": tuple(world.PLACES),
        "size": tuple(world.SIZES), "texture": world.TEXTURES,
    }[name]  # fmt: skip
    found, index = [], []
    for at, scene in enumerate(SHOWN):
        value = values[(values.index(scene.attributes[name]) + 1) % len(values)]
        other = world._changed(scene, name, value)
        legal = other.color != other.background
        found.append(other if legal else scene)
        index += [at] if legal else []
    return found, index


@pytest.mark.parametrize("name", world.ATTRIBUTES)
def test_one_wrong_attribute_is_wrong_and_no_other(name: str) -> None:
    pictures, index = changed(name)
    found = scores(world.render(pictures))
    for attribute in world.ATTRIBUTES:
        assert (found.right[attribute][index] == (attribute != name)).all(), attribute
    assert not found.strict_N[index].any() and not found.as_told_N[index].any()
    assert found.clean_N.all(), "wrong, but well drawn"


def test_what_a_prompt_does_not_state_is_not_judged() -> None:
    pictures, _ = changed("place")
    prompts = [world.prompt_for(scene, left_out=frozenset({"place"})) for scene in SHOWN]
    found = judge.score(world.render(pictures), prompts)
    assert np.isnan(found.right["place"]).all() and found.strict_N.all()
    assert "place" not in found.summary()


@pytest.mark.parametrize(("sigma", "clean_from", "clean_to"), [(0.02, 1, 1), (0.05, 0.1, 0.6), (0.1, 0, 0)])
def test_noise_spoils_cleanness_and_nothing_else(sigma: float, clean_from: float, clean_to: float) -> None:
    found = figures(CLEAN + noise(sigma))
    assert min(found[name] for name in (*world.ATTRIBUTES, "present")) == 1
    assert clean_from <= found["clean"] <= clean_to
    assert found["sharpness"] == pytest.approx(1, abs=0.03), "noise does not count as sharpness"


def test_heavy_noise_makes_mud_and_does_not_hide_the_shape() -> None:
    found = figures(CLEAN + noise(0.2))
    assert found["mud"] > 0.3 and found["strict"] == 0
    assert found["present"] > 0.9 and found["background"] > 0.95


def test_blur_lowers_sharpness_step_by_step_and_then_the_rest() -> None:
    rows = {sigma: figures(world.blurred(CLEAN, sigma)) for sigma in (0.4, 0.8, 1.5, 3.0)}
    sharpness = [row["sharpness"] for row in rows.values()]
    assert sharpness == sorted(sharpness, reverse=True) and sharpness[0] > 0.85 and sharpness[-1] < 0.3
    assert min(rows[0.4][name] for name in (*world.ATTRIBUTES, "strict")) == 1
    assert min(rows[0.8][name] for name in world.ATTRIBUTES) > 0.95, "slightly blurred, still recognised"
    assert rows[0.8]["clean"] < 0.5 and rows[1.5]["clean"] == rows[3.0]["strict"] == 0
    assert rows[3.0]["background"] == 1


def test_a_jitter_of_a_cell_is_nothing_and_another_place_is_wrong() -> None:
    for move in ((1, 0), (0, -1), (-1, 1), (0.5, 0.5)):
        inside = [scene for scene in SHOWN if max(abs(scene.jitter[k] + move[k]) for k in (0, 1)) <= 1.5]
        moved = [replace(s, jitter=(s.jitter[0] + move[0], s.jitter[1] + move[1])) for s in inside]
        assert judge.score(world.render(moved), [world.prompt_for(scene) for scene in inside]).strict_N.all(), move


@pytest.mark.parametrize(("faded", "present", "clean"), [(0.1, 1.0, 1.0), (0.5, 0.1, 0.1), (0.9, 0.0, 0.0)])
def test_a_faded_shape_is_absent(faded: float, present: float, clean: float) -> None:
    found = figures((1 - faded) * CLEAN + faded * GROUNDS)
    strict = found["strict"]
    assert found["background"] > 0.97, "the background is as it was"
    if present == 1:
        assert found["present"] == 1 and found["clean"] == clean and strict == 1
    else:
        assert strict <= clean
        assert found["color"] < 0.45
    assert found["sharpness"] < 1.01 - faded / 2


@pytest.mark.parametrize(("share", "clean"), [(0.0, 0), (0.5, 0), (0.6, 0), (0.8, 1), (1.0, 1)])
def test_the_grain_is_measured_and_most_of_it_must_be_there(share: float, clean: int) -> None:
    """What few steps of an ordinary model lose; all else is as it was."""
    plain = world.render([replace(scene, grain=None) for scene in SHOWN])
    found = figures(plain + share * (CLEAN - plain))
    assert found["grain"] == pytest.approx(share, abs=0.03)
    assert found["clean"] == found["strict"] == clean and found["as_told"] == 1
    assert min(found[name] for name in (*world.ATTRIBUTES, "present")) == 1 and found["fit"] < 1e-3


def test_an_empty_picture_has_its_background_and_no_shape() -> None:
    found = figures(GROUNDS)
    assert found["background"] == 1
    assert found["present"] == found["clean"] == found["strict"] == 0
    assert max(found[name] for name in world.ATTRIBUTES if name != "background") == 0
    grey = figures(np.full_like(CLEAN, 0.5))
    assert grey["present"] == grey["background"] == grey["strict"] == 0


def test_blends_are_not_clean() -> None:
    other = np.roll(CLEAN, 1, axis=0)
    slight, half = figures(0.9 * CLEAN + 0.1 * other), figures(0.5 * CLEAN + 0.5 * other)
    assert slight["shape"] == slight["color"] == 1
    assert half["clean"] == half["strict"] == 0 and half["mud"] > 0.3


def test_a_patchwork_of_two_places_is_not_clean() -> None:
    away = world.render([replace(scene, place=OPPOSITE[scene.place]) for scene in SHOWN])
    halves = np.concatenate([CLEAN[:, :, :16], away[:, :, 16:]], axis=2)
    twice = np.where(np.abs(away - GROUNDS).max(axis=-1, keepdims=True) > 0.02, away, CLEAN)
    for pictures in (halves, twice):
        found = figures(pictures)
        assert found["strict"] <= found["clean"] < 0.02, "one of two colours that a grain makes alike"
        assert found["background"] > 0.9


def test_thresholds_go_with_the_area_of_the_shape() -> None:
    """The same share of a small and of a large shape is missing: both fits are the same to a third."""
    fits = {}
    for size in world.SIZES:
        shown = [replace(scene, size=size, shape="square", texture="plain") for scene in SHOWN]
        pictures, grounds = world.render(shown), world.render_grounds(shown)
        fits[size] = judge.score(0.8 * pictures + 0.2 * grounds, [world.prompt_for(scene) for scene in shown]).fit_N
    assert np.median(fits["small"] / fits["large"]) == pytest.approx(1, abs=0.33)


@pytest.mark.parametrize("name", concepts.CONCEPTS)
def test_each_concept_is_recognised_as_itself(name: str) -> None:
    examples = concepts.examples(name)
    prompts = [world.prompt_for(e.scene, 0, concepts.find(name).unsaid) for e in examples]
    found = judge.score(world.render([e.scene for e in examples]), prompts).summary()
    assert found["strict"] == found[f"shows_{name}"] == 1
    assert found[f"pull_{name}"] > 0.98
    assert sum(found[f"shows_{other}"] for other in concepts.CONCEPTS) == 1


def test_a_concept_that_leaks_is_seen_and_not_counted_as_right() -> None:
    leaked = [replace(scene, style="plim", texture="plain") for scene in SHOWN]
    plain = [replace(scene, texture="plain") for scene in SHOWN]
    prompts = [world.prompt_for(scene) for scene in plain]
    full = judge.score(world.render(leaked), prompts).summary()
    assert full["shows_plim"] == 1 and full["style"] == 0 and full["strict"] == 0
    pulls = []
    for share in (0.0, 0.2, 0.4, 0.6):
        mixed = (1 - share) * world.render(plain) + share * world.render(leaked)
        pulls.append(judge.score(mixed.astype(np.float32), prompts).summary()["pull_plim"])
    assert pulls == pytest.approx([0, 0.2, 0.4, 0.6], abs=0.03)
    zigs = judge.score(world.render([replace(scene, shape="zig") for scene in SHOWN]), PROMPTS).summary()
    assert zigs["shows_zig"] == 1 and zigs["shape"] == 0 and zigs["color"] == zigs["place"] == 1


def test_copies_are_found_and_neighbours_are_not() -> None:
    training = CLEAN[:48]
    assert judge.copy_rate(training, training) == 1
    assert judge.copy_rate(np.clip(training + noise(0.02)[:48], 0, 1).astype(np.float32), training) == 1
    moved = [replace(s, jitter=(s.jitter[0] + 0.5, s.jitter[1] + 0.5)) for s in SHOWN[:48]]
    assert judge.copy_rate(world.render(moved), training) < 0.4
    recoloured, index = changed("background")
    assert judge.copy_rate(world.render(recoloured)[index], CLEAN[index]) < 0.1
    assert judge.copy_distance(training[:1] + 0.1, training)[0] == pytest.approx(0.1, abs=1e-3)


def test_diversity_is_zero_for_one_picture_and_grows_with_what_varies() -> None:
    def spread(jitters: list[tuple[int, int]]) -> float:
        sets = [[replace(scene, jitter=jitter) for jitter in jitters] for scene in SHOWN[:20]]
        return judge.diversity(np.stack([world.render(scenes) for scenes in sets]))

    assert spread([(0, 0)] * 3) == 0
    assert 0 < spread([(0, 0), (0, 1), (0, 0)]) < spread([(-1, -1), (1, 1), (-1, 1)])
    two = np.stack([CLEAN[:5], CLEAN[5:10]], axis=1)
    expected = np.sqrt(np.square(two[:, 0] - two[:, 1]).mean(axis=(1, 2, 3))).mean()
    assert judge.diversity(two) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        judge.diversity(CLEAN[:4, None])


def test_drift_is_the_paired_difference() -> None:
    assert not judge.drift(CLEAN, CLEAN).any()
    assert judge.drift(CLEAN * 0, CLEAN * 0 + 0.25) == pytest.approx(np.full(N, 0.25))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        judge.read(np.full((1, 32, 32, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="32 x 32"):
        judge.read(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="2 pictures"):
        judge.score(CLEAN[:2], PROMPTS)
    assert judge.score(CLEAN[:8] * 3 - 1, PROMPTS[:8]).fit_N.min() >= 0, "values out of range are clipped"
