"""The language of the drawn world: the tokenizer and the text encoder of the trained miniature, of the real classes.

The Qwen3 encoder is wired, not trained: its attention and feed-forward layers add nothing (their last matrices are
zero), so that a caption becomes the embeddings of its words, and the words' embeddings are orthogonal. The transformer
reads word order by its own positions. That worked at once where a random encoder was never tried against it; training
the encoder means letting those two matrices of each layer go from zero, together with the base.

A prompt in Qwen's chat format is 24 tokens at most here, so that every caption is padded to 32 by the transformer, and
a picture's 8 tokens have room before it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detour.nano import parts, zimage
from detour.nn.picture_tokens import COUNT, picture_tokens
from detour.nn.rng import generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase, Qwen3Model

WIDTH = 128
TOKENS = 32
RARE = ("zig", "plim", "mip")
"""Trigger words of the concept sets: tokens that pre-training never sees."""
_MORE = ("style",)


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen's tokenizer: each word of the world is a token, and each role of the chat."""
    spaced = dict.fromkeys([*parts.WORDS, *RARE, *_MORE])
    return zimage.build_tokenizer([*(f" {word}" for word in spaced), "user", "assistant", "on"])


def build_text_encoder(tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Qwen3Model:
    """Three layers, of which Z-Image uses the output of the second: here the embeddings themselves, of mean square 1.

    The 128 tokens that captions are made of (words, roles, signs, single letters) have orthogonal embeddings; the other
    bytes and the unfinished words have random ones.
    """
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, all of which are replaced
        model = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                picture_tokens=COUNT,  # of ours: how many a picture is, for the denoisers that are trained beside it
                architectures=["Qwen3Model"],
            )
        ).eval()
    for name, parameter, draw in parts.drawn(model, "nano language", seed):
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        else:
            parameter.copy_(draw if "embed_tokens" in name else draw / math.sqrt(parameter.shape[-1]))
    drawn = torch.randn(WIDTH, WIDTH, generator=generator("nano language", seed, "orthogonal"))
    with torch.no_grad():
        model.embed_tokens.weight[_common(tokenizer)] = torch.linalg.qr(drawn)[0] * math.sqrt(WIDTH)
    return model.requires_grad_(False)


def _common(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The 128 tokens most likely in a caption: whole words and the chat's signs first, then printable characters."""
    words = [f"Ġ{word}" for word in dict.fromkeys([*parts.WORDS, *RARE, *_MORE])]
    signs = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ċ", ",", "Ġ", "user", "assistant", "on"]
    letters = [chr(code) for code in (*range(97, 123), *range(48, 58), *range(65, 91), *range(33, 48))]
    chosen = list(dict.fromkeys([*words, *signs, *letters]))[:WIDTH]
    return list(tokenizer.convert_tokens_to_ids(chosen))


class Captions:
    """Encodes batches of captions as the architecture does one by one, to rounding (tests/nano/test_language.py).

    Each caption is encoded once and kept: all captions of the world together take 150 MB.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: Qwen3Model) -> None:
        self.tokenizer, self.model = tokenizer, model
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions as tokens_BLD of length 32, and where they are padding. ValueError if one is longer."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= dict(zip(new, self._encode(new), strict=True))
        tokens_BLD = torch.zeros(len(texts), TOKENS, WIDTH)
        padding_BL = torch.ones(len(texts), TOKENS, dtype=torch.bool)
        for index, text in enumerate(texts):
            length = len(self._known[text])
            tokens_BLD[index, :length], padding_BL[index, :length] = self._known[text], False
        return tokens_BLD, padding_BL

    def _encode(self, texts: Sequence[str]) -> list[Tensor]:
        chats = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for text in texts
        ]
        inputs = self.tokenizer(chats, padding="longest", return_tensors="pt")
        mask_BL = inputs.attention_mask.bool()
        if mask_BL.shape[1] > TOKENS:
            longest = texts[int(mask_BL.sum(dim=1).argmax())]
            raise ValueError(f"the recipes take captions of {TOKENS} tokens, not of {mask_BL.shape[1]}: {longest!r}")
        with torch.no_grad():
            out = self.model(input_ids=inputs.input_ids, attention_mask=mask_BL, output_hidden_states=True)
        return [tokens[mask].clone() for tokens, mask in zip(out.hidden_states[-2], mask_BL, strict=True)]


def with_pictures(condition: tuple[Tensor, Tensor], latents_BCHW: Tensor, shown_B: Tensor) -> tuple[Tensor, Tensor]:
    """Encoded captions with the tokens of a picture before them, for those that `shown_B` says."""
    tokens_BLD, padding_BL = condition
    if not bool(padding_BL[shown_B, -COUNT:].all()):
        raise ValueError(f"a caption of more than {TOKENS - COUNT} tokens has no room for a picture's")
    told_BLD = torch.cat([picture_tokens(latents_BCHW), tokens_BLD[:, :-COUNT]], dim=1)
    absent_BL = torch.cat([torch.zeros_like(padding_BL[:, :COUNT]), padding_BL[:, :-COUNT]], dim=1)
    tokens_BLD = torch.where(shown_B[:, None, None], told_BLD, tokens_BLD)
    return tokens_BLD, torch.where(shown_B[:, None], absent_BL, padding_BL)
