"""`report.html`: what it tells is what the events say, it stands alone, and the same run gives the same bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runs_made
from command import detour, well
from detour import UserError
from detour.report import page, pictures
from detour.report.charts import BINS, MEMORY, Curve, Value, smooth, thin, ticks
from detour.report.history import read_history

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028{{ 7*7 }} & 'q' \"d\""
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser finds in a report: elements with their attributes, and the text inside each kind."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """What is to be read."""
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    @property
    def data(self) -> dict[str, Any]:
        """The figures in the page."""
        scripts = [text for tag, text in self.texts if tag == "script"]
        found: dict[str, Any] = json.loads(scripts[0])
        return found

    def curve(self, chart: str, name: str | None = None) -> list[tuple[int, Value]]:
        """The points of a curve, the first of its chart if no name is given."""
        curves = next(entry["curves"] for entry in self.data["charts"] if entry["key"] == chart)
        curve = next(entry for entry in curves if name in (None, entry["name"]))
        return list(zip(curve["steps"], curve["values"], strict=True))


def report(run: runs_made.Made) -> Page:
    return Page(page.render(run.folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs_made.whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def shown(whole):
    return report(whole)


# --- what it tells --------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_steps_that_count(whole, shown):
    """Steps 6 and 7 were done twice, since the run was killed and went on from 5: the second time counts."""
    steps: dict[int, dict[str, Any]] = {}
    for event in whole.events:
        if event["type"] == "start":
            steps = {step: record for step, record in steps.items() if step <= event["step"]}
        elif event["type"] == "step":
            steps[event["step"]] = event
    assert list(steps) == list(range(1, 11))
    assert 99.0 not in [record["loss"] for record in steps.values()]
    for chart, key, scale in (
        ("loss", "loss", 1), ("lr", "lr", 1), ("grad_norm", "grad_norm", 1), ("seconds", "seconds", 1),
        ("memory", "memory_bytes", 2**30),
    ):  # fmt: skip
        assert shown.curve(chart) == [(step, record[key] / scale) for step, record in steps.items()]
    assert shown.curve("drift") == [(0, 0.0), (5, 0.3), (10, 0.6)]
    assert shown.curve("validation", "mean") == [(0, 0.9), (10, 0.4)]
    assert shown.curve("validation", "at t = 0.5") == [(0, 0.45), (10, 0.2)]
    assert (shown.data["step"], shown.data["total_steps"], shown.data["name"]) == (10, 10, "zig")


def test_the_mean_of_the_loss_is_that_of_the_terminal(shown):
    from detour.console import _Mean

    mean, expected = _Mean(MEMORY), []
    for _, loss in shown.curve("loss", "each step"):
        mean.add(loss)
        expected.append(mean.value)
    assert [value for _, value in shown.curve("loss", "mean of about 50 steps")] == pytest.approx(expected, rel=1e-12)


def test_the_summary(shown, whole):
    entries = [(tag, text) for tag, text in shown.texts if tag in ("dt", "dd", "code") and text.strip()]
    facts = {text: entries[place + 1][1] for place, (tag, text) in enumerate(entries) if tag == "dt"}
    assert facts["Architecture"] == "Z-Image turbo"
    assert facts["Steps"] == "10 of 10"
    assert facts["Trained"] == "LoRA, rank 4, alpha 4"
    assert facts["Training adapter"].endswith("adapter.safetensors (factored)")
    assert facts["Dataset"].startswith("7 pictures in ")
    assert facts["Peak memory"] == "8.0 GiB"
    assert facts["Speed"] == "2.10 s/step (median); 2.60 s/step with data, saving and previews"
    killed = [event["time"] for event in whole.events[: [e["type"] for e in whole.events].index("stage", 3)]]
    assert facts["Time"] == f"1 min {killed[-1] - killed[0]:02.0f} s in 2 sessions"  # the other one took 60 s


def test_how_it_ended_and_the_timeline(shown):
    assert "finished at step 10" in shown.text
    assert "2026-01-01 00:00:01 UTC started" in shown.text
    assert "broke off after step 7" in shown.text
    assert "went on from step 5; 2 steps done again" in shown.text


def test_warnings_settings_hashes_and_versions(shown, whole):
    assert "Z-Image turbo is trained on the CPU" in shown.text
    assert "torch was 1 and is now 2" in shown.text
    rows = [text for tag, text in shown.texts if tag == "code"]
    assert rows[rows.index("train.lr") :][:3] == ["train.lr", "0.0002", "0.0001"]
    assert rows[rows.index("network.linear") :][:3] == ["network.linear", "4", "32"]
    assert rows[rows.index("preserve.drift.alarm") :][:3] == ["preserve.drift.alarm", "0.5", "null"]
    assert "train.optimizer" not in rows  # as it is without being given
    assert "train.timestep_type" not in rows  # the architecture's own
    job = (whole.folder / "job.yaml").read_text(encoding="utf-8")
    assert next(text for tag, text in shown.texts if tag == "pre") == job
    lora = hashlib.sha256((whole.folder / "zig.safetensors").read_bytes()).hexdigest()
    hashes = ["a" * 64, "b" * 64, "c" * 64, "d" * 64, lora, hashlib.sha256(job.encode()).hexdigest()]
    for digest in hashes:
        assert digest in rows
    assert "the job was changed since" in shown.text  # the header of this LoRA names another job
    assert "torch 2.13" in shown.text


def test_the_teacher_gate_is_shown_with_its_drawings(tmp_path, shown):
    assert "Teacher gate" not in shown.text
    run = runs_made.made(tmp_path)
    run.start()
    run.gate([EVIL])
    found = report(run)
    for part in ("Teacher gate", "not passed", EVIL, "+12.3% of the distance", "red +0.01, green -0.02, blue +0.00"):
        assert " ".join(part.split()) in found.text
    (picture,) = found.all("img")[:-1]
    assert picture["src"].startswith("data:image/jpeg;base64,")
    assert (picture["width"], picture["height"]) == ("512", "186")
    (run.folder / "samples" / "teacher-gate.png").unlink()
    assert "the file is gone" in report(run).text


def test_without_steps_everything_else_is_read(whole, tmp_path):
    """And quickly: lines of steps are not looked into."""
    path, other = whole.folder / "events.jsonl", tmp_path / "events.jsonl"
    full, outline = read_history(path), read_history(path, steps=False)
    assert (outline.steps, len(full.steps)) == ([], 10)
    for name in ("samples", "saves", "validations", "drifts", "warnings", "facts", "last_step"):
        assert getattr(outline, name) == getattr(full, name), name
    other.write_bytes(path.read_bytes().replace(b'"epoch"', b"epoch") + b'{"type": "step", "torn": ')
    assert read_history(other, steps=False).samples == full.samples
    with pytest.raises(UserError, match="not an event"):
        read_history(other)


def test_the_drift_table_and_its_alarm(shown, whole):
    cells = [text.strip() for tag, text in shown.texts if tag == "td" and text.strip()]
    at = cells.index("0.6 alarm")
    assert cells[at - 1 : at + 5] == ["10", "0.6 alarm", "0.25 (0.2)", "0.4 (0.3)", "0.9", "0.01"]
    assert "alarm at 0.5" in shown.text
    assert len([line for line in shown.all("line") if line.get("class") == "level"]) == 1


def test_previews_are_a_table_of_prompts_and_steps(shown, whole):
    found = shown.all("img")[:-1]  # the last is the empty one to look at them larger
    assert [image["alt"] for image in found] == [
        f"step {step}: {prompt}" for prompt in ("a zig", "a red circle") for step in (0, 5, 10)
    ]
    for image, (step, index) in zip(found, [(s, i) for i in (0, 1) for s in (0, 5, 10)], strict=True):
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (64, 48) == (int(image["width"]), int(image["height"]))
            red, green, blue = picture.convert("RGB").getpixel((30, 20))
        assert abs(red - step) < 12
        assert abs(green - 40 * index) < 12
        assert abs(blue - 128) < 12


# --- it stands alone ------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_and_one_script_may_run(whole, shown):
    html = page.render(whole.folder)
    assert not re.search(r"(?:src|href|url|action)\s*[=(]\s*['\"]?\s*(?!data:|\{\{)(?:https?:|//|file:|/)", html)
    assert shown.all("link") == shown.all("iframe") == shown.all("a") == []
    assert all(image["src"].startswith("data:") for image in shown.all("img"))
    policy = next(meta["content"] for meta in shown.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    scripts = [text for tag, text in shown.texts if tag == "script"]
    assert [script.get("type") for script in shown.all("script")] == ["application/json", None]
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    assert any(meta.get("name") == "viewport" for meta in shown.all("meta"))
    assert "prefers-color-scheme: dark" in html


def test_what_the_user_wrote_is_text_everywhere(tmp_path):
    evils = {"sample": {"prompts": [EVIL], "neg": EVIL}, "train": {"cache_folder": EVIL}}
    run = runs_made.made(tmp_path, meta={"note": EVIL}, trigger_word=EVIL, **evils)
    run.start(name=EVIL)
    run.warn(EVIL, 1, [EVIL])
    run.sample(0, [EVIL])
    run.drift(0, 0.1, {EVIL: 0.1})
    run.steps(1, 3)
    run.end(3, EVIL)
    shown = report(run)
    assert [script.get("type") for script in shown.all("script")] == ["application/json", None]
    assert len(shown.all("img")) == 2
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    assert shown.data["name"] == EVIL  # as it was, in JSON that no tag can end
    evil = " ".join(EVIL.split())
    assert shown.text.count(evil) >= 7  # title, heading, state, warning, detail, prompt, drift, timeline
    assert shown.all("img")[0]["alt"] == f"step 0: {EVIL}"
    assert "49" not in shown.text.split(), "no template has worked out what was written"


# --- the same again -------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(whole, tmp_path, monkeypatch):
    first = page.write(whole.folder).read_bytes()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    assert page.write(whole.folder).read_bytes() == first
    moved = shutil.copytree(whole.folder, tmp_path / "moved")
    (moved / "report.html").unlink()
    assert page.write(moved, tmp_path / "out.html").read_bytes() == first
    assert not (moved / "report.html").exists()
    monkeypatch.undo()
    time.tzset()


# --- runs that did not go well --------------------------------------------------------------------------------------


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path):
    run = runs_made.made(tmp_path)
    run.start()
    run.steps(1, 4)
    log = run.folder / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-25])
    shown = report(run)
    assert [step for step, _ in shown.curve("loss")] == [1, 2, 3]
    assert "broke off after step 3: killed, failed (its log says why), or still running" in shown.text


def test_a_run_that_was_stopped_and_went_on_twice(tmp_path):
    run = runs_made.made(tmp_path)
    for first, last in ((1, 4), (5, 8), (9, 10)):
        run.start(first - 1)
        run.steps(first, last)
        run.end(last, "finished" if last == 10 else "SIGINT received", seconds=30)
    shown = report(run)
    assert [step for step, _ in shown.curve("loss")] == list(range(1, 11))
    assert shown.text.count("stopped at step") == 2
    assert shown.text.count("asked to stop: SIGINT received") == 2
    assert shown.text.count("went on from step") == 2
    assert "done again" not in shown.text
    assert "1 min 30 s in 3 sessions" in shown.text


def test_a_stopped_run_says_why(tmp_path):
    run = runs_made.made(tmp_path)
    run.start()
    run.steps(1, 4)
    run.end(4, "the drift is above its alarm")
    assert "stopped at step 4: the drift is above its alarm" in report(run).text


def test_a_finished_run_that_was_asked_to_run_again(whole, tmp_path):
    again = shutil.copytree(whole.folder, tmp_path / "zig")
    run = runs_made.Made(again, clock=whole.clock)
    run.warn("this run is finished; raise train.steps")
    run.end(10)
    shown = report(run)
    assert "in 2 sessions" in shown.text
    assert "finished at step 10" in shown.text


def test_what_is_not_finite_is_a_gap(tmp_path):
    run = runs_made.made(tmp_path)
    run.start()
    run.steps(1, 2)
    run.steps(3, 3, loss=float("nan"), grad_norm=float("nan"))
    run.steps(4, 5)
    run.end(5, "SIGTERM received")
    shown = report(run)
    assert [value is None for _, value in shown.curve("loss", "each step")] == [False, False, True, False, False]
    line = next(path["d"] for path in shown.all("path") if path["class"] == "n0 faint")
    assert line.count("M") == 2


def test_a_run_of_no_step(tmp_path):
    run = runs_made.made(tmp_path)
    run.start()
    run.end(0, "SIGINT received")
    assert "No step was done" in report(run).text


def test_errors_say_what_is_missing(tmp_path):
    run = runs_made.made(tmp_path)
    with pytest.raises(UserError, match=r"events\.jsonl does not exist; name the folder of a run"):
        page.render(run.folder)
    (run.folder / "events.jsonl").touch()
    with pytest.raises(UserError, match="nothing has run here yet"):
        page.render(run.folder)
    run.start()
    run.steps(1, 1)
    text = (run.folder / "job.yaml").read_bytes()
    (run.folder / "job.yaml").write_bytes(text.replace(b"train:", b"trian:"))
    with pytest.raises(UserError, match="trian"):
        page.render(run.folder)
    (run.folder / "job.yaml").unlink()
    with pytest.raises(UserError, match=r"job\.yaml does not exist"):
        page.render(run.folder)
    (run.folder / "job.yaml").write_bytes(text)
    with (run.folder / "events.jsonl").open("a") as log:
        log.write('{"type": "step", "time": 1.0, "step": "many"}\n')
    with pytest.raises(UserError, match=r"line 5: this 'step' event is not as Detour writes it .* remove that line"):
        page.render(run.folder)


def test_a_job_of_two_processes(tmp_path):
    """Each has a folder of its own, whose name says which one it is."""
    run = runs_made.made(tmp_path)
    job = run.folder / "job.yaml"
    text = job.read_text(encoding="utf-8")
    process = text[text.index("    - type") :].partition("\nmeta")[0]
    job.write_text(text.replace(process, f"{process}\n{process.replace('linear: 4', 'linear: 9')}"), encoding="utf-8")
    run.start()
    run.steps(1, 1)
    assert "LoRA, rank 4" in report(run).text
    second = run.folder.rename(run.folder.with_name("zig_2"))
    assert "LoRA, rank 9" in Page(page.render(second)).text
    renamed = second.rename(second.with_name("mine"))
    with pytest.raises(UserError, match="give it back the name zig or zig_2"):
        page.render(renamed)


# --- large runs -----------------------------------------------------------------------------------------------------


def test_ten_thousand_steps_take_less_than_a_second(tmp_path):
    """0.45 s of this process on a machine of 2026."""
    run = runs_made.made(tmp_path, train={"steps": 10_000})
    run.start(total=10_000)
    run.steps(1, 10_000)
    run.steps(10_001, 10_001, loss=77.0)
    run.end(10_001)
    taken = []
    for _ in range(3):  # the shortest: others share this machine
        before = time.process_time()
        html = page.render(run.folder)
        taken.append(time.process_time() - before)
    assert min(taken) < 1.0
    assert len(html) < 500_000
    points = Page(html).curve("loss")
    assert len(points) <= 2 * BINS + 2
    assert points[0][0] == 1
    assert points[-1] == (10_001, 77.0)
    true = {event["step"]: event["loss"] for event in run.events if event["type"] == "step"}
    assert all(true[step] == value for step, value in points)
    assert "The highest, 77 at step 10001, lies above the chart." in Page(html).text


def test_thinning_keeps_ends_spikes_and_gaps():
    values: list[Value] = [float(i % 7) for i in range(5000)]
    values[1234], values[4000] = 100.0, -100.0
    values[2000:2200] = [None] * 200
    kept = thin(Curve("x", list(range(5000)), values))
    points = dict(zip(kept.steps, kept.values, strict=True))
    assert kept.steps == sorted(kept.steps)
    assert {0, 1234, 4000, 4999} <= points.keys()
    assert None in points.values()
    assert all(values[step] == value for step, value in points.items())
    short = Curve("x", [1, 2], [0.5, None])
    assert thin(short) is short


def test_smoothing_leaves_out_what_is_not_finite():
    assert smooth([None, 2.0, None, 2.0]) == [None, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [(0, 10, 5, [0, 2, 4, 6, 8, 10]), (0.13, 0.47, 4, [0.2, 0.3, 0.4]), (3, 3, 4, [3]), (0, 1e-4, 4, [0, 5e-5, 1e-4])],
)
def test_ticks_are_round(low, high, about, expected):
    assert ticks(low, high, about) == pytest.approx(expected)


def test_of_too_many_previews_steps_are_left_out_evenly_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PICTURES", (12,))
    run = runs_made.made(tmp_path)
    run.start()
    for step in range(0, 100, 10):
        run.sample(step, ["a", "b"])
    run.steps(1, 90)
    shown = report(run)
    steps = [int(text.split()[1]) for tag, text in shown.texts if tag == "th" and text.startswith("step ")]
    assert steps == [0, 20, 40, 50, 70, 90]
    assert "Shown are 6 of 10 steps; left out, to keep the file small: 10, 30, 60, 80." in shown.text


def test_prompts_that_changed_have_rows_of_their_own(tmp_path):
    run = runs_made.made(tmp_path)
    run.start()
    run.sample(0, ["a zig"])
    run.steps(1, 5)
    run.start(5)
    run.sample(5, ["a zag"])
    shown = report(run)
    assert [image["alt"] for image in shown.all("img")[:-1]] == ["step 5: a zag", "step 0: a zig"]
    assert shown.text.count("not drawn") == 2


def test_previews_that_are_gone_or_damaged_or_named_outside(tmp_path):
    run = runs_made.made(tmp_path)
    run.start()
    run.sample(0, ["a", "b", "c"])
    (run.folder / "samples" / "000000000-00.png").unlink()
    (run.folder / "samples" / "000000000-01.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    outside = run.folder.parent / "000000000-03.png"
    Image.new("RGB", (8, 8)).save(outside)
    log = run.folder / "events.jsonl"
    log.write_text(log.read_text().replace("/elsewhere/samples/000000000-02.png", str(outside)))
    shown = report(run)
    assert shown.text.count("the file is gone") == 2
    assert shown.text.count("the file cannot be read") == 1
    assert len(shown.all("img")) == 1


def test_the_worst_pictures_stay_below_the_limit(tmp_path, monkeypatch):
    """Noise takes four times the bytes of a photograph: then pictures are made smaller, one by one."""
    run = runs_made.made(tmp_path)
    run.start()
    run.sample(0, ["noise"], (1024, 1024), noise=True)
    run.steps(1, 1)
    shown = report(run)
    _, _, data = shown.all("img")[0]["src"].partition(",")
    assert len(base64.b64decode(data)) <= pictures.BYTES
    assert int(shown.all("img")[0]["width"]) >= 256
    text = 1_500_000  # curves, a job file of the largest size twice over, warnings
    assert page.PICTURES[0] * (pictures.BYTES * 4 / 3 + 1000) + text < page.LIMIT
    monkeypatch.setattr(page, "LIMIT", 100_000)
    run.sample(1, ["noise"] * 20, (512, 512), noise=True)
    assert len(report(run).all("img")) == 3  # fewer pictures, and the empty one
    monkeypatch.setattr(pictures, "BYTES", 100)
    assert report(run).all("img")[0]["width"] == "96"  # the last try is taken


def test_many_warnings_and_measurements_are_cut_short(tmp_path):
    run = runs_made.made(tmp_path)
    run.start()
    for number in range(150):
        run.warn(f"warning {number}", number, [f"detail {part}" for part in range(30)])
    for _ in range(3):
        run.warn("again", 7)
    for step in range(100):
        run.drift(step, 0.1)
    run.steps(1, 2)
    shown = report(run)
    assert "and 51 other warnings" in shown.text
    assert "30 details" in shown.text
    assert "and 10 more, in events.jsonl" in shown.text
    assert "Shown are 60 of 100 measurements." in shown.text


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(whole, tmp_path):
    out = tmp_path / "sub" / "mine.html"
    assert well("report", whole.folder, "--out", out).out == f"{out}\n"
    assert out.read_text(encoding="utf-8") == page.render(whole.folder)
    assert well("report", whole.folder).out == f"{whole.folder / 'report.html'}\n"
    ran = detour("report", tmp_path / "nowhere")
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert "name the folder of a run" in ran.err


def test_a_session_without_a_full_end_of_its_preparations(tmp_path):
    """Time in which nothing ran (the machine was off) counts for no session."""
    run = runs_made.made(tmp_path)
    run.start()
    run.steps(1, 4)
    run.clock += 100_000
    run.start(4)
    run.steps(5, 6)
    run.end(6, "stop requested", seconds=10)
    history = read_history(Path(run.folder / "events.jsonl"))
    assert [session.seconds for session in history.sessions] == [6, 10]


def test_a_run_that_makes_a_training_adapter(tmp_path):
    run = runs_made.made(tmp_path)
    job = {"type": "adapter", "model": {"arch": "zimage"}, "network": {"linear": 8}}
    text = json.dumps({"config": {"output_name": "zig", "output_folder": str(tmp_path), "process": [job]}})
    (run.folder / "job.yaml").write_text(text)
    run.start()
    run.steps(1, 3)
    run.end(3)
    shown = report(run)
    assert "LoRA, rank 8" in shown.text
    assert "7 pictures that the model drew itself" in shown.text
    assert "network.linear" in [text for tag, text in shown.texts if tag == "code"]
