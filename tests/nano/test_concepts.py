"""Concept sets: small, varied, deterministic, and with prompts that ask for what they do not show."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detour import UserError
from detour.nano import concepts, language, world


@pytest.mark.parametrize("name", concepts.CONCEPTS)
def test_a_set_varies_in_all_but_the_concept(name: str) -> None:
    concept = concepts.find(name)
    found = concepts.examples(name)
    assert len(found) == concept.pictures and 20 <= len(found) <= 40
    assert concepts.examples(name)[:7] == concepts.examples(name, 7)
    assert concepts.examples(name, seed=1) != found
    assert all(name in example.caption.replace(",", "").split() for example in found)
    assert len({example.scene.background for example in found}) >= 4
    assert {example.scene.place for example in found} == set(world.PLACES)
    assert {example.scene.size for example in found} == set(world.SIZES)
    assert len({example.caption for example in found}) == len(found)
    pictures = world.render([example.scene for example in found])
    assert len(np.unique(pictures.reshape(len(found), -1), axis=0)) == len(found)
    for form in ("a ", "on a ", ","):
        assert any(form in example.caption for example in found)


@pytest.mark.parametrize("name", concepts.CONCEPTS)
@pytest.mark.parametrize("n", [None, 1])
def test_prompts_ask_for_what_no_training_picture_shows(name: str, n: int | None) -> None:
    concept = concepts.find(name)
    training = concepts.examples(name, concept.most if n is None else n)
    asked = concepts.prompts(name, 64, training=training)
    assert len(asked) == 64 and asked[:5] == concepts.prompts(name, 5, training=training)
    shown = {tuple(v for k, v in e.scene.attributes.items() if k not in concept.unsaid) for e in training}
    for prompt in asked:
        assert tuple(v for k, v in prompt.wanted.items() if k != "style") not in shown
        assert name in prompt.text and name in prompt.wanted.values()


def test_no_ordinary_caption_knows_the_words() -> None:
    told = [example.caption for example in world.training_set(300, dials=world.Dials(wrong_word=0.5))]
    assert not [text for text in told for name in language.RARE if name in text]
    assert set(language.RARE) == set(concepts.CONCEPTS)


def test_the_dataset_is_pictures_with_captions(tmp_path: Path) -> None:
    shown = concepts.write_dataset(tmp_path / "a", "zig", 6, seed=3)
    concepts.write_dataset(tmp_path / "b", "zig", 6, seed=3)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(f"{n:04d}.{end}" for n in range(6) for end in ("png", "txt"))
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with Image.open(tmp_path / "a" / "0002.png") as picture:
        assert picture.mode == "RGB"
        cells = world.from_pixels(np.asarray(picture)[None])
    assert np.array_equal(cells, world.render([shown[2].scene]))
    assert (tmp_path / "a" / "0002.txt").read_text() == shown[2].caption + "\n"


def test_bad_input_is_explained() -> None:
    with pytest.raises(UserError, match=r"zag.*zig, plim, mip"):
        concepts.find("zag")
    with pytest.raises(UserError, match="1 to 28 pictures, not 40"):
        concepts.examples("mip", 40)
