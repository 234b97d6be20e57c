"""`report.html`: one file that tells of a run, without a network, a server or a script that it could not do without.

The same folder gives the same bytes: what time it is, where the folder lies and what is installed stay out of it.
Scripts add no more than reading figures off the curves and looking at pictures larger; a policy in the page names its
one script by its hash, so that nothing that a prompt or a name smuggles in could ever run, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from detour import UserError, files
from detour.report import gate, words
from detour.report.charts import FRAME, charts, draw
from detour.report.folder import open_run
from detour.report.lora import KINDS, header
from detour.report.pictures import cell, matrix, spread

if TYPE_CHECKING:
    from jinja2 import Template

    from detour.report.charts import Drawing
    from detour.report.folder import RunFolder
    from detour.report.history import History, Session

LIMIT = 15_000_000
"""Bytes of a report. `pictures` and the figures below see to it."""
PICTURES = (120, 30, 2)
"""Most pictures, and fewer where that would be too large."""
DRIFTS, WARNINGS, DETAILS = 60, 100, 20
"""Rows of the drift table, different warnings, and details of each that are shown."""
HERE = Path(__file__).parent


def render(folder: Path) -> str:
    """The report on the run in a folder. UserError if it is not one, or damaged."""
    run = open_run(folder)
    history = run.history
    drawings = [draw(chart) for chart in charts(history, run.process.preserve.drift.alarm)]
    values = {
        "title": history.name,
        "state": _state(history),
        "summary": _summary(run),
        "drawings": drawings,
        "data": _data(history, drawings),
        "gate": history.gate,
        "gate_about": gate.ABOUT,
        "gate_picture": None if history.gate is None else cell(folder / "samples", 0, history.gate.picture),
        "drifts": spread(history.drifts, DRIFTS),
        "drifts_in_all": len(history.drifts),
        "warnings": _warnings(history),
        "timeline": _timeline(history),
        "settings": run.settings,
        "job": run.text,
        "hashes": _hashes(run),
        "libraries": {name: text for name, text in history.facts.items() if not _is_identity(name)},
    }
    html = ""
    for pictures in PICTURES:  # fewer only where prompts of many thousand words stand beside each
        html = _template().render(values, matrix=matrix(history, folder / "samples", pictures))
        if len(html.encode()) <= LIMIT:
            break
    return html


def write(folder: Path, out: Path | None = None) -> Path:
    """Write it, by default as `report.html` into the folder."""
    target = out or folder / "report.html"
    files.write_bytes(target, render(folder))
    return target


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"moment": words.moment, "figure": words.figure}
    script = (HERE / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "script": Markup(script),  # noqa: S704  our own files
        "style": Markup((HERE / "report.css").read_text("utf-8")),  # noqa: S704
        "script_hash": f"sha256-{digest}",
        "frame": FRAME,
    }
    return environment.get_template("report.html")


# --- what it says -----------------------------------------------------------------------------------------------------


def _state(history: History) -> tuple[str, str]:
    """`finished`, `stopped` or `broken`, and a sentence."""
    last = history.sessions[-1]
    if last.reason is None:
        return "broken", f"{last.words}: killed, failed (its log says why), or still running"
    return ("finished", last.words) if last.finished else ("stopped", f"{last.words}: {last.reason}")


def _summary(run: RunFolder) -> list[tuple[str, str]]:
    """Label and value of what one wants to know first."""
    history, process = run.history, run.process
    model = process.model
    seconds = [record["seconds"] for record in history.steps if record["seconds"] is not None]
    outside = [record["seconds_outside"] for record in history.steps if record["seconds_outside"] is not None]
    memory = max((record["memory_bytes"] for record in history.steps), default=0)
    speed = ""
    if seconds and outside:
        whole = words.speed(fmean(seconds) + fmean(outside))
        speed = f"{words.speed(median(seconds))} (median); {whole} with data, saving and previews"
    found = [
        ("Architecture", f"{run.spec.title} {run.variant_name}"),
        ("Model", str(model.name_or_path)),
        ("Training adapter", _adapter(run)),
        ("Trained", _trained(run)),
        ("Dataset", _dataset(run)),
        ("Steps", f"{history.last_step} of {history.total_steps}"),
        ("Time", f"{words.duration(history.seconds)} in {_count(len(history.sessions), 'session')}"),
        ("Speed", speed),
        ("Peak memory", words.size(memory) if memory else ""),
        ("Precision", process.train.dtype + (f", base weights in {model.qtype}" if model.quantize else "")),
    ]
    return [(label, value) for label, value in found if value]


def _adapter(run: RunFolder) -> str:
    model = run.process.model
    if model.assistant_lora_path is None:
        return "none"
    return f"{model.assistant_lora_path} ({model.assistant_lora_mode})"


def _trained(run: RunFolder) -> str:
    network = run.process.network
    if network.type == "full":
        return "the denoiser's own weights"
    alpha = f", alpha {network.linear_alpha:g}" if network.linear_alpha is not None else ""
    return f"{KINDS[network.type]}, rank {network.linear}{alpha}" + (
        ", text encoders too" if run.process.train.train_text_encoder else ""
    )


def _dataset(run: RunFolder) -> str:
    folders = [str(dataset.folder_path) for dataset in run.process.all_datasets]
    count = run.history.facts.get("pictures")
    if run.makes_adapter:
        return f"{count or 'some'} pictures that the model drew itself"
    return (f"{count} pictures in " if count else "") + words.listed(folders, 3)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


# --- figures ----------------------------------------------------------------------------------------------------------


def _data(history: History, drawings: list[Drawing]) -> dict[str, Any]:
    """The figures in the page, for its script and for other programs: what the curves show, exactly."""
    return {
        "format": 1,
        "name": history.name,
        "arch": history.arch,
        "step": history.last_step,
        "total_steps": history.total_steps,
        "seconds": history.seconds,
        "charts": [
            {
                "key": drawing.chart.key,
                "domain": drawing.domain,
                "level": drawing.chart.level,
                "curves": [{"name": c.name, "steps": c.steps, "values": c.values} for c in drawing.chart.curves],
            }
            for drawing in drawings
        ],
    }


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass
class _Warning:
    message: str
    count: int = 0
    steps: list[int] = field(default_factory=list)
    details: Counter[str] = field(default_factory=Counter)


def _warnings(history: History) -> dict[str, Any]:
    """Warnings, each once, with how often and when it came."""
    found: dict[str, _Warning] = {}
    for record in history.warnings:
        known = found.setdefault(record["message"], _Warning(record["message"]))
        known.count += 1
        known.steps += [] if record["step"] is None else [int(record["step"])]
        known.details.update(map(str, record["details"]))
    rows = [
        {
            "message": known.message,
            "count": known.count,
            "when": _when(known.steps),
            "details": list(known.details)[:DETAILS],
            "more": max(0, len(known.details) - DETAILS),
        }
        for known in list(found.values())[:WARNINGS]
    ]
    return {"rows": rows, "more": len(found) - len(rows)}


def _when(steps: list[int]) -> str:
    if not steps:
        return ""
    return f"step {steps[0]}" if len(set(steps)) == 1 else f"steps {min(steps)} to {max(steps)}"


def _timeline(history: History) -> list[tuple[float, str]]:
    """Unix seconds and what happened then."""
    found: list[tuple[float, str]] = []
    for session in history.sessions:
        found.append((session.began, _beginning(session)))
        if session.stop is not None:
            found.append((session.last, f"asked to stop: {session.stop}"))
        found.append((session.last, session.words + (f", after {words.duration(session.seconds)}")))
    return found


def _beginning(session: Session) -> str:
    if session.resumed_from is None:
        return "started"
    again = f"; {_count(session.dropped, 'step')} done again" if session.dropped else ""
    return f"went on from step {session.first_step}{again}"


# --- hashes -----------------------------------------------------------------------------------------------------------


def _is_identity(fact: str) -> bool:
    return fact.endswith("sha256") or fact in ("model", "training_adapter_mode", "pictures")


def _hashes(run: RunFolder) -> list[tuple[str, str]]:
    """What tells the inputs and the results of the run from others."""
    facts = run.history.facts
    names = {
        "vae_sha256": "VAE", "text_encoder_sha256": "text encoder", "dataset_sha256": "dataset",
        "training_adapter_sha256": "training adapter",
    }  # fmt: skip
    found = [(label, facts[name]) for name, label in names.items() if facts.get(name, "none") != "none"]
    own = hashlib.sha256(run.text.encode()).hexdigest()
    found.append(("job file", own))
    newest = run.loras[0].step if run.loras else None
    for lora in [lora for lora in run.loras if lora.step == newest]:
        found.append((lora.path.name, files.sha256_file(lora.path)))
        said = _header(lora.path).get("detour.job_sha256", own)
        if said != own:
            found.append((f"{lora.path.name}: its job file", f"{said} (another one: the job was changed since)"))
    return found


def _header(path: Path) -> dict[str, str]:
    try:
        return dict(header(path))
    except UserError as error:
        return {"detour.job_sha256": f"unknown: {error}"}
