"""A complete random Lumina Image 2.0 in miniature, in the folder layout of the real one: 1.7 MB in bf16.

Every part is of the real class (transformer, Gemma 2, AutoencoderKL, Gemma's tokenizer, flow scheduler). Attention has
three heads for each of keys and values, as the real one (24 for 8). The transformer is scaled so that every block takes
part and a LoRA can make the loss fall; the text encoder keeps its word embeddings apart.

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour import UserError
from detour.archs.lumina2 import SPEC, SYSTEM_PROMPT
from detour.nano import parts
from detour.nn.quiet import without_bars

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import Lumina2Transformer2DModel
    from transformers import Gemma2Model, GemmaTokenizer

DTYPE = torch.bfloat16
LAYERS, REFINERS, DIM, HEADS, KV_HEADS, TEXT_DIM = 3, 1, 72, 3, 1, 48  # heads of 24: three axes of 8
SCALING, SHIFT = 0.3611, 0.1159  # of the real VAE
_SPACE = "\u2581"
"""What Gemma's tokenizer makes of a space. It puts none before the first word."""


def write(folder: Path, arch: str = "lumina2", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout, ready for `from_pretrained`."""
    if arch != "lumina2" or variant not in ("", *SPEC.variants):
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: lumina2 and its variants")
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer = build_tokenizer()
        pipeline = Lumina2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=6.0),
            vae=parts.build_vae(16, scaling=SCALING, shift=SHIFT).to(DTYPE),
            text_encoder=_build_text_encoder(len(tokenizer), seed).to(DTYPE),
            tokenizer=tokenizer,
            transformer=_build_transformer(seed).to(DTYPE),
        )
    tokenizer.padding_side = "left"  # as published; the pipeline has just set it to right
    with without_bars():
        pipeline.save_pretrained(folder)


def write_original(path: Path, folder: Path, prefix: str = "") -> None:
    """Write the transformer in `folder` as a single file in the original layout (fused qkv, original names).

    `prefix` is put before every key; checkpoints for ComfyUI have `model.diffusion_model.`.
    """
    layout = SPEC.lora_keys.original
    assert layout is not None
    tensors: dict[str, Tensor] = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    original: dict[str, Tensor] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        there = layout.origin(module)
        held = layout.find(there)
        layers = (module,) if held is None else held.layers
        original[f"{prefix}{there}.{part}"] = torch.cat([tensors[f"{layer}.{part}"] for layer in layers])
    original[f"{prefix}norm_final.weight"] = torch.ones(DIM, dtype=DTYPE)  # used by nobody, there in the published file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(original, path, metadata={"format": "pt"})


def build_tokenizer() -> GemmaTokenizer:
    """Gemma's BPE with byte fallback: each word behind a space is a token, anything else is spelt in letters or bytes.

    A chain of merges for each word, begun by the sign for the space, so that no other word's merges break it up.
    """
    from transformers import GemmaTokenizer

    tokens = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokens |= dict.fromkeys([f"<0x{byte:02X}>" for byte in range(256)])
    tokens |= dict.fromkeys([_SPACE, *(chr(code) for code in range(33, 127))])
    merges: dict[tuple[str, str], None] = {}
    for word in dict.fromkeys([*parts.WORDS, *SYSTEM_PROMPT.split()]):
        spelling = _SPACE + word
        for end in range(2, len(spelling) + 1):
            merges[spelling[: end - 1], spelling[end - 1]] = None
            tokens[spelling[:end]] = None
    vocab = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=list(merges), add_bos_token=True, model_max_length=8192)


def _build_text_encoder(vocabulary: int, seed: int) -> Gemma2Model:
    """Four layers, of which Lumina uses the output of the third; every other one has a sliding window, as in Gemma."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_DIM,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=4096,
        max_position_embeddings=8192,
        architectures=["Gemma2Model"],
    )
    model = Gemma2Model(config).eval()
    for name, parameter, draw in parts.drawn(model, "nano lumina2", seed, "text"):
        if "norm" in name:  # they scale by 1 + weight: what a layer adds is halved, so that words stay apart
            parameter.fill_(-0.5 if "post" in name else 0.0)
        elif "embed_tokens" in name:  # multiplied by sqrt(hidden_size)
            parameter.copy_(draw / math.sqrt(TEXT_DIM))
        else:
            parameter.copy_(draw / math.sqrt(parameter.shape[-1]))
    return model


def _build_transformer(seed: int) -> Lumina2Transformer2DModel:
    """Variance-preserving weights, gates half open (tanh 0.5), an output of a standard deviation of about one half."""
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        in_channels=16,
        hidden_size=DIM,
        num_layers=LAYERS,
        num_refiner_layers=REFINERS,
        num_attention_heads=HEADS,
        num_kv_heads=KV_HEADS,
        multiple_of=32,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 512, 512),
        cap_feat_dim=TEXT_DIM,
    ).eval()
    for name, parameter, draw in parts.drawn(model, "nano lumina2", seed, "transformer"):
        if name.endswith("norm1.linear.bias"):  # scale, gate, scale, gate: of attention, then of feed-forward
            parameter.copy_(torch.tensor([0.0, 0.5, 0.0, 0.5]).repeat_interleave(DIM))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:  # norms; with those of queries and keys at 1.5 attention makes a choice
            parameter.fill_(1.5 if "norm_q" in name or "norm_k" in name else 1.0)
        else:
            gain = 0.5 if "norm_out" in name else 1.0
            parameter.copy_(draw * gain / math.sqrt(parameter.shape[-1]))
    return model
