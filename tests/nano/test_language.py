"""The language of the drawn world: words are tokens, captions come out as the architecture encodes them."""

import pytest
import torch

from detour import archs
from detour.archs.parts import TextModels
from detour.nano import concepts, language, world
from detour.nano.recipes import miniature


@pytest.fixture(scope="module")
def captions() -> language.Captions:
    tokenizer = language.build_tokenizer()
    return language.Captions(tokenizer, language.build_text_encoder(tokenizer))


def texts() -> list[str]:
    told = [world.caption(scene, index % world.FORMS) for index, scene in enumerate(world.scenes(60))]
    return told + [example.caption for name in concepts.CONCEPTS for example in concepts.examples(name)]


def test_every_word_is_one_token(captions: language.Captions) -> None:
    for text in texts():
        tokens = captions.tokenizer.tokenize(text)
        words = text.replace(",", " ,").split()
        assert [token.removeprefix("Ġ") for token in tokens] == words
    chat = captions.tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert len(captions.tokenizer(chat).input_ids) == 8
    for text in ("Überraschung 🐞", "a striking zigzag"):
        assert captions.tokenizer.decode(captions.tokenizer(text).input_ids) == text


def test_a_caption_is_its_words_and_words_are_orthogonal(captions: language.Captions) -> None:
    tokens_BLD, padding_BL = captions(texts())
    assert tokens_BLD.shape[1:] == (language.TOKENS, language.WIDTH)
    real = tokens_BLD[~padding_BL]
    torch.testing.assert_close(real.square().mean(dim=1), torch.ones(len(real)), atol=1e-3, rtol=0)
    words = torch.unique(real, dim=0)
    alike = (words @ words.T) / language.WIDTH - torch.eye(len(words))
    assert len(words) > 30 and alike.abs().max() < 1e-3
    assert not tokens_BLD[padding_BL].any()


def test_a_batch_is_encoded_as_the_architecture_does_one_by_one(captions: language.Captions) -> None:
    arch = archs.get("zimage")
    mixed = ["", *texts()[:3], texts()[-1], texts()[-1]]
    encoders = TextModels({"text_encoder": captions.model}, {"tokenizer": captions.tokenizer})
    tokens_BLD, padding_BL = captions(mixed)
    for index, condition in enumerate(arch.encode_prompts(encoders, mixed)):
        torch.testing.assert_close(tokens_BLD[index, ~padding_BL[index]], condition["tokens_LD"], atol=1e-6, rtol=0)
    assert tokens_BLD.equal(captions(mixed)[0]), "the same again, from what is kept"


def test_a_caption_that_is_too_long_is_refused(captions: language.Captions) -> None:
    with pytest.raises(ValueError, match="32 tokens"):
        captions(["a small word " * 12])


def test_the_encoder_is_a_function_of_the_seed() -> None:
    tokenizer = language.build_tokenizer()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (language.build_text_encoder(tokenizer, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    assert miniature.EMPTY == ""
