"""Grids: those of the schedulers, and what is refused because a scheduler has no such grid."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detour import UserError
from detour.train.fewsteps import FewSteps
from minis import Mini

CPU = torch.device("cpu")


def sampler(mini: Mini, steps: int, times: list[float] | None = None, error: str = "") -> FewSteps:
    """The miniature's sampler, or one whose scheduler gives these times, or says no."""
    if times is None and not error:
        return FewSteps(mini.arch, mini.scheduler, steps)

    def set_timesteps(scheduler: Any, *_: Any) -> None:
        if error:
            raise ValueError(error)
        scheduler.timesteps = torch.tensor(times) * 1000

    return FewSteps(SimpleNamespace(set_timesteps=set_timesteps), SimpleNamespace(), steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 4, 8, 1000])
def test_the_models_scheduler_has_grids_of_any_length(mini: Mini, steps: int) -> None:
    few = sampler(mini, steps)
    few.check((8, 8), CPU)
    grid = few.grid((8, 8), CPU)
    assert len(grid) == steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0
    assert grid == sorted(grid, reverse=True)


def test_a_grid_whose_times_coincide_is_refused(mini: Mini) -> None:
    with pytest.raises(UserError, match=r"preserve.steps: 4: the grid .* has only 3 different times"):
        sampler(mini, 4, [0.999, 0.5, 0.5, 0.1]).check((8, 8), CPU)
    sampler(mini, 4, [0.999, 0.7, 0.7, 0.5, 0.0]).check((8, 8), CPU)  # as PNDM, whose second time comes twice


def test_what_the_scheduler_says_is_passed_on(mini: Mini) -> None:
    with pytest.raises(UserError, match=r"preserve.steps: 60: .* has no such grid \(at most 50 steps"):
        sampler(mini, 60, error="at most 50 steps").check((8, 8), CPU)


def test_places_below_a_time() -> None:
    grid = [1.0, 0.9, 0.75, 0.5, 0.0]
    assert FewSteps.below(grid, 1.0) == [0, 1, 2, 3]
    assert FewSteps.below(grid, 0.75) == [2, 3]
    assert FewSteps.below([1.0, 0.75 + 1e-8, 0.0], 0.75) == [1]
    assert FewSteps.below(grid, 0.4) == []
