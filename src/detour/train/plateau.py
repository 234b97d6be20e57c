"""When a training adapter is done: the loss on held-out pictures has stopped falling.

The loss is taken at fixed noise and times, so that its figures differ by the weights alone. With a flow model it never
comes near zero (what is random in the pictures stays), so every share is one of the fall, not of the loss. A pure
function of the figures: a resumed run decides as the uninterrupted one would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detour.config.adapter import StopConfig


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the figures say."""

    state: Literal["early", "falling", "unmoved", "flat"]
    """`early`: too few figures yet. `unmoved`: no fall to speak of since the start. `flat`: fallen, and no more."""
    reason: str
    """The same in words."""


def judge(losses: Sequence[float], config: StopConfig) -> Verdict:
    """Judge the figures so far, the first of them from before the first step."""
    window = config.patience
    if len(losses) <= window:
        return Verdict("early", f"{len(losses)} measurements of the held-out loss, {window + 1} are needed")
    first, best = losses[0], min(losses)
    fall, recent = first - best, min(losses[:-window]) - min(losses[-window:])
    figures = f"the held-out loss was {first:.4g} at the start and is {losses[-1]:.4g}"
    if fall < config.least * first:
        return Verdict(
            "unmoved",
            f"{figures}: it has fallen by {max(fall, 0) / first:.2%}, less than adapter.stop.least "
            f"({config.least:.2%}); a higher train.lr is needed, or more steps",
        )
    share = f"the last {window} measurements brought {max(recent, 0) / fall:.1%} of its fall"
    if recent < config.tolerance * fall:
        back = (
            ""
            if losses[-1] <= best + config.tolerance * fall
            else f"; it was {best:.4g} and rises again, so draw more adapter.pictures"
        )
        return Verdict("flat", f"{figures}: {share} (adapter.stop.tolerance: {config.tolerance:.1%}){back}")
    return Verdict("falling", f"{figures}: {share}, so it is still falling")
