"""Targets and weights of field regression: each against its own definition."""

import math

import pytest
import torch

from detour.nn.fields import bounded, moved, preference, squared_error, weight
from detour.nn.flow import clean_from

SHAPE = (3, 4, 5, 6)
T_B = torch.tensor([0.3, 0.75, 1.0])


def some(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_the_clean_weight_is_the_error_of_the_clean_picture() -> None:
    z, v, target = some(0), some(1), some(2)
    in_pictures = squared_error(clean_from(z, v, T_B), clean_from(z, target, T_B))
    torch.testing.assert_close(weight("clean", T_B) * squared_error(v, target), in_pictures)


def test_the_step_weight_is_the_error_of_where_the_step_ends() -> None:
    z, v, target, next_B = some(0), some(1), some(2), torch.tensor([0.0, 0.5, 0.9])
    dt = (next_B - T_B).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        weight("step", T_B, next_B) * squared_error(v, target), squared_error(z + dt * v, z + dt * target)
    )
    assert torch.equal(weight("velocity", T_B), torch.ones(3))
    with pytest.raises(ValueError, match="on a sampler's grid"):
        weight("step", T_B)


def test_no_gradient_reaches_the_target() -> None:
    v, target = some(1).requires_grad_(), some(2).requires_grad_()
    squared_error(v, target).sum().backward()
    assert v.grad is not None and target.grad is None


def test_a_delta_of_nothing_leaves_the_field() -> None:
    field, base = some(1), some(2)
    assert torch.equal(moved(field, base, base, 3.0), field)
    torch.testing.assert_close(moved(field, field, base, 2.0), 3 * field - 2 * base)


def test_a_bound_that_is_not_reached_changes_nothing_and_one_that_is_stops_there() -> None:
    z, target, reference = some(0), some(1), some(2)
    torch.testing.assert_close(bounded(target, reference, z, T_B, 1e9), target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bounded(target, reference, z, T_B, 0.0), reference, rtol=1e-4, atol=1e-4)
    start, goal = clean_from(z, reference, T_B), clean_from(z, target, T_B)
    got = clean_from(z, bounded(target, reference, z, T_B, 0.1), T_B) - start
    norms = got.flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((3,), 0.1), rtol=1e-4, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(got.flatten(1), (goal - start).flatten(1))
    torch.testing.assert_close(cosine, torch.ones(3))


def test_preference_is_log_two_without_training_and_falls_as_the_wanted_gets_better() -> None:
    e = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    pair = (e[0], e[1])
    torch.testing.assert_close(preference(pair, pair, 5.0), torch.full((3,), math.log(2)))
    assert (preference((e[0] - 0.1, e[1]), pair, 5.0) < math.log(2)).all()
    assert (preference((e[0], e[1] - 0.1), pair, 5.0) > math.log(2)).all()
    exact = -torch.log(torch.sigmoid(-5.0 * ((e[0] - 0.3 - e[1]) - (e[0] - e[1]))))
    torch.testing.assert_close(preference((e[0] - 0.3, e[1]), pair, 5.0), exact)


def test_the_published_customisation_recipe_is_plain_training() -> None:
    """PSO's released `pso_db` loss at the weights of its 30 scripts: the unwanted samples cancel (preserving.md 2.2).

    relu(1 + beta (e_w - .1 e_l)) + .5 e_l with beta 5 is 1 + 5 e_w wherever e_l < 2 + 10 e_w, which it always is for
    errors of about one. It needs no strategy of its own here: it is training at the sampler's grid.
    """
    wanted, unwanted = (torch.rand(64, requires_grad=True) for _ in range(2))
    loss = (torch.relu(1 + 5 * (wanted - 0.1 * unwanted)) + 0.5 * unwanted).sum()
    loss.backward()
    torch.testing.assert_close(wanted.grad, torch.full((64,), 5.0))
    assert unwanted.grad.abs().max() < 1e-6
