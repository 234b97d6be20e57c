"""Who may use the UI: one secret token, and what is made from it.

The token opens everything: it is typed on the login page, or sent by scripts (`Authorization: Bearer`). From it come
one-time codes for login links and the values of session cookies, as keyed hashes (HMAC-SHA256, RFC 2104). Nothing of
that is kept: whoever has the token can make codes, and another token ends every session and every code.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import stat
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from detour import UserError, files

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "DETOUR_TOKEN"
FILE = "ui.token"
SHORTEST = 16  # characters of a token that somebody chose: with the throttle, no guessing within a lifetime
SESSION = 30 * 86400.0  # seconds
LINK = 86400.0  # seconds for which an unused login link is good
FREE = 5  # wrong tokens or codes before an address has to wait
LONGEST = 60.0  # seconds that an address waits at most between two attempts
FORGET = 600.0  # seconds after which an address's failures are forgotten
ADDRESSES = 1024  # whose failures are remembered


class ThrottledError(UserError):
    """Too many wrong tokens or codes came from an address."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too many wrong attempts; try again in {seconds:.0f} s")
        self.seconds = seconds


@dataclass
class Throttle:
    """Failures by address. The address is that of the connection: what headers say of it, anyone can write."""

    failures: dict[str, tuple[int, float]] = field(default_factory=dict)
    """How many, and when the last one was, in seconds of `time.monotonic`."""

    def check(self, address: str) -> None:
        """ThrottledError if the address has to wait still."""
        count, last = self.failures.get(_network(address), (0, 0.0))
        wait = min(2.0 ** (count - FREE), LONGEST) if count >= FREE else 0.0
        left = last + wait - time.monotonic()
        if left > 0:
            raise ThrottledError(max(1.0, left))

    def failed(self, address: str) -> None:
        """Note one more."""
        now, who = time.monotonic(), _network(address)
        self.failures = {key: kept for key, kept in self.failures.items() if now - kept[1] < FORGET}
        count, _ = self.failures.pop(who, (0, 0.0))
        if len(self.failures) >= ADDRESSES:
            del self.failures[next(iter(self.failures))]  # the one that has been quiet for longest
        self.failures[who] = (min(count + 1, FREE + 10), now)


class Access:
    """The token of a server, and its codes and sessions. May be shared by threads."""

    def __init__(self, token: str, file: Path | None = None) -> None:
        """`file` is where the token lies; without one it came from the environment, and cannot be changed here."""
        self.file = file
        self.generation = 0
        """Counts the tokens there were: what was let in under an earlier one has to go."""
        self._token = token
        self._born = time.time_ns()
        self._used: dict[str, int] = {}  # codes that were used, and when they were made, in nanoseconds
        self._throttle = Throttle()
        self._lock = threading.Lock()

    def log_in(self, address: str, *, token: str = "", code: str = "") -> bool:
        """Whether the token is right, or the code, which is used up by this. ThrottledError after too many were not."""
        with self._lock:
            self._throttle.check(address)
            good = self._redeem(code) if code else _same(token, self._token)
            if not good:
                self._throttle.failed(address)
            return good

    def code(self) -> str:
        """A new one-time code for a login link, good for a day."""
        return self._signed("code", time.time_ns())

    def session(self) -> str:
        """The value of a new session's cookie."""
        return self._signed("session", time.time_ns())

    def is_session(self, value: str) -> bool:
        """Whether a cookie is one of ours, of this token, and not too old."""
        made = self._made("session", value)
        return made is not None and time.time_ns() - made < SESSION * 1e9

    def rotate(self) -> None:
        """Take another token: every session ends. UserError where the token is not ours to change."""
        if self.file is None:
            raise UserError(f"the token comes from {VARIABLE}; change it there and start `detour ui` again")
        with self._lock:
            self._token = _write_new(self.file)
            self.generation += 1

    def _redeem(self, code: str) -> bool:
        made = self._made("code", code)
        now = time.time_ns()
        # Codes from before this server began are refused, since it cannot know which of them were used.
        if made is None or not self._born <= made <= now or now - made > LINK * 1e9 or code in self._used:
            return False
        self._used = {used: then for used, then in self._used.items() if now - then < LINK * 1e9} | {code: made}
        return True

    def _signed(self, kind: str, now: int) -> str:
        text = f"{now:x}-{secrets.token_hex(8)}"
        return f"{text}-{self._mac(kind, text)}"

    def _made(self, kind: str, value: str) -> int | None:
        """When a code or session was made, in nanoseconds; None if it was not made with this token."""
        text, _, mac = value.rpartition("-")
        if not text or not _same(mac, self._mac(kind, text)):
            return None
        return int(text.partition("-")[0], 16)

    def _mac(self, kind: str, text: str) -> str:
        return hmac.digest(self._token.encode(), f"{kind} {text}".encode(), "sha256").hex()[:32]  # 128 bits


def from_environment() -> str | None:
    """The token in `DETOUR_TOKEN`, taken out of the environment: jobs and what they start have no use for it."""
    token = os.environ.pop(VARIABLE, None)
    if token is not None and len(token) < SHORTEST:
        raise UserError(
            f"{VARIABLE} has {len(token)} characters and needs at least {SHORTEST}; "
            f"`python -c 'import secrets; print(secrets.token_urlsafe())'` makes a good one"
        )
    return token


def from_file(path: Path) -> str:
    """The token in a file, which is made if it is not there. UserError if others may read it, or it is too short."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return _write_new(path)
    if os.name != "nt" and stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(
            f"{path} holds the token and others may read it; `chmod 600 {path}`, or remove it for a new one"
        )
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the token cannot be read ({error}); remove the file for a new one") from None
    if len(token) < SHORTEST:
        raise UserError(f"{path} holds no token of at least {SHORTEST} characters; remove the file for a new one")
    return token


def _write_new(path: Path) -> str:
    token = secrets.token_urlsafe()  # 256 bits
    files.write_bytes(path, token + "\n", private=True)
    return token


def _same(given: str, right: str) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode(errors="replace"), right.encode())


def _network(address: str) -> str:
    """An IPv6 host has a network of 2^64 addresses to itself, and is known by that."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))
