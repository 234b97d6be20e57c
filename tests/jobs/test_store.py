"""The store's errors, files and guards. What may follow what is tested against a model in test_store_model.py."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from detour import UserError
from detour.config.document import JobError
from detour.config.load import load_text
from detour.files import DiskFullError
from detour.jobs import frozen
from detour.jobs.database import FolderGoneError
from detour.jobs.processes import OomKills, Process
from detour.jobs.states import ACTIVE, ALLOWED, StateError, Verdict
from detour.jobs.store import Job, Store, default_folder
from detour.train.session import run_folder
from queueing import job_text

SOMEONE = Process(1, "2", "3", "4")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "queue", create=True)
    yield store
    store.close()


def add(store: Store, name: str = "zig", **meta) -> Job:
    root = store.folder.parent
    return store.add(job_text(root, name, **meta), cwd=root)


def running(store: Store, name: str = "zig") -> Job:
    add(store, name)
    job = store.claim("cpu", SOMEONE)
    assert job is not None
    assert store.begin(job, SOMEONE, SOMEONE, OomKills())
    return store.job(job.id)


# --- adding ---------------------------------------------------------------------------------------------------------


def test_every_mistake_of_a_job_file_shows_when_it_is_queued(store, tmp_path):
    text = "config:\n  output_name: zig\n  process:\n    - type: train\n      train: {stepz: 3}\n      device: tpu\n"
    with pytest.raises(JobError) as caught:
        store.add(text, cwd=tmp_path, source="my.yaml")
    message = str(caught.value)
    assert "my.yaml:5" in message
    assert "stepz" in message
    assert "my.yaml:6" in message
    assert store.jobs() == []


@pytest.mark.parametrize(
    "text", ["", "\0", "a: \ud800", "[1, 2]", "x" * 600_000, "a: &a [*a]", "config: !!python/object:os.system {}"]
)
def test_text_that_is_no_job_file_is_refused(store, tmp_path, text):
    with pytest.raises(UserError):
        store.add(text, cwd=tmp_path)
    assert store.jobs() == []


def test_the_text_is_kept_as_written_and_relative_paths_keep_their_meaning(store, tmp_path):
    text = "# my notes ü\n" + job_text(tmp_path).replace(json.dumps(str(tmp_path / "output")), '"out/../results"')
    job = store.add(text, cwd=tmp_path)
    assert store.text(job.id) == text
    assert job.run_folders == (tmp_path / "results" / "zig",)
    assert job.cwd == tmp_path


def test_the_folders_are_those_that_the_run_writes_to(store, tmp_path):
    data = json.loads(job_text(tmp_path, "a/b: c"))
    data["config"]["process"] *= 2
    job = store.add(json.dumps(data), cwd=tmp_path)
    loaded = load_text(json.dumps(data)).job
    assert job.run_folders == (run_folder(loaded), run_folder(loaded, 1))
    assert [folder.name for folder in job.run_folders] == ["a_b_ c", "a_b_ c_2"]


def test_two_jobs_for_one_folder_do_not_wait_or_run_at_once(store):
    first = add(store)
    with pytest.raises(UserError, match=f"job {first.id} .queued. writes to .*zig too; change config.output_name"):
        add(store)
    copy = store.clone(first.id)
    with pytest.raises(UserError, match="writes to"):
        store.start(copy.id)
    store.ask_stop(first.id)
    assert store.start(copy.id).state == "queued"
    with pytest.raises(UserError, match="writes to"):
        store.start(first.id)


def test_processes_of_a_job_share_a_device(store, tmp_path):
    data = json.loads(job_text(tmp_path))
    data["config"]["process"] = [data["config"]["process"][0], data["config"]["process"][0] | {"device": "cuda:1"}]
    with pytest.raises(UserError, match="share one device, found cpu and cuda:1"):
        store.add(json.dumps(data), cwd=tmp_path)


def test_auto_and_cuda_wait_for_each_other(monkeypatch, tmp_path):
    assert frozen.queue_of("cuda") == frozen.queue_of("cuda:0") == "cuda:0"
    assert frozen.queue_of("cuda:1") == "cuda:1"
    monkeypatch.setattr(frozen, "_CARDS", (tmp_path / "none",))
    assert frozen.queue_of("auto") == ("mps" if sys.platform == "darwin" else "cpu")
    monkeypatch.setattr(frozen, "_CARDS", (tmp_path / "none", tmp_path))
    assert frozen.queue_of("auto") == "cuda:0"


def test_names_and_paths_of_any_kind(tmp_path):
    """Blanks, quotes, other alphabets, and bytes that are no UTF-8."""
    odd = tmp_path / os.fsdecode(b"a 'b\" \xff \xe7\x8c\xab")
    odd.mkdir()
    store = Store(odd / "queue", create=True)
    job = store.add(job_text(tmp_path, "猫; $(rm -rf /) 'x'"), cwd=odd, source=str(odd / "job.yaml"))
    assert store.job(job.id) == job
    assert job.cwd == odd
    assert job.source == str(odd / "job.yaml")
    store.close()


# --- changing -------------------------------------------------------------------------------------------------------


def test_a_job_at_work_is_neither_edited_nor_deleted_nor_moved_nor_started(store):
    job = running(store)
    for act in (
        lambda: store.edit(job.id, store.text(job.id)),
        lambda: store.delete(job.id),
        lambda: store.move(job.id, 1),
        lambda: store.start(job.id),
    ):
        with pytest.raises(StateError, match=f"job {job.id} is running"):
            act()
    assert store.job(job.id) == job


def test_a_wrong_edit_changes_nothing(store, tmp_path):
    job = add(store)
    with pytest.raises(JobError):
        store.edit(job.id, job_text(tmp_path).replace('"steps"', '"steps').replace("}", ""))
    assert store.text(job.id) == job_text(tmp_path)
    assert store.job(job.id) == job


def test_deleting_forgets_the_job_and_keeps_what_it_trained(store):
    job = add(store)
    result = job.run_folders[0] / "zig.safetensors"
    result.parent.mkdir(parents=True)
    result.write_bytes(b"weeks of work")
    store.job_folder(job.id).mkdir(parents=True)
    (store.job_folder(job.id) / "log-1.txt").write_text("a log")
    store.delete(job.id)
    assert result.read_bytes() == b"weeks of work"
    assert not store.job_folder(job.id).exists()
    assert add(store).id > job.id  # numbers are not given out again
    with pytest.raises(UserError, match=f"there is no job {job.id}; `detour queue list`"):
        store.job(job.id)


@pytest.mark.parametrize("number", [0, -1, 999, 2**63, 10**30])
def test_a_number_that_no_job_has(store, number):
    for act in (store.job, store.text, store.start, store.ask_stop, store.delete, store.clone):
        with pytest.raises(UserError, match="no job"):
            act(number)


def test_a_late_report_about_an_earlier_attempt_changes_nothing(store):
    first = running(store)
    assert store.ask_stop(first.id).stops == 1
    assert store.conclude(first, Verdict("killed", "killed", -9))
    store.start(first.id)
    second = store.claim("cpu", SOMEONE)
    assert store.begin(second, SOMEONE, SOMEONE, OomKills())
    now = store.job(first.id)
    assert not store.conclude(first, Verdict("finished", "finished", 0))
    assert not store.begin(first, SOMEONE, SOMEONE, OomKills())
    assert not store.hand_back(first)
    assert not store.give_up(first, "no")
    assert store.job(first.id) == now
    assert (now.attempts, now.stops) == (2, 0)
    assert store.ask_stop(first.id).stops == 1  # not the second: it saves


# --- the file's own guards --------------------------------------------------------------------------------------------


def test_the_file_refuses_every_change_of_state_that_the_table_lacks(store):
    """Also from a program that knows nothing of our code."""
    job = add(store)
    raw = sqlite3.connect(store.folder / "queue.db", isolation_level=None)
    raw.execute("PRAGMA ignore_check_constraints = ON")  # so that the trigger alone speaks
    for old in ALLOWED:
        for new in ALLOWED:
            raw.execute("BEGIN")
            sql = raw.execute("SELECT sql FROM sqlite_schema WHERE name = 'legal_change'").fetchone()[0]
            raw.execute("DROP TRIGGER legal_change")
            raw.execute("UPDATE job SET state = ?", (old,))
            raw.execute(sql)
            if new in ALLOWED[old] or new == old:
                raw.execute("UPDATE job SET state = ?", (new,))
            else:
                with pytest.raises(sqlite3.IntegrityError, match="no such change"):
                    raw.execute("UPDATE job SET state = ?", (new,))
            if raw.in_transaction:
                raw.execute("ROLLBACK")
    raw.close()
    assert store.job(job.id) == job


def test_the_file_refuses_two_jobs_at_work_on_a_device_and_half_states(store):
    running(store, "a")
    add(store, "b")
    raw = sqlite3.connect(store.folder / "queue.db", isolation_level=None)
    for sql, reason in (
        ("UPDATE job SET state = 'starting', token = 'x', position = NULL WHERE name = 'b'", "UNIQUE"),
        ("UPDATE job SET position = NULL WHERE name = 'b'", "CHECK"),
        ("UPDATE job SET process = NULL WHERE name = 'a'", "CHECK"),
        ("DELETE FROM job WHERE name = 'a'", "at work cannot be deleted"),
        ("INSERT INTO job SELECT 9, 'c', device, state, NULL, cause, reason, exit_code, source, cwd, run_folders, "
         "attempts, token, stops, worker, supervisor, process, oom, created, started, ended FROM job WHERE name = 'a'",
         "cannot begin in this state"),
    ):  # fmt: skip
        with pytest.raises(sqlite3.IntegrityError, match=reason):
            raw.execute(sql)
    raw.close()


def test_the_states_are_those_of_the_file(store):
    raw = sqlite3.connect(store.folder / "queue.db")
    assert set(raw.execute("SELECT old, new FROM change")) == {
        (old, new) for old, news in ALLOWED.items() for new in news
    }
    index = raw.execute("SELECT sql FROM sqlite_schema WHERE name = 'one_at_work_on_a_device'").fetchone()[0]
    assert all(f"'{state}'" in index for state in ACTIVE)
    assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()
    assert store._database._pragma("synchronous") == 2  # FULL


def test_only_its_owner_reads_the_queue(store):
    for path in store.folder.glob("queue.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


# --- opening ----------------------------------------------------------------------------------------------------------


def test_a_queue_that_is_not_there_is_not_made_by_looking(tmp_path):
    with pytest.raises(UserError, match=r"there is no job queue in .*; `detour queue add JOB.yaml` makes one"):
        Store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "queue.db").write_bytes(b"these are not the pages of a database" * 200)
    with pytest.raises(UserError, match="damaged or no database"):
        Store(tmp_path)
    (tmp_path / "queue.db").unlink()
    other = sqlite3.connect(tmp_path / "queue.db")
    other.execute("CREATE TABLE precious (x)")
    other.close()
    with pytest.raises(UserError, match="is not a job queue"):
        Store(tmp_path, create=True)


def test_a_queue_of_a_newer_version_is_left_alone(store):
    raw = sqlite3.connect(store.folder / "queue.db")
    raw.execute("PRAGMA user_version = 2")
    raw.close()
    with pytest.raises(UserError, match="is of version 2, and this Detour knows 1; update Detour"):
        Store(store.folder)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "queue").write_text("a file")
    with pytest.raises(UserError, match="is a file where a folder is needed"):
        Store(tmp_path / "queue", create=True)


def test_many_processes_make_one_queue_at_once(tmp_path):
    """Thirty times, side by side as far as the machine allows."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom detour.jobs.store import Store\n"
        "root = Path(sys.argv[1])\n"
        "while not (root / 'go').exists(): time.sleep(0.001)\n"
        "for number in range(30): assert Store(root / f'queue{number}', create=True).jobs() == []\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    (tmp_path / "go").touch()
    assert [(child.communicate()[0], child.returncode) for child in children] == [(b"", 0)] * 3


def test_a_queue_whose_making_was_interrupted_is_made(tmp_path):
    (tmp_path / "queue.db").touch(0o600)
    Store(tmp_path).close()
    assert Store(tmp_path).jobs() == []


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_nothing_is_lost(store, tmp_path):
    kept = [add(store, f"job {number}") for number in range(3)]
    raw = store._database._db
    pages = raw.execute("PRAGMA page_count").fetchone()[0]
    raw.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then fails as on a full disk
    with pytest.raises(DiskFullError, match=r"queue.db cannot be written: no space .* the queue is as it was"):
        add(store, "large", note="x" * 100_000)
    assert store.jobs() == kept
    raw.execute("PRAGMA max_page_count = 100000")
    assert add(store, "large", note="x" * 100_000).position == 4


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_vanishes_or_is_replaced(store, tmp_path, replaced):
    job = add(store)
    store.folder.rename(tmp_path / "elsewhere")
    if replaced:
        Store(tmp_path / "queue", create=True).close()
    for act in (store.jobs, lambda: store.ask_stop(job.id), lambda: add(store, "other")):
        with pytest.raises(FolderGoneError, match="was moved, removed or replaced while it was in use; bring it back"):
            act()
    if not replaced:
        assert not (tmp_path / "queue").exists()
        (tmp_path / "elsewhere").rename(tmp_path / "queue")
        assert store.jobs() == [job]


def test_a_transaction_that_fails_leaves_nothing(store):
    add(store)
    with pytest.raises(RuntimeError), store._database.transaction() as db:
        db.execute("UPDATE job SET name = 'half'")
        raise RuntimeError
    assert [job.name for job in store.jobs()] == ["zig"]


def test_threads_share_a_store(store):
    failures = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                job = add(store, f"{number}-{turn}")
                store.move(job.id, 1)
                store.jobs()
        except UserError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(job.position for job in store.jobs()) == list(range(1, 41))


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DETOUR_FOLDER", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("DETOUR_FOLDER")
    assert default_folder() == Path.home() / ".local" / "share" / "detour"
