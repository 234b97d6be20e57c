"""What a model is told of pictures while it is trained: shares, holes, and that each is a function of the step."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from detour import UserError, archs, nano
from detour.archs.base import Framing
from detour.config.job import ControlsConfig, TrainProcess
from detour.config.load import load_job
from detour.data.loader import Batch
from detour.nano import drawn
from detour.nn.rng import generator
from detour.train.controls import random_hole, told
from miniature import files_of, run

LATENT = (16, 24)


def batch_of(count: int, *, control: bool = True) -> Batch:
    latents = torch.randn(count, 4, *LATENT, generator=torch.Generator().manual_seed(0))
    conditions: list[dict[str, Tensor]] = [{"tokens_LD": torch.zeros(2, 3)} for _ in range(count)]
    for condition in conditions if control else []:
        condition["control_CHW"] = torch.ones(4, *LATENT)
    return Batch(
        latents_BCHW=latents,
        conditions=conditions,
        weights_B=torch.ones(count),
        masks_B1HW=None,
        names=["x"] * count,
        prompts=["x"] * count,
        framings=[Framing.whole(8, 8)] * count,
        is_reg=False,
        epoch=0,
    )


def test_without_options_the_batch_is_left_alone() -> None:
    batch = batch_of(2)
    assert told(batch, ControlsConfig(), 0, 0, 0) is batch


def test_shares_are_those_asked_for_and_draws_are_functions_of_the_step() -> None:
    config, batch = ControlsConfig(control_dropout=0.3, inpaint=0.6), batch_of(50)
    before = [dict(condition) for condition in batch.conditions]
    seen = [condition for step in range(20) for condition in told(batch, config, 7, step, 0).conditions]
    assert sum("control_CHW" not in condition for condition in seen) / 1000 == pytest.approx(0.3, abs=0.05)
    assert sum("hole_1HW" in condition for condition in seen) / 1000 == pytest.approx(0.6, abs=0.05)
    assert all(("hole_1HW" in condition) == ("inpaint_CHW" in condition) for condition in seen)
    assert [condition.keys() for condition in batch.conditions] == [condition.keys() for condition in before]
    again = told(batch, config, 7, 3, 0).conditions
    assert all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(again, seen[150:], strict=False)
    )
    for other in (told(batch, config, 8, 3, 0), told(batch, config, 7, 4, 0), told(batch, config, 7, 3, 1)):
        assert [condition.keys() for condition in other.conditions] != [condition.keys() for condition in again]


def test_a_picture_s_draws_do_not_depend_on_who_shares_its_batch() -> None:
    config = ControlsConfig(control_dropout=0.5, inpaint=0.5)
    for step in range(20):
        alone, together = (told(batch_of(count), config, 1, step, 0).conditions[0] for count in (1, 3))
        assert alone.keys() == together.keys()


def test_what_is_missing_is_zero_and_the_rest_is_the_picture() -> None:
    config = ControlsConfig(inpaint=1.0, inpaint_soften=False, inpaint_vary=False)
    batch = batch_of(4)
    for z0, condition in zip(batch.latents_BCHW, told(batch, config, 0, 0, 0).conditions, strict=True):
        hole = condition["hole_1HW"].bool().expand_as(z0)
        assert hole.any() and not hole.all()
        assert not condition["inpaint_CHW"][hole].any()
        assert torch.equal(condition["inpaint_CHW"][~hole], z0[~hole])


def holes(config: ControlsConfig, count: int = 200) -> list[tuple[Tensor, Tensor]]:
    return [random_hole(LATENT, config, generator(0, "hole", index)) for index in range(count)]


def test_holes_cover_a_fifth_to_four_fifths_and_are_of_one_piece_or_few() -> None:
    plain = ControlsConfig(inpaint=1.0, inpaint_soften=False, inpaint_vary=False)
    shares = torch.tensor([float(missing.mean()) for missing, _ in holes(plain)])
    assert 0.18 < shares.min() < 0.3 and 0.7 < shares.max() < 0.82
    # Smooth: few neighbours differ, where noise of that share would have about every third or second one differ.
    edges = torch.tensor([float((m[:, 1:] != m[:, :-1]).float().mean()) for m, _ in holes(plain)])
    assert edges.mean() < 0.2


def test_turned_softened_and_varied() -> None:
    base = {"inpaint": 1.0, "inpaint_soften": False, "inpaint_vary": False}
    plain, turned = (holes(ControlsConfig(**base, inpaint_invert=share)) for share in (0.0, 1.0))
    assert all(torch.equal(one[0], 1 - other[0]) for one, other in zip(plain, turned, strict=True))
    assert all(torch.equal(missing, said) for missing, said in plain)
    soft = [m for m, _ in holes(ControlsConfig(**base | {"inpaint_soften": True}))]
    partial = sum(bool(((m > 0) & (m < 1)).any()) for m in soft)
    assert 70 < partial < 130 and all(m.min() >= 0 and m.max() <= 1 for m in soft)
    varied = holes(ControlsConfig(**base | {"inpaint_vary": True}))
    wider = sum(bool((said > missing).any()) for missing, said in varied)
    narrower = sum(bool((said < missing).any()) for missing, said in varied)
    same = sum(torch.equal(missing, said) for missing, said in varied)
    assert min(wider, narrower, same) > 20 and wider + narrower + same == len(varied)


# --- options -----------------------------------------------------------------------------------------------------


def process_of(arch: str, **sections: object) -> TrainProcess:
    base = {"type": "train", "model": {"arch": arch}, "datasets": [{"folder_path": "x"}]}
    return TrainProcess.model_validate(base | sections)


@pytest.mark.parametrize(
    ("sections", "option"),
    [
        ({"datasets": [{"folder_path": "x", "control_path": "y"}]}, r"datasets\[0\]\.control_path"),
        ({"controls": {"inpaint": 0.5}}, r"controls\.inpaint"),
        ({"sample": {"prompts": ["a", {"prompt": "b", "control": "c.png"}]}}, r"sample\.prompts\[1\]\.control"),
        ({"sample": {"prompts": [{"prompt": "b", "inpaint": "c.png"}]}}, r"sample\.prompts\[0\]\.inpaint"),
        (
            {"validation": {"dataset": {"folder_path": "v", "control_path": "y"}}},
            r"validation\.dataset\.control_path",
        ),
    ],
)
def test_options_are_errors_where_the_model_takes_no_such_pictures(sections: dict[str, object], option: str) -> None:
    for arch in ("zimage", "flux", "flex1"):
        with pytest.raises(UserError, match=rf"^{option}: .* no such pictures; .*\(model\.arch: flex2\)"):
            archs.resolve(process_of(arch, **sections))
    archs.resolve(process_of("flex2", **sections))


@pytest.mark.parametrize(
    ("controls", "says"),
    [
        ({"inpaint_invert": 0.5}, "controls.inpaint_invert has no effect without holes; set controls.inpaint"),
        ({"control_dropout": 0.5}, "controls.control_dropout has no effect: no dataset has a control_path"),
    ],
)
def test_options_without_effect_are_errors(controls: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        process_of("flex2", controls=controls)


# --- a whole run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flex2")
    nano.write(root / "model", "flex2", random=True)
    drawn.write_dataset(root / "data", n=3, size=64)
    drawn.write_dataset(root / "controls", n=3, size=64, seed=1)
    return root


def job_of(world: Path, folder: Path, controls: dict[str, float] | None, **dataset: object) -> Path:
    process = {
        "type": "train",
        "device": "cpu",
        "model": {"arch": "flex2", "name_or_path": str(world / "model")},
        "datasets": [{"folder_path": str(world / "data"), "resolution": 64} | dataset],
        "network": {"linear": 4},
        "controls": controls or {},
        "train": {
            "steps": 4, "lr": 1e-3, "dtype": "fp32", "num_workers": 0, "cache_folder": str(world / "cache"),
            "batch_size": 2,
        },
        "sample": {
            "width": 64, "height": 64, "sample_steps": 2, "skip_first_sample": True,
            "prompts": ["a zig", {"prompt": "a zig", "control": str(next((world / "controls").glob("*.png")))}],
        },
        "save": {"save_every": 2},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(json.dumps({"config": {"output_name": "zig", "output_folder": str(folder), "process": [process]}}))
    return path


def losses_of(world: Path, folder: Path, controls: dict[str, float] | None, **dataset: object) -> list[float]:
    ran = run(load_job(job_of(world, folder, controls, **dataset)).job)
    return [event.loss for event in ran.seen.of("step")]


@pytest.mark.slow
def test_a_run_is_told_of_pictures_and_goes_on_bit_for_bit(world: Path, tmp_path: Path) -> None:
    control = {"control_path": str(world / "controls")}
    options = {"control_dropout": 0.5, "inpaint": 0.5}
    job = load_job(job_of(world, tmp_path / "a", options, **control)).job
    whole = run(job)
    state, written = whole.state, files_of(whole.result.folder)
    losses = [event.loss for event in whole.seen.of("step")]
    whole.result.folder.rename(tmp_path / "whole")
    run(job, stop_at=2)
    again = run(job)
    assert again.state == state and files_of(again.result.folder) == written
    plain = losses_of(world, tmp_path / "b", None)
    controlled = losses_of(world, tmp_path / "c", None, **control)
    holed = losses_of(world, tmp_path / "d", {"inpaint": 1.0})
    assert len({tuple(run) for run in (losses, plain, controlled, holed)}) == 4
    previews = [tmp_path / "whole" / "samples" / f"000000004-{index:02d}.png" for index in (0, 1)]
    assert previews[0].read_bytes() != previews[1].read_bytes()
    text = previews[1].read_bytes()
    assert b"detour:control" in text and str(world).encode() not in text
