"""Shared by the tests of the data: drawn pictures, and an architecture that encodes by pooling."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from detour.archs.base import ArchSpec, Variant
from detour.config.job import DatasetConfig
from detour.data import cache, order, prepare
from detour.data.scan import scan
from detour.nn.lora_keys import LoraKeys

FACTOR, CHANNELS, TOKENS = 8, 4, 24

SPEC = ArchSpec(
    name="zimage",
    title="Pooling",
    objective="flow",
    variants={"base": Variant(repo="a/b", distilled=False, steps=4, guidance=1.0, timestep_type="sigmoid")},
    default_variant="base",
    latent_channels=CHANNELS,
    spatial_factor=FACTOR,
    bucket_divisibility=16,
    text_tokens=TOKENS,
    text_multiple=4,
    shift=3.0,
    lora_blocks="",
    lora_all="",
    quantize_exclude="",
    lora_keys=LoraKeys(comfy_prefix="", diffusers_prefix="", kohya_prefix=""),
    modelspec="",
    licence="",
)


class PoolingArch:
    """Latents: means of 8 x 8 pixels of each colour, and their sum. Conditions: one row for each word."""

    spec = SPEC

    def __init__(self):
        self.pictures = 0
        self.prompts = []

    def encode_images(self, vae, pixels_B3HW):
        assert vae == "vae"
        assert pixels_B3HW.dtype == torch.float32
        assert pixels_B3HW.abs().max() <= 1
        self.pictures += len(pixels_B3HW)
        pooled = torch.nn.functional.avg_pool2d(pixels_B3HW, FACTOR)
        return torch.cat([pooled, pooled.sum(1, keepdim=True)], 1)

    def encode_prompts(self, text, prompts):
        assert text == "text"
        self.prompts += prompts
        return [{"tokens_LD": _rows(prompt), "pooled_D": _rows(prompt).mean(0)} for prompt in prompts]


def _rows(prompt):
    words = (prompt.split() or [""])[:TOKENS]
    rows = [np.frombuffer(word.encode().ljust(6)[:6], np.uint8) for word in words]
    return torch.tensor(np.array(rows), dtype=torch.float32)


class ListSink:
    """Keeps the events."""

    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append(event)

    def close(self):
        pass

    def of(self, kind):
        return [event for event in self.events if event.type == kind]


def draw(path, size=(64, 64), seed=0, **save):
    """Save a picture of noise (sharp, and different for each seed)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **save)
    return path


class Kit:
    """A store, an architecture, and what is needed to prepare and load."""

    def __init__(self, root):
        self.root = root
        self.arch = PoolingArch()
        self.loads = []
        self.store = cache.Store(root / "cache")
        self.keys = cache.Keys(vae="vae-1", text="text-1", spatial_factor=FACTOR)
        self.sink = ListSink()

    def draw(self, name, size=(64, 64), seed=0, caption="a cat", **save):
        path = draw(self.root / "pictures" / name, size, seed, **save)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    def config(self, **options):
        return DatasetConfig(**({"folder_path": self.root / "pictures", "resolution": [64]} | options))

    def order(self, *configs, trigger=None, seed=0, batch_size=2):
        configs = configs or (self.config(),)
        pictures = scan(configs, trigger=trigger, divisibility=16).pictures
        return order.Order(order.make_items(pictures, configs, 16), configs, trigger, seed, batch_size, 4)

    def load(self, what):
        self.loads.append(what)
        return what

    def encoders(self, **changes):
        made = prepare.Encoders(
            arch=self.arch,
            load_vae=lambda: self.load("vae"),
            load_text=lambda: self.load("text"),
            keys=self.keys,
            device=torch.device("cpu"),
        )
        return dataclasses.replace(made, **changes)

    def prepare(self, made, epochs=2, prompts=(), **changes):
        """Prepare an order; the order with the lengths of its captions."""
        lengths = prepare.prepare([made], epochs, prompts, self.encoders(**changes), self.store, self.sink)
        return dataclasses.replace(made, lengths=lengths)


@pytest.fixture
def kit(tmp_path):
    return Kit(tmp_path)
