"""A miniature world for the tests of the command line: the model, its training adapter, a few pictures of 64 pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command import well
from detour.nano import drawn, zimage

SIZE = 64  # pixels


@dataclass(frozen=True)
class World:
    """Files that every test shares and none changes."""

    model: Path
    adapter: Path
    pictures: Path
    """Five drawn pictures with captions."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Latents and captions are kept once for all of these tests, and not in the cache of whoever runs them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETOUR_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    well("nano", root / "model", "--random")
    zimage.write_adapter(root / "model" / "training_adapter.safetensors", root / "model")
    drawn.write_dataset(root / "pictures", n=5, size=SIZE)
    return World(root / "model", root / "model" / "training_adapter.safetensors", root / "pictures")


WriteJob = Callable[..., Path]


@pytest.fixture(scope="session")
def write_job(world: World) -> WriteJob:
    """Writes a job file of a few float32 steps with the training adapter, without previews; sections are laid over."""

    def write(folder: Path, name: str = "zig", **sections: Any) -> Path:
        base: dict[str, dict[str, Any]] = {
            "model": {"arch": "zimage", "name_or_path": str(world.model), "assistant_lora_path": str(world.adapter)},
            "train": {"steps": 2, "lr": 1e-3, "dtype": "fp32", "num_workers": 0, "gradient_checkpointing": False},
            "network": {"linear": 4},
            "save": {"dtype": "fp32"},
            "sample": {"disable_sampling": True, "width": SIZE, "height": SIZE, "sample_steps": 2},
        }
        dataset = {"folder_path": str(world.pictures), "resolution": SIZE} | sections.pop("dataset", {})
        process: dict[str, Any] = {"type": "train", "device": "cpu", "datasets": [dataset]}
        for section, values in (base | {key: sections.get(key, {}) for key in sections if key not in base}).items():
            added = sections.get(section, {})
            process[section] = values | added if isinstance(added, dict) else added
        config = {"output_name": name, "output_folder": str(folder / "output"), "process": [process]}
        folder.mkdir(parents=True, exist_ok=True)
        job = folder / "job.yaml"
        job.write_text(_yaml({"config": config}), encoding="utf-8")
        return job

    return write


def _yaml(value: Any, indent: int = 0) -> str:
    """One option a line, as people write job files, so that messages can name the line."""
    pad, lines = "  " * indent, []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines.append(f"{pad}{key}:\n{_yaml(item, indent + 1)}")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            entries = [_yaml(entry, indent + 2) for entry in item]
            lines.append(f"{pad}{key}:\n" + "".join(f"{pad}  - {entry.lstrip()}" for entry in entries))
        else:
            lines.append(f"{pad}{key}: {json.dumps(item)}\n")
    return "".join(lines)
