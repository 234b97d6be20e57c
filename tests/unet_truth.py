"""Stand-ins for UNets that answer with the truth, for rows of diffusion models."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

_LEVELS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
"""a^2 of the noise levels of every Stable Diffusion before 3 (`scaled_linear`)."""


class UNetTruth(nn.Module):
    """What a perfect UNet returns for a state z between these clean latents and any noise, at whole levels."""

    def __init__(self, clean_BCHW: Tensor, predicts: Literal["eps", "v"]) -> None:
        super().__init__()
        self.clean_BCHW, self.predicts, self.dtype = clean_BCHW, predicts, clean_BCHW.dtype

    def forward(self, z_BCHW: Tensor, level_B: Tensor, return_dict: bool, **_: Any) -> Any:
        assert not return_dict and torch.equal(level_B, level_B.round())
        alpha = _LEVELS[level_B.long()].reshape(-1, 1, 1, 1)
        signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
        eps = (z_BCHW - signal * self.clean_BCHW) / noise
        return (eps if self.predicts == "eps" else signal * eps - noise * self.clean_BCHW,)
