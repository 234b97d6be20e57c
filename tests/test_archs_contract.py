"""What every architecture must do, checked on its miniature against diffusers' own pipeline: see `archs.py`."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from archs import ROWS, Row
from detour import UserError, archs
from detour.archs.base import Framing
from detour.config.job import ModelArch
from detour.sample import Request, denoise, initial_noise, to_frames
from detour.weights import ModelSource, Placement, find_model, materialise

CPU = torch.device("cpu")
PROMPTS = ["a red circle on a blue background", "", "a zig at the left, drawn with a very long description " * 4]
rows = pytest.mark.parametrize("row", ROWS, ids=str, scope="module")


class Loaded:
    """A row's miniature, loaded by this project and by diffusers."""

    def __init__(self, row: Row, folder: Path) -> None:
        row.write(folder)
        self.arch = archs.get(row.name)
        spec = self.arch.spec
        self.source: ModelSource = find_model(str(folder), components=spec.components, denoiser=spec.denoiser)
        self.pipeline = row.load_pipeline(folder)
        self.denoiser = self.load(Placement(torch.float32, CPU))
        self.text = self.arch.load_text_encoders(self.source, Placement(torch.float32, CPU))
        self.vae = self.arch.load_vae(self.source, torch.float32, CPU)
        self.conditions = self.arch.encode_prompts(self.text, PROMPTS)

    def load(self, placement: Placement) -> nn.Module:
        denoiser = self.arch.build_denoiser(self.source)
        assert all(parameter.is_meta for parameter in denoiser.parameters())
        materialise(denoiser, self.arch.denoiser_tensors(self.source), placement, where="miniature")
        return denoiser


@pytest.fixture(scope="module")
def loaded(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(row, tmp_path_factory.mktemp(row.name))


def linears(module: nn.Module, pattern: str) -> list[str]:
    return [
        name for name, inner in module.named_modules() if isinstance(inner, nn.Linear) and re.fullmatch(pattern, name)
    ]


def test_the_table_the_registry_and_the_type_agree() -> None:
    assert [row.name for row in ROWS] == archs.built()
    assert set(archs.built()) <= set(get_args(ModelArch))
    assert len(get_args(ModelArch)) == 15


@pytest.mark.parametrize("name", [name for name in get_args(ModelArch) if name not in {row.name for row in ROWS}])
def test_an_architecture_that_is_not_built_says_so(name: Any) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not built yet; built today: .*zimage"):
        archs.get(name)


@rows
def test_spec_is_complete(row: Row) -> None:
    spec = archs.spec(row.name)
    assert spec.name == row.name
    assert spec.title and spec.licence and spec.modelspec
    assert not spec.modelspec.endswith("/lora")
    assert spec.default_variant in spec.variants
    assert spec.denoiser in spec.components
    assert spec.bucket_divisibility % spec.spatial_factor == 0
    for prefix in (spec.lora_keys.comfy_prefix, spec.lora_keys.diffusers_prefix, spec.lora_keys.kohya_prefix):
        assert prefix.endswith((".", "_"))
    for variant in spec.variants.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+\.safetensors)?", variant.repo)
        assert variant.extras_repo or not variant.repo.endswith(".safetensors"), "a single file lacks the other parts"
        assert variant.steps >= 1 and variant.guidance >= 1
        assert variant.timestep_type in spec.timestep_types
        assert variant.adapter is None or re.fullmatch(r"[\w.-]+/[\w.-]+/[\w./-]+\.safetensors", variant.adapter)
        assert not (variant.adapter and not variant.distilled), "only a distilled model needs a training adapter"


@rows
def test_spec_can_be_listed_without_torch(row: Row) -> None:
    code = (
        f"import sys; from detour import archs; print(archs.spec({row.name!r}).title);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@rows
def test_lora_patterns_name_the_expected_layers(row: Row, loaded: Loaded) -> None:
    spec = loaded.arch.spec
    blocks, everything = linears(loaded.denoiser, spec.lora_blocks), linears(loaded.denoiser, spec.lora_all)
    assert len(blocks) == row.lora_blocks
    assert len(everything) == row.lora_all
    assert set(blocks) < set(everything)
    assert set(everything) == set(linears(loaded.denoiser, ".*")), "lora_all leaves out a linear layer"
    # No module other than a linear layer may be named: an adapter method would choke on it.
    assert len(blocks) == sum(bool(re.fullmatch(spec.lora_blocks, name)) for name, _ in loaded.denoiser.named_modules())
    excluded = linears(loaded.denoiser, spec.quantize_exclude)
    assert excluded and not set(excluded) & set(blocks)


@rows
def test_published_size_and_lora_patterns_there(row: Row) -> None:
    spec = archs.spec(row.name)
    with torch.device("meta"):
        full = row.full_size()
    assert sum(parameter.numel() for parameter in full.parameters()) == row.full_parameters
    assert len(linears(full, spec.lora_blocks)) == row.full_lora_blocks
    assert set(linears(full, spec.lora_all)) == set(linears(full, ".*"))


@rows
def test_weights_equal_the_pipelines_and_are_frozen(loaded: Loaded) -> None:
    theirs = getattr(loaded.pipeline, loaded.arch.spec.denoiser).state_dict()
    ours = loaded.denoiser.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(buffer.is_meta for buffer in loaded.denoiser.buffers())
    vae = loaded.pipeline.vae.state_dict()
    assert all(torch.equal(tensor, vae[name]) for name, tensor in loaded.vae.state_dict().items())
    for module in (loaded.denoiser, loaded.vae):
        assert not module.training
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())


@rows
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_draws_what_the_pipeline_draws(row: Row, loaded: Loaded, size: tuple[int, int]) -> None:
    """Prompt, noise, grid, convention of time and sign, guidance and decoding at once, bit for bit."""
    spec = loaded.arch.spec
    guidance = row.guidances[size != (64, 64)]
    request = Request(
        prompt=PROMPTS[0], negative="a cat", seed=7, width=size[0], height=size[1], steps=4, guidance=guidance
    )
    theirs = row.draw(loaded.pipeline, request, spec)
    scheduler = loaded.arch.load_scheduler(loaded.source)
    conditions = loaded.arch.encode_prompts(loaded.text, request.prompts(spec))
    ours = denoise(loaded.arch, loaded.denoiser, scheduler, initial_noise(spec, request), request, conditions)
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert off <= row.tolerance, off
    assert ours.std() > 0.1
    (picture,) = to_frames(loaded.arch, loaded.vae, ours)
    assert picture.size == size


@rows
def test_the_true_field_leads_back_to_the_clean_picture(row: Row, loaded: Loaded) -> None:
    spec = loaded.arch.spec
    request = Request(prompt="", seed=3, width=64, height=96, steps=5)
    noise = initial_noise(spec, request)
    assert noise.shape == (1, *spec.latent_shape(64, 96))
    clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(4))
    truth = row.native_truth(clean, noise)
    scheduler = loaded.arch.load_scheduler(loaded.source)
    ours = denoise(loaded.arch, truth, scheduler, noise, request, loaded.conditions[:1])
    torch.testing.assert_close(ours, clean, atol=row.recovers, rtol=row.recovers)
    if spec.objective == "flow":
        told = loaded.conditions[0] | loaded.arch.picture_condition(Framing.whole(64, 96), 1.0)
        field = loaded.arch.predict(truth, noise, torch.ones(1), [told])
        torch.testing.assert_close(field, noise - clean)


@rows
def test_pictures_to_latents_and_back(loaded: Loaded) -> None:
    spec = loaded.arch.spec
    shape = (2, 3, 64, 96) if spec.frame_factor is None else (2, 3, 1, 64, 96)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = loaded.arch.encode_images(loaded.vae, pixels)
    assert latents.shape == (2, *spec.latent_shape(96, 64))
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert torch.equal(latents, loaded.arch.encode_images(loaded.vae, pixels)), "the mean of the posterior has no noise"
    decoded = loaded.arch.decode(loaded.vae, latents)
    assert decoded.shape == pixels.shape and decoded.dtype == torch.float32
    low = loaded.arch.load_vae(loaded.source, torch.bfloat16, CPU)
    assert loaded.arch.encode_images(low, pixels).dtype == loaded.arch.decode(low, latents).dtype == torch.float32


@rows
def test_prompts_are_left_alone_and_do_not_depend_on_each_other(loaded: Loaded) -> None:
    prompts = list(PROMPTS)
    together = loaded.arch.encode_prompts(loaded.text, prompts)
    assert prompts == PROMPTS
    for prompt, condition in zip(PROMPTS, together, strict=True):
        (alone,) = loaded.arch.encode_prompts(loaded.text, [prompt])
        assert alone.keys() == condition.keys()
        assert all(torch.equal(alone[name], condition[name]) for name in alone)
        assert all(not tensor.requires_grad for tensor in condition.values())
    assert not all(torch.equal(together[0][name], together[2][name][: len(together[0][name])]) for name in together[0])


@rows
def test_prediction_is_float32_and_lets_gradients_through(loaded: Loaded) -> None:
    spec = loaded.arch.spec
    denoiser = loaded.load(Placement(torch.bfloat16, CPU))
    shape = (2, *spec.latent_shape(64, 64))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    told = loaded.arch.picture_condition(Framing.whole(64, 64), None)
    one, two = (loaded.conditions[index] | told for index in (0, 2))
    field = loaded.arch.predict(denoiser, latents, torch.tensor([0.2, 0.9]), [one] * 2)
    assert field.shape == latents.shape and field.dtype == torch.float32
    field.square().mean().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    early = loaded.arch.predict(denoiser, latents, torch.tensor([0.9, 0.9]), [one] * 2)
    assert not torch.equal(early[0], field[0]), "time has no effect"
    other = loaded.arch.predict(denoiser, latents, torch.tensor([0.2, 0.9]), [two] * 2)
    assert not torch.equal(other, field), "the prompt has no effect"


@rows
def test_guidance_of_one_changes_nothing(row: Row, loaded: Loaded) -> None:
    positive, negative = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.equal(loaded.arch.guided(positive, negative, 1.0), positive)
    expected = negative + 3.0 * (positive - negative)
    if row.guidance_keeps_length:
        expected *= positive.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(loaded.arch.guided(positive, negative, 3.0), expected)
