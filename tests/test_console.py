import io
import json
import math
import re
import subprocess
import sys

import pytest

from detour import console
from detour.console import console_sink, duration
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


def step(number: int, loss: float = 0.5, seconds: float = 1.5, memory: int = 13 << 30) -> StepEvent:
    return StepEvent(
        step=number, epoch=0, loss=loss, lr=1e-4, grad_norm=1, seconds=seconds, seconds_outside=0.5, memory_bytes=memory
    )


START = StartEvent(step=0, total_steps=100, name="mine", arch="zimage", resumed_from=None)
WARNING = WarningEvent(step=7, message="bad [red]thing[/red]", details=["a.png"])
END = EndEvent(step=100, reason="all steps done", seconds=3725.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(events: list, **options) -> list[str]:
    """Lines for events that come one second apart."""
    stream, clock = io.StringIO(), Clock()
    sink = console.PlainSink(stream, clock=clock, **options)
    for event in events:
        clock.now += 1.0
        sink.emit(event)
    sink.close()
    return stream.getvalue().splitlines()


# Plain lines


def test_a_log_has_the_first_and_the_last_step_and_one_in_ten_seconds_between():
    lines = plain([START, *(step(number) for number in range(1, 101)), END])
    assert lines[0] == "mine (zimage) starts: 100 steps in all"
    assert [int(line.split()[1].split("/")[0]) for line in lines[1:-1]] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[1] == "step 1/100  loss 0.5000  1.50 s/step  left 3 min 18 s  13.0 GiB  lr 1.0e-04"
    assert lines[-2] == "step 100/100  loss 0.5000  1.50 s/step  13.0 GiB  lr 1.0e-04"
    assert lines[-1] == "ended at step 100 after 1 h 02 min: all steps done"
    assert len(plain([START, *(step(number) for number in range(1, 101)), END], every_seconds=50)) == 5


def test_the_last_step_is_shown_also_when_the_run_stops_early_or_breaks_off():
    lines = plain([START, *(step(number) for number in range(1, 6)), StopEvent(step=5, reason="Ctrl-C")])
    assert [line.split()[1] for line in lines[1:3]] == ["1/100", "5/100"]
    assert lines[3] == "step 5: stopping (Ctrl-C); saving first"
    assert plain([START, step(1), step(2)])[-1].startswith("step 2/100")


def test_stages_are_thinned_like_steps():
    first = [StageEvent(name="latents", done=done, total=30, note="2 kept") for done in range(1, 31)]
    second = [StageEvent(name="captions", done=done, total=2) for done in (1, 2)]
    lines = plain([*first, *second, START, step(1)])
    assert lines[:4] == [f"latents  {done}/30  2 kept" for done in (1, 11, 21, 30)]
    assert lines[4:6] == ["captions  1/2", "captions  2/2"]
    assert lines[-1].startswith("step 1/100")


def test_every_other_event_has_its_line_at_once():
    events = [
        StartEvent(step=50, total_steps=100, name="mine", arch="flux", resumed_from="checkpoints/step-000000050"),
        SampleEvent(step=60, index=1, path="samples/000000060-01.png", prompt="a cat", seed=1),
        SaveEvent(step=60, checkpoint="checkpoints/step-000000060", lora="mine-000000060.safetensors"),
        SaveEvent(step=70, checkpoint="checkpoints/step-000000070", lora=None),
        ValidationEvent(step=70, loss=0.25, by_time={"0.25": 0.125, "1.0": 0.5}),
        ValidationEvent(step=70, loss=0.25, by_time={}),
        WARNING,
        WarningEvent(step=None, message="m"),
    ]
    assert plain(events) == [
        "mine (flux) goes on at step 50 from checkpoints/step-000000050: 100 steps in all",
        "step 60: preview samples/000000060-01.png",
        "step 60: saved checkpoints/step-000000060 and mine-000000060.safetensors",
        "step 70: saved checkpoints/step-000000070",
        "step 70: validation loss 0.2500 (0.1250 at 0.25, 0.5000 at 1.0)",
        "step 70: validation loss 0.2500",
        "step 7: warning: bad [red]thing[/red]",
        "  a.png",
        "warning: m",
    ]


def test_quiet_shows_warnings_stops_and_the_end_only():
    events = [START, StageEvent(name="latents", done=1, total=1), step(1), WARNING, StopEvent(step=1, reason="r"), END]
    assert [line.split()[0] for line in plain(events, quiet=True)] == ["step", "a.png", "step", "ended"]
    stream = Terminal()
    sink = console_sink(stream, quiet=True)
    for event in events:
        sink.emit(event)
    assert "\x1b" not in stream.getvalue()


def test_each_line_is_written_out_at_once():
    class Stream(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    stream = Stream()
    console_sink(stream).emit(START)
    assert stream.flushed == 1


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"\xfc\udcff.png"), ("utf-8", r"ü\udcff.png")])
def test_a_name_that_cannot_be_written_does_not_end_the_run(monkeypatch, live, encoding, shown):
    monkeypatch.setenv("TERM", "xterm")
    raw = io.BytesIO()
    sink = console_sink(io.TextIOWrapper(raw, encoding=encoding), terminal=live)
    sink.emit(WarningEvent(step=1, message="m", details=["ü\udcff.png"]))
    sink.close()
    assert shown in raw.getvalue().decode(encoding)


# Figures


def test_loss_and_speed_are_means_and_what_is_not_finite_is_left_out():
    meter = console.Meter(START)
    meter.take(step(1, loss=1.0, seconds=1.0))
    assert "loss 1.0000  1.00 s/step" in meter.text()
    for number in range(2, 40):
        meter.take(step(number, loss=math.nan if number % 2 else 0.5, seconds=0.1))
    loss = float(re.search(r"loss (\S+)", meter.text()).group(1))
    assert 0.5 < loss < 0.6
    assert re.search(r" [89]\.\d steps/s", meter.text())
    assert console.Meter().text() == ""


def test_time_left_counts_what_happens_between_steps():
    meter = console.Meter(START)
    meter.take(step(50, seconds=1.5))  # and 0.5 outside
    assert "left 1 min 40 s" in meter.text()


def test_a_run_of_unknown_length_has_no_time_left_and_a_processor_no_memory():
    meter = console.Meter()
    meter.take(step(3, memory=0))
    assert meter.text() == "3  loss 0.5000  1.50 s/step  lr 1.0e-04"
    meter = console.Meter()
    meter.take(step(1, loss=math.nan))
    assert "loss nan" in meter.text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (3725, "1 h 02 min"),
     (90000, "1 d 01 h"), (-1, "0 s"), (math.nan, "?"), (math.inf, "?")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


# JSON lines and the choice of a sink


def test_json_lines_are_events_and_never_go_to_standard_output(capsys):
    stream = io.StringIO()
    sink = console_sink(stream, json_lines=True)
    for event in (START, step(1, loss=math.nan), END):
        sink.emit(event)
    sink.close()
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["type"] for record in records] == ["start", "step", "end"]
    assert records[1]["loss"] is None
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="standard error"):
        console_sink(sys.stdout, json_lines=True)


def test_the_stream_decides_between_bar_and_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(console_sink(Terminal()), console.BarSink)
    assert isinstance(console_sink(io.StringIO()), console.PlainSink)
    assert isinstance(console_sink(Terminal(), terminal=False), console.PlainSink)
    assert isinstance(console_sink(io.StringIO(), terminal=True), console.BarSink)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console_sink(Terminal()), console.PlainSink)


# The bar


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def draw(events: list) -> str:
    stream = io.StringIO()
    sink = console_sink(stream, terminal=True)
    for event in events:
        sink.emit(event)
    sink.close()
    return stream.getvalue()


def screen(drawn: str) -> list[str]:
    """What a terminal shows in the end: carriage return and 'erase line' are all that a one-line bar uses."""
    drawn = re.sub(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]", "", drawn)
    lines = [""]
    for part in re.split(r"(\n|\r|\x1b\[2K|\x1b\[1A)", drawn):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[2K":
            lines[-1] = ""
        elif part not in ("\r", ""):
            assert "\x1b" not in part, part
            lines[-1] = part + lines[-1][len(part) :]
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_shows_news_above_and_one_bar_below(terminal):
    stages = [StageEvent(name="latents", done=done, total=3) for done in (1, 2, 3)]
    drawn = draw([START, *stages, *(step(number) for number in range(1, 101)), WARNING, END])
    shown = screen(drawn)
    assert shown[:5] == [
        "mine (zimage) starts: 100 steps in all", "latents  3/3", "step 7: warning: bad [red]thing[/red]", "  a.png",
        "ended at step 100 after 1 h 02 min: all steps done",
    ]  # fmt: skip
    assert len(shown) == 6
    assert re.fullmatch(r"step ━{10} 100/100  loss 0\.5000  1\.50 s/step  13\.0 GiB  lr 1\.0e-04", shown[5])
    assert "\x1b[33mstep 7: warning: bad [red]thing[/red]\x1b[0m" in drawn
    assert "\x1b[33mstep \x1b" not in drawn  # the bar keeps its colours
    assert drawn.endswith("\x1b[?25h")  # the cursor is back


def test_the_bar_of_a_run_in_progress_fits_80_columns_with_all_but_the_rate(terminal):
    drawn = draw([START, *(step(number, seconds=4000) for number in range(1, 20))])
    last = screen(drawn)[-1]
    assert len(last) <= 80
    assert re.search(r"step ━+╸? *━* ?19/100  loss 0\.5000  4000\.00 s/step  left 3 d 18 h", last.replace("╺", "━"))


def test_stages_have_their_own_bar_and_leave_a_line(terminal):
    drawn = draw([StageEvent(name="latents", done=1, total=4, note="1 kept")])
    assert re.fullmatch(r"latents ━+[╸╺]?━* 1/4  1 kept", screen(drawn)[-1])


def test_importing_it_does_not_import_rich_or_torch():
    code = "import sys, detour.console; sys.exit(len({'rich', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
