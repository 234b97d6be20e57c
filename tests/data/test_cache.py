"""The cache: damage of any kind is noticed, writers do not disturb each other, keys change with every ingredient."""

import dataclasses
import json
import multiprocessing
import os
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from detour import UserError, files
from detour.config.job import DatasetConfig
from detour.data import cache
from detour.data.buckets import Bucket
from detour.data.cache import Keys, Store, identity
from detour.data.order import Item
from detour.data.scan import Picture

KEY = "ab" + "0" * 62


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents_CHW": torch.randn(4, 6, 8, generator=generator),
        "tokens_LD": torch.randn(5, 3, generator=generator).bfloat16(),
        "mask_L": torch.tensor([True, False]),
    }


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_round_trip(store):
    assert store.get("latents", KEY) is None
    assert not store.has("latents", KEY)
    store.put("latents", KEY, tensors())
    assert store.has("latents", KEY)
    assert equal(store.get("latents", KEY), tensors())
    assert list(store.get("latents", KEY)) == ["latents_CHW", "mask_L", "tokens_LD"], "always in this order"
    assert store.get("text", KEY) is None, "kinds are apart"
    assert store.path("latents", KEY).parent.name == "ab"
    assert store.damaged == []


def test_entries_are_plain_safetensors_files(store):
    store.put("latents", KEY, tensors())
    with safe_open(store.path("latents", KEY), "pt") as file:
        assert torch.equal(file.get_tensor("latents_CHW"), tensors()["latents_CHW"])
        assert file.metadata()["key"] == KEY


def test_views_and_tensors_that_share_memory(store):
    base = torch.arange(24.0).reshape(4, 6)
    store.put("text", KEY, {"a": base.T, "b": base[1:3], "c": base})
    assert equal(store.get("text", KEY), {"a": base.T.contiguous(), "b": base[1:3], "c": base})


def test_every_truncation_is_noticed(store):
    store.put("latents", KEY, tensors())
    path = store.path("latents", KEY)
    whole = path.read_bytes()
    for part in range(64):
        path.write_bytes(whole[: len(whole) * part // 64])
        assert store.get("latents", KEY) is None
        assert not path.exists(), "removed, to be made again"
    path.write_bytes(whole + b"\0")
    assert store.get("latents", KEY) is None
    assert len(store.damaged) == 65


def test_every_flipped_byte_is_noticed(store):
    """All of them, each in a random way, and the header's again in every single bit."""
    store.put("latents", KEY, tensors())
    path = store.path("latents", KEY)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    draws = random.Random(0)
    flips = [(place, draws.randrange(1, 256)) for place in range(len(whole))]
    flips += [(place, 1 << bit) for place in range(header) for bit in range(8)]
    assert len(flips) > 1000
    for place, value in flips:
        data = bytearray(whole)
        data[place] ^= value
        path.write_bytes(data)
        assert store.get("latents", KEY) is None, (place, value)
    assert len(store.damaged) == len(flips)
    path.write_bytes(whole)
    assert equal(store.get("latents", KEY), tensors())


def test_an_entry_under_another_name_is_noticed(store):
    store.put("latents", KEY, tensors())
    for kind, key in (("latents", "cd" + KEY[2:]), ("text", KEY)):
        other = store.path(kind, key)
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(store.path("latents", KEY).read_bytes())
        assert store.get(kind, key) is None
    assert len(store.damaged) == 2


def test_a_digest_among_the_tensors_does_not_confuse(store):
    fake = torch.tensor(list(b'"sha256":"' + b"0" * 64), dtype=torch.uint8)
    store.put("text", KEY, {"fake": fake})
    assert torch.equal(store.get("text", KEY)["fake"], fake)


def test_a_damaged_entry_that_was_replaced_meanwhile_stays(store, monkeypatch):
    store.put("latents", KEY, tensors())
    path = store.path("latents", KEY)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    check = cache._is_whole

    def replaced_while_checking(data, kind, key):
        os.utime(path, (1, 1))
        files.write_bytes(path, whole)
        return check(data, kind, key)

    monkeypatch.setattr(cache, "_is_whole", replaced_while_checking)
    assert store.get("latents", KEY) is None
    assert path.read_bytes() == whole


def _write_for_a_while(root, until):
    store = Store(root)
    while time.time() < until:
        store.put("latents", KEY, tensors())


def test_processes_may_write_one_key_at_once(store):
    store.put("latents", KEY, tensors())
    context = multiprocessing.get_context("fork")
    until = time.time() + 1.5
    writers = [context.Process(target=_write_for_a_while, args=(store.root, until)) for _ in range(3)]
    for writer in writers:
        writer.start()
    reads = 0
    while time.time() < until:
        assert equal(store.get("latents", KEY), tensors())
        reads += 1
    for writer in writers:
        writer.join(20)
        assert writer.exitcode == 0
    assert reads > 50
    assert [path.name for path in store.path("latents", KEY).parent.iterdir()] == [f"{KEY}.safetensors"], "no leftovers"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"train\.cache_folder or \$DETOUR_CACHE"):
        Store(tmp_path / "cache").put("latents", KEY, tensors())


def test_an_entry_that_cannot_be_read(store):
    store.path("latents", KEY).mkdir(parents=True)
    with pytest.raises(UserError, match="in the cache cannot be read"):
        store.get("latents", KEY)


def test_default_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DETOUR_CACHE", str(tmp_path))
    assert cache.default_root() == tmp_path
    monkeypatch.delenv("DETOUR_CACHE")
    assert cache.default_root() == Path.home() / ".cache" / "detour"


KEYS = Keys(vae="v", text="t", spatial_factor=8)
PICTURE = Picture(
    path=Path("/d/a.png"), key="a.png", dataset=0, sha256="1" * 64, width=100, height=64, captions=("x",), alpha=True
)
ITEM = Item(PICTURE, Bucket(64, 64, 100, 64), False, False, 1)
CONFIG = DatasetConfig(folder_path=Path("/d"), crop="random", crop_variants=8)


def item(**changes):
    return dataclasses.replace(ITEM, **changes)


def picture(**changes):
    return item(picture=dataclasses.replace(PICTURE, **changes))


def config(**changes):
    return CONFIG.model_copy(update=changes)


def test_latent_keys_change_with_every_ingredient(monkeypatch):
    made = [
        KEYS.latents(ITEM, CONFIG, 0),
        KEYS.latents(ITEM, CONFIG, 1),
        KEYS.latents(ITEM, config(crop="center"), 0),
        KEYS.latents(ITEM, config(alpha_mask=True), 0),
        KEYS.latents(picture(sha256="2" * 64), config(crop="center"), 0),
        KEYS.latents(item(flip_x=True), CONFIG, 0),
        KEYS.latents(item(flip_y=True), CONFIG, 0),
        KEYS.latents(item(bucket=Bucket(64, 64, 101, 64)), CONFIG, 0),
        KEYS.latents(item(bucket=Bucket(64, 32, 100, 64)), CONFIG, 0),
        dataclasses.replace(KEYS, vae="w").latents(ITEM, CONFIG, 0),
    ]
    monkeypatch.setattr(cache, "LATENTS_VERSION", 2)
    assert len({*made, KEYS.latents(ITEM, CONFIG, 0)}) == 11


def test_latent_keys_change_with_nothing_else():
    same = [
        KEYS.latents(picture(path=Path("/e/b.jpg"), key="b.jpg", captions=("y",), dataset=0), CONFIG, 0),
        KEYS.latents(picture(mask=Path("/m.png"), mask_sha256="5"), CONFIG, 0),
        KEYS.latents(ITEM, config(folder_path=Path("/e"), loss_weight=3, num_repeats=2, mask_min_value=0.5), 0),
        dataclasses.replace(KEYS, text="u").latents(ITEM, CONFIG, 0),
    ]
    assert {*same} == {KEYS.latents(ITEM, CONFIG, 0)}


def test_mask_keys(monkeypatch):
    assert KEYS.mask(ITEM, CONFIG, 0) is None
    assert KEYS.mask(picture(alpha=False), config(alpha_mask=True), 0) is None
    masked = {"mask": Path("/m.png"), "mask_sha256": "5"}
    made = [
        KEYS.mask(ITEM, config(alpha_mask=True), 0),
        KEYS.mask(picture(**masked), CONFIG, 0),
        KEYS.mask(picture(**masked), CONFIG, 1),
        KEYS.mask(picture(**masked | {"mask_sha256": "6"}), CONFIG, 0),
        dataclasses.replace(KEYS, spatial_factor=16).mask(picture(**masked), CONFIG, 0),
    ]
    same = [
        KEYS.mask(picture(**masked | {"mask": Path("/n.png")}), config(mask_min_value=0.7), 0),
        KEYS.mask(picture(**masked, sha256="1" * 64), CONFIG, 0),
        dataclasses.replace(KEYS, vae="w").mask(picture(**masked), CONFIG, 0),
    ]
    assert {*same} == {made[1]}
    monkeypatch.setattr(cache, "MASKS_VERSION", 2)
    assert len({*made, KEYS.mask(picture(**masked), CONFIG, 0)}) == 6


def test_text_keys(monkeypatch):
    made = [KEYS.prompt("a"), KEYS.prompt("a "), KEYS.prompt(""), dataclasses.replace(KEYS, text="u").prompt("a")]
    assert dataclasses.replace(KEYS, vae="w").prompt("a") == made[0]
    monkeypatch.setattr(cache, "TEXT_VERSION", 2)
    assert len({*made, KEYS.prompt("a")}) == 5


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"scaling_factor": 0.5}))
    (folder / "weights.safetensors").write_bytes(b"w" * 100)
    (folder / "README.md").write_text("hello")
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


def test_identity_changes_with_contents_and_settings_alone(model, tmp_path):
    root = tmp_path / "cache"
    base = identity(root, [model], "bf16")
    assert identity(root, [model], "bf16") == base
    assert identity(root, [model], "fp32") != base
    assert identity(root, [model, model], "bf16") != base
    assert identity(root, [model / "weights.safetensors"], "bf16") != base
    (model / "README.md").write_text("bye")
    moved = model.rename(tmp_path / "moved")
    assert identity(tmp_path / "other", [moved], "bf16") == base
    (moved / "config.json").write_text(json.dumps({"scaling_factor": 0.6}))
    assert identity(root, [moved], "bf16") != base


def test_identity_remembers_hashes_until_a_file_changes(model, tmp_path, monkeypatch):
    root, hashed = tmp_path / "cache", []
    sha256_file = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path.name) or sha256_file(path))
    base = identity(root, [model])
    assert identity(root, [model]) == base
    assert sorted(hashed) == ["config.json", "weights.safetensors"]
    (model / "weights.safetensors").write_bytes(b"x" * 100)
    os.utime(model / "weights.safetensors", (1e9, 1e9 + 1))
    assert identity(root, [model]) != base
    assert hashed[2:] == ["weights.safetensors"]


def test_identity_does_not_remember_what_may_still_change(model, tmp_path):
    root = tmp_path / "cache"
    weights = model / "weights.safetensors"
    weights.write_bytes(b"1" * 100)
    now = weights.stat()
    first = identity(root, [model])
    weights.write_bytes(b"2" * 100)
    os.utime(weights, ns=(now.st_atime_ns, now.st_mtime_ns))  # as on a file system with a coarse clock
    assert identity(root, [model]) != first


def test_a_damaged_note_is_made_again(model, tmp_path):
    root = tmp_path / "cache"
    base = identity(root, [model])
    notes = [path for path in (root / "hashes").rglob("*") if path.is_file()]
    assert len(notes) == 2
    for damage in (b"", b"\xff\xfe", b"0" * 64 + b" " + b"0" * 64):
        for note in notes:
            note.write_bytes(damage)
        assert identity(root, [model]) == base


def test_identity_of_nothing(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match="no weights or settings in it"):
        identity(tmp_path / "cache", [tmp_path / "vae"])
