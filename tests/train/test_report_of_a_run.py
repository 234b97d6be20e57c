"""Every run leaves a report, however it ends; one that cannot be written costs the run nothing."""

from __future__ import annotations

import json
import re

import pytest

from detour import UserError
from detour.events import Event, read_events
from detour.report import page
from detour.train.control import Control
from detour.train.session import run_job
from miniature import NAME, Recorder, job, run


def data(html: bytes) -> dict:
    return json.loads(re.search(rb'<script type="application/json" id="data">(.*?)</script>', html)[1])


@pytest.mark.slow
def test_a_run_that_is_stopped_and_goes_on_leaves_its_report_each_time(world, tmp_path):
    sample = {"disable_sampling": False, "skip_first_sample": True, "sample_steps": 1, "prompts": ["a zig"]}
    sections = {"sample": sample, "preserve": {"drift": {"measure": True, "budget": 9.0, "every": 3}}}
    stopped = run(job(world, tmp_path, **sections), stop_at=3)
    file = tmp_path / NAME / "report.html"
    first = file.read_bytes()
    assert b"stopped at step 3: step 3 reached" in first
    assert [chart["curves"][0]["steps"] for chart in data(first)["charts"] if chart["key"] == "loss"] == [[1, 2, 3]]
    assert not stopped.result.finished
    run(job(world, tmp_path, **sections))
    second = file.read_bytes()
    events = list(read_events(tmp_path / NAME / "events.jsonl"))
    curves = {chart["key"]: chart["curves"][0] for chart in data(second)["charts"]}
    for chart, key in (("loss", "loss"), ("grad_norm", "grad_norm"), ("seconds", "seconds")):
        assert curves[chart]["steps"] == [1, 2, 3, 4, 5, 6]
        assert curves[chart]["values"] == [event[key] for event in events if event["type"] == "step"]
    assert curves["drift"]["values"] == [event["drift"] for event in events if event["type"] == "drift"]
    assert b"finished at step 6" in second
    assert b"went on from step 3" in second
    assert second.count(b'<img src="data:image/jpeg') == 1
    facts = next(event["facts"] for event in events if event["type"] == "start")
    assert facts["pictures"] == "5"
    for name in ("torch", "diffusers", "dataset_sha256", "training_adapter_sha256", "vae_sha256"):
        assert facts[name].encode() in second
    assert page.render(tmp_path / NAME).encode() == second  # `detour report` makes the same


def test_a_report_that_cannot_be_written_is_a_warning(world, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(page, "write", full)
    ran = run(job(world, tmp_path, train={"steps": 2}))
    assert ran.result.finished
    assert ran.result.lora.is_file()
    said = "report.html was not written (UserError: no space left); `detour report"
    assert any(warning.startswith(said) for warning in ran.seen.warnings)
    logged = [event["message"] for event in read_events(tmp_path / NAME / "events.jsonl") if event["type"] == "warning"]
    assert any(message.startswith(said) for message in logged)


def at(step: int, error: BaseException):
    def act(event: Event) -> None:
        if event.type == "step" and event.step == step:
            raise error

    return Recorder(act)


def test_a_run_that_fails_leaves_a_report_too(world, tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        run_job(job(world, tmp_path), Control(), at(2, RuntimeError("out of memory")))
    assert b"broke off after step" in (tmp_path / NAME / "report.html").read_bytes()


def test_a_second_ctrl_c_does_not_wait_for_a_report(world, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_job(job(world, tmp_path), Control(), at(2, KeyboardInterrupt()))
    assert not (tmp_path / NAME / "report.html").exists()
