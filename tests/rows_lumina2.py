"""Lumina 2's row of the table of architectures."""

from typing import Any

from torch import Tensor, nn

from arch_row import Row


class _Lumina2Truth(nn.Module):
    """Clean minus noise: what a perfect Lumina returns."""

    def __init__(self, clean_BCHW: Tensor, noise_BCHW: Tensor) -> None:
        super().__init__()
        self.field_BCHW = clean_BCHW - noise_BCHW
        self.dtype = clean_BCHW.dtype

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool, **text: Tensor) -> Any:
        assert len(hidden_states) == len(timestep) == len(text["encoder_hidden_states"])
        assert not return_dict
        return (self.field_BCHW.expand(len(timestep), -1, -1, -1),)


def _full_lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    # transformer/config.json of Alpha-VLLM/Lumina-Image-2.0. Its text encoder is Gemma 2 2B: 26 layers, 2304 wide.
    return Lumina2Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        hidden_size=2304,
        num_layers=26,
        num_refiner_layers=2,
        num_attention_heads=24,
        num_kv_heads=8,
        multiple_of=256,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(32, 32, 32),
        axes_lens=(300, 512, 512),
        cap_feat_dim=2304,
    )


ROWS = [
    Row(
        name="lumina2",
        pipeline="Lumina2Pipeline",
        native_truth=_Lumina2Truth,
        lora_blocks=4 * 8 + 7,  # layers and noise refiner; the context refiner has no modulation
        lora_all=4 * 8 + 7 + 6,
        full_size=_full_lumina2,
        full_parameters=2_609_769_152,  # the published float32 files hold 10.44 GB, four bytes each
        full_lora_blocks=28 * 8 + 2 * 7,
        guidance_keeps_length=True,
    ),
]
