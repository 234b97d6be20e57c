"""Training adapters made: the model's own pictures, the training on them, when it is done, and the file that comes out.

On random miniatures, which stand for distilled models: what they draw is not what their field leads to, so the loss on
it can fall.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from command import detour, well
from detour import RefusedError, UserError, adapter, archs, export, files, nano, sample, steering
from detour.config.adapter import StopConfig
from detour.config.job import NetworkConfig
from detour.config.load import load_job
from detour.console import describe
from detour.data import cache, everyday, own_pictures
from detour.export.inspection import inspect_file
from detour.nn import lora
from detour.nn.adapter_file import read_adapter
from detour.nn.training_adapter import Mode, linear_shapes, load_training_adapter
from detour.train import build, plateau, preserve
from detour.train.control import Control
from detour.train.rehearsal import rehearse
from detour.weights import Placement, find_model, materialise
from miniature import Ran, Recorder, World, child_run, files_of, job, newest, run, start, state_of, traced

SIZE, STEPS, PICTURES, HELD_OUT, EVERY = 64, 6, 6, 2, 2
FEW, LONG = 2, 3  # steps of previews and of the drift meter
CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square on a table", "two dogs"]


@dataclass(frozen=True)
class Place:
    """Miniatures and their text embeddings, which every test shares."""

    root: Path

    def model(self, name: str = "zimage") -> Path:
        folder = self.root / name.replace(":", "-")
        if not folder.exists():
            nano.write(folder, name, random=True)
        return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def job_file(place: Place, folder: Path, arch: str = "zimage", **sections: dict[str, Any]) -> Path:
    """A job that makes an adapter for a miniature in a few float32 steps; `sections` are laid over."""
    stop = {"held_out": HELD_OUT, "every": EVERY, "patience": 2} | sections.pop("stop", {})
    base: dict[str, dict[str, Any]] = {
        "model": {"arch": arch, "name_or_path": str(place.model(arch))},
        "adapter": {
            "pictures": PICTURES, "sizes": [SIZE], "prompts": PROMPTS, "sample_steps": 3, "stop": stop,
            "long_steps": LONG,
        },
        "train": {
            "steps": STEPS, "lr": 3e-3, "dtype": "fp32", "num_workers": 0, "gradient_checkpointing": False,
            "cache_folder": str(place.root / "cache"),
        },
        "network": {"linear": 8},
        "save": {"save_every": 3, "max_step_saves_to_keep": 9},
        "sample": {"disable_sampling": True, "width": SIZE, "height": SIZE, "sample_steps": FEW},
    }  # fmt: skip
    process = {"type": "adapter", "device": "cpu"} | {name: base[name] | sections.get(name, {}) for name in base}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.yaml"
    path.write_text(json.dumps({"config": {"output_name": "ad", "output_folder": str(folder), "process": [process]}}))
    return path


def made(place: Place, folder: Path, arch: str = "zimage", **sections: dict[str, Any]) -> Ran:
    """Run such a job in this process."""
    return run(load_job(job_file(place, folder, arch, **sections)).job)


@dataclass(frozen=True)
class Done:
    """A whole run that nobody disturbed."""

    job: Path
    folder: Path
    """Moved aside, so that the job can be run again."""
    seen: Recorder
    trained: list[Any]
    """The micro-batches."""

    @property
    def file(self) -> Path:
        return self.folder / "ad.safetensors"

    @property
    def losses(self) -> list[float]:
        return [event.loss for event in self.seen.of("step")]


@pytest.fixture(scope="module")
def done(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Done:
    home = tmp_path_factory.mktemp("done")
    with traced() as seen:
        ran = made(place, home, sample={"disable_sampling": False, "prompts": ["a dog"], "sample_every": 3})
    aside = ran.result.folder.rename(home / "whole")
    return Done(home / "job.yaml", aside, ran.seen, seen)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / adapter.RECORD).read_text(encoding="utf-8").splitlines()]


def latents_of(folder: Path, record: dict[str, Any]) -> torch.Tensor:
    (tensor,) = load_file(folder / record["latents"]).values()
    return tensor


def the_model(place: Place, arch: str = "zimage") -> tuple[Any, Any, Any]:
    """Behaviour, source and freshly loaded float32 denoiser of a miniature."""
    behaviour = archs.get(archs.name_of(arch))
    source = find_model(str(place.model(arch)), components=behaviour.spec.components, denoiser=behaviour.spec.denoiser)
    denoiser = behaviour.build_denoiser(source)
    materialise(denoiser, behaviour.denoiser_tensors(source), Placement(torch.float32, CPU), where="miniature")
    return behaviour, source, denoiser.eval()


# --- the pictures ----------------------------------------------------------------------------------------------------


def test_every_picture_can_be_drawn_again_from_its_record(place: Place, done: Done) -> None:
    """Prompt, seed and size give the kept latents, bit for bit, as `detour sample` draws them."""
    behaviour, source, denoiser = the_model(place)
    text = behaviour.load_text_encoders(source, Placement(torch.float32, CPU))
    scheduler = behaviour.load_scheduler(source)
    found = records(done.folder)
    assert [record["seed"] for record in found] == list(range(PICTURES))
    assert [record["prompt"] for record in found] == [PROMPTS[index % 3] for index in range(PICTURES)]
    assert [record["held_out"] for record in found] == [True] * HELD_OUT + [False] * (PICTURES - HELD_OUT)
    for record in found:
        request = sample.Request(
            prompt=record["prompt"], seed=record["seed"], width=record["width"], height=record["height"],
            steps=record["steps"], guidance=record["guidance"],
        )  # fmt: skip
        noise = sample.initial_noise(behaviour.spec, request)
        told = behaviour.encode_prompts(text, [record["prompt"]])
        again = sample.denoise(behaviour, denoiser, scheduler, noise, request, told)[0]
        assert torch.equal(latents_of(done.folder, record), again)


def test_the_held_out_pictures_are_never_trained_on(done: Done) -> None:
    seen = {name for batch in done.trained for name in batch.names}
    assert seen == {f"pictures/{index:06d}" for index in range(HELD_OUT, PICTURES)}
    assert len(done.trained) == STEPS


@contextmanager
def counted(name: str = "zimage") -> Iterator[list[int]]:
    """How many pictures each prediction inside is of."""
    kind = type(archs.get(archs.name_of(name)))
    calls: list[int] = []
    real = kind.predict

    def predict(self: Any, denoiser: Any, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(latents))
        return real(self, denoiser, latents, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "predict", predict)
        yield calls


@pytest.mark.slow
def test_what_it_costs_in_forward_passes(place: Place, tmp_path: Path) -> None:
    """Drawing, training, measuring, and the drift meter's ends: as docs/adapter.md counts. A resumed run draws none."""
    drawing, training, measuring = 3 * PICTURES, STEPS, 4 * HELD_OUT * (STEPS // EVERY + 1)
    drift = 4 * (FEW + LONG) * 3  # four control pictures: untouched once, at the start, at the end
    with counted() as calls:
        made(place, tmp_path)
    assert sum(calls) == drawing + training + measuring + drift
    with counted() as calls:
        made(place, tmp_path, train={"steps": STEPS + 1})
    assert sum(calls) == 1 + 4 * HELD_OUT + 4 * (FEW + LONG) * 2  # one more step, then the end


@pytest.mark.slow
def test_more_pictures_add_to_those_that_are_there(place: Place, done: Done, tmp_path: Path) -> None:
    before = records(done.folder)
    more = made(place, tmp_path, adapter={"pictures": PICTURES + 2}, train={"steps": 1})
    assert records(more.result.folder)[:PICTURES] == before
    written = {record["latents"]: latents_of(more.result.folder, record) for record in records(more.result.folder)}
    assert len(written) == PICTURES + 2
    assert all(torch.equal(latents_of(done.folder, record), written[record["latents"]]) for record in before)


def test_a_picture_is_found_by_all_that_it_is_drawn_from(place: Place, tmp_path: Path) -> None:
    """Another prompt, seed, size, number of steps, type of weights or model is another picture."""

    def names(arch: str = "zimage", **sections: dict[str, Any]) -> set[str]:
        process = load_job(job_file(place, tmp_path, arch, **sections)).job.config.process[0]
        inputs = build.gather(archs.resolve(process), Recorder())
        assert inputs.making is not None
        store = cache.Store(place.root / "cache")
        keys = cache.Keys(vae="of no account", text="the text encoder", spatial_factor=8)
        keys, _ = inputs.making.identify(store, keys, inputs.arch.spec, inputs.source)
        return {keys.latents(item, inputs.training.datasets[0], 0) for item in inputs.training.items}

    first = names()
    assert first == names(train={"lr": 1.0}, network={"linear": 2}, model={"low_vram": True})
    changes: list[dict[str, dict[str, Any]]] = [
        *({"adapter": change} for change in ({"sample_steps": 4}, {"seed": 9}, {"prompts": ["a"]}, {"sizes": [32]})),
        {"model": {"dtype": "bf16"}}, {"model": {"quantize": True, "qtype": "int8"}},
    ]  # fmt: skip
    others = [names(**change) for change in changes] + [names("flux:schnell")]
    assert not [other for other in others if other & first]


@pytest.mark.slow
def test_a_damaged_picture_is_drawn_again(place: Place, tmp_path: Path) -> None:
    first = made(place, tmp_path, train={"steps": 1})
    chosen = first.result.folder / records(first.result.folder)[3]["latents"]
    content = chosen.read_bytes()
    (whole,) = load(content).values()
    chosen.write_bytes(content[:-4] + b"\0\1\2\3")
    with counted() as calls:
        made(place, tmp_path, train={"steps": 2})
    assert torch.equal(*load_file(chosen).values(), whole)
    assert calls[:3] == [1, 1, 1] and sum(calls) == 3 + 1 + 4 * HELD_OUT + 4 * (FEW + LONG) * 2


def test_prompts_take_turns_with_sizes(tmp_path: Path) -> None:
    """Where both lists have a divisor in common, a prompt still comes at every size."""
    config = load_config(prompts=["a", "b"], sizes=[64, {"width": 64, "height": 128}], pictures=8)
    drawn = [(drawing.prompt, drawing.height) for drawing in own_pictures.plan(config)]
    assert sorted(set(drawn)) == [("a", 64), ("a", 128), ("b", 64), ("b", 128)]
    assert [drawing.seed for drawing in own_pictures.plan(config)] == list(range(8))


def load_config(**options: Any) -> Any:
    from detour.config.job import AdapterConfig

    stop = StopConfig(held_out=1)
    return AdapterConfig.model_validate({"stop": stop} | options)


def test_prompts_come_from_a_file_or_from_everyday_subjects(tmp_path: Path) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("a fox\n\n  an owl at night \n", encoding="utf-8")
    assert own_pictures.prompts_of(load_config(prompts_file=listed)) == ["a fox", "an owl at night"]
    built = own_pictures.prompts_of(load_config(pictures=500))
    assert len(set(built)) == 500 and built[0] == everyday.prompt(0)
    assert len({everyday.prompt(index) for index in range(everyday.COUNT)}) == 14637  # as docs/options.md says
    listed.write_text("\n")
    with pytest.raises(UserError, match=r"prompts_file.*holds no prompt; write one a line"):
        own_pictures.prompts_of(load_config(prompts_file=listed))
    with pytest.raises(UserError, match=r"adapter.prompts_file: .*cannot be read: No such file"):
        own_pictures.prompts_of(load_config(prompts_file=tmp_path / "none.txt"))
    listed.write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        own_pictures.prompts_of(load_config(prompts_file=listed))


# --- the training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_held_out_loss_really_falls(place: Place, tmp_path: Path) -> None:
    """The control of the next test: with a rate at which something is learnt."""
    ran = made(
        place, tmp_path,
        adapter={"pictures": 22}, stop={"every": 30, "held_out": 4, "tolerance": 1e-9}, network={"linear": 16},
        train={"steps": 60, "gradient_accumulation": 1},
    )  # fmt: skip
    losses = [event.loss for event in ran.seen.of("validation")]
    assert losses[2] < losses[1] < losses[0] and losses[2] < 0.995 * losses[0]
    assert not [warning for warning in ran.seen.warnings if "has fallen by" in warning]
    drift = ran.seen.of("drift")
    assert (drift[0].step, drift[-1].step) == (0, 60) and drift[-1].drift > 0.05
    assert drift[0].sharpness == 1 and drift[-1].sharpness_long is not None


def test_with_next_to_no_learning_rate_it_has_not_moved(place: Place, tmp_path: Path) -> None:
    ran = made(place, tmp_path, train={"lr": 1e-12})
    assert ran.result.finished and ran.result.step == STEPS
    assert ran.seen.of("plateau") == []
    first, last = [warning for warning in ran.seen.warnings if "has fallen by" in warning]
    assert "it has fallen by 0.00%, less than adapter.stop.least (0.50%); a higher train.lr is needed" in first
    assert last.startswith(f"train.steps ({STEPS}) is reached before adapter.stop: ")


def losses_of(ran: Ran) -> list[float]:
    return [event.loss for event in ran.seen.of("step")]


EARLY: dict[str, Any] = {"stop": {"every": 2, "patience": 1, "tolerance": 0.999, "least": 1e-6}, "train": {"steps": 40}}
"""Ends as soon as the loss has fallen and a later measurement has not brought nearly all of that fall."""


@pytest.mark.slow
def test_it_ends_where_the_loss_is_flat_and_the_same_command_has_nothing_to_do(place: Place, tmp_path: Path) -> None:
    ran = made(place, tmp_path, **EARLY)
    (event,) = ran.seen.of("plateau")
    assert describe(event) == [f"step {event.step}: done: {event.reason}"]
    assert ran.result.finished and ran.result.step == event.step < 40
    losses = [validation.loss for validation in ran.seen.of("validation")]
    assert plateau.judge(losses, StopConfig(**EARLY["stop"])).reason == event.reason
    assert [plateau.judge(losses[:n], StopConfig(**EARLY["stop"])).state == "flat" for n in range(1, len(losses))] == [
        False
    ] * (len(losses) - 1)
    assert newest(ran.result.folder).step == event.step
    again = made(place, tmp_path, **EARLY)
    assert again.result.step == event.step and again.seen.of("step") == []
    assert "lower adapter.stop.tolerance to go on" in again.seen.warnings[-1]

    on = made(place, tmp_path, **EARLY | {"stop": EARLY["stop"] | {"tolerance": 1e-9}})
    assert on.result.step > event.step  # what was flat is not flat enough any more


def test_what_a_kill_after_the_last_save_left_undone_is_done(place: Place, tmp_path: Path) -> None:
    """Without another step: the figures in the checkpoint say that it is done."""
    ran = made(place, tmp_path, **EARLY)
    written = files_of(ran.result.folder)
    (ran.result.folder / "ad.safetensors").unlink()
    again = made(place, tmp_path, **EARLY)
    assert again.seen.of("step") == [] and again.result.finished
    assert files_of(ran.result.folder) == written


@pytest.mark.slow
def test_it_goes_on_while_few_step_pictures_are_sharp(place: Place, tmp_path: Path) -> None:
    ran = made(place, tmp_path, stop=EARLY["stop"] | {"sharpness": 1e-6}, train={"steps": 8})
    assert ran.result.step == 8 and ran.seen.of("plateau") == []
    assert "of their sharpness (adapter.stop.sharpness: 0%)" in ran.seen.warnings[-1]
    blurred = made(place, tmp_path / "blurred", stop=EARLY["stop"] | {"sharpness": 99.0}, train={"steps": 8})
    plain = made(place, tmp_path / "plain", stop=EARLY["stop"], train={"steps": 8})
    assert blurred.result.step == plain.result.step and losses_of(blurred) == losses_of(plain)


@pytest.mark.slow
def test_other_held_out_pictures_begin_a_new_history(place: Place, tmp_path: Path) -> None:
    """Losses of other pictures do not compare: the first is then that of the model without what was trained."""
    run(load_job(job_file(place, tmp_path)).job, stop_at=4)
    assert len(newest(tmp_path / "ad").state["progress"]["held_out"]) == 3
    ran = made(place, tmp_path, stop={"held_out": HELD_OUT + 1})
    history = newest(ran.result.folder).state["progress"]["held_out"]
    fresh = made(place, tmp_path / "fresh", stop={"held_out": HELD_OUT + 1}, train={"steps": 1})
    assert len(history) == 2 and history[0] == pytest.approx(fresh.seen.of("validation")[0].loss, rel=1e-6)
    assert any("held_out_sha256" in detail for event in ran.seen.of("warning") for detail in event.details)


@pytest.mark.parametrize(
    ("losses", "state"),
    [
        ([], "early"),
        ([1.0, 0.9], "early"),
        ([1.0, 0.8, 0.7], "falling"),
        ([1.0, 0.8, 0.799, 0.798], "flat"),
        ([1.0, 0.8, 0.7, 0.6999], "falling"),
        ([1.0, 0.8, 0.85, 0.9], "flat"),
        ([1.0, 0.9999, 0.9998, 0.9999], "unmoved"),
        ([1.0, 1.1, 1.2], "unmoved"),
        ([1.0, 0.5, 1.4, 0.45], "falling"),
    ],
)
def test_figures_are_judged_as_they_are_meant(losses: list[float], state: str) -> None:
    verdict = plateau.judge(losses, StopConfig(patience=2, tolerance=0.05))
    assert verdict.state == state
    assert ("rises again" in verdict.reason) == (losses[-1:] == [0.9] and len(losses) == 4)


# --- killed, stopped, resumed ----------------------------------------------------------------------------------------


def killed_when(path: Path, ready: Callable[[], bool]) -> None:
    """Run a job in a process of its own and kill it as soon as `ready`."""
    process = start(child_run, path)
    while not ready():
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["drawing", "training"])
def test_killed_and_run_again_it_ends_as_if_it_had_not_been(done: Done, phase: str) -> None:
    folder = done.job.parent / "ad"

    def drawn() -> int:
        return len([path for path in (folder / "pictures").rglob("*") if path.suffix == ".safetensors"])

    half = {"drawing": lambda: drawn() >= 2, "training": (folder / "checkpoints" / "step-000000003").is_dir}
    killed_when(done.job, half[phase])
    there = drawn()
    assert there == PICTURES if phase == "training" else 2 <= there < PICTURES
    assert (folder / "checkpoints").is_dir() == (phase == "training")
    with counted() as calls:
        run(load_job(done.job).job)
    assert calls[: 3 * (PICTURES - there) + 1] == [1] * 3 * (PICTURES - there) + calls[3 * (PICTURES - there) :][:1]
    _same_as(done, folder)


@pytest.mark.slow
def test_stopped_on_request_it_goes_on_bit_for_bit(done: Done) -> None:
    loaded = load_job(done.job).job
    first = run(loaded, stop_at=4)
    assert not first.result.finished and first.result.step == 4
    second = run(loaded)
    assert losses_of(first) + losses_of(second) == done.losses
    (first.result.folder / "ad-000000004.safetensors").unlink()  # saved because it was stopped there
    _same_as(done, first.result.folder)


def _same_as(done: Done, folder: Path) -> None:
    """Every tensor, number and file but the log and what is made of it; then it is out of the way.

    Files of the cache are compared by their tensors: the order of their headers' entries is another in each process.
    """
    assert state_of(folder) == state_of(done.folder)
    own, theirs = (
        {name: digest for name, digest in files_of(each).items() if name != "report.html" and "pictures/" not in name}
        for each in (folder, done.folder)
    )
    assert own == theirs
    for record in records(done.folder):
        assert torch.equal(latents_of(folder, record), latents_of(done.folder, record))
    assert len(list((folder / "pictures").rglob("*.safetensors"))) == PICTURES
    shutil.rmtree(folder)


def test_a_request_to_stop_is_heard_between_two_pictures(place: Place, tmp_path: Path) -> None:
    loaded = load_job(job_file(place, tmp_path)).job

    def ask(event: Any) -> None:
        if event.type == "stage" and event.name == "model" and event.done:
            steering.request(tmp_path / "ad", "stop")

    with counted() as calls, pytest.raises(KeyboardInterrupt, match="before the first step"):
        run(loaded, on=ask)
    assert calls == []
    assert run(loaded).result.finished


@pytest.mark.slow
def test_a_rehearsal_draws_two_pictures_and_keeps_none(place: Place, tmp_path: Path) -> None:
    loaded = load_job(job_file(place, tmp_path)).job
    with counted() as calls:
        (result,) = rehearse(loaded, Control(), Recorder())
    assert result.finished and result.step == 2 and not (tmp_path / "ad").exists()
    assert calls[:9] == [1] * 9  # three pictures of three steps, one held out


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_what_readers_of_training_adapters_know(done: Done) -> None:
    with safe_open(done.file, framework="pt") as opened:
        keys, metadata = list(opened.keys()), opened.metadata()
        dtypes = {str(opened.get_slice(key).get_dtype()) for key in keys}
    assert dtypes == {"BF16"}
    assert all(key.startswith("diffusion_model.layers.") for key in keys)
    assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"}
    assert "diffusion_model.layers.0.attention.to_k.lora_A.weight" in keys  # whose rows toolkits take for the rank
    assert metadata["detour.kind"] == "training adapter"
    assert len(metadata["detour.base_sha256"]) == 64
    how = json.loads(metadata["detour.made"])
    losses = [event.loss for event in done.seen.of("validation")]
    assert how == {
        "pictures": 4, "held_out": 2, "prompts": 3, "sizes": ["64x64"], "sample_steps": 3, "guidance": 1.0, "seed": 0,
        "held_out_loss": [losses[0], losses[-1]],
    }  # fmt: skip
    assert not [value for value in metadata.values() if "circle" in value or str(done.folder) in value]
    found = inspect_file(done.file)
    assert (found["what"], found["arch"], found["rank"], found["step"]) == ("training adapter", "zimage", 8, STEPS)
    assert inspect_file(done.folder / "ad-000000003.safetensors")["what"] == "training adapter"
    proof = done.seen.of("save")[-1].proof
    assert proof.startswith(
        "24 layers, loaded by diffusers.loaders.ZImageLoraLoaderMixin; as a training adapter 24 layers; merged, "
    )


def test_as_a_training_adapter_it_adds_what_was_trained(place: Place, done: Done) -> None:
    """Both modes, against the LoRA of the last checkpoint on the same model; taken away, the model is itself again."""
    behaviour, source, denoiser = the_model(place)
    text = behaviour.load_text_encoders(source, Placement(torch.float32, CPU))
    told = behaviour.encode_prompts(text, PROMPTS[:1])
    z, t = torch.randn(1, *behaviour.spec.latent_shape(SIZE, SIZE)), torch.tensor([0.6])

    def field(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return behaviour.predict(model, z, t, told)

    without, network = field(denoiser), NetworkConfig(linear=8)
    trained = the_model(place)[2]
    lora.attach(trained, lora.linear_names(trained, behaviour.spec, network), network, 0)
    lora.load_state(trained, newest(done.folder).tensors["weights"])
    with_it = field(trained)
    size = (with_it - without).norm()
    assert size > 1e-3 * without.norm()
    modes: tuple[Mode, ...] = ("factored", "merged")
    for mode in modes:
        fresh = behaviour.build_denoiser(source)
        found = load_training_adapter(
            done.file, linear_shapes(fresh), behaviour.spec.lora_keys, mode, dtype=torch.float32
        )
        patch = found.patch if mode == "merged" else None
        tensors = behaviour.denoiser_tensors(source)
        materialise(fresh, tensors, Placement(torch.float32, CPU, patch=patch), where="miniature")
        found.attach(fresh.eval())
        assert (field(fresh) - with_it).norm() < 0.02 * size  # the file is in bf16
        with found.removed():
            assert (field(fresh) - without).norm() <= (0.0 if mode == "factored" else 1e-3 * size)


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_a_job_trains_with_it(place: Place, done: Done, tmp_path: Path, mode: str) -> None:
    from detour.nano import drawn

    drawn.write_dataset(tmp_path / "data", n=2, size=SIZE)

    model = {"name_or_path": str(place.model()), "assistant_lora_path": str(done.file), "assistant_lora_mode": mode}
    train = {"steps": 2, "cache_folder": str(place.root / "cache")}
    dataset = {"folder_path": str(tmp_path / "data")}
    ran = run(job(World(tmp_path), tmp_path, train=train, model=model, dataset=dataset))
    assert ran.result.finished
    with safe_open(ran.result.lora, framework="pt") as opened:
        assert opened.metadata()["detour.training_adapter_sha256"] == files.sha256_file(done.file)


def test_a_file_that_says_something_else_is_not_kept(place: Place, done: Done) -> None:
    """The proof compares what the file adds with what was trained, and takes nothing less than the whole."""
    behaviour, _, denoiser = the_model(place)
    network = NetworkConfig(linear=8)
    lora.attach(denoiser, lora.linear_names(denoiser, behaviour.spec, network), network, 0)
    spec = behaviour.spec
    tensors = newest(done.folder).tensors["weights"]
    told = adapter.prove(done.file, export.from_training(tensors, network), denoiser, spec, torch.bfloat16)
    assert told.startswith("as a training adapter 24 layers; merged, ")
    layer = "layers.1.attention.to_q.lora_B.weight"
    other = export.from_training(tensors | {layer: 1.1 * tensors[layer]}, network)
    with pytest.raises(export.NotProvenError, match=r"adds something else to layers\.1\.attention\.to_q"):
        adapter.prove(done.file, other, denoiser, spec, torch.bfloat16)
    fewer = export.from_training({name: t for name, t in tensors.items() if not name.startswith("layers.2.")}, network)
    with pytest.raises(export.NotProvenError, match="has 24 layers of 16"):
        adapter.prove(done.file, fewer, denoiser, spec, torch.bfloat16)


@pytest.mark.slow
def test_a_file_before_anything_was_learnt_does_not_end_the_run(place: Place, tmp_path: Path) -> None:
    """The first step is not taken, so the LoRA saved after it is still zero, which no reader would accept."""
    real = preserve.training_loss

    def loss(*asked: Any) -> Any:
        out = real(*asked)
        nothing = float("nan") if asked[-2] == 0 else 1.0
        return replace(out, loss=out.loss * nothing, per_sample_B=out.per_sample_B * nothing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preserve, "training_loss", loss)
        ran = made(place, tmp_path, train={"steps": 2}, save={"save_every": 1})
    with pytest.raises(UserError, match="it is all zero"):
        blank = ran.result.folder / "ad-000000001.safetensors"
        read_adapter(blank, linear_shapes(the_model(place)[2]), archs.spec("zimage").lora_keys)
    assert ran.result.finished


# --- other architectures ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "steps", "kind"),
    [
        pytest.param("flux:schnell", 4, "flow"),
        pytest.param("sd3:3.5-large-turbo", 4, "flow", marks=pytest.mark.slow),
        pytest.param("pixart:lcm", 4, "eps", marks=pytest.mark.slow),
        pytest.param("sd2:turbo", 4, "v", marks=pytest.mark.slow),
    ],
)
def test_other_distilled_models_by_the_same_code(
    place: Place, tmp_path: Path, arch: str, steps: int, kind: str
) -> None:
    """Flow models and diffusion models, those that draw noise on the way among them."""
    ran = made(place, tmp_path, arch, adapter={"sample_steps": None}, train={"steps": 2}, stop={"every": 1})
    spec = archs.spec(archs.name_of(arch))
    assert spec.objective == kind and ran.result.finished and ran.result.lora is not None
    assert {record["steps"] for record in records(ran.result.folder)} == {steps}
    denoiser = the_model(place, arch)[2]
    found = load_training_adapter(
        ran.result.lora, linear_shapes(denoiser), spec.lora_keys, "factored", dtype=torch.float32
    )
    assert found.names == lora.linear_names(denoiser, spec, NetworkConfig())
    facts = inspect_file(ran.result.lora)
    assert facts["what"] == "training adapter" and spec.name in (facts["arch"], *facts["also_fits"])
    with safe_open(ran.result.lora, framework="pt") as opened:
        keys = list(opened.keys())
    assert all(key.startswith(spec.lora_keys.comfy_prefix) for key in keys)
    assert not [key for key in keys if key.endswith(".alpha")]


# --- refused ---------------------------------------------------------------------------------------------------------


def test_an_adapter_for_some_blocks_is_refused_before_anything_is_drawn(place: Place, tmp_path: Path) -> None:
    with counted() as calls, pytest.raises(UserError, match=r"network.include and network.exclude: .*are missing"):
        made(place, tmp_path, network={"include": [r"layers\.0\."]})
    assert calls == [] and not (tmp_path / "ad").exists()
    assert made(place, tmp_path, network={"include": ["attention"]}, train={"steps": 1}).result.finished


def test_a_full_disk_is_refused_before_the_first_picture(place: Place, tmp_path: Path) -> None:
    with (
        counted() as calls,
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RefusedError, match="has no room for"),
    ):
        patch.setattr(files, "free_bytes", lambda path: 1000)
        made(place, tmp_path)
    assert calls == []


def test_values_that_are_not_finite_are_not_kept(place: Place, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="the model drew values that are not"):
        patch.setattr(adapter.Painter, "draw", lambda *_: torch.full((16, 8, 8), torch.nan))
        made(place, tmp_path)
    assert list((tmp_path / "ad" / "pictures").rglob("*.safetensors")) == []


def test_commands(place: Place, tmp_path: Path) -> None:
    """`detour check` says what is drawn, `detour adapter` runs it, and is for such jobs alone."""
    path = job_file(place, tmp_path, train={"steps": 2})
    ran = well("check", path)
    assert ran.out.splitlines()[-1] == (
        "ok: Z-Image turbo: a training adapter from 6 pictures of its own (3 steps each, 3 prompts, 2 held out), at "
        "most 2 steps"
    )
    checked = well("check", path, "--json").json["processes"][0]
    assert checked["pictures"] == 6 and checked["captions"] == 3
    assert well("adapter", path).out == f"finished at step 2: {tmp_path / 'ad' / 'ad.safetensors'}\n"
    asked = detour("check", path, "--set", "adapter.prompts=[]", "--set", f"adapter.prompts_file={tmp_path}/none.txt")
    assert asked.code == 2 and f"--set adapter.prompts_file={tmp_path}/none.txt: adapter.prompts_file: " in asked.err
    wrong = tmp_path / "train.yaml"
    wrong.write_text(
        "config: {output_name: a, process: [{type: train, model: {arch: zimage}, train: {dataset_folder: x}}]}"
    )
    refused = detour("adapter", wrong)
    assert refused.code == 2 and "train.yaml:1: type: train; `detour adapter` is for type: adapter" in refused.err
    base = detour("adapter", path, "--set", "model.arch=zimage:base", "--set", "adapter.sample_steps=null")
    assert base.code == 2 and "adapter.sample_steps: Z-Image base is not distilled" in base.err
    assert state_of(tmp_path / "ad")
