"""The LoRA product in one piece against PEFT's own sum, in every type, shape and place where it is used."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from detour.nn.lowrank import add_low_rank, use_low_rank

WIDE, NARROW, RANK = 24, 16, 4


def layer(*, bias: bool = False, alpha: float = 8.0, dtype: torch.dtype = torch.float32, dropout: float = 0.0):
    """Two PEFT layers alike, the first with PEFT's own sum, with B away from zero and everything else frozen."""
    made = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDE, NARROW, bias=bias)).to(dtype).requires_grad_(False)
        config = LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=dropout, target_modules=["0"])
        inject_adapter_in_model(config, model, "default")
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) * 0.3
        if ours:
            use_low_rank({"0": model[0]}, "default")
        made.append(model)
    return made


def results(model: nn.Module, x: torch.Tensor, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
    """Output and gradients of x (where it wants one), A and B."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y.float() * weights).sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return [y.detach(), *grads, *([x.grad] if x.requires_grad else [])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(WIDE,), (5, WIDE), (2, 5, WIDE)])
@pytest.mark.parametrize("wants_grad", [False, True])
@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_output_and_gradients_are_those_of_peft(bias, shape, wants_grad, alpha):
    theirs, ours = layer(bias=bias, alpha=alpha)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(wants_grad)
    for expected, found in zip(results(theirs, x), results(ours, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert found.dtype == expected.dtype and found.shape == expected.shape


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_exact_as_peft(x_dtype, base):
    theirs, ours = layer(dtype=base)
    exact, _ = layer(dtype=base)
    exact.float()
    x = torch.randn(2, 33, WIDE, generator=torch.Generator().manual_seed(1)).to(x_dtype).requires_grad_()
    expected = results(exact, x.detach().float().requires_grad_())
    for truth, peft, found in zip(
        expected, results(theirs, x, torch.bfloat16), results(ours, x, torch.bfloat16), strict=True
    ):
        assert found.dtype == peft.dtype
        error, peft_error = ((t.float() - truth).norm() / truth.norm() for t in (found, peft))
        assert error < 1.1 * peft_error + 1e-6, (error, peft_error)


def test_a_bf16_base_without_autocast_multiplies_in_float32_as_in_peft():
    theirs, ours = layer(dtype=torch.bfloat16)
    x = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    for expected, found in zip(results(theirs, x), results(ours, x), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-5)


def test_gradients_are_the_derivative():
    draw = torch.Generator().manual_seed(3)
    sizes = [(2, 3, NARROW), (2, 3, WIDE), (RANK, WIDE), (NARROW, RANK)]
    y, x, A, B = (torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_() for size in sizes)
    assert torch.autograd.gradcheck(lambda y, x, A, B: add_low_rank(y.clone(), x, A, B, 0.7), (y, x, A, B))


@pytest.mark.parametrize("bias", [False, True])  # with a bias and three axes torch's linear layer gives a view
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_in_a_row(bias, dtype):
    """A LoRA, and a training adapter after it on the same output."""
    _, ours = layer(bias=bias)
    x = torch.randn(2, 3, WIDE).requires_grad_()
    A, B = torch.randn(RANK, WIDE), torch.randn(NARROW, RANK)
    y = ours(x)
    expected = y + 0.5 * (x @ A.t() @ B.t())
    expected.sum().backward()
    gradient = x.grad.clone()
    x.grad = None
    found = add_low_rank(ours(x).to(dtype), x.to(dtype), A, B, 0.5)
    assert found.dtype == dtype
    found.sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(x.grad, gradient, rtol=tolerance, atol=10 * tolerance)


def test_a_frozen_branch_keeps_no_activation():
    x, y = torch.randn(5, WIDE).requires_grad_(), torch.randn(5, NARROW)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        add_low_rank(y, x, torch.randn(RANK, WIDE), torch.randn(NARROW, RANK), -1.0)
    assert saved == [(RANK, WIDE), (NARROW, RANK)]


def test_layers_that_read_the_same_input_keep_it_once():
    """q, k and v read one x: PEFT keeps a copy for each under autocast."""
    kept: list[dict[int, int]] = []
    for which in (0, 1):
        layers = [layer(dtype=torch.bfloat16)[which] for _ in range(3)]
        x = torch.randn(64, WIDE).bfloat16().requires_grad_()
        storages: dict[int, int] = {}
        held = []  # alive, so that no address is used twice

        def pack(tensor, storages=storages, held=held):
            if tensor.shape == (64, WIDE):
                storages[tensor.data_ptr()] = tensor.nbytes
                held.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            sum(part(x).float().sum() for part in layers)
        kept.append(storages)
    theirs, ours = kept
    assert len(ours) == 1 and next(iter(ours)) == x.data_ptr()
    assert len(theirs) >= 3


def test_dropout_drops_inputs_of_the_adapter_while_training():
    theirs, ours = layer(dropout=0.5)
    x = torch.randn(8, WIDE)
    torch.manual_seed(5)
    expected = theirs(x)
    torch.manual_seed(5)
    torch.testing.assert_close(ours(x), expected)
    assert not torch.equal(ours(x), expected)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_layer_with_a_forward_pass_of_its_own_is_not_taken_over():
    model = nn.Sequential(nn.Linear(WIDE, NARROW))
    inject_adapter_in_model(LoraConfig(r=RANK, target_modules=["0"], use_dora=True), model, "default")
    with pytest.raises(AssertionError, match="forward pass of its own"):
        use_low_rank({"0": model[0]}, "default")
