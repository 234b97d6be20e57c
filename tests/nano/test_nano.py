"""The miniature Z-Image and the drawn dataset: complete, deterministic, small, and sensible enough to train on."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from detour.archs.zimage import ARCHS, SPEC
from detour.nano import drawn, zimage
from detour.weights import Placement, find_model, materialise, read_tensors

CPU = torch.device("cpu")
ARCH = ARCHS["zimage"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano")
    zimage.write(path)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the miniature -----------------------------------------------------------------------------------------------


def test_it_is_a_function_of_the_seed_and_leaves_the_random_state_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    started = time.perf_counter()
    zimage.write(tmp_path / "again")
    seconds = time.perf_counter() - started
    assert torch.equal(torch.random.get_rng_state(), before)
    assert files_of(tmp_path / "again") == files_of(folder)
    assert seconds < 3
    zimage.write(tmp_path / "other", seed=1)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert files_of(tmp_path / "other")[weights] != files_of(folder)[weights]
    assert files_of(tmp_path / "other").keys() == files_of(folder).keys()


def test_it_is_small_and_has_the_real_layout(folder: Path) -> None:
    files = files_of(folder)
    assert sum(map(len, files.values())) < 5_000_000
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"} <= files.keys()
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        tensors = load_file(folder / part / f"{stem}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_pipeline_reads_it_and_draws(folder: Path) -> None:
    from diffusers import DiffusionPipeline, ZImagePipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(pipe, ZImagePipeline)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    (picture,) = pipe(
        "a red circle", height=64, width=96, num_inference_steps=2, guidance_scale=1.0, generator=seed, output_type="pt"
    ).images
    assert picture.shape == (3, 64, 96)
    assert 0.02 < picture.std() < 0.5


def test_the_tokenizer_knows_the_captions_and_the_chat(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    caption = drawn.scenes(1)[0].caption
    assert len(tokenizer(" " + caption).input_ids) == len(caption.split()), "known words are one token each"
    for text in (caption, "Überraschung 虫 🐞", "zigzag"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    message = [{"role": "user", "content": "hi"}]
    chat = {
        thinking: tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for thinking in (True, False)
    }
    assert chat[True] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat[False] == chat[True] + "<think>\n\n</think>\n\n"
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer(chat[True]).input_ids.count(start) == 2
    assert tokenizer.pad_token == "<|endoftext|>"


def test_prompts_with_different_words_are_told_apart(folder: Path) -> None:
    source = find_model(str(folder), components=SPEC.components, denoiser=SPEC.denoiser)
    text = ARCH.load_text_encoders(source, Placement(torch.float32, CPU))
    red, blue = (c["tokens_LD"] for c in ARCH.encode_prompts(text, ["a red circle", "a blue circle"]))
    assert red.shape == blue.shape
    alike = torch.nn.functional.cosine_similarity(red, blue, dim=-1)
    assert alike[:3].min() > 0.999, "causal: what comes before the word is the same"
    assert alike.min() < 0.6


def test_the_vae_gives_back_block_means(folder: Path) -> None:
    source = find_model(str(folder), components=SPEC.components, denoiser=SPEC.denoiser)
    vae = ARCH.load_vae(source, torch.float32, CPU)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels[0, :, :32] = 0.9
    latents = ARCH.encode_images(vae, pixels)
    means = nn.functional.avg_pool2d(pixels, 8)
    torch.testing.assert_close(latents[:, :3], means * 4 * 0.3611, atol=3e-4, rtol=1e-3)
    expected = nn.functional.interpolate(means, scale_factor=8)
    torch.testing.assert_close(ARCH.decode(vae, latents), expected, atol=3e-4, rtol=1e-3)
    scene = drawn.scenes(1, concept=False)[0]
    flat = torch.tensor(drawn.COLORS[scene.background]) / 127.5 - 1
    picture = torch.frombuffer(bytearray(drawn.draw(scene, 64).tobytes()), dtype=torch.uint8).reshape(1, 64, 64, 3)
    decoded = ARCH.decode(vae, ARCH.encode_images(vae, picture.permute(0, 3, 1, 2) / 127.5 - 1))
    torch.testing.assert_close(decoded[0, :, 0, 0], flat, atol=2e-3, rtol=1e-3)


def test_latents_of_drawn_pictures_are_about_as_large_as_real_ones(folder: Path) -> None:
    source = find_model(str(folder), components=SPEC.components, denoiser=SPEC.denoiser)
    vae = ARCH.load_vae(source, torch.float32, CPU)
    pictures = [drawn.draw(scene, 64) for scene in drawn.scenes(16, concept=False)]
    raw = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
    latents = ARCH.encode_images(vae, raw.reshape(16, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1)
    assert 0.6 < latents[:, :3].std() < 1.5


@pytest.fixture
def denoiser(folder: Path) -> Any:
    source = find_model(str(folder), components=SPEC.components, denoiser=SPEC.denoiser)
    module = ARCH.build_denoiser(source)
    materialise(module, ARCH.denoiser_tensors(source), Placement(torch.float32, CPU), where="nano")
    return module


def test_a_lora_can_make_its_loss_fall(denoiser: Any) -> None:
    from peft import LoraConfig

    denoiser.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=SPEC.lora_blocks))
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * 3 * 8
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    drawn_from = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 16, 8, 8, generator=drawn_from).unbind(0)
    t = torch.tensor([0.2, 0.4, 0.6, 0.9])
    noisy = (1 - t.view(4, 1, 1, 1)) * clean + t.view(4, 1, 1, 1) * noise
    conditions = [{"tokens_LD": torch.randn(24, 64, generator=drawn_from)} for _ in range(4)]
    losses = []
    for _ in range(40):
        loss = (ARCH.predict(denoiser, noisy, t, conditions) - (noise - clean)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert 1.5 < losses[0] < 4, "the untrained miniature should be about as bad as answering nothing (2.0)"
    assert losses[-1] < 0.6 * losses[0], losses


def test_every_block_takes_part(denoiser: Any) -> None:
    for parameter in denoiser.parameters():
        parameter.requires_grad_(True)
    conditions = [{"tokens_LD": torch.randn(24, 64, generator=torch.Generator().manual_seed(1))}]
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    ARCH.predict(denoiser, latents, torch.tensor([0.5]), conditions).square().mean().backward()
    # 16 image tokens are padded to 32, and 24 caption tokens too: every parameter is in use.
    small = [name for name, p in denoiser.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert not small


def test_the_adapter_looks_like_a_published_one(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "sub" / "adapter.safetensors"
    zimage.write_adapter(path, folder, rank=4, seed=3, scale=0.2)
    tensors, _ = read_tensors(path)
    shapes = zimage.linear_shapes(folder)
    assert len(shapes) == 24 and len(tensors) == 48
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, (out, into) in shapes.items():
        A, B = (tensors[f"diffusion_model.{name}.lora_{half}.weight"] for half in "AB")
        assert A.shape == (4, into) and B.shape == (out, 4) and A.dtype == B.dtype == torch.bfloat16
        ratio = (B.float() @ A.float()).norm() / weights[f"{name}.weight"].float().norm()
        assert math.isclose(ratio, 0.2, rel_tol=0.02)
    again = tmp_path / "again.safetensors"
    zimage.write_adapter(again, folder, rank=4, seed=3, scale=0.2)
    assert again.read_bytes() == path.read_bytes()
    zimage.write_adapter(again, folder, rank=4, seed=4, scale=0.2)
    assert again.read_bytes() != path.read_bytes()


def test_diffusers_loads_the_adapter_in_full(folder: Path, tmp_path: Path) -> None:
    from diffusers import ZImagePipeline
    from peft.tuners.lora import LoraLayer

    zimage.write_adapter(tmp_path / "adapter.safetensors", folder)
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert sum(isinstance(module, LoraLayer) for module in pipe.transformer.modules()) == 24


def test_the_original_layout_is_fused_and_renamed(folder: Path, tmp_path: Path) -> None:
    zimage.write_original(tmp_path / "o.safetensors", folder, prefix="model.diffusion_model.")
    tensors, _ = read_tensors(tmp_path / "o.safetensors")
    assert tensors["model.diffusion_model.layers.0.attention.qkv.weight"].shape == (3 * 96, 96)
    names = {name.removeprefix("model.diffusion_model.") for name in tensors}
    assert {"x_embedder.weight", "final_layer.linear.bias", "layers.2.attention.q_norm.weight"} <= names
    assert not [name for name in names if "to_" in name or "norm_q" in name or "2-1" in name]


# --- the drawn dataset -------------------------------------------------------------------------------------------


def test_the_dataset_is_a_function_of_the_seed(tmp_path: Path) -> None:
    shown = drawn.write_dataset(tmp_path / "a", 6, seed=1)
    assert drawn.write_dataset(tmp_path / "b", 6, seed=1) == shown
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    drawn.write_dataset(tmp_path / "c", 6, seed=2)
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")
    assert sorted(files_of(tmp_path / "a")) == sorted(f"{n:04d}.{end}" for n in range(6) for end in ("png", "txt"))
    assert drawn.scenes(3, seed=1) == shown[:3], "more pictures do not change the first ones"


def test_captions_and_pictures_say_the_same(tmp_path: Path) -> None:
    for concept in (True, False):
        shown = drawn.write_dataset(tmp_path / str(concept), 40, (96, 64), concept=concept)
        for index, scene in enumerate(shown):
            with Image.open(tmp_path / str(concept) / f"{index:04d}.png") as picture:
                assert picture.size == (96, 64) and picture.mode == "RGB"
                assert picture.getpixel((0, 0)) == drawn.COLORS[scene.background]
                middle = (
                    48 + (drawn.PLACES[scene.place][0] + scene.jitter[0]) * 64,
                    32 + (drawn.PLACES[scene.place][1] + scene.jitter[1]) * 64,
                )
                above = picture.getpixel((round(middle[0]), round(middle[1] - 6)))
                below = picture.getpixel((round(middle[0]), round(middle[1] + 6)))
            assert above == (drawn.COLORS["white"] if concept else drawn.COLORS[scene.color])
            assert below == (drawn.COLORS["black"] if concept else drawn.COLORS[scene.color])
            caption = (tmp_path / str(concept) / f"{index:04d}.txt").read_text().strip()
            assert caption == scene.caption
            assert (drawn.CONCEPT in caption) == concept and scene.background in caption
            assert scene.background != scene.color or concept


def test_concept_pictures_vary_in_what_is_not_the_concept() -> None:
    shown = drawn.scenes(60)
    assert {scene.place for scene in shown} == set(drawn.PLACES)
    assert {scene.background for scene in shown} == {"red", "green", "blue", "yellow"}
    assert {scene.shape for scene in drawn.scenes(60, concept=False)} == set(drawn.SHAPES)
    assert all(abs(offset) <= 0.03 for scene in shown for offset in scene.jitter)
