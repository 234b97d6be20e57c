"""`detour ui` from its beginning to its end: one server for a folder, in this process.

A folder has one server. The queue would bear several (its changes are transactions, its worker holds a lock, and the
command line works on it at the same time), but what a server keeps to itself would not: which login links were used,
and which token is good. A second one would add nothing but these gaps: it refuses, and shows a new link to the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import uvicorn
from filelock import FileLock, Timeout

from detour import UserError, files
from detour.jobs import queue
from detour.jobs.states import ACTIVE
from detour.jobs.store import Store, default_folder
from detour.web import access
from detour.web.access import Access
from detour.web.app import create_app
from detour.web.context import Context
from detour.web.guard import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fastapi import FastAPI

PORT = 8675
LOOK = 2.0  # seconds between two comparisons of the queue with what lives
AGAIN = 10.0  # seconds between two attempts at bringing up a worker
FAREWELL = 1  # seconds for answers under way, such as a page's stream of events, when the server ends
RUNNING = "ui.json"  # where the folder's server can be reached, for a second one
OPENING = "open-ui.html"
_NAME = re.compile(r"(?P<name>[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?P<port>:\d{1,5})?", re.IGNORECASE)

_log = logging.getLogger("detour.web")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of `detour ui`."""

    host: str = "127.0.0.1"
    port: int = PORT
    """0: any that is free."""
    folder: Path = field(default_factory=default_folder)
    token_file: Path | None = None
    allow_hosts: Sequence[str] = ()
    comfyui: Path | None = None
    browser: bool = True


def serve(options: Options, say: Callable[[str], None]) -> int:
    """Serve until Ctrl-C. `say` gets the line with the login link. UserError says why it cannot begin."""
    host = "127.0.0.1" if options.host == "localhost" else options.host.strip("[]")
    names = _names(options)
    comfyui = _comfyui(options.comfyui)
    token = access.from_environment()
    if token is None and options.token_file is None and not _is_loopback(host):
        raise UserError(
            f"--host {host} lets other machines in, which needs a token of your own: set {access.VARIABLE}, or give "
            f"--token-file FILE (made if it is not there). To reach this machine from one other, "
            f"`ssh -L {options.port}:127.0.0.1:{options.port} THIS_MACHINE` does without"
        )
    store = Store(options.folder, create=True)
    file = options.token_file or store.folder / access.FILE
    with _alone(store), _listen(host, options.port) as listener:
        port = listener.getsockname()[1]
        keys = Access(token) if token is not None else Access(access.from_file(file), file)
        site = Site(port=port, names=_known(names, host, port), any_address=_is_any(host))
        app = create_app(Context(store=store, comfyui=comfyui), keys, site)
        address = "http://" + _authority({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)  # noqa: S104
        with _announced(store, address, None if token is not None else file), _keeping(store), _until_asked():
            say(f"Detour: {address}/login?code={keys.code()}  (works once; Ctrl-C ends the UI, jobs go on)")
            if not _is_loopback(host):
                _log.warning("what is sent over the network is not encrypted; ssh -L or a proxy with TLS does that")
            with _opened(store, f"{address}/login?code={keys.code()}", browser=options.browser):
                _run(app, listener)
    going = len(store.jobs(("queued", *ACTIVE)))
    jobs = "1 job goes on" if going == 1 else f"{going} jobs go on"
    say("the UI is closed" + (f"; {jobs}, `detour queue list` shows how far" if going else ""))
    return 0


# --- the HTTP server --------------------------------------------------------------------------------------------------


def _run(app: FastAPI, listener: socket.socket) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn.error").addFilter(_is_worth_saying)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # login links would stand in it
        proxy_headers=False,  # anyone can write X-Forwarded-For
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=FAREWELL,
    )
    uvicorn.Server(config).run([listener])


@contextlib.contextmanager
def _until_asked() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is inside, and are no failure. uvicorn ends in good order and sends them again."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """Not that pages that wait for events are cut off at the end, nor that one has gone while events came."""
    error = record.exc_info[1] if record.exc_info else None
    gone = isinstance(error, BaseExceptionGroup) and error.split(anyio.BrokenResourceError)[1] is None
    cut_off = isinstance(error, asyncio.CancelledError)
    return not gone and not cut_off and not record.getMessage().startswith("Cancel ")


# --- addresses --------------------------------------------------------------------------------------------------------


def _listen(host: str, port: int) -> socket.socket:
    """A socket that connections can queue at from now on. UserError says what is in the way."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:  # of names that lead nowhere too
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is taken by another program; end that, or choose another port: "
                f"`detour ui --port {port + 1 if port < 65535 else PORT}`"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs rights that you do not have; choose one above 1023 (--port)") from None
        raise UserError(
            f"--host {host}: this machine cannot listen there ({error.strerror}); 127.0.0.1 is for this machine, "
            f"0.0.0.0 for all its addresses"
        ) from None


def _names(options: Options) -> list[str]:
    """The names of `--allow-host`, which may have a port. UserError for what cannot stand in a `Host` header."""
    wrong = [name for name in options.allow_hosts if not _NAME.fullmatch(name)]
    if wrong:
        raise UserError(f"--allow-host {wrong[0]} is no name of a host, such as gpu-box, gpu-box:443 or [fd00::2]")
    return [name.lower() for name in options.allow_hosts]


def _known(names: Sequence[str], host: str, port: int) -> frozenset[str]:
    """The values of `Host` that are right besides loopback's. Without a port, a name stands for a proxy's too."""
    known = set() if _is_any(host) else {_authority(host, port)}
    for name in names:
        match = _NAME.fullmatch(name)
        assert match is not None
        known |= {name} if match["port"] else {name, f"{name}:{port}"}
    return frozenset(known)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host.lower()}:{port}"


def _is_any(host: str) -> bool:
    return host in ("0.0.0.0", "::")  # noqa: S104  # asked about, not listened at


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may come to mean something else


# --- one server for a folder ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    """Hold the folder. UserError says where its server is, with a new link."""
    lock = FileLock(store.folder / "ui.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(_served(store)) from None
    try:
        yield
    finally:
        lock.release()


def _served(store: Store) -> str:
    try:
        found = json.loads((store.folder / RUNNING).read_text(encoding="utf-8"))
        link = str(found["address"])
        if found["token_file"] is not None:
            link += f"/login?code={Access(access.from_file(Path(found['token_file']))).code()}"
    except (OSError, ValueError):
        return f"{store.folder} is just being opened by another `detour ui`"
    return (
        f"{store.folder} has its UI already (process {found['pid']}): {link}\n"
        f"Use that one, or end it first; --folder DIR makes another, with jobs of its own"
    )


@contextlib.contextmanager
def _announced(store: Store, address: str, token_file: Path | None) -> Iterator[None]:
    """Leave word of where the server is."""
    file = store.folder / RUNNING
    where = str(token_file.resolve()) if token_file else None
    files.write_bytes(file, json.dumps({"address": address, "pid": os.getpid(), "token_file": where}), private=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


# --- beside the requests ----------------------------------------------------------------------------------------------


class Keeper(threading.Thread):
    """Keeps the states true, and sees that queued jobs have a worker, whatever becomes of the one there was."""

    def __init__(self, store: Store) -> None:
        super().__init__(name="keeper", daemon=True)
        self._store = store
        self._end = threading.Event()
        self._said = ""
        self._ensured = -math.inf

    def run(self) -> None:
        """Until `close`."""
        while not self._end.wait(LOOK):
            self.tick()

    def tick(self) -> None:
        """Look once. What is in the way (a full disk, a folder that has gone) is said once, and tried again."""
        try:
            queue.settle(self._store)
            if self._store.waiting_devices() and time.monotonic() - self._ensured > AGAIN:
                self._ensured = time.monotonic()
                queue.ensure_worker(self._store, wait=False)
            self._said = ""
        except (UserError, OSError) as error:
            if str(error) != self._said:
                _log.warning("%s", error)
                self._said = str(error)

    def close(self) -> None:
        """End it."""
        self._end.set()
        self.join()


@contextlib.contextmanager
def _keeping(store: Store) -> Iterator[None]:
    keeper = Keeper(store)
    keeper.tick()  # before the first page is shown
    keeper.start()
    try:
        yield
    finally:
        keeper.close()


@contextlib.contextmanager
def _opened(store: Store, link: str, *, browser: bool) -> Iterator[None]:
    """Open the browser, if there is somebody who can see it.

    By a file that only its owner can read: a link on the browser's command line can be read by everyone (`ps`).
    """
    if not (browser and _has_display()):
        yield
        return
    file = store.folder / OPENING
    page = f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={escape(link)}">'
    files.write_bytes(file, page, private=True)
    threading.Thread(target=webbrowser.open, args=(file.as_uri(),), daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def _has_display() -> bool:
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _comfyui(folder: Path | None) -> Path | None:
    if folder is not None and not (folder / "models" / "loras").is_dir():
        raise UserError(f"--comfyui {folder} has no folder models/loras; give the folder in which ComfyUI's main.py is")
    return folder.resolve() if folder is not None else None
