"""Exported files give in diffusers and ComfyUI what they gave in training; what does not is never kept."""

import hashlib
import json
import os
import re
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_cases as cases
from detour import UserError, export
from detour.archs.zimage import SPEC
from detour.config.job import TrainProcess
from detour.export import Base, NotProvenError, Origin, convert, describe, from_training, read_lora, write_lora
from detour.export.container import serialise
from detour.export.verify import layer_shapes, verify
from detour.lora_formats import LoraFile, by_module, to_format, unsupported, with_adapter
from detour.nn.quant import quantizer

FORMATS = ("comfy", "diffusers", "kohya")
# What LoKr's factors look like: both whole, the right one a product, both products.
LOKR = {"whole": {}, "right": {"decompose_factor": 4}, "both": {"decompose_both": True, "rank": 1}}


def close(a: Tensor, b: Tensor, limit: float = 1e-6) -> None:
    """Relative to the size of the output. Merging weights instead of adding a branch rounds by about 1e-6."""
    error = ((a - b).norm() / b.norm()).item()
    assert error <= limit, f"differs by {error:.2e}"


def far(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() > 1e-2, "the adapter has too little effect for the test to mean anything"


@pytest.mark.parametrize("alpha", [cases.RANK, cases.RANK / 2])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_lora_gives_in_diffusers_what_it_gave_in_training(tmp_path: Path, fmt: str, alpha: float) -> None:
    model, lora = cases.file_of("lora", alpha=alpha)
    far(cases.output(model), cases.output(cases.transformer()))
    path = tmp_path / "x.safetensors"
    written = write_lora(path, lora, cases.base(), fmt, dtype="fp32", metadata={})
    assert written.proof.loader == "diffusers.loaders.ZImageLoraLoaderMixin"
    assert written.proof.modules == len(cases.layers())
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded, count = cases.through_pipeline(path)
    assert count == len(cases.layers()) == 37
    assert torch.allclose(cases.output(loaded), cases.output(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "fmt"), [("dora", "diffusers"), *((k, f) for k in LOKR for f in FORMATS[:2])])
def test_other_kinds_give_in_diffusers_what_they_gave_in_training(tmp_path: Path, kind: str, fmt: str) -> None:
    options = LOKR.get(kind, {})
    model, lora = cases.file_of("lokr" if kind in LOKR else kind, alpha=1.5, **options)
    far(cases.output(model), cases.output(cases.transformer()))
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, cases.base(), fmt, dtype="fp32", metadata={})
    loaded, count = cases.through_pipeline(path)
    assert count == 37
    close(cases.output(loaded), cases.output(model))


def test_in_bf16_the_file_holds_the_rounded_weights_and_proves_itself(tmp_path: Path) -> None:
    _, lora = cases.file_of("lora", alpha=3)  # a scale of 0.75, which diffusers multiplies into bf16 weights
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, cases.base(), "comfy", dtype="bf16", metadata={})
    back = read_lora(path, SPEC)
    assert {t.dtype for t in back.tensors.values()} == {torch.bfloat16}
    for name, tensor in lora.tensors.items():
        assert torch.equal(back.tensors[name], tensor.bfloat16())
    assert set(back.alphas.values()) == {3.0}


# ---- ComfyUI, which cannot be installed as a package: its rules, written down here from its sources -----------------


def comfy_keys() -> list[str]:
    """The names under which ComfyUI looks for Z-Image's layers in a LoRA with diffusers' names.

    Its own weights are in the original layout; it takes `to_q`, `to_k`, `to_v` for rows of the fused weight, so that
    each is patched as if it stood alone.
    """
    parts = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "adaLN_modulation.0"]
    parts += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    blocks = ["layers.0", "layers.1", "context_refiner.0", "noise_refiner.0"]
    names = [f"{block}.{part}" for block in blocks for part in parts]
    names += ["all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1", "all_x_embedder.2-1"]
    names += ["cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    return [f"diffusion_model.{name}" for name in names]


def comfy_weight(W: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """ComfyUI's arithmetic on one weight at strength 1."""
    alpha = parts["alpha"].item()
    if "hada_w1_a" in parts:
        change = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        return W + alpha / parts["hada_w1_b"].shape[0] * change
    if any(part.startswith("lokr") for part in parts):
        rank = None
        factors = []
        for side in ("lokr_w1", "lokr_w2"):
            if side in parts:
                factors.append(parts[side])
            else:
                rank = parts[f"{side}_b"].shape[0]
                factors.append(parts[f"{side}_a"] @ parts[f"{side}_b"])
        return W + (1.0 if rank is None else alpha / rank) * torch.kron(*factors)
    calculated = W + alpha / parts["lora_A.weight"].shape[0] * (parts["lora_B.weight"] @ parts["lora_A.weight"])
    if "dora_scale" in parts:
        assert parts["dora_scale"].shape == (W.shape[0], 1)
        calculated = calculated * (parts["dora_scale"] / (W.norm(dim=1, keepdim=True) + torch.finfo(W.dtype).eps))
    return calculated


def through_comfyui(path: Path) -> nn.Module:
    """A fresh miniature patched as ComfyUI patches it; every key of the file must have found its place."""
    model = cases.transformer()
    left = load_file(path)
    for key in comfy_keys():
        parts = {name.removeprefix(f"{key}."): left.pop(name) for name in list(left) if name.startswith(f"{key}.")}
        if parts:
            weight = model.get_submodule(key.removeprefix("diffusion_model.")).weight
            weight.copy_(comfy_weight(weight, parts))
    assert not left, f"ComfyUI would say: lora key not loaded: {sorted(left)[:3]}"
    return model


@pytest.mark.parametrize("alpha", [cases.RANK, 1.5])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", *LOKR])
def test_comfyui_computes_what_training_did(tmp_path: Path, kind: str, alpha: float) -> None:
    model, lora = cases.file_of("lokr" if kind in LOKR else kind, alpha=alpha, **LOKR.get(kind, {}))
    far(cases.output(model), cases.output(cases.transformer()))
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, cases.base(), "comfy", dtype="fp32", metadata={})
    close(cases.output(through_comfyui(path)), cases.output(model), 3e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", *LOKR])
def test_an_adapter_is_merged_as_it_was_trained(tmp_path: Path, kind: str) -> None:
    """For each kind from training, and for ComfyUI's DoRA from its file."""
    model, lora = cases.file_of("lokr" if kind in LOKR else kind, alpha=1.5, **LOKR.get(kind, {}))
    write_lora(tmp_path / "x.safetensors", lora, cases.base(), "comfy", dtype="fp32", metadata={})
    for adapter in (lora, read_lora(tmp_path / "x.safetensors", SPEC)):
        merged = cases.transformer()
        for name, parts in by_module(adapter.tensors).items():
            weight = merged.get_submodule(name).weight
            half = with_adapter(weight, parts, adapter.scale(name), 0.5)
            whole = with_adapter(weight, parts, adapter.scale(name))
            assert torch.allclose(2 * half - weight, whole, atol=1e-5)
            weight.copy_(whole)
        close(cases.output(merged), cases.output(model), 3e-6)


def test_a_dora_for_comfyui_needs_the_weights(tmp_path: Path) -> None:
    _, lora = cases.file_of("dora", alpha=4)
    with pytest.raises(UserError, match="needs the model's weights"):
        write_lora(tmp_path / "x.safetensors", lora, cases.base(weights=False), "comfy", dtype=None, metadata={})
    assert list(tmp_path.iterdir()) == []


# ---- what a format cannot carry ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fmt", "says"),
    [
        ("dora", "kohya", "use comfy or diffusers"),
        ("lokr", "kohya", "use comfy or diffusers"),
        ("loha", "kohya", "use comfy$"),
        ("loha", "diffusers", "use comfy$"),
    ],
)
def test_what_a_format_cannot_carry_is_refused(tmp_path: Path, kind: str, fmt: str, says: str) -> None:
    _, lora = cases.file_of(kind, alpha=4, names=["layers.0.attention.to_q"])
    with pytest.raises(UserError, match=f"^{kind} in the format {fmt}: .*{says}"):
        write_lora(tmp_path / "x.safetensors", lora, cases.base(), fmt, dtype=None, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_every_kind_has_a_format_and_lora_has_all() -> None:
    for kind in ("lora", "dora", "lokr", "loha"):
        assert unsupported(kind, "comfy", SPEC) is None
    assert all(unsupported("lora", fmt, SPEC) is None for fmt in FORMATS)


def test_values_that_the_type_cannot_hold_are_errors() -> None:
    _, lora = cases.file_of("lora", alpha=4, names=["layers.0.attention.to_q"])
    name = "layers.0.attention.to_q.lora_B.weight"
    lora.tensors[name][0, 0] = 1e6
    with pytest.raises(UserError, match=r"up to 1e\+06, too much for torch.float16; set save.dtype"):
        to_format(lora, SPEC, "comfy", dtype=torch.float16)
    to_format(lora, SPEC, "comfy", dtype=torch.bfloat16)
    lora.tensors[name][0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        to_format(lora, SPEC, "comfy")


def test_only_safetensors_names(tmp_path: Path) -> None:
    _, lora = cases.file_of("lora", alpha=4, names=["layers.0.attention.to_q"])
    with pytest.raises(UserError, match=r"must end in .safetensors"):
        write_lora(tmp_path / "x.ckpt", lora, cases.base(), "comfy", dtype=None, metadata={})


# ---- the proof -----------------------------------------------------------------------------------------------------

KEY = "diffusion_model.layers.0.attention.to_q"


def spoil(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    key = KEY
    if how == "alpha":
        return tensors | {f"{key}.alpha": torch.tensor(4.0)}
    if how == "no alpha":
        return {name: tensor for name, tensor in tensors.items() if name != f"{key}.alpha"}
    if how == "layer missing":
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{key}.")}
    if how == "one value":
        changed = tensors[f"{key}.lora_A.weight"].clone()
        changed[1, 2] += 0.01
        return tensors | {f"{key}.lora_A.weight": changed}
    if how == "zeros":
        return tensors | {f"{key}.lora_B.weight": torch.zeros_like(tensors[f"{key}.lora_B.weight"])}
    if how == "exchanged":
        other = key.replace("to_q", "to_k")
        return {name.replace(key, "#").replace(other, key).replace("#", other): t for name, t in tensors.items()}
    assert how == "prefix"
    return {name.removeprefix("diffusion_model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("how", ["alpha", "no alpha", "layer missing", "one value", "zeros", "exchanged", "prefix"])
def test_a_spoilt_file_is_not_proven(tmp_path: Path, how: str) -> None:
    _, lora = cases.file_of("lora", alpha=2)
    tensors, _ = to_format(lora, SPEC, "comfy")
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    assert verify(path, lora, SPEC, "comfy", cases.shapes()).modules == 37
    save_file(spoil(tensors, how), path)
    with pytest.raises(NotProvenError):
        verify(path, lora, SPEC, "comfy", cases.shapes())


def test_what_diffusers_scales_wrongly_is_not_proven(tmp_path: Path) -> None:
    """Without diffusers' own header alpha is lost: found by diffusers' loader, whatever this program's reader says."""
    _, lora = cases.file_of("lora", alpha=2)
    tensors, header = to_format(lora, SPEC, "diffusers")
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialise(tensors, header))
    assert verify(path, lora, SPEC, "diffusers", cases.shapes()).modules == 37
    path.write_bytes(serialise(tensors, {"format": "pt"}))
    with pytest.raises(NotProvenError, match=r"scales \S+ by 1, it was trained with 0.5"):
        verify(path, lora, SPEC, "diffusers", cases.shapes())


def test_a_layer_that_the_model_lacks_is_not_proven(tmp_path: Path) -> None:
    _, lora = cases.file_of("lora", alpha=2)
    smaller = {name: shape for name, shape in cases.shapes().items() if not name.startswith("layers.1.")}
    with pytest.raises(NotProvenError, match="unknown to Z-Image"):
        base = Base(spec=SPEC, shapes=smaller)
        write_lora(tmp_path / "x.safetensors", lora, base, "comfy", dtype=None, metadata={})


def test_a_file_that_is_not_proven_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lora = cases.file_of("lora", alpha=2)
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, cases.base(), "comfy", dtype=None, metadata={})
    before = path.read_bytes()

    def wrong(*args: object, **kwargs: object) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, header = to_format(*args, **kwargs)
        return spoil(tensors, "alpha"), header

    monkeypatch.setattr(export, "to_format", wrong)
    with pytest.raises(NotProvenError, match="was not kept"):
        write_lora(path, lora, cases.base(), "comfy", dtype=None, metadata={})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_proof_takes_seconds_at_full_size(tmp_path: Path) -> None:
    """6.2 billion parameters, of which not one is allocated."""
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        shapes = layer_shapes(ZImageTransformer2DModel())
    assert sum(out * inside for out, inside in shapes.values()) > 6e9
    tensors: dict[str, Tensor] = {}
    for name, (out, inside) in shapes.items():
        if re.search(SPEC.lora_blocks, name):
            tensors |= {f"{name}.lora_A.weight": torch.ones(1, inside), f"{name}.lora_B.weight": torch.ones(out, 1)}
    lora = from_training(tensors, cases.network("lora", rank=1))
    base = Base(spec=SPEC, shapes=shapes)
    written = write_lora(tmp_path / "x.safetensors", lora, base, "comfy", dtype="bf16", metadata={})
    assert written.proof.modules == 240


def test_layers_are_found_with_and_without_an_adapter_on_them() -> None:
    model, _ = cases.trained("dora", alpha=4, names=["layers.0.attention.to_q"])
    assert layer_shapes(model) == layer_shapes(cases.transformer()) == cases.shapes()
    plain = cases.transformer().get_submodule("layers.0.attention.to_q").weight
    assert torch.equal(Base.of(model, SPEC).weight("layers.0.attention.to_q"), plain)


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_layers_and_weights_of_a_quantised_model(qtype: str) -> None:
    model = cases.transformer()
    quantize = quantizer(qtype, "", torch.device("cpu"))
    for name in cases.layers():
        model.set_submodule(name, quantize(name, model.get_submodule(name)))
    base = Base.of(model, SPEC)
    assert base.shapes == cases.shapes()
    plain = cases.transformer().get_submodule("layers.0.attention.to_q").weight
    close(base.weight("layers.0.attention.to_q").float(), plain, 0.3)  # 4 bits


# ---- formats, both ways --------------------------------------------------------------------------------------------


@st.composite
def adapters(draw: st.DrawFn) -> LoraFile:
    """Any kind on any layers, each with its own rank and alpha."""
    kind = draw(st.sampled_from(["lora", "dora", "lokr", "loha"]))
    names = draw(st.lists(st.sampled_from(cases.layers()), min_size=1, max_size=6, unique=True))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name in names:
        rank, (out, inside) = draw(st.integers(1, 5)), cases.shapes()[name]
        alpha = draw(st.floats(0.25, 64, width=32))
        sizes = {"lora_A.weight": (rank, inside), "lora_B.weight": (out, rank)}
        if kind == "dora":
            sizes["lora_magnitude_vector"] = (out,)
        elif kind == "loha":
            sizes = {f"hada_w{i}_{s}": (out, rank) if s == "a" else (rank, inside) for i in (1, 2) for s in "ab"}
        elif kind == "lokr":
            left, right = (2, 2), (out // 2, inside // 2)
            sizes = {"lokr_w1": left, "lokr_w2_a": (right[0], rank), "lokr_w2_b": (rank, right[1])}
        tensors |= {f"{name}.{part}": torch.randn(size, generator=g) for part, size in sizes.items()}
        ranks[name], alphas[name] = rank, alpha
    return LoraFile(tensors=tensors, kind=kind, ranks=ranks, alphas=alphas)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lora=adapters(), fmt=st.sampled_from(FORMATS), known=st.booleans())
def test_what_is_written_is_read(tmp_path: Path, lora: LoraFile, fmt: str, known: bool) -> None:
    if unsupported(lora.kind, fmt, SPEC) is not None or (lora.kind, fmt) == ("dora", "comfy"):
        return
    tensors, header = to_format(lora, SPEC, fmt)
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialise(tensors, header))
    back = read_lora(path, SPEC, cases.shapes() if known else None)
    assert (back.kind, back.format, back.notes) == (lora.kind, fmt, ())
    assert back.ranks == lora.ranks
    assert back.alphas == pytest.approx(lora.alphas, rel=1e-12)
    assert set(back.tensors) == set(lora.tensors)
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in lora.tensors.items())


def test_mixed_ranks_and_alphas_are_proven_in_every_format(tmp_path: Path) -> None:
    names = ["layers.0.attention.to_q", "layers.1.attention.to_q", "layers.1.feed_forward.w2", "t_embedder.mlp.0"]
    tensors: dict[str, Tensor] = {}
    ranks = dict(zip(names, (2, 2, 3, 5), strict=True))
    alphas = dict(zip(names, (2.0, 1.0, 3.0, 2.5), strict=True))
    for name, rank in ranks.items():
        out, inside = cases.shapes()[name]
        tensors |= {f"{name}.lora_A.weight": torch.randn(rank, inside), f"{name}.lora_B.weight": torch.randn(out, rank)}
    lora = LoraFile(tensors=tensors, kind="lora", ranks=ranks, alphas=alphas)
    assert (lora.rank, lora.alpha) == (2, 2.0)  # of equally frequent alphas the largest
    outputs = []
    for fmt in FORMATS:
        path = tmp_path / f"{fmt}.safetensors"
        assert write_lora(path, lora, cases.base(), fmt, dtype=None, metadata={}).proof.modules == 4
        outputs.append(cases.output(cases.through_pipeline(path)[0]))
    far(outputs[0], cases.output(cases.transformer()))
    close(outputs[0], outputs[1], 1e-5)
    close(outputs[0], outputs[2], 1e-5)


def test_training_tensors_must_be_of_the_networks_kind() -> None:
    _, tensors = cases.trained("lora", alpha=4, names=["layers.0.attention.to_q"])
    with pytest.raises(ValueError, match="which is no dora"):
        from_training(tensors, cases.network("dora"))
    with pytest.raises(ValueError, match="not the name of an adapter's tensor"):
        by_module({"layers.0.attention.to_q.weight": torch.zeros(1)})


# ---- the file ------------------------------------------------------------------------------------------------------


def test_the_same_content_is_the_same_bytes_and_stands_in_order() -> None:
    tensors = {"b": torch.ones(3), "a": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.tensor(2.0)}
    metadata = {"z": "1", "a": "ü", "m": "3"}
    data = serialise(tensors, metadata)
    assert data == serialise(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert list(header) == ["__metadata__", "b", "c", "a"]
    assert list(header["__metadata__"]) == ["a", "m", "z"]


def test_safetensors_reads_the_container(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(), "scalar": torch.tensor(0.5), "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 6).T, "fp16": torch.randn(7).half(),
    }  # fmt: skip
    path.write_bytes(serialise(tensors, {"name": "Jürgen"}))
    back = load_file(path)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"name": "Jürgen"}


def origin(**changes: object) -> Origin:
    process = TrainProcess.model_validate(
        {
            "type": "train",
            "trigger_word": "s3crettrigger",
            "model": {
                "arch": "zimage:turbo",
                "name_or_path": "/home/s3cretuser/models/zit",
                "assistant_lora_path": "/home/s3cretuser/a.safetensors",
            },
            "train": {"steps": 500, "lr": 2e-4, "optimizer": "adamw8bit", "seed": 7, "batch_size": 2}
            | {"gradient_accumulation": 3},
            "network": {"type": "lora", "linear": 4, "linear_alpha": 2, "include": ["attention"]},
            "datasets": [{"folder_path": "/data/s3cretfolder", "resolution": [512, 768]}],
            "save": changes.pop("save", {}),
        }
    )
    facts = {
        "title": "my lora",
        "process": process,
        "step": 250,
        "epoch": 3,
        "images": 21,
        "adapter_sha256": "ab" * 32,
        "job_sha256": "cd" * 32,
        "date": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "captions": ["s3cretcaption, a cat", "a cat"],
    }
    return Origin(**(facts | changes))


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def test_the_header_says_how_it_was_made(tmp_path: Path) -> None:
    _, lora = cases.file_of("lora", alpha=2)
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, cases.base(), "comfy", dtype="bf16", metadata=describe(lora, SPEC, origin()))
    header = header_of(path)
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Z-Image/lora",
        "modelspec.title": "my lora",
        "modelspec.date": "2026-01-02T03:04:05+00:00",
        "modelspec.resolution": "768x768",
        "modelspec.prediction_type": "flow",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_module": "networks.lora",
        "ss_base_model_version": "zimage",
        "ss_steps": "250",
        "ss_max_train_steps": "500",
        "ss_epoch": "3",
        "ss_learning_rate": "0.0002",
        "ss_optimizer": "adamw8bit",
        "ss_seed": "7",
        "ss_num_train_items": "21",
        "ss_total_batch_size": "6",
        "ss_mixed_precision": "bf16",
        "detour.arch": "zimage",
        "detour.variant": "turbo",
        "detour.step": "250",
        "detour.training_adapter_sha256": "ab" * 32,
        "detour.training_adapter_mode": "factored",
        "detour.job_sha256": "cd" * 32,
    }
    assert {key: header.get(key) for key in expected} == expected
    assert json.loads(header["ss_network_args"])["include"] == ["attention"]
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    digest = hashlib.sha256(data[8 + length :]).hexdigest()
    assert header["sshs_model_hash"] == digest
    assert header["modelspec.hash_sha256"] == f"0x{digest}"


def test_the_legacy_hash_is_kohyas(tmp_path: Path) -> None:
    """64 KiB at 1 MiB of a file with the same tensors whose header has only the ss_ keys."""
    tensors = {"w": torch.randn(400_000)}
    hashed = export.with_hashes(tensors, {"ss_seed": "1", "modelspec.title": "t"})
    old = serialise(tensors, {"ss_seed": "1"})
    assert hashed["sshs_legacy_hash"] == hashlib.sha256(old[0x100000:0x110000]).hexdigest()[:8]


def test_nothing_private_is_in_the_bytes(tmp_path: Path) -> None:
    _, lora = cases.file_of("lora", alpha=2)
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, cases.base(), "diffusers", dtype="bf16", metadata=describe(lora, SPEC, origin()))
    data = path.read_bytes()
    assert b"s3cret" not in data
    assert os.fsencode(tmp_path) not in data
    assert b"/home" not in data and b"/data" not in data


def test_captions_only_where_asked_for() -> None:
    header = describe(None, SPEC, origin(save={"include_captions": True}))
    assert json.loads(header["ss_tag_frequency"]) == {"captions": {"a cat": 2, "s3cretcaption": 1}}
    assert header["modelspec.trigger_phrase"] == "s3crettrigger"
    assert "s3cretfolder" not in str(header) and "s3cretuser" not in str(header)
    assert header["modelspec.architecture"] == "Z-Image"


def test_the_base_model_is_named_where_it_is_a_published_one() -> None:
    made = origin()
    named = made.process.model.model_copy(update={"name_or_path": "Tongyi-MAI/Z-Image-Turbo"})
    process = made.process.model_copy(update={"model": named})
    assert describe(None, SPEC, origin(process=process))["ss_sd_model_name"] == "Tongyi-MAI/Z-Image-Turbo"
    assert "ss_sd_model_name" not in describe(None, SPEC, made)


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_the_mode_is_the_umasks(tmp_path: Path) -> None:
    _, lora = cases.file_of("lora", alpha=2, names=["layers.0.attention.to_q"])
    old = os.umask(0o027)
    try:
        write_lora(tmp_path / "x.safetensors", lora, cases.base(), "comfy", dtype=None, metadata={})
    finally:
        os.umask(old)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_the_same_lora_is_the_same_file(tmp_path: Path) -> None:
    _, lora = cases.file_of("lora", alpha=2)
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        write_lora(path, lora, cases.base(), "comfy", dtype="bf16", metadata=describe(lora, SPEC, origin()))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", SPEC, "comfy")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


# ---- the whole model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_a_trained_model_is_written_in_diffusers_layout(tmp_path: Path, shard_bytes: int) -> None:
    model = cases.transformer()
    model.register_to_config(_name_or_path="/home/s3cretuser/model")
    place = export.export_full(model, tmp_path / "out", SPEC, "bf16", shard_bytes=shard_bytes)
    assert place == tmp_path / "out" / "transformer"
    assert (len(list(place.glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    loaded = type(model).from_pretrained(place, torch_dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16())
    assert not any(b"s3cret" in file.read_bytes() for file in place.iterdir())
    assert model.state_dict()["cap_pad_token"].dtype == torch.float32


def test_a_model_that_reads_back_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export.chunks

    def wrong(tensors: dict[str, Tensor], metadata: dict[str, str]) -> object:
        first = next(iter(tensors))
        return real(tensors | {first: tensors[first] + 1}, metadata)

    monkeypatch.setattr(export, "chunks", wrong)
    with pytest.raises(NotProvenError, match="with other values"):
        export.export_full(cases.transformer(), tmp_path / "out", SPEC, "bf16")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_an_adapter_on_it_is_not_a_whole_model(tmp_path: Path) -> None:
    model, _ = cases.trained("lora", alpha=2, names=["layers.0.attention.to_q"])
    with pytest.raises(ValueError, match="has an adapter on it"):
        export.export_full(model, tmp_path / "out", SPEC, "bf16")
