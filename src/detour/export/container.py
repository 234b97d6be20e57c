"""The safetensors container, written so that the same content is the same bytes.

The safetensors package writes the header's entries in an order that changes from process to process (seen with 0.8.0).
The layout: 8 bytes with the header's length, a JSON header padded to a multiple of 8, then the tensors end to end.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole file."""
    return b"".join(chunks(tensors, metadata))


def chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """A whole file in pieces: the header, then each tensor."""
    yield _header(tensors, metadata)
    yield from _data(tensors)


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the hashes by which other programs recognise the weights.

    `sshs_model_hash` and modelspec's hash are of everything after the header. `sshs_legacy_hash` is of the 64 KiB at
    1 MiB in a file whose header has only the `ss_` keys: that is how kohya's programs count it.
    """
    data = b"".join(_data(tensors))
    digest = hashlib.sha256(data).hexdigest()
    start = len(_header(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")}))
    legacy = data[max(0, 0x100000 - start) : max(0, 0x110000 - start)]
    return dict(metadata) | {
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """By falling element size, so that each tensor is aligned, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in _order(tensors):
        end = start + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name in _order(tensors):
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
