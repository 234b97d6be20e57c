"""Z-Image on its miniature, against diffusers: what the contract suite does not cover because it is Z-Image's alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour import UserError
from detour.archs.zimage import ARCHS, SPEC, original_keys
from detour.nano import zimage as nano
from detour.weights import ModelSource, Placement, find_model, materialise

CPU = torch.device("cpu")
ARCH = ARCHS["zimage"]
LONG = "a red circle on a blue background " * 120
PROMPTS = ["a red circle on a blue background", "", "zig", LONG, "ein Käfer 虫 🐞\n<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano")
    nano.write(path)
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    return find_model(str(folder), components=SPEC.components, denoiser=SPEC.denoiser)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(source: ModelSource, dtype: torch.dtype = torch.float32) -> nn.Module:
    denoiser = ARCH.build_denoiser(source)
    materialise(denoiser, ARCH.denoiser_tensors(source), Placement(dtype, CPU), where="miniature")
    return denoiser


@pytest.fixture(scope="module")
def denoiser(source: ModelSource) -> nn.Module:
    return load(source)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- where the weights come from ---------------------------------------------------------------------------------


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
    shapes_decide = ("dim", "n_layers", "n_refiner_layers", "n_heads", "in_channels", "cap_feat_dim", "axes_dims")
    assert {key: other.config[key] for key in shapes_decide} == {key: denoiser.config[key] for key in shapes_decide}
    latents, condition = torch.randn(1, 16, 8, 8), {"tokens_LD": torch.randn(40, 64)}
    ours = ARCH.predict(other, latents, torch.tensor([0.5]), [condition])
    assert torch.equal(ours, ARCH.predict(denoiser, latents, torch.tensor([0.5]), [condition]))


def test_a_single_file_in_the_diffusers_layout_gives_the_same_model(folder: Path, denoiser: nn.Module) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert same_weights(load(ModelSource("file", single_file=file)), denoiser)


def test_parts_of_an_all_in_one_file_other_than_the_transformer_are_left_out(folder: Path, tmp_path: Path) -> None:
    nano.write_original(tmp_path / "part.safetensors", folder, prefix="model.diffusion_model.")
    rest = {"vae.encoder.conv_in.weight": torch.ones(2), "text_encoders.qwen3_4b.model.norm.weight": torch.ones(2)}
    norm = {"model.diffusion_model.norm_final.weight": torch.ones(2)}
    save_file(load_file(tmp_path / "part.safetensors") | rest | norm, tmp_path / "all.safetensors")
    single = ModelSource("all", single_file=tmp_path / "all.safetensors")
    assert same_weights(load(single), load(ModelSource("part", single_file=tmp_path / "part.safetensors")))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_keys_are_renamed_as_diffusers_does(folder: Path, tmp_path: Path, prefix: str) -> None:
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    nano.write_original(tmp_path / "o.safetensors", folder, prefix=prefix)
    checkpoint = load_file(tmp_path / "o.safetensors") | {"norm_final.weight": torch.ones(1)}
    ours: dict[str, Tensor] = {}
    for key, tensor in checkpoint.items():
        ours |= dict(original_keys(key, tensor))
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(dict(checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "layers.0.attention.to_out.0.weight" in ours and "layers.0.attention.qkv.weight" not in ours


def test_a_sharded_folder_gives_the_same_model(
    folder: Path, denoiser: nn.Module, pipeline: Any, tmp_path: Path
) -> None:
    pipeline.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="1MB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    sharded = find_model(str(tmp_path), components=SPEC.components, denoiser="transformer", extras=str(folder))
    assert same_weights(load(sharded), denoiser)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"flux\.safetensors: this looks like a checkpoint of FLUX, not of Z-Image"):
        ARCH.build_denoiser(ModelSource("flux", single_file=tmp_path / "flux.safetensors"))


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


def test_a_lost_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["layers.1.attention.to_k.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"1 missing: layers\.1\.attention\.to_k\.weight"):
        load(ModelSource("other", folder=other))


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(source: ModelSource, folder: Path, dtype: torch.dtype) -> None:
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, dtype=dtype)
    text = ARCH.load_text_encoders(source, Placement(dtype, CPU))
    ours = ARCH.encode_prompts(text, PROMPTS)
    for prompt, condition in zip(PROMPTS, ours, strict=True):
        theirs = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]
        assert condition["tokens_LD"].dtype == dtype
        assert torch.equal(condition["tokens_LD"], theirs)
    lengths = [len(condition["tokens_LD"]) for condition in ours]
    assert lengths[3] == 512 and 0 < lengths[1] < lengths[0] < 32, lengths


def test_the_text_encoder_is_the_same_however_it_was_saved(source: ModelSource, folder: Path, tmp_path: Path) -> None:
    """The published folder holds a `Qwen3ForCausalLM`: names with `model.` before them, and perhaps a language head."""
    from transformers import Qwen3ForCausalLM, Qwen3Model

    plain = Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    plain.config.tie_word_embeddings = False
    causal = Qwen3ForCausalLM(plain.config).to(torch.bfloat16)
    causal.model.load_state_dict(plain.state_dict())
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "text_encoder")
    causal.save_pretrained(other / "text_encoder", max_shard_size="100KB")
    stored = json.loads((other / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" in stored and "model.norm.weight" in stored
    placement = Placement(torch.float32, CPU)
    (ours,) = ARCH.encode_prompts(ARCH.load_text_encoders(ModelSource("o", folder=other), placement), PROMPTS[:1])
    (expected,) = ARCH.encode_prompts(ARCH.load_text_encoders(source, placement), PROMPTS[:1])
    assert torch.equal(ours["tokens_LD"], expected["tokens_LD"])


def test_every_linear_layer_of_the_text_encoder_goes_through_the_quantiser(source: ModelSource) -> None:
    seen: list[str] = []

    def quantizer(name: str, linear: nn.Linear) -> nn.Module:
        assert not linear.weight.is_meta
        seen.append(name)
        return linear

    text = ARCH.load_text_encoders(source, Placement(torch.bfloat16, CPU, quantizer=quantizer))
    model = text.models["text_encoder"]
    assert sorted(seen) == sorted(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    assert len(seen) == 3 * 7
    assert text.to(CPU) is text
    assert not model.training
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


# --- prediction --------------------------------------------------------------------------------------------------


def conditions_of(*lengths: int) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(5)
    return [{"tokens_LD": torch.randn(length, 64, generator=drawn)} for length in lengths]


def as_the_pipeline(transformer: Any, latents: Tensor, timestep: Tensor, captions: list[Tensor]) -> Tensor:
    """The lines of diffusers' denoising loop, at the scheduler's own float32 timestep."""
    t = (1000 - timestep.expand(latents.shape[0])) / 1000
    out = transformer(list(latents.unsqueeze(2).unbind(dim=0)), t, captions, return_dict=False)[0]
    return -torch.stack([o.float() for o in out], dim=0).squeeze(2)


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_prediction_is_the_pipelines_bit_for_bit_at_every_timestep(
    denoiser: nn.Module, pipeline: Any, source: ModelSource, steps: int
) -> None:
    scheduler = ARCH.load_scheduler(source)
    ARCH.set_timesteps(scheduler, steps, (8, 12), CPU)
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(steps))
    conditions = conditions_of(20, 50)
    captions = [condition["tokens_LD"] for condition in conditions]
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        theirs = as_the_pipeline(pipeline.transformer, latents, timestep, captions)
        for t in (timestep.double() / 1000, sigma):
            assert torch.equal(ARCH.predict(denoiser, latents, t.expand(2), conditions), theirs)


class Listening(nn.Module):
    """Stands in for the transformer and notes the time that it is given."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.time = torch.zeros(0)

    def forward(self, pictures: list[Tensor], t: Tensor, captions: list[Tensor], return_dict: bool) -> Any:
        self.time = t
        return (pictures,)


def test_the_model_is_told_the_very_time_that_the_pipeline_tells(source: ModelSource) -> None:
    scheduler, listening, latents = ARCH.load_scheduler(source), Listening(), torch.zeros(1, 16, 2, 2)
    for steps in range(1, 61):
        ARCH.set_timesteps(scheduler, steps, (2, 2), CPU)
        for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            for t in (timestep.double() / 1000, sigma):
                ARCH.predict(listening, latents, t.expand(1), conditions_of(1))
                assert listening.time.dtype == torch.float32
                assert torch.equal(listening.time, ((1000 - timestep) / 1000).expand(1))


def test_each_picture_needs_its_condition(denoiser: nn.Module) -> None:
    with pytest.raises(ValueError, match="2 pictures, 1 conditions"):
        ARCH.predict(denoiser, torch.zeros(2, 16, 8, 8), torch.ones(2), conditions_of(5))


def test_captions_of_one_padded_length_share_a_batch_exactly(denoiser: nn.Module) -> None:
    """20 and 31 tokens are both padded to 32, so no mask is needed; 50 goes to 64 and would bring one in."""
    latents, t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    for lengths in ((20, 31), (33, 64), (20, 50)):
        conditions = conditions_of(*lengths)
        together = ARCH.predict(denoiser, latents, t, conditions)
        alone = [ARCH.predict(denoiser, latents[i : i + 1], t[i : i + 1], conditions[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-5)


def test_a_shared_padded_length_needs_no_mask(denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []
    layer = denoiser.layers[0]
    inner = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, mask, *rest: masks.append(mask) or inner(x, mask, *rest))
    latents, t = torch.zeros(2, 16, 8, 8), torch.tensor([0.5, 0.5])
    ARCH.predict(denoiser, latents, t, conditions_of(5, 32))
    ARCH.predict(denoiser, latents, t, conditions_of(5, 33))
    assert masks[0] is None and masks[1] is not None
    assert SPEC.text_multiple == 32


# --- sampling and pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("steps", "size"), [(1, (64, 64)), (4, (64, 96)), (8, (1024, 1024)), (30, (768, 1344))])
def test_the_grid_is_the_pipelines(dynamic: bool, steps: int, size: tuple[int, int]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.z_image import pipeline_z_image as theirs

    config = {"shift": 3.0, "use_dynamic_shifting": dynamic}
    ours, reference = (FlowMatchEulerDiscreteScheduler(**config) for _ in range(2))
    mu = theirs.calculate_shift((size[0] // 16) * (size[1] // 16))
    sigmas = theirs.get_default_z_image_sigmas(steps)
    theirs.retrieve_timesteps(reference, steps, CPU, sigmas=sigmas, mu=mu)
    ARCH.set_timesteps(ours, steps, (size[0] // 8, size[1] // 8), CPU)
    assert torch.equal(ours.timesteps, reference.timesteps)
    assert torch.equal(ours.sigmas, reference.sigmas)
    assert ours.begin_index == 0


def test_the_turbo_grid_of_four_steps(source: ModelSource) -> None:
    scheduler = ARCH.load_scheduler(source)
    ARCH.set_timesteps(scheduler, 4, (8, 8), CPU)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_a_model_without_scheduler_gets_shift_3(folder: Path, tmp_path: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    scheduler = ARCH.load_scheduler(ModelSource("file", single_file=file))
    assert scheduler.shift == 3.0 and not scheduler.config.use_dynamic_shifting
    own = shutil.copytree(folder, tmp_path / "own")
    path = own / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": 6.0}))
    assert ARCH.load_scheduler(ModelSource("own", folder=own)).shift == 6.0


def test_pictures_are_normalised_with_the_vaes_own_figures(source: ModelSource, pipeline: Any) -> None:
    vae = ARCH.load_vae(source, torch.float32, CPU)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = ARCH.encode_images(vae, pixels)
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean
        back = pipeline.vae.decode(latents / 0.3611 + 0.1159, return_dict=False)[0]
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611, atol=1e-6, rtol=1e-6)
    assert torch.equal(ARCH.decode(vae, latents), back)


def test_guidance_is_counted_from_one() -> None:
    assert SPEC.diffusers_guidance(1.0) == 0.0
    assert SPEC.diffusers_guidance(4.0) == 3.0
    assert SPEC.variants["turbo"].guidance == 1.0 and SPEC.variants["turbo"].steps == 8


def test_the_variants_say_which_needs_an_adapter() -> None:
    assert [name for name, variant in SPEC.variants.items() if variant.adapter] == ["turbo"]
    assert [name for name, variant in SPEC.variants.items() if variant.distilled] == ["turbo"]
    assert SPEC.variants["deturbo"].extras_repo == SPEC.variants["turbo"].repo
