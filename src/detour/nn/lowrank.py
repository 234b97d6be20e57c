"""The product of a plain LoRA in one piece: `y += s B (A x)`, as PEFT's layers call it (its `LoraVariant`).

PEFT's own sum makes a float32 copy of x for each layer (which autocast takes back), the product, its multiple by s and
the sum, each in the size of the output, and keeps a copy of x in the graph for each of several layers that read one x
(q, k and v; w1 and w3). Here the product is added into the output in place, s multiplies the (..., rank) factor, and
the graph keeps x itself. Same numbers up to rounding. With rank 16 on every linear layer of three Z-Image blocks of
width 768 and 1056 tokens (one thread, median of 14 pairs of steps) a step took 6 % less in float32 and in bf16, and in
bf16 the graph held 54 instead of 60 MiB a block.

Shapes: x (N, in), h (N, rank), y (N, out), A (rank, in), B (out, rank).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


class _Context(Protocol):
    """What is kept between forward and backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    scale: float

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_dirty(self, *tensors: Tensor) -> None: ...


class _AddLowRank(torch.autograd.Function):
    """`y + scale B (A x)`, into y where the types allow it.

    With g the gradient of the output: dx = s (g B) A, dA = s (g B)^T x, dB = s g^T (x A^T), and dy = g.
    Products run in `x.dtype`. x is kept only where A or B is trained.
    """

    @staticmethod
    def forward(ctx: _Context, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        x_NI, A_RI, B_OR = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)
        h_NR = x_NI @ A_RI.t()
        if scale != 1:
            h_NR *= scale
        trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(A_RI, B_OR, *((x_NI, h_NR) if trained else ()))
        ctx.scale = scale
        # A view cannot be handed on changed: two of these in a row (a LoRA and a training adapter) are an error then.
        in_place = y.dtype == x.dtype and y.is_contiguous() and not y._is_view()
        total = y if in_place else y.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
        total.view(-1, y.shape[-1]).addmm_(h_NR, B_OR.t())
        if in_place:
            ctx.mark_dirty(y)
        return total.to(y.dtype)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        A_RI, B_OR, *kept = ctx.saved_tensors
        g_NO = grad.reshape(-1, grad.shape[-1]).to(B_OR.dtype)
        g_NR = g_NO @ B_OR
        if ctx.scale != 1:
            g_NR *= ctx.scale
        dx = (g_NR @ A_RI).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        dA = g_NR.t() @ kept[0] if ctx.needs_input_grad[2] else None
        dB = g_NO.t() @ kept[1] if ctx.needs_input_grad[3] else None
        return grad, dx, dA, dB, None


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`y + scale B (A x)`. y may be overwritten: it must be nobody else's (autograd raises where somebody kept it)."""
    return _AddLowRank.apply(y, x, A, B, scale)  # type: ignore[no-any-return,no-untyped-call]


class LowRank:
    """What PEFT's LoRA layers call instead of their own sum. Nothing here is ever merged into the base."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:  # noqa: ANN401
        """The layer's output: `result` of the base with the adapter's product added.

        Products run in the type of autocast where that is on, else in that of A and B (float32), as in PEFT.
        """
        A: Tensor = module.lora_A[active_adapter].weight
        B: Tensor = module.lora_B[active_adapter].weight
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else A.dtype
        x = module.lora_dropout[active_adapter](x.to(dtype))
        return add_low_rank(result, x, A, B, module.scaling[active_adapter])


def use_low_rank(layers: Mapping[str, nn.Module], adapter: str) -> None:
    """Let plain LoRA layers of PEFT, by name, compute their products here."""
    for layer in layers.values():
        whole: Any = layer  # PEFT's layers share no typed interface
        assert adapter not in whole.lora_variant, "a DoRA has a forward pass of its own"
        whole.lora_variant[adapter] = LowRank
        whole.cast_input_dtype_enabled = False  # the float32 copy of x that autocast would take back
