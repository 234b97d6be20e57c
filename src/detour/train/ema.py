"""An exponential moving average of the trained weights, kept beside them and saved on its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Ema:
    """Shadow weights in float32, named as the weights: shadow <- decay * shadow + (1 - decay) * weight."""

    def __init__(self, params: Mapping[str, nn.Parameter], decay: float) -> None:
        """Starts at the present weights. `decay` is the share of the old average kept at each update."""
        assert 0 < decay < 1, decay
        self.decay = decay
        self.active = False
        """The average and the weights have changed places (`swapped`)."""
        self._params = dict(params)
        self._shadow = {name: param.detach().float().clone() for name, param in params.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average. Once after each optimizer step."""
        assert not self.active, "the weights are swapped for their average"
        for name, param in self._params.items():
            self._shadow[name].lerp_(param.float(), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters hold the average inside; afterwards their own values again, bit for bit, errors or not.

        Values are exchanged in place, one parameter at a time: nobody's reference to a parameter goes stale, and the
        extra memory is one parameter.
        """
        assert not self.active, "swapped() does not nest"
        self._exchange()
        self.active = True
        try:
            yield
        finally:
            self._exchange()
            self.active = False

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, param in self._params.items():
            assert param.dtype == torch.float32, f"{name} is {param.dtype}; trained weights are float32"
            held = param.detach().clone()
            param.copy_(self._shadow[name])
            self._shadow[name].copy_(held)

    def state(self) -> dict[str, Tensor]:
        """The average. Not copied: write it before the next update."""
        assert not self.active, "the weights are swapped for their average"
        return dict(self._shadow)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over an average exactly. Names and shapes must be those of the weights (ValueError)."""
        assert not self.active, "the weights are swapped for their average"
        wrong = sorted(tensors.keys() ^ self._shadow.keys())
        wrong += [n for n, t in tensors.items() if n in self._shadow and t.shape != self._shadow[n].shape]
        if wrong:
            raise ValueError(f"this average belongs to other weights: {', '.join(wrong[:3])} ({len(wrong)} in all)")
        for name, tensor in tensors.items():
            self._shadow[name].copy_(tensor)
