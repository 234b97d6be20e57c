"""The loader: the same sequence from any position with any number of workers, and what a batch holds."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detour import UserError
from detour.data.loader import Batch, Source, batches, load_batch, loss_mask


@pytest.fixture
def made(kit):
    """Eleven pictures of two sizes with captions of several lengths, prepared."""
    for index in range(11):
        kit.draw(
            f"{index}.png", (64, 64 if index % 3 else 128), seed=index, caption="word " * (index % 4 + 1) + str(index)
        )
    return kit.prepare(kit.order(kit.config(caption_dropout_rate=0.2, flip_x=True)))


def source(kit, made, reg_weight=1.0):
    return Source(kit.store, kit.keys, made.datasets, reg_weight)


def flat(pair):
    """A batch and its position, as something to compare."""
    batch, after = pair
    tensors = [batch.latents_BCHW, batch.weights_B, *(t for condition in batch.conditions for t in condition.values())]
    return batch.names, batch.prompts, batch.epoch, after, [(t.shape, t.tolist()) for t in tensors]


def take(kit, made, count, start=(0, 0), workers=0, context=None):
    stream = batches(made, source(kit, made), start, workers, context)
    return [flat(pair) for pair in islice(stream, count)]


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), (4, "fork"), (2, "spawn")])
def test_the_sequence_is_the_same_for_any_number_of_workers(kit, made, workers, context):
    count = made.count(0) + made.count(1) + 3
    assert take(kit, made, count, (0, 2), workers, context) == take(kit, made, count, (0, 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_from_any_position(kit, made, workers):
    whole = take(kit, made, made.count(0) + made.count(1) + 2)
    for place in (0, 3, made.count(0) - 1, made.count(0), made.count(0) + 2):
        after = whole[place - 1][3] if place else (0, 0)
        assert take(kit, made, 4, after, workers) == whole[place : place + 4]


def test_epochs_follow_each_other(kit, made):
    whole = take(kit, made, made.count(0) + made.count(1) + 1)
    assert [each[2] for each in whole] == [0] * made.count(0) + [1] * made.count(1) + [2]
    assert whole[made.count(0) - 1][3] == (1, 0)


def test_a_batch_holds_what_was_planned(kit, made):
    plan = made.epoch(0)[0]
    batch = load_batch(source(kit, made), plan)
    for draw, latents_CHW, condition in zip(plan.draws, batch.latents_BCHW, batch.conditions, strict=True):
        array = np.asarray(Image.open(draw.item.picture.path))[:, :: -1 if draw.item.flip_x else 1]
        pixels = torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        assert torch.equal(latents_CHW, kit.arch.encode_images("vae", pixels)[0])
        assert torch.equal(condition["tokens_LD"], kit.arch.encode_prompts("text", [draw.prompt])[0]["tokens_LD"])
    assert batch.names == [f"pictures/{draw.item.picture.key}" for draw in plan.draws]
    assert batch.masks_B1HW is None
    assert batch.weights_B.tolist() == [1.0] * len(plan.draws)
    assert batch.latents_BCHW.dtype == batch.weights_B.dtype == torch.float32


def test_weights(kit):
    kit.draw("a.png")
    kit.draw("../reg/b.png", seed=1)
    configs = kit.config(loss_weight=2.0), kit.config(folder_path=kit.root / "reg", is_reg=True, loss_weight=3.0)
    made = kit.prepare(kit.order(*configs))
    main, reg = (load_batch(source(kit, made, 0.5), plan) for plan in made.epoch(0))
    assert (main.is_reg, main.weights_B.tolist(), main.names) == (False, [2.0], ["pictures/a.png"])
    assert (reg.is_reg, reg.weights_B.tolist(), reg.names) == (True, [1.5], ["reg/b.png"])


def test_masks(kit):
    folder = kit.root / "masks"
    folder.mkdir()
    for index in range(2):
        kit.draw(f"{index}.png", seed=index)
        Image.new("L", (64, 64), 255).save(folder / f"{index}.png")
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(folder / "0.png")
    made = kit.prepare(kit.order(kit.config(mask_path=folder, mask_min_value=0.2)))
    batch = load_batch(source(kit, made), made.epoch(0)[0])
    masks = dict(zip(batch.names, batch.masks_B1HW, strict=True))
    assert batch.masks_B1HW.shape == (2, 1, 8, 8)
    assert torch.equal(masks["pictures/1.png"], torch.ones(1, 8, 8))
    assert torch.allclose(masks["pictures/0.png"][0, 0], torch.tensor([1 / 3] * 4 + [5 / 3] * 4))


def test_masked_and_unmasked_pictures_share_a_batch(kit):
    kit.draw("a.png")
    clear = Image.open(kit.draw("b.png", seed=1)).convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    clear.save(kit.root / "pictures" / "b.png")
    made = kit.prepare(kit.order(kit.config(alpha_mask=True)))
    batch = load_batch(source(kit, made), made.epoch(0)[0])
    assert (batch.masks_B1HW[batch.names.index("pictures/a.png")] == 1).all()
    assert batch.masks_B1HW[batch.names.index("pictures/b.png")].min() < 1


def test_loss_mask_keeps_the_mean():
    mask = torch.rand(1, 8, 8)
    for floor in (0.0, 0.1, 1.0):
        weight = loss_mask(mask, floor)
        assert abs(float(weight.mean()) - 1) < 1e-6
        assert torch.allclose(weight / weight.max(), (floor + (1 - floor) * mask) / (floor + (1 - floor) * mask).max())
    assert torch.allclose(loss_mask(torch.zeros(1, 8, 8), 0.1), torch.ones(1, 8, 8))
    assert torch.equal(loss_mask(torch.zeros(1, 8, 8), 0.0), torch.zeros(1, 8, 8))


def test_to_device(kit, made):
    batch = load_batch(source(kit, made), made.epoch(0)[0])
    masked = dataclasses.replace(batch, masks_B1HW=torch.ones(2, 1, 8, 8))
    moved = masked.to(torch.device("meta"))
    tensors = [moved.latents_BCHW, moved.weights_B, moved.masks_B1HW, *moved.conditions[0].values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.names == batch.names
    assert batch.latents_BCHW.device.type == "cpu"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_entry_names_its_picture_and_a_new_start_mends_it(kit, made, workers):
    draw = made.epoch(0)[3].draws[0]
    path = kit.store.path("latents", kit.keys.latents(draw.item, made.datasets[0], draw.crop))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError) as caught:
        take(kit, made, 10, workers=workers)
    message = str(caught.value)
    assert f"the latents of {draw.item.picture.path} went missing from the cache, or was damaged" in message
    assert "start again" in message
    assert "Traceback" not in message
    again = kit.prepare(kit.order(kit.config(caption_dropout_rate=0.2, flip_x=True)))
    assert len(take(kit, again, 10)) == 10


def test_missing_caption_is_named(kit, made):
    draw = made.epoch(0)[0].draws[0]
    kit.store.path("text", kit.keys.prompt(draw.prompt)).unlink()
    with pytest.raises(UserError, match=rf"the caption's embedding of {draw.item.picture.path}"):
        take(kit, made, 1)


@pytest.mark.slow
def test_workers_leave_ctrl_c_to_the_main_process_and_end_with_it(kit, made):
    """SIGINT goes to the whole group of a terminal; the batches go on, and nobody is left behind."""
    (kit.root / "what.pickle").write_bytes(pickle.dumps((made, source(kit, made))))
    code = f"""
import os, pickle, signal, sys, time
import psutil
from detour.data.loader import batches
made, source = pickle.load(open({str(kit.root / "what.pickle")!r}, "rb"))
caught = []
stream = batches(made, source, (0, 0), 2)
next(stream)
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
workers = [child.pid for child in psutil.Process().children()]
os.killpg(0, signal.SIGINT)
time.sleep(0.3)
names = [next(stream)[0].names for _ in range(20)]
print(len(caught), len(names), *workers, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")})  # fmt: skip
    caught, names, *workers = map(int, process.stdout.readline().split())
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert (caught, names) == (1, 20)
    assert len(workers) >= 2
    import psutil

    deadline = time.monotonic() + 15
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.2)


def test_closing_the_stream_ends_the_workers(kit, made):
    import psutil

    before = set(psutil.Process().children())
    stream = batches(made, source(kit, made), (0, 0), 2)
    batch, _ = next(stream)
    assert isinstance(batch, Batch)
    assert set(psutil.Process().children()) - before
    stream.close()
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - before, timeout=10)
    assert not alive
