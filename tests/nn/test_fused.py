"""Adapters of several layers put together as one, and taken apart: nothing is lost, and the change is the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detour.lora_formats import with_adapter
from detour.nn.fused import put_together, take_apart
from detour.nn.original import Held, Layout, in_blocks

QKV = Held(("q", "k", "v"), (3, 1, 1), inputs=3)
UNIT = 4
INSIDE = 3 * UNIT
ROWS = [UNIT * share for share in QKV.shares]


def adapter(kind: str, out: int, rank: int, g: torch.Generator) -> dict[str, Tensor]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    if kind == "loha":
        return {f"hada_w{n}_{s}": drawn(out, rank) if s == "a" else drawn(rank, INSIDE) for n in (1, 2) for s in "ab"}
    parts = {"lora_A.weight": drawn(rank, INSIDE), "lora_B.weight": drawn(out, rank)}
    return parts | ({"dora_scale": drawn(out, 1).abs() + 0.5} if kind == "dora" else {})


def change(parts: dict[str, Tensor], W: Tensor) -> Tensor:
    return with_adapter(W, parts, 1.0) - W


@st.composite
def adapters(draw: st.DrawFn) -> list[dict[str, Tensor] | None]:
    kind = draw(st.sampled_from(["lora", "dora", "loha"]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    there = [True] * 3 if kind == "dora" else draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any))
    return [adapter(kind, out, draw(st.integers(1, 4)), g) if on else None for on, out in zip(there, ROWS, strict=True)]


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_what_was_put_together_comes_apart_again(parts: list[dict[str, Tensor] | None]) -> None:
    fused = put_together(parts, QKV)
    Ws = [torch.randn(out, INSIDE, generator=torch.Generator().manual_seed(out)) for out in ROWS]
    apart = [torch.zeros_like(W) if own is None else change(own, W) for own, W in zip(parts, Ws, strict=True)]
    torch.testing.assert_close(change(fused, torch.cat(Ws)), torch.cat(apart), rtol=1e-4, atol=1e-5)
    for before, after in zip(parts, take_apart(fused, QKV), strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert before.keys() == after.keys()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_adapter_that_has_not_learnt_yet_keeps_its_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [adapter("lora", out, 2, g) for out in ROWS]
    for own in parts:
        own["lora_B.weight"].zero_()
    back = take_apart(put_together(parts, QKV), QKV)
    for before, after in zip(parts, back, strict=True):
        assert after is not None and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("rank", [2, 3])
def test_an_adapter_trained_on_the_fused_layer_is_shared_out(rank: int) -> None:
    """Its B has no blocks, whether or not its rank could be divided."""
    fused = adapter("lora", sum(ROWS), rank, torch.Generator().manual_seed(1))
    own = take_apart(fused, QKV)
    changes = [part["lora_B.weight"] @ part["lora_A.weight"] for part in own if part is not None]
    assert [len(part) for part in changes] == ROWS
    torch.testing.assert_close(torch.cat(changes), fused["lora_B.weight"] @ fused["lora_A.weight"])
    assert all(part is not None and part["lora_A.weight"].shape[0] == rank for part in own)


def test_exchanged_halves_are_exchanged_back() -> None:
    held = Held(("norm_out.linear",), (1,), swapped=True)
    parts = adapter("lora", 8, 2, torch.Generator().manual_seed(2))
    fused = put_together([parts], held)
    assert torch.equal(fused["lora_B.weight"][:4], parts["lora_B.weight"][4:])
    assert torch.equal(fused["lora_A.weight"], parts["lora_A.weight"])
    (back,) = take_apart(fused, held)
    assert back is not None and all(torch.equal(back[name], tensor) for name, tensor in parts.items())


def test_what_cannot_be_put_together_or_taken_apart() -> None:
    g = torch.Generator().manual_seed(3)
    dora = adapter("dora", ROWS[0], 2, g)
    with pytest.raises(ValueError, match="a DoRA needs norms for all of q, k, v"):
        put_together([dora, None, None], QKV)
    lokr = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="a LoKr of q, k, v"):
        put_together([lokr, None, None], QKV)
    assert put_together([lokr], Held(("q",), (1,))) == lokr
    with pytest.raises(ValueError, match="a LoKr of a layer that is several here"):
        take_apart(lokr, QKV)
    with pytest.raises(ValueError, match="12 inputs and 36 outputs is none of this model"):  # three equal parts
        take_apart(adapter("lora", 3 * INSIDE, 2, g), QKV)
    with pytest.raises(ValueError, match="cannot be divided 3:1:1"):
        take_apart(adapter("lora", 21, 2, g), Held(QKV.layers, QKV.shares))


# ---- the table of names --------------------------------------------------------------------------------------------

LAYOUT = Layout(
    in_blocks("blocks.{}", "layers.{}", {"qkv": "to_q:3 to_k to_v /3", "out.proj": "to_out.0"})
    | {"head": "~proj_out", "unused": ""}
)


def test_names_both_ways() -> None:
    assert LAYOUT.fuses and not Layout({"a": "b"}).fuses
    qkv = Held(("layers.12.to_q", "layers.12.to_k", "layers.12.to_v"), (3, 1, 1), inputs=3)
    assert LAYOUT.find("blocks.12.qkv") == LAYOUT.find("blocks_12_qkv") == qkv
    assert LAYOUT.find("blocks.12.to_q") is None and LAYOUT.find("blocks.12.qkv.more") is None
    assert [LAYOUT.origin(layer) for layer in qkv.layers] == ["blocks.12.qkv"] * 3
    assert LAYOUT.origin("layers.3.to_out.0") == "blocks.3.out.proj"
    assert LAYOUT.origin("proj_out") == "head"
    assert LAYOUT.origin("embedder") == "embedder", "the same where the table has none"


def test_tensors_of_a_checkpoint() -> None:
    weight = torch.arange(20.0)[:, None]
    q, k, v = LAYOUT.tensors("model.diffusion_model.blocks.0.qkv.weight", weight)
    assert [name for name, _ in (q, k, v)] == ["layers.0.to_q.weight", "layers.0.to_k.weight", "layers.0.to_v.weight"]
    assert torch.equal(torch.cat([q[1], k[1], v[1]]), weight) and len(q[1]) == 12
    assert LAYOUT.tensors("unused.weight", weight) == []
    ((name, turned),) = LAYOUT.tensors("head.weight", weight)
    assert name == "proj_out.weight" and torch.equal(turned, weight.roll(10, 0))
    assert LAYOUT.tensors("layers.0.to_q.weight", weight)[0][0] == "layers.0.to_q.weight"
