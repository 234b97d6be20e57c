"""Stable Diffusion 1 and 2 on their miniatures, against diffusers: what the contract suite does not cover."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arch_row import draw
from detour import UserError, archs, export
from detour.archs import parts
from detour.archs.sd import ARCHS, HEADS, SD1
from detour.config.job import NetworkConfig, TrainConfig
from detour.data.loader import Batch
from detour.export.inspection import inspect_file
from detour.lora_formats import unsupported
from detour.nano import ldm as files
from detour.nano import sd as nano
from detour.nn import lora
from detour.nn.training_adapter import linear_shapes
from detour.sample import Framing, Request, denoise, initial_noise
from detour.train.objective import Task, training_loss
from detour.weights import ModelSource, Placement, find_model, materialise

CPU = torch.device("cpu")
PLACEMENT = Placement(torch.float32, CPU)
NAMES = ("sd1", "sd2")
both = pytest.mark.parametrize("name", NAMES)
PROMPTS = ["a red circle on a blue background", "", "zig", "a red circle on a blue background " * 40, "ein Käfer 虫 🐞"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sd")
    for name in NAMES:
        nano.write(root / name, name)
    return {name: root / name for name in NAMES}


def found(model: Path | str, name: str, extras: Path | None = None) -> ModelSource:
    spec = archs.spec(name)
    given = None if extras is None else str(extras)
    return find_model(str(model), components=spec.components, denoiser=spec.denoiser, extras=given)


def unet_of(source: ModelSource, name: str) -> Any:
    unet = ARCHS[name].build_denoiser(source)
    materialise(unet, ARCHS[name].denoiser_tensors(source), PLACEMENT, where="miniature")
    return unet


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def changed(folder: Path, to: Path, part: str, **entries: Any) -> Path:
    """A copy of a model whose component has other entries in its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / part / "config.json").read_text())
    (to / part / "config.json").write_text(json.dumps(config | entries))
    return to


# --- a single file -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of other weights, as extras from which only settings may come."""
    root = tmp_path_factory.mktemp("other")
    for name in NAMES:
        nano.write(root / name, name, seed=1)
    return {name: root / name for name in NAMES}


@both
def test_an_all_in_one_file_holds_everything(
    folders: dict[str, Path], other: dict[str, Path], tmp_path: Path, name: str
) -> None:
    nano.write_original(tmp_path / "all.safetensors", folders[name], name)
    single, whole = found(tmp_path / "all.safetensors", name, other[name]), found(folders[name], name)
    arch = ARCHS[name]
    assert same(unet_of(single, name), unet_of(whole, name))
    assert dict(unet_of(single, name).config)["attention_head_dim"] == unet_of(whole, name).config["attention_head_dim"]
    ours, theirs = (arch.load_vae(source, torch.float32, CPU) for source in (single, whole))
    assert same(ours, theirs)
    ours, theirs = (arch.load_text_encoders(source, PLACEMENT).models["text_encoder"] for source in (single, whole))
    assert same(ours, theirs)
    assert not same(theirs, arch.load_text_encoders(found(other[name], name), PLACEMENT).models["text_encoder"])


@both
def test_diffusers_reads_the_all_in_one_file_as_we_do(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    path, folder = tmp_path / "all.safetensors", folders[name]
    nano.write_original(path, folder, name)
    options = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.float32}
    single = found(path, name, folder)
    assert same(unet_of(single, name), UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **options))
    vae = AutoencoderKL.from_single_file(str(path), subfolder="vae", **options)
    assert same(ARCHS[name].load_vae(single, torch.float32, CPU), vae)


@both
@pytest.mark.parametrize("layout", ["model.diffusion_model.", "diffusion_model.", "", "diffusers"])
def test_a_file_with_the_unet_alone(folders: dict[str, Path], tmp_path: Path, name: str, layout: str) -> None:
    path = tmp_path / "unet.safetensors"
    if layout == "diffusers":
        shutil.copy(folders[name] / "unet" / "diffusion_pytorch_model.safetensors", path)
    else:
        tensors = files.original_unet(folders[name])
        files.save(path, {layout + key.removeprefix("model.diffusion_model."): t for key, t in tensors.items()})
    single, whole = found(path, name, folders[name]), found(folders[name], name)
    assert same(unet_of(single, name), unet_of(whole, name))
    encoders = (ARCHS[name].load_text_encoders(source, PLACEMENT).models["text_encoder"] for source in (single, whole))
    assert same(*encoders)


@both
def test_a_published_single_file_needs_no_config_of_a_unet(
    folders: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extras from the hub have no unet/: heads are then the published ones."""
    extras = shutil.copytree(folders[name], tmp_path / "extras")
    shutil.rmtree(extras / "unet")
    nano.write_original(tmp_path / "all.safetensors", folders[name], name)
    monkeypatch.setitem(HEADS, name, HEADS[name] | {"norm_num_groups": 8})  # 32 in full size
    config = ARCHS[name].build_denoiser(found(tmp_path / "all.safetensors", name, extras)).config
    assert config["attention_head_dim"] == (8 if name == "sd1" else [5, 10, 20, 20])


def test_the_last_layer_of_openclip_is_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """2.x was trained on the last but one, and diffusers' encoder ends with that."""
    path, name = tmp_path / "all.safetensors", "sd2"
    nano.write_original(path, folders[name], name)
    tensors = load_file(path)
    beginning = "cond_stage_model.model.transformer.resblocks."
    beyond = {
        key.replace(f"{beginning}2.", f"{beginning}3."): t.clone()
        for key, t in tensors.items()
        if f"{beginning}2." in key
    }
    assert len(beyond) == 12
    more = {
        "cond_stage_model.model.text_projection": torch.ones(32, 32),
        "cond_stage_model.model.logit_scale": torch.ones(()),
    }
    save_file(tensors | beyond | more | {"model_ema.decay": torch.ones(())}, path)
    ours = ARCHS[name].load_text_encoders(found(path, name, folders[name]), PLACEMENT)
    theirs = ARCHS[name].load_text_encoders(found(folders[name], name), PLACEMENT)
    assert same(ours.models["text_encoder"], theirs.models["text_encoder"])


# --- published folders -------------------------------------------------------------------------------------------


@both
def test_folders_as_they_were_published_years_ago(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Text encoders with `text_model.` and a buffer of positions; VAEs with the old names of attention."""
    old = shutil.copytree(folders[name], tmp_path / "old")
    path = old / "text_encoder" / "model.safetensors"
    text = {f"text_model.{key}": t for key, t in load_file(path).items()}
    save_file(text | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    path, names = old / "vae" / "diffusion_pytorch_model.safetensors", {"to_q": "query", "to_k": "key", "to_v": "value"}
    vae = load_file(path)
    for key in [key for key in vae if ".attentions." in key]:
        renamed = key.replace("to_out.0", "proj_attn")
        for new, before in names.items():
            renamed = renamed.replace(new, before)
        vae[renamed] = vae.pop(key)
    assert "encoder.mid_block.attentions.0.query.weight" in vae
    save_file(vae, path)
    arch, sources = ARCHS[name], (found(old, name), found(folders[name], name))
    assert same(*(arch.load_vae(source, torch.float32, CPU) for source in sources))
    assert same(*(arch.load_text_encoders(source, PLACEMENT).models["text_encoder"] for source in sources))


# --- prompts -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folders[name], dtype=dtype)
    pipeline.text_encoder.requires_grad_(False)
    text = ARCHS[name].load_text_encoders(found(folders[name], name), Placement(dtype, CPU))
    for prompt, condition in zip(PROMPTS, ARCHS[name].encode_prompts(text, PROMPTS), strict=True):
        theirs = pipeline.encode_prompt(prompt, CPU, 1, False)[0][0]
        assert condition["tokens_LD"].shape == (77, 32) and condition["tokens_LD"].dtype == dtype
        assert torch.equal(condition["tokens_LD"], theirs)


# --- sampling ----------------------------------------------------------------------------------------------------

VARIANTS = [("sd1", "lcm"), ("sd2", "v2-1-base"), ("sd2", "turbo")]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_draws_what_the_pipeline_draws(tmp_path: Path, name: str, variant: str) -> None:
    """LCM's scheduler draws noise at every step; Euler's has levels between the whole ones."""
    import diffusers

    nano.write(tmp_path, name, variant)
    arch, facts = ARCHS[name], archs.spec(name).variants[variant]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    expected = facts.scheduler.get("_class_name", "PNDMScheduler")
    assert type(pipeline.scheduler).__name__ == expected
    request = Request(prompt=PROMPTS[0], seed=3, width=64, height=64, steps=3, guidance=facts.guidance, negative="zig")
    theirs = draw(pipeline, request, arch.spec)
    source = found(tmp_path, name)
    text, scheduler = arch.load_text_encoders(source, PLACEMENT), arch.load_scheduler(source, facts.scheduler)
    conditions = arch.encode_prompts(text, request.prompts(arch.spec))
    noise = initial_noise(arch.spec, request)
    assert torch.equal(denoise(arch, unet_of(source, name), scheduler, noise, request, conditions), theirs)


class Listening(nn.Module):
    """Stands in for the UNet and notes the levels that it is given."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[float] = []

    def forward(self, z: Tensor, level_B: Tensor, return_dict: bool, **_: Any) -> Any:
        assert level_B.dtype == torch.float32
        self.levels.append(level_B[0].item())
        return (z,)


SAMPLERS = [
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("DDIMScheduler", {"steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("kind", "options"), SAMPLERS)
def test_the_model_is_told_the_schedulers_own_levels(kind: str, options: dict[str, Any]) -> None:
    import diffusers

    scheduler = getattr(diffusers, kind)(**options)
    listening, condition = Listening(), {"tokens_LD": torch.zeros(77, 4)}
    for steps in (1, 7, 25):
        ARCHS["sd1"].set_timesteps(scheduler, steps, (8, 8), CPU)
        listening.levels.clear()
        for timestep in scheduler.timesteps:
            t_B = torch.full((1,), float(timestep) / 1000, dtype=torch.float64)
            ARCHS["sd1"].predict(listening, torch.zeros(1, 4, 8, 8), t_B, [condition])
        assert listening.levels == [float(timestep) for timestep in scheduler.timesteps.float()]


def test_levels_of_training_are_whole() -> None:
    levels = torch.arange(1001)
    assert torch.equal(parts.levels(levels.float() / 1000), levels.float())
    assert torch.equal(parts.levels(levels.double() / 1000), levels.float())


@both
def test_sampling_ends_at_the_first_level(folders: dict[str, Path], name: str) -> None:
    """The published schedulers leave the noise of level 0: sqrt(0.99915) of the picture."""
    from rows_sd import ROWS

    row, source = next(row for row in ROWS if row.name == name), found(folders[name], name)
    request = Request(prompt="", seed=3, width=64, height=96, steps=5)
    noise, clean = (
        initial_noise(row.spec, request),
        torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(4)),
    )
    truth, condition = row.native_truth(clean, noise), {"tokens_LD": torch.zeros(77, 4)}
    scheduler = ARCHS[name].load_scheduler(source)
    ours = denoise(ARCHS[name], truth, scheduler, noise, request, [condition])
    first = scheduler.alphas_cumprod[0]
    eps = (ours - first.sqrt() * clean) / (1 - first).sqrt()
    assert first.item() == pytest.approx(0.99915)
    assert 0.8 < eps.std() < 1.2


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant", "velocity"), [("sd1", "", False), ("sd2", "", True), ("sd2", "v2-1-base", False)]
)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_a_plain_script(
    tmp_path: Path, name: str, variant: str, velocity: bool, gamma: float | None
) -> None:
    """diffusers' text-to-image script: add_noise, epsilon or get_velocity, min-SNR weights."""
    from diffusers import DDPMScheduler

    nano.write(tmp_path, name, variant)
    source, arch = found(tmp_path, name), ARCHS[name]
    scheduler, unet = arch.load_scheduler(source), unet_of(source, name)
    config = TrainConfig(timestep_type="linear", min_snr_gamma=gamma, dtype="fp32")
    text = arch.load_text_encoders(source, PLACEMENT)
    z0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    framing = Framing.whole(64, 64)
    batch = Batch(
        latents_BCHW=z0, conditions=arch.encode_prompts(text, PROMPTS[:3]), weights_B=torch.ones(3), masks_B1HW=None,
        names=list("abc"), prompts=PROMPTS[:3], framings=[framing] * 3, is_reg=False, epoch=0,
    )  # fmt: skip
    task = Task.of(arch, scheduler, config)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = unet.register_forward_pre_hook(lambda _, args: seen.append(args))
    ours = training_loss(task, unet, batch, config, seed=7, step=3, micro=0)
    handle.remove()
    noise = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in generators(7, 3)])
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    level_B = seen[0][1].long()
    z = theirs.add_noise(z0, noise, level_B)
    torch.testing.assert_close(seen[0][0], z)
    with torch.no_grad():
        tokens = torch.stack([condition["tokens_LD"] for condition in batch.conditions])
        prediction = unet(z, level_B, encoder_hidden_states=tokens, return_dict=False)[0]
    target = theirs.get_velocity(z0, noise, level_B) if velocity else noise
    error_B = (prediction - target).square().mean((1, 2, 3))
    if gamma is not None:
        snr = theirs.alphas_cumprod[level_B] / (1 - theirs.alphas_cumprod[level_B])
        error_B = error_B * snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
    torch.testing.assert_close(ours.loss, error_B.mean())


def generators(seed: int, step: int) -> list[torch.Generator]:
    from detour.nn.rng import generator

    return [generator(seed, "noise", step, 0, place) for place in range(3)]


# --- LoRA files --------------------------------------------------------------------------------------------------


def trained(unet: nn.Module, kind: str, **options: Any) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """A LoRA of that kind on the UNet, with values as if it had been trained."""
    network = NetworkConfig.model_validate({"type": kind, "linear": 4, "linear_alpha": 2, **options})
    lora.attach(unet, lora.linear_names(unet, archs.spec("sd2"), network), network, 0)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lora.trainable(unet).items():
            noise = torch.randn(parameter.shape, generator=drawn)
            parameter.copy_(parameter * (1 + 0.1 * noise) if name.endswith("magnitude_vector") else 0.2 * noise)
    return network, lora.state(unet)


KINDS = [("lora", {}), ("dora", {}), ("lokr", {}), ("lokr", {"lokr_full_rank": True}), ("loha", {})]
CARRIED = {
    "lora": {"comfy", "kohya", "diffusers"}, "dora": {"comfy", "diffusers"},
    "lokr": {"comfy", "kohya"}, "loha": {"comfy", "kohya"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_kind_of_adapter_is_written_as_its_readers_want_it(
    folders: dict[str, Path], tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    spec = archs.spec("sd2")
    unet = unet_of(found(folders["sd2"], "sd2"), "sd2")
    network, state = trained(unet, kind, include=["mid_block"], **options)
    assert {fmt for fmt in ("comfy", "kohya", "diffusers") if unsupported(kind, fmt, spec) is None} == CARRIED[kind]
    for fmt in sorted(CARRIED[kind]):
        path = tmp_path / f"{fmt}.safetensors"
        base, file = export.Base.of(unet, spec), export.from_training(state, network)
        written = export.write_lora(path, file, base, fmt, dtype="fp32", metadata={})
        assert written.proof.modules == 12
        keys = set(load_file(path))
        starts = {"comfy": "lora_unet_", "kohya": "lora_unet_", "diffusers": "unet."}
        assert all(key.startswith(starts[fmt]) for key in keys)
        if fmt != "diffusers":
            assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in keys
        by_diffusers = kind == "lora" or (kind, fmt) == ("dora", "diffusers")
        assert (written.proof.loader == "diffusers.loaders.StableDiffusionLoraLoaderMixin") == by_diffusers
        back = export.read_lora(path, spec, base.shapes)
        assert (back.kind, len(back.modules)) == (kind, 12)
        assert inspect_file(path)["kind"] == kind


@pytest.mark.parametrize("fmt", ["comfy", "kohya", "diffusers"])
def test_every_layer_that_can_be_trained_is_found_by_diffusers(
    folders: dict[str, Path], tmp_path: Path, fmt: Any
) -> None:
    """With `transformer_only: false`: the embedding of time and what each residual block makes of it."""
    spec = archs.spec("sd2")
    unet = unet_of(found(folders["sd2"], "sd2"), "sd2")
    some = ["mid_block", "time_emb", r"up_blocks\.1\.attentions\.2"]
    network, state = trained(unet, "lora", transformer_only=False, include=some)
    base, file = export.Base.of(unet, spec), export.from_training(state, network)
    written = export.write_lora(tmp_path / "x.safetensors", file, base, fmt, dtype="fp32", metadata={})
    assert written.proof.modules == 12 + 24 + 12
    assert written.proof.loader == "diffusers.loaders.StableDiffusionLoraLoaderMixin"


# --- what does not fit -------------------------------------------------------------------------------------------


@both
def test_the_other_of_the_two_is_refused(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    wrong = NAMES[1 - NAMES.index(name)]
    says = f"of Stable Diffusion {wrong[2]}, not of Stable Diffusion {name[2]}; set model.arch"
    with pytest.raises(UserError, match=says):
        ARCHS[name].build_denoiser(found(folders[wrong], wrong))
    nano.write_original(tmp_path / "all.safetensors", folders[wrong], wrong)
    with pytest.raises(UserError, match=says):
        ARCHS[name].build_denoiser(found(tmp_path / "all.safetensors", wrong, folders[wrong]))


CHANGES = [
    ({"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8},
     "of Stable Diffusion XL, not of Stable Diffusion 1"),
    ({"in_channels": 9}, "9 channels"),
    ({"time_cond_proj_dim": 8}, "latent consistency"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "says"), CHANGES)
def test_unets_that_want_more_than_a_prompt_are_refused(
    folders: dict[str, Path], tmp_path: Path, entries: dict[str, Any], says: str
) -> None:
    other = changed(folders["sd1"], tmp_path / "other", "unet", **entries)
    with pytest.raises(UserError, match=says):
        ARCHS["sd1"].build_denoiser(found(other, "sd1"))


def test_a_file_of_another_model_says_which(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"looks like a checkpoint of FLUX, not of Stable Diffusion 1"):
        ARCHS["sd1"].build_denoiser(ModelSource("flux", single_file=tmp_path / "flux.safetensors"))


@pytest.mark.parametrize("part", SD1.components)
def test_a_missing_folder_is_named(folders: dict[str, Path], tmp_path: Path, part: str) -> None:
    other = shutil.copytree(folders["sd1"], tmp_path / "other")
    shutil.rmtree(other / part)
    with pytest.raises(UserError, match=rf"there is no {part}/ in .*other; found: "):
        found(other, "sd1")


def test_a_lora_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    unet = unet_of(found(folders["sd1"], "sd1"), "sd1")
    key = "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(8, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a LoRA of Stable Diffusion 1: it looks like FLUX"):
        export.read_lora(tmp_path / "x.safetensors", archs.spec("sd1"), linear_shapes(unet))
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    save_file(
        {key.format("down"): torch.ones(2, 768), key.format("up"): torch.ones(320, 2)}, tmp_path / "y.safetensors"
    )
    with pytest.raises(UserError, match="made for a layer of 768 inputs and 320 outputs; this model's has 32 and 32"):
        export.read_lora(tmp_path / "y.safetensors", archs.spec("sd1"), linear_shapes(unet))


# --- the miniature -----------------------------------------------------------------------------------------------


@both
def test_the_miniature_is_small_and_a_function_of_the_seed(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    before = torch.random.get_rng_state()
    nano.write(tmp_path, name)
    assert torch.equal(torch.random.get_rng_state(), before)
    written = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for root in (folders[name], tmp_path)
        for path in root.rglob("*")
        if path.is_file()
    }
    assert sum(map(len, written.values())) < 5_000_000
    assert all((folders[name] / path).read_bytes() == content for path, content in written.items())
    with pytest.raises(UserError, match="sd1:v3 is not known here; allowed: sd1:v1-5, sd1:lcm, sd2:v2-1"):
        nano.write(tmp_path, "sd1", "v3")


@pytest.mark.parametrize(("width", "arch"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl")])
def test_a_lora_is_told_by_the_prompts_that_its_layers_take(tmp_path: Path, width: int, arch: str) -> None:
    """All of these UNets have layers of the same names; a file from elsewhere has no header that says."""
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_{}.weight"
    save_file(
        {key.format("down"): torch.ones(2, width), key.format("up"): torch.ones(640, 2)}, tmp_path / "x.safetensors"
    )
    found = inspect_file(tmp_path / "x.safetensors")
    assert found["arch"] == arch
    assert not set(NAMES) & set(found["also_fits"])
