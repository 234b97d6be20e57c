"""A few linear layers under Z-Image's names, small enough to look into; every one of them gets a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DIM, WIDE, LAYERS = 64, 128, 2
_LINEARS = r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"


@dataclass(frozen=True)
class StackSpec:
    """The part of an `ArchSpec` that naming layers needs."""

    lora_blocks: str = rf"layers\.\d+\.{_LINEARS}"
    lora_all: str = rf"((layers|noise_refiner)\.\d+\.{_LINEARS}|cap_embedder\.1)"


@dataclass(frozen=True)
class StackKeys:
    """As `archs.base.LoraKeys` for Z-Image."""

    comfy_prefix: str = "diffusion_model."
    diffusers_prefix: str = "transformer."
    kohya_prefix: str = "lora_unet_"
    original: None = None


class Attention(nn.Module):
    """Attention in name: a gated mixture, which is enough for every layer to matter."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(DIM, DIM, bias=False), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_v(x) * torch.sigmoid(self.to_q(x)) + F.silu(self.to_k(x)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(DIM, WIDE), nn.Linear(DIM, WIDE, bias=False)
        self.w2 = nn.Linear(WIDE, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward, self.norm = Attention(), FeedForward(), nn.RMSNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.feed_forward(self.norm(x))


class Stack(nn.Module):
    """`cap_embedder.1`, one `noise_refiner` and two `layers`; frozen, in eval mode, the same for the same seed."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cap_embedder = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, DIM))
            self.noise_refiner = nn.ModuleList([Block()])
            self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.checkpointing = False
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cap_embedder(x)
        for block in [*self.noise_refiner, *self.layers]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer."""
    return {name: (module.out_features, module.in_features) for name, module in linears(model).items()}


def inputs(seed: int = 1, rows: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fixed input."""
    return torch.randn(2, rows, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference, relative to the reference."""
    value, reference = value.detach().float(), reference.detach().float()
    return float((value - reference).norm() / reference.norm())


def quantise(model: nn.Module, qtype: str, exclude: str = "") -> nn.Module:
    """Quantise every linear layer in place, as materialise does."""
    from detour.nn.quant import quantizer

    convert = quantizer(qtype, exclude, torch.device("cpu"))
    for name, linear in linears(model).items():
        model.set_submodule(name, convert(name, linear))
    return model


def gradients(
    model: nn.Module,
    x: Tensor | None,
    parameters: dict[str, nn.Parameter],
    forward: Callable[[nn.Module], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients of the mean square output, by name; `forward` stands in for a call with `x`."""
    for parameter in parameters.values():
        parameter.grad = None
    output = forward(model) if forward else model(x)
    output.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}
