"""AuraFlow on its miniature, against diffusers: what the contract suite does not cover."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from detour import UserError, export, nano
from detour.archs.auraflow import ARCHS, SPEC
from detour.config.job import NetworkConfig
from detour.export.reading import read_lora
from detour.nn import lora
from detour.nn.rng import generator
from detour.weights import ModelSource, Placement, find_model, materialise

CPU = torch.device("cpu")
ARCH = ARCHS["auraflow"]
PROMPTS = ["a red circle on a blue background", "", "a red circle at the left, " * 60, "ein Käfer 虫 🐞 </s>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auraflow")
    nano.write(path, "auraflow", random=True)
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    return find_model(str(folder), components=SPEC.components, denoiser=SPEC.denoiser)


@pytest.fixture(scope="module")
def denoiser(source: ModelSource) -> nn.Module:
    module = ARCH.build_denoiser(source)
    materialise(module, ARCH.denoiser_tensors(source), Placement(torch.float32, CPU), where="miniature")
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(folder: Path, source: ModelSource, dtype: torch.dtype) -> None:
    """Their padding is zeros, on the left, where this tokenizer pads."""
    from diffusers import AuraFlowPipeline

    pipeline = AuraFlowPipeline.from_pretrained(folder, dtype=dtype)
    text = ARCH.load_text_encoders(source, Placement(dtype, CPU))
    for prompt, condition in zip(PROMPTS, ARCH.encode_prompts(text, PROMPTS), strict=True):
        with torch.no_grad():
            tokens, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert condition["tokens_LD"].shape == (256, 32) and condition["tokens_LD"].dtype == dtype
        assert torch.equal(condition["tokens_LD"], tokens[0])
        mask_L = mask.reshape(256, -1)[:, 0]
        assert mask_L[-1] == 1 and not condition["tokens_LD"][mask_L == 0].any()


def test_any_batch_has_its_own_times(source: ModelSource, denoiser: nn.Module) -> None:
    """Other trainers tell the whole batch the time of its first picture, or take batches of one alone."""
    conditions = ARCH.encode_prompts(ARCH.load_text_encoders(source, Placement(torch.float32, CPU)), PROMPTS)
    latents, t = torch.randn(4, 4, 8, 12, generator=generator(0, "z")), torch.tensor([0.05, 0.4, 0.7, 1.0])
    with torch.no_grad():
        together = ARCH.predict(denoiser, latents, t, conditions)
        alone = [ARCH.predict(denoiser, latents[i:][:1], t[i:][:1], conditions[i:][:1]) for i in range(4)]
        same = ARCH.predict(denoiser, latents, t[:1].expand(4), conditions)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[1:], same[1:], atol=1e-2)
    with pytest.raises(ValueError, match="4 pictures, 3 conditions"):
        ARCH.predict(denoiser, latents, t, conditions[:3])


def test_the_model_is_told_the_very_time_that_the_pipeline_tells(source: ModelSource, denoiser: nn.Module) -> None:
    scheduler = ARCH.load_scheduler(source)
    told: list[torch.Tensor] = []
    handle = denoiser.time_step_embed.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    conditions = [{"tokens_LD": torch.zeros(256, 32)}]
    try:
        for steps in (1, 4, 9):
            ARCH.set_timesteps(scheduler, steps, (2, 2), CPU)
            for timestep in scheduler.timesteps:
                ARCH.predict(denoiser, torch.zeros(1, 4, 2, 2), (timestep.double() / 1000).expand(1), conditions)
                assert torch.equal(told[-1], torch.tensor([timestep / 1000]))
    finally:
        handle.remove()


def test_the_grid_is_the_pipelines(source: ModelSource) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    ours, reference = ARCH.load_scheduler(source), FlowMatchEulerDiscreteScheduler(shift=1.73)
    reference.set_timesteps(50, device=CPU)
    ARCH.set_timesteps(ours, 50, (128, 96), CPU)
    assert torch.equal(ours.timesteps, reference.timesteps) and torch.equal(ours.sigmas, reference.sigmas)
    assert ARCH.load_scheduler(ModelSource("none")).shift == SPEC.shift == 1.73


def test_a_picture_beyond_its_positions_is_refused(denoiser: nn.Module) -> None:
    """The model itself would draw it: with the positions at the other end of each row."""
    conditions = [{"tokens_LD": torch.zeros(256, 32)}]
    with torch.no_grad():
        denoiser(torch.zeros(1, 4, 8, 66), conditions[0]["tokens_LD"][None], timestep=torch.ones(1))
    with pytest.raises(UserError, match="528 x 64 pixels: this AuraFlow has positions for sides of up to 512 pixels"):
        ARCH.predict(denoiser, torch.zeros(1, 4, 8, 66), torch.ones(1), conditions)
    with torch.no_grad():
        ARCH.predict(denoiser, torch.zeros(1, 4, 8, 64), torch.ones(1), conditions)


def test_the_wrong_files_are_named(folder: Path, source: ModelSource, tmp_path: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="AuraFlow is not read from a single file; give a folder"):
        ARCH.build_denoiser(ModelSource("one", single_file=file, extras=source))
    nano.write(tmp_path / "sigma", "pixart_sigma", random=True)
    other = find_model(str(tmp_path / "sigma"), components=SPEC.components, denoiser=SPEC.denoiser)
    with pytest.raises(UserError, match="a PixArtTransformer2DModel, where the architecture has a AuraFlowTransformer"):
        ARCH.build_denoiser(other)
    path = shutil.copytree(folder, tmp_path / "lost")
    shutil.rmtree(path / "vae")
    with pytest.raises(UserError, match=r"there is no vae/ in"):
        find_model(str(path), components=SPEC.components, denoiser=SPEC.denoiser)
    pair = {"lora_A.weight": torch.zeros(2, 4), "lora_B.weight": torch.zeros(4, 2)}
    save_file(
        {f"transformer.transformer_blocks.0.attn2.to_q.{part}": one for part, one in pair.items()}, tmp_path / "l"
    )
    with pytest.raises(UserError, match=r"not a \.safetensors file"):
        read_lora(tmp_path / "l", SPEC)
    (tmp_path / "l").rename(tmp_path / "l.safetensors")
    with pytest.raises(UserError, match="not a LoRA of AuraFlow: it looks like PixArt"):
        read_lora(tmp_path / "l.safetensors", SPEC)


def test_one_file_serves_comfyui_and_diffusers(denoiser: nn.Module, source: ModelSource, tmp_path: Path) -> None:
    """diffusers refuses alpha beside these names; without, ComfyUI takes alpha = rank. The scale is in the weights."""
    network, file = NetworkConfig(linear=4, linear_alpha=1), tmp_path / "lora.safetensors"
    shapes = export.layer_shapes(denoiser)
    names = [name for name in shapes if name.endswith(("attn.to_q", "ff.linear_1"))]
    tensors = {
        f"{name}.{part}": torch.randn(size, generator=generator(2, name, part))
        for name in names
        for part, size in (("lora_A.weight", (4, shapes[name][1])), ("lora_B.weight", (shapes[name][0], 4)))
    }
    given = export.from_training(tensors, network)
    proof = export.write_lora(file, given, export.Base.of(denoiser, SPEC), "comfy", dtype="fp32", metadata={}).proof
    assert proof.loader == "diffusers.loaders.AuraFlowLoraLoaderMixin"
    stored = load_file(file)
    assert all(key.startswith("transformer.") and key.endswith(".weight") for key in stored)
    for name in names:
        added = stored[f"transformer.{name}.lora_B.weight"] @ stored[f"transformer.{name}.lora_A.weight"]
        expected = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] / 4
        torch.testing.assert_close(added, expected)
    assert lora.linear_names(denoiser, SPEC, network)[0] in shapes
