"""The cache of latents, masks and text embeddings: content-addressed, verified on every read, shared by jobs.

The key of an entry is a hash over everything it was made from, so nothing is ever out of date and nothing needs to be
invalidated: other ingredients have another key. Each entry is a safetensors file whose metadata holds a SHA-256 over
every other byte of the file. Several processes may write one key at once: the last rename wins, the contents are alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from detour import UserError, files
from detour.config.job import DatasetConfig
from detour.data.images import RESAMPLE, Transform
from detour.data.order import Item, transform_of
from detour.data.scan import Picture

# Raised whenever the way entries are made changes (pixels, resampling, layout): older ones are then not found any more.
LATENTS_VERSION = 1
MASKS_VERSION = 1
TEXT_VERSION = 1

LATENTS, MASKS, TEXT = "latents", "masks", "text"
HASHES = "hashes"  # notes on the contents of model files
_BLANK = b"0" * 64
_MARK = b'"sha256":"'
_WEIGHTS = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken"})
_FRESH = 2.0  # seconds in which a file may change again without a new time stamp, on file systems with coarse ones


def default_root() -> Path:
    """`$DETOUR_CACHE`, else `~/.cache/detour`."""
    chosen = os.environ.get("DETOUR_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "detour"


class Store:
    """Named tensors under a kind and a key. `damaged` lists the entries that were found damaged, and removed.

    `latents` is a folder of their own for latents: of pictures that a run has drawn itself, which no other can use.
    """

    def __init__(self, root: Path, latents: Path | None = None) -> None:
        self.root = root
        self.latents = latents
        self.damaged: list[Path] = []

    def path(self, kind: str, key: str) -> Path:
        """Where an entry lies; 256 subfolders keep folders small."""
        return self._folder(kind) / key[:2] / f"{key}.safetensors"

    def _folder(self, kind: str) -> Path:
        return self.latents if kind == LATENTS and self.latents is not None else self.root / kind

    def get(self, kind: str, key: str) -> dict[str, Tensor] | None:
        """The entry, names sorted, or None where there is none.

        A damaged one is removed, remembered in `damaged`, and counts as none.
        """
        data = self._read(kind, key)
        return None if data is None else dict(sorted(safetensors.torch.load(data).items()))

    def has(self, kind: str, key: str) -> bool:
        """Whether `get` would give an entry; reads and verifies it all the same."""
        return self._read(kind, key) is not None

    def remove_leftovers(self) -> None:
        """Remove unfinished files of processes that were killed while writing."""
        for kind in (LATENTS, MASKS, TEXT, HASHES):
            for folder in sorted(self._folder(kind).glob("??")):
                files.remove_stale(folder)

    def _read(self, kind: str, key: str) -> bytes | None:
        path = self.path(kind, key)
        try:
            with path.open("rb") as file:
                opened = os.fstat(file.fileno())
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path} in the cache cannot be read: {error.strerror}; remove it, or the cache") from None
        if _is_whole(data, kind, key):
            return data
        self.damaged.append(path)
        _remove_same(path, opened)
        return None

    def put(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Write an entry, durably and in one piece."""
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"kind": kind, "key": key, "sha256": _BLANK.decode()}
        data = safetensors.torch.save(own, metadata)
        place = _digest_place(data)
        digest = hashlib.sha256(data).hexdigest().encode()
        path = self.path(kind, key)
        try:
            files.write_bytes(path, data[:place] + digest + data[place + 64 :])
        except UserError as error:
            raise type(error)(f"{error} (the cache: train.cache_folder or $DETOUR_CACHE moves it)") from error


def _digest_place(data: bytes) -> int:
    """Where the digest stands in a file; -1 where there is none. It is looked for in the header alone."""
    end = 8 + int.from_bytes(data[:8], "little")
    place = data.find(_MARK, 8, end)
    return place + len(_MARK) if place >= 0 and place + len(_MARK) + 64 <= len(data) else -1


def _is_whole(data: bytes, kind: str, key: str) -> bool:
    """Is every byte as it was written, and under this name?"""
    place = _digest_place(data)
    if place < 0:
        return False
    view = memoryview(data)
    digest = hashlib.sha256(view[:place])
    digest.update(_BLANK)
    digest.update(view[place + 64 :])
    if digest.hexdigest().encode() != data[place : place + 64]:
        return False
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return bool(metadata["kind"] == kind and metadata["key"] == key)


def _remove_same(path: Path, opened: os.stat_result) -> None:
    """Remove a damaged file, unless another process has replaced it since it was opened."""
    try:
        now = path.stat()
        if (now.st_ino, now.st_mtime_ns, now.st_size) == (opened.st_ino, opened.st_mtime_ns, opened.st_size):
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} in the cache is damaged and cannot be removed: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------------------ keys


@dataclass(frozen=True, slots=True)
class Keys:
    """What entries are called. All that an entry is made from goes into its key."""

    vae: str
    """`identity(...)` of the VAE, with the type it computes in."""
    text: str
    """`identity(...)` of text encoders and tokenizers, with their types, the architecture and its token limit."""
    spatial_factor: int
    """Pixels for each latent position, along a side: what masks are scaled down by."""
    embedded: bool = True
    """Captions are embedded ahead. They are not where their encoders are trained: what they give changes."""

    def latents(self, item: Item, config: DatasetConfig, crop: int) -> str:
        """Key of an item's latents in one crop variant."""
        transform = asdict(transform_of(item, config, crop))
        return _hash("latents", LATENTS_VERSION, item.picture.sha256, transform, int(RESAMPLE), self.vae)

    def control(self, item: Item, config: DatasetConfig, crop: int) -> str | None:
        """Key of the latents of an item's control picture, treated as its picture is; None where it has none."""
        if item.picture.control_sha256 is None:
            return None
        transform = asdict(control_transform(item, config, crop))
        return _hash("latents", LATENTS_VERSION, item.picture.control_sha256, transform, int(RESAMPLE), self.vae)

    def mask(self, item: Item, config: DatasetConfig, crop: int) -> str | None:
        """Key of an item's mask at latent size; None where it has none."""
        source = mask_source(item.picture, config)
        if source is None:
            return None
        # Neither the colours nor the frames of a clip matter to a mask.
        transform = asdict(transform_of(item, config, crop)) | {"flatten": False, "clip": None}
        return _hash("mask", MASKS_VERSION, source[1], config.alpha_mask, transform, int(RESAMPLE), self.spatial_factor)

    def prompt(self, prompt: str) -> str:
        """Key of a prompt's condition."""
        return _hash("text", TEXT_VERSION, prompt, self.text)


def control_transform(item: Item, config: DatasetConfig, crop: int) -> Transform:
    """What is done to the pixels of an item's control picture."""
    return replace(transform_of(item, config, crop), flatten=True)


def mask_source(picture: Picture, config: DatasetConfig) -> tuple[Path, str] | None:
    """File and sha256 that a picture's mask is taken from: a mask, or the picture itself for its transparency."""
    if config.alpha_mask:
        return (picture.path, picture.sha256) if picture.alpha else None
    if picture.mask is None or picture.mask_sha256 is None:
        return None
    return picture.mask, picture.mask_sha256


def identity(root: Path, parts: Sequence[Path], *settings: str | int) -> str:
    """Hash over the weights, settings and vocabularies in these folders (or files), and over further settings.

    Contents are hashed once and remembered under `root` by path, size and time of change, since a text encoder has
    gigabytes.
    """
    found: list[str] = []
    for part in parts:
        listed = sorted(path for path in part.rglob("*") if path.suffix in _WEIGHTS) if part.is_dir() else [part]
        if not listed:
            raise UserError(f"{part}: no weights or settings in it; is the download complete?")
        names = [path.relative_to(part).as_posix() if part.is_dir() else "" for path in listed]
        found += ["part"]
        found += [f"{name} {_remembered_hash(root, path)}" for name, path in zip(names, listed, strict=True)]
    return _hash("identity", found, list(settings))


def _remembered_hash(root: Path, path: Path) -> str:
    status = path.stat()
    real = str(path.resolve())
    name = _hash("file", real, status.st_size, status.st_mtime_ns, status.st_ino)
    note = root / HASHES / name[:2] / name
    try:
        digest, check = note.read_text().split()
        if check == _hash("note", name, digest):
            return digest
    except (OSError, ValueError):  # not there yet, or damaged: then it is made again
        pass
    digest = files.sha256_file(path)
    if time.time() - status.st_mtime > _FRESH:
        files.write_bytes(note, f"{digest} {_hash('note', name, digest)}\n")
    return digest


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
