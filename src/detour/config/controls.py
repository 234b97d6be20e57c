"""The section `controls` of a job file: pictures that a model is told of besides the prompt. See `job.py`."""

from typing import Self

from pydantic import model_validator

from detour.config.section import Section
from detour.config.values import Fraction


class ControlsConfig(Section):
    """Models that are told of pictures besides the prompt (Flex.2): how often, and of which. Every draw is a function
    of the seed, the step and the picture's place in it."""

    control_dropout: Fraction = 0.0
    """Share of draws that do not see their control picture (`datasets[].control_path`), so that the LoRA also works
    without."""
    inpaint: Fraction = 0.0
    """Share of draws that are told of the picture itself with a hole in it, drawn anew each time, which fills 20 % to
    80 % of it. The other draws are told of nothing to fill. Without it a LoRA soon unlearns to fill holes."""
    inpaint_invert: Fraction = 0.0
    """Share of these holes that are turned inside out: what is around is missing."""
    inpaint_soften: bool = True
    """Half of the holes get a soft edge."""
    inpaint_vary: bool = True
    """What the model is told to fill is up to 5 % of the picture's side wider or narrower than what is missing, so that
    it learns to hide the edge."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.inpaint_invert and not self.inpaint:
            raise ValueError("controls.inpaint_invert has no effect without holes; set controls.inpaint, say to 0.5")
        return self
