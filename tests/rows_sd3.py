"""Stable Diffusion 3's row of the table of architectures."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from arch_row import Row


class _SD3Truth(nn.Module):
    """Noise minus clean: what a perfect Stable Diffusion 3 returns."""

    config = SimpleNamespace(pos_embed_max_size=192, joint_attention_dim=96)

    def __init__(self, clean_BCHW: Tensor, noise_BCHW: Tensor) -> None:
        super().__init__()
        self.field_BCHW = noise_BCHW - clean_BCHW
        self.dtype = clean_BCHW.dtype

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        return_dict: bool,
    ) -> Any:
        assert len(hidden_states) == len(timestep) == len(encoder_hidden_states) == len(pooled_projections)
        assert encoder_hidden_states.shape[1:] == (77 + 256, 96) and not return_dict
        return (self.field_BCHW.expand_as(hidden_states),)


def full_size(**config: Any) -> nn.Module:
    """`transformer/config.json` of the published models; what differs is given.

    The text encoders of all: CLIP-L (768 wide, 12 layers), CLIP-G (1280 wide, 32 layers), T5 1.1 XXL (d_model 4096,
    d_ff 10240, d_kv 64, 64 heads, 24 layers).
    """
    from diffusers import SD3Transformer2DModel

    common = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    }
    return SD3Transformer2DModel(**(common | config))


MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
MEDIUM_35 = MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
LARGE_35 = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}

ROWS = [
    Row(
        name="sd3",
        pipeline="StableDiffusion3Pipeline",
        native_truth=_SD3Truth,
        lora_blocks=2 * 14 + 11,  # the last block does nothing more with the text
        lora_all=2 * 14 + 11 + 7,
        full_size=lambda: full_size(**LARGE_35),
        full_parameters=8_056_627_520,  # "8.1B", with the 89,653,248 figures of its positions that files hold
        full_lora_blocks=37 * 14 + 11,
        unread=("transformer_blocks.2.attn.add_q_proj",),  # what the text asks for in the last block is dropped
    ),
]
