"""Frozen linear layers held in 8 or 4 bits: `int8` and `float8` by torchao, `nf4` by bitsandbytes.

Only the weights are quantised. Products run in the activation's type on the dequantised weight, forward and backward,
so that the gradient is that of the dequantised model. Configurations that quantise activations too are banned:
torchao's `Int8DynamicActivationInt8WeightConfig` runs with a plausible output that is cut off from the graph, so that
every gradient behind it is lost without an error (75 % wrong in measurements; tests/nn/test_quant.py shows it).

| qtype  | bytes per weight                          | relative error of a normally distributed weight |
| int8   | 1 + 5 / in_features (a scale for each row) | 0.8 % (1024 wide; grows slowly with the width) |
| float8 | 1 + 4 / in_features (a scale for each row) | 2.6 % |
| nf4    | 0.5 + 1/64 + 1/4096 (double-quantised)     | 9.2 % |

nf4 quantises its scales too, one byte for each block of 64 weights instead of four: 0.047 bytes per weight less,
0.28 GB on Z-Image, and the error is 9.20 % with and without.

Shapes: x (..., in_features), weight (out_features, in_features).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from detour import UserError
from detour.nn.quiet import quiet_imports

if TYPE_CHECKING:
    from types import ModuleType

    from detour.config.job import QType


class _Context(Protocol):
    """What `_Product` keeps between forward and backward."""

    weight: Tensor
    needs_input_grad: tuple[bool, ...]


class _Stored(Protocol):
    """What torchao's tensors can do beyond a plain one."""

    qdata: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A torchao weight as a plain tensor of that type."""
    return cast("_Stored", weight).dequantize(dtype)


class _Product(torch.autograd.Function):
    """`x W^T + b` for a frozen quantised W that keeps nothing but W itself for the backward pass.

    torchao's own product leaves its dequantised copy of W in the graph (2 bytes a weight in bf16, for every layer at
    once): without activation checkpointing the memory saved by quantising would be spent again twice over.
    """

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, _dense(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, None, None]:
        return (grad @ _dense(ctx.weight, grad.dtype) if ctx.needs_input_grad[0] else None), None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is a torchao tensor (`int8` or `float8`)."""

    def __init__(self, linear: nn.Linear, qtype: QType) -> None:
        """Take over the weight (already quantised) and the bias of `linear`."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.qtype: QType = qtype
        self.weight = linear.weight
        self.bias = linear.bias
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """The product in the type of `x`, or of autocast where that is on (as for a plain linear layer)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return _Product.apply(x, self.weight, bias)  # type: ignore[no-any-return,no-untyped-call]
        return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]


def quantizer(qtype: QType, exclude: str, device: torch.device) -> Callable[[str, nn.Linear], nn.Module]:
    """What `weights.Placement` calls for each linear layer once its weights are there.

    The result maps (full name, layer) to a frozen layer on `device`. Layers whose name matches the regular expression
    `exclude` anywhere are returned as they are; for nf4 also those with an odd number of inputs (two weights share a
    byte, and bitsandbytes has no kernel for a row that ends inside one). Where `in_features` is not a multiple of 64,
    nf4 works with a slower product, and bitsandbytes says so on a card.
    Raises UserError when the package that the type needs is missing.
    """
    excluded = re.compile(exclude) if exclude else None
    convert = _nf4_converter(device) if qtype == "nf4" else _torchao_converter(qtype, device)

    def quantize(name: str, linear: nn.Linear) -> nn.Module:
        if excluded is not None and excluded.search(name):
            return linear
        if qtype == "nf4" and linear.in_features % 2:
            return linear
        return convert(linear)

    return quantize


def _torchao_converter(qtype: QType, device: torch.device) -> Callable[[nn.Linear], nn.Module]:
    try:
        with quiet_imports():
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise _missing(qtype, "torchao", error) from error

    # Weight-only float8 needs no float8 hardware: the type is storage, products run in the activation's type. Only
    # torchao's inductor settings are process-wide, hence off.
    config = (Int8WeightOnlyConfig if qtype == "int8" else Float8WeightOnlyConfig)(version=2, set_inductor_config=False)

    def convert(linear: nn.Linear) -> nn.Module:
        linear = linear.to(device).requires_grad_(False)
        quantize_(linear, config)
        if qtype == "float8":
            _mend_zero_rows(cast("_Stored", linear.weight))
        return QuantizedLinear(linear, qtype).train(linear.training)

    return convert


def _mend_zero_rows(weight: _Stored) -> None:
    """Rows of zeros (pruned layers, projections that begin at zero) as zeros: torchao's float8 divides them by 0."""
    empty = weight.scale == 0  # (out_features, 1)
    weight.qdata.view(torch.uint8).masked_fill_(empty, 0)
    weight.scale.masked_fill_(empty, 1.0)


def _nf4_converter(device: torch.device) -> Callable[[nn.Linear], nn.Module]:
    try:
        with quiet_imports():
            from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise _missing("nf4", "bitsandbytes", error) from error

    def convert(linear: nn.Linear) -> nn.Module:
        options = {"compress_statistics": True, "quant_type": "nf4"}
        module = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            device="meta",
            **options,
        )
        module.weight = Params4bit(linear.weight.data, requires_grad=False, module=module, **options)
        module.bias = linear.bias
        # Where the processor has AVX512-BF16, bitsandbytes repacks the weight at the first product without gradient
        # (a preview, say) for a kernel that has no backward: from then on every gradient through it is lost silently.
        module.support_avx512bf16_for_cpu = False
        result: nn.Module = module.to(device).requires_grad_(False).train(linear.training)
        return result

    return convert


def _missing(qtype: QType, package: str, error: ImportError) -> UserError:
    return UserError(
        f"quantising to {qtype} needs {package}, which cannot be imported ({error}); "
        f'install it with: pip install "detour[quant]"'
    )


def _bitsandbytes() -> ModuleType | None:
    """bitsandbytes where it is in use. Importing it takes seconds, and where nobody has, no layer of it can exist."""
    return sys.modules.get("bitsandbytes")


def qtype_of(linear: nn.Linear) -> QType | None:
    """How the weight of a linear layer is held; None when it is plain."""
    if isinstance(linear, QuantizedLinear):
        return linear.qtype
    bnb = _bitsandbytes()
    return "nf4" if bnb is not None and isinstance(linear, bnb.nn.Linear4bit) else None


def dense_weight(linear: nn.Linear) -> Tensor:
    """The weight (out_features, in_features) as float32, dequantised where it is quantised."""
    kind = qtype_of(linear)
    if kind is None:
        return linear.weight.detach().float()
    if kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = linear.weight  # Params4bit
        dense: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return dense.float()
    return _dense(linear.weight.detach(), torch.float32)


def linear_bytes(module: nn.Module) -> int:
    """Bytes that the parameters and buffers of a module really occupy, scales and code tables included."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(part.numel() * part.element_size() for tensor in tensors for part in _stored(tensor))


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a parameter is made of."""
    bnb = _bitsandbytes()
    if bnb is not None and isinstance(tensor, bnb.nn.Params4bit):
        state = tensor.quant_state
        yield from (tensor.data, state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    elif is_traceable_wrapper_subclass(whole := cast("Any", tensor)):
        names, _ = whole.__tensor_flatten__()
        for name in names:
            yield from _stored(getattr(whole, name))  # the subclass protocol names its parts
    else:
        yield tensor
