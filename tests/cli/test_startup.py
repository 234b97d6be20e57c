"""Commands that need no model load no heavy library: what a command imports is counted in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "safetensors", "torchao", "bitsandbytes",
    "huggingface_hub", "tokenizers", "psutil",
}  # fmt: skip

# Runs `detour ARGUMENTS` and prints, last on standard error, the packages that were imported meanwhile.
PROBE = """
import json, sys
from detour.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code or 0
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([code, loaded]), file=sys.stderr)
"""


def imported(*arguments: object) -> set[str]:
    """The packages that a command imports; it must succeed."""
    command = [sys.executable, "-c", PROBE, *(str(argument) for argument in arguments)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    code, loaded = json.loads(ran.stderr.splitlines()[-1])
    assert code == 0, ran.stderr
    return set(loaded)


def test_the_probe_sees_what_is_imported(tmp_path):
    assert "PIL" not in imported("--version")
    assert "ruamel" in imported("check", _job(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["--version"], ["archs", "--json"], ["schema"], ["nano", "--list"]],
    ids=" ".join,
)
def test_no_heavy_library(arguments):
    assert imported(*arguments) & HEAVY == set()


def test_help_needs_no_library_at_all():
    """Neither the heavy ones nor those that read job files and pictures."""
    assert imported("--help") & (HEAVY | {"pydantic", "ruamel", "PIL", "numpy", "rich", "filelock"}) == set()


def test_check_reads_job_and_pictures_without_a_heavy_library(tmp_path):
    found = imported("check", _job(tmp_path))
    assert {"pydantic", "PIL"} <= found
    assert found & HEAVY == set()


def _job(folder: Path) -> Path:
    from PIL import Image

    (folder / "pictures").mkdir(exist_ok=True)
    Image.effect_noise((64, 64), 50).save(folder / "pictures" / "a.png")
    (folder / "pictures" / "a.txt").write_text("a")
    job = folder / "job.yaml"
    job.write_text(
        "config:\n  output_name: x\n  process:\n  - type: train\n    model: {arch: zimage}\n    datasets:\n"
        f"    - {{folder_path: '{folder / 'pictures'}', resolution: 64}}\n"
    )
    return job
