"""Text encoders trained with the UNet: gradients as by plain diffusers and PEFT, exact resuming, exports, previews."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from detour import UserError, archs, export, nano
from detour.archs.base import Framing
from detour.config.document import JobError
from detour.config.load import load_job
from detour.draw import Drawing, draw
from detour.events import Event
from detour.export.inspection import inspect_file
from detour.nano import drawn
from detour.nn import lora
from detour.nn.quiet import quiet_imports
from detour.nn.together import Together, from_file, to_file
from detour.sample import Request
from detour.train import build, loop, optim
from detour.train.objective import noise_like
from detour.train.run import Run
from miniature import NAME, Ran, Recorder, files_of, newest, run, start, traced

SIZE, RANK, ALPHA = 64, 4, 2.0
MID = {"linear": RANK, "linear_alpha": ALPHA, "include": ["mid_block"]}  # of the UNet; encoders are not chosen by it
NAMES = ["sd1", "sd2", "sdxl"]
each = pytest.mark.parametrize("name", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
two = pytest.mark.parametrize("name", ["sd1", "sdxl"])


@dataclass(frozen=True)
class Place:
    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def model(self, name: str) -> Path:
        return self.root / name

    def job(self, folder: Path, name: str, **sections: dict[str, Any]) -> Path:
        base: dict[str, dict[str, Any]] = {
            "model": {"arch": name, "name_or_path": str(self.model(name))},
            "train": {
                "steps": 4, "lr": 1e-3, "dtype": "fp32", "num_workers": 0, "cache_folder": str(self.root / "cache"),
                "train_text_encoder": True, "batch_size": 2, "gradient_checkpointing": False,
            },
            "network": MID,
            "save": {"save_every": 100, "dtype": "fp32"},
            "sample": {
                "width": SIZE, "height": SIZE, "sample_steps": 2, "prompts": ["a zig"], "guidance_scale": 1,
                "skip_first_sample": True,
            },
        }  # fmt: skip
        process: dict[str, Any] = {"type": "train", "device": "cpu"}
        process["datasets"] = [{"folder_path": str(self.data), "resolution": SIZE, "caption_dropout_rate": 0.2}]
        for section in {*base, *sections}:
            process[section] = base.get(section, {}) | sections.get(section, {})
        folder.mkdir(parents=True, exist_ok=True)
        config = {"output_name": NAME, "output_folder": str(folder), "process": [process]}
        (folder / "job.yaml").write_text(json.dumps({"config": config}))
        return folder / "job.yaml"

    def run(self, folder: Path, name: str, **sections: dict[str, Any]) -> Ran:
        return run(load_job(self.job(folder, name, **sections)).job)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = Place(tmp_path_factory.mktemp("text"))
    for name in NAMES:
        nano.write(found.model(name), name, random=True)
    drawn.write_dataset(found.data, n=4, size=SIZE)
    return found


def built(path: Path) -> Run:
    process = archs.resolve(load_job(path).job.config.process[0])
    folder = path.parent / "built"
    folder.mkdir()
    return build.build(build.gather(process, Recorder()), folder, NAME, path.read_text(), Recorder())


def of_encoders(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("text_encoder")}


# --- gradients ---------------------------------------------------------------------------------------------------


class Reference:
    """The pipeline by diffusers with PEFT's adapters on its UNet and text encoders, in float32."""

    def __init__(self, place: Place, name: str, weights: dict[str, torch.Tensor]) -> None:
        with quiet_imports():
            from diffusers import DiffusionPipeline
            from peft import LoraConfig
        self.data = place.data
        self.pipe = DiffusionPipeline.from_pretrained(place.model(name), dtype=torch.float32)
        self.trained: dict[str, torch.nn.Parameter] = {}
        for component in ("unet", "text_encoder", "text_encoder_2"):
            if component not in self.pipe.components:
                continue
            own = {
                key.removeprefix(f"{component}."): t for key, t in weights.items() if key.startswith(f"{component}.")
            }
            model = self.pipe.components[component].eval().requires_grad_(False)
            layers = sorted({key.split(".lora_")[0] for key in own})
            model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers), adapter_name="it")
            parameters = dict(model.named_parameters())
            for key, tensor in own.items():
                parameter = parameters[key.replace(".weight", ".it.weight")]
                parameter.data.copy_(tensor)
                self.trained[f"{component}.{key}"] = parameter.requires_grad_(True)

    @torch.no_grad()
    def latents(self, picture: str) -> torch.Tensor:
        pixels = torch.from_numpy(np.asarray(Image.open(self.data / picture).convert("RGB"), dtype=np.float32))
        mean = self.pipe.vae.encode((pixels / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist.mode()[0]
        return mean * self.pipe.vae.config.scaling_factor

    def loss(self, pictures: list[str], prompts: list[str], level_B: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """As diffusers' text-to-image scripts: add_noise, epsilon or velocity, the mean over everything."""
        from diffusers import DDPMScheduler

        config = self.pipe.scheduler.config
        scheduler = DDPMScheduler.from_config(dict(config) | {"_class_name": "DDPMScheduler"})
        z0 = torch.stack([self.latents(picture) for picture in pictures])
        told: dict[str, Any] = {}
        if "text_encoder_2" in self.pipe.components:  # a training script embeds empty captions like any other
            tokens, _, pooled, _ = self.pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
            sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * len(pictures), dtype=torch.float32)
            told = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        else:
            tokens, _ = self.pipe.encode_prompt(prompts, "cpu", 1, False)
        z = scheduler.add_noise(z0, noise, level_B)
        out = self.pipe.unet(z, level_B, encoder_hidden_states=tokens, return_dict=False, **told)[0]
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(z0, noise, level_B) if velocity else noise
        return (out - target).square().mean()


@each
def test_gradients_are_those_of_diffusers_and_peft(place: Place, tmp_path: Path, name: str) -> None:
    dataset = {"folder_path": str(place.data), "resolution": SIZE}
    path = place.job(tmp_path, name)
    job = json.loads(path.read_text())
    job["config"]["process"][0]["datasets"] = [dataset]
    path.write_text(json.dumps(job))
    ours = built(path)
    assert isinstance(ours.trained, Together)
    drawn_values = torch.Generator().manual_seed(1)
    weights = {
        key: 0.1 * torch.randn(tensor.shape, generator=drawn_values) for key, tensor in lora.state(ours.trained).items()
    }
    lora.load_state(ours.trained, weights)
    gradients: dict[str, torch.Tensor | None] = {}
    update = optim.update

    def keep(*args: Any) -> Any:
        gradients.update({key: p.grad if p.grad is None else p.grad.clone() for key, p in ours.trainable.items()})
        return update(*args)

    with traced() as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "update", keep)
        progress = loop.Progress(step=3)
        ours.start(progress)
        loop.train_step(ours, progress)
    (micro,) = seen
    reference = Reference(place, name, weights)
    pictures = [key.partition("/")[2] for key in micro.names]
    level_B = (torch.tensor(micro.times) * 1000).round().long()
    noise = noise_like(torch.zeros(2, 4, SIZE // 8, SIZE // 8), ours.process.train.seed, 3, 0)
    loss = reference.loss(pictures, micro.prompts, level_B, noise)
    loss.backward()
    assert micro.loss == pytest.approx(loss.item(), rel=1e-5)
    assert gradients.keys() == reference.trained.keys()
    counts = {component: 0 for component in ("unet", "text_encoder", "text_encoder_2")}
    for key, parameter in reference.trained.items():
        mine = gradients[key]
        if parameter.grad is None:  # the last layer of XL's first encoder, whose output nobody takes
            assert mine is None and ".layers.2." in key and name == "sdxl"
            continue
        assert mine is not None
        counts[key.partition(".")[0]] += 1
        off = (mine.double() - parameter.grad.double()).norm() / parameter.grad.double().norm().clamp(min=1e-9)
        assert off < 1e-4, (key, off.item())
    layers = 3 * 6 * 2
    assert counts["text_encoder"] == (layers - 12 if name == "sdxl" else layers)
    assert counts["text_encoder_2"] == (layers if name == "sdxl" else 0)


def test_prompts_alone_decide_what_is_embedded(place: Place, tmp_path: Path) -> None:
    """Nothing is cached of captions, and what is embedded follows the weights."""
    ours = built(place.job(tmp_path, "sd1", train={"cache_folder": str(tmp_path / "cache")}))
    assert not (tmp_path / "cache" / "text").exists()
    assert len(list((tmp_path / "cache" / "latents").rglob("*.safetensors"))) == 4
    ours.start(loop.Progress())
    batch, _ = next(ours.batches)
    assert batch.conditions == [{}, {}]
    before = ours.objective.task.embedded(["a zig"], [{}])[0]["tokens_LD"]
    assert before.requires_grad
    with torch.no_grad():
        for name, parameter in ours.trainable.items():
            if name.startswith("text_encoder") and name.endswith("lora_B.weight"):
                parameter.add_(0.1)
    after = ours.objective.task.embedded(["a zig"], [{"control_CHW": torch.zeros(1)}])[0]
    assert after.keys() == {"tokens_LD", "control_CHW"}
    assert not torch.equal(before, after["tokens_LD"])


# --- what is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "text_lr"), [(1e-3, 2e-3), (1e-3, None)])
def test_each_has_its_learning_rate(place: Place, tmp_path: Path, lr: float, text_lr: float | None) -> None:
    rates = {"lr": lr, "text_encoder_lr": text_lr, "steps": 1, "optimizer_params": {"weight_decay": 0.0}}
    ran = place.run(tmp_path, "sd1", train=rates, sample={"disable_sampling": True})
    weights = newest(ran.result.folder).tensors["weights"]
    moved = {
        part: max(t.abs().max().item() for key, t in weights.items() if key.startswith(part) and "lora_B" in key)
        for part in ("unet.", "text_encoder.")
    }
    # Adam's first step is the learning rate, whatever the gradient.
    assert moved["unet."] == pytest.approx(lr, rel=1e-3)
    assert moved["text_encoder."] == pytest.approx(lr if text_lr is None else text_lr, rel=1e-3)


@two
def test_encoders_can_be_trained_alone(place: Place, tmp_path: Path, name: str) -> None:
    """With the UNet's rate at 0."""
    rates = {"lr": 0.0, "text_encoder_lr": 5e-3, "steps": 3}
    ran = place.run(tmp_path, name, train=rates, sample={"skip_first_sample": False})
    weights = newest(ran.result.folder).tensors["weights"]
    assert all(not t.any() for key, t in weights.items() if key.startswith("unet.") and "lora_B" in key)
    trained = [key for key, t in of_encoders(weights).items() if "lora_B" in key and t.any()]
    assert len(trained) == (18 if name == "sd1" else 18 + 12)  # nobody takes what XL's first encoder's last layer gives
    before, after = (path.read_bytes() for path in sorted((ran.result.folder / "samples").glob("*.png")))
    assert before != after


@pytest.mark.parametrize("name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_a_stopped_run_goes_on_bit_for_bit(place: Place, tmp_path: Path, name: str) -> None:
    """With an average, dropout, validation and previews with guidance."""
    sections = {
        "network": {**MID, "dropout": 0.2},
        "train": {"ema_config": {"use_ema": True}, "gradient_accumulation": 2, "lr_scheduler": "cosine"},
        "validation": {"validate_every": 2, "holdout": 0.25},
        "sample": {"sample_every": 2, "guidance_scale": 3},
        "save": {"save_every": 2},
    }
    job = load_job(place.job(tmp_path, name, **sections)).job
    whole = run(job)
    state, written = whole.state, files_of(whole.result.folder)
    whole.result.folder.rename(tmp_path / "whole")
    first, second = run(job, stop_at=2), run(job)
    losses = [event.loss for ran in (first, second) for event in ran.seen.of("step")]
    assert losses == [event.loss for event in whole.seen.of("step")]
    checks = {event.step: event.loss for ran in (first, second) for event in ran.seen.of("validation")}
    assert checks == {event.step: event.loss for event in whole.seen.of("validation")}
    assert len(set(checks.values())) == 3
    assert second.state == state
    assert files_of(second.result.folder) == written
    assert {path.split("/")[0] for path in state} >= {"weights", "ema", "optimizer"}


def killed_at_step_two(path: Path) -> None:
    """For `start`: the run ends itself, hard, when it has done step 2."""

    def kill(event: Event) -> None:
        if event.type == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    run(load_job(path).job, on=kill)


@pytest.mark.slow
@two
def test_a_killed_run_goes_on_bit_for_bit(place: Place, tmp_path: Path, name: str) -> None:
    path = place.job(tmp_path, name, save={"save_every": 1})
    whole = run(load_job(path).job)
    state, written = whole.state, files_of(whole.result.folder)
    whole.result.folder.rename(tmp_path / "whole")
    process = start(killed_at_step_two, path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = run(load_job(path).job)
    assert (again.state, files_of(again.result.folder)) == (state, written)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"quantize_te": True, "qtype_te": "int8"}, {"low_vram": True}])
def test_it_trains_in_bf16(place: Place, tmp_path: Path, model: dict[str, Any]) -> None:
    settings = {"arch": "sd1", "name_or_path": str(place.model("sd1")), **model}
    ran = place.run(tmp_path, "sd1", model=settings, train={"dtype": "bf16", "gradient_checkpointing": True})
    weights = newest(ran.result.folder).tensors["weights"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert sum(bool(t.any()) for key, t in of_encoders(weights).items() if "lora_B" in key) == 18


# --- LoRA files --------------------------------------------------------------------------------------------------

FORMATS = ["kohya", "diffusers", "comfy"]  # the last holds what the first does
formats = pytest.mark.parametrize("fmt", [*FORMATS[:2], pytest.param("comfy", marks=pytest.mark.slow)])
BEGINNINGS = {
    ("sd1", "kohya"): {"lora_unet", "lora_te_text_model"},
    ("sd2", "kohya"): {"lora_unet", "lora_te_text_model"},
    ("sdxl", "kohya"): {"lora_unet", "lora_te1_text_model", "lora_te2_text_model"},
    ("sd1", "diffusers"): {"unet", "text_encoder.text_model"},
    ("sd2", "diffusers"): {"unet", "text_encoder.text_model"},
    ("sdxl", "diffusers"): {"unet", "text_encoder.text_model", "text_encoder_2.text_model"},
}


@pytest.fixture(scope="module")
def trained(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """A run of each architecture with files in every format, made when first asked for."""
    made: dict[str, Ran] = {}

    def of(name: str) -> Ran:
        if name not in made:
            rates = {"lr": 2e-2, "text_encoder_lr": 2e-2, "steps": 3}
            save = {"formats": FORMATS}
            made[name] = place.run(tmp_path_factory.mktemp(name), name, train=rates, save=save)
        return made[name]

    return of


def file_of(ran: Ran, fmt: str) -> Path:
    return ran.result.folder / (f"{NAME}.safetensors" if fmt == FORMATS[0] else f"{NAME}.{fmt}.safetensors")


@pytest.mark.slow
@each
@formats
def test_the_pipeline_draws_with_the_file_what_the_run_draws(
    place: Place, trained: Callable[[str], Ran], name: str, fmt: str
) -> None:
    """By diffusers' own `load_lora_weights`, on UNet and encoders; without the encoders' part it is another picture."""
    from archs import ROWS

    ran, row = trained(name), next(row for row in ROWS if row.name == name)
    path = file_of(ran, fmt)
    keys = set(load_file(path))
    if fmt != "comfy":
        marks = BEGINNINGS[name, fmt]
        assert all(any(key.startswith(mark) for mark in marks) for key in keys)
        assert all(any(key.startswith(mark) for key in keys) for mark in marks)
    else:
        assert keys == set(load_file(file_of(ran, "kohya")))
    proof = ran.seen.of("save")[-1].proof
    encoders = 18 * len(archs.spec(name).lora_keys.text)
    assert proof.startswith(f"{encoders + len(archs_mid(place, name))} layers, loaded by diffusers.loaders.")
    request = Request(prompt="a zig", seed=42, width=SIZE, height=SIZE, steps=2)
    pipeline = row.load_pipeline(place.model(name))
    pipeline.load_lora_weights(str(path))
    theirs = row.draw(pipeline, request, row.spec)
    for component in row.spec.lora_keys.text:
        getattr(pipeline, component).disable_adapters()
    unet_alone = row.draw(pipeline, request, row.spec)
    scale = theirs.abs().max().item()
    assert (theirs - unet_alone).abs().max() > 1e-3 * scale, "the encoders' part has no effect"
    picture = pipeline.image_processor.postprocess(
        pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor, return_dict=False)[0].detach()
    )[0]
    preview = Image.open(next((ran.result.folder / "samples").glob("*.png")))
    off = np.abs(np.asarray(picture, dtype=int) - np.asarray(preview, dtype=int))
    assert off.max() <= 1, off.max()


def archs_mid(place: Place, name: str) -> list[str]:
    """The UNet's layers that `MID` chooses."""
    from detour.config.job import NetworkConfig
    from detour.weights import find_model

    spec = archs.spec(name)
    source = find_model(str(place.model(name)), components=spec.components, denoiser=spec.denoiser)
    return lora.linear_names(archs.get(name).build_denoiser(source), spec, NetworkConfig.model_validate(MID))


@pytest.mark.slow
@two
@formats
def test_detour_sample_draws_with_the_encoders_part(
    place: Place, trained: Callable[[str], Ran], tmp_path: Path, name: str, fmt: str
) -> None:
    ran = trained(name)
    options = {"model": str(place.model(name)), "arch": name, "prompts": ["a zig"], "steps": 2, "guidance": 1.0}
    options |= {"size": (SIZE, SIZE), "dtype": "fp32", "device": "cpu"}
    preview = np.asarray(Image.open(next((ran.result.folder / "samples").glob("*.png"))), dtype=int)
    pictures = {}
    for scale in ("1", "0"):
        drawing = Drawing(loras=[f"{file_of(ran, fmt)}:{scale}"], **options)
        (path,) = draw(drawing, tmp_path / scale)
        pictures[scale] = np.asarray(Image.open(path), dtype=int)
    (plain,) = draw(Drawing(loras=[], **options), tmp_path / "plain")
    assert np.abs(pictures["1"] - preview).max() <= 1
    assert np.abs(pictures["0"] - np.asarray(Image.open(plain), dtype=int)).max() == 0
    assert np.abs(pictures["1"] - pictures["0"]).max() > 3


@each
def test_files_are_told_and_turned_into_each_other(trained: Callable[[str], Ran], tmp_path: Path, name: str) -> None:
    ran, spec = trained(name), archs.spec(name)
    first = export.read_lora(file_of(ran, "kohya"), spec)
    assert {spec.lora_keys.text_model_of(module) for module in first.modules} == {"", *spec.lora_keys.text}
    assert inspect_file(file_of(ran, "kohya"))["modules"] == len(first.modules)
    for fmt in FORMATS:
        source = file_of(ran, fmt)
        assert inspect_file(source)["arch"] == name
        for target in FORMATS:
            made = export.convert(source, tmp_path / f"{fmt}-{target}.safetensors", spec, target)
            back = export.read_lora(made.path, spec)
            assert set(back.tensors) == set(first.tensors)
            assert back.alphas == first.alphas
            assert all(torch.equal(back.tensors[key], tensor) for key, tensor in first.tensors.items())


def test_training_starts_from_a_file_with_encoders(place: Place, trained: Callable[[str], Ran], tmp_path: Path) -> None:
    for fmt in ("kohya", "diffusers"):
        path = str(file_of(trained("sdxl"), fmt))
        ours = built(place.job(tmp_path / fmt, "sdxl", network={**MID, "pretrained_lora_path": path}))
        expected = newest(trained("sdxl").result.folder).tensors["weights"]
        found = lora.state(ours.trained)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    network = {**MID, "pretrained_lora_path": path}
    with pytest.raises(UserError, match=r"belong to a text encoder .*; set train.train_text_encoder: true"):
        built(place.job(tmp_path / "without", "sdxl", network=network, train={"train_text_encoder": False}))


def test_names_in_files_and_in_the_module() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_model = torch.nn.Linear(1, 1)

    both = Together("unet", {"unet": torch.nn.Linear(1, 1), "a": torch.nn.Linear(1, 1), "b": Wrapped()})
    for here, there in {"unet.x.y": "x.y", "a.x": "a.x", "b.text_model.x": "b.x", "unet.a_x": "a_x"}.items():
        assert to_file(both, {here: 1}) == {there: 1}
        assert from_file(both, {there: 1}) == {here: 1}
    assert to_file(torch.nn.Linear(1, 1), {"a.b": 1}) == from_file(torch.nn.Linear(1, 1), {"a.b": 1}) == {"a.b": 1}


# --- what does not go together -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "kind": ({"network": {"type": "lokr", "linear": 4}}, "train_text_encoder: text encoders get a LoRA, .*lokr"),
    "preserve": ({"preserve": {"strategy": "anchor"}}, "train_text_encoder: preserve's strategies"),
    "drift": ({"preserve": {"drift": {"measure": True}}}, "train_text_encoder: preserve's strategies"),
    "prodigy": (
        {"train": {"optimizer": "prodigy", "lr": 1.0, "text_encoder_lr": 0.5}},
        "train.text_encoder_lr: 0.5 with prodigy",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_refused(place: Place, tmp_path: Path, case: str) -> None:
    sections, says = WRONG[case]
    process = archs.resolve(load_job(place.job(tmp_path, "sd1", **sections)).job.config.process[0])
    with pytest.raises(UserError, match=says):
        build.gather(process, Recorder())


def test_other_architectures_refuse_it(place: Place, tmp_path: Path) -> None:
    path = place.job(tmp_path, "zimage", network={"linear": 4})
    with pytest.raises(UserError, match=r"text encoders of Z-Image are not trained.*sd1, sd2, sdxl"):
        build.gather(archs.resolve(load_job(path).job.config.process[0]), Recorder())


def test_a_rate_without_training_is_a_mistake(place: Place, tmp_path: Path) -> None:
    path = place.job(tmp_path, "sd1", train={"train_text_encoder": False, "text_encoder_lr": 1e-4})
    with pytest.raises(JobError, match=r"train.text_encoder_lr has no effect without train.train_text_encoder: true"):
        load_job(path)


def test_framings_are_whole() -> None:
    """What the reference above takes for granted of these pictures."""
    assert Framing.whole(SIZE, SIZE) == Framing(original=(SIZE, SIZE), crop=(0, 0), size=(SIZE, SIZE))
