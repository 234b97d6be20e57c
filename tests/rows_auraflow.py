"""AuraFlow's row of the table of architectures."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from arch_row import Row


class _AuraFlowTruth(nn.Module):
    """Noise minus clean: what a perfect AuraFlow returns."""

    config = SimpleNamespace(pos_embed_max_size=9216)

    def __init__(self, clean_BCHW: Tensor, noise_BCHW: Tensor) -> None:
        super().__init__()
        self.field_BCHW = noise_BCHW - clean_BCHW
        self.dtype = clean_BCHW.dtype

    def forward(self, latents_BCHW: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, return_dict: bool) -> Any:
        assert len(latents_BCHW) == len(timestep) == len(encoder_hidden_states) and not return_dict
        assert encoder_hidden_states.shape[1] == 256
        assert timestep.max() <= 1
        return (self.field_BCHW.expand_as(latents_BCHW),)


def _full() -> nn.Module:
    """config.json of fal/AuraFlow-v0.3; version 0.2 has 4096 positions, 15,728,640 parameters less.

    The text encoder is Pile-T5-XL: d_model 2048, d_ff 5120, d_kv 64, 32 heads, 24 layers, vocabulary 32128.
    """
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=4,
        num_single_dit_layers=32,
        attention_head_dim=256,
        num_attention_heads=12,
        joint_attention_dim=2048,
        caption_projection_dim=3072,
        pos_embed_max_size=9216,
    )


ROWS = [
    Row(
        name="auraflow",
        pipeline="AuraFlowPipeline",
        native_truth=_AuraFlowTruth,
        lora_blocks=2 * 16 + 3 * 8,
        lora_all=2 * 16 + 3 * 8 + 6,
        full_size=_full,
        full_parameters=6_858_605_568,  # "6.8B"
        full_lora_blocks=4 * 16 + 32 * 8,
    ),
]
