"""Quantised layers: error, size, and above all that gradients pass through them as they should."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detour import UserError
from detour.config.job import NetworkConfig
from detour.nn import lora
from detour.nn.quant import QuantizedLinear, dense_weight, linear_bytes, qtype_of, quantizer
from detour.nn.quiet import quiet_imports
from zstack import Stack, StackSpec, gradients, inputs, linears, quantise, relative

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
QTYPES = ["int8", "float8", "nf4"]
PACKAGES = {"int8": "torchao.quantization", "float8": "torchao.quantization", "nf4": "bitsandbytes.nn"}
# Relative error of normally distributed weights (1024 wide), and bytes per weight: measured, with a little room.
ERROR = {"int8": 0.009, "float8": 0.028, "nf4": 0.096}
BYTES = {"int8": 1.012, "float8": 1.009, "nf4": 0.521}


def layer(qtype: str, width: int = 1024, height: int = 512, dtype=torch.bfloat16) -> tuple[nn.Linear, nn.Module]:
    """A layer with normal weights, and the same quantised."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(width, height).requires_grad_(False)
    plain.weight.copy_(torch.randn(height, width, generator=generator) * width**-0.5)
    plain = plain.to(dtype).eval()
    copy = nn.Linear(width, height, device="meta").requires_grad_(False).eval()
    copy.load_state_dict({key: value.clone() for key, value in plain.state_dict().items()}, assign=True)
    return plain, quantizer(qtype, "", CPU)("layer", copy)


def dequantised(model: nn.Module) -> Stack:
    """A float32 stack with the weights that a quantised one stands for."""
    reference = Stack()
    with torch.no_grad():
        for name, linear in linears(reference).items():
            linear.weight.copy_(dense_weight(model.get_submodule(name)))
    return reference


def with_lora(model: nn.Module) -> dict[str, nn.Parameter]:
    network = NetworkConfig(linear=4, transformer_only=False)
    lora.attach(model, lora.linear_names(model, StackSpec(), network), network, 3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in lora.trainable(model).items():
            if name.endswith("lora_B.weight"):
                parameter.normal_(std=0.05, generator=generator)
    return lora.trainable(model)


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values.values()])


@pytest.mark.parametrize("qtype", QTYPES)
def test_error_and_size_are_as_documented(qtype):
    plain, quantised = layer(qtype)
    error = relative(dense_weight(quantised), plain.weight)
    assert ERROR[qtype] * 0.8 < error < ERROR[qtype]
    weight_bytes = linear_bytes(quantised) - 2 * plain.out_features
    assert 0.99 < weight_bytes / plain.weight.numel() / BYTES[qtype] <= 1
    assert linear_bytes(plain) == 2 * (plain.weight.numel() + plain.out_features)
    assert qtype_of(quantised) == qtype and qtype_of(plain) is None


@pytest.mark.parametrize("qtype", QTYPES)
def test_rows_of_zeros_stay_zeros_and_touch_no_others(qtype):
    """Pruned layers and projections that begin at zero: a row has its own scale, and nothing to divide by."""
    linear = nn.Linear(128, 64, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight[::3] = 0
    whole = linear.weight.float().clone()
    found = dense_weight(quantizer(qtype, "", CPU)("layer", linear))
    assert found[::3].count_nonzero() == 0
    assert relative(found, whole) < 1.5 * ERROR[qtype]


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_is_that_of_the_dequantised_weight(qtype, dtype):
    _, quantised = layer(qtype, dtype=dtype)
    x = torch.randn(3, 5, 1024, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    y = quantised(x)
    y.backward(torch.ones_like(y))
    W, b = dense_weight(quantised), quantised.bias.float()
    assert y.dtype == dtype and x.grad.dtype == dtype
    assert relative(y, F.linear(x.float(), W, b)) < 0.005
    assert relative(x.grad, torch.ones(3, 5, 512) @ W) < 0.005
    assert quantised.weight.grad is None and quantised.bias.grad is None


@pytest.mark.parametrize("qtype", QTYPES)
def test_gradients_are_those_of_the_dequantised_model(qtype):
    """The noise floor of bf16 against float32 is 1.2 % here; a gradient that is cut off anywhere is wrong by 75 %."""
    model = quantise(Stack(dtype=torch.bfloat16), qtype)
    reference = dequantised(model)
    parameters, expected_parameters = with_lora(model), with_lora(reference)
    x, expected_x = inputs(dtype=torch.bfloat16).requires_grad_(), inputs(dtype=torch.bfloat16).float().requires_grad_()
    found = flat(gradients(model, x, parameters))
    expected = flat(gradients(reference, expected_x, expected_parameters))
    assert relative(found, expected) < 0.02
    assert relative(x.grad, expected_x.grad) < 0.02


def test_dynamic_activation_quantisation_cuts_gradients_off():
    """Why such configurations are banned: a good output that no gradient passes through, and no error."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    plain, _ = layer("int8")
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    expected = plain(x)
    quantize_(plain, Int8DynamicActivationInt8WeightConfig())
    y = plain(x)
    assert relative(y, expected) < 0.02
    assert expected.requires_grad and not y.requires_grad


@pytest.mark.parametrize("qtype", QTYPES)
def test_gradients_under_checkpointing_are_bit_equal(qtype):
    model = quantise(Stack(dtype=torch.bfloat16), qtype)
    parameters = with_lora(model)
    plain = gradients(model, inputs(dtype=torch.bfloat16), parameters)
    model.checkpointing = True
    again = gradients(model, inputs(dtype=torch.bfloat16), parameters)
    assert all(torch.equal(plain[name], again[name]) and plain[name].any() for name in plain)


@pytest.mark.parametrize("qtype", QTYPES)
def test_previews_do_not_cut_gradients_off(qtype):
    """bitsandbytes repacks nf4 weights in a product without gradient, for a kernel that has no backward."""
    model = quantise(Stack(dtype=torch.bfloat16), qtype)
    parameters, x = with_lora(model), inputs(dtype=torch.bfloat16)
    before = gradients(model, x, parameters)
    size = linear_bytes(model)
    with torch.no_grad():
        drawn = model(x)
    after = gradients(model, x, parameters)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert linear_bytes(model) == size
    assert torch.equal(model(x), drawn)


@pytest.mark.parametrize("qtype", QTYPES)
def test_the_graph_keeps_no_dequantised_weight(qtype):
    _, quantised = layer(qtype)
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        own = (
            tensor.untyped_storage().data_ptr() == quantised.weight.untyped_storage().data_ptr()
            if qtype == "nf4"
            else 0
        )
        kept += 0 if own else tensor.numel() * tensor.element_size()
        return tensor

    x = torch.randn(4, 1024).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = quantised(x)
    assert not kept, "a copy of the weight would cost 2 bytes for each, more than quantising saves"
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("qtype", QTYPES)
def test_autocast_computes_in_its_own_type(qtype):
    _, quantised = layer(qtype, dtype=torch.float32)
    x = torch.randn(4, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        low = quantised(x)
    assert relative(low, quantised(x)) < 0.01
    if qtype != "nf4":  # bitsandbytes computes in the weights' own type and returns the input's
        assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("qtype", QTYPES)
def test_excluded_layers_stay_as_they_are(qtype):
    model, plain = Stack(dtype=torch.bfloat16), Stack(dtype=torch.bfloat16)
    embedder = model.get_submodule("cap_embedder.1")
    quantise(model, qtype, exclude=r"^cap_embedder\.1$|layers\.0\..*w2")
    kinds = {name: qtype_of(linear) for name, linear in linears(model).items()}
    assert {name for name, kind in kinds.items() if kind is None} == {"cap_embedder.1", "layers.0.feed_forward.w2"}
    assert model.get_submodule("cap_embedder.1") is embedder
    assert relative(model(inputs(dtype=torch.bfloat16)), plain(inputs(dtype=torch.bfloat16))) < 1.2 * ERROR[qtype]


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize(("width", "height"), [(96, 96), (66, 7), (4, 200)])
def test_any_even_size_will_do(qtype, width, height):
    _, quantised = layer(qtype, width, height)
    x = torch.randn(5, width).bfloat16().requires_grad_()
    y = quantised(x)
    y.sum().backward()
    assert relative(y, F.linear(x.float(), dense_weight(quantised), quantised.bias.float())) < 0.01
    assert x.grad.any()


@pytest.mark.parametrize("qtype", QTYPES)
def test_an_odd_number_of_inputs_is_no_case_for_nf4(qtype):
    _, quantised = layer(qtype, 65, 7)
    assert qtype_of(quantised) == (None if qtype == "nf4" else qtype)


@pytest.mark.parametrize("qtype", QTYPES)
def test_the_layer_is_a_frozen_linear_layer_in_the_mode_it_was_in(qtype):
    _, quantised = layer(qtype)
    assert isinstance(quantised, nn.Linear) and not quantised.training
    assert not any(parameter.requires_grad for parameter in quantised.parameters())
    assert (quantised.out_features, quantised.in_features) == (512, 1024)
    assert isinstance(quantised, QuantizedLinear) == (qtype != "nf4")


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_moving_between_devices_keeps_the_weights(qtype, device):
    model = quantise(Stack(dtype=torch.bfloat16), qtype)
    parameters = with_lora(model)
    before = {n: dense_weight(m) for n, m in linears(model).items() if qtype_of(m)}
    at_home = flat(gradients(model, inputs(dtype=torch.bfloat16), parameters))
    model.to(device)
    parameters = lora.trainable(model)
    moved = flat(gradients(model, inputs(dtype=torch.bfloat16).to(device), parameters))
    assert relative(moved.cpu(), at_home) < 0.02
    assert {parameter.device.type for parameter in parameters.values()} == {device}
    model.to("cpu")
    assert all(torch.equal(dense_weight(model.get_submodule(name)), weight) for name, weight in before.items())
    assert len(before) == 22


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, qtype):
    monkeypatch.setitem(sys.modules, PACKAGES[qtype], None)
    package = PACKAGES[qtype].split(".")[0]
    with pytest.raises(UserError, match=rf'quantising to {qtype} needs {package}.*pip install "detour\[quant\]"'):
        quantizer(qtype, "", CPU)


@pytest.mark.slow
def test_imports_are_quiet():
    program = (
        "import torch; from detour.nn.quant import quantizer\n"
        "for qtype in ('int8', 'nf4'): quantizer(qtype, '', torch.device('cpu'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == ""


def test_only_known_notices_are_held_back_and_only_while_importing(caplog):
    with quiet_imports(), caplog.at_level(logging.WARNING):
        logging.getLogger("torchao").warning("something is wrong")
        logging.getLogger("torchao").warning("Failed to load /site-packages/torchao/_C_mxfp8.so: cannot")
    logging.getLogger("torchao").warning("Failed to load /site-packages/torchao/_C_mxfp8.so: later")
    assert [record.message.split()[-1] for record in caplog.records] == ["wrong", "later"]


def test_quantising_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for qtype in QTYPES:
            layer(qtype)[1](torch.randn(2, 1024).bfloat16())
