"""Control pictures beside the pictures: found, checked, and cached as their pictures are, pixel for pixel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detour import RefusedError, UserError
from detour.data import controls
from detour.data.loader import Source, load_batch
from detour.data.scan import scan
from detour.sample import Request


def beside(kit, name, size=(64, 64), seed=0, **save):
    """A control picture in a folder of its own, inside that of the pictures."""
    path = kit.root / "pictures" / "depth" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **save)
    return path


def config_of(kit, **options):
    return kit.config(control_path=kit.root / "pictures" / "depth", **options)


def test_they_are_found_by_stem_and_are_no_pictures_themselves(kit):
    kit.draw("a.png", (64, 32))
    kit.draw("sub/b.jpg", seed=1)
    first, second = beside(kit, "a.jpg", (128, 64)), beside(kit, "sub/b.png", seed=2)
    pictures = scan([config_of(kit)], trigger=None, divisibility=16).pictures
    assert [(picture.key, picture.control) for picture in pictures] == [("a.png", first), ("sub/b.jpg", second)]
    assert pictures[0].control_sha256 != pictures[1].control_sha256
    assert [
        picture.control for picture in scan([kit.config(recursive=False)], trigger=None, divisibility=16).pictures
    ] == [None]


def test_all_that_is_wrong_with_them_is_said_at_once(kit):
    for name in ("none.png", "several.png", "broken.png", "wide.png"):
        kit.draw(name, seed=len(name))
    beside(kit, "several.png")
    beside(kit, "several.jpg")
    beside(kit, "wide.png", (128, 64))
    beside(kit, "left.png")
    (kit.root / "pictures" / "depth" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(RefusedError) as caught:
        scan([config_of(kit)], trigger=None, divisibility=16)
    message = str(caught.value)
    assert "none.png has no control picture: " in message
    assert "several.png has several control pictures (several.jpg, several.png); keep one" in message
    assert "broken.png has a control picture that cannot be used: " in message
    assert "wide.png and its control picture " in message and "different proportions (128 x 64, " in message
    with pytest.raises(UserError, match=r"datasets\[0\]: control_path: .* does not exist"):
        scan([kit.config(control_path=kit.root / "pictures" / "dept")], trigger=None, divisibility=16)


def test_they_are_scaled_cut_and_mirrored_with_their_picture(kit):
    """A copy of the picture as its control: both have the same latents, in every crop and mirror image."""
    for index, size in enumerate([(96, 64), (64, 112), (80, 80)]):
        kit.draw(f"{index}.png", size, seed=index)
        beside(kit, f"{index}.png", size, seed=index)
    config = config_of(kit, flip_x=True, flip_y=True, crop="random", crop_variants=3)
    made = kit.prepare(kit.order(config))
    source = Source(kit.store, kit.keys, made.datasets, 1.0)
    seen = 0
    for epoch in range(2):
        for plan in made.epoch(epoch):
            batch = load_batch(source, plan)
            for latents_CHW, condition in zip(batch.latents_BCHW, batch.conditions, strict=True):
                assert torch.equal(condition["control_CHW"], latents_CHW)
                assert "tokens_LD" in condition
                seen += 1
    assert seen == 2 * 3 * 4


def test_a_control_picture_is_part_of_what_is_trained_and_its_place_is_not(kit):
    kit.draw("a.png")
    beside(kit, "a.png", seed=1)
    first = kit.order(config_of(kit)).fingerprint
    (kit.root / "elsewhere").mkdir()
    (kit.root / "pictures" / "depth" / "a.png").rename(kit.root / "elsewhere" / "a.png")
    assert kit.order(kit.config(control_path=kit.root / "elsewhere")).fingerprint == first
    beside(kit, "a.png", seed=2)
    assert kit.order(config_of(kit)).fingerprint != first
    assert kit.order(kit.config(recursive=False)).fingerprint != first


def test_nothing_is_told_where_there_is_none(kit):
    kit.draw("a.png")
    made = kit.prepare(kit.order())
    (batch,) = (load_batch(Source(kit.store, kit.keys, made.datasets, 1.0), plan) for plan in made.epoch(0))
    assert set(batch.conditions[0]) == {"tokens_LD", "pooled_D"}


# --- previews ----------------------------------------------------------------------------------------------------

REQUEST = Request(prompt="a", seed=0, width=64, height=48, steps=1)


def test_a_preview_s_control_is_scaled_to_cover_it(kit):
    path = beside(kit, "a.png", (128, 96), seed=3)
    request = replace(REQUEST, control=str(path))
    controls.check(request)
    told = controls.told(kit.arch, "vae", request, torch.device("cpu"))
    with Image.open(path) as opened:
        halved = np.array(opened.resize((64, 48), Image.Resampling.LANCZOS), dtype=np.float32)
    expected = kit.arch.encode_images("vae", torch.from_numpy(halved).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    assert set(told) == {"control_CHW"} and told["control_CHW"].shape == (4, 6, 8)
    torch.testing.assert_close(told["control_CHW"], expected, atol=0.05, rtol=0)
    square = replace(REQUEST, control=str(beside(kit, "b.png", (40, 40))))
    assert controls.told(kit.arch, "vae", square, torch.device("cpu"))["control_CHW"].shape == (4, 6, 8)
    assert controls.told(kit.arch, "vae", REQUEST, torch.device("cpu")) == {}


def test_transparent_parts_of_an_inpaint_picture_are_the_hole(kit):
    picture = Image.new("RGBA", (64, 48), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (32, 0, 64, 48))
    path = kit.root / "hole.png"
    picture.save(path)
    request = replace(REQUEST, inpaint=str(path))
    controls.check(request)
    told = controls.told(kit.arch, "vae", request, torch.device("cpu"))
    assert torch.equal(told["hole_1HW"], torch.cat([torch.zeros(1, 6, 4), torch.ones(1, 6, 4)], dim=2))
    assert not told["inpaint_CHW"][:, :, 4:].any()
    assert torch.allclose(told["inpaint_CHW"][:, :, :4], torch.tensor([1.0, -1.0, -1.0, -1.0])[:, None, None])


def test_pictures_that_a_preview_cannot_use(kit):
    with pytest.raises(UserError, match=r"^control: .*none\.png cannot be read: no such file"):
        controls.check(replace(REQUEST, control=str(kit.root / "none.png")))
    with pytest.raises(UserError, match=r"^inpaint: .*a\.png has no transparent part; erase what is to be filled"):
        controls.check(replace(REQUEST, inpaint=str(beside(kit, "a.png"))))
