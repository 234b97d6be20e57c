"""Lumina 2 on its miniature, against diffusers: what the contract suite does not cover because it is Lumina's alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detour import UserError
from detour.archs.lumina2 import ARCHS, SPEC
from detour.config.job import NetworkConfig
from detour.export import Base, from_training, read_lora, write_lora
from detour.lora_formats import unsupported
from detour.nano import lumina2 as nano
from detour.nano import zimage
from detour.nn import lora
from detour.sample import Request
from detour.weights import ModelSource, Placement, find_model, materialise

CPU = torch.device("cpu")
ARCH = ARCHS["lumina2"]
NEGATIVE = SPEC.negative_mark
LONG = "a red circle on a blue background " * 60
PROMPTS = ["a red circle on a blue background", "zig", LONG, "ein Käfer 虫 🐞\n<Prompt Start>"]


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
    from diffusers import Lumina2Pipeline

    pipe = Lumina2Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    return pipe


def load(source: ModelSource) -> nn.Module:
    denoiser = ARCH.build_denoiser(source)
    materialise(denoiser, ARCH.denoiser_tensors(source), Placement(torch.float32, CPU), where="miniature")
    return denoiser


@pytest.fixture(scope="module")
def denoiser(source: ModelSource) -> nn.Module:
    return load(source)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def conditions_of(*lengths: int) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(5)
    return [{"tokens_LD": torch.randn(length, nano.TEXT_DIM, generator=drawn)} for length in lengths]


# --- where the weights come from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_an_original_single_file_gives_the_same_model(
    folder: Path, denoiser: nn.Module, tmp_path: Path, prefix: str
) -> None:
    nano.write_original(tmp_path / "original.safetensors", folder, prefix=prefix)
    single = find_model(
        str(tmp_path / "original.safetensors"), components=SPEC.components, denoiser="transformer", extras=str(folder)
    )
    other = load(single)
    assert same_weights(other, denoiser)
    inferred = ("hidden_size", "num_layers", "num_refiner_layers", "num_attention_heads", "num_kv_heads", "in_channels")
    assert {key: other.config[key] for key in inferred} == {key: denoiser.config[key] for key in inferred}
    assert list(other.config["axes_dim_rope"]) == list(denoiser.config["axes_dim_rope"])
    latents, conditions = torch.randn(1, 16, 8, 8), conditions_of(40)
    ours = ARCH.predict(other, latents, torch.tensor([0.5]), conditions)
    assert torch.equal(ours, ARCH.predict(denoiser, latents, torch.tensor([0.5]), conditions))


def test_other_parts_of_a_single_file_are_left_out_and_diffusers_own_names_are_kept(
    folder: Path, denoiser: nn.Module, tmp_path: Path
) -> None:
    nano.write_original(tmp_path / "part.safetensors", folder, prefix="model.diffusion_model.")
    rest = {"vae.encoder.conv_in.weight": torch.ones(2), "text_encoders.gemma2_2b.model.norm.weight": torch.ones(2)}
    save_file(load_file(tmp_path / "part.safetensors") | rest, tmp_path / "all.safetensors")
    assert same_weights(load(ModelSource("all", single_file=tmp_path / "all.safetensors")), denoiser)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert same_weights(load(ModelSource("file", single_file=file)), denoiser)


def test_original_names_are_turned_as_diffusers_does() -> None:
    """Its converter knows the published sizes only, so this is the published model with one column for each layer."""
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    block = ("attention.qkv", "attention.out", "attention.q_norm", "attention.k_norm", "attention_norm1")
    block += ("attention_norm2", "ffn_norm1", "ffn_norm2", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    names = [f"{kind}.{n}.{part}" for kind in ("layers", "noise_refiner") for n in (0, 1) for part in block]
    names += [f"context_refiner.{n}.{part}" for n in (0, 1) for part in block]
    names += [f"{kind}.0.adaLN_modulation.1" for kind in ("layers", "noise_refiner")]
    names += ["cap_embedder.0", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "x_embedder", "norm_final"]
    names += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    checkpoint = {f"{name}.weight": torch.randn(3840 if "qkv" in name else 4, 1) for name in names}
    ours: dict[str, Tensor] = {}
    assert SPEC.lora_keys.original is not None
    for key, tensor in checkpoint.items():
        ours |= dict(SPEC.lora_keys.original.tensors(f"model.diffusion_model.{key}", tensor))
    theirs = convert_lumina2_to_diffusers(dict(checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_file_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    flux, zit, lumina = (tmp_path / f"{name}.safetensors" for name in ("flux", "zimage", "lumina"))
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)}, flux)
    with pytest.raises(UserError, match=r"flux\.safetensors: this looks like a checkpoint of FLUX, not of Lumina 2"):
        ARCH.build_denoiser(ModelSource("flux", single_file=flux))
    zimage.write(tmp_path / "zimage")
    zimage.write_original(zit, tmp_path / "zimage")
    with pytest.raises(UserError, match="looks like a checkpoint of Z-Image, not of Lumina 2"):
        ARCH.build_denoiser(ModelSource("zimage", single_file=zit))
    nano.write_original(lumina, folder)
    from detour import archs

    with pytest.raises(UserError, match="looks like a checkpoint of Lumina 2, not of Z-Image"):
        archs.get("zimage").build_denoiser(ModelSource("lumina", single_file=lumina))


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


def test_a_missing_folder_is_named(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "text_encoder")
    with pytest.raises(UserError, match="there is no text_encoder/"):
        find_model(str(other), components=SPEC.components, denoiser=SPEC.denoiser)


def test_rotary_frequencies_are_there(source: ModelSource) -> None:
    """Plain tensors of a module, which are no buffers and come from no file."""
    frequencies = ARCH.build_denoiser(source).rope_embedder.freqs_cis
    assert [tuple(one.shape) for one in frequencies] == [(300, 4), (512, 4), (512, 4)]
    assert not any(one.is_meta for one in frequencies)
    assert frequencies[0].shape[0] > SPEC.text_tokens, "captions are numbered along the first axis"


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_bit_for_bit(source: ModelSource, folder: Path, dtype: torch.dtype) -> None:
    from diffusers import Lumina2Pipeline

    pipe = Lumina2Pipeline.from_pretrained(folder, dtype=dtype)
    text = ARCH.load_text_encoders(source, Placement(dtype, CPU))
    for prompt, negative in zip(PROMPTS, ["", *PROMPTS[1:]], strict=True):
        tokens, mask, negative_tokens, negative_mask = pipe.encode_prompt(prompt, negative_prompt=negative)
        request = Request(prompt=prompt, negative=negative, seed=0, width=64, height=64, steps=1, guidance=2.0)
        ours, ours_negative = ARCH.encode_prompts(text, request.prompts(SPEC))
        assert ours["tokens_LD"].dtype == dtype
        assert torch.equal(ours["tokens_LD"], tokens[0][mask[0].bool()])
        assert torch.equal(ours_negative["tokens_LD"], negative_tokens[0][negative_mask[0].bool()])
        assert len(ours["tokens_LD"]) > len(ours_negative["tokens_LD"]) or prompt == LONG
    (longest,) = ARCH.encode_prompts(text, [LONG])
    assert len(longest["tokens_LD"]) == SPEC.text_tokens


def test_the_empty_caption_is_the_absence_of_a_prompt(source: ModelSource) -> None:
    """What caption dropout trains is what an empty negative prompt is in sampling: no system prompt before it."""
    text = ARCH.load_text_encoders(source, Placement(torch.float32, CPU))
    empty, negative, prompt, marked = ARCH.encode_prompts(text, ["", NEGATIVE, "a cat", NEGATIVE + "a cat"])
    assert torch.equal(empty["tokens_LD"], negative["tokens_LD"]) and len(empty["tokens_LD"]) == 1
    assert len(prompt["tokens_LD"]) > len(marked["tokens_LD"]) + 20


def test_the_text_encoder_is_the_same_however_it_was_saved(source: ModelSource, folder: Path, tmp_path: Path) -> None:
    """As `Gemma2ForCausalLM`: names with `model.` before them, and perhaps a language head."""
    from transformers import Gemma2ForCausalLM, Gemma2Model

    plain = Gemma2Model.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    plain.config.tie_word_embeddings = False
    causal = Gemma2ForCausalLM(plain.config).to(torch.bfloat16)
    causal.model.load_state_dict(plain.state_dict())
    other = shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(other / "text_encoder")
    causal.save_pretrained(other / "text_encoder")
    assert "lm_head.weight" in load_file(other / "text_encoder" / "model.safetensors")
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

    model = ARCH.load_text_encoders(source, Placement(torch.bfloat16, CPU, quantizer=quantizer)).models["text_encoder"]
    assert sorted(seen) == sorted(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    assert len(seen) == 4 * 7 and not model.training
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


# --- prediction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_prediction_is_the_pipelines_bit_for_bit_at_every_timestep(
    denoiser: nn.Module, pipeline: Any, source: ModelSource, steps: int
) -> None:
    scheduler = ARCH.load_scheduler(source)
    ARCH.set_timesteps(scheduler, steps, (8, 12), CPU)
    latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(steps))
    tokens, mask, _, _ = pipeline.encode_prompt(PROMPTS[0])
    condition = {"tokens_LD": tokens[0][mask[0].bool()]}
    for timestep in scheduler.timesteps:
        current = (1 - timestep / 1000).expand(1)
        with torch.no_grad():
            theirs = -pipeline.transformer(latents, current, tokens, mask, return_dict=False)[0]
            ours = ARCH.predict(denoiser, latents, (timestep.double() / 1000).expand(1), [condition])
        assert torch.equal(ours, theirs)


def test_captions_of_any_lengths_share_a_batch(denoiser: nn.Module) -> None:
    latents, t = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8, 0.5])
    conditions = conditions_of(1, 50, 256)
    together = ARCH.predict(denoiser, latents, t, conditions)
    alone = [ARCH.predict(denoiser, latents[i : i + 1], t[i : i + 1], conditions[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="2 pictures, 1 conditions"):
        ARCH.predict(denoiser, latents[:2], t[:2], conditions[:1])


# --- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("steps", "size"), [(1, (64, 64)), (4, (64, 96)), (30, (1024, 1024)), (50, (768, 1344))])
def test_the_grid_is_the_pipelines(dynamic: bool, steps: int, size: tuple[int, int]) -> None:
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.lumina2 import pipeline_lumina2 as theirs

    ours, reference = (FlowMatchEulerDiscreteScheduler(shift=6.0, use_dynamic_shifting=dynamic) for _ in range(2))
    sigmas, mu = np.linspace(1.0, 1 / steps, steps), theirs.calculate_shift(16)  # the axis that it takes for tokens
    theirs.retrieve_timesteps(reference, steps, CPU, sigmas=sigmas, mu=mu)
    ARCH.set_timesteps(ours, steps, (size[0] // 8, size[1] // 8), CPU)
    assert torch.equal(ours.timesteps, reference.timesteps)
    assert torch.equal(ours.sigmas, reference.sigmas)
    assert ours.begin_index == 0


def test_a_model_without_scheduler_gets_shift_6(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    scheduler = ARCH.load_scheduler(ModelSource("file", single_file=file))
    assert scheduler.shift == 6.0 and not scheduler.config.use_dynamic_shifting


# --- LoRA files --------------------------------------------------------------------------------------------------


def trained(source: ModelSource, **network: Any) -> tuple[nn.Module, NetworkConfig]:
    """The miniature with a LoRA of arbitrary weights on it."""
    settings = NetworkConfig(linear=4, linear_alpha=3, **network)
    model = load(source)
    lora.attach(model, lora.linear_names(model, SPEC, settings), settings, 0)
    g = torch.Generator().manual_seed(1)
    for name, parameter in lora.trainable(model).items():
        if name.endswith("lora_B.weight"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)
    return model, settings


def field(model: nn.Module) -> Tensor:
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return ARCH.predict(model, latents, torch.tensor([0.7]), conditions_of(20))


@pytest.mark.parametrize("include", [[], [r"layers\.\d+\.attn\.to_q", "norm1"]])
def test_comfyui_computes_what_training_did(
    source: ModelSource, folder: Path, tmp_path: Path, include: list[str]
) -> None:
    """By its rules: each key is the name of one of its own weights, which are the original ones; no alpha is a scale of
    1. A LoRA on a part of a fused layer adds nothing to the rest of it.
    """
    model, network = trained(source, include=include)
    base, file = Base.of(model, SPEC), from_training(lora.state(model), network)
    written = write_lora(tmp_path / "x.safetensors", file, base, "comfy", dtype="fp32", metadata={})
    assert written.proof.loader == "PEFT" and "ComfyUI alone" in written.notes[0], "diffusers knows one size only"
    nano.write_original(tmp_path / "model.safetensors", folder, prefix="diffusion_model.")
    weights = {name: tensor.float() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    keys = load_file(tmp_path / "x.safetensors")
    stems = {key.rpartition(".lora_")[0] for key in keys}
    assert not any(key.endswith(".alpha") for key in keys) and any(stem.endswith(".attention.qkv") for stem in stems)
    for stem in stems:
        change = keys[f"{stem}.lora_B.weight"] @ keys[f"{stem}.lora_A.weight"]
        assert change.shape == weights[f"{stem}.weight"].shape
        weights[f"{stem}.weight"] += change
    save_file(weights, tmp_path / "patched.safetensors")
    patched = load(ModelSource("patched", single_file=tmp_path / "patched.safetensors"))
    torch.testing.assert_close(field(patched), field(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(field(model), field(load(source)), atol=1e-2)
    back = read_lora(tmp_path / "x.safetensors", SPEC)
    assert set(back.modules) == set(file.modules) and back.rank == 4 and back.notes == ()


def test_a_lora_of_kohyas_programs_is_read(source: ModelSource, tmp_path: Path) -> None:
    """sd-scripts: `lora_unet_` and the original names, trained on the fused layer, with alpha. It is not written."""
    g = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, nano.DIM, generator=g), torch.randn(120, 4, generator=g)
    stem = "lora_unet_layers_1_attention_qkv"
    final = "lora_unet_final_layer_linear"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    tensors |= {f"{final}.lora_down.weight": torch.randn(2, nano.DIM), f"{final}.lora_up.weight": torch.randn(64, 2)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    from detour.export.verify import layer_shapes

    for shapes in (None, layer_shapes(load(source))):
        file = read_lora(tmp_path / "kohya.safetensors", SPEC, shapes)
        names = [f"layers.1.attn.to_{part}" for part in "qkv"]
        assert set(file.modules) == {*names, "norm_out.linear_2"} and file.format == "kohya"
        changes = [
            file.scale(name) * file.tensors[f"{name}.lora_B.weight"] @ file.tensors[f"{name}.lora_A.weight"]
            for name in names
        ]
        assert [len(change) for change in changes] == [72, 24, 24]
        torch.testing.assert_close(torch.cat(changes), 0.5 * up @ down)
    with pytest.raises(UserError, match="lora in the format kohya: no loader reads a LoRA of Lumina 2 under such"):
        write_lora(tmp_path / "x.safetensors", file, Base(spec=SPEC, shapes={}), "kohya", dtype=None, metadata={})


def test_kinds_that_no_format_carries_are_known_before_training() -> None:
    assert unsupported("dora", "comfy", SPEC) is None and unsupported("dora", "diffusers", SPEC) is None
    assert unsupported("loha", "comfy", SPEC) is None
    reason = unsupported("lokr", "comfy", SPEC)
    assert reason is not None and reason.endswith("no other format carries one of Lumina 2 either")
    assert "diffusers refuses a loha of Lumina 2; use comfy" in str(unsupported("loha", "diffusers", SPEC))


def test_a_lora_of_zimage_is_refused_though_its_names_are_alike(tmp_path: Path) -> None:
    from detour import archs

    stem = "diffusion_model.layers.0.attention.qkv"
    for inside, out, fits in ((48, 144, "zimage"), (48, 80, "lumina2")):
        save_file(
            {f"{stem}.lora_A.weight": torch.ones(2, inside), f"{stem}.lora_B.weight": torch.ones(out, 2)},
            tmp_path / "x.safetensors",
        )
        for name in ("zimage", "lumina2"):
            if name == fits:
                assert len(read_lora(tmp_path / "x.safetensors", archs.spec(name)).modules) == 3
            else:
                with pytest.raises(UserError, match="outputs is none of this model's; is it a LoRA of another model"):
                    read_lora(tmp_path / "x.safetensors", archs.spec(name))


# --- the miniature -----------------------------------------------------------------------------------------------


def test_the_miniature_is_a_function_of_its_seed(folder: Path, tmp_path: Path) -> None:
    def content(path: Path) -> dict[str, bytes]:
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    state = torch.get_rng_state()
    nano.write(tmp_path / "again", "lumina2", "base")
    nano.write(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert content(tmp_path / "again") == content(folder)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert content(tmp_path / "other")[weights] != content(folder)[weights]
    assert sum(map(len, content(folder).values())) < 5e6
    with pytest.raises(UserError, match="lumina2:turbo is not known here"):
        nano.write(tmp_path / "x", "lumina2", "turbo")
