"""Taking LoRAs home: other formats, ComfyUI's folder, the model card and the archive for the hub."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from starlette.testclient import TestClient

import runs_made
import web_client
from detour.web import archive, exporting

FAKE = """\
import os, sys, time
source, target, _, arch, _, fmt = sys.argv[1:]
here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "ran"), "a") as log:
    log.write(f"{arch} {fmt}\\n")
while os.path.exists(os.path.join(here, "hold")):
    time.sleep(0.01)
if os.path.exists(os.path.join(here, "fail")):
    print("note: something first", file=sys.stderr)
    sys.exit("error: a LoKr in the format kohya: no loader finds it\\n  use comfy")
with open(source, "rb") as file, open(target, "wb") as out:
    out.write(file.read()[:-1] + fmt[:1].encode())  # still a whole LoRA, and not the same
print("note: ComfyUI does not know these names", file=sys.stderr)
print(f"{target} (8 layers, proven by loading with diffusers.loaders.ZImageLoraLoaderMixin)")
"""


@dataclass
class Bench:
    """A signed-in browser, a job that has run, and a converter that takes no time."""

    client: TestClient
    run: runs_made.Made
    job: int
    comfyui: Path
    fake: Path

    def get(self, address: str = "exports") -> Any:
        answer = self.client.get(f"/api/jobs/{self.job}/{address}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def make(self, lora: str, fmt: str) -> dict[str, Any]:
        """Ask for a LoRA in a format, and wait until it is there or not."""
        answer = self.client.post(f"/api/jobs/{self.job}/exports", json={"lora": lora, "format": fmt})
        assert answer.status_code == 202, answer.text
        return self.until(lambda: next(f for f in self.get()["files"] if f["id"] == f"{lora}.{fmt}"))

    def send(self, lora: str = "1-final-comfy", name: str = "zig", *, replace: bool = False) -> dict[str, Any]:
        answer = self.client.post(
            f"/api/jobs/{self.job}/comfyui", json={"lora": lora, "name": name, "replace": replace}
        )
        assert answer.status_code == 202, answer.text
        return self.until(lambda: self.get()["sent"])

    def until(self, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while (found := look())["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return found

    @property
    def ran(self) -> list[str]:
        """What the converter was asked for."""
        log = self.fake / "ran"
        return log.read_text().splitlines() if log.exists() else []

    def tree(self) -> dict[str, bytes]:
        """Every file that is there, but the database's own."""
        root = self.run.folder.parents[1]
        return {str(p): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and "queue.db" not in p.name}


def bench(root: Path, **sections: Any) -> Bench:
    run = runs_made.whole(root / "private home", **sections)
    comfyui = root / "private home" / "ComfyUI"
    (comfyui / "models" / "loras").mkdir(parents=True)
    client = web_client.signed_in(root / "private home" / "queue", comfyui=comfyui)
    store = client.app.state.context.store  # type: ignore[attr-defined]
    job = store.add((run.folder / "job.yaml").read_text(encoding="utf-8"), cwd=root, queued=False)
    fake = root / "fake"
    fake.mkdir()
    (fake / "convert.py").write_text(FAKE)
    return Bench(client, run, job.id, comfyui, fake)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Bench:
    made = bench(tmp_path)
    monkeypatch.setattr(exporting, "CONVERT", (sys.executable, "-S", "-E", str(made.fake / "convert.py")))
    return made


# --- what there is --------------------------------------------------------------------------------------------------


def test_what_is_offered(here):
    found = here.get()
    assert [(lora["id"], lora["name"], lora["step"]) for lora in found["loras"]] == [
        ("1-final-comfy", "zig.safetensors", None),
        ("1-5-comfy", "zig-000000005.safetensors", 5),
    ]
    assert all(lora["formats"] == ["comfy", "diffusers", "kohya"] for lora in found["loras"])
    assert found["loras"][0]["bytes"] == (here.run.folder / "zig.safetensors").stat().st_size
    assert found["files"] == []
    assert found["comfyui"] == str(here.comfyui / "models" / "loras")
    assert found["name"] == "zig"
    assert found["base"] is None  # the job names a folder of this machine
    assert found["how"] == (
        "Load LoRA with strength 1, then sample with 8 steps and cfg 1. "
        "Without the training adapter: it was on only while the LoRA learnt."
    )


def test_formats_are_those_that_the_architecture_has(tmp_path):
    """No program reads kohya's names of Lumina 2."""
    from detour import archs

    made = bench(tmp_path, model={"arch": "lumina2", "assistant_lora_path": None})
    expected = list(archs.spec("lumina2").lora_keys.formats)
    assert made.get()["loras"][0]["formats"] == expected == ["comfy", "diffusers"]
    answer = made.client.post(f"/api/jobs/{made.job}/exports", json={"lora": "1-final-comfy", "format": "kohya"})
    assert answer.status_code == 400
    assert answer.json()["error"] == "no program reads a LoRA of Lumina 2 in the format kohya"


def test_a_job_that_has_not_begun_has_nothing(here):
    store = here.client.app.state.context.store
    text = store.text(here.job).replace("output_name: zig", "output_name: zag")
    job = store.add(text, cwd=here.run.folder, queued=False)
    found = here.client.get(f"/api/jobs/{job.id}/exports").json()
    assert (found["loras"], found["files"], found["how"]) == ([], [], "")
    assert here.client.get(f"/jobs/{job.id}/export").status_code == 200


def test_other_files_and_links_are_not_offered(here, tmp_path):
    other = tmp_path / "secret.safetensors"
    other.write_bytes(b"secret")
    (here.run.folder / "other.safetensors").write_bytes(b"x")
    (here.run.folder / "zig-000000009.safetensors").symlink_to(other)
    (here.run.folder / "zig.kohya.safetensors").mkdir()
    assert [lora["id"] for lora in here.get()["loras"]] == ["1-final-comfy", "1-5-comfy"]


def test_a_full_fine_tune_has_no_lora(tmp_path):
    made = bench(tmp_path, network={"type": "full", "linear": 32}, model={"assistant_lora_path": None})
    assert made.get()["loras"] == []


def test_a_published_base_model_is_known(tmp_path):
    made = bench(tmp_path, model={"name_or_path": "Tongyi-MAI/Z-Image-Turbo"})
    assert made.get()["base"] == "Tongyi-MAI/Z-Image-Turbo"


# --- formats --------------------------------------------------------------------------------------------------------


def test_a_lora_is_converted_kept_and_downloaded(here):
    made = here.make("1-5-comfy", "diffusers")
    assert (made["state"], made["name"]) == ("done", "zig-000000005.diffusers.safetensors")
    assert made["proof"] == "8 layers, proven by loading with diffusers.loaders.ZImageLoraLoaderMixin"
    assert made["notes"] == ["ComfyUI does not know these names"]
    assert here.ran == ["zimage diffusers"]
    answer = here.client.get(f"/api/jobs/{here.job}/exports/1-5-comfy.diffusers")
    assert answer.content == (here.run.folder / "zig-000000005.safetensors").read_bytes()[:-1] + b"d"
    assert answer.headers["content-disposition"] == 'attachment; filename="zig-000000005.diffusers.safetensors"'
    assert answer.headers["content-type"] == "application/octet-stream"
    kept = here.client.app.state.context.store.job_folder(here.job) / "exports" / "1"
    assert (kept / "zig-000000005.diffusers.safetensors").read_bytes() == answer.content
    assert here.make("1-5-comfy", "diffusers")["state"] == "done"
    assert here.ran == ["zimage diffusers"]  # not again


def test_the_lora_as_it_is_needs_no_converting(here):
    answer = here.client.get(f"/api/jobs/{here.job}/exports/1-final-comfy.comfy")
    assert answer.content == (here.run.folder / "zig.safetensors").read_bytes()
    assert answer.headers["content-disposition"] == 'attachment; filename="zig.safetensors"'
    asked = here.client.post(f"/api/jobs/{here.job}/exports", json={"lora": "1-final-comfy", "format": "comfy"})
    assert (asked.status_code, asked.json()["state"], here.ran) == (202, "done", [])


def test_one_whose_lora_has_changed_is_made_again(here):
    here.make("1-final-comfy", "kohya")
    runs_made.write_lora(here.run.folder / "zig.safetensors", 99)  # the run went on
    assert here.get()["files"] == []
    assert here.client.get(f"/api/jobs/{here.job}/exports/1-final-comfy.kohya").status_code == 409
    assert here.make("1-final-comfy", "kohya")["state"] == "done"
    assert len(here.ran) == 2


def test_what_was_made_goes_with_the_job(here):
    here.make("1-final-comfy", "kohya")
    store = here.client.app.state.context.store
    store.delete(here.job)
    assert not store.job_folder(here.job).exists()
    assert (here.run.folder / "zig.safetensors").exists()


def test_progress_is_seen_and_one_conversion_is_enough(here):
    (here.fake / "hold").touch()
    body = {"lora": "1-final-comfy", "format": "kohya"}
    answers = [here.client.post(f"/api/jobs/{here.job}/exports", json=body).json() for _ in range(3)]
    assert [answer["state"] for answer in answers] == ["running"] * 3
    time.sleep(0.05)
    assert here.get()["files"][0]["seconds"] >= 0.05
    early = here.client.get(f"/api/jobs/{here.job}/exports/1-final-comfy.kohya")
    assert early.status_code == 409
    assert "has not been made yet" in early.json()["error"]
    (here.fake / "hold").unlink()
    assert here.make("1-final-comfy", "kohya")["state"] == "done"
    assert here.ran == ["zimage kohya"]


def test_what_the_converter_refuses_is_said_in_its_words_and_can_be_tried_again(here):
    (here.fake / "fail").touch()
    failed = here.make("1-final-comfy", "kohya")
    assert failed["state"] == "failed"
    assert failed["error"] == "a LoKr in the format kohya: no loader finds it\n  use comfy"
    (here.fake / "fail").unlink()
    assert here.make("1-final-comfy", "kohya")["state"] == "done"


def test_a_converter_that_dies_without_a_word(here, monkeypatch):
    monkeypatch.setattr(exporting, "CONVERT", (sys.executable, "-c", "import os; os.abort()"))
    failed = here.make("1-final-comfy", "kohya")
    assert (failed["state"], failed["error"]) == ("failed", "`detour convert` ended with exit code -6")


@pytest.mark.parametrize(
    "export_id",
    ["1-final-comfy", "1-final-comfy.", "1-final-comfy.safetensors", "2-final-comfy.comfy", "1-7-comfy.comfy",
     "zig.safetensors", "..%2f..%2fjob.comfy", "%2e%2e%2fx.comfy", "1-final-comfy.json", "%00.comfy"],
)  # fmt: skip
def test_ids_are_looked_up_and_never_paths(here, export_id):
    for address in (f"exports/{export_id}", f"card/{export_id}", f"card/{export_id}/archive.zip"):
        answer = here.client.get(f"/api/jobs/{here.job}/{address}")
        assert answer.status_code in (404, 409), address
        assert b"tensor" not in answer.content


def test_unknown_jobs_and_loras(here):
    assert here.client.get("/api/jobs/99/exports").status_code == 404
    assert here.client.get("/jobs/99/export").status_code == 404
    body = {"lora": "1-7-comfy", "format": "comfy"}
    assert here.client.post(f"/api/jobs/{here.job}/exports", json=body).status_code == 404
    assert here.client.post(f"/api/jobs/{here.job}/exports", json=body | {"path": "/x"}).status_code == 422


def test_looking_changes_nothing(here):
    before = here.tree()
    lora = "1-final-comfy.comfy"
    assert here.client.get(f"/jobs/{here.job}/export").status_code == 200
    for address in ("exports", f"exports/{lora}", f"card/{lora}", f"card/{lora}/README.md", f"card/{lora}/archive.zip"):
        assert here.client.get(f"/api/jobs/{here.job}/{address}").status_code == 200
    assert here.tree() == before


# --- ComfyUI --------------------------------------------------------------------------------------------------------


def test_a_lora_is_sent_to_comfyui(here):
    umask = os.umask(0o027)
    try:
        sent = here.send()
    finally:
        os.umask(umask)
    target = here.comfyui / "models" / "loras" / "zig.safetensors"
    assert sent["state"] == "done"
    assert sent["says"].startswith(f"{target} is written: 3.5 KiB, 8 layers, proven by loading with diffusers.loaders.")
    assert target.read_bytes() == (here.run.folder / "zig.safetensors").read_bytes()[:-1] + b"c"  # as it was converted
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert here.ran == ["zimage comfy"]
    assert [path.name for path in target.parent.iterdir()] == ["zig.safetensors"]


def test_a_file_that_is_there_is_never_overwritten_silently(here):
    target = here.comfyui / "models" / "loras" / "mine.safetensors"
    target.write_bytes(b"of somebody else")
    answer = here.client.post(f"/api/jobs/{here.job}/comfyui", json={"lora": "1-5-comfy", "name": "mine"})
    assert answer.status_code == 409
    assert answer.json()["error"].startswith("mine.safetensors is there already (16 bytes of 2")
    assert here.ran == []
    assert target.read_bytes() == b"of somebody else"
    assert here.send("1-5-comfy", "mine", replace=True)["state"] == "done"
    assert target.read_bytes() == (here.run.folder / "zig-000000005.safetensors").read_bytes()[:-1] + b"c"


def test_nor_one_that_comes_while_the_lora_is_converted(here):
    (here.fake / "hold").touch()
    body = {"lora": "1-final-comfy", "name": "zig"}
    assert here.client.post(f"/api/jobs/{here.job}/comfyui", json=body).json()["state"] == "running"
    target = here.comfyui / "models" / "loras" / "zig.safetensors"
    target.write_bytes(b"faster")
    (here.fake / "hold").unlink()
    sent = here.until(lambda: here.get()["sent"])
    assert sent["state"] == "failed"
    assert "is there already" in sent["says"]
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"faster"]


def test_links_and_folders_are_not_replaced(here, tmp_path):
    folder = here.comfyui / "models" / "loras"
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "link"):
        body = {"lora": "1-final-comfy", "name": name, "replace": True}
        answer = here.client.post(f"/api/jobs/{here.job}/comfyui", json=body)
        assert answer.status_code == 409
        assert "is a link or a folder" in answer.json()["error"]
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", ".", "/etc/x", "a\\b", "a\0b", "con", "x.", " x", "a:b", "x" * 151]
)
def test_names_stay_in_the_folder(here, name):
    answer = here.client.post(f"/api/jobs/{here.job}/comfyui", json={"lora": "1-final-comfy", "name": name})
    assert answer.status_code in (400, 422)
    assert here.ran == []
    assert list((here.comfyui / "models" / "loras").iterdir()) == []


@pytest.mark.parametrize("name", ["a..b", "Jürgen 2", "絵", "🎨 x"])
def test_honest_names_pass(here, name):
    assert here.send(name=name)["state"] == "done"
    assert (here.comfyui / "models" / "loras" / f"{name}.safetensors").is_file()


def test_without_a_comfyui(here, tmp_path):
    client = web_client.signed_in(here.client.app.state.context.folder)
    assert client.get(f"/api/jobs/{here.job}/exports").json()["comfyui"] is None
    body = {"lora": "1-final-comfy", "name": "zig"}
    answer = client.post(f"/api/jobs/{here.job}/comfyui", json=body)
    assert answer.status_code == 400
    assert "detour ui --comfyui DIR" in answer.json()["error"]
    (here.comfyui / "models" / "loras").rmdir()
    answer = here.client.post(f"/api/jobs/{here.job}/comfyui", json=body)
    assert answer.status_code == 400
    assert "is not a ComfyUI folder, or is not mounted" in answer.json()["error"]
    assert not (here.comfyui / "models" / "loras").exists()


# --- the card -------------------------------------------------------------------------------------------------------


def test_the_card_and_the_archive(here):
    card = here.get("card/1-final-comfy.comfy?base=Tongyi-MAI/Z-Image-Turbo&repository=me/zig")
    assert "base_model: Tongyi-MAI/Z-Image-Turbo" in card["text"]
    assert "pipe.load_lora_weights('me/zig', weight_name='zig.safetensors')" in card["text"]
    assert card["pictures"] == 2
    query = "?base=Tongyi-MAI/Z-Image-Turbo&repository=me/zig"
    text = here.client.get(f"/api/jobs/{here.job}/card/1-final-comfy.comfy/README.md{query}")
    assert text.text == card["text"]
    assert text.headers["content-disposition"] == "attachment; filename*=UTF-8''README.md"
    answer = here.client.get(f"/api/jobs/{here.job}/card/1-final-comfy.comfy/archive.zip{query}")
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''zig.zip"
    with zipfile.ZipFile(BytesIO(answer.content)) as found:
        assert found.testzip() is None
        assert found.namelist() == [
            "README.md",
            "zig.safetensors",
            "images/000000010-00.png",
            "images/000000010-01.png",
        ]
        assert found.read("README.md").decode() == card["text"]
        assert found.read("zig.safetensors") == (here.run.folder / "zig.safetensors").read_bytes()
        picture = here.run.folder / "samples" / "000000010-01.png"
        assert found.read("images/000000010-01.png") == picture.read_bytes()
    assert abs(len(answer.content) - card["bytes"]) < 2000


def test_the_card_of_another_format_is_about_that_file(here):
    assert here.client.get(f"/api/jobs/{here.job}/card/1-5-comfy.diffusers").status_code == 409
    here.make("1-5-comfy", "diffusers")
    card = here.get("card/1-5-comfy.diffusers")
    made = here.client.get(f"/api/jobs/{here.job}/exports/1-5-comfy.diffusers").content
    assert hashlib.sha256(made).hexdigest() in card["text"]
    assert "trained for 5 steps" in card["text"]
    assert "000000005-00.png" in card["text"]
    assert "weight_name='zig-000000005.diffusers.safetensors'" in card["text"]


@pytest.mark.parametrize("name", ["../x", "a", "a/b/c", "https://x/y", "a b/c", "a/b\n- x", "<img>/x"])
def test_names_on_the_hub_are_checked(here, name):
    for field in ("base", "repository"):
        answer = here.client.get(f"/api/jobs/{here.job}/card/1-final-comfy.comfy", params={field: name})
        assert answer.status_code == 422


def test_nothing_private_gets_out(tmp_path, monkeypatch):
    """Everything in the archive, and the card, whatever the job file holds."""
    made = bench(
        tmp_path, meta={"token": "hf_topsecret"}, train={"cache_folder": str(tmp_path / "hidden")},
        logging={"project_name": "classified"},
    )  # fmt: skip
    made.client.put("/api/settings/hub-token", json={"token": "hf_topsecret"})
    answer = made.client.get(f"/api/jobs/{made.job}/card/1-final-comfy.comfy/archive.zip")
    with zipfile.ZipFile(BytesIO(answer.content)) as found:
        content = b"".join(found.read(name) for name in found.namelist())
    for secret in (str(tmp_path), "private", "hidden", "hf_topsecret", "classified", "/elsewhere", os.environ["PATH"]):
        assert secret.encode() not in content, secret


def test_an_archive_of_large_files_is_never_held_as_a_whole(tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(50_000_000)
    pieces = [len(piece) for piece in archive.chunks([("a", b"text"), ("b", large)])]
    assert max(pieces) <= 2 * archive.CHUNK
    assert sum(pieces) > 50_000_000
    with zipfile.ZipFile(BytesIO(b"".join(archive.chunks([("ü/a", b"text"), ("b", large)])))) as found:
        assert found.read("ü/a") == b"text"
        assert found.getinfo("b").file_size == 50_000_000
        assert found.testzip() is None
    assert b"".join(archive.chunks([("a", b"x")])) == b"".join(archive.chunks([("a", b"x")]))


# --- the real converter ---------------------------------------------------------------------------------------------


@pytest.mark.slow  # ten seconds of torch and diffusers
def test_the_real_converter(tmp_path):
    """In a process of its own, as a user's click starts it."""
    made = bench(tmp_path)
    file = made.make("1-final-comfy", "diffusers")
    assert (file["state"], file["error"]) == ("done", "")
    assert file["proof"] == "1 layers, proven by loading with diffusers.loaders.ZImageLoraLoaderMixin"
    data = made.client.get(f"/api/jobs/{made.job}/exports/1-final-comfy.diffusers").content
    (tmp_path / "got.safetensors").write_bytes(data)
    with safe_open(tmp_path / "got.safetensors", framework="np") as lora:
        assert set(lora.keys()) == {f"transformer.layers.0.attention.to_q.lora_{part}.weight" for part in "AB"}
        assert json.loads(lora.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 4
