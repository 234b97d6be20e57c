"""The table of architectures: one row each, which switches on the contract suite (`test_archs_contract.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from detour.nano import zimage as nano_zimage


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    write: Callable[[Path], None]
    """Writes the architecture's miniature in the diffusers layout."""
    pipeline: str
    """Class in diffusers that samples it."""
    native_truth: Callable[[Tensor, Tensor], nn.Module]
    """(z_0, eps) to a stand-in for the denoiser that answers with the true field in the model's own convention."""
    lora_blocks: int
    """Linear layers of the miniature that `spec.lora_blocks` names."""
    lora_all: int
    full_size: Callable[[], nn.Module]
    """The denoiser at its published size (built on the meta device)."""
    full_lora_blocks: int

    def __str__(self) -> str:
        return self.name


class _ZImageTruth(nn.Module):
    """Clean minus noise, one picture at a time with a frame axis: what a perfect Z-Image returns."""

    def __init__(self, clean_BCHW: Tensor, noise_BCHW: Tensor) -> None:
        super().__init__()
        self.field_BCHW = clean_BCHW - noise_BCHW
        self.dtype = clean_BCHW.dtype
        self.times: list[float] = []

    def forward(self, pictures: list[Tensor], t_B: Tensor, captions: list[Tensor], return_dict: bool) -> Any:
        self.times.append(t_B[0].item())
        assert len(pictures) == len(captions) == len(t_B)
        assert not return_dict
        return ([field.unsqueeze(1) for field in self.field_BCHW.expand(len(pictures), -1, -1, -1)],)


def _full_zimage() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel()  # its defaults are the published configuration


ROWS = [
    Row(
        name="zimage",
        write=nano_zimage.write,
        pipeline="ZImagePipeline",
        native_truth=_ZImageTruth,
        lora_blocks=3 * 8,
        lora_all=3 * 8 + 8 + 7 + 6,  # layers, noise refiner, context refiner (no modulation), embedders and final layer
        full_size=_full_zimage,
        full_lora_blocks=30 * 8,
    ),
]
