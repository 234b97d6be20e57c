"""The section `adapter` of a job file: how a training adapter is made. See `job.py`."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from detour.config.section import Section
from detour.config.values import Fraction, Side


class SizeConfig(Section):
    """The size of a picture. A number alone stands for a square."""

    width: Side
    """Width."""
    height: Side
    """Height."""


def _as_size(value: object) -> object:
    square = isinstance(value, int) and not isinstance(value, bool)
    return {"width": value, "height": value} if square else value


Size = Annotated[SizeConfig, BeforeValidator(_as_size, json_schema_input_type=Side | SizeConfig)]


class StopConfig(Section):
    """When the adapter is done: when the loss on pictures that were held out, at the same noise and times each time,
    has stopped falling. It has when the last `patience` measurements together brought less than `tolerance` of the
    whole fall since the start. `train.steps` is the limit."""

    held_out: int = Field(default=32, ge=1)
    """Pictures that are drawn like the others and never trained on."""
    every: int = Field(default=250, ge=1)
    """Steps between two measurements."""
    times: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [0.25, 0.5, 0.75, 1.0]
    """Times at which the loss is taken."""
    patience: int = Field(default=4, ge=1)
    """Measurements that are looked back on."""
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """Share of the whole fall that they must have brought; with less the loss counts as flat."""
    least: float = Field(default=0.005, gt=0, lt=1)
    """A loss that has fallen by less than this share of what it was has not moved: that is no plateau, but a learning
    rate that is too low. It is warned of, and the run goes on."""
    sharpness: float | None = Field(default=None, gt=0)
    """Go on from a plateau until few-step pictures have lost so much of their sharpness: it must be below this share
    of the distilled model's (0.8, say). Without it that is only measured, at the start and at the end."""


class AdapterConfig(Section):
    """What the distilled model is asked to draw, and when the adapter that learns from it is done."""

    prompts: list[str] = []
    """What is drawn; every prompt in turn, each time with another seed. Default: everyday subjects that are put
    together from lists, 14637 of them."""
    prompts_file: Path | None = None
    """A text file with one prompt a line, instead of `prompts`."""
    pictures: int = Field(default=1000, ge=2)
    """Pictures that are drawn, `stop.held_out` among them."""
    sizes: list[Size] = []
    """Sizes of the pictures, in turn. Default: `sample.width` x `sample.height`."""
    num_frames: int = Field(default=1, ge=1)
    """Models of video: frames of each clip."""
    sample_steps: int | None = Field(default=None, ge=1)
    """Steps that a picture is drawn in. Default: those that the model is distilled for."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first picture's noise; the next has the next. `detour sample` draws the same picture from it."""
    caption_dropout_rate: Fraction = 0.05
    """Share of draws that train without a caption, as LoRAs later may."""
    long_steps: int = Field(default=32, ge=2)
    """Of many-step pictures, which are compared with few-step ones at the start and at the end: with a good adapter the
    few steps are lost, and many get there."""
    stop: StopConfig = StopConfig()
    """When it is done."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompts and self.prompts_file is not None:
            raise ValueError("adapter.prompts and adapter.prompts_file exclude each other; keep one")
        if any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("adapter.prompts: one of them is empty; take it out")
        if self.stop.held_out >= self.pictures:
            raise ValueError(
                f"adapter.pictures ({self.pictures}) must be more than adapter.stop.held_out ({self.stop.held_out}), "
                f"or nothing is left to train on"
            )
        return self
