"""Does every page of the web UI answer within 200 ms, with 1 000 jobs and 10 000 pictures in its folder?

    python benchmarks/web.py
    python benchmarks/web.py --docs docs/benchmarks.md
    python benchmarks/web.py --quick        # a small folder: to see that it works

The real server (`detour ui`) runs as a process of its own over a folder that `web_place.py` writes. Everything that it
answers to GET is asked for, from the app's own list of routes: for a new route without an address in `ADDRESSES` this
program ends with an error. Each address is asked once for the first time, then several times more. Beside the wall
time stands the processor time of the server, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import http.client
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil
from common import machine, machine_line, table, write_docs, write_result
from fastapi.routing import iter_route_contexts
from web_place import FULL, QUICK, Place, make

from detour.jobs.store import Store
from detour.web.access import Access
from detour.web.app import create_app
from detour.web.context import Context
from detour.web.guard import Site

if TYPE_CHECKING:
    from collections.abc import Sequence

BAR = 0.2  # seconds
MOMENTS = 12  # at which the server's memory is looked at
BAR_MEMORY = 16  # MiB by which its highest in the last third of the requests may be above its highest before
STREAM = "/api/jobs/{job_id:number}/events"
JOB, SAMPLES, DATASET = "/api/jobs/{job_id:number}", "/api/jobs/{job_id:number}/samples", "/api/datasets/{name}"
SAMPLE = SAMPLES + "/{process:number}/{step:number}/{index:number}"
CARD = JOB + "/card/{export_id}"
ADDRESSES: dict[str, Sequence[str]] = {
    "/": ["/"],
    "/login": ["/login"],
    "/settings": ["/settings"],
    "/api/settings": ["/api/settings"],
    "/api/health": ["/api/health"],
    "/api/openapi.json": ["/api/openapi.json"],
    "/static/plotly.min.js": ["/static/plotly.min.js"],
    "/static": ["/static/app.css"],
    "/jobs": ["/jobs"],
    "/api/jobs": [
        "/api/jobs", "/api/jobs?limit=200", "/api/jobs?search=zig-00&offset=200", "/api/jobs?state=failed&limit=200",
    ],
    "/jobs/{job_id:number}": ["/jobs/<job>"],
    JOB: ["/api/jobs/<job>", "/api/jobs/<long>", "/api/jobs/<running>"],
    JOB + "/curves": ["/api/jobs/<job>/curves", "/api/jobs/<long>/curves"],
    JOB + "/timeline": ["/api/jobs/<job>/timeline", "/api/jobs/<long>/timeline"],
    JOB + "/log": ["/api/jobs/<job>/log"],
    JOB + "/text": ["/api/jobs/<job>/text"],
    JOB + "/files": ["/api/jobs/<job>/files", "/api/jobs/<long>/files"],
    JOB + "/files/{process:number}/{name}": ["/api/jobs/<job>/files/1/zig.safetensors"],
    STREAM: ["/api/jobs/<job>/events", "/api/jobs/<long>/events", "/api/jobs/<running>/events?since=end"],
    SAMPLES: ["/api/jobs/<job>/samples", "/api/jobs/<long>/samples"],
    SAMPLE: ["/api/jobs/<job>/samples/1/600/0"],
    SAMPLES + "/{process:number}/teacher-gate": ["/api/jobs/<job>/samples/1/teacher-gate"],
    SAMPLE + "/thumbnail": ["/api/jobs/<job>/samples/1/600/0/thumbnail"],
    "/compare": ["/compare?a=1&b=2"],
    "/api/compare": ["/api/compare?a=<job>&b=<long>"],
    "/jobs/new": ["/jobs/new?from=<job>"],
    "/api/form": ["/api/form"],
    "/api/form/start": ["/api/form/start", "/api/form/start?from=<job>"],
    "/jobs/{job_id:number}/export": ["/jobs/<job>/export"],
    JOB + "/exports": ["/api/jobs/<job>/exports", "/api/jobs/<long>/exports"],
    JOB + "/exports/{export_id}": ["/api/jobs/<job>/exports/1-final-comfy.comfy"],
    CARD: ["/api/jobs/<job>/card/1-final-comfy.comfy", "/api/jobs/<long>/card/1-final-comfy.comfy"],
    CARD + "/README.md": ["/api/jobs/<job>/card/1-final-comfy.comfy/README.md"],
    CARD + "/archive.zip": ["/api/jobs/<job>/card/1-final-comfy.comfy/archive.zip"],
    "/datasets": ["/datasets"],
    "/api/datasets": ["/api/datasets"],
    "/datasets/{name}": ["/datasets/many"],
    DATASET: ["/api/datasets/many"],
    DATASET + "/pictures": [
        "/api/datasets/many/pictures", "/api/datasets/many/pictures?limit=200&offset=<offset>",
        "/api/datasets/many/pictures?q=kind+7",
    ],
    DATASET + "/captions/{key:path}": ["/api/datasets/many/captions/<picture>"],
    DATASET + "/figures": ["/api/datasets/many/figures"],
    DATASET + "/history": ["/api/datasets/many/history"],
    DATASET + "/health": ["/api/datasets/many/health"],
    DATASET + "/buckets": ["/api/datasets/many/buckets"],
    DATASET + "/thumbnails/{key:path}": [
        "/api/datasets/many/thumbnails/<picture>", "/api/datasets/many/thumbnails/<large>",
    ],
    DATASET + "/enlarged/{key:path}": ["/api/datasets/many/enlarged/<picture>"],
    DATASET + "/download/{key:path}": ["/api/datasets/many/download/<large>"],
    DATASET + "/crops/{key:path}": [
        "/api/datasets/many/crops/<picture>?resolution=256",
        "/api/datasets/many/crops/<picture>?resolution=256&small=true",
    ],
}  # fmt: skip
"""By route: what is asked for. What stands in <> is filled in, so that several things of a kind are asked for."""
NOT_HELD = {
    DATASET + "/enlarged/{key:path}": "/api/datasets/many/enlarged/<large>",
    DATASET + "/crops/{key:path}": "/api/datasets/many/crops/<large>",
    "/api/openapi.json": "/api/openapi.json",
}
"""Measured and not held to the bar: pictures of 6 megapixels, which are drawn anew each time that one is looked at, and
the description of the API, which no page asks for and which is made once, at the first request."""


@dataclass
class Row:
    """What was measured of an address."""

    name: str
    route: str
    first: list[float] = field(default_factory=list)
    """Seconds of the first time that each thing of its kind was asked for."""
    again: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Seconds of the server, of the times after the first."""
    processor_first: list[float] = field(default_factory=list)
    size: int = 0
    held: bool = True
    """To the bar."""

    def slowest(self, clock: str) -> float:
        """Seconds of the slowest first time, or of the median of the others: whatever else the machine did once."""
        first, again = (self.first, self.again) if clock == "wall" else (self.processor_first, self.processor)
        return max(*first, median(again))

    def met(self, clock: str) -> bool:
        """Whether it is within the bar, or not held to it."""
        return not self.held or self.slowest(clock) <= BAR


# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """`detour ui` as a process of its own, and a browser's session in it."""

    def __init__(self, process: subprocess.Popen[str], port: int, code: str) -> None:
        self.pid = process.pid
        self._port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._headers = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}"}
        answer, _ = self.ask("/api/login", "POST", f'{{"code": "{code}"}}')
        assert answer.status == 200, answer.status
        self._headers["Cookie"] = answer.headers["Set-Cookie"].partition(";")[0]

    def ask(self, address: str, method: str = "GET", body: str | None = None) -> tuple[http.client.HTTPResponse, bytes]:
        """An answer and what is in it; of a stream of events, its beginning."""
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        try:
            self._connection.request(method, address, body, headers)
            answer = self._connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionResetError):  # it was idle for too long
            self._connection.close()
            self._connection.request(method, address, body, headers)
            answer = self._connection.getresponse()
        if (answer.headers["Content-Type"] or "").startswith("text/event-stream"):
            begins = answer.read1(1 << 16)
            self._connection.close()
            return answer, begins
        return answer, answer.read()

    def processor(self) -> float:
        """Seconds of processor time so far."""
        if sys.platform == "linux":  # the clock of another process, in nanoseconds: see clock_getcpuclockid(3)
            return time.clock_gettime((~self.pid << 3) | 2)
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def memory(self) -> int:
        """Bytes that it holds."""
        return int(psutil.Process(self.pid).memory_info().rss)


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A server over a folder, from its beginning to its end."""
    command = [sys.executable, "-P", "-m", "detour", "ui", "--folder", str(folder), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            link = re.search(r":(\d+)/login\?code=(\S+)", said)
            assert link is not None, said
            yield Server(process, int(link[1]), link[2])
        finally:
            process.terminate()


def routes(folder: Path) -> list[str]:
    """The paths of everything that the app answers to GET."""
    store = Store(folder)
    app = create_app(Context(store=store), Access("not-the-token-of-the-server"), Site(port=1))
    store.close()
    return [found.path for found in iter_route_contexts(app.routes) if "GET" in (found.methods or {"GET"})]


# --- measuring --------------------------------------------------------------------------------------------------------


def addresses(place: Place, count: int) -> Iterator[tuple[Row, list[str]]]:
    """What is asked for, with up to `count` things of each kind; SystemExit names routes that were forgotten."""
    forgotten = sorted(set(routes(place.folder)) ^ set(ADDRESSES))
    if forgotten:
        raise SystemExit(f"ADDRESSES in {Path(__file__).name} and the routes of the app differ in: {forgotten}")
    values = {
        "job": [str(job) for job in place.ended[:: max(1, len(place.ended) // count)][:count]],
        "long": [str(job) for job in place.long[:count]],
        "running": [str(place.running)],
        "picture": [f"picture-{number:05d}.jpg" for number in range(110, 110 + count)],
        "large": [f"picture-{number:05d}.jpg" for number in range(min(count, 6))],
        "offset": ["0", "9800"],
    }
    for route, shown in ADDRESSES.items():
        more = [NOT_HELD[route]] if route in NOT_HELD and NOT_HELD[route] not in shown else []
        for name in [*shown, *more]:
            kinds = re.findall("<([a-z]+)>", name)
            found = [name]
            for at in range(max([len(values[kind]) for kind in kinds], default=0)):
                filled = re.sub("<([a-z]+)>", lambda kind, at=at: values[kind[1]][at % len(values[kind[1]])], name)
                found = [filled] if at == 0 else [*found, filled]
            yield Row(name, route, held=name not in NOT_HELD.values()), found


def measure(server: Server, row: Row, found: Sequence[str], rounds: int) -> None:
    """Ask for each thing of a row once, then for all of them again."""
    for turn in range(1 + rounds):
        for address in found:
            for taken, processor, size in _asked(server, address):
                (row.first if turn == 0 else row.again).append(taken)
                (row.processor_first if turn == 0 else row.processor).append(processor)
                row.size = max(row.size, size)


def _asked(server: Server, address: str) -> Iterator[tuple[float, float, int]]:
    """Seconds, processor seconds and bytes; several times where an answer says that there is more to come."""
    query, complete = "", False
    while not complete:
        before, began = server.processor(), time.perf_counter()
        answer, body = server.ask(address + query)
        taken = time.perf_counter() - began
        assert answer.status in (200, 307), f"{address}: {answer.status} {body[:300]!r}"
        yield taken, server.processor() - before, len(body)
        complete = b'"complete":false' not in body
        cursor = re.search(rb'"cursor":"([^"]+)"', body)
        query = f"?since={cursor[1].decode()}" if cursor is not None else ""


def health(server: Server) -> None:
    """Have all pictures of the largest dataset looked at, so that its report and buckets have something to show."""
    server.ask("/api/datasets/many/health", "POST", "{}")
    while b'"state":"running"' in server.ask("/api/datasets/many/health")[1]:
        time.sleep(0.5)


def thumbnails(server: Server, place: Place) -> dict[str, float | bool]:
    """A small picture is made once: asked again, its file stays as it was and nothing is decoded."""
    cache = place.folder / "cache" / "thumbnails"
    address = "/api/datasets/many/thumbnails/picture-00005.jpg"
    before = set(cache.rglob("*.webp"))
    ((first, processor_first, _),) = _asked(server, address)
    (made,) = set(cache.rglob("*.webp")) - before
    stamp, times = made.stat().st_mtime_ns, []
    for _ in range(20):
        times += [(taken, processor) for taken, processor, _ in _asked(server, address)]
    again, processor = (median(column) for column in zip(*times, strict=True))
    same = made.stat().st_mtime_ns == stamp and set(cache.rglob("*.webp")) - before == {made}
    made.write_bytes(b"what is kept")  # proof: this is what comes, so the picture was not opened
    kept = server.ask(address)[1] == b"what is kept"
    made.unlink()
    return {
        "first_s": first, "again_s": again, "processor_first_s": processor_first, "processor_again_s": processor,
        "kept": same and kept,
    }  # fmt: skip


def memory(server: Server, place: Place, rows: Sequence[tuple[Row, list[str]]], requests: int) -> list[int]:
    """Bytes that the server holds, at `MOMENTS` + 1 moments of so many requests for anything and any job."""
    draw = random.Random(0)
    jobs = [*place.ended, *place.long]
    held = [server.memory()]
    for number in range(1, requests + 1):
        row, found = draw.choice(rows)
        address = draw.choice(found) if not number % 3 or "<job>" not in row.name else ""
        server.ask(address or row.name.replace("<job>", str(draw.choice(jobs))).replace("<long>", str(jobs[-1])))
        if number * MOMENTS // requests > (number - 1) * MOMENTS // requests:
            held.append(server.memory())
    return held


# --- the program ------------------------------------------------------------------------------------------------------


def told(rows: Sequence[Row]) -> str:
    """The table."""
    cells = [
        [
            f"`{row.name}`", *(f"{value * 1000:.0f}" for value in (max(row.first), median(row.again), max(row.again))),
            f"{max(row.processor_first) * 1000:.0f}", f"{median(row.processor) * 1000:.1f}", f"{row.size / 1000:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["asked for", "first, ms", "median, ms", "worst, ms", "processor, first", "processor, median", "kB"]
    return table(head, cells)


def short(rows: Sequence[Row], clock: str) -> str:
    """The slowest, and those that are not held to the bar."""
    slowest = sorted((row for row in rows if row.held), key=lambda row: -row.slowest(clock))[:12]
    return told([*slowest, *(row for row in rows if not row.held)])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small folder")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is held to the bar")
    parser.add_argument("--rounds", type=int, default=3, help="how often each address is asked after the first time")
    parser.add_argument("--requests", type=int, help="for the server's memory (4000; quick: 400)")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark_web.json"), help="where the JSON goes")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    amount = QUICK if arguments.quick else FULL
    requests = arguments.requests or (400 if arguments.quick else 4000)

    with tempfile.TemporaryDirectory(prefix="detour-benchmark-") as scratch:
        place = make(Path(scratch) / "folder", amount)
        rows = list(addresses(place, 2 if arguments.quick else 6))
        with served(place.folder) as server:
            began = server.memory()
            kept = thumbnails(server, place)
            for row, found in rows:
                if row.route == DATASET + "/health":
                    health(server)
                measure(server, row, found, arguments.rounds)
            held = memory(server, place, rows, requests)

    measured = [row for row, _ in rows]
    print(told(measured))
    grown = (max(held[-MOMENTS // 3 :]) - max(held[: -MOMENTS // 3])) / 2**20
    over = [row.name for row in measured if not row.met(arguments.clock)]
    facts = machine()
    flat = grown <= BAR_MEMORY
    lines = [
        f"A thumbnail takes {kept['first_s'] * 1000:.0f} ms the first time, {kept['again_s'] * 1000:.1f} ms from then "
        f"on ({kept['processor_first_s'] * 1000:.1f} and {kept['processor_again_s'] * 1000:.1f} ms of processor time).",
        f"The server holds {began / 2**20:.0f} MiB at its beginning; over {requests} requests for anything: "
        f"{', '.join(f'{bytes_ / 2**20:.0f}' for bytes_ in held)} MiB.",
    ]  # fmt: skip
    print("\n" + "\n".join(lines))
    print(f"every answer within {BAR * 1000:.0f} ms: " + ("met" if not over else f"MISSED by {', '.join(over)}"))
    print("thumbnails are made once: " + ("met" if kept["kept"] else "MISSED"))
    print(f"memory grows by {grown:.1f} MiB in the last third of the requests: " + ("met" if flat else "MISSED"))
    results = [vars(row) | {"met": row.met(arguments.clock)} for row in measured]
    figures = {"machine": facts, "amount": vars(amount), "rows": results, "thumbnails": kept, "memory_bytes": held}
    write_result(arguments.out, figures)
    if arguments.docs:
        jobs = f"{amount.jobs} jobs, {amount.long} of them with {amount.long_steps} steps, {amount.pictures} pictures"
        busy = (
            ""
            if arguments.clock == "wall"
            else "The machine had other work: the bar is held against processor time.\n\n"
        )
        text = f"Measured on {machine_line(facts)}; {jobs}; {len(measured)} addresses, the slowest of them:\n\n"
        write_docs(arguments.docs, "web", text + busy + short(measured, arguments.clock) + "\n\n" + " ".join(lines))


if __name__ == "__main__":
    main()
