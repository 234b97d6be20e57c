"""The store against a simple model of it, over random sequences of everything that can be done to jobs."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from detour import UserError
from detour.jobs.processes import OomKills, Process
from detour.jobs.states import ACTIVE, ALLOWED, ENDED, Verdict, end_state
from detour.jobs.store import KILL, NOW, SAVE, Job, Store
from queueing import job_text

DEVICES = ("cpu", "cuda:0")
VERDICTS = [Verdict(cause, "a reason", 1) for cause in ("stopped", "failed", "killed", "bad_input", "finished")]
SOMEONE = Process(1, "2", "3", "4")
NAMES = st.sampled_from("abcdefghijklmnop")


@dataclass
class Known:
    """What the model knows of a job."""

    state: str
    device: str
    name: str
    text: str
    attempts: int = 0
    stops: int = 0
    token: str | None = None
    history: list[str] = field(default_factory=list)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.root = Path(self.place.name)
        self.store = Store(self.root / "queue", create=True)
        self.known: dict[int, Known] = {}
        self.queues: dict[str, list[int]] = {device: [] for device in DEVICES}
        self.used: set[int] = set()
        self.attempts: list[Job] = []
        """Every attempt that ever was, the newest last."""

    def teardown(self) -> None:
        self.store.close()
        self.place.cleanup()

    # --- the model -----------------------------------------------------------------------------------------------

    def to(self, job_id: int, state: str) -> None:
        known = self.known[job_id]
        assert state in ALLOWED[known.state]
        if known.state == "queued":
            self.queues[known.device].remove(job_id)
        if state == "queued":
            self.queues[known.device].append(job_id)
        known.state = state
        if state not in ACTIVE:
            known.token = None
        known.history.append(state)

    def taken(self, name: str, but: int | None = None) -> bool:
        """Does a waiting or active job write to the folder of that name?"""
        others = [known for other, known in self.known.items() if other != but]
        return any(known.name == name and known.state in ("queued", *ACTIVE) for known in others)

    def current(self, job: Job) -> Known | None:
        """The job, if the attempt is the one under way."""
        known = self.known.get(job.id)
        return known if known is not None and known.token == job.token else None

    def some_job(self, data: Any) -> int:
        """A job that there is, mostly."""
        return data.draw(st.sampled_from([*sorted(self.known), *sorted(self.known), 999]), "job")

    def some_attempt(self, data: Any) -> Job:
        """One that is under way, mostly; or one that is long over."""
        under_way = [job for job in self.attempts if self.current(job)]
        return data.draw(st.sampled_from([*under_way * 3, *self.attempts]), "attempt")

    # --- what people do ------------------------------------------------------------------------------------------

    @rule(name=NAMES, device=st.sampled_from(DEVICES), queued=st.sampled_from([True, True, False]))
    def add(self, name: str, device: str, queued: bool) -> None:
        text = job_text(self.root, name, device)
        if queued and self.taken(name):
            with pytest.raises(UserError, match="writes to"):
                self.store.add(text, cwd=self.root)
            return
        job = self.store.add(text, cwd=self.root, queued=queued)
        assert job.id not in self.used
        self.used.add(job.id)
        self.known[job.id] = Known("stopped", device, name, text)
        if queued:
            self.to(job.id, "queued")

    @rule(data=st.data())
    def start(self, data: Any) -> None:
        job_id = self.some_job(data)
        known = self.known.get(job_id)
        if known is None or known.state not in ENDED or self.taken(known.name, but=job_id):
            with pytest.raises(UserError):
                self.store.start(job_id)
            return
        self.store.start(job_id)
        self.to(job_id, "queued")

    @rule(data=st.data(), kill=st.booleans())
    def stop(self, data: Any, kill: bool) -> None:
        job_id = self.some_job(data)
        known = self.known.get(job_id)
        if known is None or known.state in ENDED:
            with pytest.raises(UserError):
                self.store.ask_stop(job_id, kill=kill)
            return
        self.store.ask_stop(job_id, kill=kill)
        if known.state in ("queued", "starting"):
            self.to(job_id, "stopped")
            return
        known.stops = KILL if kill or known.stops == KILL else SAVE if known.stops == 0 else NOW
        if known.state == "running":
            self.to(job_id, "stopping")

    @rule(data=st.data(), name=NAMES, device=st.sampled_from(DEVICES), right=st.sampled_from([True, True, False]))
    def edit(self, data: Any, name: str, device: str, right: bool) -> None:
        job_id = self.some_job(data)
        known = self.known.get(job_id)
        text = job_text(self.root, name, device, note=len(self.used)) if right else "config: {}"
        clash = known is not None and known.state == "queued" and self.taken(name, but=job_id)
        if known is None or not right or known.state in ACTIVE or clash:
            with pytest.raises(UserError):
                self.store.edit(job_id, text)
            return
        self.store.edit(job_id, text)
        if known.state == "queued" and device != known.device:
            self.queues[known.device].remove(job_id)
            self.queues[device].append(job_id)
        known.name, known.device, known.text = name, device, text

    @rule(data=st.data())
    def clone(self, data: Any) -> None:
        job_id = self.some_job(data)
        known = self.known.get(job_id)
        if known is None:
            with pytest.raises(UserError):
                self.store.clone(job_id)
            return
        copy = self.store.clone(job_id)
        assert copy.id not in self.used
        self.used.add(copy.id)
        self.known[copy.id] = Known("stopped", known.device, known.name, known.text)

    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        job_id = self.some_job(data)
        known = self.known.get(job_id)
        if known is None or known.state in ACTIVE:
            with pytest.raises(UserError):
                self.store.delete(job_id)
            return
        self.store.delete(job_id)
        if known.state == "queued":
            self.queues[known.device].remove(job_id)
        del self.known[job_id]

    @rule(data=st.data(), place=st.integers(-1, 5))
    def move(self, data: Any, place: int) -> None:
        job_id = self.some_job(data)
        known = self.known.get(job_id)
        if known is None or known.state != "queued":
            with pytest.raises(UserError):
                self.store.move(job_id, place)
            return
        queue = self.queues[known.device]
        queue.remove(job_id)
        queue.insert(min(max(place, 1), len(queue) + 1) - 1, job_id)
        assert self.store.move(job_id, place).position == queue.index(job_id) + 1

    # --- what workers and supervisors report; also about attempts that are long over ------------------------------

    @rule(device=st.sampled_from(DEVICES))
    def claim(self, device: str) -> None:
        busy = any(known.state in ACTIVE and known.device == device for known in self.known.values())
        job = self.store.claim(device, SOMEONE)
        if busy or not self.queues[device]:
            assert job is None
            return
        assert job is not None
        assert job.id == self.queues[device][0]
        self.to(job.id, "starting")
        known = self.known[job.id]
        known.token, known.attempts, known.stops = job.token, known.attempts + 1, 0
        self.attempts.append(job)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def begin(self, data: Any) -> None:
        job = self.some_attempt(data)
        known = self.current(job)
        begun = self.store.begin(job, SOMEONE, SOMEONE, OomKills())
        assert begun == (known is not None and known.state == "starting")
        if begun:
            self.to(job.id, "running")

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), back=st.booleans())
    def never_began(self, data: Any, back: bool) -> None:
        job = self.some_attempt(data)
        known = self.current(job)
        done = self.store.hand_back(job) if back else self.store.give_up(job, "it could not")
        assert done == (known is not None and known.state == "starting")
        if done and back:
            self.to(job.id, "queued")
            queue = self.queues[self.known[job.id].device]
            queue.insert(0, queue.pop())
        elif done:
            self.to(job.id, "failed")

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), verdict=st.sampled_from(VERDICTS))
    def conclude(self, data: Any, verdict: Verdict) -> None:
        job = self.some_attempt(data)
        known = self.current(job)
        if known is not None and known.state == "starting":
            return  # a supervisor concludes what it has begun
        assert self.store.conclude(job, verdict) == (known is not None)
        if known is not None:
            self.to(job.id, end_state(verdict.cause))

    @rule()
    def the_worker_may_leave_only_when_there_is_nothing_to_do(self) -> None:
        self.store.enlist(SOMEONE)
        busy = any(known.state in ("queued", *ACTIVE) for known in self.known.values())
        assert self.store.retire(SOMEONE) != busy
        assert (self.store.worker() is None) != busy

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.root / "queue")
        for job_id, known in self.known.items():
            assert self.store.text(job_id) == known.text

    # --- what must always hold -----------------------------------------------------------------------------------

    @initialize(begun=st.integers(0, 3))
    def some_jobs(self, begun: int) -> None:
        """Begin with a queue, and often in the middle of things: short sequences then reach far."""
        assert self.store.jobs() == []
        for name, device in zip("ABCDE", ("cpu", "cpu", "cpu", "cuda:0", "cuda:0"), strict=True):
            self.add(name, device, queued=True)
        for device in DEVICES[: (begun + 1) // 2]:
            self.claim(device)
        if begun > 1:
            assert self.store.begin(self.attempts[0], SOMEONE, SOMEONE, OomKills())
            self.to(self.attempts[0].id, "running")

    @invariant()
    def the_store_is_as_the_model(self) -> None:
        jobs = {job.id: job for job in self.store.jobs()}
        assert {job_id: job.state for job_id, job in jobs.items()} == {
            i: known.state for i, known in self.known.items()
        }
        for job_id, known in self.known.items():
            job = jobs[job_id]
            assert (job.state, job.device, job.name) == (known.state, known.device, known.name)
            assert (job.attempts, job.token) == (known.attempts, known.token)
            assert job.run_folders == (self.root / "output" / known.name,)
            assert known.state not in ("running", "stopping") or job.stops == known.stops
            assert (job.cause is None) == (known.state in ("queued", *ACTIVE))
        for device, queue in self.queues.items():
            waiting = sorted((job.position, job.id) for job in jobs.values() if job.device == device and job.position)
            assert waiting == list(enumerate(queue, 1))
            assert sum(job.state in ACTIVE and job.device == device for job in jobs.values()) <= 1
        idle = [
            d for d in DEVICES if self.queues[d] and not any(j.state in ACTIVE and j.device == d for j in jobs.values())
        ]
        assert self.store.waiting_devices() == idle
        assert self.store.has_work() == any(known.state in ("queued", *ACTIVE) for known in self.known.values())


HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large]
TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=HEALTH)


@pytest.mark.slow
class TestStoreForLonger(StoreMachine.TestCase):
    settings = settings(max_examples=400, stateful_step_count=80, deadline=None, suppress_health_check=HEALTH)
