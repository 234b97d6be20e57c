"""The sections `sample`, `save`, `validation` and `logging` of a job file: what comes out. See `job.py`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from detour.config.data import DatasetConfig
from detour.config.section import DType, Section


def _as_prompt(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


class PromptConfig(Section):
    """A preview. Unset values come from `sample`."""

    prompt: str
    """What to draw. `[trigger]` stands for the trigger word."""
    neg: str | None = None
    """What to steer away from; has an effect with guidance above 1."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the noise."""
    width: int | None = Field(default=None, ge=32)
    """Width of the picture."""
    height: int | None = Field(default=None, ge=32)
    """Height of the picture."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """1 means no guidance."""
    num_frames: int | None = Field(default=None, ge=1)
    """Frames of the clip."""
    sample_steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    network_multiplier: float | None = None
    """Strength of the LoRA in this preview."""
    control: Path | None = None
    """Models that take a control picture (Flex.2): the picture to follow, scaled and cut to the preview's size."""
    inpaint: Path | None = None
    """Models that fill holes (Flex.2): a picture whose transparent parts are to be filled."""


class SampleConfig(Section):
    """Previews: drawn as the finished LoRA will be used, without the training adapter."""

    sampler: Literal["flowmatch", "ddpm"] | None = None
    """Must fit the architecture. Default: the model's own scheduler."""
    sample_steps: int | None = Field(default=None, ge=1)
    """Denoising steps. Default: the variant's (8 for Z-Image Turbo)."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """Classifier-free guidance; 1 means none. Default: the variant's (1 for a turbo model)."""
    width: int = Field(default=1024, ge=32)
    """Width of the pictures."""
    height: int = Field(default=1024, ge=32)
    """Height of the pictures."""
    num_frames: int = Field(default=1, ge=1)
    """Models of video: frames of each clip, 4 k + 1 for Wan, saved as an animated PNG; 1 draws pictures."""
    fps: float | None = Field(default=None, gt=0, le=1000)
    """Frames a second at which clips are played. Default: the architecture's (16 for Wan)."""
    prompts: list[Annotated[PromptConfig, BeforeValidator(_as_prompt, json_schema_input_type=str | PromptConfig)]] = []
    """What to draw. Without any, the first captions of the dataset are used (up to 4)."""
    neg: str = ""
    """Negative prompt of all previews."""
    seed: int = Field(default=42, ge=0)
    """Seed of the noise."""
    walk_seed: bool = False
    """Add the prompt's place in the list to the seed; otherwise all share one."""
    sample_every: int | None = Field(default=None, ge=1)
    """Draw after every so many steps."""
    sample_every_n_epochs: int | None = Field(default=None, ge=1)
    """Draw after every so many epochs."""
    skip_first_sample: bool = False
    """Do not draw before the first step."""
    disable_sampling: bool = False
    """Draw nothing at all."""


class SaveConfig(Section):
    """Checkpoints (exact state) and LoRA files."""

    save_every: int | None = Field(default=None, ge=1)
    """Save after every so many steps. The end always saves. Default: 250 where no `save_every_n_epochs` is given."""
    max_step_saves_to_keep: int = Field(default=4, ge=1)
    """Older checkpoints and LoRA files are removed once a newer one has been read back."""
    dtype: DType = "bf16"
    """Type of the weights in LoRA files. Checkpoints always hold float32."""
    formats: list[Literal["comfy", "diffusers", "kohya"]] = ["comfy"]
    """LoRA formats written at the end; the first is also written at every save. Files other than the first get the
    format's name as a suffix."""
    include_captions: bool = False
    """Write tag statistics and the trigger word's captions into the LoRA's metadata. Off: nothing private leaves."""


class ValidationConfig(Section):
    """Loss on pictures that are not trained on, always at the same noise and times: comparable between steps and
    runs."""

    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations. Nothing is validated without it."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training pictures set aside, chosen by their content."""
    dataset: DatasetConfig | None = None
    """A dataset of its own instead of `holdout`."""
    times: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [0.25, 0.5, 0.75, 1.0]
    """Times at which the loss is taken."""
    max_images: int = Field(default=32, ge=1)
    """At most so many pictures."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validate_every is not None and not self.holdout and self.dataset is None:
            raise ValueError(
                "validation.validate_every needs pictures: give validation.holdout (say 0.1) or validation.dataset"
            )
        if self.holdout and self.dataset is not None:
            raise ValueError("validation.holdout and validation.dataset exclude each other; keep one")
        return self


class LoggingConfig(Section):
    """Where figures go besides the terminal and `events.jsonl`."""

    log_every: int = Field(default=1, ge=1)
    """Steps between two lines."""
    tensorboard: bool = False
    """Write TensorBoard files into the run's folder."""
    trackio: bool = False
    """Log to trackio."""
    wandb: bool = False
    """Log to Weights & Biases."""
    project_name: str = "detour"
    """Project at trackio or wandb."""
    run_name: str | None = None
    """Run at trackio or wandb. Default: `output_name`."""
