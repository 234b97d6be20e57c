"""Stands in for `detour run JOB`: the same events, exit codes, signals and requests, without a model, in 20 ms.

The job file is JSON; `meta` says what to do: `prepare` and `pause` (seconds before and between steps), `steps`, `save`
(steps between saves), `hold` (a step to wait at until `LEDGER.go` is there), `at` (what happens after which step:
`exit`, `signal`, `print`, `error`), `ledger` (a file with a line for each beginning and end, and one for every overlap
on a device).
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

asked = {"stop": 0, "training": False}


def on_signal(number, frame):
    asked["stop"] += 1
    if asked["stop"] > 1 or not asked["training"]:
        note("interrupted")
        print("stopped at once; what was saved before is intact", file=sys.stderr, flush=True)
        os._exit(130)


def note(what):
    with Path(meta["ledger"]).open("a") as ledger:
        ledger.write(f"{name} {os.getpid()} {what}\n")


def emit(kind, **values):
    with (folder / "events.jsonl").open("a") as log:
        log.write(json.dumps({"type": kind, "time": time.time()} | values) + "\n")


def save(step):
    place = folder / "checkpoints" / f"step-{step:09d}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "manifest.json").touch()
    (folder / "saved.tmp").write_text(str(step))
    (folder / "saved.tmp").rename(folder / "saved")
    emit("save", step=step, checkpoint="", lora=None)


def leave(code, what):
    note(what)
    os._exit(code)


def act(what, value):
    if what == "print":
        print(value, file=sys.stderr, flush=True)
    elif what == "error":
        print(value[1], file=sys.stderr, flush=True)
        leave(value[0], "error")
    elif what == "exit":
        leave(value, "exit")
    elif what == "signal":
        note("signal")
        os.kill(os.getpid(), value)


def take(what):
    try:
        (folder / "requests" / what).unlink()
    except FileNotFoundError:
        return False
    return True


job = json.loads(Path(sys.argv[1]).read_text())
meta, name = job["meta"], job["config"]["output_name"]
folder = Path(job["config"]["output_folder"]) / name
signal.signal(signal.SIGINT, on_signal)
signal.signal(signal.SIGTERM, on_signal)
device = os.open(meta["ledger"] + "." + job["config"]["process"][0]["device"], os.O_RDWR | os.O_CREAT)
try:
    fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    note("OVERLAP")
note("begin")
time.sleep(meta.get("prepare", 0))
folder.mkdir(parents=True, exist_ok=True)
for stale in ("stop", "save", "sample"):
    take(stale)
step = int((folder / "saved").read_text()) if (folder / "saved").exists() else 0
emit("start", step=step, total_steps=meta["steps"], name=name, arch="zimage", resumed_from=None)
asked["training"], written = True, None
while True:
    stop = asked["stop"] or take("stop")
    last = step >= meta["steps"]
    if take("save") or last or stop or (step % meta.get("save", 1) == 0 and written != step):
        save(step)
        written = step
    if take("sample"):
        emit("sample", step=step, index=0, path="", prompt="", seed=0)
    if last or stop:
        emit("end", step=step, reason="finished" if last else "stop requested", seconds=0.0)
        leave(0 if last else 130, "finished" if last else "stopped")
    if meta.get("hold") == step and not Path(meta["ledger"] + ".go").exists():
        time.sleep(0.01)
        continue
    for what, value in meta.get("at", {}).get(str(step), {}).items():
        act(what, value)
    time.sleep(meta.get("pause", 0))
    step += 1
    emit("step", step=step, epoch=0, loss=0.1, lr=1e-4, grad_norm=1.0, seconds=0.0, seconds_outside=0.0, memory_bytes=0)
