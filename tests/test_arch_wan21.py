"""Wan 2.1 on its miniature, against diffusers: what the contract suite does not cover because it is Wan's alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour import UserError, export
from detour.archs.wan21 import ARCHS, SPEC
from detour.config.job import NetworkConfig
from detour.export.verify import verify
from detour.lora_formats import from_training, module_key
from detour.nano import wan21 as nano
from detour.nn import lora
from detour.nn.training_adapter import linear_shapes
from detour.sample import Request, denoise, initial_noise, to_frames
from detour.weights import ModelSource, Placement, find_model, materialise
from rows_wan21 import ROWS

CPU = torch.device("cpu")
ARCH = ARCHS["wan21"]
(ROW,) = ROWS
LONG = "a red circle on a blue background " * 120
PROMPTS = ["a red circle on a blue background", "", "zig", LONG, "  &lt;ein&gt;  Käfer’s 虫\n\tâ€” zig  "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano")
    nano.write(path)
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    return find_model(str(folder), components=SPEC.components, denoiser=SPEC.denoiser)


def pipeline_of(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return pipeline_of(folder, torch.float32)


def load(source: ModelSource, dtype: torch.dtype = torch.float32) -> nn.Module:
    denoiser = ARCH.build_denoiser(source)
    placement = Placement(dtype, CPU, keep_float32=SPEC.keep_float32)
    materialise(denoiser, ARCH.denoiser_tensors(source), placement, where="miniature")
    return denoiser


@pytest.fixture(scope="module")
def denoiser(source: ModelSource) -> nn.Module:
    return load(source)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- loading -----------------------------------------------------------------------------------------------------


def test_what_stays_float32_is_what_diffusers_keeps(source: ModelSource, folder: Path) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.bfloat16)
    ours = load(source, torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in ours.named_parameters()}
    assert types == {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    kept = {re.sub(r"\d+", "N", name) for name, dtype in types.items() if dtype == torch.float32}
    assert "scale_shift_table" in kept and "blocks.N.normN.weight" in kept
    assert "condition_embedder.time_embedder.linear_N.weight" in kept
    assert not any("norm_q" in name or "time_proj" in name for name in kept)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected = theirs(latents.bfloat16(), torch.tensor([500]), text, return_dict=False)[0].float()
        found = ARCH.predict(ours, latents, torch.tensor([0.5]), [{"tokens_LD": text[0]}])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_an_original_single_file_gives_the_same_model(
    folder: Path, denoiser: nn.Module, tmp_path: Path, prefix: str
) -> None:
    nano.write_original(tmp_path / "original.safetensors", folder, prefix=prefix)
    single = find_model(
        str(tmp_path / "original.safetensors"), components=SPEC.components, denoiser="transformer", extras=str(folder)
    )
    other = load(single)
    assert same_weights(other, denoiser)
    settings = [key for key in denoiser.config if not key.startswith("_")]
    assert [key for key in settings if as_list(other.config[key]) != as_list(denoiser.config[key])] == []


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_original_names_are_those_of_the_published_files(folder: Path, tmp_path: Path) -> None:
    nano.write_original(tmp_path / "o.safetensors", folder)
    names = {re.sub(r"blocks\.\d+", "blocks.N", name) for name in load_file(tmp_path / "o.safetensors")}
    linears = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"]
    linears += ["ffn.0", "ffn.2"]
    outside = ["head.head", "time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2",
               "time_projection.1", "patch_embedding", "blocks.N.norm3"]  # fmt: skip
    expected = {f"blocks.N.{name}.{end}" for name in linears for end in ("weight", "bias")}
    expected |= {f"{name}.{end}" for name in outside for end in ("weight", "bias")}
    norms = {f"blocks.N.{attention}.norm_{part}.weight" for attention in ("self_attn", "cross_attn") for part in "qk"}
    assert names == expected | norms | {"head.modulation", "blocks.N.modulation"}


def test_a_single_file_in_the_diffusers_layout_gives_the_same_model(folder: Path, denoiser: nn.Module) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert same_weights(load(ModelSource("file", single_file=file)), denoiser)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"flux\.safetensors: this looks like a checkpoint of FLUX, not of Wan 2\.1"):
        ARCH.build_denoiser(ModelSource("flux", single_file=tmp_path / "flux.safetensors"))


def test_models_that_start_from_pictures_are_refused(folder: Path, tmp_path: Path) -> None:
    """36 channels: 16 noisy, 16 of the picture, 4 of a mask (Wan2.1-I2V and most of Wan 2.2)."""
    nano.write_original(tmp_path / "i2v.safetensors", folder)
    tensors = load_file(tmp_path / "i2v.safetensors")
    tensors["patch_embedding.weight"] = torch.zeros(128, 36, 1, 2, 2)
    save_file(tensors, tmp_path / "i2v.safetensors")
    with pytest.raises(UserError, match="takes 36 channels, so it starts from pictures"):
        ARCH.build_denoiser(ModelSource("i2v", single_file=tmp_path / "i2v.safetensors"))
    other = shutil.copytree(folder, tmp_path / "other")
    config = other / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 36}))
    with pytest.raises(UserError, match="takes 36 channels, so it starts from pictures"):
        ARCH.build_denoiser(ModelSource("other", folder=other))


@pytest.mark.parametrize(
    ("part", "key"), [("transformer", "_class_name"), ("vae", "_class_name"), ("text_encoder", "model_type")]
)
def test_a_component_of_another_model_is_refused(folder: Path, tmp_path: Path, part: str, key: str) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / part / "config.json").read_text())
    (other / part / "config.json").write_text(json.dumps(config | {key: "Something"}))
    wrong = ModelSource("other", folder=other)
    loading = {
        "transformer": lambda: ARCH.build_denoiser(wrong),
        "vae": lambda: ARCH.load_vae(wrong, torch.float32, CPU),
        "text_encoder": lambda: ARCH.load_text_encoders(wrong, Placement(torch.float32, CPU)),
    }
    with pytest.raises(UserError, match=r"config\.json: this is a Something"):
        loading[part]()


def test_the_large_model_has_its_published_size() -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        full = WanTransformer3DModel(num_attention_heads=40, ffn_dim=13824, num_layers=40)
    assert sum(parameter.numel() for parameter in full.parameters()) == 14_288_491_584


def test_the_miniature_is_small_and_a_function_of_its_seed(folder: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    nano.write(tmp_path / "again")
    nano.write(tmp_path / "other", variant="14b_4step", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert sum((folder / name).stat().st_size for name in names) < 5_000_000
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()
    with pytest.raises(UserError, match=r"wan21:i2v is not known here"):
        nano.write(tmp_path / "x", variant="i2v")


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(source: ModelSource, folder: Path, dtype: torch.dtype) -> None:
    pipe = pipeline_of(folder, dtype)
    text = ARCH.load_text_encoders(source, Placement(dtype, CPU))
    seen: list[Tensor] = []

    class Listening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
            seen.append(encoder_hidden_states)
            return (hidden_states,)

    for prompt, condition in zip(PROMPTS, ARCH.encode_prompts(text, PROMPTS), strict=True):
        with torch.no_grad():  # as the pipeline encodes; with gradients other kernels run
            theirs = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0]
        ARCH.predict(Listening(), torch.zeros(1, 16, 1, 2, 2), torch.ones(1), [condition])
        assert condition["tokens_LD"].dtype == dtype
        assert torch.equal(seen[-1], theirs) and theirs.shape == (1, 512, 32)
        assert not theirs[0, len(condition["tokens_LD"]) :].any()


def test_prompts_are_tidied_as_in_the_pipeline_and_ftfy_is_there(source: ModelSource) -> None:
    from diffusers.utils import is_ftfy_available

    assert is_ftfy_available(), "without it the pipeline leaves out a step and embeds other text"
    text = ARCH.load_text_encoders(source, Placement(torch.float32, CPU))
    untidy, tidy = ARCH.encode_prompts(text, ["  &amp;lt;zig&amp;gt;\n\n a \u2019 dogâ€™s ", "<zig> a ' dog's"])
    assert torch.equal(untidy["tokens_LD"], tidy["tokens_LD"])


def test_every_linear_layer_of_the_text_encoder_goes_through_the_quantiser(source: ModelSource) -> None:
    seen: list[str] = []

    def quantizer(name: str, linear: nn.Linear) -> nn.Module:
        seen.append(name)
        return linear

    text = ARCH.load_text_encoders(source, Placement(torch.bfloat16, CPU, quantizer=quantizer))
    model = text.models["text_encoder"]
    assert sorted(seen) == sorted(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    assert len(seen) == 2 * 7


# --- clips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "guidance"), [(5, 5.0), (9, 1.0)])
def test_clips_are_those_of_the_pipeline_bit_for_bit(
    source: ModelSource, pipeline: Any, denoiser: nn.Module, frames: int, guidance: float
) -> None:
    request = Request(
        prompt="a red circle", negative="a cat", seed=7, width=64, height=48, steps=4, guidance=guidance, frames=frames
    )
    theirs = ROW.draw(pipeline, request, SPEC)
    text = ARCH.load_text_encoders(source, Placement(torch.float32, CPU))
    conditions = ARCH.encode_prompts(text, request.prompts(SPEC))
    noise = initial_noise(SPEC, request)
    assert noise.shape == (1, 16, 1 + (frames - 1) // 4, 6, 8)
    ours = denoise(ARCH, denoiser, ARCH.load_scheduler(source), noise, request, conditions)
    assert torch.equal(ours, theirs)
    vae = ARCH.load_vae(source, torch.float32, CPU)
    expected = pipeline(
        prompt="a red circle", negative_prompt="a cat", width=64, height=48, num_frames=frames, num_inference_steps=4,
        guidance_scale=guidance, generator=torch.Generator("cpu").manual_seed(7), output_type="pt",
    ).frames  # fmt: skip
    assert torch.equal(ARCH.decode(vae, ours) * 0.5 + 0.5, expected.movedim(2, 1))
    pictures = to_frames(ARCH, vae, ours)
    assert [picture.size for picture in pictures] == [(64, 48)] * frames


def test_latents_are_normalised_with_the_vaes_own_figures(source: ModelSource, pipeline: Any) -> None:
    vae = ARCH.load_vae(source, torch.float32, CPU)
    pixels = torch.rand(1, 3, 9, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = ARCH.encode_images(vae, pixels)
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean
    shift = torch.tensor(pipeline.vae.config.latents_mean).view(1, 16, 1, 1, 1)
    scale = torch.tensor(pipeline.vae.config.latents_std).view(1, 16, 1, 1, 1)
    assert latents.shape == (1, *SPEC.latent_shape(64, 48, 9))
    torch.testing.assert_close(latents, (mean - shift) / scale, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_miniatures_vae_is_means_over_blocks_and_frames(source: ModelSource, dtype: torch.dtype) -> None:
    """First frame alone, then four by four; what moves is in the latents (12 to 14)."""
    vae = ARCH.load_vae(source, dtype, CPU)
    pixels = torch.rand(1, 3, 9, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    still = torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))
    means = torch.cat([still[:, :, :1], still[:, :, 1:5].mean(2, True), still[:, :, 5:].mean(2, True)], 2)
    latents = ARCH.encode_images(vae, pixels)
    decoded = ARCH.decode(vae, latents)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    repeated = means.repeat_interleave(8, 3).repeat_interleave(8, 4)[:, :, [0, 1, 1, 1, 1, 2, 2, 2, 2]]
    torch.testing.assert_close(decoded, repeated, atol=tolerance, rtol=0)
    change = (still[:, :, 3:5].mean(2) - still[:, :, 1:3].mean(2)) / 2
    measured = latents[:, 12:15, 1]
    gain = (measured * change).sum((0, 2, 3)) / change.square().sum((0, 2, 3))
    torch.testing.assert_close(measured, gain.view(1, 3, 1, 1) * change, atol=5 * tolerance, rtol=0)
    assert gain.min() > 1 and not latents[:, 12:, 0].abs().max() > 1e-2


def test_frames_that_do_not_fit_are_said() -> None:
    assert SPEC.frames_problem(1) is None and SPEC.frames_problem(5) is None and SPEC.frames_problem(81) is None
    assert SPEC.frames_problem(80) == "80 frames: wan21 needs 4 k + 1 of them; try 77 or 81"
    assert SPEC.frames_problem(2) == "2 frames: wan21 needs 4 k + 1 of them; try 1 or 5"
    assert SPEC.latent_shape(832, 480, 81) == (16, 21, 60, 104)
    assert SPEC.size_problem(832, 488) is not None and SPEC.size_problem(848, 480) is None


# --- schedulers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 30, 50])
def test_the_grid_is_the_pipelines(source: ModelSource, pipeline: Any, steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    ours = ARCH.load_scheduler(source)
    assert isinstance(ours, UniPCMultistepScheduler) and ours.config.flow_shift == 3.0
    theirs = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    theirs.set_timesteps(steps, device=CPU)
    ARCH.set_timesteps(ours, steps, (8, 8), CPU)
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.begin_index == 0


def test_a_model_without_scheduler_gets_the_published_one(folder: Path, source: ModelSource) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    alone = ARCH.load_scheduler(ModelSource("file", single_file=file))
    ours, theirs = dict(alone.config), dict(ARCH.load_scheduler(source).config)
    assert type(alone).__name__ == "UniPCMultistepScheduler"
    assert {key for key in theirs if not key.startswith("_") and ours[key] != theirs[key]} == set()


def test_the_distilled_variant_takes_even_euler_steps_at_shift_5(source: ModelSource) -> None:
    variant = SPEC.variants["14b_4step"]
    scheduler = ARCH.load_scheduler(source, variant.scheduler)
    ARCH.set_timesteps(scheduler, variant.steps, (8, 8), CPU)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(scheduler.sigmas, 5 * even / (1 + 4 * even))
    assert (variant.steps, variant.guidance, variant.distilled) == (4, 1.0, True)
    assert SPEC.shift_at((8, 8), variant) == 5.0 and SPEC.shift_at((8, 8), SPEC.default) == 3.0
    clean, noise = (torch.randn(1, 16, 2, 6, 8, generator=torch.Generator().manual_seed(k)) for k in range(2))
    request = Request(prompt="", seed=0, width=64, height=48, steps=4, frames=5)
    truth = ROW.native_truth(clean, noise)
    found = denoise(ARCH, truth, scheduler, noise, request, [{"tokens_LD": torch.zeros(3, 32)}])
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)
    assert truth.times == pytest.approx((1000 * scheduler.sigmas[:4]).tolist())


# --- LoRAs -------------------------------------------------------------------------------------------------------


def trained(denoiser: nn.Module, network: NetworkConfig) -> Any:
    """A LoRA with weights of its own in every layer."""
    lora.attach(denoiser, lora.linear_names(denoiser, SPEC, network), network, 0)
    with torch.no_grad():
        for name, parameter in lora.trainable(denoiser).items():
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.add_(0.02 * draw)
    return from_training(lora.state(denoiser), network)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
@pytest.mark.parametrize("fmt", ["comfy", "diffusers", "kohya"])
def test_every_kind_of_adapter_is_proven_or_refused(
    source: ModelSource, tmp_path: Path, fmt: Any, kind: Any, everything: bool
) -> None:
    from detour.lora_formats import unsupported

    network = NetworkConfig(type=kind, linear=4, linear_alpha=2, transformer_only=not everything)
    denoiser = load(source)
    shapes = linear_shapes(denoiser)
    file = trained(denoiser, network)
    path = tmp_path / "lora.safetensors"
    base = export.Base.of(denoiser, SPEC)
    if unsupported(kind, fmt, SPEC) is not None:
        with pytest.raises(UserError, match="use "):
            export.write_lora(path, file, base, fmt, dtype="fp32", metadata={})
        assert not path.exists()
        return
    export.write_lora(path, file, base, fmt, dtype="fp32", metadata={})
    proof = verify(path, file, SPEC, fmt, shapes)
    assert proof.modules == (ROW.lora_all if everything else ROW.lora_blocks)
    read = export.read_lora(path, SPEC, shapes)
    assert set(read.modules) == set(file.modules)


def test_comfy_and_kohya_have_wans_own_names() -> None:
    module = "blocks.3.attn2.to_out.0"
    assert module_key(module, SPEC, "comfy") == "diffusion_model.blocks.3.cross_attn.o"
    assert module_key(module, SPEC, "kohya") == "lora_unet_blocks_3_cross_attn_o"
    assert module_key(module, SPEC, "diffusers") == "transformer.blocks.3.attn2.to_out.0"
    names = {"condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
             "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0", "blocks.0.attn1.to_q": "blocks.0.self_attn.q"}  # fmt: skip
    for ours, theirs in names.items():
        assert module_key(ours, SPEC, "comfy") == f"diffusion_model.{theirs}"


def test_a_lora_of_another_model_is_refused(source: ModelSource, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(
        {f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}, path
    )
    with pytest.raises(UserError, match="Wan"):
        export.read_lora(path, SPEC, linear_shapes(ARCH.build_denoiser(source)))
