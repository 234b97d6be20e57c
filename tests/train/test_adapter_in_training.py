"""The training adapter in real runs: on while training, gone in every preview and in every file that is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from detour import UserError, sample, weights
from detour.archs import resolve
from detour.archs.zimage import ZImage
from detour.nn.training_adapter import TrainingAdapter
from detour.train import build
from detour.train.objective import evaluating
from detour.train.run import Run
from miniature import SIZE, Recorder, World, digest, job, newest, run

PROMPT, SEED, STEPS = "a zig on a red background at the left", 7, 3
PREVIEWS = {
    "disable_sampling": False, "prompts": [PROMPT], "seed": SEED, "sample_steps": STEPS, "width": SIZE, "height": SIZE,
}  # fmt: skip


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@cache
def pipeline(folder: Path, dtype: torch.dtype):
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    for parameter in pipe.transformer.parameters():
        # Where a file is mapped, tensors lie at any address, and products of unaligned ones are rounded differently.
        parameter.data = parameter.data.clone()
    return pipe


def drawn_by_diffusers(
    folder: Path, dtype: torch.dtype, loras: tuple[tuple[Path, float], ...] = ()
) -> tuple[torch.Tensor, Image.Image]:
    """Latents and picture of diffusers' own pipeline of a folder; it counts no guidance as 0."""
    pipe = pipeline(folder, dtype)
    for index, (path, _) in enumerate(loras):
        pipe.load_lora_weights(str(path), adapter_name=f"lora{index}")
    if loras:
        pipe.set_adapters([f"lora{index}" for index in range(len(loras))], [scale for _, scale in loras])
    options = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": 0.0}
    try:
        made = [
            pipe(PROMPT, **options, generator=torch.Generator("cpu").manual_seed(SEED), output_type=kind).images
            for kind in ("latent", "pil")
        ]
    finally:
        pipe.unload_lora_weights()
    return made[0], made[1][0]


@contextmanager
def kept_latents() -> Iterator[list[torch.Tensor]]:
    """Latents of every preview inside, before the VAE."""
    found: list[torch.Tensor] = []
    denoise = sample.denoise

    def keep(*args) -> torch.Tensor:
        found.append(denoise(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "denoise", keep)
        yield found


def opened(world: World, folder: Path, **sections) -> Run:
    """A run as training has it before its first step."""
    process = resolve(job(world, folder, **sections).config.process[0])
    return build.build(build.gather(process, Recorder()), folder / "zig", "zig", "", Recorder())


# --- previews -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_first_preview_is_the_picture_of_the_untouched_model(world, tmp_path, dtype):
    with kept_latents() as latents:
        ran = run(job(world, tmp_path, train={"steps": 1, "dtype": dtype}, sample=PREVIEWS))
    expected, picture = drawn_by_diffusers(world.model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    assert torch.equal(latents[0], expected)
    assert not torch.equal(latents[1], expected)  # a step later the LoRA is in it
    assert len(ran.seen.of("sample")) == len(latents) == 2
    if dtype == "fp32":  # in bf16 the pipeline's VAE computes in bf16, ours in float32
        preview = Image.open(ran.seen.of("sample")[0].path)
        assert np.array_equal(np.asarray(preview), np.asarray(picture))


def test_the_training_adapter_would_have_been_seen_in_the_preview(world, tmp_path):
    """So that the test above cannot pass by an adapter that does nothing."""
    opened_run = opened(world, tmp_path, sample=PREVIEWS)
    expected, _ = drawn_by_diffusers(world.model, torch.float32)
    with kept_latents() as latents:
        opened_run.draw_previews(0)
        opened_run.deployment = replace(opened_run.deployment, adapter=None)
        opened_run.draw_previews(0)
    assert torch.equal(latents[0], expected)
    assert relative(latents[1], expected) > 0.05


KINDS = [("lora", "comfy"), ("lora", "diffusers"), ("dora", "diffusers")]


@pytest.mark.parametrize(("kind", "lora_format"), KINDS)
def test_the_last_preview_is_the_picture_of_the_exported_file_without_the_adapter(world, tmp_path, kind, lora_format):
    save = {"formats": [lora_format], "dtype": "fp32"}
    network = {"type": kind, "linear": 4, "linear_alpha": 2.0}
    with kept_latents() as latents:
        ran = run(job(world, tmp_path, train={"steps": 4}, sample=PREVIEWS, save=save, network=network))
    expected, picture = drawn_by_diffusers(world.model, torch.float32, ((ran.result.lora, 1.0),))
    assert relative(expected, latents[0]) > 1e-3  # the LoRA has changed the picture
    assert torch.equal(latents[-1], expected)
    assert np.array_equal(np.asarray(Image.open(ran.seen.of("sample")[-1].path)), np.asarray(picture))


def test_the_last_preview_is_the_picture_of_the_exported_model_without_the_adapter(world, tmp_path):
    """In full fine-tuning, too, the adapter is in no weight that is written."""
    with kept_latents() as latents:
        ran = run(
            job(
                world,
                tmp_path / "job",
                train={"steps": 4},
                sample=PREVIEWS,
                network={"type": "full"},
                save={"dtype": "fp32"},
            )
        )
    shutil.copytree(world.model, tmp_path / "trained")
    shutil.rmtree(tmp_path / "trained" / "transformer")
    shutil.copytree(ran.result.lora, tmp_path / "trained" / "transformer")
    expected, _ = drawn_by_diffusers(tmp_path / "trained", torch.float32)
    assert relative(expected, latents[0]) > 1e-3
    # Not to the bit: diffusers maps this float32 file into memory, and products of unaligned weights round differently.
    assert relative(latents[-1], expected) < 1e-6


def test_the_strength_of_a_preview_is_that_of_the_file(world, tmp_path):
    previews = PREVIEWS | {"prompts": [{"prompt": PROMPT, "network_multiplier": 0.5}]}
    with kept_latents() as latents:
        ran = run(job(world, tmp_path, train={"steps": 4}, sample=previews, save={"dtype": "fp32"}))
    assert torch.equal(latents[-1], drawn_by_diffusers(world.model, torch.float32, ((ran.result.lora, 0.5),))[0])


# Relative to the norm of the latents. Measured: 2e-7 in float32; 4e-3 in bf16, where W + D is rounded.
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_merged_adapter_is_gone_from_previews_within_a_tolerance_that_the_run_tells(
    world, tmp_path, dtype, tolerance
):
    model = {"assistant_lora_mode": "merged"}
    with kept_latents() as latents:
        ran = run(job(world, tmp_path, model=model, train={"steps": 1, "dtype": dtype}, sample=PREVIEWS))
    expected, _ = drawn_by_diffusers(world.model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    assert 0 < relative(latents[0], expected) < tolerance
    told = [message for message in ran.seen.warnings if "removing the merged training adapter leaves" in message]
    assert len(told) == 1


def test_the_adapter_is_on_again_after_an_error_while_drawing(world, tmp_path):
    """And everything else that a preview switches: average, schedule-free's point, dropout, strength."""
    previews = PREVIEWS | {"prompts": [{"prompt": PROMPT, "network_multiplier": 0.5}]}
    train = {"optimizer": "schedulefree", "ema_config": {"use_ema": True}}
    opened_run = opened(world, tmp_path, sample=previews, train=train, network={"dropout": 0.5})
    assert isinstance(opened_run.adapter, TrainingAdapter)
    assert opened_run.ema is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in opened_run.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def all_there() -> list[object]:
        flags = [module.training for module in opened_run.denoiser.modules()]
        tensors = [digest(t) for t in [*opened_run.parameters, *opened_run.ema.state().values()]]
        with evaluating(opened_run.denoiser), torch.no_grad():
            noise = sample.initial_noise(opened_run.arch.spec, opened_run.previews[0].request)
            conditions = opened_run.previews[0].conditions
            tensors.append(digest(opened_run.arch.predict(opened_run.denoiser, noise, torch.tensor([0.5]), conditions)))
        return [*flags, *tensors, opened_run.optimizer.param_groups[0]["train_mode"]]

    before, calls = all_there(), []
    predict = ZImage.predict

    def fail_at_the_second_step(self, *args):
        calls.append((opened_run.adapter.active, opened_run.ema.active))
        if len(calls) == 2:
            raise MemoryError("no room for activations")
        return predict(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZImage, "predict", fail_at_the_second_step)
        with pytest.raises(MemoryError):
            opened_run.draw_previews(1)
    assert calls == [(False, True)] * 2
    assert opened_run.adapter.active
    assert all_there() == before


# --- what is trained ------------------------------------------------------------------------------------------------


def test_the_file_holds_what_was_trained_and_nothing_of_the_adapter(world, tmp_path):
    """It was in the forward pass (training without it ends elsewhere) and is in no tensor of the file."""
    network = {"linear": 4, "include": ["attention"]}  # the adapter has further layers
    ran = run(job(world, tmp_path / "on", network=network))
    without = run(job(world, tmp_path / "off", network=network, model={"assistant_lora_path": None}))
    trained, plain, adapter = (
        {name: tensor for name, tensor in load_file(path).items() if not name.endswith(".alpha")}
        for path in (ran.result.lora, without.result.lora, world.adapter)
    )
    assert len(adapter) == 48
    assert set(trained) == set(plain) == {name for name in adapter if ".attention." in name}
    assert all(trained[name].shape == adapter[name].shape for name in trained)
    for name, tensor in trained.items():
        assert not torch.equal(tensor, plain[name])
        a, b = adapter[name].double().flatten(), tensor.double().flatten()
        assert abs(float(a @ b / (a.norm() * b.norm()))) < 0.25, name  # of 384 and more values: no share of it
    held = {name.removeprefix("diffusion_model."): tensor for name, tensor in trained.items()}
    assert all(torch.equal(held[name], t) for name, t in newest(ran.result.folder).tensors["weights"].items())


def test_factored_and_merged_train_the_same_lora(world, tmp_path):
    """In float32, after six steps with AdamW, relative to each tensor's norm.

    Measured: 4e-8 for half of the tensors, 3e-4 for the worst, where Adam divides gradients near zero by themselves.
    """
    files = []
    for mode in ("factored", "merged"):
        ran = run(job(world, tmp_path / mode, model={"assistant_lora_mode": mode}))
        files.append(load_file(ran.result.lora))
    apart = {name: relative(files[1][name], tensor) for name, tensor in files[0].items()}
    assert max(apart.values()) < 0.005, max(apart, key=apart.get)
    assert 0 < median(apart.values()) < 1e-5


# --- a wrong adapter ------------------------------------------------------------------------------------------------


Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def changed(world: World, folder: Path, change: Change, rename: tuple[str, str] = ("", "")) -> Path:
    """The adapter with each tensor changed, or left out for None."""
    path = folder / "a.safetensors"
    made = {name.replace(*rename): change(name, tensor) for name, tensor in load_file(world.adapter).items()}
    save_file({name: tensor for name, tensor in made.items() if tensor is not None}, path)
    return path


def missing(world: World, folder: Path) -> Path:
    return folder / "nowhere.safetensors"


def of_another_model(world: World, folder: Path) -> Path:
    return changed(world, folder, lambda _, t: t, rename=("layers.", "blocks."))


def of_another_size(world: World, folder: Path) -> Path:
    return changed(world, folder, lambda name, t: torch.cat([t, t], dim=1) if "lora_A" in name else t)


def without_a_layer(world: World, folder: Path) -> Path:
    return changed(world, folder, lambda name, t: None if "layers.1.attention.to_k" in name else t)


def without_a_half(world: World, folder: Path) -> Path:
    return changed(world, folder, lambda name, t: None if "layers.1.attention.to_k.lora_B" in name else t)


def truncated(world: World, folder: Path) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes(world.adapter.read_bytes()[:-1000])
    return path


def not_finite(world: World, folder: Path) -> Path:
    return changed(world, folder, lambda _, t: t.index_fill(0, torch.tensor([0]), torch.nan))


def a_model(world: World, folder: Path) -> Path:
    path = folder / "a.safetensors"
    shutil.copy(world.model / "transformer" / "diffusion_pytorch_model.safetensors", path)
    return path


WRONG = {
    missing: "assistant_lora_path",
    of_another_model: "another model",
    of_another_size: "another model",
    without_a_layer: "layers.1.attention.to_k",
    without_a_half: "lora_B",
    truncated: "a.safetensors",
    not_finite: "not finite",
    a_model: "not a LoRA",
}


@pytest.mark.parametrize("mode", ["factored", "merged"])
@pytest.mark.parametrize("make", WRONG)
def test_a_wrong_adapter_is_an_error_before_a_weight_is_read_or_a_folder_made(world, tmp_path, monkeypatch, make, mode):
    def never(*args, **kwargs):
        pytest.fail("a weight was read")

    monkeypatch.setattr(weights, "materialise", never)
    monkeypatch.setattr(ZImage, "load_vae", never)
    monkeypatch.setattr(ZImage, "load_text_encoders", never)
    path = make(world, tmp_path)
    model = {"assistant_lora_path": str(path), "assistant_lora_mode": mode}
    store = tmp_path / "cache"
    with pytest.raises(UserError) as caught:
        run(job(world, tmp_path / "job", model=model, train={"cache_folder": str(store)}))
    assert WRONG[make] in str(caught.value)
    assert str(path) in str(caught.value)
    assert [item.name for item in (tmp_path / "job").iterdir()] == ["job.yaml"]
    assert not store.exists()


@pytest.mark.parametrize("network", ["dora", "full"])
def test_merged_is_refused_where_the_merged_weights_would_be_trained_or_measured(world, tmp_path, network):
    with pytest.raises(UserError, match=r"merged.*factored"):
        run(job(world, tmp_path, model={"assistant_lora_mode": "merged"}, network={"type": network}))
