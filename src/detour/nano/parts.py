"""Pieces that the miniatures share: words, tokenizers, text encoders, random weights, and a VAE built by hand.

Shapes: O out features, I in features, K kernel positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detour.nn.rng import generator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from transformers import CLIPTokenizer, LlamaTokenizer, PreTrainedModel, T5Tokenizer


def drawn(model: nn.Module, *key: int | str) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each parameter with normal numbers of its own: they depend on `key` and its name, not on the order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            yield name, parameter, torch.randn(parameter.shape, generator=generator(*key, name))


# The words of the drawn dataset and a few of everyday captions; each is one token, anything else is spelt in bytes.
_TEXT = """a an the of on in at to and with photo picture drawing background top bottom left right centre middle corner
red green blue yellow white black orange purple pink brown grey small large tiny big plain striped dotted circle square
triangle cross diamond star ring zig cat dog person style"""
WORDS = tuple(_TEXT.split())


def fill(model: nn.Module, gain: float, *key: int | str) -> None:
    """Variance-preserving random weights: norms are 1, biases 0, matrices normal with deviation gain / sqrt(inputs)."""
    for name, parameter, draw in drawn(model, *key):
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        elif "embed" in name.rpartition(".")[0].rpartition(".")[2] or "shared" in name:  # a table of rows
            parameter.copy_(draw)
        else:
            parameter.copy_(draw * gain / math.sqrt(parameter[0].numel()))


# ------------------------------------------------------------------------------------------------------ tokenizers


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's byte-level BPE with 256 bytes, each also as the end of a word, and a chain of merges for each word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = dict.fromkeys(letters + [f"{letter}</w>" for letter in letters])
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        spelling = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(spelling)):
            left = "".join(spelling[:end])
            merges[left, spelling[end]] = None
            tokens[left + spelling[end]] = None
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate([*tokens, *special])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), pad_token=pad, model_max_length=77)


def t5_tokenizer(length: int) -> T5Tokenizer:
    """T5's unigram model: each word a piece, anything else letter by letter. `length` is its `model_max_length`."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in WORDS if len(word) > 1]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def llama_tokenizer() -> LlamaTokenizer:
    """Llama's BPE with a chain of merges for each word after a space; anything else letter by letter, else in bytes.

    Like the published AuraFlow's it pads on the left, Llama's way, and ends a prompt with `</s>`.
    """
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokens = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"])
    tokens |= dict.fromkeys(chr(code) for code in range(33, 127))
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        spelling = "\u2581" + word
        for end in range(2, len(spelling) + 1):
            merges[spelling[: end - 1], spelling[end - 1]] = None
            tokens[spelling[:end]] = None
    vocab = {token: index for index, token in enumerate(tokens)}
    return LlamaTokenizer(
        vocab=vocab, merges=list(merges), pad_token=special[3], add_bos_token=False, add_eos_token=True
    )


# ---------------------------------------------------------------------------------------------------- text encoders


def clip_text(cls: type[PreTrainedModel], vocabulary: int, *key: int | str, width: int = 32) -> PreTrainedModel:
    """A random `CLIPTextModel` or `CLIPTextModelWithProjection` of three layers."""
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    model = cls(config).eval()
    fill(model, 0.7, *key)
    return model


def t5_encoder(cls: type[PreTrainedModel], vocabulary: int, *key: int | str, width: int = 32) -> PreTrainedModel:
    """A random `T5EncoderModel` or `UMT5EncoderModel` of two layers."""
    config = cls.config_class(
        vocab_size=vocabulary,
        d_model=width,
        d_ff=2 * width,
        d_kv=width // 4,
        num_heads=4,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )
    model = cls(config).eval()
    fill(model, 0.7, *key)
    return model


# -------------------------------------------------------------------------------------------------------------- VAE


_LOUD = 256.0
"""Carried by some channels of the hand-made VAE: it makes a group norm's standard deviation a constant (see below)."""


def build_vae(channels: int, *, scaling: float, shift: float | None, quant_conv: bool = False) -> AutoencoderKL:
    """An AutoencoderKL that computes, exactly: latents = block means and Haar details; decoding = the block means.

    Three stride-2 convolutions average 2 x 2 each; the last also keeps the nine Haar details of the 4 x 4 means.
    Latents 0-2 are the red, green, blue of an 8 x 8 block, then come as many of the details as there is room for, the
    rest is zero; scaled so that pictures have normalised latents of about unit variance. The decoder repeats the first
    three. Residual branches and attention are switched off (their last layer is zero). The two unavoidable group norms
    and SiLUs are undone: with channels (x, -x, k, -k) and k = 256 the mean is 0 and the deviation is constant to 1e-4,
    and silu(y) - silu(-y) = y.
    """
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 16, 32],
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
        force_upcast=True,
        mid_block_add_attention=True,
    ).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        gain = round(_NORMALISED / scaling, 3)
        gains = [gain] * 3 + [2 * gain] * min(9, channels - 3)
        _wire_encoder(model.encoder, gains, channels, shift or 0.0)
        _wire_decoder(model.decoder, gain, shift or 0.0)
        for conv in (model.quant_conv, model.post_quant_conv) if quant_conv else ():
            _copy(conv, range(conv.out_channels))
    return model


_NORMALISED = 1.4444
"""Normalised latent for a block mean of 1; a detail of 1 gives twice that."""


def _wire_encoder(encoder: Encoder, gains: list[float], channels: int, shift: float) -> None:
    _copy(encoder.conv_in, range(3))
    for block in encoder.down_blocks[:2]:
        for color in range(3):
            block.downsamplers[0].conv.weight[color, color, :2, :2] = 0.25
    _copy(encoder.down_blocks[2].resnets[0].conv_shortcut, range(3))
    haar_4KK = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]) / 4
    for kind in range(4):
        for color in range(3):
            encoder.down_blocks[2].downsamplers[0].conv.weight[3 * kind + color, color, :2, :2] = haar_4KK[kind]
    _pair(encoder.down_blocks[3].resnets[0].conv_shortcut, len(gains))
    _unpair(encoder.conv_norm_out, encoder.conv_out, gains)
    encoder.conv_out.bias[:channels] = shift
    encoder.conv_out.bias[channels:] = -20.0  # log variance: posterior samples are the mean


def _wire_decoder(decoder: Decoder, gain: float, shift: float) -> None:
    for color in range(3):
        decoder.conv_in.weight[color, color, 1, 1] = 1 / gain
        decoder.conv_in.bias[color] = -shift / gain
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
