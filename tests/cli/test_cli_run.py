"""`detour run`: what it leaves, what it says, how it goes on, stops, rehearses; exit codes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from command import PROGRAM, Ran, detour, events, program, tree, well
from detour import files
from detour.config.load import load_job

NAME = "zig"
SECTIONS = {
    "train": {"steps": 4, "gradient_accumulation": 2},
    "save": {"save_every": 2, "dtype": "bf16", "formats": ["comfy", "diffusers"]},
    "validation": {"validate_every": 2, "holdout": 0.3},
    "sample": {"disable_sampling": False, "sample_every": 2, "seed": 7, "prompts": ["a zig", "a red circle"]},
}


@dataclass(frozen=True)
class Done:
    """A job that has been run to its end, and what the command said."""

    job: Path
    folder: Path
    ran: Ran


@pytest.fixture(scope="module")
def done(tmp_path_factory, write_job) -> Done:
    home = tmp_path_factory.mktemp("done")
    job = write_job(home, NAME, **SECTIONS)
    return Done(job, home / "output" / NAME, well("run", job))


def hashes(folder: Path) -> dict[str, str]:
    """Sha256 of everything that a run leaves but its log, and the report, which tells how long it took."""
    kept = [name for name in tree(folder) if name not in ("events.jsonl", "report.html", ".lock")]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in kept}


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(done):
    checkpoint = ["job.yaml", "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]
    assert tree(done.folder) == sorted(
        [
            ".lock",
            "events.jsonl",
            "job.yaml",
            "report.html",
            *(f"checkpoints/step-{step:09d}/{name}" for step in (0, 2, 4) for name in checkpoint),
            f"{NAME}-000000002.safetensors",
            f"{NAME}.diffusers.safetensors",
            f"{NAME}.safetensors",
            *(f"samples/{step:09d}-{index:02d}.png" for step in (0, 2, 4) for index in (0, 1)),
        ]
    )
    for step in (0, 2, 4):
        files.verify_directory(done.folder / "checkpoints" / f"step-{step:09d}")


def test_the_last_line_says_where_the_lora_is(done):
    assert done.ran.out == f"finished at step 4: {done.folder / NAME}.safetensors\n"
    assert f"{NAME} (zimage) starts: 4 steps in all" in done.ran.err
    assert "Traceback" not in done.ran.err


def test_job_yaml_has_every_default_and_runs_as_it_stands(done):
    written = load_job(done.folder / "job.yaml")
    process = written.job.config.process[0]
    assert process.train.noise_scheduler == "flowmatch"
    assert process.model.variant == "turbo"
    assert process.network.linear_alpha == 4
    text = (done.folder / "job.yaml").read_text()
    for option in ("timestep_bias: balanced", "max_grad_norm: 1.0", "assistant_lora_mode: factored"):
        assert option in text
    again = detour("run", done.folder / "job.yaml", "--json")
    assert again.code == 0
    assert again.json[0]["finished"]


PROMISED = {
    "start": {"step", "total_steps", "name", "arch", "resumed_from"},
    "step": {"step", "epoch", "loss", "lr", "grad_norm", "seconds", "seconds_outside", "memory_bytes"},
    "sample": {"step", "index", "path", "prompt", "seed"},
    "save": {"step", "checkpoint", "lora"},
    "validation": {"step", "loss", "by_time"},
    "end": {"step", "reason", "seconds"},
}


def test_every_event_has_the_promised_fields(done):
    lines = (done.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    first_run = []
    for event in map(json.loads, lines):
        first_run.append(event)
        if event["type"] == "end":
            break
    for event in first_run:
        assert isinstance(event["time"], float)
        assert PROMISED.get(event["type"], set()) <= event.keys(), event
    assert PROMISED.keys() <= {event["type"] for event in first_run}
    steps = [event["step"] for event in first_run if event["type"] == "step"]
    assert steps == [1, 2, 3, 4]
    assert all(0 < event["loss"] < 10 for event in first_run if event["type"] == "step")
    saves = [(event["step"], event["lora"]) for event in first_run if event["type"] == "save"]
    assert saves[1] == (2, str(done.folder / f"{NAME}-000000002.safetensors"))
    assert saves[-1] == (4, str(done.folder / f"{NAME}.safetensors"))
    assert first_run[-1]["reason"] == "finished"


def test_a_run_leaves_a_report_with_its_figures(done):
    first = (done.folder / "report.html").read_bytes()
    data = json.loads(re.search(rb'<script type="application/json" id="data">(.*?)</script>', first)[1])
    curves = {chart["key"]: chart["curves"][0] for chart in data["charts"]}
    steps = [event for event in events(done.folder, "step") if event["step"] <= 4]
    for chart, key in (("loss", "loss"), ("lr", "lr"), ("grad_norm", "grad_norm"), ("seconds", "seconds")):
        assert curves[chart]["steps"] == [1, 2, 3, 4]
        assert curves[chart]["values"] == [event[key] for event in steps]
    held = events(done.folder, "validation")
    assert curves["validation"]["values"] == [event["loss"] for event in held if event["step"] <= 4]
    assert first.count(b'<img src="data:image/jpeg;base64,') == 6  # two prompts before the first step, at 2 and at 4
    assert hashlib.sha256((done.folder / f"{NAME}.safetensors").read_bytes()).hexdigest().encode() in first
    facts = events(done.folder, "start")[0]["facts"]
    assert facts["pictures"] == "3"  # two of five are held out
    for name in ("torch", "diffusers", "dataset_sha256", "training_adapter_sha256", "vae_sha256"):
        assert facts[name].encode() in first


def test_previews_say_how_to_draw_them_again(done):
    for index, prompt in enumerate(("a zig", "a red circle")):
        with Image.open(done.folder / "samples" / f"000000004-{index:02d}.png") as picture:
            assert picture.size == (64, 64)
            text = picture.text
        assert text["detour:prompt"] == prompt
        assert text["detour:seed"] == "7"
        assert text["detour:steps"] == "2"
        assert text["detour:step"] == "4"
        assert text["detour:guidance"] == "1.0"
        assert text["detour:guidance_diffusers"] == "0.0"
        assert len(text["detour:training_adapter_sha256"]) == 64
        assert json.loads(text["parameters"])["prompt"] == prompt


def test_the_lora_has_comfyui_keys_and_its_origin(done):
    with safe_open(done.folder / f"{NAME}.safetensors", framework="pt") as lora:
        names, metadata = list(lora.keys()), lora.metadata()
    assert all(name.startswith("diffusion_model.layers.") for name in names)
    assert metadata["detour.step"] == "4"
    assert metadata["detour.arch"] == "zimage"
    with safe_open(done.folder / f"{NAME}.diffusers.safetensors", framework="pt") as lora:
        assert all(name.startswith("transformer.layers.") for name in lora.keys())  # noqa: SIM118


# --- again, on, afresh ---------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(done):
    before = hashes(done.folder)
    again = well("run", done.job)
    assert again.out == done.ran.out
    assert "this run is finished" in again.err
    assert "--fresh" in again.err
    assert hashes(done.folder) == before


def test_more_steps_go_on_from_the_last_checkpoint(tmp_path, write_job):
    job = write_job(tmp_path, NAME)
    well("run", job)
    more = well("run", job, "--set", "train.steps=3")
    checkpoint = tmp_path / "output" / NAME / "checkpoints" / "step-000000002"
    assert f"goes on at step 2 from {checkpoint}: 3 steps in all" in more.err
    assert "train.steps: 2 -> 3" in more.err
    assert more.out.startswith("finished at step 3: ")
    starts = events(tmp_path / "output" / NAME, "start")
    assert [start["resumed_from"] for start in starts] == [None, str(checkpoint)]
    assert [event["step"] for event in events(tmp_path / "output" / NAME, "step")] == [1, 2, 3]


def test_fresh_starts_over_and_loses_nothing(tmp_path, write_job):
    job, folder = write_job(tmp_path, NAME), tmp_path / "output" / NAME
    well("run", job)
    (folder / "notes.txt").write_text("mine")
    first = hashes(folder)
    again = well("run", job, "--fresh")
    assert f"{NAME} (zimage) starts: 2 steps in all" in again.err
    assert hashes(folder.with_name(f"{NAME}.old-1")) == first
    assert not (folder / "notes.txt").exists()
    # Everything is a function of job and seed: the second run made the same files.
    lora = f"{NAME}.safetensors"
    assert hashes(folder)[lora] == first[lora]
    well("run", job, "--fresh")
    assert sorted(path.name for path in folder.parent.iterdir()) == [NAME, f"{NAME}.old-1", f"{NAME}.old-2"]


def test_json_is_the_only_thing_on_standard_output(tmp_path, write_job):
    ran = well("run", write_job(tmp_path, NAME), "--json")
    folder = tmp_path / "output" / NAME
    assert ran.json == [
        {
            "folder": str(folder),
            "reason": "finished",
            "step": 2,
            "lora": str(folder / f"{NAME}.safetensors"),
            "finished": True,
        }
    ]


def test_processes_run_in_order_each_in_a_folder_of_its_own(tmp_path, write_job):
    job = write_job(tmp_path, NAME, train={"steps": 1})
    text = job.read_text()
    process = text[text.index("    - type") :]
    job.write_text(text + process.replace("lr: 0.001", "lr: 0.002"))
    ran = well("run", job, "--json")
    assert [result["folder"] for result in ran.json] == [
        str(tmp_path / "output" / NAME),
        str(tmp_path / "output" / f"{NAME}_2"),
    ]
    ends = [events(Path(result["folder"]), "end")[0]["time"] for result in ran.json]
    assert ends == sorted(ends)


def test_an_error_in_the_second_process_names_its_line(tmp_path, write_job):
    job = write_job(tmp_path, NAME, train={"steps": 1})
    text = job.read_text()
    process = text[text.index("    - type") :].replace("training_adapter.safe", "trainig_adapter.safe")
    job.write_text(text + process)
    line = next(n for n, line in enumerate(job.read_text().splitlines(), 1) if "trainig_adapter" in line)
    ran = detour("run", job)
    assert ran.code == 2
    assert f"error: {job}:{line}: model.assistant_lora_path" in ran.err
    checked = detour("check", job)
    assert f"error: {job}:{line}: model.assistant_lora_path" in checked.err


def test_warnings_found_before_the_start_are_in_the_log(tmp_path, write_job):
    job = write_job(tmp_path, NAME, model={"assistant_lora_path": None})
    ran = well("run", job)
    assert "warning: Z-Image turbo is distilled and is trained without a training adapter" in ran.err
    messages = [event["message"] for event in events(tmp_path / "output" / NAME, "warning")]
    assert any("trained without a training adapter" in message for message in messages)


# --- rehearsal -----------------------------------------------------------------------------------------------------


def test_a_dry_run_leaves_nothing_but_caches(tmp_path, write_job, monkeypatch):
    scratch, cache = tmp_path / "scratch", tmp_path / "cache"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    sections = SECTIONS | {"logging": {"tensorboard": True}}
    job = write_job(tmp_path / "home", NAME, **sections)
    before = tree(tmp_path / "home")
    ran = well(
        "run",
        job,
        "--dry-run",
        "--set",
        "train.epochs=7",
        "--set",
        "train.steps=null",
        "--set",
        f"train.cache_folder={cache}",
    )
    assert tree(tmp_path / "home") == before
    assert not (tmp_path / "home" / "output").exists()
    assert list(scratch.iterdir()) == []
    assert tree(cache)
    assert ran.out.startswith("rehearsed: ")
    assert "goes on at step 1" in ran.err  # it was resumed
    assert "preview" in ran.err


def test_a_dry_run_names_no_file_that_is_gone(tmp_path, write_job):
    ran = well("run", write_job(tmp_path, NAME), "--dry-run", "--json")
    assert ran.json == [{"folder": None, "reason": "finished", "step": 2, "lora": None, "finished": True}]


def test_a_lora_of_almost_nothing_is_exported_all_the_same(tmp_path, write_job):
    """A moving average after one small step has numbers around 1e-8, of which fp16 makes 0 or 6e-8."""
    job = write_job(
        tmp_path,
        NAME,
        train={"steps": 1, "lr": 1e-6, "ema_config": {"use_ema": True}},
        network={"linear_alpha": 2.0},
        save={"dtype": "fp16", "formats": ["comfy", "diffusers", "kohya"]},
    )
    assert well("run", job).out.startswith("finished at step 1: ")


# --- stopping ------------------------------------------------------------------------------------------------------


@contextmanager
def interrupted(log: Path, step: int, number: int, times: int = 1) -> Iterator[None]:
    """Sends this process a signal once the log has reached a step, as Ctrl-C or a job scheduler does."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if log.exists() and '"type": "step", "time": ' in (text := log.read_text()) and f'"step": {step},' in text:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(0.005)
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(tmp_path, write_job, number):
    job, folder = write_job(tmp_path, NAME, train={"steps": 60}), tmp_path / "output" / NAME
    with interrupted(folder / "events.jsonl", 2, number):
        stopped = detour("run", job, "--json")
    assert stopped.code == 130
    result = stopped.json[0]
    assert (result["finished"], result["lora"]) == (False, None)
    assert result["reason"] == f"{signal.Signals(number).name} received"
    assert 2 <= result["step"] < 60
    kinds = [event["type"] for event in events(folder)]
    assert kinds.index("stop") < len(kinds) - 1 - kinds[::-1].index("save")  # it is said before the save, not after
    assert kinds[-1] == "end"
    files.verify_directory(folder / "checkpoints" / f"step-{result['step']:09d}")
    more = detour("run", job, "--set", f"train.steps={result['step'] + 1}")
    assert more.code == 0
    assert f"goes on at step {result['step']} " in more.err


def test_the_last_line_of_a_stopped_run_says_how_to_go_on(tmp_path, write_job):
    job, folder = write_job(tmp_path, NAME, train={"steps": 60}), tmp_path / "output" / NAME
    with interrupted(folder / "events.jsonl", 1, signal.SIGINT):
        stopped = detour("run", job)
    assert stopped.code == 130
    assert "saved at step" in stopped.out
    assert f"in {folder}; the same command goes on from there" in stopped.out


def test_a_signal_while_nothing_is_trained_yet_stops_at_once(tmp_path, write_job, monkeypatch):
    job = write_job(tmp_path, NAME)

    def prepare(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        pytest.fail("the signal was not obeyed")

    monkeypatch.setattr("detour.train.build.prepare_captions", prepare)
    stopped = detour("run", job)
    assert stopped.code == 130
    assert "stopped at once" in stopped.err
    assert "Traceback" not in stopped.err


def test_two_runs_in_one_folder_are_refused(tmp_path, write_job):
    from filelock import FileLock

    job, folder = write_job(tmp_path, NAME), tmp_path / "output" / NAME
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        ran = detour("run", job)
    assert ran.code == 2
    assert f"{folder}: another run is writing there" in ran.err
    assert tree(folder) == [".lock"]


# --- a program of its own ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_as_a_program_nothing_but_its_own_lines_is_seen(tmp_path, write_job):
    """Libraries say much while they are imported; none of it may reach the user. Names are odd on purpose."""
    home = tmp_path / "my jobs: ünsere"
    job = write_job(home, NAME, sample={"disable_sampling": False, "prompts": ["a zig"]})
    ran = program("run", job, cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert ran.returncode == 0
    assert ran.stdout == f"finished at step 2: {home / 'output' / NAME / NAME}.safetensors\n"
    own = ("pictures  ", "captions  ", "latents  ", "model  ", f"{NAME} (zimage)", "step ", "ended at step 2 after ")
    strange = [line for line in ran.stderr.splitlines() if not line.startswith(own)]
    assert strange == []
    assert tree(tmp_path) == [f"my jobs: ünsere/{name}" for name in tree(home)]  # nothing was left where it was started


def test_a_reader_that_has_seen_enough_is_no_failure():
    ran = subprocess.run(f"{PROGRAM} schema | head -1", check=False, shell=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("{\n", "")
