"""Every architecture through the engine: LoRA, training, resuming, export. What each must do is in `archs.py`.

`golden_losses.json` holds three steps' losses of each. After a change that is meant to move them:
`python tests/test_archs_engine.py` writes it anew.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archs import ROWS, Row
from detour import export
from detour.config.load import load_job
from detour.export.verify import layer_shapes, verify
from detour.lora_formats import diffusers_refuses, unsupported
from detour.nn import lora
from detour.nn.quiet import quiet_imports
from detour.sample import Request, denoise, initial_noise
from miniature import Ran, files_of, run, start
from minis import LARGE, NETWORK, SIZE, Mini

GOLDEN = Path(__file__).with_name("golden_losses.json")
rows = pytest.mark.parametrize("row", ROWS, ids=str, scope="module")
DAILY = {"zimage", "sdxl", "flux", "wan21", "auraflow"}
"""A UNet, transformers of one stream, two and both, and the clips."""
whole_rows = pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[] if str(row) in DAILY else [pytest.mark.slow]) for row in ROWS],
    ids=str,
    scope="module",
)
"""For what takes many steps: the others are slow."""


@pytest.fixture(scope="module")
def mini(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Mini:
    return Mini(row, tmp_path_factory.mktemp(row.name))


@pytest.fixture(scope="module")
def weights(mini: Mini) -> dict[str, torch.Tensor]:
    """Of a LoRA that was trained for a few steps."""
    return mini.fit(NETWORK, 4)[0]


@rows
def test_a_fresh_lora_changes_nothing_and_gets_the_only_gradients(mini: Mini) -> None:
    denoiser = mini.denoiser()
    assert len(lora.trainable(denoiser)) == 2 * mini.row.lora_blocks
    z0, _ = mini.batch(mini.row.reaching)
    with lora.disabled(denoiser):
        without = mini.field(denoiser, z0, 0.5)
    with_it = mini.field(denoiser, z0, 0.5)
    assert torch.equal(with_it, without)
    with_it.square().mean().backward()
    got = {name for name, parameter in denoiser.named_parameters() if parameter.grad is not None}
    assert got == {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    # A is behind B, which is zero; every B must be reached.
    still = [n for n, p in lora.trainable(denoiser).items() if n.endswith("lora_B.weight") and not p.grad.any()]
    assert still == [f"{name}.lora_B.weight" for name in mini.row.unread]


@whole_rows
def test_it_overfits_one_batch(mini: Mini) -> None:
    _, losses = mini.fit(LARGE, 60, enough=1 / 3)
    assert losses[-1] < losses[0] / 3, (losses[0], losses[-1])


@pytest.mark.slow
@rows
def test_weights_give_the_same_prediction_again(mini: Mini, weights: dict[str, torch.Tensor]) -> None:
    z0, _ = mini.batch()
    first, second = (mini.field(mini.denoiser(weights=weights), z0, 0.3) for _ in range(2))
    fresh = mini.field(mini.denoiser(), z0, 0.3)
    assert torch.equal(first, second)
    assert not torch.equal(first, fresh)


@whole_rows
@pytest.mark.parametrize("fmt", ["diffusers", "comfy", "kohya"])
def test_exports_draw_the_same_picture_in_the_ecosystem(
    mini: Mini, weights: dict[str, torch.Tensor], fmt: Any, tmp_path: Path
) -> None:
    """Each format that the architecture has, loaded by diffusers' pipeline (PEFT, where diffusers has no loader)."""
    spec = mini.arch.spec
    if unsupported("lora", fmt, spec) is not None:
        pytest.skip(f"{spec.title} has no LoRA files in the format {fmt}")
    denoiser = mini.denoiser(weights=weights)
    file = export.from_training(weights, NETWORK)
    path = tmp_path / "lora.safetensors"
    export.write_lora(path, file, export.Base.of(denoiser, spec), fmt, dtype="fp32", metadata={})
    proof = verify(path, file, spec, fmt, layer_shapes(denoiser))
    assert proof.modules == mini.row.lora_blocks
    if not spec.diffusers_loader or diffusers_refuses(file, spec, fmt):  # a miniature has other sizes than it expects
        assert proof.loader == "PEFT"
        return
    request = Request(prompt=mini.captions[0], seed=5, width=SIZE, height=SIZE, steps=2)
    condition = mini.conditions[:1]
    ours = denoise(mini.arch, denoiser, mini.scheduler, initial_noise(spec, request), request, condition)
    with quiet_imports():
        pipeline = mini.row.load_pipeline(mini.root / "model")
    plain = mini.row.draw(pipeline, request, spec)
    pipeline.load_lora_weights(str(path))
    theirs = mini.row.draw(pipeline, request, spec)
    assert (theirs - plain).abs().max() > 1e-3 * plain.abs().max(), "the LoRA has no effect"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


# ------------------------------------------------------------------------------------------------------- whole runs


def job_of(mini: Mini, folder: Path, steps: int = 4, **train: Any) -> Path:
    """A job of a few steps in float32 with a preview."""
    process = {
        "type": "train",
        "device": "cpu",
        "model": {"arch": mini.row.name, "name_or_path": str(mini.root / "model")},
        "datasets": [{"folder_path": str(mini.root / "data"), "resolution": SIZE, "caption_dropout_rate": 0.3}],
        "network": {"linear": 4},
        "train": {
            "steps": steps, "lr": 1e-3, "dtype": "fp32", "num_workers": 0, "cache_folder": str(mini.root / "cache"),
            "batch_size": 2, **train,
        },
        "sample": {"width": SIZE, "height": SIZE, "sample_steps": 2, "skip_first_sample": True, "prompts": ["a zig"]},
        "save": {"save_every": 2},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(json.dumps({"config": {"output_name": "zig", "output_folder": str(folder), "process": [process]}}))
    return path


def losses(ran: Ran) -> list[float]:
    return [event.loss for event in ran.seen.of("step")]


@whole_rows
def test_a_stopped_run_goes_on_bit_for_bit_and_losses_are_golden(mini: Mini, tmp_path: Path) -> None:
    job = load_job(job_of(mini, tmp_path)).job
    whole = run(job)
    state, written = whole.state, files_of(whole.result.folder)
    whole.result.folder.rename(tmp_path / "whole")
    first, second = run(job, stop_at=2), run(job)
    assert losses(first) + losses(second) == losses(whole)
    assert second.state == state
    assert files_of(second.result.folder) == written
    assert any(name.startswith("samples/") for name in written)
    assert losses(whole)[:3] == pytest.approx(json.loads(GOLDEN.read_text())[mini.row.name], rel=1e-3)


def killed_at_step_three(path: Path) -> None:
    """For `start`: the run ends itself, hard, when it has done step 3."""

    def kill(event: Any) -> None:
        if event.type == "step" and event.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    run(load_job(path).job, on=kill)


@pytest.mark.slow
@rows
def test_a_killed_run_goes_on_bit_for_bit(mini: Mini, tmp_path: Path) -> None:
    path = job_of(mini, tmp_path)
    whole = run(load_job(path).job)
    state, written = whole.state, files_of(whole.result.folder)
    whole.result.folder.rename(tmp_path / "whole")
    process = start(killed_at_step_three, path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = run(load_job(path).job)
    assert again.result.finished
    assert (again.state, files_of(again.result.folder)) == (state, written)


def write_golden(names: list[str], say: Callable[[str], None] = print) -> None:  # pragma: no cover
    """Run three steps of each architecture and write their losses."""
    from tempfile import TemporaryDirectory

    found = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for row in ROWS:
        if names and row.name not in names:
            continue
        with TemporaryDirectory() as folder:
            mini = Mini(row, Path(folder))
            found[row.name] = losses(run(load_job(job_of(mini, mini.root / "run")).job))[:3]
        say(f"{row.name}: {found[row.name]}")
    GOLDEN.write_text(json.dumps({row.name: found[row.name] for row in ROWS if row.name in found}, indent=1) + "\n")


if __name__ == "__main__":
    write_golden(sys.argv[1:])
