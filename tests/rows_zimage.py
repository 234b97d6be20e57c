"""Z-Image's row of the table of architectures."""

from typing import Any

from torch import Tensor, nn

from arch_row import Row


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
        pipeline="ZImagePipeline",
        native_truth=_ZImageTruth,
        lora_blocks=3 * 8,
        lora_all=3 * 8 + 8 + 7 + 6,  # layers, noise refiner, context refiner (no modulation), embedders and final layer
        full_size=_full_zimage,
        full_parameters=6_154_908_736,
        full_lora_blocks=30 * 8,
    ),
]
