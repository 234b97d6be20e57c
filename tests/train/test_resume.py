"""Stopped in the middle and gone on with, a run ends as one that was never stopped: bit for bit, by hashes.

Compared are every trained tensor, the average, the optimizer's tensors and numbers, the place in the data, and for each
micro-batch its pictures, prompts, times and noise. Epochs have five micro-batches and steps three, so that epochs end
inside steps; dropout of captions and inside the adapter is on.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from detour import UserError, files
from detour.nano import zimage
from detour.train import checkpoint
from faults import flip
from miniature import Ran, Seen, World, files_of, job, newest, run, state_of, traced

STEPS = 7
OPTIMIZERS = {
    "adamw": {"lr": 1e-3},
    "adamw8bit": {"lr": 1e-3},
    "adafactor": {"lr": 1e-3},
    "prodigy": {"lr": 1.0},
    "lion": {"lr": 3e-4},
    "schedulefree": {"lr": 1e-3},
}
NETWORKS = ("lora", "lokr", "loha", "dora", "full")


def settings(
    optimizer: str = "adamw",
    network: str = "lora",
    workers: int = 0,
    model: dict[str, Any] | None = None,
    **train: Any,
) -> dict[str, Any]:
    """A job with everything on that could go wrong in resuming. Previews and validation must leave no trace."""
    return {
        "model": model or {},
        "train": {
            "steps": STEPS,
            "optimizer": optimizer,
            **OPTIMIZERS[optimizer],
            "gradient_accumulation": 3,
            "num_workers": workers,
            "lr_scheduler": "constant" if optimizer == "schedulefree" else "cosine",
            "lr_warmup_steps": 2,
            "ema_config": {"use_ema": True, "ema_decay": 0.8},
            "timestep_type": "sigmoid",
            **train,
        },
        # rank 48: in adamw8bit, tensors from 4096 values on have an 8-bit state
        "network": {"type": network, "linear": 48 if optimizer == "adamw8bit" else 4, "dropout": 0.2},
        "dataset": {"caption_dropout_rate": 0.3, "flip_x": False},
        "save": {"save_every": 2, "max_step_saves_to_keep": 20},
        "sample": {"disable_sampling": False, "sample_every": 2, "sample_steps": 1, "prompts": ["a zig"]},
        "validation": {"validate_every": 3, "holdout": 0.2},
    }


def through(world: World, folder: Path, **options: Any) -> tuple[Ran, list[Seen], dict[str, str], dict[str, str]]:
    """A run that is not stopped: what it trained on, its state and its files. Then it is moved aside, for the same job
    to be run again in the same place: files name the job by its hash."""
    with traced() as seen:
        ran = run(job(world, folder, **settings(**options)))
    state, written = ran.state, files_of(ran.result.folder)
    ran.result.folder.rename(folder / "whole")
    return ran, seen, state, written


def same_when_stopped(world: World, folder: Path, stops: tuple[int, ...], **options: Any) -> None:
    whole, seen_whole, state, written = through(world, folder, **options)
    halves = job(world, folder, **settings(**options))
    with traced() as seen:
        for stop in stops:
            stopped = run(halves, stop_at=stop)
            assert (stopped.result.step, stopped.result.finished) == (stop, False)
            assert newest(stopped.result.folder).step == stop
        last = run(halves)
    assert last.result.finished
    assert last.seen.of("start")[0].resumed_from is not None
    assert seen == seen_whole
    assert len({batch.noise for batch in seen}) == len(seen) == STEPS * 3
    assert last.state == state
    assert {key.split("/")[0] for key in state} == {"weights", "ema", "optimizer", "progress"}
    assert set(last.seen.warnings) <= set(whole.seen.warnings)
    found = files_of(last.result.folder)
    assert {name: found.get(name) for name in written} == written
    assert set(found) - set(written) <= {f"zig-{stop:09d}.safetensors" for stop in stops}


@pytest.mark.slow
def test_stopped_twice_inside_epochs(world, tmp_path):
    same_when_stopped(world, tmp_path, (2, 5))


@pytest.mark.slow
def test_schedule_free_with_workers(world, tmp_path):
    same_when_stopped(world, tmp_path, (3,), optimizer="schedulefree", workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(world, tmp_path, optimizer, workers):
    same_when_stopped(world, tmp_path, (1, 4), optimizer=optimizer, workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network(world, tmp_path, network):
    same_when_stopped(world, tmp_path, (3,), network=network)


BASES: dict[str, dict[str, Any]] = {
    "bf16, recomputed": {"dtype": "bf16", "gradient_checkpointing": True},
    "merged": {"model": {"assistant_lora_mode": "merged"}},
    "int8": {"model": {"quantize": True, "qtype": "int8"}, "dtype": "bf16"},
    "nf4": {"model": {"quantize": True, "qtype": "nf4"}, "dtype": "bf16"},
    "batches of two": {"batch_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_every_way_to_hold_the_base(world, tmp_path, base):
    same_when_stopped(world, tmp_path, (3,), **BASES[base])


@pytest.mark.slow
def test_stopped_at_every_step(world, tmp_path):
    same_when_stopped(world, tmp_path, tuple(range(STEPS)))


@pytest.mark.slow
def test_one_worker_or_two_or_none_train_the_same(world, tmp_path):
    """Also when the number changes on the way."""
    _, seen_whole, state, _ = through(world, tmp_path)
    with traced() as seen:
        run(job(world, tmp_path, **settings(workers=2)), stop_at=2)
        run(job(world, tmp_path, **settings(workers=1)), stop_at=5)
        last = run(job(world, tmp_path, **settings()))
    assert seen == seen_whole
    assert last.state == state


# --- damage ---------------------------------------------------------------------------------------------------------


def quick(**train: Any) -> dict[str, Any]:
    return {"train": {"steps": 6, **train}, "save": {"save_every": 2, "dtype": "fp32"}}


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_ends_the_same(world, tmp_path):
    whole = run(job(world, tmp_path, **quick()))
    state, written = whole.state, files_of(whole.result.folder)
    whole.result.folder.rename(tmp_path / "whole")
    stopped = run(job(world, tmp_path, **quick()), stop_at=4)
    path = stopped.result.folder / "checkpoints" / checkpoint.folder_name(4)
    flip(path / "optimizer.safetensors", random.Random(0))
    last = run(job(world, tmp_path, **quick()))
    told = [message for message in last.seen.warnings if "passed over" in message]
    assert len(told) == 1
    assert str(path) in told[0]
    assert "optimizer.safetensors" in told[0]
    assert last.seen.of("start")[0].resumed_from.endswith(checkpoint.folder_name(2))
    assert [event.step for event in last.seen.of("step")] == [3, 4, 5, 6]
    assert last.state == state
    assert files_of(last.result.folder) == written
    checkpoint.load(path)  # written again on the way


def test_when_no_checkpoint_is_whole_nothing_is_overwritten(world, tmp_path):
    stopped = run(job(world, tmp_path, **quick()), stop_at=3)
    places = list((stopped.result.folder / "checkpoints").iterdir())
    for path in places:
        flip(path / "weights.safetensors", random.Random(0))
    held = [path.joinpath("weights.safetensors").read_bytes() for path in places]
    with pytest.raises(UserError, match=r"every checkpoint is damaged.*--fresh"):
        run(job(world, tmp_path, **quick()))
    assert [path.joinpath("weights.safetensors").read_bytes() for path in places] == held
    fresh = run(job(world, tmp_path, **quick()), fresh=True)
    assert [event.step for event in fresh.seen.of("step")] == [1, 2, 3, 4, 5, 6]


def test_a_first_checkpoint_that_was_never_finished_does_not_count(world, tmp_path):
    """As a process leaves it that is killed in its first save."""
    stopped = run(job(world, tmp_path, **quick()), stop_at=0)
    path = stopped.result.folder / "checkpoints" / checkpoint.folder_name(0)
    for host in (files._HOST, "abcdef"):  # this machine's, and another's
        shutil.copytree(path, path.with_name(f"{path.name}.tmp-{host}-999999999-01234567"))
    shutil.rmtree(path)
    last = run(job(world, tmp_path, **quick()))
    assert last.result.finished
    assert last.seen.of("start")[0].resumed_from is None


# --- killed after a checkpoint was whole ------------------------------------------------------------------------------


def test_what_a_killed_process_had_no_time_for_is_made_up_for(world, tmp_path):
    """The LoRA file and the previews of a step come after its checkpoint, the other formats after the first."""
    options = quick() | {
        "sample": {
            "disable_sampling": False,
            "sample_every": 2,
            "sample_steps": 1,
            "prompts": ["a zig", "a red cross"],
        },
        "save": {"save_every": 2, "formats": ["comfy", "diffusers"]},
    }
    folder = run(job(world, tmp_path, **options), stop_at=4).result.folder
    for names in (
        ["zig-000000004.safetensors", "samples/000000004-01.png"],
        ["zig.diffusers.safetensors"],
        ["zig.safetensors", "zig.diffusers.safetensors", "samples/000000006-01.png"],
    ):
        if names[0].startswith("zig."):
            assert run(job(world, tmp_path, **options)).result.finished
        written = files_of(folder)
        for name in names:
            (folder / name).unlink()
        run(job(world, tmp_path, **options), stop_at=4)
        assert files_of(folder) == written


# --- another job ----------------------------------------------------------------------------------------------------


def changes_told(world: World, folder: Path, first: dict[str, Any], then: dict[str, Any]) -> str:
    run(job(world, folder, **first), stop_at=2)
    last = run(job(world, folder, **then))
    assert last.result.finished
    told = [event for event in last.seen.of("warning") if "changed" in event.message]
    return "\n".join(line for event in told for line in event.details)


def test_a_changed_setting_is_named(world, tmp_path):
    told = changes_told(world, tmp_path, quick(), quick(lr=2e-3, timestep_type="sigmoid"))
    assert "train.lr" in told
    assert "0.001" in told
    assert "0.002" in told
    assert "train.timestep_type" in told
    assert "train.steps" not in told


def test_a_changed_picture_and_another_adapter_are_named(world, tmp_path):
    data, adapter = tmp_path / "data", tmp_path / "adapter.safetensors"
    shutil.copytree(world.data, data)
    shutil.copy(world.adapter, adapter)
    options = quick() | {"dataset": {"folder_path": str(data)}, "model": {"assistant_lora_path": str(adapter)}}
    run(job(world, tmp_path, **options), stop_at=2)
    (data / "0001.txt").write_text("something else")
    zimage.write_adapter(adapter, world.model, seed=1)
    told = changes_told(world, tmp_path, options, options)
    assert "dataset" in told
    assert "training_adapter" in told


def test_nothing_is_told_when_nothing_that_matters_has_changed(world, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(world.data, moved)
    then = quick(num_workers=1, cache_folder=str(tmp_path / "cache")) | {"dataset": {"folder_path": str(moved)}}
    assert changes_told(world, tmp_path / "job", quick(), then) == ""


def test_another_network_or_optimizer_is_refused_and_the_checkpoint_stays(world, tmp_path):
    stopped = run(job(world, tmp_path, **quick()), stop_at=2)
    state = stopped.state
    for other in (
        quick() | {"network": {"linear": 8}},
        quick() | {"network": {"type": "lokr"}},
        quick(optimizer="lion"),
        quick(ema_config={"use_ema": True}),
    ):
        with pytest.raises(UserError):
            run(job(world, tmp_path, **other))
        assert state_of(stopped.result.folder) == state
    assert run(job(world, tmp_path, **quick())).result.finished


def test_more_steps_go_on_from_the_end(world, tmp_path):
    """With a constant learning rate as if they had been asked for from the start."""
    whole = run(job(world, tmp_path / "whole", **quick(steps=8)))
    run(job(world, tmp_path / "job", **quick(steps=6)))
    last = run(job(world, tmp_path / "job", **quick(steps=8)))
    assert [event.step for event in last.seen.of("step")] == [7, 8]
    assert last.state == whole.state


def test_a_finished_run_stays_as_it_is(world, tmp_path):
    ran = run(job(world, tmp_path, **quick()))
    written, state = files_of(ran.result.folder), ran.state
    again = run(job(world, tmp_path, **quick()))
    assert again.result == ran.result
    assert again.seen.of("step") == []
    assert files_of(ran.result.folder) == written
    assert again.state == state


# --- fresh ----------------------------------------------------------------------------------------------------------


def test_fresh_moves_the_old_run_aside_and_starts_over(world, tmp_path):
    stopped = run(job(world, tmp_path, **quick()), stop_at=4)
    state, written = stopped.state, files_of(stopped.result.folder)
    for number in (1, 2):
        again = run(job(world, tmp_path, **quick()), fresh=True)
        assert again.seen.of("start")[0].resumed_from is None
        assert [event.step for event in again.seen.of("step")] == [1, 2, 3, 4, 5, 6]
        old = tmp_path / f"zig.old-{number}"
        assert (old / "events.jsonl").is_file()
        assert (state_of(old), files_of(old)) == (state, written)
        state, written = again.state, files_of(again.result.folder)
