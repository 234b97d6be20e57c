"""The section `preserve` of a job file: how a distilled model keeps its few steps. See `job.py`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from detour.config.section import Section

Strategy = Literal[
    "none", "training_adapter", "de_turbo", "anchor", "prior_anchor", "self_distill", "delta", "grid_sft", "pso",
    "contrastive", "redistill", "distill_patch",
]  # fmt: skip


class TermConfig(Section):
    """One term of the loss: the trained model's prediction is drawn towards a target at chosen states."""

    states: Literal["data", "grid", "rollout"] = "data"
    """`data`: noised pictures at times drawn by `train.timestep_type`. `grid`: noised pictures at the times that the
    sampler visits. `rollout`: states that the model itself reaches in `steps` steps from noise; no picture is used."""
    target: Literal["data", "frozen", "average", "contrast", "path", "delta", "bounded", "preference"] = "data"
    """`data`: the pictures. `frozen`: the model without what was trained. `average`: the model with the moving average
    of what was trained (needs `train.ema_config`). `contrast`: the picture, pushed away from what the model predicts
    without a caption by `gain`. `path`: where `path_steps` small steps of the model as it was when the run began lead
    (with `model.assistant_lora_path`, of the model with the training adapter). `delta`: the untouched model's, plus
    `gain` times what a LoRA changes in the undistilled base (`preserve.delta`). `bounded`: the picture, as far as
    `radius` lets the clean picture move from the untouched model's (research: little is known of it). `preference`: no
    target but a choice, the picture rather than what the untouched model draws for its caption (see `beta`)."""
    told: Literal["caption", "neutral"] = "caption"
    """What the trained model is told: the picture's caption, or one of `prompts`."""
    teacher_told: Literal["same", "rich", "picture"] = "same"
    """What the target's model is told: the same, the picture's long caption (`datasets.rich_caption_ext`), or the
    picture itself before the caption, which few models can read (none of the published ones here)."""
    weighting: Literal["velocity", "clean", "step"] = "velocity"
    """What is compared: predictions, the clean pictures that they point to (error times t), or where the sampler's next
    step ends."""
    scale: float = Field(default=1.0, gt=0)
    """The term is multiplied by it."""
    every: int = Field(default=1, ge=1)
    """The term counts in every so many steps."""
    which: Literal["one", "all"] = "one"
    """Of a rollout: one state, drawn at random, or every state."""
    below: float = Field(default=1.0, gt=0, le=1)
    """Of a rollout: no state at a time above it (near 0 detail is decided, near 1 composition)."""
    gain: float = Field(default=3.0, ge=0)
    """Of `contrast` and `delta`."""
    path_steps: int = Field(default=4, ge=2)
    """Of `path`: small steps for each step of the sampler."""
    radius: float = Field(default=0.1, gt=0)
    """Of `bounded`: how far the clean picture may move from the untouched model's, relative to its norm."""
    beta: float = Field(default=50.0, gt=0)
    """Of `preference`: how soon a picture counts as chosen. The loss is -log sigmoid(-beta m), m how much more the
    errors have fallen on the picture than on what the untouched model draws; the gradient halves where m is about
    -1 / beta."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.told == "neutral" and self.target == "bounded":
            raise ValueError("target: bounded needs told: caption, since it leads to the caption's picture")
        if self.teacher_told != "same" and (self.told == "neutral" or self.target not in ("frozen", "average")):
            raise ValueError(f"teacher_told: {self.teacher_told} is for told: caption and target: frozen or average")
        if self.weighting == "step" and self.states == "data":
            raise ValueError("weighting: step needs states on the sampler's grid (grid, rollout)")
        return self

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        if self.states == "rollout":
            if self.target in ("data", "contrast", "preference"):
                raise ValueError(f"target: {self.target} needs noised pictures; states: rollout has none (data, grid)")
            return self
        if self.told == "neutral":
            raise ValueError("told: neutral needs states: rollout, since a picture's own caption belongs to its states")
        if self.target == "path":
            raise ValueError("target: path needs states: rollout, whose next time is known")
        if self.which == "all":
            raise ValueError("which: all needs states: rollout")
        if self.below < 1:
            raise ValueError("below needs states: rollout")
        return self


class DeltaConfig(Section):
    """What `delta` transfers: a LoRA, and the undistilled base that it was trained on."""

    model: str
    """The base: folder, single `.safetensors` file or hub id. Its denoiser has the layers of the trained one, and the
    same latents and text encoder. It stays in memory beside it, held like it (`model.dtype`, `model.quantize`): the one
    teacher that is a second set of weights."""
    lora: str
    """A LoRA trained on that base: local file or `user/repo/file.safetensors`, with `:strength` after it if need be."""
    gain: float | None = Field(default=None, ge=0)
    """What its change is multiplied by. Default: 3, as in OneTrainer's pull request 1353. More for a stronger concept,
    less where it becomes a caricature. Composed terms have a `gain` of their own."""


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
    """`none` trains plainly. `training_adapter` trains around the distillation (`model.assistant_lora_path`).
    `de_turbo` trains an undistilled model and draws with the distilled one (`deploy_on`). `anchor` holds predictions on
    noised pictures to the untouched model's; `prior_anchor` does so on the model's own few-step states, told `prompts`.
    `self_distill` learns from the untouched model that is told more (`teacher_told`), on the model's own states.
    `delta` adds what a LoRA changes in the undistilled base. `grid_sft` trains at the sampler's times alone, with an
    anchor. `pso` prefers the pictures to what the untouched model draws. `contrastive` pushes away from what the model
    draws without a caption. `redistill` is a phase after plain training: few steps are taught to end where many small
    ones do. `distill_patch` trains plainly and draws with a second LoRA that restores the few steps (`distill_patch`).
    Default: `training_adapter` where one is given, else `none`."""
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
    subjects, without those that hold it."""
    teacher: Literal["frozen", "average"] | None = None
    """Who teaches in `self_distill`: the untouched model, or the moving average of what was trained (needs
    `train.ema_config`). Default: `frozen`."""
    teacher_told: Literal["rich", "picture"] | None = None
    """What the teacher of `self_distill` is told besides the caption: `rich`, a long caption
    (`datasets.rich_caption_ext`), or `picture`, the picture itself, where the model's encoder reads pictures. Default:
    `rich`."""
    gate: Literal["refuse", "warn", "off"] = "warn"
    """Before a run with a teacher that is told more: draw with it (4 pictures, 2 seeds each), and warn or refuse unless
    that brings the drawings closer to the training pictures, without a shift of colour or frame. What was drawn is kept
    in `samples/teacher-gate.png`. No training comes closer than its teacher does."""
    delta: DeltaConfig | None = None
    """What `strategy: delta`, and terms with `target: delta`, transfer."""
    distill_patch: str | None = None
    """A LoRA that restores the few steps, local file or `user/repo/file.safetensors`, with `:strength` after it if need
    be. It is on the model only while previews and drift are drawn; what is trained does not hold it, so that it must be
    given to whatever draws later (`detour sample --lora TRAINED --lora PATCH`). With plain training only."""
    deploy_on: str | None = None
    """The model that the LoRA will be used with, where another one is trained: folder, single file or hub id of a
    distilled variant. Previews and drift are drawn with it, and `sample`'s defaults are its own. Its denoiser is loaded
    beside the trained one and kept in main memory except while it draws, when there must be room for both; text encoder
    and VAE are the trained model's, so the two must share them. With plain training only."""
    drift: DriftConfig = DriftConfig()
    """The drift meter."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.strategy is not None and self.terms:
            raise ValueError("preserve.strategy and preserve.terms exclude each other; keep one")
        terms = strategy_terms(self)
        if all(term.every > 1 for term in terms):
            raise ValueError("preserve: no term counts in every step; set every: 1 for one of them")
        for option, value in (("teacher", self.teacher), ("teacher_told", self.teacher_told)):
            if value is not None and self.strategy != "self_distill":
                raise ValueError(f"preserve.{option} is for strategy: self_distill; composed terms say it themselves")
        return self

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if self.strategy == "distill_patch" and self.distill_patch is None:
            raise ValueError("preserve.strategy: distill_patch needs preserve.distill_patch, the LoRA to draw with")
        if self.strategy == "de_turbo" and self.deploy_on is None:
            raise ValueError("preserve.strategy: de_turbo needs preserve.deploy_on, the distilled model to draw with")
        for option, path in (("distill_patch", self.distill_patch), ("deploy_on", self.deploy_on)):
            if path is not None and strategy_terms(self) != [PLAIN]:
                raise ValueError(
                    f"preserve.{option} goes with plain training alone: other terms are about the model that is "
                    f"trained, drawn with as it is"
                )
        return self

    @model_validator(mode="after")
    def _check_delta(self) -> Self:
        transfers = any(term.target == "delta" for term in strategy_terms(self))
        if transfers and self.delta is None:
            raise ValueError("preserve: target: delta needs preserve.delta, a base model and a LoRA trained on it")
        if self.delta is not None and not transfers:
            raise ValueError("preserve.delta has no effect: no term has target: delta (strategy: delta has one)")
        if self.delta is not None and self.delta.gain is not None and self.terms:
            raise ValueError("preserve.delta.gain has no effect on composed terms; set the gain of each term")
        return self


PLAIN = TermConfig()
_ROLLOUT = TermConfig(states="rollout", target="frozen")

STRATEGIES: dict[Strategy, tuple[list[TermConfig], list[TermConfig]]] = {
    "none": ([PLAIN], []),
    "training_adapter": ([PLAIN], []),
    "de_turbo": ([PLAIN], []),
    "anchor": ([PLAIN], [TermConfig(target="frozen")]),
    "prior_anchor": ([PLAIN], [_ROLLOUT.model_copy(update={"told": "neutral", "scale": 0.25})]),
    "self_distill": ([], [_ROLLOUT.model_copy(update={"teacher_told": "rich", "weighting": "clean"})]),
    "delta": ([], [TermConfig(target="delta")]),
    "grid_sft": ([TermConfig(states="grid")], [TermConfig(states="grid", target="frozen")]),
    "pso": ([], [TermConfig(states="grid", target="preference")]),
    "contrastive": ([], [TermConfig(target="contrast")]),
    "redistill": ([], [TermConfig(states="rollout", target="path", told="neutral", weighting="clean")]),
    "distill_patch": ([PLAIN], []),
}
"""What each teaches, and what it adds to keep the few steps."""


def strategy_terms(config: PreserveConfig) -> list[TermConfig]:
    """The terms of a strategy, or those that the job composes."""
    if config.terms:
        return list(config.terms)
    teaching, keeping = STRATEGIES[config.strategy or "none"]
    chosen = {
        "scale": config.weight,
        "target": config.teacher,
        "teacher_told": config.teacher_told,
        "gain": config.delta and config.delta.gain,
    }
    changes = {"every": config.every} | {name: value for name, value in chosen.items() if value is not None}
    return teaching + [term.model_copy(update=changes) for term in keeping]
