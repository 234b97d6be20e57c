"""Drawing as the finished LoRA is used: with a patch, or on another model than the one that is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from detour.draw import Drawing, draw
from detour.nano import zimage
from miniature import SIZE, Ran, World, job, run

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def models(world: World) -> dict[str, str]:
    """A base that differs from the turbo in its transformer alone, and a patch."""
    paths = {"base": world.root / "other_base", "patch": world.root / "patch.safetensors"}
    zimage.write(paths["base"], seed=1)
    for part in ("text_encoder", "vae"):
        shutil.copytree(world.model / part, paths["base"] / part, dirs_exist_ok=True)
    zimage.write_adapter(paths["patch"], world.model, seed=5, scale=0.3)
    return {name: str(path) for name, path in paths.items()}


def sections(preserve: dict[str, Any], **model: Any) -> dict[str, Any]:
    drift = {"measure": True, "every": 2, "budget": 99.0, "long_steps": 4, "prompts": ["a blue square"]}
    return {
        "model": {"assistant_lora_path": None} | model,
        "train": {"steps": 3, "lr": 2e-2},
        "sample": {"disable_sampling": False, "sample_steps": 2, "prompts": [{"prompt": PROMPT, "seed": 7}]},
        "preserve": preserve | {"drift": drift},
    }


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def drawn_later(ran: Ran, world: World, folder: Path, *loras: str) -> np.ndarray:
    """What `detour sample` makes of the run's LoRA on the turbo."""
    assert ran.result.lora is not None
    drawing = Drawing(
        model=str(world.model), arch="zimage", prompts=[PROMPT], loras=[str(ran.result.lora), *loras], steps=2,
        seed=7, size=(SIZE, SIZE), dtype="fp32", device="cpu",
    )  # fmt: skip
    (path,) = draw(drawing, folder)
    return pixels(path)


def preview(ran: Ran, step: int) -> np.ndarray:
    return pixels(ran.result.folder / "samples" / f"{step:09d}-00.png")


def test_a_patch_is_drawn_with_and_not_trained(world: World, models: dict[str, str], tmp_path: Path) -> None:
    """The same weights as without it, bit for bit; previews are those of both LoRAs together."""
    with_patch = {"strategy": "distill_patch", "distill_patch": f"{models['patch']}:0.7"}
    patched = run(job(world, tmp_path / "a", **sections(with_patch)))
    plain = run(job(world, tmp_path / "b", **sections({"strategy": "none"})))
    assert patched.state == plain.state
    assert [event.loss for event in patched.seen.of("step")] == [event.loss for event in plain.seen.of("step")]

    later = drawn_later(patched, world, tmp_path / "later", f"{models['patch']}:0.7")
    assert np.abs(preview(patched, 3) - later).max() <= 1
    assert np.abs(preview(plain, 3) - drawn_later(plain, world, tmp_path / "alone")).max() <= 1
    assert np.abs(preview(patched, 3) - preview(plain, 3)).max() > 5

    first, *_, last = patched.seen.of("drift")
    assert first.drift > 0.001, "what the patch alone changes"
    assert last.drift != plain.seen.of("drift")[-1].drift
    assert first.gap_untouched == plain.seen.of("drift")[0].gap_untouched, "the untouched model has no patch"
    with safe_open(patched.result.lora, framework="pt") as file:  # type: ignore[arg-type]
        metadata = file.metadata()
    assert len(metadata["detour.distill_patch_sha256"]) == 64
    assert metadata["detour.preserve_strategy"] == "distill_patch"
    with Image.open(patched.result.folder / "samples" / "000000003-00.png") as picture:
        assert json.loads(picture.info["parameters"])["distill_patch_sha256"] == metadata["detour.distill_patch_sha256"]


@pytest.mark.slow
def test_the_patch_may_change_between_sessions(world: World, models: dict[str, str], tmp_path: Path) -> None:
    """It decides nothing about the weights."""
    with_patch = {"strategy": "distill_patch", "distill_patch": models["patch"]}
    run(job(world, tmp_path, **sections(with_patch)), stop_at=1)
    again = run(job(world, tmp_path, **sections(with_patch | {"distill_patch": f"{models['patch']}:0.5"})))
    assert again.result.finished
    assert not [warning for warning in again.seen.warnings if "changed" in warning]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_a_lora_of_the_base_is_drawn_on_the_turbo(
    world: World, models: dict[str, str], tmp_path: Path, kind: str
) -> None:
    """Trained on one model, drawn and measured on another, as `detour sample` draws with the file there."""
    preserve = {"strategy": "de_turbo", "deploy_on": str(world.model)}
    mine = sections(preserve, arch="zimage:base", name_or_path=models["base"])
    mine["network"] = {"linear": 4, "type": kind}
    mine["sample"]["sample_steps"] = None
    mine["sample"]["prompts"][0]["sample_steps"] = 2
    ran = run(job(world, tmp_path / "a", **mine))
    first, *_, last = ran.seen.of("drift")
    if kind == "lora":  # a DoRA's norms are the base's: on the turbo even a fresh one is not the identity
        assert np.abs(preview(ran, 3) - drawn_later(ran, world, tmp_path / "later")).max() <= 1
        assert (first.drift, first.spread) == (0.0, 1.0) and last.drift > 0.001
        assert not np.array_equal(preview(ran, 0), preview(ran, 3))

    alone = sections({"strategy": "none"}, arch="zimage:base", name_or_path=models["base"])
    alone["network"] = mine["network"]
    plain = run(job(world, tmp_path / "b", **alone))
    assert ran.state == plain.state, "drawing with another model changes nothing in training"
    resolved = (ran.result.folder / "job.yaml").read_text()
    assert "sample_steps: 8" in resolved and "guidance_scale: 1.0" in resolved, "the turbo's defaults"
