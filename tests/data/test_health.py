"""The health report: each fault is found where it is drawn, nothing is found where there is none."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from detour.checking import check_job
from detour.config.load import load_job
from detour.data import health, images
from detour.data.health import Aim, Item, Subject
from detour.nano import concepts, world
from photographs import write_photographs

SIDE = 128
AIM = Aim(resolution=SIDE, divisibility=32, text_tokens=40, trigger="mip")


def subject(path: Path, caption: str | None = "", resolution: int = SIDE) -> Subject:
    """As the UI sees a picture. `caption` "" is one of its own."""
    captions = None if caption is None else (caption or f"a mip, by the name of {path.stem}",)
    try:
        return Subject(key=path.name, facts=images.check(path, images.Budget(), resolution), captions=captions)
    except images.BadPictureError as error:
        return Subject(key=path.name, facts=None, problem=str(error), captions=captions)


def found(subjects, aim=AIM, **options):
    """Kinds with the files that they name."""
    return {
        finding.kind: [item.keys for item in finding.items] for finding in health.findings(subjects, aim, **options)
    }


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A drawn concept set: what nothing is wrong with."""
    folder = tmp_path_factory.mktemp("clean")
    concepts.write_dataset(folder, "mip")
    captions = [path.with_suffix(".txt").read_text().strip() for path in sorted(folder.glob("*.png"))]
    return [subject(path, text) for path, text in zip(sorted(folder.glob("*.png")), captions, strict=True)]


@pytest.mark.parametrize("concept", ["mip", "plim"])
def test_nothing_is_found_in_clean_drawn_sets(tmp_path, concept):
    shown = concepts.write_dataset(tmp_path, concept)
    paths = sorted(tmp_path.glob("*.png"))
    subjects = [subject(path, example.caption) for path, example in zip(paths, shown, strict=True)]
    assert found(subjects, dataclasses.replace(AIM, trigger=None)) == {}


def test_nothing_is_found_in_photographs(tmp_path):
    subjects = [subject(path, resolution=400) for path in write_photographs(tmp_path)]
    assert found(subjects, Aim(resolution=400)) == {}


def drawing(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A picture that looks like no other: bars of many colours in a pattern of its own."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


def clear(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 30, 30))
    return picture


FAULTS = {
    "misnamed": lambda path: drawing(1).save(path.with_suffix(".jpg"), "PNG"),
    "converted": lambda path: drawing(2).convert("CMYK").save(path.with_suffix(".jpg"), quality=95),
    "tiny": lambda path: drawing(3, (60, 60)).save(path),
    "small": lambda path: drawing(4, (104, 104)).save(path),
    "blurred": lambda path: drawing(5).filter(ImageFilter.GaussianBlur(2)).save(path),
    "aspect": lambda path: drawing(6, (384, 128)).save(path),
    "transparent": lambda path: clear(drawing(7)).save(path),
    "grey": lambda path: drawing(8).convert("L").save(path),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_of_a_picture_is_found_and_nothing_else(clean, tmp_path, kind):
    FAULTS[kind](tmp_path / "fault.png")
    (path,) = tmp_path.iterdir()
    assert found([*clean, subject(path)]) == {kind: [(path.name,)]}


def test_pictures_that_cannot_be_used(clean, tmp_path):
    drawing(1).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-40])
    (tmp_path / "web.png").write_text("<html>")
    drawing(2, (200, 31)).save(tmp_path / "narrow.png")
    subjects = [subject(tmp_path / name) for name in ("cut.png", "web.png", "narrow.png")]
    (finding, aspect) = health.findings([*clean, *subjects], AIM)
    assert (finding.kind, aspect.kind) == ("unusable", "aspect")
    notes = {item.keys[0]: item.note for item in finding.items}
    assert notes.keys() == {"cut.png", "web.png", "narrow.png"}
    assert "cut off or damaged" in notes["cut.png"]
    assert "not a PNG" in notes["web.png"]
    assert "both sides must have 32 pixels" in notes["narrow.png"]


def test_copies_are_told_from_pictures_that_look_alike(clean, tmp_path):
    drawing(1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    drawing(1).resize((250, 250), Image.Resampling.NEAREST).save(tmp_path / "c.jpg", quality=60)
    subjects = [subject(path) for path in sorted(tmp_path.iterdir())]
    assert found([*clean, *subjects]) == {"duplicate": [("a.png", "b.png")], "alike": [("a.png", "c.jpg")]}


CAPTIONS = {
    "missing_caption": None,
    "empty_caption": "  \n ",
    "long_caption": "mip " + "word " * 40,
    "no_trigger": "a mipmap",
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_each_fault_of_a_caption_is_found_and_nothing_else(clean, tmp_path, kind):
    drawing(1).save(tmp_path / "a.png")
    one = dataclasses.replace(
        subject(tmp_path / "a.png"), captions=None if CAPTIONS[kind] is None else (CAPTIONS[kind],)
    )
    assert found([*clean, one]) == {kind: [("a.png",)]}


def test_captions_that_cannot_be_read_and_captions_that_are_shared(clean, tmp_path):
    for seed in (1, 2):
        drawing(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "2.png").read_bytes())
    one, two, three = (subject(tmp_path / f"{seed}.png", "the same mip") for seed in (1, 2, 3))
    broken = dataclasses.replace(one, captions=None, caption_problem="is not UTF-8 text")
    assert found([*clean, broken]) == {"unreadable_caption": [("1.png",)]}
    assert found([*clean, one, two]) == {"same_caption": [("1.png", "2.png")]}
    assert found([*clean, two, three]) == {"duplicate": [("2.png", "3.png")]}, "copies may share theirs"


def test_grey_pictures_are_named_only_among_colours_and_where_the_caption_is_silent(tmp_path):
    paths = []
    for seed in range(6):
        picture = drawing(seed).convert("L") if seed < 2 else drawing(seed)
        paths.append(tmp_path / f"{seed}.jpg")
        picture.convert("RGB").save(paths[-1], quality=80)
    subjects = [subject(path) for path in paths]
    assert found(subjects)["grey"] == [("0.jpg",), ("1.jpg",)]
    said = [dataclasses.replace(one, captions=(f"a mip, monochrome photo {one.key}",)) for one in subjects[:2]]
    assert "grey" not in found([*said, *subjects[2:]])
    assert "grey" not in found(subjects[:4]), "they are not the fewer"


def test_what_only_the_folder_shows_is_listed_and_the_worst_comes_first(clean, tmp_path):
    drawing(1, (60, 60)).save(tmp_path / "a.png")
    drawing(2, (104, 104)).filter(ImageFilter.GaussianBlur(2)).save(tmp_path / "b.png")
    others = {
        "lone_caption": [Item(("x.txt",))], "unread": [Item(("y.heic",))], "shared_name": [Item(("z.png", "z.jpg"))],
    }  # fmt: skip
    report = health.findings([*clean, *(subject(tmp_path / f"{name}.png") for name in "ab")], AIM, others=others)
    expected = ["unread", "shared_name", "tiny", "blurred", "small", "lone_caption"]
    assert [finding.kind for finding in report] == expected
    severities = [finding.rule.severity for finding in report]
    assert severities == sorted(severities, key=["stop", "warning", "note"].index)
    for finding in report:
        assert finding.rule.why
        assert finding.rule.advice


def test_every_rule_says_why_it_matters_and_what_to_do():
    assert len(health.RULES) == 20
    assert all(rule.title and rule.why and rule.advice for rule in health.RULES.values())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("a cat", 2),
        ("a cat, asleep!!!", 5),
        ("ein Käse-Brot", 4),
        ("猫が寝る", 4),
        ("한국어", 3),
        ("don't", 3),
    ],
)
def test_tokens_are_counted_by_words_and_signs(text, count):
    assert health.about_tokens(text) == count


# ---------------------------------------------------------------------------------------------------- look-alikes


def look(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BOX))


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return Image.open(out)


CHANGES = {
    "jpeg": lambda picture: as_jpeg(picture, 30),
    "half": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.15),
    "flatter": lambda picture: ImageEnhance.Contrast(picture).enhance(0.8),
    "paler": lambda picture: ImageEnhance.Color(picture).enhance(0.7),
    "cut": lambda picture: picture.crop(
        tuple(round(side * part) for part in (0.01, 0.99) for side in picture.size)  # 1 % at each side
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_of_photographs_look_alike_and_different_ones_do_not(tmp_path, change):
    paths = [path for path in write_photographs(tmp_path) if "hubble" not in path.name]  # stars move when it is cut
    pictures = [Image.open(path).convert("RGB") for path in paths]
    looks = [look(picture) for picture in pictures] + [look(CHANGES[change](picture)) for picture in pictures]
    count = len(pictures)
    assert health.look_alikes(np.stack(looks)) == [[place, place + count] for place in range(count)]


def test_drawings_that_differ_in_colour_or_place_alone_do_not_look_alike():
    scenes = [example.scene for name in ("mip", "plim") for example in concepts.examples(name)]
    shown = world.to_pixels(world.render(scenes))
    assert health.look_alikes(np.stack([look(Image.fromarray(pixels)) for pixels in shown])) == []


def test_empty_pictures_look_alike_only_in_one_colour():
    flat = [np.full((16, 16, 3), color, np.uint8) for color in ([10, 20, 30], [12, 20, 30], [200, 20, 30])]
    assert health.look_alikes(np.stack(flat)) == [[0, 1]]


def brute_force(looks: np.ndarray) -> list[list[int]]:
    """The rule, pair by pair."""
    count = len(looks)
    near = {place: {place} for place in range(count)}
    hashed = [int(value) for value in health.hashes(looks)]
    for a in range(count):
        for b in range(a):
            tints = [looks[place].reshape(-1, 3).astype(float).mean(axis=0) for place in (a, b)]
            flat = [(looks[p].reshape(-1, 3) - tint).ravel() for p, tint in zip((a, b), tints, strict=True)]
            spread = [np.sqrt((one**2).mean()) for one in flat]
            if (hashed[a] ^ hashed[b]).bit_count() > health.ALIKE_BITS:
                continue
            alike = np.dot(flat[0], flat[1]) >= health.ALIKE * np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])
            limit = 6 if spread[0] < 2 else health.ALIKE_TINT
            if (alike or max(spread) < 2) and np.abs(tints[0] - tints[1]).max() <= limit:
                both = near[a] | near[b]
                for place in both:
                    near[place] = both
    groups = {min(group): sorted(group) for group in near.values() if len(group) > 1}
    return [groups[first] for first in sorted(groups)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30), st.sampled_from([3, 12, 30]))
def test_groups_are_what_the_rule_says_pair_by_pair(seed, count, noise):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 256, (max(2, count // 3), 16, 16, 3))
    chosen = kinds[rng.integers(0, len(kinds), count)]
    looks = np.clip(chosen + rng.normal(0, noise, chosen.shape), 0, 255).astype(np.uint8)
    assert sorted(sorted(group) for group in health.look_alikes(looks)) == brute_force(looks)


def test_large_groups_reach_across_the_parts_that_are_compared_at_a_time():
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    order = rng.permutation(np.repeat([0, 1, 2], [400, 300, 1]))  # 256 rows and 4096 pairs are compared at a time
    groups = health.look_alikes(kinds[order])
    assert sorted(map(len, groups)) == [300, 400]
    assert all(len({int(order[place]) for place in group}) == 1 for group in groups)


# ------------------------------------------------------------------------------------------------------ `detour check`


def warnings_of(folder: Path, *overrides: str) -> list[str]:
    example = Path(__file__).parents[2] / "examples" / "train_lora_zimage_base.yaml"
    chosen = [f"datasets[0].folder_path={folder}", "datasets[0].resolution=[128]", *overrides]
    report = check_job(load_job(example, chosen))
    assert report["ok"], report["errors"]
    return [warning for warning in report["warnings"] if str(folder) in warning]


def test_check_lists_what_the_scan_does_not_say(tmp_path):
    concepts.write_dataset(tmp_path, "mip")
    assert warnings_of(tmp_path) == []
    picture = Image.open(tmp_path / "0003.png").convert("RGB")
    as_jpeg(picture, 60).save(tmp_path / "copy.jpg")
    (tmp_path / "copy.txt").write_text((tmp_path / "0003.txt").read_text())
    drawing(1, (384, 128)).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("mip " + "word " * 600)
    drawing(2, (32, 32)).save(tmp_path / "tiny.png")
    (tmp_path / "tiny.txt").write_text("a tiny one, without the word")
    found = warnings_of(tmp_path, "trigger_word=mip")
    assert len(found) == 5, found
    tiny, alike, aspect, long, same = found
    assert tiny.startswith(f"{tmp_path}: pictures with less than a quarter"), "the scan's own; said once"
    assert alike.startswith(f"{tmp_path}: pictures that look alike: 1: 0003.png = copy.jpg (resized")
    assert "wide.png (384 x 128, 3.0 : 1)" in aspect
    assert "wide.png (at least 601 tokens, 512 are read)" in long
    assert "0003.png = copy.jpg" in same
    clear(drawing(3)).save(tmp_path / "clear.png")
    (tmp_path / "clear.txt").write_text("clear")
    assert any("transparent" in warning for warning in warnings_of(tmp_path))
    assert not any(
        "pictures with transparent parts" in warning for warning in warnings_of(tmp_path, "datasets[0].alpha_mask=true")
    )
