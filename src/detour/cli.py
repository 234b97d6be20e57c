"""The command line: parse, then one call each. Heavy imports stand inside the commands, so that `--help` is instant.

Exit codes: 0 done, 1 an unexpected failure, 2 a wrong job file, option or input, 3 refused before start,
130 stopped and saved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detour import UserError, __version__
from detour.nn.quiet import quiet_imports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from detour.config.load import Loaded
    from detour.events import Sink
    from detour.train.control import Control
    from detour.train.session import Result

    _Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]

STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        with quiet_imports():
            code = int(arguments.call(arguments))
            sys.stdout.flush()
            return code
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `detour schema | head`: whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at the end does not fail too
        return 1
    except KeyboardInterrupt:
        print("stopped at once; what was saved before is intact", file=sys.stderr)
        return STOPPED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"unexpected failure: {type(error).__name__}: {error}\n(--debug shows where)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="detour", description="Trains LoRAs for turbo diffusion models that keep their few-step speed."
    )
    parser.add_argument("--version", action="version", version=f"detour {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, call: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(call=call)
        return added

    _add_training(command)
    _add_tools(command)
    _add_queue(command)
    _add_ui(command)
    return parser


def _add_training(command: _Command) -> None:
    run = command("run", _run, "run a job file; goes on where it left off")
    making = command("adapter", _adapter, "make a training adapter: `run` for job files of `type: adapter`")
    for parser in (run, making):
        _job_arguments(parser)
        parser.add_argument("--fresh", action="store_true", help="start over; what is there is moved aside")
        parser.add_argument(
            "--dry-run", action="store_true", help="2 steps, a sample, a save, a resume, in a scratch folder"
        )
        parser.add_argument("--json", action="store_true", help="print the result as JSON")

    check = command("check", _check, "check a job file and its dataset without loading a model")
    _job_arguments(check)
    check.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_tools(command: _Command) -> None:
    draw = command("sample", _sample, "draw pictures with a model and LoRAs")
    draw.add_argument("--model", required=True, help="folder, .safetensors file or hub id")
    draw.add_argument("--arch", required=True, help="architecture, a variant may follow a colon (zimage:base)")
    draw.add_argument("--extras", help="where VAE and text encoder come from, when --model is a single file")
    draw.add_argument("--lora", action="append", default=[], metavar="FILE[:scale]", help="may be given several times")
    draw.add_argument("--prompt", action="append", required=True, help="may be given several times")
    draw.add_argument("--negative", default="", help="negative prompt, used with guidance above 1")
    draw.add_argument("--steps", type=_count, metavar="N", help="denoising steps (default: the variant's)")
    draw.add_argument("--guidance", type=_guidance, metavar="G", help="1 means none (default: the variant's)")
    draw.add_argument("--seed", type=_seed, default=42, help="the same seed gives the same picture (default: 42)")
    draw.add_argument("--width", type=_count, default=1024, metavar="W", help="pixels (default: 1024)")
    draw.add_argument("--height", type=_count, default=1024, metavar="H", help="pixels (default: 1024)")
    draw.add_argument(
        "--frames", type=_count, default=1, metavar="N", help="of a clip, for models of video (default: 1)"
    )
    draw.add_argument("--fps", type=_rate, metavar="R", help="frames a second of a clip (default: the model's)")
    draw.add_argument("--control", metavar="FILE", help="a picture to follow, for models that take one (flex2)")
    draw.add_argument("--inpaint", metavar="FILE", help="a picture whose transparent parts are to be filled (flex2)")
    draw.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="type the model computes in")
    draw.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:1")
    draw.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    draw.add_argument("--json", action="store_true", help="print the files as JSON")

    convert = command("convert", _convert, "write a LoRA in another format, verified by loading")
    convert.add_argument("source", type=Path, metavar="IN.safetensors")
    convert.add_argument("target", type=Path, metavar="OUT.safetensors")
    convert.add_argument("--arch", required=True)
    convert.add_argument("--to", required=True, choices=("comfy", "diffusers", "kohya"), dest="format")

    inspect = command("inspect", _inspect, "say what a LoRA, adapter, checkpoint or model file is")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true")

    report = command("report", _report, "write report.html again: one file about a run, for any browser")
    report.add_argument("folder", type=Path, metavar="DIR", help="the run's: <output_folder>/<output_name>")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/report.html")

    listing = command("archs", _archs, "list the architectures and what each supports")
    listing.add_argument("--json", action="store_true")

    nano = command("nano", _nano, "write an embedded miniature model in the diffusers folder layout")
    nano.add_argument("folder", type=Path, nargs="?", metavar="DIR")
    nano.add_argument("--arch", default="zimage")
    nano.add_argument("--random", action="store_true", help="the untrained miniature")
    nano.add_argument("--seed", type=int, default=0)
    nano.add_argument("--list", action="store_true", help="list the miniatures")

    demo = command("demo", _demo, "train a LoRA with a training adapter on the embedded miniature")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    demo.add_argument("--steps", type=_count, default=300, metavar="N", help="training steps (default: 300)")
    command("schema", _schema, "print the JSON Schema of job files")


def _add_queue(command: _Command) -> None:
    queue = command("queue", _queue, "a queue of jobs that go on when the terminal is closed")
    actions = queue.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text)
        added.add_argument(
            "--folder", type=Path, metavar="DIR", help="default: $DETOUR_FOLDER or ~/.local/share/detour"
        )
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        return added

    add = action("add", "add a job file as it is now, and work at the queue")
    add.add_argument("job", type=Path, metavar="JOB.yaml")
    add.set_defaults(set=[])
    listing = action("list", "show the jobs, their states and why they ended")
    listing.add_argument("--json", action="store_true")
    stop = action("stop", "save and stop a job; asked again it stops at once")
    stop.add_argument("id", type=_count, metavar="ID")
    stop.add_argument("--kill", action="store_true", help="end it whatever it is doing, without saving")
    start = action("start", "queue a job that has ended again; it goes on from its last checkpoint")
    start.add_argument("id", type=_count, metavar="ID", nargs="?", help="without one: work at what is queued")


def _add_ui(command: _Command) -> None:
    ui = command("ui", _ui, "the web UI with its job queue")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    ui.add_argument("--port", type=_port, default=8675, help="default: 8675; 0: any that is free")
    ui.add_argument("--folder", type=Path, metavar="DIR", help="default: $DETOUR_FOLDER or ~/.local/share/detour")
    ui.add_argument(
        "--token-file", type=Path, metavar="FILE", help="the token's file, made if missing (default: in the folder)"
    )
    ui.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another name by which browsers reach it"
    )
    ui.add_argument("--comfyui", type=Path, metavar="DIR", help="ComfyUI's folder, to which LoRAs can be sent")
    ui.add_argument("--no-browser", action="store_true", help="do not open the browser")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 65535")
    return int(text)


def _count(text: str) -> int:
    """A number of steps or pixels."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _rate(text: str) -> float:
    """Frames a second."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1000")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _guidance(text: str) -> float:
    """As everywhere in this project, 1 means none; diffusers counts from 0 for some models."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1 (1 means none)")
    return value


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=Path, metavar="JOB.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="path=value", help="override an option: train.lr=2e-4"
    )


def _load(arguments: argparse.Namespace) -> Loaded:
    from detour.config.load import load_job

    loaded = load_job(arguments.job, arguments.set)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


def _adapter(arguments: argparse.Namespace) -> int:
    loaded = _load(arguments)
    for index, process in enumerate(loaded.job.config.process):
        if process.type != "adapter":
            raise UserError(
                f"{loaded.place('type', index)}: type: {process.type}; `detour adapter` is for type: adapter, a job "
                f"that makes a training adapter. `detour run` runs this one"
            )
    return _run_loaded(loaded, arguments)


def _run(arguments: argparse.Namespace) -> int:
    return _run_loaded(_load(arguments), arguments)


def _run_loaded(loaded: Loaded, arguments: argparse.Namespace) -> int:
    from detour.train.control import Control

    control = Control()
    if not arguments.dry_run:
        control.install()  # before torch: an import can swallow what Python itself raises on Ctrl-C
    from detour.train.rehearsal import rehearse
    from detour.train.session import run_job

    with _console() as sink, _places(loaded, control):
        if arguments.dry_run:
            results = rehearse(loaded.job, control, sink)
        else:
            results = run_job(loaded.job, control, sink, fresh=arguments.fresh)
    last = results[-1]
    if arguments.json:
        _print_json([_as_json(result) for result in results])
    elif arguments.dry_run:
        print("rehearsed: a step, a save, a resume, a second step and a LoRA file; only what is in the caches was kept")
    elif last.finished:
        print(f"finished at step {last.step}: {last.lora}")
    else:
        print(f"{last.reason}: saved at step {last.step} in {last.folder}; the same command goes on from there")
    return 0 if last.finished else STOPPED


@contextmanager
def _places(loaded: Loaded, control: Control) -> Iterator[None]:
    """Say where in the job file the options stand that an error names."""
    from detour.checking import located

    try:
        yield
    except UserError as error:
        raise type(error)(located(loaded, str(error), control.process)) from error


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "folder": str(result.folder) if result.folder.is_dir() else None,
        "reason": result.reason,
        "step": result.step,
        "lora": str(result.lora) if result.lora else None,
        "finished": result.finished,
    }


def _check(arguments: argparse.Namespace) -> int:
    from detour.checking import check_job, failed

    notes: list[str] = []
    try:
        loaded = _load(arguments)
        report, notes = check_job(loaded), loaded.notes
    except UserError as error:
        if not arguments.json:
            raise
        report = failed(error)
    if arguments.json:
        _print_json(report | {"notes": notes})
        return int(report["exit_code"])
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    for message in report["errors"]:
        print(f"error: {message}", file=sys.stderr)
    for line in report["summary"]:
        print(f"ok: {line}" if report["ok"] else line)
    return int(report["exit_code"])


def _sample(arguments: argparse.Namespace) -> int:
    from detour.draw import Drawing, draw

    paths = draw(
        Drawing(
            model=arguments.model,
            arch=arguments.arch,
            extras=arguments.extras,
            loras=arguments.lora,
            prompts=arguments.prompt,
            negative=arguments.negative,
            steps=arguments.steps,
            guidance=arguments.guidance,
            seed=arguments.seed,
            size=(arguments.width, arguments.height),
            frames=arguments.frames,
            fps=arguments.fps,
            control=arguments.control,
            inpaint=arguments.inpaint,
            dtype=arguments.dtype,
            device=arguments.device,
        ),
        arguments.out,
    )
    if arguments.json:
        _print_json([str(path) for path in paths])
    else:
        print("\n".join(str(path) for path in paths))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from detour import archs
    from detour.export import convert

    facts = archs.spec(archs.name_of(arguments.arch))
    if arguments.target.exists() and arguments.source.exists() and arguments.target.samefile(arguments.source):
        raise UserError(f"{arguments.target}: IN and OUT are the same file; give the converted one another name")
    written = convert(arguments.source, arguments.target, facts, arguments.format)
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{written.path} ({written.proof.modules} layers, proven by loading with {written.proof.loader})")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from detour.export.inspection import inspect_file

    found = inspect_file(arguments.file)
    if arguments.json:
        _print_json(found)
    else:
        for key, value in found.items():
            print(f"{key}: {value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from detour.report import page

    print(page.write(arguments.folder, arguments.out))
    return 0


def _archs(arguments: argparse.Namespace) -> int:
    from detour import archs

    rows = archs.table()
    if arguments.json:
        _print_json(rows)
        return 0
    for row in rows:
        facts = f"{row['title']:20} {row['objective']:5} {row['default_repo']}" if row["built"] else "not built yet"
        print(f"{row['name']:14} {facts}")
    return 0


def _nano(arguments: argparse.Namespace) -> int:
    from detour import nano

    if arguments.list:
        print("\n".join(nano.NAMES))
        return 0
    if arguments.folder is None:
        raise UserError("detour nano: give the folder to write the miniature into, e.g. `detour nano miniature`")
    for name, path in nano.write(
        arguments.folder, arguments.arch, seed=arguments.seed, random=arguments.random
    ).items():
        print(f"{name}: {path}")
    print(
        "untrained: its weights are random, so that it shows how things work and not how good they are", file=sys.stderr
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from detour.demo import demo

    with _console() as sink:
        lines = demo(arguments.out, sink, arguments.steps)
    print("\n".join(lines))
    return 0


def _schema(_arguments: argparse.Namespace) -> int:
    from detour.config.load import json_schema

    _print_json(json_schema())
    return 0


def _queue(arguments: argparse.Namespace) -> int:
    from detour import queue_commands

    if arguments.action == "add":
        lines = queue_commands.add(_load(arguments), arguments.folder)
    elif arguments.action == "stop":
        lines = queue_commands.stop(arguments.id, kill=arguments.kill, folder=arguments.folder)
    elif arguments.action == "start":
        lines = queue_commands.start(arguments.id, arguments.folder)
    else:
        found = queue_commands.listing(arguments.folder)
        if arguments.json:
            _print_json(found)
            return 0
        lines = queue_commands.table(found)
    print("\n".join(lines))
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    from detour.ui_command import ui

    return ui(arguments, lambda line: print(line, flush=True))


@contextmanager
def _console() -> Iterator[Sink]:
    """Progress, on standard error: standard output belongs to the result."""
    from detour.console import console_sink

    sink = console_sink(sys.stderr)
    try:
        yield sink
    finally:
        sink.close()


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
