"""Strategies by name through the engine, resuming with them, and what is refused before anything expensive."""

from pathlib import Path
from typing import Any

import pytest

from detour import UserError
from detour.config.document import JobError
from detour.config.preserve import STRATEGIES
from miniature import World, job, run, write_world

NEUTRAL = ["a red circle on a blue background", "a blue square", "a green triangle at the top"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = write_world(tmp_path_factory.mktemp("world"))
    for caption in world.data.glob("*.txt"):
        caption.with_suffix(".long.txt").write_text(caption.read_text().strip() + " with a plain background, a drawing")
    return world


def options(strategy: str, **preserve: Any) -> dict[str, Any]:
    return {
        "train": {"steps": 4, "lr": 1e-3},
        "sample": {"sample_steps": 4},
        "save": {"save_every": 2},
        "dataset": {"rich_caption_ext": "long.txt"},
        "preserve": {"strategy": strategy, "prompts": NEUTRAL} | preserve,
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_and_goes_on_bit_for_bit(world: World, tmp_path: Path, strategy: str) -> None:
    mine = job(world, tmp_path, **options(strategy))
    whole = run(mine)
    state = whole.state
    losses = [event.loss for event in whole.seen.of("step")]
    assert all(loss > 0 for loss in losses[1:])  # redistill and self_distill begin at almost nothing
    whole.result.folder.rename(tmp_path / "whole")
    run(mine, stop_at=2)
    again = run(mine)
    assert again.state == state
    assert [event.loss for event in again.seen.of("step")] == losses[2:]
    assert not [warning for warning in again.seen.warnings if "changed" in warning]


def test_long_captions_that_are_missing_are_all_named(world: World, tmp_path: Path) -> None:
    missing = options("self_distill") | {"dataset": {"rich_caption_ext": "essay.txt"}}
    with pytest.raises(UserError, match=r"have none: .*png, .*png.*datasets.rich_caption_ext"):
        run(job(world, tmp_path, **missing))
    unnamed = options("self_distill") | {"dataset": {}}
    with pytest.raises(UserError, match="take a strategy whose teacher needs none"):
        run(job(world, tmp_path, **unnamed))
    assert not (tmp_path / "zig" / "checkpoints").exists()


@pytest.mark.parametrize("where", ["prompts", "drift"])
def test_prompts_that_hold_the_trigger_are_refused(world: World, tmp_path: Path, where: str) -> None:
    wrong = ["a red circle", "a Zig on a beach"]
    preserve = {"prompts": wrong} if where == "prompts" else {"drift": {"measure": True, "prompts": wrong}}
    mine = options("prior_anchor", **preserve)
    mine["dataset"] = {"trigger_word": "zig"}
    option = "preserve.prompts" if where == "prompts" else "preserve.drift.prompts"
    with pytest.raises(UserError, match=f"{option}: 'a Zig on a beach' holds the trigger word 'zig'"):
        run(job(world, tmp_path, **mine))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sample": {"guidance_scale": 3.0}}, "rollouts draw without guidance.*guidance_scale is 3"),
        ({"preserve": {"steps": 1001}}, "preserve.steps: 1001; the sampler's grid has at most 1000 times"),
        ({"train": {"timestep_type": "next_sample"}}, "next_sample rehearses sampling by itself"),
    ],
)
def test_what_cannot_work_is_refused(world: World, tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    mine = options("prior_anchor")
    for section, values in sections.items():
        mine[section] = mine[section] | values
    with pytest.raises(UserError, match=said):
        run(job(world, tmp_path, **mine))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"network": {"type": "full"}, "preserve": {"strategy": "anchor"}}, "network.type: full changes the weights"),
        ({"preserve": {"terms": [{}, {"target": "average"}]}}, "needs train.ema_config.use_ema: true"),
        ({"preserve": {"strategy": "redistill", "every": 2}}, "no term counts in every step"),
        ({"preserve": {"drift": {"stop": True}}}, "preserve.drift.stop needs preserve.drift.alarm"),
        (
            {"model": {"assistant_lora_path": None}, "preserve": {"strategy": "training_adapter"}},
            "training_adapter needs model.assistant_lora_path",
        ),
    ],
)
def test_job_files_that_contradict_themselves(
    world: World, tmp_path: Path, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(JobError, match=said):
        job(world, tmp_path, **sections)


def test_settings_that_are_seldom_meant_are_said(world: World, tmp_path: Path) -> None:
    ordinary = options("prior_anchor", steps=3)
    ordinary["model"] = {"arch": "zimage:base", "assistant_lora_path": None}
    ordinary["sample"] = {"sample_steps": 4, "guidance_scale": 1.0}
    warnings = run(job(world, tmp_path, **ordinary)).seen.warnings
    assert any("this model is not distilled; there are no few steps to keep" in warning for warning in warnings)
    assert any("preserve.steps: 3 does not divide sample.sample_steps: 4" in warning for warning in warnings)
