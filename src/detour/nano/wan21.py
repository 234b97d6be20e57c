"""A complete random Wan 2.1 in miniature, in the folder layout of the real one: 1.7 M parameters, 3.4 MB in bf16.

Every part is of the real class (WanTransformer3DModel, UMT5 encoder, AutoencoderKLWan, T5 tokenizer, UniPC scheduler).
The transformer has one head of the real width, so that its rotary positions are the real ones; the VAE is built by hand
and computes, exactly: latents = means of blocks of 8 x 8 pixels and four frames with some of their details; decoding =
those means.

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
Shapes: O out features, I in features, C channels, F frames, H W height and width, K kernel positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour import UserError
from detour.nano import parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d, WanEncoder3d

DTYPE = torch.bfloat16
LAYERS, HEAD, TEXT_DIM = 2, 128, 32
_VARIANTS = ("", "1.3b", "14b", "14b_4step")
_LOUD = 256.0
"""Carried by two channels of the VAE: it makes the length that an RMS norm divides by a constant, to 1e-4."""


def write(folder: Path, arch: str = "wan21", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout. The variants differ in size alone."""
    if arch != "wan21" or variant not in _VARIANTS:
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: wan21 and its variants")
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer = parts.t5_tokenizer(512)
        text = parts.t5_encoder(UMT5EncoderModel, len(tokenizer), "nano wan21", seed, "text", width=TEXT_DIM)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text.to(DTYPE),
            vae=nn.Module.to(build_vae(), DTYPE),  # diffusers' own `to` warns that it keeps nothing in float32
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
            ),
            transformer=nn.Module.to(_build_transformer(seed), DTYPE),
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def write_original(path: Path, folder: Path, prefix: str = "") -> None:
    """Write the transformer in `folder` as a single file under the names of Wan's own program, each after `prefix`."""
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    original = {prefix + _original_name(name): tensor for name, tensor in tensors.items()}
    save_file(original, path, metadata={"format": "pt"})


def _original_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out.", "head.head."),
        (".scale_shift_table", ".modulation"),
        (".norm2.", ".norm3."),
        (".attn1.", ".self_attn."),
        (".attn2.", ".cross_attn."),
        (".to_out.0.", ".o."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".ffn.net.0.proj.", ".ffn.0."),
        (".ffn.net.2.", ".ffn.2."),
    ):
        name = name.replace(ours, theirs)
    return name


def _build_transformer(seed: int) -> WanTransformer3DModel:
    """Variance-preserving weights, gates half open, an output of a standard deviation of about one half.

    Most of the 512 text tokens are zeros, which attention counts as any others; keys that are four times as loud let
    the words be heard among them.
    """
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=HEAD,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=LAYERS,
    ).eval()
    for name, parameter, draw in parts.drawn(model, "nano wan21", seed, "transformer"):
        if name.endswith("scale_shift_table"):  # shift, scale, gate of attention, then of feed-forward
            rows = [0.0, 0.0, 0.5, 0.0, 0.0, 0.5] if name.startswith("blocks.") else [0.0, 0.0]
            parameter.copy_(torch.tensor(rows)[None, :, None].expand_as(parameter))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name:
            nn.init.constant_(parameter, 4.0 if name.endswith("attn2.norm_k.weight") else 1.0)
        else:
            gain = 0.5 if name.startswith(("proj_out", "condition_embedder.time_proj")) else 1.0
            parameter.copy_(draw * gain / math.sqrt(parameter[0].numel()))
    return model


# -------------------------------------------------------------------------------------------------------------- VAE


def build_vae() -> AutoencoderKLWan:
    """The VAE in float32: block means (latents 0-2), their details in space (3-11) and in time (12-14), and a zero.

    As in `parts.build_vae`, residual branches and attention are switched off, and the norms before the last
    convolutions are undone: with channels (x, -x, k, k) the length is constant, and silu(y) - silu(-y) = y.
    """
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(base_dim=8).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        mean = torch.tensor(model.config.latents_mean).to(DTYPE).float()
        # Powers of two are exact in bf16. Pictures have normalised latents of about unit variance.
        gain = 2.0 ** torch.tensor(model.config.latents_std).mul(1.4444).log2().round()
        _wire_encoder(model.encoder, mean, gain)
        _wire_decoder(model.decoder, mean, gain)
        for conv in (model.quant_conv, model.post_quant_conv):
            _copy(conv, range(conv.out_channels))
    return model


def _wire_encoder(encoder: WanEncoder3d, mean_C: Tensor, gain_C: Tensor) -> None:
    half = torch.tensor([0.0, 0.5, 0.5])  # of a frame that was there before and two new ones
    _copy(encoder.conv_in, range(3))
    first, second, third = (encoder.down_blocks[place] for place in (2, 5, 8))
    for color in range(3):
        first.resample[1].weight[color, color, :2, :2] = 0.25
        second.resample[1].weight[color, color, :2, :2] = 0.25
        second.time_conv.weight[color, color, :, 0, 0] = half
    for widening in (encoder.down_blocks[3], encoder.down_blocks[6]):
        _copy(widening.conv_shortcut, range(3))

    haar_4KK = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]) / 4
    for place in range(12):
        kind, color = divmod(place, 3)
        third.resample[1].weight[place, color, :2, :2] = haar_4KK[kind]
        third.resample[1].weight[15 + place, color, :2, :2] = -haar_4KK[kind]
    third.resample[1].bias[30:] = _LOUD
    for place in (*range(12), *range(15, 27), 30, 31):
        third.time_conv.weight[place, place, :, 0, 0] = half
    for color in range(3):  # later minus earlier
        change = torch.tensor([0.0, -0.5, 0.5])
        third.time_conv.weight[12 + color, color, :, 0, 0] = change
        third.time_conv.weight[27 + color, color, :, 0, 0] = -change
    detail = torch.tensor([1.0] * 3 + [2.0] * 12)
    _unpair(encoder.norm_out.gamma, encoder.conv_out, detail * gain_C[:15])
    encoder.conv_out.bias[:16] = mean_C
    encoder.conv_out.bias[16:] = -20.0  # log variance: posterior samples are the mean


def _wire_decoder(decoder: WanDecoder3d, mean_C: Tensor, gain_C: Tensor) -> None:
    for color in range(3):
        decoder.conv_in.weight[color, color, 2, 1, 1] = 1 / gain_C[color]
        decoder.conv_in.bias[color] = -mean_C[color] / gain_C[color]
    _copy(decoder.up_blocks[1].resnets[0].conv_shortcut, range(3))
    for block in decoder.up_blocks[:2]:
        upsampler = block.upsamplers[0]
        _copy(upsampler.resample[1], range(3))
        for color in range(3):  # each frame becomes two
            for copy in (0, upsampler.dim):
                upsampler.time_conv.weight[copy + color, color, 2, 0, 0] = 1.0
    last = decoder.up_blocks[2].upsamplers[0].resample[1]
    for color in range(3):
        last.weight[color, color, 1, 1] = 1.0
        last.weight[3 + color, color, 1, 1] = -1.0
    last.bias[6:] = _LOUD
    _unpair(decoder.norm_out.gamma, decoder.conv_out, torch.ones(3))


def _copy(conv: nn.Conv2d | nn.Conv3d, channels: range) -> None:
    """Let channels through as they are: the middle in space, and in time the newest frame (convolutions are causal)."""
    middle = tuple(size // 2 for size in conv.kernel_size[-2:])
    place = middle if len(conv.kernel_size) == 2 else (conv.kernel_size[0] - 1, *middle)
    for channel in channels:
        conv.weight[(channel, channel, *place)] = 1.0


def _unpair(gamma: Tensor, conv: nn.Conv3d, gains: Tensor) -> None:
    """Undo the norm's division, and take the difference of each pair of channels."""
    gamma.fill_(_LOUD * math.sqrt(2 / gamma.numel()))
    for channel, gain in enumerate(gains):
        conv.weight[channel, channel, 2, 1, 1] = gain
        conv.weight[channel, len(gains) + channel, 2, 1, 1] = -gain
