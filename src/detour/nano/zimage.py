"""A complete random Z-Image in miniature, in the folder layout of the real one: 1.4 M parameters, 3 MB in bf16.

Every part is of the real class (transformer, Qwen3, AutoencoderKL, Qwen2 tokenizer, flow scheduler), so that whatever
works on it has gone through the same code as the 6 B model. Nothing is trained, but nothing is arbitrary either:
the transformer is scaled so that every block takes part and a LoRA can make the loss fall; the text encoder keeps its
word embeddings apart; the VAE is built by hand and gives back exact 8 x 8 block means (`parts.build_vae`).

Files are a pure function of the seed, byte for byte; the global random state is left as it was.
Shapes: O out features, I in features.
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
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import ZImageTransformer2DModel
    from transformers import PreTrainedTokenizerBase, Qwen3Model

DTYPE = torch.bfloat16  # what the published weights are stored in
LAYERS, REFINERS, DIM, HEADS, TEXT_DIM = 3, 1, 96, 3, 64  # feed-forward: 96 / 3 * 8 = 256
SCALING, SHIFT = 0.3611, 0.1159  # of the real VAE
_PROJECTIONS = (
    "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
    "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0",
)  # fmt: skip
"""The linear layers of a main block: the published training adapters hold a pair for each of them."""

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


def write(folder: Path, arch: str = "zimage", variant: str = "", *, seed: int = 0) -> None:
    """Write the miniature into `folder` in the diffusers layout, ready for `from_pretrained`.

    Its variants are of one structure.
    """
    if arch != "zimage" or variant not in ("", "turbo", "base", "deturbo"):
        raise UserError(f"detour nano: {arch}:{variant} is not known here; allowed: zimage and its variants")
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights, all of which are replaced
        tokenizer = build_tokenizer()
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
            vae=parts.build_vae(16, scaling=SCALING, shift=SHIFT).to(DTYPE),
            text_encoder=_build_text_encoder(len(tokenizer), seed).to(DTYPE),
            tokenizer=tokenizer,
            transformer=_build_transformer(seed).to(DTYPE),
        )
    with without_bars():
        pipeline.save_pretrained(folder)


def write_adapter(path: Path, folder: Path, rank: int = 4, seed: int = 0, scale: float = 0.1) -> None:
    """Write a random training adapter for the miniature in `folder`, under the names of the published ones."""
    from detour.nano import adapter

    adapter.write_adapter(path, "zimage", folder, prefix="diffusion_model.", rank=rank, seed=seed, scale=scale)


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


_SPACED = tuple(f" {word}" for word in parts.WORDS)


def build_tokenizer(words: Sequence[str] = _SPACED) -> PreTrainedTokenizerBase:
    """Qwen's byte-level BPE with 256 bytes and one chain of merges for each word, so that known words are one token.

    A word is known as it is written in `words`: with a space before it, or without.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    # Sorted, because the alphabet comes as a set. "Ġ" is the byte-level sign for the space.
    tokens = dict.fromkeys(sorted(ByteLevel.alphabet()))
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        spelling = word.replace(" ", "Ġ")
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
    for name, parameter, draw in parts.drawn(model, "nano zimage", seed, "text"):
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
    for name, parameter, draw in parts.drawn(model, "nano zimage", seed, "transformer"):
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
