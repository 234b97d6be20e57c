"""A complete random Z-Image in miniature, in the folder layout of the real one: 1.4 M parameters, 3 MB in bf16.

Every part is of the real class (transformer, Qwen3, AutoencoderKL, Qwen2 tokenizer, flow scheduler), so that whatever
works on it has gone through the same code as the 6 B model. Nothing is trained, but nothing is arbitrary either:
the transformer is scaled so that every block takes part and a LoRA can make the loss fall; the text encoder keeps its
word embeddings apart; the VAE is built by hand and gives back exact 8 x 8 block means (`_build_vae`).

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
Shapes: O out features, I in features, K kernel positions.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour.nn.rng import generator

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from transformers import PreTrainedTokenizerBase, Qwen3Model

DTYPE = torch.bfloat16  # what the published weights are stored in
LAYERS, REFINERS, DIM, HEADS, TEXT_DIM = 3, 1, 96, 3, 64  # feed-forward: 96 / 3 * 8 = 256
SCALING, SHIFT = 0.3611, 0.1159  # of the real VAE
_PROJECTIONS = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0",
)  # fmt: skip
"""The linear layers of a main block: the published training adapters hold a pair for each of them."""

# The words of the drawn dataset and a few of everyday captions; each is one token, anything else is spelt in bytes.
_TEXT = """a an the of on in at to and with photo picture drawing background top bottom left right centre middle corner
red green blue yellow white black orange purple pink brown grey small large tiny big plain striped dotted circle square
triangle cross diamond star ring zig cat dog person style"""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def write(folder: Path, *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout, ready for `from_pretrained`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer = _build_tokenizer()
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=_build_vae().to(DTYPE),
            text_encoder=_build_text_encoder(len(tokenizer), seed).to(DTYPE),
            tokenizer=tokenizer,
            transformer=_build_transformer(seed).to(DTYPE),
        )
    with _without_bars():
        pipeline.save_pretrained(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bar of transformers' for a file that is written in a millisecond."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def write_adapter(path: Path, folder: Path, rank: int = 4, seed: int = 0, scale: float = 0.1) -> None:
    """Write a random training adapter for the miniature in `folder`, in the layout of the published ones.

    That is `diffusion_model.layers.N.<module>.lora_A/B.weight` in bf16, without alpha (alpha = rank). `scale` is the
    Frobenius norm of each B A relative to that of the weight it is added to.
    """
    weights = _transformer_tensors(folder)
    tensors: dict[str, Tensor] = {}
    for name in (f"layers.{layer}.{module}" for layer in range(LAYERS) for module in _PROJECTIONS):
        weight_OI = weights[f"{name}.weight"].float()
        A = torch.randn(rank, weight_OI.shape[1], generator=generator(seed, "adapter A", name))
        B = torch.randn(weight_OI.shape[0], rank, generator=generator(seed, "adapter B", name))
        B = B * (scale * weight_OI.norm() / (B @ A).norm())
        tensors[f"diffusion_model.{name}.lora_A.weight"] = A.to(DTYPE)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = B.to(DTYPE).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def write_original(path: Path, folder: Path, prefix: str = "") -> None:
    """Write the transformer in `folder` as a single file in the original layout (fused qkv, original names).

    `prefix` is put before every key; checkpoints for ComfyUI have `model.diffusion_model.`.
    """
    tensors = _transformer_tensors(folder)
    original: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.to_q." in name:
            parts = [tensors[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            original[prefix + name.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            original[prefix + _original_name(name)] = tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(original, path, metadata={"format": "pt"})


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """(out, in) features of each linear layer of the main blocks, by name."""
    weights = _transformer_tensors(folder)
    names = (f"layers.{layer}.{module}" for layer in range(LAYERS) for module in _PROJECTIONS)
    return {name: (weights[f"{name}.weight"].shape[0], weights[f"{name}.weight"].shape[1]) for name in names}


def _original_name(name: str) -> str:
    for ours, theirs in (
        ("all_x_embedder.2-1.", "x_embedder."),
        ("all_final_layer.2-1.", "final_layer."),
        (".attention.to_out.0.", ".attention.out."),
        (".attention.norm_q.", ".attention.q_norm."),
        (".attention.norm_k.", ".attention.k_norm."),
    ):
        name = name.replace(ours, theirs)
    return name


def _transformer_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def _build_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen's byte-level BPE with 256 bytes and one chain of merges for each word, so that known words are one token."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    # Sorted, because the alphabet comes as a set. A word after a space starts with the byte-level sign for the space.
    tokens = dict.fromkeys(sorted(ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in _TEXT.split():
        spelling = "Ġ" + word
        for end in range(2, len(spelling) + 1):
            merges[spelling[: end - 1], spelling[end - 1]] = None
            tokens[spelling[:end]] = None
    vocab = {token: index for index, token in enumerate([*tokens, *_SPECIAL])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=list(merges), pad_token=_SPECIAL[0], eos_token=_SPECIAL[2], model_max_length=131072
    )
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _build_text_encoder(vocabulary: int, seed: int) -> Qwen3Model:
    """Three layers, of which Z-Image uses the output of the second."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_DIM,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=vocabulary - len(_SPECIAL),
        architectures=["Qwen3Model"],
    )
    model = Qwen3Model(config).eval()
    for name, parameter, draw in _drawn(model, seed, "text"):
        if "norm" in name:
            nn.init.ones_(parameter)
        elif "embed_tokens" in name:
            parameter.copy_(draw)
        else:  # attention and feed-forward add a third each, so that the word itself stays the loudest
            gain = 0.3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.copy_(draw * gain / math.sqrt(parameter.shape[-1]))
    return model


def _build_transformer(seed: int) -> ZImageTransformer2DModel:
    """Variance-preserving weights, gates half open (tanh 0.5), an output of a standard deviation of about one half."""
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=DIM,
        n_layers=LAYERS,
        n_refiner_layers=REFINERS,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[8, 12, 12],  # the real 32, 48, 48, a quarter of it; the sum is the width of a head
        axes_lens=[1024, 512, 512],
    ).eval()
    for name, parameter, draw in _drawn(model, seed, "transformer"):
        if "pad_token" in name:
            parameter.copy_(draw)
        elif name.endswith("adaLN_modulation.0.bias"):  # scale, gate, scale, gate: of attention, then of feed-forward
            parameter.copy_(torch.tensor([0.0, 0.5, 0.0, 0.5]).repeat_interleave(DIM))
        elif "norm" in name or name == "cap_embedder.0.weight":
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            gain = 0.5 if "all_final_layer" in name or "adaLN_modulation" in name else 1.0
            parameter.copy_(draw * gain / math.sqrt(parameter.shape[-1]))
    return model


def _drawn(model: nn.Module, seed: int, part: str) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each parameter with normal numbers of its own, which depend on its name and not on the order of construction."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            yield name, parameter, torch.randn(parameter.shape, generator=generator(seed, "nano zimage", part, name))


_LOUD = 256.0
"""Carried by some channels of the hand-made VAE: it makes a group norm's standard deviation a constant (see below)."""


def _build_vae() -> AutoencoderKL:
    """An AutoencoderKL that computes, exactly: latents = block means and Haar details; decoding = the block means.

    Three stride-2 convolutions average 2 x 2 each; the last also keeps the nine Haar details of the 4 x 4 means.
    Latents 0-2 are the red, green, blue of an 8 x 8 block, 3-11 the details, 12-15 zero, scaled so that pictures have
    latents of about unit variance. The decoder repeats the first three. Residual branches and attention are switched
    off (their last layer is zero). The two unavoidable group norms and SiLUs are undone: with channels (x, -x, k, -k)
    and k = 256 the mean is 0 and the deviation is constant to 1e-4, and silu(y) - silu(-y) = y.
    """
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 16, 32],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        scaling_factor=SCALING,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
        mid_block_add_attention=True,
    ).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        _wire_encoder(model.encoder)
        _wire_decoder(model.decoder)
    return model


_GAINS = [4.0] * 3 + [8.0] * 9
"""Latents before `SCALING` for a block mean and a detail of 1."""


def _wire_encoder(encoder: Encoder) -> None:
    _copy(encoder.conv_in, range(3))
    for block in encoder.down_blocks[:2]:
        for color in range(3):
            block.downsamplers[0].conv.weight[color, color, :2, :2] = 0.25
    _copy(encoder.down_blocks[2].resnets[0].conv_shortcut, range(3))
    haar_4KK = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]) / 4
    for kind in range(4):
        for color in range(3):
            encoder.down_blocks[2].downsamplers[0].conv.weight[3 * kind + color, color, :2, :2] = haar_4KK[kind]
    _pair(encoder.down_blocks[3].resnets[0].conv_shortcut, 12)
    _unpair(encoder.conv_norm_out, encoder.conv_out, _GAINS)
    encoder.conv_out.bias[:16] = SHIFT
    encoder.conv_out.bias[16:] = -20.0  # log variance: posterior samples are the mean


def _wire_decoder(decoder: Decoder) -> None:
    for color in range(3):
        decoder.conv_in.weight[color, color, 1, 1] = 1 / _GAINS[color]
        decoder.conv_in.bias[color] = -SHIFT / _GAINS[color]
    for block in decoder.up_blocks[1:3]:
        _copy(block.resnets[0].conv_shortcut, range(3))
    for block in decoder.up_blocks[:2]:
        _copy(block.upsamplers[0].conv, range(3))
    _pair(decoder.up_blocks[2].upsamplers[0].conv, 3)
    _unpair(decoder.conv_norm_out, decoder.conv_out, [1.0] * 3)


def _copy(conv: nn.Conv2d, channels: range) -> None:
    middle = conv.kernel_size[0] // 2
    for channel in channels:
        conv.weight[channel, channel, middle, middle] = 1.0


def _pair(conv: nn.Conv2d, count: int) -> None:
    """Outputs: `count` channels, their negatives, then the loud channels, half of each sign."""
    middle = conv.kernel_size[0] // 2
    for channel in range(count):
        conv.weight[channel, channel, middle, middle] = 1.0
        conv.weight[count + channel, channel, middle, middle] = -1.0
    loud = torch.tensor([_LOUD, -_LOUD]).repeat((conv.out_channels - 2 * count) // 2)
    conv.bias = nn.Parameter(torch.cat([torch.zeros(2 * count), loud]))


def _unpair(norm: nn.GroupNorm, conv: nn.Conv2d, gains: list[float]) -> None:
    """Undo the norm's division, drop the loud channels, and take the difference of each pair."""
    count = len(gains)
    loud = norm.num_channels - 2 * count
    nn.init.zeros_(norm.weight)
    norm.weight[: 2 * count] = _LOUD * math.sqrt(loud / norm.num_channels)
    for channel, gain in enumerate(gains):
        conv.weight[channel, channel, 1, 1] = gain
        conv.weight[channel, count + channel, 1, 1] = -gain
