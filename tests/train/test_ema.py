"""The moving average of the weights: its formula, exchange and exact state."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from detour.train.ema import Ema


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"a.weight": nn.Parameter(torch.randn(5, 3, generator=g)), "b": nn.Parameter(torch.randn(4, generator=g))}


def walk(params, ema, steps):
    for step in steps:
        g = torch.Generator().manual_seed(100 + step)
        with torch.no_grad():
            for param in params.values():
                param.add_(torch.randn(param.shape, generator=g))
        ema.update()


def as_bytes(tensors):
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def test_follows_the_formula_from_the_starting_weights():
    params = weights()
    ema, expected = Ema(params, 0.9), {name: param.detach().double() for name, param in params.items()}
    for step in range(20):
        walk(params, ema, [step])
        expected = {name: 0.9 * expected[name] + 0.1 * params[name].detach().double() for name in params}
    for name, tensor in ema.state().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_exchange_shows_the_average_in_place_and_restores_both_bit_for_bit_after_an_error():
    params = weights()
    ema = Ema(params, 0.9)
    walk(params, ema, range(5))
    raw, average = as_bytes(params), as_bytes(ema.state())
    address = params["b"].data_ptr()
    with pytest.raises(KeyError), ema.swapped():
        assert ema.active
        assert as_bytes(params) == average
        assert params["b"].data_ptr() == address
        raise KeyError("an error while drawing a preview")
    assert not ema.active
    assert as_bytes(params) == raw
    assert as_bytes(ema.state()) == average
    assert raw != average


def test_resuming_is_bit_exact_with_raw_weights_and_average_apart(tmp_path):
    whole = weights()
    average = Ema(whole, 0.99)
    walk(whole, average, range(10))

    first = weights()
    ema = Ema(first, 0.99)
    walk(first, ema, range(4))
    save_file(ema.state(), tmp_path / "ema.safetensors")
    save_file({n: p.detach() for n, p in first.items()}, tmp_path / "lora.safetensors")

    second = weights(seed=8)
    with torch.no_grad():
        for name, value in load_file(tmp_path / "lora.safetensors").items():
            second[name].copy_(value)
    again = Ema(second, 0.99)
    again.load_state(load_file(tmp_path / "ema.safetensors"))
    walk(second, again, range(4, 10))
    assert as_bytes(second) == as_bytes(whole)
    assert as_bytes(again.state()) == as_bytes(average.state())


def test_the_average_of_other_weights_is_refused_and_nothing_changes():
    ema = Ema(weights(), 0.9)
    before = as_bytes(ema.state())
    right = {name: torch.zeros_like(tensor) for name, tensor in ema.state().items()}
    for wrong in ({"b": right["b"]}, right | {"c": torch.zeros(1)}, right | {"b": torch.zeros(9)}):
        with pytest.raises(ValueError, match="other weights"):
            ema.load_state(wrong)
        assert as_bytes(ema.state()) == before


def test_nothing_may_touch_the_average_while_it_is_exchanged():
    params = weights()
    ema = Ema(params, 0.9)
    with ema.swapped():
        for forbidden in (ema.update, ema.state, lambda: ema.load_state({}), lambda: ema.swapped().__enter__()):
            with pytest.raises(AssertionError):
                forbidden()


def test_does_not_follow_the_weights_by_reference():
    params = weights()
    ema = Ema(params, 0.9)
    before = as_bytes(ema.state())
    with torch.no_grad():
        params["b"].zero_()
    assert as_bytes(ema.state()) == before
