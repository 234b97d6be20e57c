import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest
from PIL import Image

from detour import UserError, trackers
from detour.config.job import LoggingConfig
from detour.events import (
    EndEvent,
    SampleEvent,
    SaveEvent,
    StageEvent,
    StartEvent,
    StepEvent,
    StopEvent,
    ValidationEvent,
    WarningEvent,
)  # fmt: skip


def step(number: int, loss: float = 0.5) -> StepEvent:
    return StepEvent(
        step=number, epoch=1, loss=loss, lr=1e-4, grad_norm=0.3, seconds=1.5, seconds_outside=0.1, memory_bytes=2**30
    )


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = numpy.arange(16 * 8 * 3, dtype=numpy.uint8).reshape(8, 16, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def events_of_a_run(picture: str) -> list:
    return [
        StartEvent(step=0, total_steps=3, name="n", arch="zimage", resumed_from=None),
        StageEvent(name="latents", done=1, total=1),
        step(1, 0.5),
        step(2, 0.25),
        SampleEvent(step=2, index=0, path=picture, prompt="a cat", seed=42),
        ValidationEvent(step=2, loss=0.75, by_time={"0.25": 0.5, "1.0": 1.0}),
        WarningEvent(step=2, message="m"),
        SaveEvent(step=2, checkpoint="c", lora=None),
        step(3, float("nan")),
        StopEvent(step=3, reason="r"),
        EndEvent(step=3, reason="done", seconds=1.0),
    ]


def emit_all(sink, events) -> None:
    for event in events:
        sink.emit(event)
    sink.close()


# TensorBoard


def read_back(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_holds_every_figure_and_picture(tmp_path, picture):
    emit_all(trackers.TensorBoardSink(tmp_path / "tb"), events_of_a_run(picture))
    found = read_back(tmp_path / "tb")
    losses = [(item.step, item.value) for item in found.Scalars("train/loss")]
    assert losses[:2] == [(1, 0.5), (2, 0.25)]
    assert losses[2][0] == 3
    assert losses[2][1] != losses[2][1]
    assert found.Scalars("train/lr")[0].value == pytest.approx(1e-4)
    assert found.Scalars("memory/gib")[0].value == 1.0
    assert found.Scalars("time/step_seconds")[0].value == 1.5
    assert [(item.step, item.value) for item in found.Scalars("validation/loss")] == [(2, 0.75)]
    assert [(item.step, item.value) for item in found.Scalars("validation/loss_at_0.25")] == [(2, 0.5)]
    (image,) = found.Images("sample/00")
    assert (image.step, image.width, image.height) == (2, 16, 8)
    (tmp_path / "back.png").write_bytes(image.encoded_image_string)
    back, given = Image.open(tmp_path / "back.png"), Image.open(picture)
    assert numpy.array_equal(numpy.asarray(back.convert("RGB")), numpy.asarray(given))
    assert found.Tensors("sample/00/prompt/text_summary")[0].tensor_proto.string_val == [b"a cat"]


def test_tensorboard_hides_what_was_logged_after_the_checkpoint(tmp_path):
    sink = trackers.TensorBoardSink(tmp_path)
    emit_all(sink, [step(number, 0.5) for number in range(1, 6)])
    resumed = StartEvent(step=3, total_steps=9, name="n", arch="zimage", resumed_from="step-000000003")
    emit_all(trackers.TensorBoardSink(tmp_path), [resumed, step(4, 0.125), step(5, 0.125), step(6, 0.125)])
    found = [(item.step, item.value) for item in read_back(tmp_path).Scalars("train/loss")]
    assert found == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.125), (5, 0.125), (6, 0.125)]


def test_tensorboard_writes_nothing_before_there_is_something(tmp_path):
    sink = trackers.TensorBoardSink(tmp_path / "tb")
    sink.close()
    assert not (tmp_path / "tb").exists()


# trackio: in a process of its own, since it reads its folder when it is imported

TRACKIO = """
import sys
from pathlib import Path
seen = []
quiet = {"socket.gethostname", "socket.__new__"}
loud = lambda name: name.startswith("socket.") and name not in quiet
sys.addaudithook(lambda name, args: seen.append((name, args)) if loud(name) else None)
sys.path.insert(0, sys.argv[2])
from test_trackers import emit_all, events_of_a_run, step
from detour.trackers import TrackioSink
from detour import UserError
from detour.events import StartEvent
folder = Path(sys.argv[1])
emit_all(TrackioSink("my project", "my run", folder / "logs"), events_of_a_run(sys.argv[3]))
emit_all(TrackioSink("my project", "my run", folder / "logs"), [step(4, 0.125)])
assert not seen, seen
try:
    TrackioSink("my project", "my run", folder / "elsewhere")
except UserError as error:
    assert "already writes" in str(error)
else:
    raise AssertionError
"""


def test_trackio_logs_into_its_local_database_without_network_or_output(tmp_path, picture):
    environment = os.environ | {"HF_TOKEN": "hf_notatoken", "HF_HUB_OFFLINE": "0", "HOME": str(tmp_path)}
    arguments = [str(tmp_path), str(Path(__file__).parent), picture]
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    (database,) = (tmp_path / "logs").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {row[0] for row in rows} == {"my run"}
    merged: dict[int, dict] = {}
    for _, number, metrics in rows:
        merged.setdefault(number, {}).update(json.loads(metrics))
    assert [merged[number]["train/loss"] for number in (1, 2, 4)] == [0.5, 0.25, 0.125]
    assert merged[2]["validation/loss"] == 0.75
    assert merged[2]["sample/00"]["caption"] == "a cat"
    assert len(list((tmp_path / "logs" / "media").rglob("*.png"))) == 1


# Weights & Biases: a stand-in, since the package wants an account


class FakeRun:
    def __init__(self, module):
        self.module = module

    def define_metric(self, *args, **kwargs):
        self.module.calls.append(("define_metric", args, kwargs))

    def log(self, record):
        if self.module.fails:
            raise self.module.Error("gone")
        self.module.calls.append(("log", record))

    def finish(self):
        self.module.calls.append(("finish",))


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.calls, module.fails = [], False
    module.Error = type("Error", (Exception,), {})
    module.Image = lambda path, caption: ("image", path, caption)

    def init(**kwargs):
        print("noise on standard output")
        if kwargs["project"] == "refused":
            raise module.Error("no api key")
        module.calls.append(("init", kwargs))
        return FakeRun(module)

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_figure_and_picture_with_our_own_step(tmp_path, picture, wandb, capsys):
    emit_all(trackers.WandbSink("p", "r", tmp_path), events_of_a_run(picture))
    name, options = wandb.calls[0]
    assert name == "init"
    identity = options["id"]
    assert options == {"id": identity, "project": "p", "name": "r", "dir": str(tmp_path), "resume": "allow"}
    assert wandb.calls[1:3] == [("define_metric", ("step",), {}), ("define_metric", ("*",), {"step_metric": "step"})]
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert [record["step"] for record in logged] == [1, 2, 2, 2, 3]
    assert logged[0]["train/loss"] == 0.5
    assert logged[2] == {"sample/00": ("image", picture, "a cat"), "step": 2}
    assert logged[3] == {
        "validation/loss": 0.75,
        "validation/loss_at_0.25": 0.5,
        "validation/loss_at_1.0": 1.0,
        "step": 2,
    }
    assert wandb.calls[-1] == ("finish",)
    assert capsys.readouterr().out == ""
    trackers.WandbSink("p", "r", tmp_path)
    trackers.WandbSink("p", "other", tmp_path)
    again, other = [call[1]["id"] for call in wandb.calls if call[0] == "init"][1:]
    assert identity == again != other  # a resumed run goes on in the same one


def test_wandb_that_does_not_start_is_an_error_with_advice(tmp_path, wandb):
    with pytest.raises(UserError, match=r"no api key.*wandb login"):
        trackers.WandbSink("refused", "r", tmp_path)


# All of them


@pytest.mark.parametrize(
    ("extra", "module", "make"),
    [
        ("tensorboard", "torch.utils.tensorboard", lambda: trackers.TensorBoardSink(Path("x"))),
        ("trackio", "trackio", lambda: trackers.TrackioSink("p", "r")),
        ("wandb", "wandb", lambda: trackers.WandbSink("p", "r", Path("x"))),
    ],
)
def test_a_missing_package_is_named_with_the_command(monkeypatch, extra, module, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'pip install "detour\[{extra}\]"'):
        make()


def test_open_trackers_opens_what_the_job_asks_for(tmp_path, wandb):
    told = []
    assert trackers.open_trackers(LoggingConfig(), tmp_path, "run", told.append) == []
    config = LoggingConfig(tensorboard=True, wandb=True, project_name="p")
    sinks = trackers.open_trackers(config, tmp_path, "run", told.append)
    for sink in sinks:
        sink.emit(step(1))
        sink.close()
    assert wandb.calls[0][1]["name"] == "run"
    assert read_back(tmp_path / "tensorboard").Scalars("train/loss")[0].value == 0.5
    named = trackers.open_trackers(LoggingConfig(wandb=True, run_name="named"), tmp_path, "run", told.append)
    assert len(named) == 1
    assert wandb.calls[-3][1]["name"] == "named"
    assert told == []


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path, wandb):
    told = []
    (sink,) = trackers.open_trackers(LoggingConfig(wandb=True), tmp_path, "run", told.append)
    sink.emit(step(1))
    wandb.fails = True
    sink.emit(step(2))
    wandb.fails = False
    sink.emit(step(3))
    sink.close()
    assert [call[1]["step"] for call in wandb.calls if call[0] == "log"] == [1]
    assert len(told) == 1
    assert "Weights & Biases failed and is left out from here on (RuntimeError: gone)" in told[0]


def test_a_preview_that_is_gone_does_not_end_the_run(tmp_path):
    told = []
    (sink,) = trackers.open_trackers(LoggingConfig(tensorboard=True), tmp_path, "run", told.append)
    sink.emit(SampleEvent(step=1, index=0, path=str(tmp_path / "nothing.png"), prompt="", seed=1))
    sink.emit(step(2))
    sink.close()
    assert len(told) == 1


def test_trackers_import_neither_torch_nor_any_tracker():
    heavy = "{'torch', 'tensorboard', 'trackio', 'wandb', 'numpy', 'huggingface_hub'}"
    code = f"import sys, detour.trackers; found = {heavy} & sys.modules.keys(); sys.exit(str(found) if found else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
