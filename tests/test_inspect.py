"""`detour inspect` tells what a file or folder is, how it was made, and what is wrong with it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_cases as cases
from detour import UserError, files
from detour.archs.zimage import SPEC
from detour.export import write_lora
from detour.export.inspection import inspect_file
from detour.train import checkpoint


def inspect(path: Path) -> dict[str, object]:
    """As `--json` prints it: what is not JSON would fail here."""
    return json.loads(json.dumps(inspect_file(path), allow_nan=False))


@pytest.mark.parametrize("fmt", ["comfy", "diffusers", "kohya"])
def test_a_lora_of_each_format(tmp_path: Path, fmt: str) -> None:
    _, lora = cases.file_of("lora", alpha=2)
    path = tmp_path / "x.safetensors"
    metadata = {"detour.step": "250", "modelspec.title": "Jürgen"}
    write_lora(path, lora, cases.base(), fmt, dtype="bf16", metadata=metadata)
    facts = inspect(path)
    expected = {
        "what": "lora",
        "arch": "zimage",
        "format": fmt,
        "kind": "lora",
        "rank": 4,
        "alpha": 2.0,
        "ranks": {"4": 37},
        "alphas": {"2": 37},
        "modules": 37,
        "step": 250,
        "problem": None,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "dtypes": {"BF16": 74} | ({"F32": 37} if fmt != "diffusers" else {}),
    }
    assert {key: facts[key] for key in expected} == expected
    assert facts["targets"]["layers.*.attention.to_q"] == 2
    assert facts["targets"]["layers.*.attention.to_out.0"] == 2
    assert facts["targets"]["all_final_layer.2-1.linear"] == 1
    assert facts["metadata"]["modelspec.title"] == "Jürgen"


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_other_kinds(tmp_path: Path, kind: str) -> None:
    _, lora = cases.file_of(kind, alpha=4)
    write_lora(tmp_path / "x.safetensors", lora, cases.base(), "comfy", dtype="bf16", metadata={})
    facts = inspect(tmp_path / "x.safetensors")
    assert (facts["what"], facts["kind"], facts["modules"]) == ("lora", kind, 37)


def two_layers(
    tmp_path: Path, name: str, metadata: dict[str, str] | None = None, prefix: str = "diffusion_model."
) -> Path:
    tensors: dict[str, Tensor] = {}
    for layer, rank in (("layers.0.attention.to_q", 2), ("layers.1.attention.to_q", 3)):
        stem = prefix + layer
        tensors |= {f"{stem}.lora_A.weight": torch.ones(rank, 8), f"{stem}.lora_B.weight": torch.ones(8, rank)}
    save_file(tensors, tmp_path / name, metadata=metadata)
    return tmp_path / name


def test_a_training_adapter_by_its_name_or_its_header(tmp_path: Path) -> None:
    facts = inspect(two_layers(tmp_path, "zimage_turbo_training_adapter_v2.safetensors"))
    assert (facts["what"], facts["arch"], facts["ranks"]) == ("training adapter", "zimage", {"2": 1, "3": 1})
    assert "no alpha in the file" in facts["notes"][0]
    made = two_layers(tmp_path, "x.safetensors", {"detour.kind": "training adapter"})
    assert inspect(made)["what"] == "training adapter"
    assert inspect(two_layers(tmp_path, "y.safetensors"))["what"] == "lora"


def test_the_step_of_other_programs(tmp_path: Path) -> None:
    assert inspect(two_layers(tmp_path, "a.safetensors", {"ss_steps": "120"}))["step"] == 120
    assert inspect(two_layers(tmp_path, "b.safetensors", {"training_info": '{"step": 30, "epoch": 1}'}))["step"] == 30
    assert inspect(two_layers(tmp_path, "c.safetensors", {"training_info": "?", "ss_steps": "many"}))["step"] is None


@pytest.mark.parametrize(
    ("stem", "looks", "says"),
    [
        ("layers.0.attention.to_q", "Z-Image", "layers without a prefix"),
        ("transformer.transformer_blocks.0.img_mod.1", "Qwen-Image", "it looks like Qwen-Image"),
        ("diffusion_model.blah.layers.0.attention.to_q", "Z-Image", "unknown to Z-Image"),
        ("diffusion_model.something", None, "unknown to Z-Image"),
    ],
)
def test_an_adapter_that_cannot_be_used_says_why(tmp_path: Path, stem: str, looks: str | None, says: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}, path)
    facts = inspect(path)
    assert (facts["what"], facts["arch"], facts["looks_like"], facts["modules"]) == ("lora", None, looks, 1)
    assert says in facts["problem"]
    assert str(path) in facts["problem"]


def test_a_whole_model_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in cases.transformer().state_dict().items()}, path)
    facts = inspect(path)
    parameters = sum(p.numel() for p in cases.transformer().parameters())
    assert (facts["what"], facts["looks_like"], facts["parameters"]) == ("model", "Z-Image", parameters)
    save_file({"layers.0.attention.qkv.weight": torch.ones(3, 1)}, path)
    assert "original layout" in inspect(path)["looks_like"]
    save_file({"x": torch.ones(2)}, path)
    assert inspect(path)["what"] == "unknown"


def test_model_folders(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "vae").mkdir(parents=True)
    (model / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (model / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert inspect(model) == {"path": str(model), "what": "model", "class": "ZImagePipeline", "components": ["vae"]}
    assert inspect(model / "vae")["class"] == "AutoencoderKL"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    weights = {"a": torch.randn(100), "b": torch.randn(3, 3)}
    state = {"progress": {"step": 250, "epoch": 3}, "facts": {"seed": 1}}
    snapshot = checkpoint.Snapshot(step=250, tensors={"weights": weights}, state=state, job_yaml="config: 1\n")
    return checkpoint.save(tmp_path / "checkpoints", snapshot)


def test_a_checkpoint(saved: Path) -> None:
    facts = inspect(saved)
    assert (facts["what"], facts["valid"], facts["problem"]) == ("checkpoint", True, None)
    assert (facts["step"], facts["epoch"]) == (250, 3)
    assert facts["state"]["facts"] == {"seed": 1}
    assert set(facts["files"]) == {"job.yaml", "state.json", "weights.safetensors"}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: flip(folder / "weights.safetensors"), "sha256 differs"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "extra").write_text("x"), "does not belong there"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_says_what_is_wrong(saved: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(saved)
    facts = inspect(saved)
    assert (facts["what"], facts["valid"]) == ("checkpoint", False)
    assert says in facts["problem"]


def test_an_exported_model_is_verified_too(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "out") as tmp:
        (tmp / "weights").write_text("x")
    assert inspect(tmp_path / "out")["what"] == "model"


def test_what_cannot_be_inspected(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.pt").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "x.txt").write_text("x")
    for name, says in (
        ("folder", "neither a checkpoint nor a model"),
        ("x.pt", "pickles, and opening one runs"),
        ("x.safetensors", "not a whole .safetensors"),
        ("x.txt", "not a .safetensors file"),
        ("none/at/all.safetensors", "no such file"),
    ):
        with pytest.raises(UserError, match=says):
            inspect_file(tmp_path / name)


def test_the_spec_of_every_built_architecture_fits_the_formats() -> None:
    """Prefixes end in their separator however they are written, and are told apart."""
    from detour import archs
    from detour.export.reading import prefixes

    assert len(prefixes(SPEC)) == 6
    assert all(key.endswith((".", "_")) for name in archs.built() for key in prefixes(archs.spec(name)))
