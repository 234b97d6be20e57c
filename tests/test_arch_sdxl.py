"""Stable Diffusion XL and its kin on their miniatures, against diffusers: what the contract suite does not cover.

Where the UNet's blocks do not matter it is Vega's miniature, which is the fastest.
"""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from archs import ROWS
from detour import UserError, archs, export
from detour.archs.base import Framing
from detour.archs.sdxl import ARCHS, SPECS
from detour.archs.unet_names import ORIGINAL
from detour.config.job import NetworkConfig, TrainProcess
from detour.data import cache
from detour.lora_formats import LoraFile, module_key, to_format, unsupported
from detour.nano import drawn
from detour.nano import sdxl as nano
from detour.nn.training_adapter import linear_shapes
from detour.sample import Request, denoise, initial_noise
from detour.train import build, encoders
from detour.weights import ModelSource, Placement, find_model, materialise
from miniature import Recorder

CPU = torch.device("cpu")
NAMES = ("sdxl", "vega", "ssd")
PROMPTS = ["a red circle", "zig", "a red circle on a blue background " * 40, "ein Käfer 虫 🐞"]
VEGA = ARCHS["vega"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("nano")
    for name in NAMES:
        nano.write(root / name, name)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["vega"]


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    return find(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def unet(source: ModelSource) -> nn.Module:
    return load(source)


def find(path: str, name: str = "vega", extras: Path | None = None) -> ModelSource:
    spec = SPECS[name]
    return find_model(path, components=spec.components, denoiser="unet", extras=str(extras) if extras else None)


def load(source: ModelSource, name: str = "vega", dtype: torch.dtype = torch.float32) -> nn.Module:
    unet = ARCHS[name].build_denoiser(source)
    assert all(parameter.is_meta for parameter in unet.parameters())
    materialise(unet, ARCHS[name].denoiser_tensors(source), Placement(dtype, CPU), where="miniature")
    return unet


def edited(folder: Path, to: Path, file: str, **changes: object) -> ModelSource:
    """A copy of the miniature with entries of one of its JSON files changed."""
    path = shutil.copytree(folder, to) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return ModelSource("edited", folder=to)


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def everything(source: ModelSource, name: str = "vega") -> list[nn.Module]:
    """UNet, VAE and both encoders."""
    text = ARCHS[name].load_text_encoders(source, Placement(torch.float32, CPU))
    return [load(source, name), ARCHS[name].load_vae(source, torch.float32, CPU), *text.models.values()]


# --- checkpoints in one file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_all_in_one_file_gives_the_same_model(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    nano.write(tmp_path / "other", name, seed=1)
    nano.write_original(tmp_path / "all.safetensors", folders[name])
    whole = everything(find(str(folders[name]), name), name)
    single = everything(find(str(tmp_path / "all.safetensors"), name, tmp_path / "other"), name)
    assert [same(one, other) for one, other in zip(single, whole, strict=True)] == [True] * 4
    shapes_tell = ("block_out_channels", "transformer_layers_per_block", "mid_block_type", "up_block_types")
    for key in (*shapes_tell, "attention_head_dim", "projection_class_embeddings_input_dim", "cross_attention_dim"):
        ours, theirs = (unet.config[key] for unet in (single[0], whole[0]))
        if key == "transformer_layers_per_block":  # said once for all, or of blocks without attention too
            ours, theirs = ours[1:], theirs[1:]
        assert ours == theirs, key


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_file_with_the_unet_alone_takes_the_rest_from_the_extras(
    folder: Path, unet: nn.Module, tmp_path: Path, prefix: str
) -> None:
    nano.write_original(tmp_path / "unet.safetensors", folder, bundled=False)
    stored = load_file(tmp_path / "unet.safetensors")
    save_file(
        {prefix + k.removeprefix("model.diffusion_model."): t for k, t in stored.items()}, tmp_path / "u.safetensors"
    )
    nano.write(tmp_path / "other", "vega", seed=1)
    parts = everything(find(str(tmp_path / "u.safetensors"), extras=tmp_path / "other"))
    rest = everything(find(str(tmp_path / "other")))
    assert same(parts[0], unet) and not same(rest[0], unet)
    assert [same(one, other) for one, other in zip(parts[1:], rest[1:], strict=True)] == [True] * 3


def test_a_file_in_the_diffusers_layout_gives_the_same_model(folder: Path, unet: nn.Module) -> None:
    """As SDXL-Lightning's and Hyper-SD's are."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert same(load(find(str(file), extras=folder)), unet)


def test_what_converters_and_old_programs_leave_in_a_file(folder: Path, tmp_path: Path) -> None:
    nano.write_original(tmp_path / "a.safetensors", folder)
    tensors = load_file(tmp_path / "a.safetensors")
    second = "conditioner.embedders.1.model."
    tensors[f"{second}text_projection.weight"] = tensors.pop(f"{second}text_projection").T.contiguous()
    tensors[f"{second}logit_scale"] = torch.ones(())
    tensors[f"{second}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["first_stage_model.loss.logvar"] = torch.ones(())
    tensors["denoiser.sigmas"] = torch.ones(1000)
    save_file(tensors, tmp_path / "b.safetensors")
    one, other = (everything(find(str(tmp_path / f"{file}.safetensors"), extras=folder)) for file in "ab")
    assert [same(a, b) for a, b in zip(one, other, strict=True)] == [True] * 4


@functools.cache
def full(name: str) -> nn.Module:
    with torch.device("meta"):
        return next(row for row in ROWS if row.name == name).full_size()


@pytest.mark.parametrize("name", NAMES)
def test_the_published_unets_are_known_by_their_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the full size, as if in a file: the same structure, heads included, and no other of the three."""
    shapes = {key: tuple(tensor.shape) for key, tensor in full(name).state_dict().items()}
    monkeypatch.setattr("detour.weights.tensor_shapes", lambda files: shapes)
    file = ModelSource("the file", single_file=Path("x.safetensors"))
    unet = ARCHS[name].build_denoiser(file)
    assert {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()} == shapes
    attentions = [module for module in unet.modules() if type(module).__name__ == "Attention"]
    assert {module.inner_dim // module.heads for module in attentions} == {64}
    other = NAMES[NAMES.index(name) - 1]
    with pytest.raises(UserError, match=rf"the file: this is the UNet of .*; set model\.arch: {name}$"):
        ARCHS[other].build_denoiser(file)


# --- wrong models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"addition_embed_type": None}, "not told the picture's size, .*set model.arch: sd1 or sd2"),
        ({"addition_time_embed_dim": 4}, "told 64 numbers besides six for sizes, .*gives 40.*refiner"),
        ({"in_channels": 9}, "takes 9 channels, as inpainting"),
        ({"time_cond_proj_dim": 16}, "told the guidance scale"),
        ({"_class_name": "UNet2DModel"}, "this is a UNet2DModel"),
    ],
)
def test_other_unets_are_refused(folder: Path, tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        VEGA.build_denoiser(edited(folder, tmp_path / "other", "unet/config.json", **changes))


def test_the_unet_of_another_of_the_three_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"UNet of Segmind SSD-1B, not of Stable Diffusion XL; set model\.arch: ssd"):
        ARCHS["sdxl"].build_denoiser(ModelSource("ssd", folder=folders["ssd"]))
    with pytest.raises(UserError, match=r"UNet of Segmind Vega, not of Segmind SSD-1B; set model\.arch: vega"):
        ARCHS["ssd"].build_denoiser(ModelSource("vega", folder=folders["vega"]))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"looks like a checkpoint of FLUX, not of Stable Diffusion XL"):
        ARCHS["sdxl"].build_denoiser(ModelSource("flux", single_file=tmp_path / "flux.safetensors"))
    lora = {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight": torch.ones(2, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors: this is a LoRA, not a checkpoint of"):
        ARCHS["sdxl"].build_denoiser(ModelSource("lora", single_file=tmp_path / "lora.safetensors"))
    save_file({"add_embedding.linear_1.weight": torch.ones(2, 2)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"not a checkpoint of Stable Diffusion XL; .*is it the whole model"):
        ARCHS["sdxl"].build_denoiser(ModelSource("part", single_file=tmp_path / "part.safetensors"))


def test_a_file_with_something_else_in_its_unet_is_refused(folder: Path, tmp_path: Path) -> None:
    nano.write_original(tmp_path / "a.safetensors", folder, bundled=False)
    tensors = load_file(tmp_path / "a.safetensors") | {"model.diffusion_model.adapter.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"1 tensors of its UNet are not Segmind Vega's, such as .*adapter\.weight"):
        VEGA.build_denoiser(find(str(tmp_path / "b.safetensors"), extras=folder))
    del tensors["model.diffusion_model.adapter.weight"], tensors["model.diffusion_model.label_emb.0.2.bias"]
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"label_emb\.0\.2\.bias.* is missing"):
        VEGA.build_denoiser(find(str(tmp_path / "c.safetensors"), extras=folder))


def test_a_missing_folder_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(shutil.copytree(folder, tmp_path / "other") / "text_encoder_2")
    with pytest.raises(UserError, match=r"there is no text_encoder_2/ in"):
        find(str(tmp_path / "other"))


def test_a_vae_with_a_mean_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    wrong = edited(folder, tmp_path / "other", "vae/config.json", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(UserError, match="Playground"):
        VEGA.load_vae(wrong, torch.float32, CPU)


# --- VAE and text encoders -------------------------------------------------------------------------------------------


def test_the_vae_stays_in_float32_unless_it_need_not(folder: Path, tmp_path: Path) -> None:
    assert VEGA.load_vae(ModelSource("x", folder=folder), torch.bfloat16, CPU).dtype == torch.float32
    sound = edited(folder, tmp_path / "fixed", "vae/config.json", force_upcast=False)
    assert VEGA.load_vae(sound, torch.bfloat16, CPU).dtype == torch.bfloat16


def test_folders_with_older_names_give_the_same_model(folder: Path, source: ModelSource, tmp_path: Path) -> None:
    """Published encoders have a prefix and a buffer; VAEs before 2023 other names of attention."""
    old = shutil.copytree(folder, tmp_path / "old")
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        file = old / part / f"{stem}.safetensors"
        renamed = {}
        for name, tensor in load_file(file).items():
            older = name if part == "vae" else f"text_model.{name}"
            for new, former in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                older = older.replace(f".{new}.", f".{former}.")
            renamed[older] = tensor.clone()
        if part == "text_encoder":
            renamed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(renamed, file)
    assert any(".query." in name for name in load_file(old / "vae" / "diffusion_pytorch_model.safetensors"))
    one, other = everything(source), everything(ModelSource("old", folder=old))
    assert [same(a, b) for a, b in zip(one, other, strict=True)] == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(source: ModelSource, folder: Path, dtype: torch.dtype) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype)
    text = VEGA.load_text_encoders(source, Placement(dtype, CPU))
    for prompt in PROMPTS:
        (ours,) = VEGA.encode_prompts(text, [prompt])
        tokens, without, pooled, pooled_without = pipe.encode_prompt(prompt)
        assert torch.equal(ours["tokens_LD"], tokens[0]) and torch.equal(ours["pooled_D"], pooled[0])
    (empty,) = VEGA.encode_prompts(text, [""])
    assert torch.equal(empty["tokens_LD"], without[0]) and torch.equal(empty["pooled_D"], pooled_without[0])
    assert ours["tokens_LD"].shape == (77, sum(nano.TEXT_DIMS)) and ours["pooled_D"].shape == (nano.TEXT_DIMS[1],)
    assert ours["tokens_LD"].dtype == dtype and not empty["tokens_LD"].any()


def test_an_empty_prompt_is_embedded_where_the_model_says_so(folder: Path, source: ModelSource, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    other = edited(folder, tmp_path / "other", "model_index.json", force_zeros_for_empty_prompt=False)
    text = VEGA.load_text_encoders(other, Placement(torch.float32, CPU))
    (empty,) = VEGA.encode_prompts(text, [""])
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "other", dtype=torch.float32)
    _, tokens, _, pooled = pipe.encode_prompt("a cat")
    assert torch.equal(empty["tokens_LD"], tokens[0]) and torch.equal(empty["pooled_D"], pooled[0])
    assert empty["tokens_LD"].any()
    # What decides it goes into the cache's key.
    spec = VEGA.spec
    assert [s.options(spec.options) for s in (source, other)] == [
        {next(iter(spec.options)): yes} for yes in (True, False)
    ]
    file = ModelSource("file", single_file=Path("x"), extras=other)
    assert file.options(spec.options) == other.options(spec.options)
    (tmp_path / "other" / "model_index.json").unlink()
    assert other.options(spec.options) == source.options(spec.options)
    (tmp_path / "other" / "model_index.json").write_text("[")
    with pytest.raises(UserError, match=r"model_index\.json: not a readable index"):
        other.options(spec.options)


def test_what_decides_it_is_part_of_the_caches_key(folder: Path, tmp_path: Path) -> None:
    drawn.write_dataset(tmp_path / "data", n=1, size=64)
    edited(folder, tmp_path / "other", "model_index.json", force_zeros_for_empty_prompt=False)
    keys = []
    for model in (folder, tmp_path / "other"):
        process = {
            "type": "train", "device": "cpu", "model": {"arch": "vega", "name_or_path": str(model)},
            "datasets": [{"folder_path": str(tmp_path / "data"), "resolution": 64}],
        }  # fmt: skip
        inputs = build.gather(archs.resolve(TrainProcess.model_validate(process)), Recorder())
        keys.append(encoders.Models(inputs, cache.Store(tmp_path / "cache"), torch.float32).keys)
    assert keys[0].vae == keys[1].vae
    assert keys[0].text != keys[1].text


# --- prediction ------------------------------------------------------------------------------------------------------


def test_the_model_is_told_size_and_crop_as_the_pipeline_tells_them(pipeline: Any) -> None:
    framing = Framing(original=(1920, 1080), crop=(17, 5), size=(1344, 768))
    (ours,) = VEGA.picture_condition(framing, None).values()
    theirs = pipeline._get_add_time_ids(
        (1080, 1920), (5, 17), (768, 1344), dtype=torch.float32, text_encoder_projection_dim=nano.TEXT_DIMS[1]
    )
    assert torch.equal(ours, theirs[0])
    assert ours.tolist() == [1080, 1920, 5, 17, 768, 1344]


def test_all_that_the_model_is_told_has_an_effect(unet: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([0.5])
    tokens = torch.randn(77, sum(nano.TEXT_DIMS), generator=generator)
    pooled = torch.randn(nano.TEXT_DIMS[1], generator=generator)
    plain = {"tokens_LD": tokens, "pooled_D": pooled, "sizes_6": torch.tensor([64.0, 64, 0, 0, 64, 64])}
    out = VEGA.predict(unet, latents, t, [plain])
    for name, tensor in plain.items():
        other = plain | {name: tensor + 1}
        assert not torch.equal(VEGA.predict(unet, latents, t, [other]), out), name
    both = VEGA.predict(unet, latents.expand(2, -1, -1, -1), t.expand(2), [plain, plain | {"sizes_6": torch.ones(6)}])
    torch.testing.assert_close(both[:1], out, atol=1e-5, rtol=1e-5)
    assert (both[1] - both[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="1 pictures, 2 conditions"):
        VEGA.predict(unet, latents, t, [plain, plain])


class Listening(nn.Module):
    """Stands in for the UNet and notes the levels that it is given."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[Tensor] = []

    def forward(self, latents: Tensor, level: Tensor, **_: Any) -> Any:
        self.levels.append(level)
        return (latents,)


def test_levels_are_whole_in_training_and_the_schedulers_own_in_sampling() -> None:
    from diffusers import EulerDiscreteScheduler

    listening, latents = Listening(), torch.zeros(1, 4, 2, 2)
    told = {"tokens_LD": torch.zeros(77, 2), "pooled_D": torch.zeros(1), "sizes_6": torch.zeros(6)}
    levels = torch.arange(1000)
    for level in levels:
        VEGA.predict(listening, latents, (level.float() / 1000).reshape(1), [told])
    assert torch.equal(torch.cat(listening.levels), levels.float())
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace", use_karras_sigmas=True)
    scheduler.set_timesteps(13)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()
    listening.levels.clear()
    for timestep in scheduler.timesteps:
        VEGA.predict(listening, latents, torch.full((1,), float(timestep) / 1000, dtype=torch.float64), [told])
    assert torch.equal(torch.cat(listening.levels), scheduler.timesteps)


# --- drawing ---------------------------------------------------------------------------------------------------------


def latents_of(
    source: ModelSource, unet: nn.Module, request: Request, changes: dict[str, object] | None = None
) -> Tensor:
    scheduler = VEGA.load_scheduler(source, changes)
    text = VEGA.load_text_encoders(source, Placement(torch.float32, CPU))
    conditions = VEGA.encode_prompts(text, request.prompts(VEGA.spec))
    return denoise(VEGA, unet, scheduler, initial_noise(VEGA.spec, request), request, conditions)


def expected(pipeline: Any, request: Request, **options: Any) -> Tensor:
    latents: Tensor = pipeline(
        prompt=request.prompt, width=request.width, height=request.height, guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed), output_type="latent",
        **({"num_inference_steps": request.steps} | options),
    ).images  # fmt: skip
    return latents


def test_an_empty_negative_prompt_is_none(source: ModelSource, unet: nn.Module, pipeline: Any) -> None:
    request = Request(prompt="a red circle", seed=2, width=72, height=88, steps=3, guidance=6.0)
    ours = latents_of(source, unet, request)
    assert torch.equal(ours, expected(pipeline, request))
    assert not torch.equal(ours, expected(pipeline, request, negative_prompt=""))


VARIANTS = SPECS["sdxl"].variants


@pytest.mark.parametrize(
    ("variant", "levels"),
    [
        ("base", [751, 501, 251, 1]),
        ("lightning", [999, 749, 499, 249]),
        ("hyper", [800]),
        ("turbo", [999, 749, 499, 249]),
    ],
)
def test_the_variants_are_drawn_at_their_levels(
    folder: Path, source: ModelSource, unet: nn.Module, pipeline: Any, variant: str, levels: list[int], tmp_path: Path
) -> None:
    """As their pages say: base and lightning with Euler's steps, hyper from level 800, turbo with ancestral steps."""
    import diffusers

    changes = dict(VARIANTS[variant].scheduler)
    if variant == "turbo":  # its own folder has it
        source = edited(
            folder, tmp_path / "turbo", "scheduler/scheduler_config.json",
            _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing",
        )  # fmt: skip
    steps = 4 if variant == "base" else VARIANTS[variant].steps
    request = Request(prompt="a red circle", seed=3, width=64, height=64, steps=steps)
    scheduler = VEGA.load_scheduler(source, changes)
    VEGA.set_timesteps(scheduler, steps, (8, 8), CPU)
    assert scheduler.timesteps.tolist() == levels
    given, options = dict(pipeline.scheduler.config), {}
    if variant == "hyper":
        theirs, options = diffusers.LCMScheduler.from_config(given), {"timesteps": [800], "num_inference_steps": None}
    elif variant == "turbo":
        theirs = diffusers.EulerAncestralDiscreteScheduler.from_config(given, timestep_spacing="trailing")
    else:
        spacing = "trailing" if variant == "lightning" else "leading"
        theirs = diffusers.EulerDiscreteScheduler.from_config(given, timestep_spacing=spacing)
    parts = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    pipe = diffusers.StableDiffusionXLPipeline(**parts, scheduler=theirs)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(source, unet, request, changes), expected(pipe, request, **options))


def test_a_grid_between_the_levels_is_drawn_as_the_pipeline_does(
    folder: Path, unet: nn.Module, pipeline: Any, tmp_path: Path
) -> None:
    import diffusers

    settings = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    source = edited(folder, tmp_path / "karras", "scheduler/scheduler_config.json", **settings)
    parts = dict(pipeline.components)
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(parts["scheduler"].config, **settings)
    pipe = diffusers.StableDiffusionXLPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    request = Request(prompt="a red circle", seed=4, width=64, height=64, steps=3, guidance=4.0)
    assert torch.equal(latents_of(source, unet, request), expected(pipe, request))


def test_distilled_variants_say_so() -> None:
    distilled = {name: variant.steps for name, variant in VARIANTS.items() if variant.distilled}
    assert distilled == {"turbo": 4, "lightning": 4, "hyper": 1}
    assert all(VARIANTS[name].guidance == 1 for name in distilled)
    alone = [variant for variant in VARIANTS.values() if variant.repo.endswith(".safetensors")]
    assert len(alone) == 2 and all(variant.extras_repo == VARIANTS["base"].repo for variant in alone)


# --- LoRA files ------------------------------------------------------------------------------------------------------


def lora_of(unet: nn.Module, pattern: str, kind: str = "lora", rank: int = 2) -> LoraFile:
    """A random LoRA on the layers of a pattern."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, (rows, columns) in linear_shapes(unet).items():
        if re.fullmatch(pattern, name):
            tensors[f"{name}.lora_A.weight"] = 0.2 * torch.randn(rank, columns, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.2 * torch.randn(rows, rank, generator=generator)
            if kind == "dora":
                tensors[f"{name}.lora_magnitude_vector"] = 1 + 0.1 * torch.rand(rows, generator=generator)
    return export.from_training(tensors, NetworkConfig(type=kind, linear=rank, linear_alpha=1))


@pytest.mark.parametrize(("name", "fmt"), [("vega", "comfy"), ("vega", "diffusers"), ("sdxl", "kohya")])
def test_every_layer_goes_through_every_format(folders: dict[str, Path], tmp_path: Path, name: str, fmt: Any) -> None:
    """Embedders too, whose names only the original layout has in a way that diffusers reads."""
    unet = ARCHS[name].build_denoiser(ModelSource(name, folder=folders[name]))
    spec, lora = SPECS[name], lora_of(unet, SPECS[name].lora_all)
    base = export.Base(spec=spec, shapes=linear_shapes(unet))
    written = export.write_lora(tmp_path / "l.safetensors", lora, base, fmt, dtype=None, metadata={})
    assert written.proof.loader == "diffusers.loaders.StableDiffusionXLLoraLoaderMixin"
    assert written.proof.modules == len(linear_shapes(unet))
    for shapes in (linear_shapes(unet), None):
        back = export.read_lora(tmp_path / "l.safetensors", spec, shapes)
        assert back.alphas == lora.alphas
        assert all(torch.equal(back.tensors[key], tensor) for key, tensor in lora.tensors.items())


def test_names_of_the_original_layout_and_of_diffusers_mean_the_same(unet: nn.Module, tmp_path: Path) -> None:
    spec, lora = VEGA.spec, lora_of(unet, VEGA.spec.lora_blocks)
    layer = "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_out.0"
    kohya = "lora_unet_output_blocks_2_1_transformer_blocks_1_attn2_to_out_0"
    assert module_key(layer, spec, "kohya") == module_key(layer, spec, "comfy") == kohya
    assert module_key(layer, spec, "diffusers") == f"unet.{layer}"
    assert ORIGINAL.origin("add_embedding.linear_2") == "label_emb.0.2"
    found = []
    for names in (str, ORIGINAL.origin):
        for prefix in ("lora_unet_", "lycoris_"):
            file = {}
            for key, tensor in lora.tensors.items():
                module, _, part = key.removesuffix(".weight").rpartition(".")
                stem = prefix + names(module).replace(".", "_")
                file[f"{stem}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
                file[f"{stem}.alpha"] = torch.tensor(1.0)
            save_file(file, tmp_path / "k.safetensors")
            found.append(export.read_lora(tmp_path / "k.safetensors", spec, linear_shapes(unet)))
    for back in found:
        assert (back.ranks, back.alphas) == (lora.ranks, lora.alphas)
        assert all(torch.equal(back.tensors[key], tensor) for key, tensor in lora.tensors.items())


def test_what_diffusers_refuses_is_refused_here() -> None:
    spec = SPECS["sdxl"]
    cannot = [(kind, fmt) for kind in ("lora", "dora", "lokr", "loha") for fmt in ("comfy", "diffusers", "kohya")
              if unsupported(kind, fmt, spec)]  # fmt: skip
    assert cannot == [("dora", "kohya"), ("lokr", "diffusers"), ("loha", "diffusers")]


def test_a_lora_of_another_of_the_three_is_refused(folders: dict[str, Path], unet: nn.Module, tmp_path: Path) -> None:
    ssd = ARCHS["ssd"].build_denoiser(ModelSource("ssd", folder=folders["ssd"]))
    lora = lora_of(ssd, SPECS["ssd"].lora_blocks)
    save_file(to_format(lora, SPECS["ssd"], "comfy")[0], tmp_path / "ssd.safetensors")
    with pytest.raises(UserError, match="not a LoRA of Segmind Vega: it looks like Stable Diffusion XL"):
        export.read_lora(tmp_path / "ssd.safetensors", VEGA.spec, linear_shapes(unet))


def test_the_header_says_what_a1111_sorts_loras_by(unet: nn.Module) -> None:
    lora, versions = lora_of(unet, VEGA.spec.lora_blocks), {}
    for name in NAMES:
        process = {"type": "train", "model": {"arch": name}, "datasets": [{"folder_path": "x"}]}
        resolved = archs.resolve(TrainProcess.model_validate(process))
        header = export.describe(lora, SPECS[name], export.Origin(title="t", process=resolved, step=1))
        assert header["modelspec.architecture"] == f"{SPECS[name].modelspec}/lora" and "ss_v2" not in header
        versions[name] = header["ss_base_model_version"]
    assert versions == {"sdxl": "sdxl_base_v1-0", "vega": "sdxl_vega", "ssd": "sdxl_ssd-1b"}
