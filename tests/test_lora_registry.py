"""LoRA files of every architecture: names one to one, what is written is read, and diffusers loads it."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archs import ROWS, Row
from detour import UserError
from detour.archs.base import ArchSpec
from detour.export import Base, read_lora, write_lora
from detour.export.container import serialise
from detour.export.reading import parse
from detour.export.verify import layer_shapes
from detour.lora_formats import LoraFile, by_module, to_format, unsupported, with_adapter

FORMATS = ("comfy", "diffusers", "kohya")
KINDS = ("lora", "dora", "lokr", "loha")
SMALLER = 64
rows = pytest.mark.parametrize("row", ROWS, ids=str)


@cache
def full_shapes(row: Row) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer at the published size."""
    with torch.device("meta"):
        return layer_shapes(row.full_size())


@cache
def small_shapes(row: Row) -> dict[str, tuple[int, int]]:
    """The same layers in the same proportions, but small."""
    return {name: (max(1, o // SMALLER), max(1, i // SMALLER)) for name, (o, i) in full_shapes(row).items()}


@rows
def test_names_are_one_to_one(row: Row) -> None:
    original, shapes = row.spec.lora_keys.original, full_shapes(row)
    if original is None:
        return
    for layer in shapes:
        held = original.find(original.origin(layer))
        if held is None:
            assert original.origin(layer) == layer
            continue
        assert layer in held.layers
        assert original.find(original.origin(layer).replace(".", "_")) == held, "kohya's way of writing it"
        assert original.origin(layer) == layer or original.origin(layer) not in shapes, "a name that means two layers"
        assert len({shapes[part][1] for part in held.layers}) == 1, "layers in one have the same inputs"
        unit = shapes[held.layers[0]][0] // held.shares[0]
        assert [shapes[part][0] for part in held.layers] == [unit * share for share in held.shares]
        assert not held.inputs or shapes[layer][1] == unit * held.inputs


@rows
def test_a_plain_lora_has_a_format_that_comfyui_reads_and_one_of_diffusers(row: Row) -> None:
    keys = row.spec.lora_keys
    assert unsupported("lora", "comfy", row.spec) is None
    assert not row.spec.diffusers_loader or unsupported("lora", "diffusers", row.spec) is None
    assert (set(keys.original_in) <= set(keys.formats) and not keys.original_in) or keys.original is not None
    assert keys.whole_blocks is None or set(keys.whole_blocks.formats) <= set(keys.formats)


# ---- there and back --------------------------------------------------------------------------------------------------


@st.composite
def adapters(draw: st.DrawFn, row: Row) -> LoraFile:
    """Any kind on a few layers, each with its own rank and alpha."""
    kind, shapes = draw(st.sampled_from(KINDS)), small_shapes(row)
    first = draw(st.sampled_from(sorted(shapes)))
    near = sorted(shapes, key=lambda name: (name.rpartition(".")[0] != first.rpartition(".")[0], name))[:6]
    names = draw(st.lists(st.sampled_from([first, *near, *sorted(shapes)[:40]]), min_size=1, max_size=6, unique=True))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name in names:
        rank, (out, inside) = draw(st.integers(1, 4)), shapes[name]
        sizes = {"lora_A.weight": (rank, inside), "lora_B.weight": (out, rank)}
        if kind == "dora":
            sizes["lora_magnitude_vector"] = (out,)
        elif kind == "loha":
            sizes = {f"hada_w{i}_{s}": (out, rank) if s == "a" else (rank, inside) for i in (1, 2) for s in "ab"}
        elif kind == "lokr":
            sizes = {"lokr_w1": (1, 1), "lokr_w2_a": (out, rank), "lokr_w2_b": (rank, inside)}
        tensors |= {f"{name}.{part}": torch.randn(size, generator=g) for part, size in sizes.items()}
        ranks[name], alphas[name] = rank, draw(st.floats(0.25, 16, width=32))
    return LoraFile(tensors=tensors, kind=kind, ranks=ranks, alphas=alphas)


def weight(row: Row, name: str) -> Tensor:
    return torch.randn(small_shapes(row)[name], generator=torch.Generator().manual_seed(len(name)))


def merged(row: Row, lora: LoraFile) -> dict[str, Tensor]:
    """The layers' weights with the adapter."""
    return {
        name: with_adapter(weight(row, name), parts, lora.scale(name))
        for name, parts in by_module(lora.tensors).items()
    }


@rows
@settings(max_examples=25, deadline=None)
@given(data=st.data(), fmt=st.sampled_from(FORMATS), known=st.booleans())
def test_what_is_written_is_read(row: Row, data: Any, fmt: str, known: bool) -> None:
    spec, lora = row.spec, data.draw(adapters(row))
    if (lora.kind, fmt) == ("lokr", "diffusers"):
        return  # its one factor for all layers: see test_export.py
    try:
        tensors, header = to_format(lora, spec, fmt, base_weight=lambda name: weight(row, name))
    except UserError as error:
        assert unsupported(lora.kind, fmt, spec) is not None or "train them together" in str(error)
        return
    assert unsupported(lora.kind, fmt, spec) is None
    assert all(key.startswith(prefix_of(spec, fmt)) for key in tensors)
    back = parse(Path("x"), tensors, header, spec, small_shapes(row) if known else None)
    assert (back.kind, back.notes) == (lora.kind, ())
    theirs = merged(row, back)
    assert theirs.keys() == merged(row, lora).keys()
    for name, ours in merged(row, lora).items():
        torch.testing.assert_close(theirs[name], ours, rtol=1e-4, atol=1e-4)
    if fmt == "diffusers" or (fmt in spec.lora_keys.alpha_in and fmt not in spec.lora_keys.original_in):
        assert back.ranks == lora.ranks
        if lora.kind != "dora":
            assert all(torch.equal(back.tensors[name], tensor) for name, tensor in lora.tensors.items())


def prefix_of(spec: ArchSpec, fmt: str) -> str:
    keys = spec.lora_keys
    return {"comfy": keys.comfy_prefix, "diffusers": keys.diffusers_prefix, "kohya": keys.kohya_prefix}[fmt]


# ---- the ecosystem's loader ------------------------------------------------------------------------------------------


def shapes_for(row: Row) -> dict[str, tuple[int, int]]:
    """Small, but of the published size where diffusers' loader takes it for granted."""
    whole = row.spec.lora_keys.whole_blocks
    return full_shapes(row) if whole is not None and whole.rows else small_shapes(row)


def first_blocks(row: Row) -> dict[str, tuple[int, int]]:
    """Layers of the first block of each kind that a LoRA acts on; a few, where no loader asks for whole blocks."""
    named = {name: shape for name, shape in shapes_for(row).items() if re.fullmatch(row.spec.lora_blocks, name)}
    first = {name: shape for name, shape in named.items() if re.search(r"\.(\d+)\.", name)[1] == "0"}
    return first if row.spec.lora_keys.whole_blocks else dict(list((first or named).items())[:24])


def base_of(row: Row, lora: LoraFile) -> Base:
    """The model, without most of the layers that the LoRA leaves alone."""
    named = {name: shapes_for(row)[name] for name in lora.modules}
    return Base(spec=row.spec, shapes=named | dict(list(shapes_for(row).items())[:40]))


def without_the_last(row: Row, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The layers less one, and those that are in one with it."""
    origin = row.spec.lora_keys.original.origin
    return {name: shape for name, shape in shapes.items() if origin(name) != origin(list(shapes)[-1])}


def drawn(shapes: dict[str, tuple[int, int]], alpha: float, rank: int = 2) -> LoraFile:
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (out, inside) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inside, generator=g)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=g)
    return LoraFile(
        tensors=tensors, kind="lora", ranks=dict.fromkeys(shapes, rank), alphas=dict.fromkeys(shapes, alpha)
    )


@rows
@pytest.mark.parametrize("fmt", FORMATS)
def test_diffusers_loads_every_format(row: Row, fmt: str, tmp_path: Path) -> None:
    spec, shapes = row.spec, first_blocks(row)
    lora = drawn(shapes, alpha=3.0)
    base = base_of(row, lora)
    path = tmp_path / "x.safetensors"
    if unsupported("lora", fmt, spec) is not None:
        with pytest.raises(UserError, match=f"lora in the format {fmt}: no loader reads"):
            write_lora(path, lora, base, fmt, dtype=None, metadata={})
        return
    written = write_lora(path, lora, base, fmt, dtype=None, metadata={})
    assert written.proof.modules == len(shapes)
    assert written.proof.loader == (f"diffusers.loaders.{spec.diffusers_loader}" if spec.diffusers_loader else "PEFT")
    assert not any("ComfyUI alone" in note for note in written.notes)


@pytest.mark.parametrize("row", [row for row in ROWS if row.spec.lora_keys.whole_blocks], ids=str)
def test_what_diffusers_takes_whole_only_is_said_to_be_comfyuis(row: Row, tmp_path: Path) -> None:
    spec, whole = row.spec, row.spec.lora_keys.whole_blocks
    assert whole is not None
    path, fmt = tmp_path / "x.safetensors", whole.formats[0]
    shapes, all_shapes = first_blocks(row), shapes_for(row)
    outside = next(name for name in all_shapes if not re.fullmatch(spec.lora_blocks, name))
    partial = without_the_last(row, shapes)
    later = {name: all_shapes[name] for name in (re.sub(r"^(\w+)\.0\.", r"\1.1.", name) for name in shapes)}
    for cut in (partial, shapes | {outside: all_shapes[outside]}, later):
        lora = drawn(cut, alpha=2.0)
        written = write_lora(path, lora, base_of(row, lora), fmt, dtype=None, metadata={})
        assert written.proof.loader == "PEFT" and written.proof.modules == len(cut)
        assert any("for ComfyUI alone: diffusers does not load it" in note for note in written.notes)
        assert read_lora(path, spec).ranks.keys() == cut.keys()


def test_a_file_that_diffusers_would_not_load_is_not_kept(tmp_path: Path) -> None:
    """The proof is diffusers' own: it finds what this program's writer and reader agree on."""
    from dataclasses import replace

    row, fmt = next(row for row in ROWS if row.name == "lumina2"), "comfy"
    lora = drawn(without_the_last(row, first_blocks(row)), 2.0)
    spec = replace(row.spec, lora_keys=replace(row.spec.lora_keys, whole_blocks=None))
    base = replace(base_of(row, lora), spec=spec)
    with pytest.raises(UserError, match="was not kept: it does not load"):
        write_lora(tmp_path / "x.safetensors", lora, base, fmt, dtype=None, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_bytes_do_not_depend_on_the_order_of_layers() -> None:
    for row in ROWS[:: len(ROWS) // 3]:
        lora = drawn(dict(list(small_shapes(row).items())[:12]), alpha=1.0)
        turned = LoraFile(
            tensors=dict(reversed(lora.tensors.items())), kind="lora", ranks=lora.ranks, alphas=lora.alphas
        )
        assert serialise(*to_format(lora, row.spec, "comfy")) == serialise(*to_format(turned, row.spec, "comfy"))
