"""The pages of jobs: what they hold, and that their scripts and templates belong together."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import web_client
from detour.web.pages import HERE
from web_jobs import add, store_of

HOSTILE = "<img src=x onerror=alert(1)>"
PAGES = {  # page -> its template, and the scripts that it loads
    "/jobs": ("jobs.html", ["jobs.js", "ask.js", "words.js"]),
    "/jobs/1": ("job.html", ["job.js", "job_curves.js", "job_samples.js", "job_tabs.js", "matrix.js", "chart.js",
                             "ask.js", "words.js"]),
    "/compare": ("compare.html", ["compare.js", "job_curves.js", "matrix.js", "chart.js", "words.js"]),
}  # fmt: skip
SCRIPTS = sorted({script for _, scripts in PAGES.values() for script in scripts})
MADE_BY_SCRIPTS = {"ask-input", "ask-title", "viewer-title", "scrubber", "wipe"}


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    client = web_client.signed_in(tmp_path / "folder")
    add(store_of(client), HOSTILE)
    return client


def source(script: str) -> str:
    return (HERE / "static" / script).read_text(encoding="utf-8")


@pytest.mark.parametrize("address", [*PAGES, "/compare?a=1&b=<script>"])
def test_a_page_holds_nothing_of_the_users_as_html(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert HOSTILE not in answer.text
    assert "<script>" not in answer.text
    assert not re.search(r"\son\w+=|javascript:|\sstyle=", answer.text.replace(escape(HOSTILE), ""))
    addresses = re.findall(r'(?:href|src)="(/static/[^"]+)"', answer.text)
    assert len(addresses) > 2
    for found in addresses:
        assert client.get(found).status_code == 200, found


def test_a_job_that_is_not_there_has_a_page_that_says_so(client: TestClient) -> None:
    answer = client.get("/jobs/99")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "there is no job 99" in answer.text
    assert client.get("/jobs/x1").status_code == 404


@pytest.mark.parametrize("address", PAGES)
def test_scripts_find_what_they_look_for(client: TestClient, address: str) -> None:
    """Every element that a script names by its id is in the page, or is made by a script."""
    template, scripts = PAGES[address]
    ids = set(re.findall(r'\sid="([\w-]+)"', client.get(address).text))
    wanted = {name for script in scripts for name in re.findall(r'\bat\("([\w-]+)"\)', source(script))}
    if template == "compare.html":  # which makes no `Overview`
        wanted -= set(re.findall(r'at\("([\w-]+)"\)', source("job_curves.js").split("export class Overview")[1])) - {
            "smoothing"
        }
    assert wanted - ids - MADE_BY_SCRIPTS == set()
    labelled = set(re.findall(r'\sfor="([\w-]+)"', client.get(address).text))
    assert labelled <= ids


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_make_no_html_from_text_and_import_what_there_is(script: str) -> None:
    text = source(script)
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|\.srcdoc"
    assert not re.search(banned, text)
    imports = re.findall(r'import \{([^}]+)\} from "\./([\w.]+)";', text)
    assert len(imports) == text.count("\nimport ") + text.startswith("import ")
    for names, module in imports:
        exported = set(re.findall(r"export (?:async )?(?:class|function|const) (\w+)", source(module)))
        assert {name.strip() for name in names.split(",")} <= exported, module


def test_scripts_ask_only_what_the_api_answers(client: TestClient) -> None:
    """Addresses in the scripts, with their parts in braces, are routes of the API, by the same method."""
    routes = {
        (method.upper(), re.sub(r"\{\w+\}", "*", path))
        for path, methods in client.get("/api/openapi.json").json()["paths"].items()
        for method in methods
    }
    asked = set()
    for script in SCRIPTS:
        text = source(script).replace("${this.root}", "/api/jobs/${n}").replace("${root}", "/api/jobs/${n}")
        for method, address in re.findall(r'api\("(\w+)", [`"](/api[^`"]*)[`"]', text):
            asked.add((method, re.sub(r"\$\{\w[^}]*\}", "*", address.partition("?")[0]).rstrip("*").rstrip("/") or "/"))
    known = {(method, path.rstrip("*").rstrip("/")) for method, path in routes}
    assert len(asked) > 12
    assert asked - known == set()
