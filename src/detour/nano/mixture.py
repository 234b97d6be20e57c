"""A world of points in the plane whose velocity field is known in closed form, to tell bad states from bad teachers.

Every condition is a Gaussian mixture. For a flow-matching path z_t = (1 - t) z_0 + t eps (docs/design.md §3) the field
that training seeks, v(z, t) = E[eps - z_0 | z_t = z], follows from Bayes' rule. Component k, with weight w_k, mean mu_k
and standard deviation s_k, is at time t a Gaussian of mean (1 - t) mu_k and variance a_k = (1 - t)^2 s_k^2 + t^2, and

    v_k(z, t) = -mu_k + (t - (1 - t) s_k^2) / a_k * (z - (1 - t) mu_k)
    v(z, t)   = sum_k r_k(z, t) v_k(z, t),   r_k the responsibility of component k for z at time t.

With it come an exact teacher for any condition (a concept that a student has yet to learn included), an exact turbo
(`jump`: the mean velocity of the true path from t to s), exact samples and densities, and teachers that are wrong in a
known way (`moved`). A state is bad when the model would never come there; `log_density` says how bad.

Shapes: B points, 2 coordinates, K components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Field = Callable[[Tensor, float], Tensor]
    """A velocity field: z_B2 and a time to v_B2."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """One condition: what its samples are. Double precision, so that closed forms can be checked to many digits."""

    mean_K2: Tensor
    std_K: Tensor
    weight_K: Tensor

    def __post_init__(self) -> None:
        k = len(self.std_K)
        if self.mean_K2.shape != (k, 2) or self.weight_K.shape != (k,):
            raise ValueError(f"{k} deviations, means {tuple(self.mean_K2.shape)}, weights {tuple(self.weight_K.shape)}")
        if not (self.std_K > 0).all() or not (self.weight_K > 0).all():
            raise ValueError("deviations and weights must be above 0")
        if not math.isclose(self.weight_K.sum().item(), 1, abs_tol=1e-9):
            raise ValueError(f"weights add up to {self.weight_K.sum().item()}, not to 1")

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` exact samples z_0, n x 2."""
        component_B = torch.multinomial(self.weight_K, n, replacement=True, generator=generator)
        noise_B2 = torch.randn(n, 2, dtype=torch.float64, generator=generator)
        return self.mean_K2[component_B] + self.std_K[component_B, None] * noise_B2

    def log_density(self, z_B2: Tensor, t: float = 0.0) -> Tensor:
        """Of z at time t, n values."""
        return torch.logsumexp(self._log_joint(z_B2, t), dim=1)

    def responsibility(self, z_B2: Tensor, t: float = 0.0) -> Tensor:
        """r_BK: how likely each component is, given the point at time t."""
        return torch.softmax(self._log_joint(z_B2, t), dim=1)

    def velocity(self, z_B2: Tensor, t: float) -> Tensor:
        """v(z, t) = E[eps - z_0 | z_t = z], exact for t from 0 to 1."""
        share_K = (t - (1 - t) * self.std_K**2) / self._variance(t)
        off_BK2 = z_B2[:, None] - (1 - t) * self.mean_K2
        each_BK2 = share_K[:, None] * off_BK2 - self.mean_K2
        return (self.responsibility(z_B2, t)[..., None] * each_BK2).sum(dim=1)

    def moved(self, by: Sequence[float]) -> Mixture:
        """The same, displaced: a teacher with a systematic error, such as one that zooms."""
        return replace(self, mean_K2=self.mean_K2 + torch.tensor(by, dtype=torch.float64))

    def _variance(self, t: float) -> Tensor:
        return (1 - t) ** 2 * self.std_K**2 + t**2

    def _log_joint(self, z_B2: Tensor, t: float) -> Tensor:
        variance_K = self._variance(t)
        squared_BK = (z_B2[:, None] - (1 - t) * self.mean_K2).square().sum(dim=2)
        return self.weight_K.log() - squared_BK / (2 * variance_K) - (2 * math.pi * variance_K).log()


def mixture(points: Sequence[tuple[float, float]], std: float, weights: Sequence[float] | None = None) -> Mixture:
    """A mixture of equal deviations; without `weights`, of equal weights."""
    k = len(points)
    weight_K = torch.full((k,), 1 / k, dtype=torch.float64) if weights is None else torch.tensor(weights).double()
    return Mixture(
        mean_K2=torch.tensor(points, dtype=torch.float64),
        std_K=torch.full((k,), std, dtype=torch.float64),
        weight_K=weight_K / weight_K.sum(),
    )


def together(parts: Sequence[Mixture], weights: Sequence[float] | None = None) -> Mixture:
    """The mixture of mixtures: what is left when the condition is not known."""
    share = torch.full((len(parts),), 1 / len(parts), dtype=torch.float64)
    share = share if weights is None else torch.tensor(weights).double() / sum(weights)
    return Mixture(
        mean_K2=torch.cat([part.mean_K2 for part in parts]),
        std_K=torch.cat([part.std_K for part in parts]),
        weight_K=torch.cat([weight * part.weight_K for weight, part in zip(share, parts, strict=True)]),
    )


@dataclass(frozen=True, eq=False)
class World:
    """Conditions by name, the concept that a student has yet to learn, and what it knows without a condition."""

    conditions: dict[str, Mixture]
    concept: Mixture
    anything: Mixture

    def guided(self, condition: Mixture, scale: float) -> Field:
        """Classifier-free guidance in this project's counting (1 = none): the field of the guided teacher."""
        return lambda z, t: (
            self.anything.velocity(z, t) + scale * (condition.velocity(z, t) - self.anything.velocity(z, t))
        )


def world() -> World:
    """Four conditions of two modes each on a ring of radius 4, and a concept in a place that none of them visits.

    The modes of a condition lie opposite each other, so that the middle, where an average of them would fall, is empty:
    points that land there show few-step blur.
    """
    angles = {name: (index / 4 * math.pi) for index, name in enumerate(("east", "northeast", "north", "northwest"))}
    conditions = {
        name: mixture([(4 * math.cos(a), 4 * math.sin(a)), (-4 * math.cos(a), -4 * math.sin(a))], 0.3)
        for name, a in angles.items()
    }
    concept = mixture([(1.5, 0.5), (1.5, -0.5)], 0.15)
    return World(conditions=conditions, concept=concept, anything=together(list(conditions.values())))


def integrate(field: Field, z_B2: Tensor, grid: Sequence[float]) -> list[Tensor]:
    """The states of Euler steps along a grid of times, the first one included: what a few-step sampler does."""
    states = [z_B2]
    for now, then in pairwise(grid):
        states.append(states[-1] + (then - now) * field(states[-1], now))
    return states


def flow(field: Field, z_B2: Tensor, start: float, end: float, steps: int = 64) -> Tensor:
    """The point that the field carries z to, by fourth-order Runge-Kutta.

    Times are spaced evenly in the angle atan2(t, 1 - t): near t = 0, where narrow components bend the field most, the
    steps are as short as the bends.
    """
    angles = torch.linspace(_angle(start), _angle(end), steps + 1, dtype=torch.float64)
    times = [float(math.sin(a) / (math.sin(a) + math.cos(a))) for a in angles]
    times[0], times[-1] = start, end
    for now, then in pairwise(times):
        h = then - now
        k1 = field(z_B2, now)
        k2 = field(z_B2 + h / 2 * k1, now + h / 2)
        k3 = field(z_B2 + h / 2 * k2, now + h / 2)
        k4 = field(z_B2 + h * k3, then)
        z_B2 = z_B2 + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z_B2


def jump(field: Field, z_B2: Tensor, start: float, end: float, steps: int = 64) -> Tensor:
    """The velocity of an exact turbo: one Euler step of it lands where the field's own path does."""
    return (flow(field, z_B2, start, end, steps) - z_B2) / (end - start)


def _angle(t: float) -> float:
    return math.atan2(t, 1 - t)
