import errno
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from detour import UserError, events, files
from faults import disk_full, fork, kill_after, wait

ALL = [
    events.StartEvent(step=0, total_steps=10, name="n", arch="zimage", resumed_from=None),
    events.StageEvent(name="latents", done=1, total=3),
    events.StepEvent(
        step=1,
        epoch=0,
        loss=0.1,
        lr=1e-4,
        grad_norm=0.3,
        seconds=1.5,
        seconds_outside=0.1,
        memory_bytes=7,
        pictures=["ü"],
        picture_losses=[(0.25, 0.1), (1.0, math.nan)],
    ),
    events.SampleEvent(step=1, index=0, path="a.png", prompt="a cat", seed=42),
    events.SaveEvent(step=1, checkpoint="c", lora=None),
    events.ValidationEvent(step=1, loss=0.2, by_time={"0.25": 0.1}),
    events.WarningEvent(step=None, message="m", details=["d"]),
    events.StopEvent(step=1, reason="Ctrl-C"),
    events.EndEvent(step=1, reason="done", seconds=2.5),
]


def read(path):
    return list(events.read_events(path))


def test_every_event_becomes_one_json_line_with_type_and_time(tmp_path):
    sink = events.JsonlSink(tmp_path / "run" / "events.jsonl")
    before = time.time()
    for event in ALL:
        sink.emit(event)
        assert read(tmp_path / "run" / "events.jsonl")[-1]["type"] == event.type  # flushed at once
    sink.close()
    sink.close()
    records = read(tmp_path / "run" / "events.jsonl")
    assert [record["type"] for record in records] == [
        "start", "stage", "step", "sample", "save", "validation", "warning", "stop", "end",
    ]  # fmt: skip
    assert all(before <= record["time"] <= time.time() for record in records)
    step = {key: value for key, value in records[2].items() if key != "time"}
    assert step == {
        "type": "step", "step": 1, "epoch": 0, "loss": 0.1, "lr": 1e-4, "grad_norm": 0.3, "seconds": 1.5,
        "seconds_outside": 0.1, "memory_bytes": 7, "pictures": ["ü"], "picture_losses": [[0.25, 0.1], [1.0, None]],
    }  # fmt: skip


def test_figures_that_are_not_finite_become_null_so_that_every_json_reader_takes_the_line():
    event = events.ValidationEvent(step=1, loss=float("nan"), by_time={"0.5": float("inf"), "1.0": 0.5})
    record = events.to_record(event, 1.0)
    assert record["loss"] is None
    assert record["by_time"] == {"0.5": None, "1.0": 0.5}
    assert json.loads(events.to_line(record), parse_constant=pytest.fail) == record


def test_text_that_is_not_unicode_is_kept():
    name = os.fsdecode(b"\xff.png")
    record = events.to_record(events.SampleEvent(step=1, index=0, path=name, prompt="", seed=1), 1.0)
    assert json.loads(events.to_line(record))["path"] == name


def test_an_earlier_file_is_continued(tmp_path):
    for step in (1, 2):
        sink = events.JsonlSink(tmp_path / "e.jsonl")
        sink.emit(events.StopEvent(step=step, reason=""))
        sink.close()
    assert [record["step"] for record in read(tmp_path / "e.jsonl")] == [1, 2]


@pytest.mark.parametrize("junk", [b"", b"\0\0\0", b"\xff\xfe", b"[1]", b'{"type": 3}'])
def test_a_line_torn_anywhere_is_left_out_by_the_reader_and_mended_by_the_writer(tmp_path, junk):
    path = tmp_path / "e.jsonl"
    whole = events.to_line(events.to_record(ALL[0], 1.0))
    last = events.to_line(events.to_record(ALL[2], 2.0))
    for cut in range(len(last) + 1) if not junk else [0]:
        path.write_bytes(whole + last[:cut] + junk)
        expected = ["start", "step"] if cut >= len(last) - 1 else ["start"]
        assert [record["type"] for record in read(path)] == expected
        sink = events.JsonlSink(path)
        sink.emit(ALL[-1])
        sink.close()
        assert [record["type"] for record in read(path)] == [*expected, "end"]
        assert path.read_bytes().count(b"\n") == len(expected) + 1


def test_a_very_long_torn_line_is_mended(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(events.to_line(events.to_record(ALL[0], 1.0)) + b'{"type": "' + b"x" * 200_000)
    events.JsonlSink(path).close()
    assert path.read_bytes() == events.to_line(events.to_record(ALL[0], 1.0))
    path.write_bytes(b"x" * 200_000)
    events.JsonlSink(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("broken", [b"{\n", b"\n", b"[]\n", b'{"step": 1}\n', b"\xff\n"])
def test_a_broken_line_elsewhere_is_an_error_with_its_number(tmp_path, broken):
    path = tmp_path / "e.jsonl"
    whole = events.to_line(events.to_record(ALL[0], 1.0))
    path.write_bytes(whole + broken + whole)
    reader = events.read_events(path)
    assert next(reader)["type"] == "start"
    with pytest.raises(UserError, match="line 2"):
        next(reader)
    path.write_bytes(whole + broken)  # a line that has its end was not torn
    with pytest.raises(UserError, match="line 2"):
        read(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "nothing.jsonl")


def test_killed_while_writing_every_line_but_the_last_is_whole(tmp_path):
    path = tmp_path / "e.jsonl"
    rng = random.Random(0)

    def child() -> None:
        sink = events.JsonlSink(path)
        step = sum(1 for _ in events.read_events(path))
        while True:
            sink.emit(events.WarningEvent(step=step, message="x" * rng.randrange(20_000)))
            step += 1

    for number in range(20):
        started = fork(child)
        while not path.exists() or path.stat().st_size < 100_000 * number:  # a busy machine gives it no turn at first
            time.sleep(0.001)
        kill_after(started, rng.uniform(0.005, 0.03))
    steps = [record["step"] for record in read(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 100


def test_a_full_disk_does_not_end_the_run_and_is_told_when_there_is_room(tmp_path, monkeypatch):
    path = tmp_path / "e.jsonl"
    told = []
    sink = events.JsonlSink(path, told.append)
    sink.emit(ALL[0])
    real = files._write

    def half(fd, data):
        if len(data) > 30:
            return real(fd, data[:30])
        return disk_full(errno.ENOSPC)()

    monkeypatch.setattr(files, "_write", half)
    for event in ALL[:3]:
        sink.emit(event)
    assert path.read_bytes().endswith(b"}\n")
    assert len(told) == 1
    assert "disk is full" in told[0]
    monkeypatch.setattr(files, "_write", real)
    sink.emit(ALL[3])
    sink.emit(ALL[4])
    sink.close()
    records = read(path)
    assert [record["type"] for record in records] == ["start", "warning", "sample", "save"]
    assert records[1]["message"].startswith("3 events are missing here")


def test_a_real_file_size_limit_does_not_end_the_run(tmp_path):
    path = tmp_path / "e.jsonl"

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        sink = events.JsonlSink(path)
        for _ in range(100):
            sink.emit(ALL[2])

    assert wait(fork(child)) == 0
    assert 500 < path.stat().st_size <= 1000
    assert path.read_bytes().endswith(b"}\n")
    assert {record["type"] for record in read(path)} == {"step"}


def test_other_failures_are_errors(tmp_path, monkeypatch):
    sink = events.JsonlSink(tmp_path / "e.jsonl")
    monkeypatch.setattr(files, "_write", lambda fd, data: disk_full(errno.EIO)())
    with pytest.raises(UserError, match="system log"):
        sink.emit(ALL[0])
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="directory"):
        events.JsonlSink(tmp_path / "folder")


class Recorder:
    def __init__(self, fails=False):
        self.events, self.closed, self.fails = [], 0, fails

    def emit(self, event):
        self.events.append(event)
        if self.fails:
            raise RuntimeError("emit")

    def close(self):
        self.closed += 1
        if self.fails:
            raise RuntimeError("close")


def test_tee_gives_each_event_to_each_sink_even_if_one_fails():
    sinks = [Recorder(), Recorder(fails=True), Recorder()]
    tee = events.Tee(*sinks)
    with pytest.raises(RuntimeError, match="emit"):
        tee.emit(ALL[0])
    with pytest.raises(RuntimeError, match="close"):
        tee.close()
    assert [sink.events for sink in sinks] == [[ALL[0]]] * 3
    assert [sink.closed for sink in sinks] == [1] * 3


def test_events_and_files_import_without_torch():
    code = "import sys, detour.events, detour.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_killing_works_as_these_tests_think():
    assert wait(fork(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
