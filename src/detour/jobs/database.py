"""The queue's SQLite file: opening, transactions, and its failures as sentences.

Write-ahead log and `synchronous = FULL`: what is committed survives a crash of any process and of the machine. Every
change is one `BEGIN IMMEDIATE` transaction, so that what was read in it is still true when it writes. The table of
legal changes is in the file too: a job cannot get into a wrong state, whoever writes to it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from detour import UserError, files
from detour.jobs.states import ALLOWED, UnknownJobError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

NAME = "queue.db"
VERSION = 1
APPLICATION = 0x44544F52  # "DTOR", in the file's header
OLDEST = (3, 37)  # of November 2021: the first with STRICT tables
PATIENCE = 10.0  # seconds to wait for another process's transaction
LITTLE = 1 << 20  # bytes: with less left on the disk, SQLite's input/output errors are a full disk's

_SCHEMA = """
CREATE TABLE job (
  id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given out twice
  name TEXT NOT NULL,
  device TEXT NOT NULL,
  state TEXT NOT NULL,
  position INTEGER,  -- place among the queued jobs of its device, from 1
  cause TEXT,
  reason TEXT NOT NULL,
  exit_code INTEGER,
  source TEXT NOT NULL,  -- paths as JSON
  cwd TEXT NOT NULL,
  run_folders TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  token TEXT,  -- names the attempt that is under way
  stops INTEGER NOT NULL,
  worker TEXT,
  supervisor TEXT,
  process TEXT,
  oom TEXT,
  created REAL NOT NULL,
  started REAL,
  ended REAL,
  CHECK ((state = 'queued') = (position IS NOT NULL)),
  CHECK ((state IN ('starting', 'running', 'stopping')) = (token IS NOT NULL)),
  CHECK ((state IN ('running', 'stopping')) = (process IS NOT NULL))
) STRICT;
CREATE TABLE document (
  id INTEGER PRIMARY KEY REFERENCES job ON DELETE CASCADE,
  text TEXT NOT NULL  -- the job file as it was written
) STRICT;
CREATE UNIQUE INDEX one_at_work_on_a_device ON job (device) WHERE state IN ('starting', 'running', 'stopping');
CREATE UNIQUE INDEX places ON job (device, position) WHERE position IS NOT NULL;
CREATE TABLE change (old TEXT NOT NULL, new TEXT NOT NULL, PRIMARY KEY (old, new)) STRICT;
CREATE TRIGGER legal_change BEFORE UPDATE OF state ON job
  WHEN OLD.state != NEW.state AND NOT EXISTS (SELECT 1 FROM change WHERE old = OLD.state AND new = NEW.state)
  BEGIN SELECT RAISE(ABORT, 'there is no such change of state'); END;
CREATE TRIGGER legal_beginning BEFORE INSERT ON job
  WHEN NEW.state NOT IN ('queued', 'stopped')
  BEGIN SELECT RAISE(ABORT, 'a job cannot begin in this state'); END;
CREATE TRIGGER legal_end BEFORE DELETE ON job
  WHEN OLD.state IN ('starting', 'running', 'stopping')
  BEGIN SELECT RAISE(ABORT, 'a job that is at work cannot be deleted'); END;
CREATE TABLE worker (only INTEGER PRIMARY KEY CHECK (only = 1), process TEXT NOT NULL) STRICT;
"""


class FolderGoneError(UserError):
    """The queue's folder is not there any more, or another one has its name."""


class Database:
    """A connection, for all threads of a process."""

    def __init__(self, folder: Path, *, create: bool) -> None:
        self.path = folder / NAME
        if sqlite3.sqlite_version_info < OLDEST:
            raise UserError(f"the job queue needs SQLite 3.37 or newer; this Python has {sqlite3.sqlite_version}")
        if create:
            files.make_folder(folder)
        elif not self.path.is_file():
            raise UserError(
                f"there is no job queue in {folder}; `detour queue add JOB.yaml` makes one (--folder: where)"
            )
        self._lock = threading.RLock()
        with _explained(self.path), files.explained(self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | files.BINARY, 0o600)  # job texts are the user's own
            opened = os.fstat(fd)
            os.close(fd)
            self._inode = (opened.st_dev, opened.st_ino)
            self._db = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            if self._pragma("user_version") == 0:
                with _alone(folder / "create.lock"):
                    self._prepare()
            self._check()
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._db.close()

    def check_there(self) -> None:
        """FolderGoneError if the file has been moved, removed or replaced: what is written into it would be lost."""
        try:
            now = self.path.stat()
        except OSError:
            now = None
        if now is None or (now.st_dev, now.st_ino) != self._inode:
            raise FolderGoneError(
                f"{self.path.parent}: the queue's folder was moved, removed or replaced while it was in use; bring it "
                f"back. Jobs that are running go on, since they write into their own folders"
            )

    def read(self, sql: str, values: tuple[object, ...] | Mapping[str, object] = ()) -> list[sqlite3.Row]:
        """The rows that a query gives."""
        self.check_there()
        with self._lock, _explained(self.path):
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything inside is done, durably, or nothing of it."""
        self.check_there()
        with self._lock, _explained(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # after some failures SQLite has rolled back by itself
                    self._db.execute("ROLLBACK")
                raise

    def _pragma(self, name: str) -> int | str:
        value: int | str = self._db.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def _prepare(self) -> None:
        """Make an empty file a queue. Another process may have done it a moment ago."""
        if self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            return
        if self._pragma("journal_mode = WAL") != "wal":
            raise UserError(
                f"{self.path.parent} cannot hold a job queue (a network folder?); choose one on a local disk"
            )
        with self.transaction() as db:
            for statement in _statements(_SCHEMA):
                db.execute(statement)
            pairs = [(old, new) for old, news in ALLOWED.items() for new in news]
            db.executemany("INSERT INTO change (old, new) VALUES (?, ?)", pairs)
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {VERSION}")

    def _check(self) -> None:
        """Refuse a file that is something else, or newer than this program."""
        if self._pragma("application_id") != APPLICATION:
            raise UserError(f"{self.path} is not a job queue; move it away, or choose another folder (--folder)")
        version = int(self._pragma("user_version"))
        if version > VERSION:
            raise UserError(f"{self.path} is of version {version}, and this Detour knows {VERSION}; update Detour")


def _statements(script: str) -> Iterator[str]:
    """`executescript` would commit the transaction that it stands in."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two processes that make the same queue at once: one makes it, the other finds it."""
    from filelock import FileLock, Timeout

    try:
        with files.explained(path), FileLock(path, timeout=PATIENCE):
            yield
    except Timeout:
        raise UserError(f"{path.parent}: another program has been opening this queue for {PATIENCE:.0f} s") from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the failures of a disk into sentences; mistakes of this program pass as they are."""
    try:
        yield
    except OverflowError:
        raise UnknownJobError(f"{path}: no job has so large a number") from None
    except sqlite3.OperationalError as error:
        raise _explanation(path, error.sqlite_errorcode & 0xFF, error) from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise
        raise UserError(
            f"{path} is damaged or no database ({error}); move it away to begin with an empty queue"
        ) from error


def _explanation(path: Path, code: int, error: sqlite3.OperationalError) -> Exception:
    trouble = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
    free = files.free_bytes(path)
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and free < LITTLE):
        return files.DiskFullError(
            f"{path} cannot be written: no space ({free / 2**20:.0f} MiB free). Free some; the queue is as it was"
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UserError(f"{path} has been in use by another program for {PATIENCE:.0f} s; try again")
    if code in trouble:
        return UserError(f"{path} cannot be used ({error}); look at the owner and mode of its folder and at its disk")
    return error
