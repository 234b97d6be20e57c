"""FLUX.1, Flex.1 and Flex.2 on their miniatures: what the contract suite does not cover because it is theirs alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour import UserError, archs, export
from detour.archs import flux_parts
from detour.archs.base import Framing
from detour.archs.flux import ARCHS, FLEX1, FLEX2, FLUX
from detour.config.job import NetworkConfig, TrainConfig, TrainProcess
from detour.config.load import load_job
from detour.data.cache import Keys, Store
from detour.draw import Drawing, draw
from detour.lora_formats import unsupported
from detour.nano import adapter as nano_adapter
from detour.nano import drawn
from detour.nano import flux as nano
from detour.nn.adapter_file import read_adapter
from detour.nn.fused import put_together
from detour.nn.training_adapter import linear_shapes
from detour.sample import Request, denoise, initial_noise
from detour.train import build, encoders
from detour.train.objective import Task
from detour.train.timesteps import draw_times
from detour.weights import ModelSource, Placement, find_model, materialise
from miniature import Recorder, run
from rows_flux import flex2_pipeline

CPU = torch.device("cpu")
WHOLE = Framing.whole(64, 64)
LONG = "a red circle on a blue background " * 120
PROMPTS = ["a red circle on a blue background", "", LONG, "ein Käfer 虫"]
KINDS = ("flux", "flux:schnell", "flex1", "flex2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind.replace(":", "-")) for kind in KINDS}
    for kind, folder in found.items():
        nano.write(folder, *kind.split(":"))
    return found


def source_of(folder: Path) -> ModelSource:
    return find_model(str(folder), components=FLUX.components, denoiser=FLUX.denoiser)


def load(name: str, source: ModelSource, dtype: torch.dtype = torch.float32) -> Any:
    denoiser = ARCHS[name].build_denoiser(source)
    materialise(denoiser, ARCHS[name].denoiser_tensors(source), Placement(dtype, CPU), where="miniature")
    return denoiser


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def pipeline_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- where the weights come from ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "prefix"), [*((kind, "") for kind in KINDS), ("flux", "model.diffusion_model.")])
def test_an_original_single_file_gives_the_same_model(
    folders: dict[str, Path], tmp_path: Path, kind: str, prefix: str
) -> None:
    name, folder = kind.partition(":")[0], folders[kind]
    nano.write_original(tmp_path / "original.safetensors", folder, prefix=prefix)
    file = find_model(
        str(tmp_path / "original.safetensors"), components=FLUX.components, denoiser="transformer", extras=str(folder)
    )
    other, denoiser = load(name, file), load(name, source_of(folder))
    assert same_weights(other, denoiser)
    decided = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    decided += ("out_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope")
    assert {key: other.config[key] for key in decided} == {
        key: list(value) if isinstance(value := denoiser.config[key], tuple) else value for key in decided
    }


def test_a_single_file_in_the_diffusers_layout_and_one_with_more_parts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    denoiser = load("flux", source_of(folders["flux"]))
    plain = folders["flux"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert same_weights(load("flux", ModelSource("plain", single_file=plain)), denoiser)
    nano.write_original(tmp_path / "part.safetensors", folders["flux"], prefix="model.diffusion_model.")
    rest = {"vae.encoder.conv_in.weight": torch.ones(2), "text_encoders.clip_l.x.weight": torch.ones(2)}
    save_file(load_file(tmp_path / "part.safetensors") | rest, tmp_path / "all.safetensors")
    assert same_weights(load("flux", ModelSource("all", single_file=tmp_path / "all.safetensors")), denoiser)


def thin_checkpoint() -> dict[str, Tensor]:
    """The tensors of a FLUX.1 dev of one block of each kind, with one input feature: as long as real ones, but thin.

    diffusers' converter knows the published width alone, 3072.
    """
    dim, drawn = 3072, torch.Generator().manual_seed(0)
    rows = {f"{part}_in.{layer}": dim for part in ("time", "vector", "guidance") for layer in ("in_layer", "out_layer")}
    rows |= {"img_in": dim, "txt_in": dim, "final_layer.linear": 64, "final_layer.adaLN_modulation.1": 2 * dim}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        rows |= {f"{block}_mod.lin": 6 * dim, f"{block}_attn.qkv": 3 * dim, f"{block}_attn.proj": dim}
        rows |= {f"{block}_mlp.0": 4 * dim, f"{block}_mlp.2": dim}
    rows |= {
        "single_blocks.0.modulation.lin": 3 * dim,
        "single_blocks.0.linear1": 7 * dim,
        "single_blocks.0.linear2": dim,
    }
    found = {f"{name}.weight": torch.randn(n, 1, generator=drawn) for name, n in rows.items()}
    found |= {f"{name}.bias": torch.randn(n, generator=drawn) for name, n in rows.items()}
    norms = ["double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm"]
    names = [f"{norm}.{kind}_norm.scale" for norm in norms for kind in ("query", "key")]
    return found | {name: torch.randn(128, generator=drawn) for name in names}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_names_and_values_become_what_diffusers_makes_of_them(prefix: str) -> None:
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    checkpoint = {prefix + name: tensor for name, tensor in thin_checkpoint().items()}
    ours: dict[str, Tensor] = {}
    for name, tensor in checkpoint.items():
        ours |= dict(flux_parts.ORIGINAL.tensors(name, tensor))
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert ours.keys() == theirs.keys() and len(ours) == len(checkpoint) + 2 * (2 + 2 + 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight"], "looks like a checkpoint of Stable Diffusion 1 or 2, not"),
        (["all_x_embedder.2-1.weight"], "looks like a checkpoint of Z-Image, not of FLUX.1"),
        (["double_blocks.0.img_attn.qkv.weight"], "not a checkpoint of FLUX.1; .* is it the whole model"),
        (["x"], "not a checkpoint of FLUX.1"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path: Path, names: list[str], says: str) -> None:
    save_file({name: torch.ones(3, 2) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=rf"other\.safetensors: .*{says}"):
        ARCHS["flux"].build_denoiser(ModelSource("other", single_file=tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("name", "kind", "hint"), [("flux", "flex2", "Flex.2"), ("flex2", "flex1", "FLUX.1 or Flex.1")]
)
def test_a_relative_is_told_by_its_channels(folders: dict[str, Path], name: str, kind: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"takes (196|64) channels for each token, where .* looks like {hint}"):
        ARCHS[name].build_denoiser(source_of(folders[kind]))


def test_another_variant_is_told_by_its_config(folders: dict[str, Path]) -> None:
    configs = {kind: dict(load(kind.partition(":")[0], source_of(folders[kind])).config) for kind in KINDS}
    archs.check_variant(FLUX, "dev", configs["flux"])
    archs.check_variant(FLUX, "schnell", configs["flux:schnell"])
    archs.check_variant(FLEX1, "alpha", configs["flex1"])
    archs.check_variant(FLEX2, "preview", configs["flex2"])
    with pytest.raises(
        UserError, match=r"not FLUX\.1 dev \(guidance_embeds is False\); .*set model\.arch: flux:schnell"
    ):
        archs.check_variant(FLUX, "dev", configs["flux:schnell"])
    with pytest.raises(UserError, match=r"not Flex\.1 alpha \(num_layers is 2\)$"):
        archs.check_variant(FLEX1, "alpha", configs["flux"])


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_component_of_another_model_and_a_missing_one_are_refused(
    folders: dict[str, Path], tmp_path: Path, part: str
) -> None:
    other = shutil.copytree(folders["flux"], tmp_path / "other")
    config = json.loads((other / part / "config.json").read_text())
    (other / part / "config.json").write_text(json.dumps(config | {"_class_name": "X", "model_type": "X"}))
    arch, wrong, placement = ARCHS["flux"], ModelSource("other", folder=other), Placement(torch.float32, CPU)
    with pytest.raises(UserError, match=r"config\.json: this is a X"):
        arch.load_vae(wrong, torch.float32, CPU) if part == "vae" else arch.load_text_encoders(wrong, placement)
    shutil.rmtree(other / part)
    with pytest.raises(UserError, match=rf"there is no {part}/ in "):
        source_of(other)


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flux", "flux:schnell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(folders: dict[str, Path], kind: str, dtype: torch.dtype) -> None:
    tokens = 256 if kind == "flux:schnell" else 512
    pipeline = pipeline_of(folders[kind], dtype)
    arch = ARCHS["flux"]
    text = arch.load_text_encoders(source_of(folders[kind]), Placement(dtype, CPU))
    for prompt, condition in zip(PROMPTS, arch.encode_prompts(text, PROMPTS), strict=True):
        with torch.no_grad():  # as it draws: attention rounds otherwise where it keeps a graph
            tokens_1LD, pooled_1D, _ = pipeline.encode_prompt(prompt, None, max_sequence_length=tokens)
        assert condition["tokens_LD"].shape == (tokens, 32) and condition["tokens_LD"].dtype == dtype
        assert torch.equal(condition["tokens_LD"], tokens_1LD[0])
        assert torch.equal(condition["pooled_D"], pooled_1D[0])


def test_published_clip_files_have_a_prefix_and_a_buffer(folders: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(folders["flux"], tmp_path / "other")
    file = other / "text_encoder" / "model.safetensors"
    published = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(published | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    arch, placement = ARCHS["flux"], Placement(torch.float32, CPU)
    ours, theirs = (
        arch.encode_prompts(arch.load_text_encoders(source_of(folder), placement), PROMPTS[:1])[0]
        for folder in (other, folders["flux"])
    )
    assert torch.equal(ours["pooled_D"], theirs["pooled_D"])


def test_prompts_of_another_length_have_another_place_in_the_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    """dev and schnell have the same text encoders, but T5's 512 tokens are not schnell's 256."""
    drawn.write_dataset(tmp_path / "data", n=1, size=64)
    keys: dict[str, Keys] = {}
    for kind in ("flux", "flux:schnell"):
        data = {"datasets": [{"folder_path": tmp_path / "data", "resolution": 64}], "device": "cpu", "type": "train"}
        data |= {"model": {"arch": kind, "name_or_path": str(folders[kind])}, "sample": {"disable_sampling": True}}
        inputs = build.gather(archs.resolve(TrainProcess.model_validate(data)), Recorder())
        keys[kind] = encoders.Models(inputs, Store(tmp_path / "cache"), torch.float32).keys
    parts = [path.relative_to(folders["flux"]) for path in folders["flux"].glob("t*/*") if "former" not in str(path)]
    assert len(parts) == 8
    assert all((folders["flux"] / part).read_bytes() == (folders["flux:schnell"] / part).read_bytes() for part in parts)
    assert keys["flux"].vae == keys["flux:schnell"].vae
    assert keys["flux"].prompt("a cat") != keys["flux:schnell"].prompt("a cat")


# --- guidance ----------------------------------------------------------------------------------------------------


def plain_call(
    denoiser: Any, latents: Tensor, t: float, condition: dict[str, Tensor], guidance: Tensor | None
) -> Tensor:
    """The lines of diffusers' denoising loop."""
    from diffusers import FluxPipeline

    H, W = latents.shape[-2:]
    out = denoiser(
        hidden_states=FluxPipeline._pack_latents(latents, 1, latents.shape[1], H, W),
        timestep=torch.tensor([t]),
        guidance=guidance,
        pooled_projections=condition["pooled_D"][None],
        encoder_hidden_states=condition["tokens_LD"][None],
        txt_ids=torch.zeros(len(condition["tokens_LD"]), 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, H // 2, W // 2, CPU, torch.float32),
        return_dict=False,
    )[0]
    unpacked: Tensor = FluxPipeline._unpack_latents(out, 8 * H, 8 * W, 8)
    return unpacked


def drawn_condition(tokens: int = 20) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    return {"tokens_LD": torch.randn(tokens, 32, generator=g), "pooled_D": torch.randn(32, generator=g)}


def latents_of(*, channels: int = 16) -> Tensor:
    return torch.randn(1, channels, 8, 12, generator=torch.Generator().manual_seed(1))


def test_training_tells_dev_a_guidance_of_one(folders: dict[str, Path]) -> None:
    denoiser, condition, arch = load("flux", source_of(folders["flux"])), drawn_condition(), ARCHS["flux"]
    for told, number in ((None, 1.0), (3.5, 3.5)):
        conditions = [condition | arch.picture_condition(WHOLE, told)]
        ours = arch.predict(denoiser, latents_of(), torch.tensor([0.5]), conditions)
        assert torch.equal(ours, plain_call(denoiser, latents_of(), 0.5, condition, torch.tensor([number])))


@pytest.mark.parametrize("name", ["flex1", "flex2"])
def test_training_leaves_flex_s_guidance_out_and_sampling_does_not(folders: dict[str, Path], name: str) -> None:
    """Left out, the model is the one without the embedding, bit for bit; and no class of diffusers was changed."""
    from diffusers import FluxTransformer2DModel

    source, arch, condition = source_of(folders[name]), ARCHS[name], drawn_condition()
    denoiser = load(name, source)
    without = FluxTransformer2DModel.from_config(dict(denoiser.config) | {"guidance_embeds": False}).eval()
    without.load_state_dict({k: v for k, v in denoiser.state_dict().items() if "guidance" not in k})
    plain = FluxTransformer2DModel.from_pretrained(folders[name], subfolder="transformer", dtype=torch.float32)
    latents = latents_of()
    state = torch.cat(
        [latents, torch.zeros_like(latents), torch.ones_like(latents[:, :1]), torch.zeros_like(latents)], 1
    )
    state = state if name == "flex2" else latents
    with torch.no_grad():
        trained = arch.predict(
            denoiser, latents, torch.tensor([0.5]), [condition | arch.picture_condition(WHOLE, None)]
        )
        sampled = arch.predict(denoiser, latents, torch.tensor([0.5]), [condition | arch.picture_condition(WHOLE, 3.5)])
        assert torch.equal(trained, plain_call(without, state, 0.5, condition, None))
        assert torch.equal(sampled, plain_call(plain, state, 0.5, condition, torch.tensor([3.5])))
    assert (trained - sampled).abs().max() > 0.01
    assert type(denoiser) is FluxTransformer2DModel and type(plain.time_text_embed) is not type(
        denoiser.time_text_embed
    )


def test_a_lora_on_every_layer_of_flex_leaves_the_embedding_of_guidance_as_it_is(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Left out of training, its layers get no gradient: optimizer, checkpoint and export must do without."""
    drawn.write_dataset(tmp_path / "data", n=1, size=64)
    process = {
        "type": "train", "device": "cpu", "model": {"arch": "flex2", "name_or_path": str(folders["flex2"])},
        "datasets": [{"folder_path": str(tmp_path / "data"), "resolution": 64}],
        "network": {"linear": 2, "transformer_only": False}, "sample": {"disable_sampling": True},
        "train": {"steps": 2, "dtype": "fp32", "num_workers": 0, "cache_folder": str(tmp_path / "cache")},
    }  # fmt: skip
    config = {"output_name": "all", "output_folder": str(tmp_path), "process": [process]}
    (tmp_path / "job.yaml").write_text(json.dumps({"config": config}))
    job = load_job(tmp_path / "job.yaml").job
    run(job, stop_at=1)
    result = run(job).result
    assert result.finished and result.lora is not None
    tensors = load_file(result.lora)
    ups = {name: bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name}
    assert len(ups) == 2 * 14 + 3 * 6 + 10
    assert [name for name, trained in ups.items() if not trained] == [
        f"transformer.time_text_embed.guidance_embedder.linear_{number}.lora_B.weight" for number in (1, 2)
    ]


def process_of(arch: str, sample: dict[str, Any], **model: Any) -> TrainProcess:
    parts = {"type": "train", "model": {"arch": arch} | model, "train": {"dataset_folder": "x"}, "sample": sample}
    return TrainProcess.model_validate(parts)


def test_guidance_for_schnell_is_refused_everywhere(folders: dict[str, Path], tmp_path: Path) -> None:
    resolved = archs.resolve(process_of("flux:schnell", {}))
    assert (resolved.sample.guidance_scale, resolved.sample.sample_steps) == (1.0, 4)
    assert archs.resolve(process_of("flux", {})).sample.guidance_scale == 3.5
    with pytest.raises(UserError, match=r"^sample\.guidance_scale: FLUX\.1 schnell: 3\.5 would have no effect"):
        archs.resolve(process_of("flux:schnell", {"guidance_scale": 3.5}))
    with pytest.raises(UserError, match=r"^sample\.prompts\[1\]\.guidance_scale: FLUX\.1 schnell"):
        archs.resolve(process_of("flux:schnell", {"prompts": ["a", {"prompt": "b", "guidance_scale": 2}]}))
    drawing = Drawing(model=str(folders["flux:schnell"]), arch="flux:schnell", prompts=["a"], loras=[], guidance=2.0)
    with pytest.raises(UserError, match=r"^--guidance: FLUX\.1 schnell: 2 would have no effect"):
        draw(drawing, tmp_path)
    arch, denoiser = ARCHS["flux"], load("flux", source_of(folders["flux:schnell"]))
    conditions = [drawn_condition() | arch.picture_condition(WHOLE, 2.0)]
    with pytest.raises(UserError, match="no effect on a model without an embedding for it"):
        arch.predict(denoiser, latents_of(), torch.tensor([0.5]), conditions)


def test_a_schnell_is_not_drawn_as_dev(folders: dict[str, Path], tmp_path: Path) -> None:
    drawing = Drawing(model=str(folders["flux:schnell"]), arch="flux", prompts=["a"], loras=[], size=(64, 64))
    with pytest.raises(UserError, match=r"it looks like schnell: set model\.arch: flux:schnell"):
        draw(drawing, tmp_path)


# --- times and grids ---------------------------------------------------------------------------------------------


def test_training_times_have_the_variant_s_shift(folders: dict[str, Path]) -> None:
    dev, schnell = FLUX.variants["dev"], FLUX.variants["schnell"]
    assert FLUX.shift_at((32, 32), dev) == pytest.approx(2.718281828**0.5)  # 256 tokens, a picture of 256 pixels
    assert FLUX.shift_at((128, 128), dev) == pytest.approx(2.718281828**1.15)
    assert FLUX.shift_at((32, 32), schnell) == FLUX.shift_at((128, 128), schnell) == 1.0
    arch = ARCHS["flux"]
    config = TrainConfig(timestep_type="shift")
    task = Task.of(arch, arch.load_scheduler(source_of(folders["flux:schnell"])), config, schnell)
    assert task.variant is schnell
    shifted, plain = (draw_times(config, FLUX.shift_at((128, 128), v), 4000, 0, 0, 0)[0].mean() for v in (dev, schnell))
    assert plain < 0.52 < 0.68 < shifted


@pytest.mark.parametrize("kind", ["flux", "flux:schnell"])
@pytest.mark.parametrize(("steps", "size"), [(1, (64, 64)), (4, (64, 96)), (28, (1024, 1024)), (50, (768, 1344))])
def test_the_grid_is_the_pipelines(folders: dict[str, Path], kind: str, steps: int, size: tuple[int, int]) -> None:
    import numpy as np
    from diffusers.pipelines.flux import pipeline_flux as theirs

    arch, tokens = ARCHS["flux"], (size[0] // 16) * (size[1] // 16)
    ours, reference = (arch.load_scheduler(source_of(folders[kind])) for _ in range(2))
    sigmas = np.linspace(1.0, 1 / steps, steps)
    theirs.retrieve_timesteps(reference, steps, CPU, sigmas=sigmas, mu=theirs.calculate_shift(tokens))
    arch.set_timesteps(ours, steps, (size[0] // 8, size[1] // 8), CPU)
    assert torch.equal(ours.timesteps, reference.timesteps) and torch.equal(ours.sigmas, reference.sigmas)
    if kind == "flux:schnell" and steps == 4:
        assert ours.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]


def test_schnell_draws_what_its_pipeline_draws(folders: dict[str, Path]) -> None:
    arch, source = ARCHS["flux"], source_of(folders["flux:schnell"])
    request = Request(prompt=PROMPTS[0], seed=7, width=96, height=64, steps=4)
    pipeline = pipeline_of(folders["flux:schnell"])
    theirs = pipeline(
        prompt=request.prompt, width=96, height=64, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256,
        generator=torch.Generator("cpu").manual_seed(7), output_type="latent",
    ).images  # fmt: skip
    text = arch.load_text_encoders(source, Placement(torch.float32, CPU))
    conditions = arch.encode_prompts(text, [request.prompt])
    noise = initial_noise(FLUX, request)
    ours = denoise(arch, load("flux", source), arch.load_scheduler(source), noise, request, conditions)
    assert torch.equal(ours, pipeline._unpack_latents(theirs, 64, 96, 8))


def test_without_a_scheduler_the_variant_says_which(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, dynamic in (("flux", True), ("flux:schnell", False)):
        bare = shutil.copytree(folders[kind], tmp_path / kind.replace(":", "-"))
        shutil.rmtree(bare / "scheduler")
        config = ARCHS["flux"].load_scheduler(ModelSource("bare", folder=bare)).config
        assert (config.use_dynamic_shifting, config.shift) == (dynamic, 3.0 if dynamic else 1.0)


# --- LoRAs and training adapters ---------------------------------------------------------------------------------


Naming = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def as_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


def in_original_names(stem: Callable[[str], str], down: str, up: str) -> Naming:
    """Fused layers, as trainers of the original layout save them, with alpha."""

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = {name.rpartition(".lora_")[0] for name in tensors}
        found: dict[str, Tensor] = {}
        for theirs in {flux_parts.ORIGINAL.origin(layer) for layer in layers}:
            held = flux_parts.ORIGINAL.find(theirs)
            assert held is not None
            pairs = [{k: tensors[f"{layer}.{k}"] for k in ("lora_A.weight", "lora_B.weight")} for layer in held.layers]
            whole = put_together(pairs, held)
            found[f"{stem(theirs)}.{down}"] = whole["lora_A.weight"]
            found[f"{stem(theirs)}.{up}"] = whole["lora_B.weight"]
            found[f"{stem(theirs)}.alpha"] = torch.tensor(float(len(whole["lora_A.weight"])))
        return found

    return rename


NAMINGS: dict[str, Naming] = {
    "published": as_published,
    "comfy": in_original_names(lambda name: f"diffusion_model.{name}", "lora_A.weight", "lora_B.weight"),
    "kohya": in_original_names(
        lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight"
    ),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_training_adapter_is_read_in_every_form(folders: dict[str, Path], tmp_path: Path, naming: str) -> None:
    """The published one for schnell has `transformer.` and diffusers' names; others fuse q, k and v."""
    folder = folders["flux:schnell"]
    nano_adapter.write_adapter(tmp_path / "a.safetensors", "flux", folder)
    stored = load_file(tmp_path / "a.safetensors")
    assert "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight" in stored
    plain = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(NAMINGS[naming](plain), tmp_path / "b.safetensors")
    shapes = linear_shapes(load("flux", source_of(folder)))
    pairs = read_adapter(tmp_path / "b.safetensors", shapes, FLUX.lora_keys)
    assert len(pairs) == 2 * 14 + 3 * 6
    for name, pair in pairs.items():
        A, B = (plain[f"{name}.lora_{half}.weight"].float() for half in "AB")
        torch.testing.assert_close(pair.delta(), B @ A)


def test_a_lora_trained_on_a_fused_layer_is_shared_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """One A for q, k and v: each gets all of it, and its own rows of B."""
    shapes = linear_shapes(load("flux", source_of(folders["flux"])))
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 64, generator=g), torch.randn(192, 4, generator=g)
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    file = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(2.0)}
    save_file(file, tmp_path / "kohya.safetensors")
    lora = export.read_lora(tmp_path / "kohya.safetensors", FLUX, shapes)
    assert lora.modules == [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"]
    for index, name in enumerate(lora.modules):
        down, up = (lora.tensors[f"{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(lora.scale(name) * up @ down, 0.5 * (B @ A)[64 * index : 64 * (index + 1)])
    written = export.convert(tmp_path / "kohya.safetensors", tmp_path / "comfy.safetensors", FLUX, "comfy", shapes)
    assert written.proof.loader == "diffusers.loaders.FluxLoraLoaderMixin"


def random_lora(shapes: dict[str, tuple[int, int]], rank: int = 2) -> export.LoraFile:
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (out, inside) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inside, generator=g)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=g)
    return export.from_training(tensors, NetworkConfig(linear=rank, linear_alpha=1))


def real_shapes(pattern: str) -> dict[str, tuple[int, int]]:
    """(out, in) of a FLUX.1 dev of two blocks of each kind, of the published width."""
    import re

    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    return {name: shape for name, shape in linear_shapes(model).items() if re.fullmatch(pattern, name)}


def test_kohya_files_are_in_kohya_s_true_names_and_diffusers_reads_them(tmp_path: Path) -> None:
    shapes = real_shapes(FLUX.lora_blocks)
    lora, base = random_lora(shapes), export.Base(spec=FLUX, shapes=shapes)
    written = export.write_lora(tmp_path / "k.safetensors", lora, base, "kohya", dtype="fp32", metadata={})
    assert written.proof.loader == "diffusers.loaders.FluxLoraLoaderMixin"
    assert written.proof.modules == 2 * 14 + 2 * 6
    stored = load_file(tmp_path / "k.safetensors")
    linear1 = stored["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    assert linear1.shape == (7 * 3072, 4 * 2) and stored["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 3
    back = export.read_lora(tmp_path / "k.safetensors", FLUX, shapes)
    assert all(torch.equal(back.tensors[name], lora.tensors[name]) for name in lora.tensors)


def test_kohya_files_that_diffusers_cannot_read_are_proven_otherwise(folders: dict[str, Path], tmp_path: Path) -> None:
    """It knows the published width alone, and passes over the embedders without a word."""
    for number, shapes in enumerate((linear_shapes(load("flux", source_of(folders["flux"]))), real_shapes(".*"))):
        lora, base = random_lora(shapes), export.Base(spec=FLUX, shapes=shapes)
        written = export.write_lora(tmp_path / f"{number}.safetensors", lora, base, "kohya", dtype="fp32", metadata={})
        assert written.proof.loader == "PEFT" and written.proof.modules == len(shapes)


def test_kinds_that_diffusers_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "diffusers refuses a lokr of FLUX.1; use comfy" in str(unsupported("lokr", "diffusers", FLUX))
    assert unsupported("dora", "diffusers", FLUX) is None
    denoiser = load("flux", source_of(folders["flux"]))
    from detour.nn import lora as nn_lora

    network = NetworkConfig(type="lokr", linear=4)
    nn_lora.attach(denoiser, nn_lora.linear_names(denoiser, FLUX, network), network, 0)
    for name, parameter in nn_lora.trainable(denoiser).items():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    file = export.from_training(nn_lora.state(denoiser), network)
    base = export.Base.of(denoiser, FLUX)
    written = export.write_lora(tmp_path / "l.safetensors", file, base, "comfy", dtype="fp32", metadata={})
    assert written.proof.loader == "PEFT" and written.proof.modules == 2 * 14 + 3 * 6


def test_a_lora_of_flux_is_not_one_of_flex(folders: dict[str, Path], tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in real_shapes(FLUX.lora_blocks).items()}
    renamed = {name.replace("transformer_blocks.1.", "transformer_blocks.18."): shape for name, shape in shapes.items()}
    lora, base = random_lora(renamed), export.Base(spec=FLUX, shapes=renamed)
    export.write_lora(tmp_path / "f.safetensors", lora, base, "comfy", dtype="fp32", metadata={})
    with pytest.raises(UserError, match=r"not a LoRA of Flex\.1: it looks like FLUX \(layers such as transformer\."):
        export.read_lora(tmp_path / "f.safetensors", FLEX1, shapes)


def test_metadata_names_the_variant(folders: dict[str, Path]) -> None:
    for arch, name, licence in (
        ("flux", "flux-1-dev/lora", "FLUX.1 [dev] Non-Commercial License"),
        ("flux:schnell", "flux-1-schnell/lora", "Apache-2.0"),
        ("flex1", "flex-1-alpha/lora", "Apache-2.0"),
    ):
        process = archs.resolve(process_of(arch, {}))
        spec = archs.spec(process.model.arch)
        lora = random_lora({"proj_out": (2, 2)})
        header = export.describe(lora, spec, export.Origin(title="x", process=process, step=1))
        assert (header["modelspec.architecture"], header["modelspec.license"]) == (name, licence)


# --- Flex.2 ------------------------------------------------------------------------------------------------------


def test_flex2_is_told_of_pictures_in_the_order_of_its_pipeline(folders: dict[str, Path]) -> None:
    """33 channels after the noisy ones: the picture with a hole, the hole, the picture to follow."""
    arch, source = ARCHS["flex2"], source_of(folders["flex2"])
    request = Request(prompt=PROMPTS[0], seed=3, width=96, height=64, steps=3, guidance=3.5)
    g = torch.Generator().manual_seed(0)
    told = {
        "inpaint_CHW": torch.randn(16, 8, 12, generator=g),
        "hole_1HW": torch.rand(1, 8, 12, generator=g).round(),
        "control_CHW": torch.randn(16, 8, 12, generator=g),
    }
    pipeline = flex2_pipeline().from_pretrained(folders["flex2"], dtype=torch.float32)
    condition, *_ = arch.encode_prompts(
        arch.load_text_encoders(source, Placement(torch.float32, CPU)), [request.prompt]
    )
    denoiser, noise = load("flex2", source), initial_noise(FLEX2, request)
    for names in ((), ("control_CHW",), ("inpaint_CHW", "hole_1HW"), tuple(told)):
        given = {name: told[name] for name in names}
        whole = torch.cat(
            [
                given.get("inpaint_CHW", torch.zeros(16, 8, 12)),
                given.get("hole_1HW", torch.ones(1, 8, 12)),
                given.get("control_CHW", torch.zeros(16, 8, 12)),
            ]
        )
        theirs = pipeline(
            request.prompt, width=96, height=64, num_inference_steps=3, guidance_scale=3.5,
            generator=torch.Generator("cpu").manual_seed(3), told_B33HW=whole[None],
        ).images  # fmt: skip
        ours = denoise(arch, denoiser, arch.load_scheduler(source), noise, request, [condition | given])
        assert torch.equal(ours, flux_parts.unpacked(theirs, (8, 12))), names
