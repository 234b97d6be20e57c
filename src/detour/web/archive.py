"""A ZIP archive that is sent while it is put together: nothing of it is on the disk or in memory as a whole."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHUNK = 1 << 20  # bytes that are held


class _Outlet(io.RawIOBase):
    """Keeps what was written until it is taken. Cannot go back, so that sizes come behind their files."""

    def __init__(self) -> None:
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # any buffer
        self._held += data
        return len(data)

    def take(self) -> bytes:
        held, self._held = bytes(self._held), bytearray()
        return held


def chunks(entries: Sequence[tuple[str, bytes | Path]]) -> Iterator[bytes]:
    """The archive in pieces, files as they are: neither LoRAs nor pictures get smaller. Same files, same bytes."""
    outlet = _Outlet()
    with zipfile.ZipFile(outlet, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            with archive.open(entry, "w", force_zip64=size >= 1 << 31) as part:
                for piece in _pieces(content):
                    part.write(piece)
                    yield outlet.take()
    yield outlet.take()


def _pieces(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(CHUNK):
            yield piece
