"""Tokens, login links, sessions, and those who guess."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

import web_client
from detour import UserError, files
from detour.jobs.store import Store
from detour.web import access
from detour.web.access import FREE, LINK, LONGEST, SESSION, Access, Throttle, ThrottledError
from detour.web.app import create_app
from detour.web.context import Context
from detour.web.guard import Site
from web_client import ORIGIN, PORT, TOKEN, ask

HERE = "127.0.0.1"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that are added to all clocks."""
    added, monotonic, now = [0.0], time.monotonic, time.time_ns
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + added[0])
    monkeypatch.setattr(time, "time_ns", lambda: now() + int(added[0] * 1e9))
    return added


@pytest.fixture
def keys(tmp_path: Path) -> Access:
    file = tmp_path / "token"
    return Access(access.from_file(file), file)


@pytest.fixture
def client(tmp_path: Path, keys: Access) -> TestClient:
    app = create_app(Context(store=Store(tmp_path / "queue", create=True)), keys, Site(port=PORT))
    return TestClient(app, base_url=ORIGIN, headers={"Origin": ORIGIN})


# --- links and sessions ---


def test_a_link_opens_a_session_once(client: TestClient, keys: Access) -> None:
    assert client.get("/settings").status_code == 401
    code = keys.code()
    answer = client.post("/api/login", json={"code": code})
    assert answer.status_code == 200
    assert client.get("/settings").status_code == 200
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"detour-{PORT}=")
    for part in ("HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={int(SESSION)}"):
        assert part in cookie
    assert "Domain" not in cookie
    again = client.post("/api/login", json={"code": code})
    assert again.status_code == 401
    assert "used already" in again.json()["error"]
    assert "set-cookie" not in again.headers


def test_the_token_opens_a_session(client: TestClient, keys: Access) -> None:
    assert keys.file is not None
    assert client.post("/api/login", json={"token": keys.file.read_text().strip()}).status_code == 200
    assert client.get("/settings").status_code == 200


@pytest.mark.parametrize("given", [{}, {"token": ""}, {"token": "wrong"}, {"code": "wrong"}, {"code": "1-2-3"}])
def test_anything_else_opens_none(client: TestClient, given: dict[str, str]) -> None:
    answer = client.post("/api/login", json=given)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert client.get("/settings").status_code == 401


def test_what_was_sent_is_not_repeated(client: TestClient) -> None:
    for body in (
        {"token": ["hush-hush"]},
        {"tokens": "hush-hush"},
        {"token": "hush-hush" * 200},
        {"code": "hush-hush"},
    ):
        answer = client.post("/api/login", json=body)
        assert answer.status_code in (401, 422)
        assert "hush-hush" not in answer.text
    broken = client.post("/api/login", content=b'{"token": "hush-hush', headers={"Content-Type": "application/json"})
    assert broken.status_code == 422
    assert "hush-hush" not in broken.text


def test_logging_out(client: TestClient, keys: Access) -> None:
    client.post("/api/login", json={"code": keys.code()})
    answer = client.delete("/api/session", headers={"Content-Type": "application/json"})
    assert answer.status_code == 200
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert client.get("/settings").status_code == 401


def test_logging_out_everywhere_ends_all_sessions_links_and_the_token(client: TestClient, keys: Access) -> None:
    assert keys.file is not None
    token, link, elsewhere = keys.file.read_text().strip(), keys.code(), keys.session()
    client.post("/api/login", json={"code": keys.code()})
    assert client.post("/api/session/renew", json={}).status_code == 200
    assert client.get("/settings").status_code == 200, "this browser has a new session"
    client.cookies.clear()
    name = f"detour-{PORT}"
    assert client.get("/settings", headers={"Cookie": f"{name}={elsewhere}"}).status_code == 401
    assert client.get("/settings", headers={"Authorization": f"Bearer {token}"}).status_code == 401
    assert client.post("/api/login", json={"token": token}).status_code == 401
    assert client.post("/api/login", json={"code": link}).status_code == 401
    new = keys.file.read_text().strip()
    assert new != token
    assert stat.S_IMODE(keys.file.stat().st_mode) == 0o600
    assert client.get("/settings", headers={"Authorization": f"Bearer {new}"}).status_code == 200


def test_a_token_of_the_environment_is_not_changed(tmp_path: Path) -> None:
    client = web_client.signed_in(tmp_path)
    answer = client.post("/api/session/renew", json={})
    assert answer.status_code == 400
    assert "DETOUR_TOKEN" in answer.json()["error"]
    assert client.get("/settings").status_code == 200


def test_links_and_sessions_grow_old(clock: list[float]) -> None:
    keys = Access(TOKEN)
    code, session = keys.code(), keys.session()
    clock[0] = LINK + 1
    assert not keys.log_in(HERE, code=code)
    assert keys.log_in(HERE, code=keys.code())
    assert keys.is_session(session)
    clock[0] = SESSION + 1
    assert not keys.is_session(session)


def test_links_from_before_a_server_began_are_refused() -> None:
    """It cannot know which of them were used. Sessions go on."""
    before = Access(TOKEN)
    used, unused, session = before.code(), before.code(), before.session()
    assert before.log_in(HERE, code=used)
    after = Access(TOKEN)
    assert not after.log_in(HERE, code=used)
    assert not after.log_in(HERE, code=unused)
    assert after.is_session(session)
    assert after.log_in(HERE, code=before.code()), "whoever has the token can make links for a server that runs"


def test_kinds_are_not_mixed_up() -> None:
    keys = Access(TOKEN)
    assert not keys.is_session(keys.code())
    assert not keys.is_session(TOKEN)
    assert not keys.log_in(HERE, code=keys.session())
    assert not Access(TOKEN + "x").is_session(keys.session())


@given(st.text(max_size=100))
def test_no_text_is_a_session_or_a_code(text: str) -> None:
    keys = Access(TOKEN)
    assert not keys.is_session(text)
    assert not keys.log_in(HERE, code=text, token=text)


@given(st.integers(0, 66), st.sampled_from("0123456789abcdefx-"))
def test_no_character_of_a_session_can_be_changed(place: int, character: str) -> None:
    keys = Access(TOKEN)
    session = keys.session()
    changed = session[: place % len(session)] + character + session[place % len(session) + 1 :]
    assert keys.is_session(changed) == (changed == session)


def test_a_code_is_used_once_by_many_at_once() -> None:
    keys = Access(TOKEN)
    code, good = keys.code(), []
    barrier = threading.Barrier(4)

    def use() -> None:
        barrier.wait()
        good.append(keys.log_in(HERE, code=code))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(good) == [False, False, False, True]


def test_comparisons_take_the_same_time_wherever_texts_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's function, with bytes: it refuses texts that are not ASCII."""
    asked = []
    real = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: asked.append((a, b)) or real(a, b))
    keys = Access(TOKEN)
    assert not keys.log_in(HERE, token="wröng")
    assert asked == [("wröng".encode(), TOKEN.encode())]
    assert keys.is_session(keys.session())
    assert not keys.log_in(HERE, code="1-2-3")
    assert len(asked) == 3
    source = Path(access.__file__).read_text()
    assert "== self._token" not in source
    assert "mac ==" not in source


# --- guessing ---


def test_guessing_becomes_slow(clock: list[float]) -> None:
    keys = Access(TOKEN)
    tried, waited = 0, 0.0
    while waited < 3600 and tried < 1000:
        try:
            assert not keys.log_in(HERE, token=f"guess {tried}")
            tried += 1
        except ThrottledError as error:
            clock[0] += error.seconds
            waited += error.seconds
    assert tried < FREE + 10 + 3600 / LONGEST
    assert not keys.log_in(HERE, token="one more")
    with pytest.raises(ThrottledError):
        keys.log_in(HERE, token=TOKEN)  # else the wait would be no hindrance
    assert keys.log_in("127.0.0.2", token=TOKEN), "others do not wait"
    clock[0] += LONGEST
    assert keys.log_in(HERE, token=TOKEN)


def test_failures_are_forgotten_and_few_are_remembered(clock: list[float]) -> None:
    throttle = Throttle()
    for number in range(access.ADDRESSES * 2):
        throttle.failed(f"10.0.{number // 256}.{number % 256}")
    assert len(throttle.failures) == access.ADDRESSES
    clock[0] += access.FORGET + 1
    throttle.failed(HERE)
    assert len(throttle.failures) == 1


def test_an_ipv6_network_is_one_address() -> None:
    throttle = Throttle()
    for number in range(FREE + 1):
        throttle.failed(f"2001:db8::{number}")
    with pytest.raises(ThrottledError):
        throttle.check("2001:db8::ffff")
    throttle.check("2001:db8:0:1::1")


@pytest.mark.parametrize("how", ["login", "bearer"])
def test_headers_do_not_change_where_guesses_come_from(client: TestClient, keys: Access, how: str) -> None:
    """X-Forwarded-For and its kin are written by whoever asks."""
    session = keys.session()

    def guess(number: int, client_address: str = "10.1.1.1") -> web_client.Answer:
        forged = f"10.9.8.{number}"
        headers = {"Host": web_client.HOST, "Origin": ORIGIN, "Content-Type": "application/json"}
        headers |= {
            "X-Forwarded-For": forged,
            "X-Real-IP": forged,
            "Forwarded": f"for={forged}",
            "True-Client-IP": forged,
        }
        if how == "bearer":
            headers["Authorization"] = f"Bearer guess {number}"
            return ask(client.app, "GET", "/api/settings", headers, client=client_address)
        return ask(client.app, "POST", "/api/login", headers, b'{"token": "guess"}', client=client_address)

    assert [guess(number).status for number in range(FREE)] == [401] * FREE
    slow = guess(FREE)
    assert slow.status == 429
    assert int(slow.header("retry-after") or 0) >= 1
    assert guess(0, "10.1.1.2").status == 401
    cookie = {"Host": web_client.HOST, "Cookie": f"detour-{PORT}={session}"}
    assert ask(client.app, "GET", "/api/settings", cookie, client="10.1.1.1").status == 200, "sessions do not wait"


# --- where the token comes from ---


def test_the_token_file_is_made_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "token"
    token = access.from_file(file)
    assert len(token) >= 40
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert access.from_file(file) == token
    assert access.from_file(tmp_path / "other") != token


def test_a_token_file_is_never_open_to_others_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    write = files._write

    def watched(fd: int, data: memoryview) -> int:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir())
        return write(fd, data)

    monkeypatch.setattr(files, "_write", watched)
    access.from_file(tmp_path / "token")
    assert modes == [0o600]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602])
def test_a_token_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    file.write_text("a" * 40)
    file.chmod(mode)
    with pytest.raises(UserError, match="chmod 600"):
        access.from_file(file)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40])
def test_what_is_no_token(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(UserError, match="token"):
        access.from_file(file)


def test_the_environments_token_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that workers, jobs and whatever they start do not have it."""
    import os

    monkeypatch.setenv("DETOUR_TOKEN", "a" * 20)
    assert access.from_environment() == "a" * 20
    assert "DETOUR_TOKEN" not in os.environ
    assert access.from_environment() is None
    for weak in ("", "a" * 15):
        monkeypatch.setenv("DETOUR_TOKEN", weak)
        with pytest.raises(UserError, match="at least 16"):
            access.from_environment()
