"""Strategies by name through the engine, resuming with them, and what is refused before anything expensive."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from detour import UserError
from detour.checking import check_job
from detour.config.document import JobError
from detour.config.load import load_job
from detour.config.preserve import STRATEGIES, strategy_terms
from detour.nano import zimage
from detour.train import checks
from miniature import World, job, job_file, run, write_world

NEUTRAL = ["a red circle on a blue background", "a blue square", "a green triangle at the top"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = write_world(tmp_path_factory.mktemp("world"))
    for caption in world.data.glob("*.txt"):
        caption.with_suffix(".long.txt").write_text(caption.read_text().strip() + " with a plain background, a drawing")
    zimage.write(world.root / "base", seed=1)
    zimage.write_adapter(world.root / "lora.safetensors", world.root / "base", seed=2)
    return world


def options(strategy: str, **preserve: Any) -> dict[str, Any]:
    return {
        "train": {"steps": 4, "lr": 1e-3},
        "sample": {"sample_steps": 4},
        "save": {"save_every": 2},
        "dataset": {"rich_caption_ext": "long.txt"},
        "preserve": {"strategy": strategy, "prompts": NEUTRAL, "gate": "off"} | preserve,
    }


def sections(world: World, strategy: str) -> dict[str, Any]:
    """A job of a strategy with all that it needs. Only the training adapter's has one."""
    lora = str(world.root / "lora.safetensors")
    preserve: dict[str, Any] = {
        "delta": {"delta": {"model": str(world.root / "base"), "lora": lora}},
        "de_turbo": {"deploy_on": str(world.model)},
        "distill_patch": {"distill_patch": f"{lora}:0.5"},
    }.get(strategy, {})
    found = options(strategy, **preserve)
    if strategy != "training_adapter":
        found["model"] = {"assistant_lora_path": None}
    if strategy == "de_turbo":
        found["model"] |= {"arch": "zimage:base", "name_or_path": str(world.root / "base")}
    return found


@contextmanager
def denoising() -> Iterator[dict[str, int]]:
    """How often any denoiser runs on one picture, with and without a gradient."""
    counts = {"with": 0, "without": 0}

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ == "ZImageTransformer2DModel":
            counts["with" if torch.is_grad_enabled() else "without"] += len(args[0])

    handle = register_module_forward_pre_hook(count)
    yield counts
    handle.remove()


# A plain step is worth three forward passes: its own, and a backward pass of twice that. Of rollouts of 4 steps one
# state counts, the mean of whose places is 1.5.
COSTS = {
    "none": 1, "training_adapter": 1, "de_turbo": 1, "distill_patch": 1,
    "anchor": 4 / 3, "grid_sft": 4 / 3, "contrastive": 4 / 3,  # one forward more
    "self_distill": 5.5 / 3, "prior_anchor": 1 + 5.5 / 3, "redistill": 8.5 / 3,
    "delta": 2, "pso": 8 / 3,
}  # fmt: skip


# The others' terms have fast tests in test_preserve.py; here they run whole, three times.
QUICK = {"prior_anchor", "self_distill", "delta", "pso", "de_turbo"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in STRATEGIES]
)
def test_a_strategy_trains_at_its_price_and_goes_on_bit_for_bit(world: World, tmp_path: Path, strategy: str) -> None:
    mine = job(world, tmp_path, **sections(world, strategy))
    with denoising() as counts:
        whole = run(mine)
    drawn = 4 * 4 if strategy == "pso" else 0  # four pictures of the untouched model, in four steps each
    cost = (3 * counts["with"] + counts["without"] - drawn) / (3 * 4)
    assert cost == pytest.approx(COSTS[strategy], rel=0.2), counts
    state = whole.state
    losses = [event.loss for event in whole.seen.of("step")]
    assert all(loss > 0 for loss in losses[1:])  # redistill and self_distill begin at almost nothing
    plain = all((term.states, term.every) == ("data", 1) for term in strategy_terms(mine.config.process[0].preserve))
    for event in whole.seen.of("step"):  # a sum over terms at several times belongs to none of them
        assert (event.picture_losses is not None) == plain
        if plain:
            assert event.loss == sum(loss for _, loss in event.picture_losses) / len(event.picture_losses)
            assert all(0 < t <= 1 for t, _ in event.picture_losses)
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


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_the_training_adapter_is_a_strategy_in_both_modes(world: World, tmp_path: Path, mode: str) -> None:
    mine = options("training_adapter") | {"model": {"assistant_lora_mode": mode}}
    named, plain = run(job(world, tmp_path / "a", **mine)), run(job(world, tmp_path / "b", **mine | {"preserve": {}}))
    assert named.state == plain.state, "it is what an adapter alone does"
    assert named.result.finished


@pytest.mark.parametrize("where", ["prompts", "drift"])
def test_prompts_that_hold_the_trigger_are_refused(world: World, tmp_path: Path, where: str) -> None:
    wrong = ["a red circle", "a Zig on a beach"]
    preserve = {"prompts": wrong} if where == "prompts" else {"drift": {"measure": True, "prompts": wrong}}
    mine = options("prior_anchor", **preserve)
    mine["dataset"] = {"trigger_word": "zig"}
    option = "preserve.prompts" if where == "prompts" else "preserve.drift.prompts"
    with pytest.raises(UserError, match=f"{option}: 'a Zig on a beach' holds the trigger word 'zig'"):
        run(job(world, tmp_path, **mine))


def laid_over(mine: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return mine | {section: mine.get(section, {}) | values for section, values in changes.items()}


@pytest.mark.parametrize(
    ("strategy", "changes", "said"),
    [
        ("prior_anchor", {"sample": {"guidance_scale": 3.0}}, "rollouts draw without guidance.*guidance_scale is 3"),
        ("pso", {"sample": {"guidance_scale": 3.0}}, "rollouts draw without guidance"),
        ("prior_anchor", {"preserve": {"steps": 1001}}, "preserve.steps: 1001; the sampler's grid has at most 1000"),
        ("prior_anchor", {"train": {"timestep_type": "next_sample"}}, "next_sample rehearses sampling by itself"),
        ("de_turbo", {"model": {"arch": "zimage:turbo"}}, "this one is distilled; set model.arch: zimage:base or"),
        ("de_turbo", {"preserve": {"deploy_on": "ostris/Z-Image-De-Turbo"}}, "Z-Image deturbo, which is not distilled"),
        ("de_turbo", {"preserve": {"deploy_on": "/no/such"}}, "preserve.deploy_on: model /no/such: no such folder"),
        ("delta", {"preserve": {"delta": {"model": "/no", "lora": "/no"}}}, "preserve.delta.model: model /no: no such"),
        ("distill_patch", {"preserve": {"distill_patch": "/no"}}, "preserve.distill_patch /no: no such file"),
        ("self_distill", {"preserve": {"teacher_told": "picture"}}, "the teacher needs a context: rich captions"),
        (
            "prior_anchor",
            {"preserve": {"prompts": []}, "dataset": {"trigger_word": "a"}},
            "in every one of the default",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    world: World, tmp_path: Path, strategy: str, changes: dict[str, Any], said: str
) -> None:
    mine = laid_over(sections(world, strategy), changes)
    with denoising() as counts, pytest.raises(UserError, match=said):
        run(job(world, tmp_path, **mine))
    assert not any(counts.values()) and not (tmp_path / "zig").exists(), "before a folder is touched"


def test_a_base_of_another_build_and_a_lora_of_another_kind_are_refused(world: World, tmp_path: Path) -> None:
    config = world.root / "other" / "transformer" / "config.json"
    if not config.exists():
        shutil.copytree(world.model, world.root / "other")
        config.write_text(config.read_text().replace('"n_layers": 3', '"n_layers": 2'))
    mine = sections(world, "delta")
    mine["preserve"]["delta"] |= {"model": str(world.root / "other")}
    with pytest.raises(UserError, match=r"preserve.delta.model: .* is built otherwise .* such as layers.2"):
        run(job(world, tmp_path, **mine))
    tensors = load_file(world.root / "lora.safetensors")
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_B.weight")}
    tensors |= {name.replace("lora_B.weight", "lora_magnitude_vector"): b.norm(dim=1) for name, b in norms.items()}
    save_file(tensors, world.root / "dora.safetensors")
    mine = sections(world, "distill_patch")
    mine["preserve"]["distill_patch"] = str(world.root / "dora.safetensors")
    with pytest.raises(UserError, match=r"preserve.distill_patch: .* is a dora; only a plain LoRA"):
        run(job(world, tmp_path, **mine))


def test_a_grid_without_the_states_that_are_asked_for_is_refused(world: World, tmp_path: Path) -> None:
    terms = [{}, {"states": "rollout", "target": "bounded", "below": 0.3}]
    mine = options("none") | {"preserve": {"terms": terms, "gate": "off"}}
    with pytest.raises(UserError, match=r"below: 0.3; the grid of 4 steps ends at 0.5, so that no state is left"):
        run(job(world, tmp_path, **mine))


def test_default_prompts_that_hold_the_trigger_are_left_out(world: World, tmp_path: Path) -> None:
    mine = job(world, tmp_path, **options("prior_anchor", prompts=[]) | {"dataset": {"trigger_word": "dog"}})
    prompts = checks.neutral_prompts(mine.config.process[0])
    assert len(prompts) == len(checks.NEUTRAL) - 1 and not any("dog" in prompt for prompt in prompts)


def test_detour_check_says_it_too(world: World, tmp_path: Path) -> None:
    """Without a model: what is refused, and which captions are missing."""
    mine = options("self_distill") | {"dataset": {}, "sample": {"guidance_scale": 3.0, "sample_steps": 4}}
    report = check_job(load_job(job_file(world, tmp_path, **mine)))
    said = "\n".join(report["errors"])
    assert "rollouts draw without guidance" in said and "have none: " in said
    mine = options("self_distill", teacher_told="picture")
    report = check_job(load_job(job_file(world, tmp_path, **mine)))
    assert "a model whose encoder reads pictures, which that of" in "\n".join(report["errors"])


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"network": {"type": "full"}, "preserve": {"strategy": "anchor"}}, "network.type: full changes the weights"),
        ({"network": {"type": "full"}, "preserve": {"deploy_on": "x"}}, "network.type: full changes the weights"),
        ({"preserve": {"terms": [{}, {"target": "average"}]}}, "needs train.ema_config.use_ema: true"),
        ({"preserve": {"strategy": "self_distill", "teacher": "average"}}, "needs train.ema_config.use_ema: true"),
        ({"preserve": {"strategy": "anchor", "teacher": "average"}}, "preserve.teacher is for strategy: self_distill"),
        ({"preserve": {"strategy": "redistill", "every": 2}}, "no term counts in every step"),
        ({"preserve": {"drift": {"stop": True}}}, "preserve.drift.stop needs preserve.drift.alarm"),
        ({"preserve": {"strategy": "delta"}}, "target: delta needs preserve.delta"),
        ({"preserve": {"delta": {"model": "a", "lora": "b"}}}, "preserve.delta has no effect"),
        ({"preserve": {"strategy": "distill_patch"}}, "needs preserve.distill_patch, the LoRA to draw with"),
        ({"preserve": {"strategy": "de_turbo"}}, "needs preserve.deploy_on, the distilled model to draw with"),
        ({"preserve": {"strategy": "anchor", "distill_patch": "a"}}, "distill_patch goes with plain training alone"),
        ({"preserve": {"strategy": "pso", "deploy_on": "a"}}, "deploy_on goes with plain training alone"),
        (
            {"preserve": {"terms": [{"target": "delta"}], "delta": {"model": "a", "lora": "b", "gain": 2.0}}},
            "preserve.delta.gain has no effect on composed terms",
        ),
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
