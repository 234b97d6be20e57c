"""Checkpoints: everything the next step depends on, in one directory that is whole or not there.

`checkpoints/step-000000250/` holds a safetensors file for each group of tensors (weights, ema, optimizer), `state.json`
(numbers), `job.yaml`, and `manifest.json` with the hash of each, written last. Nothing is pickled. The same state gives
the same bytes, so that two runs can be compared by the hashes in their manifests.
"""

import contextlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detour import RefusedError, UserError, __version__, files

STATE = "state.json"
JOB = "job.yaml"
FORMAT = 1
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "accelerate", "torchao", "bitsandbytes")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")

_ENDING = ".safetensors"
_READ_BACK = "did not read back as it was written: the disk may be failing, so this checkpoint was not kept"
_STEP = re.compile(r"^step-(\d{9})$")
_GROUP = re.compile(r"^[a-z][a-z0-9_]*$")
_DTYPES = {  # names of the safetensors format
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run after `step` optimizer steps. `state` is plain JSON; its floats come back exactly."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    """Group ("weights", "ema", "optimizer") -> name -> tensor."""
    state: dict[str, Any]
    job_yaml: str


def folder_name(step: int) -> str:
    """`step-000000250`, which sorts as the steps do."""
    return f"step-{step:09d}"


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint and return its directory once it has been read back and compared with what is in memory.

    At every moment, also if the process is killed, a whole checkpoint stands in `folder` if one stood there before. One
    of the same step is replaced. UserError (DiskFullError for space) leaves everything as it was.
    """
    state = _state_text(snapshot)
    files.remove_stale(folder)
    with files.new_directory(folder / folder_name(snapshot.step), lambda tmp: _compare(tmp, snapshot)) as tmp:
        for group, tensors in snapshot.tensors.items():
            if not _GROUP.match(group):
                raise ValueError(f"{group!r} cannot name a group of tensors")
            files.write_chunks(tmp / f"{group}{_ENDING}", _safetensors(tensors))
        files.write_bytes(tmp / STATE, state)
        files.write_bytes(tmp / JOB, snapshot.job_yaml)
    return folder / folder_name(snapshot.step)


def load(path: Path) -> Snapshot:
    """Read a checkpoint after checking every byte. DamagedError names the damaged file; a pickle is refused."""
    if path.suffix in PICKLES:
        raise UserError(_refusal(path))
    if not path.is_dir():
        raise UserError(f"{path} is not a checkpoint: that is a directory such as checkpoints/{folder_name(250)}")
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLES:
            raise files.DamagedError(_refusal(file))
    files.verify_directory(path)
    groups = [name.removesuffix(_ENDING) for name in files.read_manifest(path) if name.endswith(_ENDING)]
    try:
        content = json.loads((path / STATE).read_bytes())
        if content["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer Detour; update Detour to go on from it")
        step, state = int(content["step"]), content["state"]
        job_yaml = (path / JOB).read_bytes().decode()
        tensors = {group: dict(_read_tensors(path / f"{group}{_ENDING}")) for group in sorted(groups)}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise files.DamagedError(f"{path} is whole but not a checkpoint: {type(error).__name__}: {error}") from None
    name = (files.set_aside_name(path) or path).name
    if _STEP.match(name) and name != folder_name(step):
        raise files.DamagedError(f"{path} holds step {step}: it was renamed; give it back the name {folder_name(step)}")
    return Snapshot(step=step, tensors=tensors, state=state, job_yaml=job_yaml)


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest checkpoint that is whole. Each damaged one that has to be passed over is told to `warn`.

    None if there is no checkpoint, or none that is whole (which is told too).
    """
    found = _candidates(folder)
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix in PICKLES:
            warn(_refusal(file))
    for path in found:
        try:
            return load(path)
        except files.DamagedError as error:
            warn(f"checkpoint passed over: {error}")
    if found:
        warn(f"none of the {len(found)} checkpoints in {folder} is whole, so there is nothing to go on from")
    return None


def prune(folder: Path, keep: int, verified: Path | None = None, spared: int | None = None) -> list[Path]:
    """Remove all checkpoints but the newest `keep`, that of the step `spared`, and never the newest one that is whole.
    Returns what was removed.

    `verified` is a checkpoint known to be whole, as `save` returns it: that spares reading it once more. Each is
    renamed before it is deleted: a process killed meanwhile leaves nothing that looks like a checkpoint.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
    found = _candidates(folder)
    steps = sorted({_step(path) for path in found}, reverse=True)[:keep]
    steps += [] if spared is None else [spared]
    spare = [path for path in found if _step(path) not in steps or files.is_temporary(path)]
    if not spare:
        return []
    whole = next((path for path in found if path == verified or _is_whole(path)), None)
    if whole is None:
        return []
    removed = [path for path in reversed(spare) if path != whole]  # the oldest first
    for path in removed:
        files.remove_directory(path)
    return removed


def preflight(folder: Path, bytes_needed: int, keep: int) -> None:
    """RefusedError if `keep` checkpoints of `bytes_needed` and the one being written do not fit on the disk."""
    needed, free = (keep + 1) * bytes_needed, files.free_bytes(folder)
    if free < needed:
        raise RefusedError(
            f"{folder}: {free / 2**30:.2f} GiB are free where {needed / 2**30:.2f} GiB are needed: {keep} checkpoints "
            f"of {bytes_needed / 2**30:.2f} GiB and one being written. Free some space, lower "
            "save.max_step_saves_to_keep, or choose another output_folder"
        )


def size(snapshot: Snapshot) -> int:
    """Bytes that a checkpoint takes on disk, to within a few kilobytes."""
    tensors = (tensor for group in snapshot.tensors.values() for tensor in group.values())
    return sum(tensor.numel() * tensor.element_size() + 200 for tensor in tensors) + len(snapshot.job_yaml) + 4096


def environment() -> dict[str, str]:
    """Versions of everything that decides the figures of a run, and the commit of Detour's source if it is known."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "detour": __version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if commit := _commit():
        found["commit"] = commit
    return found


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One sentence for each entry of `environment` that differs between a checkpoint and this process."""
    names = sorted(before.keys() | now.keys())
    pairs = ((name, before.get(name, "absent"), now.get(name, "absent")) for name in names)
    return [f"{name} was {old} and is now {new}" for name, old, new in pairs if old != new]


def _candidates(folder: Path) -> list[Path]:
    """Checkpoints, the newest first; one that was moved aside to be replaced comes after its successor."""
    if not folder.is_dir():
        return []
    folders = (path for path in folder.iterdir() if path.is_dir())
    paths = [path for path in folders if _STEP.match((files.set_aside_name(path) or path).name)]
    return sorted(paths, key=lambda path: (-_step(path), files.is_temporary(path), path.name))


def _step(path: Path) -> int:
    return int((files.set_aside_name(path) or path).name.removeprefix("step-"))


def _is_whole(path: Path) -> bool:
    try:
        files.verify_directory(path)
    except UserError:
        return False
    return True


def _refusal(path: Path) -> str:
    return f"{path} is refused: it is a pickle, which can run any code when it is read; Detour uses safetensors only"


def _state_text(snapshot: Snapshot) -> str:
    _require_json(snapshot.state, "state")
    content = {"format": FORMAT, "step": snapshot.step, "state": snapshot.state}
    return json.dumps(content, indent=1, sort_keys=True) + "\n"  # floats as their shortest exact form


def _require_json(value: object, where: str) -> None:
    """TypeError for what JSON would change on the way, such as a tuple or a key that is a number."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is not text")
            _require_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_json(item, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold exactly")


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, one tensor at a time, so that a large state is never held twice.

    Format: 8 bytes with the length of the header, the header (JSON padded to 8 bytes), the tensors without gaps. Wide
    types come first, which keeps each tensor aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors cannot hold")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _bytes(tensors[name]).numpy().data


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's storage as uint8 on the CPU, for any type and shape."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in memory of its own: a mapped file would change under us when it is damaged or replaced."""
    with safe_open(path, framework="pt", backend="pread") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            yield name, file.get_tensor(name)


def _compare(path: Path, snapshot: Snapshot) -> None:
    """DamagedError unless a freshly written directory reads back as what is in memory, bit for bit."""
    try:
        for group, tensors in snapshot.tensors.items():
            found = {
                name: _same(tensor, tensors.get(name)) for name, tensor in _read_tensors(path / f"{group}{_ENDING}")
            }
            for name in sorted(tensors):
                if not found.get(name):
                    raise files.DamagedError(f"{group}{_ENDING}: {name} {_READ_BACK}")
    except SafetensorError as error:
        raise files.DamagedError(f"{path}: {error}; it {_READ_BACK}") from None
    for name, text in ((STATE, _state_text(snapshot)), (JOB, snapshot.job_yaml)):
        if (path / name).read_bytes() != text.encode():
            raise files.DamagedError(f"{name} {_READ_BACK}")


def _same(tensor: Tensor, expected: Tensor | None) -> bool:
    if expected is None or tensor.dtype != expected.dtype or tensor.shape != expected.shape:
        return False
    return torch.equal(_bytes(tensor), _bytes(expected))


def _commit() -> str | None:
    """The commit of Detour's own source: from the checkout it runs in, or as pip noted it for an install from git."""
    git = Path(__file__).resolve().parents[3] / ".git"
    if git.exists():
        with contextlib.suppress(OSError, StopIteration):
            return _git_head(git)
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        note = importlib.metadata.distribution("detour").read_text("direct_url.json")
        commit: str = json.loads(note or "{}")["vcs_info"]["commit_id"]
        return commit
    return None


def _git_head(git: Path) -> str:
    """The commit that is checked out, read without calling git. OSError or StopIteration if there is none yet."""
    if git.is_file():  # a second work tree: the file says where its own folder is, and that one where the refs are
        git = git.parent / git.read_text("utf-8").removeprefix("gitdir:").strip()
    head = (git / "HEAD").read_text("utf-8").strip()
    if not head.startswith("ref: "):
        return head
    common = git / "commondir"
    refs = git / common.read_text("utf-8").strip() if common.exists() else git
    ref = head.removeprefix("ref: ")
    if (refs / ref).exists():
        return (refs / ref).read_text("utf-8").strip()
    packed = (refs / "packed-refs").read_text("utf-8").splitlines()
    return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
