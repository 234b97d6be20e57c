"""PixArt-alpha and Sigma on their miniatures, against diffusers and PEFT: what the contract suite does not cover."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from detour import UserError, export, nano
from detour.archs import parts
from detour.archs.base import Framing
from detour.archs.pixart import ALPHA, ARCHS, SIGMA
from detour.config.job import NetworkConfig
from detour.export.reading import read_lora
from detour.lora_formats import unsupported
from detour.nano import pixart as nano_pixart
from detour.nn import lora
from detour.nn.rng import generator
from detour.sample import Request, denoise, initial_noise
from detour.weights import ModelSource, Placement, find_model, materialise
from rows_pixart import ROWS

CPU = torch.device("cpu")
FLOAT = Placement(torch.float32, CPU)
PROMPTS = ["A Red circle\non a blue background ", "", "a red circle at the left, " * 60, "ein Käfer 虫 🐞 </s>"]
SPECS = {"pixart": ALPHA, "pixart_sigma": SIGMA}
both = pytest.mark.parametrize("name", ["pixart", "pixart_sigma"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pixart")
    for name in SPECS:
        nano.write(root / name, name, random=True)
    return {name: root / name for name in SPECS}


def find(path: Path) -> ModelSource:
    return find_model(str(path), components=ALPHA.components, denoiser=ALPHA.denoiser)


def load(name: str, path: Path) -> nn.Module:
    arch, source = ARCHS[name], find(path)
    denoiser = arch.build_denoiser(source)
    materialise(denoiser, arch.denoiser_tensors(source), FLOAT, where="miniature")
    return denoiser


def copy_with(path: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a model with other entries in one of its configs."""
    shutil.copytree(path, target)
    config = target / file
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return target


def conditions_of(name: str, path: Path, prompts: list[str], size: tuple[int, int] = (64, 64)) -> list[Any]:
    text = ARCHS[name].load_text_encoders(find(path), FLOAT)
    told = ARCHS[name].picture_condition(Framing.whole(*size), None)
    return [condition | told for condition in ARCHS[name].encode_prompts(text, prompts)]


# --- which model it is -------------------------------------------------------------------------------------------


@both
def test_a_folder_that_names_the_former_class_is_the_same_model(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The published folders are older than `PixArtTransformer2DModel` and have entries that it has not."""
    from diffusers import PixArtTransformer2DModel, Transformer2DModel

    former = {"double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False}
    path = copy_with(
        folders[name], tmp_path / "former", "transformer/config.json", _class_name="Transformer2DModel", **former
    )
    ours, theirs = load(name, path), Transformer2DModel.from_pretrained(path / "transformer")
    assert isinstance(theirs, PixArtTransformer2DModel)
    assert all(torch.equal(tensor.float(), ours.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    assert ours.use_additional_conditions == theirs.use_additional_conditions == (name == "pixart")
    another = copy_with(path, tmp_path / "dit", "transformer/config.json", norm_type="ada_norm_zero")
    with pytest.raises(UserError, match="norms of another model than PixArt"):
        load(name, another)


@both
@pytest.mark.parametrize("indexed", [True, False])
def test_the_other_generation_is_named(folders: dict[str, Path], tmp_path: Path, name: str, indexed: bool) -> None:
    other = next(one for one in SPECS if one != name)
    path = shutil.copytree(folders[name], tmp_path / "model")
    if not indexed:
        (path / "model_index.json").unlink()
    with pytest.raises(UserError, match=rf"this is {SPECS[name].title}, not .*; set model.arch: {name}$"):
        load(other, path)
    load(name, path)


def test_it_is_not_read_from_one_file(folders: dict[str, Path]) -> None:
    file = folders["pixart"] / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="PixArt-alpha is not read from a single file; give a folder"):
        ARCHS["pixart"].build_denoiser(ModelSource("one", single_file=file, extras=find(folders["pixart"])))


def test_each_variant_has_a_miniature() -> None:
    assert {name: set(spec.variants) for name, spec in SPECS.items()} == {
        name: set(variants) for name, variants in nano_pixart.STRUCTURE.items()
    }


@pytest.mark.parametrize(("arch", "variant"), [("pixart", "512"), ("pixart_sigma", "512"), ("pixart_sigma", "2k")])
def test_variants_are_told_apart_by_their_config(tmp_path: Path, arch: str, variant: str) -> None:
    nano_pixart.write(tmp_path, arch, variant)
    denoiser = load(arch, tmp_path)
    fitting = [name for name, one in SPECS[arch].variants.items() if one.fits(denoiser.config)]
    assert fitting == [variant]
    assert not denoiser.use_additional_conditions
    with torch.no_grad():  # what alpha is told of sizes, its model for 512 pixels does not ask for
        ARCHS[arch].predict(denoiser, torch.zeros(1, 4, 8, 8), torch.ones(1), conditions_of(arch, tmp_path, [""]))


# --- prompts -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_the_pipelines_at_their_true_length(
    folders: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    import diffusers

    cls = {"pixart": diffusers.PixArtAlphaPipeline, "pixart_sigma": diffusers.PixArtSigmaPipeline}[name]
    pipeline = cls.from_pretrained(folders[name], dtype=dtype)
    text = ARCHS[name].load_text_encoders(find(folders[name]), Placement(dtype, CPU))
    lengths = []
    for prompt, condition in zip(PROMPTS, ARCHS[name].encode_prompts(text, PROMPTS), strict=True):
        with torch.no_grad():
            tokens, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, clean_caption=False)
        assert tokens.shape[1] == SPECS[name].text_tokens
        assert condition["tokens_LD"].dtype == dtype
        assert torch.equal(condition["tokens_LD"], tokens[0][mask[0].bool()])
        lengths.append(len(condition["tokens_LD"]))
    assert lengths[1] == 1 and lengths[2] == {"pixart": 120, "pixart_sigma": 300}[name]


@both
def test_captions_of_any_length_share_a_batch(folders: dict[str, Path], name: str) -> None:
    denoiser, conditions = load(name, folders[name]), conditions_of(name, folders[name], PROMPTS)
    latents, t = torch.randn(4, 4, 8, 8, generator=generator(0, "z")), torch.tensor([0.1, 0.4, 0.7, 0.9])
    with torch.no_grad():
        together = ARCHS[name].predict(denoiser, latents, t, conditions)
        alone = [ARCHS[name].predict(denoiser, latents[i:][:1], t[i:][:1], conditions[i:][:1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="4 pictures, 3 conditions"):
        ARCHS[name].predict(denoiser, latents, t, conditions[:3])


@pytest.mark.parametrize("installed", ["nothing", "sentencepiece"])
def test_a_tokenizer_that_needs_another_package_says_which(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    """The published folders have a SentencePiece model and no tokenizer.json."""
    from transformers import utils

    path = shutil.copytree(folders["pixart"], tmp_path / "model")
    (path / "tokenizer" / "tokenizer.json").unlink()
    (path / "tokenizer" / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(utils, "is_sentencepiece_available", lambda: installed == "sentencepiece")
    monkeypatch.setattr(utils, "is_protobuf_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install sentencepiece protobuf$"):
        ARCHS["pixart"].load_text_encoders(find(path), FLOAT)


# --- what it is told and what it predicts ------------------------------------------------------------------------


def test_alpha_is_told_the_size_that_it_sees(folders: dict[str, Path]) -> None:
    framing = Framing(original=(4000, 3000), crop=(10, 0), size=(96, 64))
    told = ARCHS["pixart"].picture_condition(framing, None)
    assert told["resolution_D"].tolist() == [64, 96] and told["aspect_ratio_D"].tolist() == pytest.approx([64 / 96])
    assert ARCHS["pixart_sigma"].picture_condition(framing, 4.5) == {}
    denoiser, z = load("pixart", folders["pixart"]), torch.randn(1, 4, 8, 8, generator=generator(0, "z"))
    square, wide = (
        ARCHS["pixart"].predict(
            denoiser, z, torch.tensor([0.5]), conditions_of("pixart", folders["pixart"], ["zig"], size)
        )
        for size in ((64, 64), (1024, 512))
    )
    assert not torch.equal(square, wide)


def test_the_predicted_variance_is_dropped_and_levels_are_whole(folders: dict[str, Path]) -> None:
    denoiser = load("pixart_sigma", folders["pixart_sigma"])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    inner = denoiser.forward
    denoiser.forward = lambda *given, **named: seen.append((named["timestep"], out := inner(*given, **named))) or out
    z, conditions = torch.randn(2, 4, 8, 8), conditions_of("pixart_sigma", folders["pixart_sigma"], ["zig", ""])
    levels = torch.tensor([7, 981])
    noise = ARCHS["pixart_sigma"].predict(denoiser, z, levels / 1000, conditions)  # float32: 981 would be 980.99994
    ((timestep, (out,)),) = seen
    assert out.shape == (2, 8, 8, 8) and torch.equal(noise, out[:, :4])
    assert torch.equal(timestep, levels.float())


def test_whole_levels_come_back_and_fractional_ones_stay() -> None:
    whole = torch.arange(1001)
    assert torch.equal(parts.levels(whole.float() / 1000), whole.float())
    assert torch.equal(parts.levels(whole.double() / 1000), whole.float())
    fractional = torch.tensor([999.0, 749.2500, 0.5], dtype=torch.float64)
    assert torch.equal(parts.levels(fractional / 1000), fractional.float())


def test_the_distilled_variant_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    """Its scheduler draws noise at every step."""
    nano_pixart.write(tmp_path, "pixart", "lcm")
    row, arch = ROWS[0], ARCHS["pixart"]
    request = Request(prompt="a zig", seed=4, width=64, height=96, steps=ALPHA.variants["lcm"].steps)
    scheduler = arch.load_scheduler(find(tmp_path), ALPHA.variants["lcm"].scheduler)
    conditions = conditions_of("pixart", tmp_path, [request.prompt])
    ours = denoise(arch, load("pixart", tmp_path), scheduler, initial_noise(ALPHA, request), request, conditions)
    theirs = row.draw(row.load_pipeline(tmp_path), request, ALPHA)
    assert type(scheduler).__name__ == "LCMScheduler" and torch.equal(ours, theirs)


# --- LoRAs -------------------------------------------------------------------------------------------------------

NETWORK = NetworkConfig(linear=4, linear_alpha=2)


def trained(name: str, path: Path) -> nn.Module:
    """A denoiser with a LoRA that does something."""
    denoiser = load(name, path)
    lora.attach(denoiser, lora.linear_names(denoiser, SPECS[name], NETWORK), NETWORK, 0)
    with torch.no_grad():
        for key, tensor in lora.trainable(denoiser).items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator(1, key)) * 0.2)
    return denoiser


@both
@pytest.mark.parametrize("how", ["PeftModel.from_pretrained", "the file itself"])
def test_peft_loads_the_diffusers_format_and_draws_the_same(
    folders: dict[str, Path], tmp_path: Path, name: str, how: str
) -> None:
    """PEFT drops names that it does not know in silence, so what it did not expect is looked at."""
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

    row, arch, path = next(row for row in ROWS if row.name == name), ARCHS[name], folders[name]
    denoiser = trained(name, path)
    file = tmp_path / "adapter_model.safetensors"
    written = export.write_lora(
        file,
        export.from_training(lora.state(denoiser), NETWORK),
        export.Base.of(denoiser, SPECS[name]),
        "diffusers",
        dtype="fp32",
        metadata={},
    )
    assert (written.proof.loader, written.proof.modules) == ("PEFT", row.lora_blocks)
    request = Request(prompt="a red circle", negative="zig", seed=5, width=64, height=64, steps=3, guidance=4.5)
    conditions = conditions_of(name, path, request.prompts(SPECS[name]))
    scheduler = arch.load_scheduler(find(path))
    ours = denoise(arch, denoiser, scheduler, initial_noise(SPECS[name], request), request, conditions)

    pipeline = row.load_pipeline(path)
    plain = row.draw(pipeline, request, SPECS[name])
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    options = {key.removeprefix("base_model.model."): value for key, value in header.items()}
    if how == "the file itself":
        pipeline.transformer = get_peft_model(pipeline.transformer, LoraConfig(**options))
        assert set_peft_model_state_dict(pipeline.transformer, load_file(file)).unexpected_keys == []
    else:
        LoraConfig(**options).save_pretrained(tmp_path)
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path)
    theirs = row.draw(pipeline, request, SPECS[name])
    assert (theirs - plain).abs().max() > 0.01 * plain.abs().max()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@both
@pytest.mark.parametrize("fmt", ["comfy", "diffusers"])
def test_what_is_written_is_read_again(folders: dict[str, Path], tmp_path: Path, name: str, fmt: Any) -> None:
    denoiser, spec, file = trained(name, folders[name]), SPECS[name], tmp_path / "lora.safetensors"
    given = export.from_training(lora.state(denoiser), NETWORK)
    export.write_lora(file, given, export.Base.of(denoiser, spec), fmt, dtype=None, metadata={})
    prefix = {"comfy": "transformer.", "diffusers": "base_model.model."}[fmt]
    keys = load_file(file).keys()
    assert all(key.startswith(prefix) for key in keys)
    assert any(key.endswith(".alpha") for key in keys) == (fmt == "comfy")  # ComfyUI reads it there
    for shapes in (None, export.layer_shapes(denoiser)):
        back = read_lora(file, spec, shapes)
        assert (back.format, back.ranks, back.alphas) == (fmt, given.ranks, given.alphas)
        assert all(torch.equal(back.tensors[key], tensor) for key, tensor in given.tensors.items())


def test_a_folder_that_peft_has_saved_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """As PixArt's own script leaves it: no header, alpha in adapter_config.json."""
    from diffusers import PixArtTransformer2DModel
    from peft import LoraConfig, get_peft_model

    model = PixArtTransformer2DModel.from_pretrained(folders["pixart"] / "transformer")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path)
    back = read_lora(tmp_path / "adapter_model.safetensors", ALPHA)
    assert (back.format, back.rank, back.alpha, len(back.modules)) == ("peft", 4, 8.0, 3 * 4)


@both
def test_what_other_trainers_write_is_read(tmp_path: Path, name: str) -> None:
    """ai-toolkit and OneTrainer: kohya's way of writing names, after another prefix than a UNet's."""
    stem, file = "lora_transformer_transformer_blocks_0_attn1_to_out_0", tmp_path / "lora.safetensors"
    down, up = torch.randn(2, 4), torch.randn(4, 2)
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.ones(())}, file)
    back = read_lora(file, SPECS[name])
    assert (back.format, back.ranks, back.alpha) == ("kohya", {"transformer_blocks.0.attn1.to_out.0": 2}, 1.0)


def test_formats_that_no_loader_reads_are_refused(tmp_path: Path) -> None:
    assert unsupported("lora", "comfy", ALPHA) is None
    reason = unsupported("lora", "kohya", ALPHA)
    assert reason is not None and "no loader reads a LoRA of PixArt-alpha" in reason
    file = tmp_path / "lora.safetensors"
    pair = {"lora_A.weight": torch.zeros(2, 4), "lora_B.weight": torch.zeros(4, 2)}
    save_file({f"transformer.joint_transformer_blocks.0.ff.linear_1.{part}": one for part, one in pair.items()}, file)
    with pytest.raises(UserError, match="not a LoRA of PixArt-Sigma: it looks like AuraFlow"):
        read_lora(file, SIGMA)
    save_file({f"transformer.transformer_blocks.0.attn2.to_x.{part}": one for part, one in pair.items()}, file)
    with pytest.raises(UserError, match="1 of 1 layers are unknown to PixArt-Sigma"):
        read_lora(file, SIGMA)
