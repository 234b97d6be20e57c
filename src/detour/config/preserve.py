"""The section `preserve` of a job file: how a distilled model keeps its few steps. See `job.py`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from detour.config.section import Section

Strategy = Literal[
    "none", "training_adapter", "anchor", "prior_anchor", "self_distill", "grid_sft", "contrastive", "redistill",
]  # fmt: skip


class TermConfig(Section):
    """One term of the loss: the trained model's prediction is drawn towards a target at chosen states."""

    states: Literal["data", "grid", "rollout"] = "data"
    """`data`: noised pictures at times drawn by `train.timestep_type`. `grid`: noised pictures at the times that the
    sampler visits. `rollout`: states that the model itself reaches in `steps` steps from noise; no picture is used."""
    target: Literal["data", "frozen", "average", "contrast", "path"] = "data"
    """`data`: the pictures. `frozen`: the model without what was trained. `average`: the model with the moving average
    of what was trained (needs `train.ema_config`). `contrast`: the picture, pushed away from what the model predicts
    without a caption by `gain`. `path`: where `path_steps` small steps of the model as it was when the run began lead
    (with `model.assistant_lora_path`, of the model with the training adapter)."""
    told: Literal["caption", "neutral"] = "caption"
    """What the trained model is told: the picture's caption, or one of `prompts`."""
    teacher_told: Literal["same", "rich"] = "same"
    """What the target's model is told: the same, or the picture's long caption (`datasets.rich_caption_ext`)."""
    weighting: Literal["velocity", "clean", "step"] = "velocity"
    """What is compared: predictions, the clean pictures that they point to (error times t), or where the sampler's next
    step ends."""
    scale: float = Field(default=1.0, gt=0)
    """The term is multiplied by it."""
    every: int = Field(default=1, ge=1)
    """The term counts in every so many steps."""
    which: Literal["one", "all"] = "one"
    """Of a rollout: one state, drawn at random, or every state."""
    gain: float = Field(default=3.0, ge=0)
    """Of `contrast`."""
    path_steps: int = Field(default=4, ge=2)
    """Of `path`: small steps for each step of the sampler."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        drawn = self.states == "rollout"
        if drawn and self.target in ("data", "contrast"):
            raise ValueError(f"target: {self.target} needs noised pictures; states: rollout has none (data, grid)")
        if self.told == "neutral" and not drawn:
            raise ValueError("told: neutral needs states: rollout, since a picture's own caption belongs to its states")
        if self.teacher_told == "rich" and (self.told == "neutral" or self.target not in ("frozen", "average")):
            raise ValueError("teacher_told: rich is for told: caption and target: frozen or average")
        if self.target == "path" and not drawn:
            raise ValueError("target: path needs states: rollout, whose next time is known")
        if self.which == "all" and not drawn:
            raise ValueError("which: all needs states: rollout")
        if self.weighting == "step" and self.states == "data":
            raise ValueError("weighting: step needs states on the sampler's grid (grid, rollout)")
        return self


class DriftConfig(Section):
    """Measures how far the few-step pictures have moved on prompts that nobody trains."""

    measure: bool = False
    """Measure. A distilled model whose few steps must be kept should be watched."""
    every: int | None = Field(default=None, ge=1)
    """Steps between measurements. Default: `sample.sample_every`, else `save.save_every`."""
    prompts: list[str] = Field(default=[], max_length=32)
    """Control prompts, two pictures each; they may not hold the trigger word. Default: the first 2 of
    `preserve.prompts`."""
    seed: int = Field(default=1000, ge=0)
    """Seed of the first control picture; the next has the next."""
    long_steps: int = Field(default=32, ge=2)
    """Many-step pictures of the same weights have so many steps; drawn at the start and at the end."""
    budget: float = Field(default=0.03, gt=0)
    """Share of the training's own work that measuring may cost, in forward passes. Where `every` would cost more, it is
    measured more seldom; the start and the end are in any case."""
    alarm: float | None = Field(default=None, gt=0)
    """Drift (root mean square over latents, relative to the untouched pictures') that is reported as an alarm."""
    stop: bool = False
    """Stop at the alarm; the last checkpoint below it is kept."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stop and self.alarm is None:
            raise ValueError("preserve.drift.stop needs preserve.drift.alarm, the drift to stop at")
        return self


class PreserveConfig(Section):
    """How a distilled model keeps its few steps. docs/turbo.md compares the strategies."""

    strategy: Strategy | None = None
    """`none` trains plainly. `training_adapter` trains around the distillation (`model.assistant_lora_path`). `anchor`
    holds predictions on noised pictures to the untouched model's; `prior_anchor` does so on the model's own few-step
    states, told `prompts`. `self_distill` learns from the untouched model that is told the long caption, on the model's
    own states. `grid_sft` trains at the sampler's times alone, with an anchor. `contrastive` pushes away from what the
    model draws without a caption. `redistill` is a phase after plain training: few steps are taught to end where many
    small ones do. Default: `training_adapter` where one is given, else `none`."""
    terms: list[TermConfig] = []
    """Instead of `strategy`: the terms of the loss, composed."""
    weight: float | None = Field(default=None, gt=0)
    """Multiplies the strategy's preserving term. Default: the strategy's own."""
    every: int = Field(default=1, ge=1)
    """The strategy's preserving term counts in every so many steps."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of rollouts and of the grid. Default: `sample.sample_steps`."""
    prompts: list[str] = []
    """Prompts of rollouts that are `told: neutral`; they may not hold the trigger word. Default: a list of everyday
    subjects."""
    drift: DriftConfig = DriftConfig()
    """The drift meter."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strategy is not None and self.terms:
            raise ValueError("preserve.strategy and preserve.terms exclude each other; keep one")
        if all(term.every > 1 for term in strategy_terms(self)):
            raise ValueError("preserve: no term counts in every step; set every: 1 for one of them")
        return self


PLAIN = TermConfig()
_ROLLOUT = TermConfig(states="rollout", target="frozen")

STRATEGIES: dict[Strategy, tuple[list[TermConfig], list[TermConfig]]] = {
    "none": ([PLAIN], []),
    "training_adapter": ([PLAIN], []),
    "anchor": ([PLAIN], [TermConfig(target="frozen")]),
    "prior_anchor": ([PLAIN], [_ROLLOUT.model_copy(update={"told": "neutral", "scale": 0.25})]),
    "self_distill": ([], [_ROLLOUT.model_copy(update={"teacher_told": "rich", "weighting": "clean"})]),
    "grid_sft": ([TermConfig(states="grid")], [TermConfig(states="grid", target="frozen")]),
    "contrastive": ([], [TermConfig(target="contrast")]),
    "redistill": ([], [TermConfig(states="rollout", target="path", told="neutral", weighting="clean")]),
}
"""What each teaches, and what it adds to keep the few steps."""


def strategy_terms(config: PreserveConfig) -> list[TermConfig]:
    """The terms of a strategy, or those that the job composes."""
    if config.terms:
        return list(config.terms)
    teaching, keeping = STRATEGIES[config.strategy or "none"]
    changes = {"every": config.every} | ({} if config.weight is None else {"scale": config.weight})
    return teaching + [term.model_copy(update=changes) for term in keeping]
