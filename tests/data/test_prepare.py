"""Preparing: what is missing is made, what is there is not, and nothing wrong gets into the cache."""

import dataclasses
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detour import RefusedError, UserError, files
from detour.data import cache, prepare


def count(kit):
    """Pictures and prompts encoded since the last call."""
    found = kit.arch.pictures, len(kit.arch.prompts)
    kit.arch.pictures = 0
    kit.arch.prompts.clear()
    return found


def test_all_is_made_once(kit):
    for index in range(5):
        kit.draw(f"{index}.png", seed=index, caption=f"number {index}")
    made = kit.prepare(kit.order(), prompts=["a sample", ""])
    assert kit.loads == ["text", "vae"]
    assert count(kit) == (5, 7)
    assert made.lengths == {f"number {i}": 2 for i in range(5)} | {"a sample": 2, "": 1}
    again = kit.prepare(kit.order(), prompts=["a sample", ""])
    assert kit.loads == ["text", "vae"], "no encoder is loaded for nothing"
    assert count(kit) == (0, 0)
    assert again.lengths == made.lengths
    item = made.items[0]
    entry = kit.store.get("latents", kit.keys.latents(item, made.datasets[0], 0))
    pixels = torch.from_numpy(np.asarray(Image.open(item.picture.path)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(entry["latents_CHW"], kit.arch.encode_images("vae", pixels)[0])
    assert set(kit.store.get("text", kit.keys.prompt("a sample"))) == {"tokens_LD", "pooled_D"}


def test_editing_an_ingredient_makes_that_again_and_nothing_else(kit):
    paths = [kit.draw(f"{index}.png", (80, 64), seed=index, caption=f"number {index}") for index in range(4)]
    kit.prepare(kit.order())
    assert count(kit) == (4, 4)

    def after():
        kit.prepare(kit.order())
        return count(kit)

    kit.draw("1.png", (80, 64), seed=77, caption=None)
    assert after() == (1, 0), "a picture"
    paths[2].with_suffix(".txt").write_text("another")
    assert after() == (0, 1), "a caption"
    kit.draw("new.png", seed=9, caption="number 0")
    assert after() == (1, 0), "a new picture with a known caption"
    paths[3].rename(paths[3].with_name("renamed.png"))
    paths[3].with_suffix(".txt").rename(paths[3].with_name("renamed.txt"))
    assert after() == (0, 0), "a name"
    for path in paths[:2]:
        os.utime(path)
    assert after() == (0, 0), "a date"
    kit.prepare(kit.order(kit.config(num_repeats=3, loss_weight=2, caption_dropout_rate=0)))
    assert count(kit) == (0, 0), "settings of the draw"
    kit.prepare(kit.order(kit.config(flip_x=True)))
    assert count(kit) == (5, 0), "only the mirror images"
    kit.prepare(kit.order(kit.config(resolution=[32, 64])))
    assert count(kit) == (5, 0), "only the new size"
    kit.prepare(kit.order(kit.config(crop="random", crop_variants=3)))
    assert 4 <= count(kit)[0] <= 13, "crops that are not the one in the middle"
    kit.prepare(kit.order(kit.config(trigger_word="trg")))
    assert count(kit) == (0, 4), "the trigger word is part of the captions"
    kit.prepare(kit.order(kit.config(caption_dropout_rate=0.1)))
    assert count(kit) == (0, 1), "the empty caption"
    kit.keys = dataclasses.replace(kit.keys, vae="vae-2")
    assert after() == (5, 0), "the VAE"
    kit.keys = dataclasses.replace(kit.keys, text="text-2")
    assert after() == (0, 4), "the text encoder"


def test_shared_by_jobs(kit):
    kit.draw("a.png")
    kit.prepare(kit.order())
    kit.store = cache.Store(kit.store.root)
    kit.prepare(kit.order(seed=5, batch_size=1))
    assert count(kit) == (1, 1)


def test_damage_is_noticed_reported_and_mended(kit):
    for index in range(4):
        kit.draw(f"{index}.png", seed=index, caption=f"number {index}")
    kit.prepare(kit.order())
    count(kit)
    entries = {path: path.read_bytes() for path in sorted(kit.store.root.rglob("*.safetensors"))}
    latents = [path for path in entries if "latents" in path.parts]
    text = [path for path in entries if "text" in path.parts]
    latents[0].write_bytes(entries[latents[0]][:-1])
    latents[1].write_bytes(b"")
    data = bytearray(entries[text[0]])
    data[-1] ^= 1
    text[0].write_bytes(data)
    text[1].unlink()
    kit.sink.events.clear()
    kit.prepare(kit.order())
    assert count(kit) == (2, 2)
    warnings = kit.sink.of("warning")
    assert [(w.message.rpartition(": ")[2], set(w.details)) for w in warnings] == [
        ("1", {str(text[0])}),
        ("2", {str(latents[0]), str(latents[1])}),
    ]
    assert {path: path.read_bytes() for path in kit.store.root.rglob("*.safetensors")}.keys() == entries.keys()
    for path, data in entries.items():
        assert torch.equal(_first(path.read_bytes()), _first(data)), "bit for bit what was there"


def _first(data):
    import safetensors.torch

    tensors = safetensors.torch.load(data)
    return tensors[min(tensors)]


@pytest.mark.slow
def test_killed_while_preparing(kit):
    """Killed again and again, it goes on where it was: nothing is damaged, lost, or left behind."""
    for index in range(60):
        kit.draw(f"{index}.png", seed=index)
    code = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import conftest
kit = conftest.Kit(Path({str(kit.root)!r}))
encode = kit.arch.encode_images
kit.arch.encode_images = lambda *args: time.sleep(0.01) or encode(*args)
print("ready", flush=True)
kit.prepare(kit.order())
"""
    counts = []
    for index in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.2 + 0.05 * index)
        process.kill()
        process.wait(10)
        entries = [path for path in kit.store.root.rglob("*.safetensors") if "latents" in path.parts]
        assert all(kit.store.has("latents", path.stem) for path in entries)
        counts.append(len(entries))
    assert counts == sorted(counts)
    assert counts[0] < 60
    leftover = kit.store.root / "latents" / "00" / f"x.safetensors.tmp-{files._HOST}-{process.pid}-0123abcd"
    leftover.parent.mkdir(exist_ok=True)
    leftover.touch()
    kit.prepare(kit.order())
    assert kit.arch.pictures == 60 - counts[-1]
    assert kit.sink.of("warning") == []
    assert not list(kit.store.root.rglob("*.tmp-*"))


def test_progress(kit):
    for index in range(3):
        kit.draw(f"{index}.png", seed=index, caption=f"number {index}")
    kit.prepare(kit.order())
    stages = [(event.name, event.done, event.total) for event in kit.sink.of("stage")]
    assert stages[-1] == ("latents", 3, 3)
    assert ("captions", 3, 3) in stages


def test_shuffled_captions_of_all_epochs(kit):
    kit.draw("a.png", caption="a, b, c, d, e")
    made = kit.prepare(kit.order(kit.config(shuffle_tokens=True)), epochs=6)
    for epoch in range(6):
        for batch in made.epoch(epoch):
            assert all(draw.prompt in made.lengths for draw in batch.draws)
    assert len(made.lengths) > 3


def test_captions_at_the_limit_are_named(kit):
    kit.draw("long.png", seed=1, caption="word " * 24)
    kit.draw("fine.png", seed=2, caption="word " * 23)
    kit.prepare(kit.order(kit.config(num_repeats=2)))
    (warning,) = kit.sink.of("warning")
    assert "limit of 24 tokens" in warning.message
    assert len(warning.details) == 1
    assert warning.details[0].startswith("long.png: word word")


def test_architectures_that_pad_every_caption_are_not_judged(kit):
    kit.draw("long.png", caption="word " * 24)
    kit.arch.spec = dataclasses.replace(kit.arch.spec, text_multiple=24)
    kit.prepare(kit.order())
    assert kit.sink.of("warning") == []


@pytest.mark.parametrize("what", ["latents", "tokens"])
def test_values_that_are_not_finite_never_reach_the_cache(kit, what, monkeypatch):
    path = kit.draw("a.png")
    if what == "latents":
        monkeypatch.setattr(kit.arch, "encode_images", lambda vae, pixels: pixels.mean() / torch.zeros(1, 4, 8, 8))
    else:
        monkeypatch.setattr(
            kit.arch, "encode_prompts", lambda text, prompts: [{"tokens_LD": torch.tensor([[torch.nan]])}]
        )
    with pytest.raises(UserError, match="not finite") as caught:
        kit.prepare(kit.order())
    assert str(path) in str(caught.value) or "'a cat'" in str(caught.value)
    assert not [p for p in kit.store.root.rglob("*.safetensors") if what in p.parts or what == "tokens"]


def test_a_picture_that_changes_after_the_scan(kit):
    kit.draw("a.png")
    made = kit.order()
    kit.draw("a.png", seed=1)
    with pytest.raises(UserError, match="was changed while the dataset was being prepared"):
        kit.prepare(made)


def test_full_disk(kit, monkeypatch):
    for index in range(20):
        kit.draw(f"{index}.png", seed=index, caption=f"number {index}")

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(files.DiskFullError, match=r"no space .* train\.cache_folder"):
        kit.prepare(kit.order())


def test_space_is_asked_for_before_the_vae_is_loaded(kit, monkeypatch):
    for index in range(20):
        kit.draw(f"{index}.png", seed=index)
    monkeypatch.setattr(files, "free_bytes", lambda path: 20 * 4 * 64 * 4 - 1)
    with pytest.raises(RefusedError, match="no room for the latents"):
        kit.prepare(kit.order())
    assert kit.loads == ["text"]
    monkeypatch.setattr(files, "free_bytes", lambda path: 20 * 4 * 64 * 4)
    kit.prepare(kit.order())


def test_masks_are_the_mean_over_each_latent_position(kit):
    kit.draw("a.png")
    folder = kit.root / "masks"
    folder.mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(folder / "a.png")
    made = kit.prepare(kit.order(kit.config(mask_path=folder, flip_x=True)))
    plain, mirrored = (
        kit.store.get("masks", kit.keys.mask(item, made.datasets[0], 0))["mask_1HW"] for item in made.items
    )
    assert torch.equal(plain[0, 0], torch.tensor([0.0, 0, 0.5, 1, 1, 1, 1, 1]))
    assert torch.equal(mirrored, plain.flip(-1))
    count(kit)
    mask[:, :40] = 0
    Image.fromarray(mask).save(folder / "a.png")
    kit.loads.clear()
    kit.prepare(kit.order(kit.config(mask_path=folder, flip_x=True)))
    assert kit.loads == [], "a new mask needs no VAE"
    assert len([path for path in kit.store.root.rglob("*.safetensors") if "masks" in path.parts]) == 4


def test_alpha_masks(kit):
    path = kit.draw("a.png")
    clear = Image.open(path).convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, 1).repeat(64, 0)))
    clear.save(path)
    made = kit.prepare(kit.order(kit.config(alpha_mask=True)))
    item, config = made.items[0], made.datasets[0]
    assert torch.equal(
        kit.store.get("masks", kit.keys.mask(item, config, 0))["mask_1HW"][0, 0], torch.tensor([0.0] * 4 + [1] * 4)
    )
    count(kit)
    flat = kit.prepare(kit.order())
    assert count(kit)[0] == 1, "flattened on white, the pixels differ"
    both = [kit.store.get("latents", kit.keys.latents(item, c, 0))["latents_CHW"] for c in (config, flat.datasets[0])]
    assert torch.equal(both[0][..., 4:], both[1][..., 4:])
    assert (both[1][:3, :, :4] == 1).all(), "white"


def test_token_count():
    tensors = {"tokens_LD": torch.zeros(7, 2), "pooled_D": torch.zeros(99), "mask_L": torch.zeros(7)}
    assert prepare.token_count(tensors) == 7
    assert prepare.token_count({"pooled_D": torch.zeros(99)}) == 0


@pytest.mark.parametrize("bad", [5, 41])
def test_an_error_in_a_thread_ends_it(kit, monkeypatch, bad):
    for index in range(40):
        kit.draw(f"{index}.png", seed=index)
    puts = []

    def put(self, kind, key, tensors):
        puts.append(key)
        if len(puts) == bad:  # the first is the caption, the last is the 41st
            raise UserError("this one")

    monkeypatch.setattr(cache.Store, "put", put)
    with pytest.raises(UserError, match="this one"):
        kit.prepare(kit.order())
    assert len(puts) < 40 or bad == 41
