"""Stable Diffusion 3 on its miniatures, against diffusers: what the contract suite does not cover."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from arch_row import Row
from detour import UserError, draw, nano
from detour.archs import parts
from detour.archs.sd3 import ARCHS, SPEC, _text
from detour.archs.sd3_parts import config_of
from detour.export.reading import read_lora
from detour.nano import sd3 as nano_sd3
from detour.sample import Request, denoise, initial_noise
from detour.weights import ModelSource, Placement, find_model, materialise
from rows_sd3 import LARGE_35, MEDIUM, MEDIUM_35, ROWS, full_size

CPU = torch.device("cpu")
FLOAT = Placement(torch.float32, CPU)
ARCH, ROW = ARCHS["sd3"], ROWS[0]
PROMPTS = ["a red circle on a blue background", "", "a red circle at the left, " * 80, "ein Käfer 虫 🐞\n</s>"]
VARIANTS = ["medium", "3.5-medium", "3.5-large"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sd3")
    for variant in VARIANTS:
        nano.write(root / variant, f"sd3:{variant}", random=True)
    return {variant: root / variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["3.5-large"]


def find(path: Path, **options: Any) -> ModelSource:
    return find_model(str(path), components=SPEC.components, denoiser=SPEC.denoiser, optional=SPEC.optional, **options)


def load(source: ModelSource) -> nn.Module:
    denoiser = ARCH.build_denoiser(source)
    materialise(denoiser, ARCH.denoiser_tensors(source), FLOAT, where="miniature")
    return denoiser


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def drawn_by_both(row: Row, path: Path, pipeline: Any, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    source = find(path)
    text = ARCH.load_text_encoders(source, FLOAT)
    conditions = ARCH.encode_prompts(text, request.prompts(SPEC))
    scheduler = ARCH.load_scheduler(source)
    ours = denoise(ARCH, load(source), scheduler, initial_noise(SPEC, request), request, conditions)
    return ours, row.draw(pipeline, request, SPEC)


# --- structure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters", "positions"),
    [
        (MEDIUM, 2_028_328_000, 192**2 * 1536),  # "2B"
        (MEDIUM_35, 2_243_171_520, 384**2 * 1536),  # "2.5B", with its positions, which are no parameters in diffusers
        (LARGE_35, 8_056_627_520, 192**2 * 2432),  # "8.1B"
    ],
)
def test_published_sizes(config: dict[str, Any], parameters: int, positions: int) -> None:
    with torch.device("meta"):
        full = full_size(**config)
    assert sum(parameter.numel() for parameter in full.parameters()) == parameters
    assert sum(buffer.numel() for buffer in full.buffers()) == positions


def test_the_miniatures_have_the_structure_of_their_variants(folders: dict[str, Path]) -> None:
    def config(variant: str) -> dict[str, Any]:
        return json.loads((folders[variant] / "transformer" / "config.json").read_text())

    assert config("medium")["qk_norm"] is None and config("medium")["dual_attention_layers"] == []
    assert config("3.5-medium")["qk_norm"] == "rms_norm" and config("3.5-medium")["dual_attention_layers"] == [0, 1]
    assert config("3.5-large")["qk_norm"] == "rms_norm" and config("3.5-large")["dual_attention_layers"] == []
    for variant in VARIANTS:
        assert sum(file.stat().st_size for file in folders[variant].rglob("*") if file.is_file()) < 5_000_000


@pytest.mark.parametrize("variant", ["medium", "3.5-medium"])
def test_the_other_structures_draw_what_the_pipeline_draws(folders: dict[str, Path], variant: str) -> None:
    pipeline = ROW.load_pipeline(folders[variant])
    request = Request(prompt=PROMPTS[0], negative="zig", seed=2, width=96, height=64, steps=3, guidance=4.5)
    ours, theirs = drawn_by_both(ROW, folders[variant], pipeline, request)
    assert torch.equal(ours, theirs)


def test_the_turbo_is_a_variant_of_values() -> None:
    assert set(SPEC.variants) == set(nano_sd3.STRUCTURE)
    turbo = SPEC.variants["3.5-large-turbo"]
    assert (turbo.distilled, turbo.steps, turbo.guidance) == (True, 4, 1.0)
    assert [name for name, variant in SPEC.variants.items() if variant.distilled] == ["3.5-large-turbo"]


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(folder: Path, dtype: torch.dtype) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype)
    text = ARCH.load_text_encoders(find(folder), Placement(dtype, CPU))
    for prompt, condition in zip(PROMPTS, ARCH.encode_prompts(text, PROMPTS), strict=True):
        with torch.no_grad():
            tokens, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        assert condition["pooled_D"].dtype == condition["t5_LD"].dtype == dtype
        assert torch.equal(condition["pooled_D"], pooled[0])
        assert torch.equal(_text(condition, nano_sd3.T5_DIM), tokens[0])
    assert (condition["clip_LD"].shape, condition["t5_LD"].shape) == ((77, 64), (256, 96))


@pytest.fixture
def without_t5(folder: Path, tmp_path: Path) -> Path:
    """The model as diffusers saves it without T5: `null` in its index."""
    from diffusers import StableDiffusion3Pipeline

    path = tmp_path / "without"
    StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.bfloat16
    ).save_pretrained(path)
    assert not (path / "text_encoder_3").exists()
    return path


def test_a_model_made_without_t5_draws_what_the_pipeline_draws(folder: Path, without_t5: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        without_t5, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    request = Request(prompt=PROMPTS[0], negative="zig", seed=2, width=64, height=64, steps=3, guidance=3.5)
    ours, theirs = drawn_by_both(ROW, without_t5, pipeline, request)
    assert torch.equal(ours, theirs)
    with_t5, _ = drawn_by_both(ROW, folder, pipeline, request)
    assert not torch.equal(ours, with_t5)


def test_a_t5_that_merely_misses_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "lost")
    shutil.rmtree(path / "text_encoder_3")
    with pytest.raises(UserError, match=r"there is no text_encoder_3/ in .*; found: model_index.json"):
        find(path)
    (path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json: not a readable index of a model"):
        find(path)


def test_what_a_model_is_made_without_may_come_from_another(folder: Path, without_t5: Path) -> None:
    source = find(without_t5, extras=str(folder))
    assert not source.lacks("text_encoder_3") and find(without_t5).lacks("text_encoder_3")
    text = ARCH.load_text_encoders(source, FLOAT)
    (ours,) = ARCH.encode_prompts(text, PROMPTS[:1])
    (expected,) = ARCH.encode_prompts(ARCH.load_text_encoders(find(folder), FLOAT), PROMPTS[:1])
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_the_command_draws_with_a_model_without_t5(without_t5: Path, tmp_path: Path) -> None:
    drawing = draw.Drawing(
        arch="sd3",
        model=str(without_t5),
        prompts=["a zig"],
        loras=[],
        size=(64, 64),
        steps=1,
        device="cpu",
        dtype="fp32",
    )
    (picture,) = draw.draw(drawing, tmp_path / "out")
    assert picture.is_file()


def test_t5s_sensitive_layers_stay_as_in_transformers(folder: Path) -> None:
    """float32 in a float16 encoder; and as they are where the quantiser's weights are bytes, to which T5 would cast."""

    class Bytes(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)

    where = folder / "text_encoder_3"
    half = parts.load_text_model("T5EncoderModel", where, Placement(torch.float16, CPU))
    kept = {name for name, tensor in half.named_parameters() if tensor.dtype == torch.float32}
    assert kept == {f"encoder.block.{block}.layer.1.DenseReluDense.wo.weight" for block in range(2)}
    packed = parts.load_text_model("T5EncoderModel", where, Placement(torch.float32, CPU, lambda _, one: Bytes(one)))
    plain = [name for name, module in packed.named_modules() if isinstance(module, nn.Linear)]
    assert plain == [f"encoder.block.{block}.layer.1.DenseReluDense.wo" for block in range(2)]
    whole = parts.load_text_model("T5EncoderModel", where, Placement(torch.float32, CPU, lambda _, one: one))
    assert whole.shared.weight is whole.encoder.embed_tokens.weight


# --- one file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_original_single_file_gives_the_same_model(
    folders: dict[str, Path], tmp_path: Path, variant: str, prefix: str
) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    file = tmp_path / "original.safetensors"
    nano_sd3.write_original(file, folders[variant], prefix=prefix, bundled=False)
    expected = load(find(folders[variant]))
    # diffusers' own converter confirms that the file is what it would be. It reads files without other parts.
    converted = convert_sd3_transformer_checkpoint_to_diffusers(load_file(file))
    assert converted.keys() == expected.state_dict().keys()
    assert all(torch.equal(converted[name].float(), tensor) for name, tensor in expected.state_dict().items())
    source = find(file, extras=str(folders[variant]))
    other = load(source)
    assert same_weights(other, expected)
    told = config_of(file, SPEC.title)
    assert all(list(value) == list(expected.config[key]) if isinstance(value, list) else value == expected.config[key]
               for key, value in told.items())  # fmt: skip


def test_a_single_file_in_diffusers_own_layout_is_read_too(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert same_weights(load(find(file, extras=str(folder))), load(find(folder)))


def test_an_all_in_one_file_holds_vae_and_encoders(folder: Path, tmp_path: Path) -> None:
    """They come from it and not from the extras, whose weights are others here."""
    file, others = tmp_path / "all.safetensors", tmp_path / "others"
    nano_sd3.write_original(file, folder)
    nano_sd3.write(others, seed=1)
    source, plain = find(file, extras=str(others)), find(folder)
    assert same_weights(load(source), load(plain))
    assert same_weights(ARCH.load_vae(source, torch.float32, CPU), ARCH.load_vae(plain, torch.float32, CPU))
    ours, expected = (ARCH.load_text_encoders(one, FLOAT) for one in (source, plain))
    for name, model in expected.models.items():
        assert same_weights(ours.models[name], model), name
    strangers = ARCH.load_text_encoders(find(others), FLOAT)
    assert not same_weights(strangers.models["text_encoder_3"], expected.models["text_encoder_3"])


def test_another_models_file_is_named(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 1)}, file)
    with pytest.raises(UserError, match="looks like a checkpoint of FLUX, not of Stable Diffusion 3"):
        ARCH.build_denoiser(find(file, extras=str(folder)))
    save_file({"something.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="not a checkpoint of Stable Diffusion 3"):
        ARCH.build_denoiser(find(file, extras=str(folder)))


# --- bad input ---------------------------------------------------------------------------------------------------


def test_another_models_lora_is_named(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    pair = {"lora_A.weight": torch.zeros(2, 4), "lora_B.weight": torch.zeros(4, 2)}
    save_file({f"transformer.single_transformer_blocks.0.proj_mlp.{part}": one for part, one in pair.items()}, file)
    with pytest.raises(UserError, match="not a LoRA of Stable Diffusion 3: it looks like FLUX"):
        read_lora(file, SPEC)


def test_a_picture_beyond_its_positions_is_refused(folder: Path) -> None:
    denoiser, latents = load(find(folder)), torch.zeros(1, 16, 8, 66)
    text = ARCH.load_text_encoders(find(folder), FLOAT)
    with pytest.raises(
        UserError, match="528 x 64 pixels: this Stable Diffusion 3 has positions for sides of up to 512"
    ):
        ARCH.predict(denoiser, latents, torch.ones(1), ARCH.encode_prompts(text, [""]))
    with pytest.raises(ValueError, match="1 pictures, 2 conditions"):
        ARCH.predict(denoiser, latents, torch.ones(1), ARCH.encode_prompts(text, ["", ""]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_grid_is_the_pipelines(dynamic: bool) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3 as theirs

    config = {"shift": 3.0, "use_dynamic_shifting": dynamic}
    ours, reference = (FlowMatchEulerDiscreteScheduler(**config) for _ in range(2))
    mu = {"mu": theirs.calculate_shift(48 * 64)} if dynamic else {}
    theirs.retrieve_timesteps(reference, 7, CPU, **mu)
    ARCH.set_timesteps(ours, 7, (96, 128), CPU)
    assert torch.equal(ours.timesteps, reference.timesteps) and torch.equal(ours.sigmas, reference.sigmas)
