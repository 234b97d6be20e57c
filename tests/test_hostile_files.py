"""Files that are made to do harm: pictures that grow, model files whose tables lie, addresses instead of names."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from detour import UserError, weights

# --- pictures -------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pieces = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def webp(width: int, height: int) -> bytes:
    """Its canvas; the picture in it is a few bytes."""
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (width - 1).to_bytes(3, "little")
    canvas += (height - 1).to_bytes(3, "little") + b"VP8L" + struct.pack("<I", 6) + b"\x2f\xff\xff\xff\x0f\0"
    return b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas


def tiff(width: int, height: int) -> bytes:
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + table + b"\0\0\0\0"


def fits(width: int, height: int) -> bytes:
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2"]
    cards += [f"NAXIS1  = {width:>20}", f"NAXIS2  = {height:>20}", "ZCMPTYPE= 'GZIP_1  '", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + gzip.compress(bytes(1 << 24))


ZEROS = zlib.compress(bytes(1 << 29), 9)  # half a gigabyte, in half a megabyte
PICTURES = {
    "header.png": png(100_000, 100_000),
    "text.png": png(8, 8, chunk(b"zTXt", b"k\0\0" + ZEROS), rows=bytes(8 * 25)),
    "words.png": png(8, 8, *[chunk(b"iTXt", b"k\0\1\0\0\0" + ZEROS)] * 3, rows=bytes(8 * 25)),
    "profile.png": png(8, 8, chunk(b"iCCP", b"k\0\0" + ZEROS), rows=bytes(8 * 25)),
    "canvas.webp": webp(16_383, 16_383),
    "larger.webp": webp(1 << 24, 1 << 24),
    "tiff.png": tiff(100_000, 100_000),
    "fits.png": fits(100_000, 100_000),
    "gzip.png": gzip.compress(fits(8, 8)),
    "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
}
CHECK = """
import resource, sys, time
from pathlib import Path
from detour.data import images
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
before = resource.getrusage(resource.RUSAGE_SELF)
budget = images.Budget()
for path in sorted(Path(sys.argv[1]).iterdir()):
    for look in (lambda: images.check(path, budget, 1024), lambda: images.small(path, 256, budget)):
        began = time.process_time()
        try:
            look()
            print(path.name, "good", end=" ")
        except images.BadPictureError as error:
            print(path.name, "refused", end=" ")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss
        print(f"{time.process_time() - began:.3f}", grown)
"""


def test_pictures_that_grow_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    """In a process of their own, which is watched."""
    for name, data in PICTURES.items():
        (tmp_path / name).write_bytes(data)
    ran = subprocess.run(
        [sys.executable, "-c", CHECK, tmp_path], capture_output=True, text=True, check=True, timeout=300
    )
    found = [line.split() for line in ran.stdout.splitlines()]
    assert [line[0] for line in found] == [name for name in sorted(PICTURES) for _ in range(2)]
    for name, verdict, seconds, kilobytes in found:
        assert verdict == "refused", name
        assert float(seconds) < 2, name
        assert int(kilobytes) < 50_000, name


# --- models ---------------------------------------------------------------------------------------------------------


def model(path: Path, header: Any, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(first: int, last: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(last - first) // 4], "data_offsets": [first, last]}


LIES = {
    "overlapping": {"a": entry(0, 32), "b": entry(16, 64, [12])},
    "the same twice": {"a": entry(0, 64), "b": entry(0, 64)},
    "a hole": {"a": entry(0, 16), "b": entry(32, 64)},
    "behind the end": {"a": entry(0, 64), "b": entry(64, 128)},
    "backwards": {"a": entry(64, 0, [16])},
    "negative": {"a": entry(-64, 0, [16])},
    "larger than it is": {"a": entry(0, 64, [1 << 40])},
    "more than there are numbers": {"a": entry(0, 64, [1 << 62, 1 << 62, 0])},
    "no such type": {"a": entry(0, 64, dtype="pickle")},
    "not all": {"a": entry(0, 32)},
    "no table": [1, 2, 3],
    "no JSON": b'{"a": ',
    "no text": b"\xff\xfe{}",
    "metadata that is no text": {"__metadata__": {"a": {"b": 1}}, "a": entry(0, 64)},
    "deep": b'{"a":' * 100_000,
}


def read(path: Path) -> None:
    list(weights.stream_tensors([path]))
    weights.tensor_shapes([path])
    weights.read_tensors(path)


@pytest.mark.parametrize("lie", LIES)
def test_a_model_file_whose_table_lies_is_refused(tmp_path: Path, lie: str) -> None:
    with pytest.raises(UserError, match=r"lies\.safetensors"):
        read(model(tmp_path / "lies.safetensors", LIES[lie]))


def test_a_model_file_with_much_to_say_is_read(tmp_path: Path) -> None:
    """10 MB in its metadata's keys and values: unusual, and no harm."""
    many = {f"k{number}" + "x" * 1000: "y" * 4000 for number in range(2000)}
    read(model(tmp_path / "much.safetensors", {"__metadata__": many, "a": entry(0, 64)}))


# --- addresses ------------------------------------------------------------------------------------------------------

ADDRESSES = [
    "http://169.254.169.254/latest/meta-data/x.safetensors",
    "https://civitai.com/api/download/models/1",
    "http://127.0.0.1:8675/api/settings",
    "file:///etc/passwd",
    "//evil.test/share/x.safetensors",
    "\\\\evil.test\\share\\x.safetensors",
    "ftp://evil.test/x.safetensors",
    "user@evil.test:x/y.safetensors",
    "a/b@http://evil.test/c.safetensors",
]


class AskedError(Exception):
    """The network was asked."""


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any, **__: Any) -> None:
        raise AskedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("network")
def test_a_name_on_the_hub_is_asked_for() -> None:
    with pytest.raises(AskedError):
        weights.find_file("some/model/file.safetensors", what="a file")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_name_of_a_model(address: str) -> None:
    """Nothing is asked of any network: there are names on the hub, and paths."""
    with pytest.raises(UserError):
        weights.find_file(address, what="a file")
    with pytest.raises(UserError):
        weights.find_model(address, components=("vae",), denoiser="transformer")
