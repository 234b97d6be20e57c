"""The transformer of the miniature on a whole batch at once, for training on a processor.

The stock forward of ZImageTransformer2DModel takes lists of single pictures, and rotates in complex numbers: right for
one large picture, slow for many small ones. This goes through the same modules in the same order for pictures of one
size and captions padded to one length, and equals the stock forward to rounding (tests/nano/test_recipes.py).

Shapes: B batch, C channels, H W latent positions, L tokens, D features, N heads, P pairs of rotated features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_z_image import FeedForward, ZImageTransformerBlock

CAPTION_TOKENS = 32  # what the transformer pads captions to
PATCH = 2


class FastField(nn.Module):
    """v = eps - z_0 at (z_t, t), in this project's convention, for one latent size."""

    picture_cos: Tensor
    picture_sin: Tensor
    caption_cos: Tensor
    caption_sin: Tensor

    def __init__(self, denoiser: ZImageTransformer2DModel, latent_HW: tuple[int, int]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.rows, self.columns = latent_HW[0] // PATCH, latent_HW[1] // PATCH
        if self.rows * self.columns % 32:
            raise ValueError(f"latents of {latent_HW} make tokens that the transformer would pad; it cannot here")
        captions = torch.stack([torch.tensor([1 + position, 0, 0]) for position in range(CAPTION_TOKENS)])
        pictures = torch.cartesian_prod(
            torch.tensor([1 + CAPTION_TOKENS]), torch.arange(self.rows), torch.arange(self.columns)
        )
        for name, ids in (("caption", captions), ("picture", pictures)):
            turn_LP = denoiser.rope_embedder(ids)
            self.register_buffer(f"{name}_cos", turn_LP.real.clone(), persistent=False)
            self.register_buffer(f"{name}_sin", turn_LP.imag.clone(), persistent=False)

    def forward(self, z_BCHW: Tensor, t_B: Tensor, captions_BLD: Tensor, padding_BL: Tensor) -> Tensor:
        """`captions_BLD` of 32 tokens, of which those in `padding_BL` are replaced by the learnt padding."""
        model: Any = self.denoiser
        picture_turn, caption_turn = (self.picture_cos, self.picture_sin), (self.caption_cos, self.caption_sin)
        time_BD = model.t_embedder((1 - t_B) * model.t_scale)
        x_BLD = model.all_x_embedder["2-1"](self._patches(z_BCHW))
        for block in model.noise_refiner:
            x_BLD = _block(block, x_BLD, picture_turn, time_BD)
        caption_BLD = model.cap_embedder(captions_BLD)
        caption_BLD = torch.where(padding_BL[..., None], model.cap_pad_token.to(caption_BLD.dtype), caption_BLD)
        for block in model.context_refiner:
            caption_BLD = _block(block, caption_BLD, caption_turn, None)
        both = torch.cat([x_BLD, caption_BLD], dim=1)
        turn = (torch.cat([self.picture_cos, self.caption_cos]), torch.cat([self.picture_sin, self.caption_sin]))
        for block in model.layers:
            both = _block(block, both, turn, time_BD)
        out_BLD = model.all_final_layer["2-1"](both[:, : self.rows * self.columns], c=time_BD)
        return -self._picture(out_BLD.float())

    def _patches(self, z_BCHW: Tensor) -> Tensor:
        parts = z_BCHW.reshape(len(z_BCHW), -1, self.rows, PATCH, self.columns, PATCH)
        return parts.permute(0, 2, 4, 3, 5, 1).reshape(len(z_BCHW), self.rows * self.columns, -1)

    def _picture(self, out_BLD: Tensor) -> Tensor:
        parts = out_BLD.reshape(len(out_BLD), self.rows, self.columns, PATCH, PATCH, -1)
        return parts.permute(0, 5, 1, 3, 2, 4).reshape(len(out_BLD), -1, self.rows * PATCH, self.columns * PATCH)


def _block(block: ZImageTransformerBlock, x_BLD: Tensor, turn: tuple[Tensor, Tensor], time_BD: Tensor | None) -> Tensor:
    """ZImageTransformerBlock: attention and feed-forward between norms, scaled and gated by the time."""
    if time_BD is None:
        x_BLD = x_BLD + block.attention_norm2(_attention(block.attention, block.attention_norm1(x_BLD), turn))
        plain: Tensor = x_BLD + block.ffn_norm2(_feed_forward(block.feed_forward, block.ffn_norm1(x_BLD)))
        return plain
    scale_attention, gate_attention, scale_forward, gate_forward = (
        block.adaLN_modulation(time_BD).unsqueeze(1).chunk(4, dim=2)
    )
    attended = _attention(block.attention, block.attention_norm1(x_BLD) * (1 + scale_attention), turn)
    x_BLD = x_BLD + gate_attention.tanh() * block.attention_norm2(attended)
    forward = _feed_forward(block.feed_forward, block.ffn_norm1(x_BLD) * (1 + scale_forward))
    result: Tensor = x_BLD + gate_forward.tanh() * block.ffn_norm2(forward)
    return result


def _feed_forward(module: FeedForward, x_BLD: Tensor) -> Tensor:
    result: Tensor = module.w2(F.silu(module.w1(x_BLD)) * module.w3(x_BLD))
    return result


def _attention(module: Attention, x_BLD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Plain matrix products: on a processor the backward pass of the fused kernel takes twice the time."""
    heads = module.heads
    query, key, value = (
        part(x_BLD).unflatten(-1, (heads, -1)).transpose(1, 2) for part in (module.to_q, module.to_k, module.to_v)
    )
    query, key = _turned(module.norm_q(query), turn), _turned(module.norm_k(key), turn)
    weights_BNLL = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(2, 3), dim=-1)
    result: Tensor = module.to_out[0]((weights_BNLL.to(value.dtype) @ value).transpose(1, 2).flatten(2))
    return result


def _turned(x_BNLD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: neighbouring features are a complex number, multiplied by one of size 1."""
    cos_LP, sin_LP = turn
    even, odd = x_BNLD.float().reshape(*x_BNLD.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([even * cos_LP - odd * sin_LP, even * sin_LP + odd * cos_LP], dim=-1)
    return rotated.flatten(-2).to(x_BNLD.dtype)
