"""What Detour is built on (group 19 of docs/security.md), as far as it can be checked without a network: all of it is
declared, pinned, free, and at or above the versions in which known holes were closed. `make audit` asks for new ones.
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = ("quant", "optim", "tensorboard", "trackio", "dev")
"""The extras that `make` installs."""

FIXED = {
    "pillow": ("12.2", "CVE-2026-40192: a FITS file that unpacks without end"),
    "torch": ("2.10", "CVE-2025-32434 and CVE-2026-24747: code in files that are loaded with weights_only"),
    "wandb": ("0.29", "CVE-2026-91771: a name of a file from the server leads out of the folder"),
}
"""Of what Detour is built on: the version in which holes of that kind were closed."""
NEVER = {"gradio", "nicegui", "mlflow", "ray", "aim", "keras", "lightning", "pytorch-lightning", "streamlit"}
"""Servers and loaders that were broken into by way of what Detour does itself; some have no fixed version."""

FREE = {
    "0BSD", "Apache 2.0", "Apache Software", "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC",
    "MIT", "MIT-CMU", "MPL-2.0", "Mozilla Public License 2.0", "PSF-2.0", "Python Software Foundation", "Unlicense",
    "Zlib", "3-Clause BSD",
}  # fmt: skip
"""Licences under which the dependencies of a program under Apache-2.0 may be."""
SILENT = {"torchao": "BSD-3-Clause"}
"""What the metadata does not say; from the LICENSE file."""
NOT_FREE = re.compile(r"nvidia-.*|cuda-.*")
"""Comes with torch's builds for NVIDIA's cards, under NVIDIA's terms."""


def needed(requirement: str) -> Requirement:
    return Requirement(requirement)


def closure() -> dict[str, metadata.Distribution]:
    """Everything that `make` installs for Detour, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [("detour", frozenset(INSTALLED))]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = metadata.distribution(name)
        for one in map(needed, found[name].requires or []):
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
                waiting.append((canonicalize_name(one.name), frozenset(one.extras)))
    del found["detour"]
    return found


@pytest.fixture(scope="module")
def installed() -> dict[str, metadata.Distribution]:
    found = closure()
    assert len(found) > 80
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(sign == "==" and Version(version) for _, sign, version in pairs), "a pin is name==version"
    return {canonicalize_name(name): version for name, _, version in pairs}


def declared() -> Iterator[Requirement]:
    for one in [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]:
        if not one.startswith("detour["):
            yield needed(one)


def test_everything_that_is_installed_is_pinned(installed: dict[str, metadata.Distribution]) -> None:
    held = pins()
    assert sorted(name for name in installed if name not in held and not NOT_FREE.fullmatch(name)) == []
    assert sorted(set(held) - set(installed)) == [], "nothing needs these any more"


def test_known_holes_are_closed() -> None:
    """In what is pinned, and in the oldest version that somebody else's pins could take."""
    held = pins()
    ranges = {canonicalize_name(one.name): one for one in declared()}
    for name, (fixed, hole) in FIXED.items():
        oldest = [Version(part.version) for part in ranges[name].specifier if part.operator in (">=", "==")]
        assert oldest, f"{name} has no lowest version ({hole})"
        assert max(oldest) >= Version(fixed), f"{name}: {hole}"
        if name in held:
            assert Version(held[name]) >= Version(fixed), f"{name}: {hole}"


def test_every_range_has_a_lowest_version_that_the_pin_fits() -> None:
    held = pins()
    for one in declared():
        assert any(part.operator == ">=" for part in one.specifier), f"{one}: from which version on?"
        name = canonicalize_name(one.name)
        assert name not in held or one.specifier.contains(held[name]), f"{one}, pinned {held[name]}"


def test_what_was_broken_into_elsewhere_is_not_among_them(installed: dict[str, metadata.Distribution]) -> None:
    assert not NEVER & set(installed)
    assert not NEVER & {canonicalize_name(one.name) for one in declared()}


def test_nothing_is_imported_that_is_not_declared() -> None:
    """What another dependency brings along may go with its next version."""
    names = {canonicalize_name(one.name) for one in declared()}
    owners = metadata.packages_distributions()
    wrong: dict[str, str] = {}
    count = 0
    for path in sorted((ROOT / "src" / "detour").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for module in {module.partition(".")[0] for module in modules} - {"detour"} - sys.stdlib_module_names:
                count += 1
                if not {canonicalize_name(name) for name in owners.get(module, [module])} & names:
                    wrong[module] = path.name
    assert wrong == {}
    assert count > 100


def test_what_could_not_be_asked_is_no_clean_bill(capsys: pytest.CaptureFixture[str]) -> None:
    """`make audit` where there is no network, or a mirror that knows of no holes."""
    audit = runpy.run_path(str(ROOT / ".ci" / "audit"))
    clean = {"name": "a", "version": "1", "vulns": []}
    unknown = {"name": "b", "version": "1", "skip_reason": "not found on PyPI"}
    hole = {"name": "c", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    found = [audit["judge"](listed) for listed in ([clean], [clean, unknown], [clean, unknown, hole])]
    assert found == [0, 2, 1]
    said = capsys.readouterr()
    assert "c 1: CVE-1, fixed in 2" in said.out
    assert "not found on PyPI" in said.err


def licences(distribution: metadata.Distribution) -> list[str]:
    """The parts of what it says of its licence."""
    about = distribution.metadata
    kinds = [line.split("::")[-1] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    said = about.get("License-Expression") or "; ".join(kinds) or (about.get("License") or "").strip().split("\n")[0]
    parts = re.split(r";|\bAND\b|\bOR\b|\(|\)", said or SILENT.get(canonicalize_name(about["Name"]), ""))
    return [part.strip().removesuffix(" License") for part in parts if part.strip() not in ("", "MPL 2.0", "ISCL")]


def test_licences_are_free(installed: dict[str, metadata.Distribution]) -> None:
    found = {name: licences(one) for name, one in installed.items() if not NOT_FREE.fullmatch(name)}
    wrong = {name: parts for name, parts in found.items() if not parts or set(parts) - FREE}
    assert wrong == {}


def test_the_page_on_security_names_tests_that_there_are() -> None:
    rows = re.findall(
        r"^\| (\d+) \|.*\|(.*)\|$", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [int(number) for number, _ in rows] == list(range(1, 21))
    for number, cell in rows:
        files = re.findall(r"`(tests/[\w/]+\.py)`", cell)
        assert files, number
        assert [file for file in files if not (ROOT / file).is_file()] == [], number
