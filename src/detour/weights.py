"""Find a model and stream its weights into place. The only code that talks to the network.

A model is a folder in the diffusers layout, a single `.safetensors` file with the denoiser alone, or a hub id; what is
found becomes a `ModelSource`. Weights are read one tensor at a time and are cast, patched, moved and quantised on the
way (`materialise`), so that a model never exists twice and at most one layer of it is unquantised.
Pickled weights are refused: opening them runs code.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from detour import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_CANONICAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""Names that diffusers and transformers give to the weights of a component; other files beside them are variants."""
_LISTED = 6
"""Names shown in an error; the rest is counted."""

# Names that the hub accepts; anything else can only be a path on this machine.
_HUB_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_FILE = re.compile(rf"(?!.*\.\.){_HUB_REPO.pattern}/[\w .()+/-]+\.safetensors", re.ASCII)
_WANTED_FILES = ("safetensors", "json", "txt", "jinja", "model")
"""What is fetched of a component: weights, settings, vocabularies, chat template, sentencepiece model."""
_VARIANTS = ["*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.non_ema-*"]
"""Second copies of the weights, in another precision."""


@dataclass(frozen=True)
class ModelSource:
    """Where the parts of a model are, all on this machine."""

    name: str
    """What the user wrote, for messages and metadata."""
    folder: Path | None = None
    """In the diffusers layout, one subfolder for each component."""
    single_file: Path | None = None
    """The denoiser alone, in its original or in the diffusers layout."""
    extras: ModelSource | None = None
    """Where the components come from that this source lacks."""
    revision: str | None = None

    def find(self, component: str) -> Path | None:
        """Folder of a component, from this source or from its extras; None where neither has it."""
        if self.folder is not None and (self.folder / component).is_dir():
            return self.folder / component
        return self.extras.find(component) if self.extras is not None else None

    def index(self) -> dict[str, Any]:
        """What `model_index.json` says of the model: its pipeline's class and its components. Empty where none is."""
        path = self.folder / "model_index.json" if self.folder is not None else None
        if path is None or not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a readable index of a model ({error}); fetch it again") from error

    def lacks(self, component: str) -> bool:
        """Is the model made without a component? Its index, or that of its extras, then says `null`."""
        if self.find(component) is not None:
            return False
        return self.index().get(component) == [None, None] or (self.extras is not None and self.extras.lacks(component))

    def component(self, component: str) -> Path:
        """Folder of a component; an error naming what is there instead."""
        if (folder := self.find(component)) is not None:
            return folder
        where = f"{self.name} (extras: {self.extras.name})" if self.extras is not None else self.name
        if self.folder is None:
            raise UserError(
                f"{where}: there is no {component}, because a single file holds the denoiser alone; set "
                f"model.extras_name_or_path to a folder or hub id that has it (for Z-Image: Tongyi-MAI/Z-Image-Turbo)"
            )
        there = _some(sorted(entry.name for entry in self.folder.glob("*"))) or "nothing"
        raise UserError(
            f"{where}: there is no {component}/ in {self.folder}; found: {there}. A model folder has one subfolder "
            f"for each part, as diffusers saves it; if another model has what is missing, set "
            f"model.extras_name_or_path. A model that is one file is named by that file (user/repo/file.safetensors)"
        )

    def options(self, defaults: Mapping[str, object]) -> dict[str, object]:
        """Settings of the pipeline in `model_index.json`, from this source or its extras; else `defaults`."""
        if not (given := self.index()):
            return self.extras.options(defaults) if self.extras is not None else dict(defaults)
        return {key: given.get(key, value) for key, value in defaults.items()}


def find_model(
    name_or_path: str,
    *,
    components: Sequence[str],
    denoiser: str,
    optional: Sequence[str] = (),
    extras: str | None = None,
    revision: str | None = None,
) -> ModelSource:
    """The parts of a model, downloaded where necessary; an error if any of `components` is missing.

    `denoiser` is the component that a single file holds. With `extras`, the other components come from there. Those in
    `optional` may be missing where the model's index says that it is made without them.
    """
    others = [component for component in components if component != denoiser]
    extra_source = (
        find_model(extras, components=others, denoiser="", optional=optional) if extras is not None and others else None
    )
    wanted = [component for component in components if component == denoiser or extra_source is None]
    source = _locate(name_or_path, wanted, extra_source, revision)
    for component in components:
        if component in optional and source.lacks(component):
            continue
        if component != denoiser or source.single_file is None:
            source.component(component)
    return source


def _locate(name_or_path: str, wanted: Sequence[str], extras: ModelSource | None, revision: str | None) -> ModelSource:
    path = Path(name_or_path).expanduser()
    if path.is_dir() or path.is_file():
        if revision is not None:
            raise UserError(
                f"model.revision: {revision!r} has no meaning for {name_or_path}, which is local; leave it out"
            )
        if path.is_dir():
            return ModelSource(name_or_path, folder=path, extras=extras)
        _refuse_pickle(path, "model")
        return ModelSource(name_or_path, single_file=path, extras=extras)
    _refuse_pickle(path, "model")
    if _HUB_FILE.fullmatch(name_or_path):
        file = _download_file(name_or_path, "model", revision)
        return ModelSource(name_or_path, single_file=file, extras=extras, revision=revision)
    if _HUB_REPO.fullmatch(name_or_path):
        folder = _download_components(name_or_path, wanted, revision)
        return ModelSource(name_or_path, folder=folder, extras=extras, revision=revision)
    raise UserError(
        f"model {name_or_path}: no such folder or file. Give a folder in the diffusers layout, a .safetensors file, "
        f"or a hub id such as Tongyi-MAI/Z-Image-Turbo"
    )


def find_file(path_or_hub: str, *, what: str, revision: str | None = None) -> Path:
    """A `.safetensors` file on this machine, or `user/repo/file.safetensors` on the hub. `what` names it in errors."""
    path = Path(path_or_hub).expanduser()
    _refuse_pickle(path, what)
    if path.is_file():
        return path
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "no .safetensors file"
        raise UserError(f"{what} {path_or_hub}: this is a folder; name the file in it (found: {inside})")
    if _HUB_FILE.fullmatch(path_or_hub):
        return _download_file(path_or_hub, what, revision)
    raise UserError(
        f"{what} {path_or_hub}: no such file. Give a local .safetensors file or user/repo/file.safetensors on the hub"
    )


def _refuse_pickle(path: Path, what: str) -> None:
    if path.suffix in _PICKLES:
        raise UserError(
            f"{what} {path}: {path.suffix} files are pickles, and opening one runs whatever code is in it; "
            f"this program reads only .safetensors. Take the .safetensors version of it"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{what} {path}: not a .safetensors file")


def _download_components(repo: str, components: Sequence[str], revision: str | None) -> Path:
    """Folder with the named components of a repository, fetched or from the cache."""
    from huggingface_hub import snapshot_download

    patterns = [
        "model_index.json",
        *(f"{component}/*.{ending}" for component in components for ending in _WANTED_FILES),
    ]
    with _hub_errors("model", repo, revision):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=_VARIANTS))


def _download_file(name: str, what: str, revision: str | None) -> Path:
    """`user/repo/sub/file.safetensors`, fetched or from the cache."""
    from huggingface_hub import hf_hub_download

    user, repo, file = name.split("/", 2)
    with _hub_errors(what, name, revision):
        return Path(hf_hub_download(f"{user}/{repo}", file, revision=revision))


@contextmanager
def _hub_errors(what: str, name: str, revision: str | None) -> Iterator[None]:
    """Turns what can go wrong with the hub into one sentence that says what to do."""
    import httpx2  # what huggingface_hub itself speaks through
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        advice = "the repository is gated; accept its terms on its page, then `hf auth login` or set HF_TOKEN"
        raise UserError(f"{what} {name}: {advice}") from error
    except errors.RepositoryNotFoundError as error:
        advice = "check the spelling; if it is private, `hf auth login` or set HF_TOKEN"
        raise UserError(
            f"{what} {name}: no such path on this machine, and no such repository on the hub; {advice}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{what} {name}: the repository has no revision {revision!r}; give a branch, tag or commit of it"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(
            f"{what} {name}: the repository exists but has no such file; look at its list of files"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{what} {name}: {_unreachable(error)}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx2.HTTPError, OSError) as error:
        raise UserError(
            f"{what} {name}: the download failed ({_first_line(error)}); what was fetched is kept, try again"
        ) from error


def _unreachable(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return (
            "not (completely) in the cache, and HF_HUB_OFFLINE is set; unset it once to download, or give a local path"
        )
    return (
        f"not (completely) in the cache, and the hub cannot be reached ({_first_line(error.__cause__ or error)}); "
        f"check the connection and HF_ENDPOINT, or give a local path"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def component_files(folder: Path) -> list[Path]:
    """The weight files of one component: the shards that its index names, or its single file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    canonical = [index for index in indexes if index.name.removesuffix(".index.json") in _CANONICAL]
    singles = [folder / name for name in _CANONICAL if (folder / name).is_file()]
    if canonical or (len(indexes) == 1 and not singles):
        return _shards((canonical or indexes)[0])
    found = sorted(folder.glob("*.safetensors"))
    if len(singles) == 1:
        return singles
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(file.name for file in found)
        raise UserError(
            f"{folder}: several weight files and no index ({names}); keep one of them or the index of the shards"
        )
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
        raise UserError(
            f"{folder}: only pickled weights ({_some(pickles)}), which run code when opened; take the .safetensors one"
        )
    raise UserError(f"{folder}: no .safetensors file; is the download complete?")


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index}: not a readable index of shards ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: shards outside its folder ({outside[0]}); this index is not to be trusted")
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{index.parent}: {len(missing)} of {len(files)} shards are missing ({_some(missing)}); fetch it again"
        )
    return files


def component_config(folder: Path, key: str, *expected: str) -> dict[str, object]:
    """A component's config.json, which must say under `key` that it is of a kind that the architecture expects."""
    path = folder / "config.json"
    try:
        config: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a readable config ({error}); is the download complete?") from error
    if kind not in expected:
        raise UserError(f"{path}: this is a {kind}, where the architecture has a {expected[0]}; is model.arch right?")
    return config


def stream_tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the files, one at a time, in the order of the names within a file."""
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                # By name, so that weight and bias of a layer follow each other whatever their types.
                for name in sorted(opened.keys()):
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(_unreadable(file, error)) from error


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of everything in the files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(_unreadable(file, error)) from error
    return shapes


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a small file, in memory of their own, and its metadata."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata: Mapping[str, str] | None = opened.metadata()
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, dict(metadata or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(_unreadable(path, error)) from error


def _unreadable(file: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{file}: no such file"
    if isinstance(error, SafetensorError):
        return f"{file}: not a whole .safetensors file ({error}); delete it and fetch it again"
    return f"{file}: cannot be read ({error})"


@dataclass(frozen=True)
class Placement:
    """What happens to each weight on its way into the module, in this order: patch, cast, move, quantise."""

    dtype: torch.dtype
    """Type of floating-point tensors; others keep theirs."""
    device: torch.device
    quantizer: Callable[[str, nn.Linear], nn.Module] | None = None
    """Given a complete linear layer on `device`, quantises it in place or returns what stands in for it."""
    patch: Callable[[str, Tensor], Tensor] | None = None
    """Given a parameter's name and its tensor as stored, returns the tensor to use (a merged training adapter)."""
    keep_float32: str = ""
    """Regular expression found in the names of tensors that become float32 instead of `dtype`."""


@dataclass
class _Filling:
    """A module on the meta device, how far it is filled, and what did not fit."""

    module: nn.Module
    placement: Placement
    names_of: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """All names of one and the same tensor: tied weights are stored once."""
    wanted: dict[str, Tensor] = field(default_factory=dict)
    filled: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wanted = dict(self.module.state_dict(keep_vars=True))
        for name, tensor in self.wanted.items():
            self.names_of[id(tensor)].append(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Place one stored tensor, or note why it has no place. Nothing is converted once something was wrong."""
        if name not in self.wanted:
            self.unknown.append(name)
        elif tensor.shape != self.wanted[name].shape:
            self.misfits.append(f"{name} {list(tensor.shape)} instead of {list(self.wanted[name].shape)}")
        elif name in self.filled and len(self.names_of[id(self.wanted[name])]) == 1:
            self.misfits.append(f"{name} is stored twice")
        elif not self.unknown and not self.misfits:
            self._place(name, tensor)
        if name in self.wanted:
            self.filled.update(self.names_of[id(self.wanted[name])])

    def _place(self, name: str, tensor: Tensor) -> None:
        placement = self.placement
        if placement.patch is not None:
            tensor = placement.patch(name, tensor)
        kept = bool(placement.keep_float32) and re.search(placement.keep_float32, name) is not None
        dtype = (torch.float32 if kept else placement.dtype) if tensor.is_floating_point() else tensor.dtype
        # A copy in any case: what safetensors returns is a view of the mapped file, which somebody may replace.
        tensor = tensor.detach().to(placement.device, dtype, copy=True)
        is_parameter = isinstance(self.wanted[name], nn.Parameter)
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for alias in self.names_of[id(self.wanted[name])]:
            owner_name, _, attribute = alias.rpartition(".")
            owner = self.module.get_submodule(owner_name)
            setattr(owner, attribute, value)
            self._quantise(owner_name, owner)

    def _quantise(self, name: str, owner: nn.Module) -> None:
        if self.placement.quantizer is None or not isinstance(owner, nn.Linear):
            return
        if any(parameter.is_meta for parameter in owner.parameters(recurse=False)):
            return  # its bias is still to come
        quantised = self.placement.quantizer(name, owner)
        for parameter in quantised.parameters():
            parameter.requires_grad_(False)
        if quantised is not owner:
            self.module.set_submodule(name, quantised)


def materialise(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], placement: Placement, *, where: str) -> None:
    """Fill a module whose parameters are on the meta device, in place. Every parameter ends frozen.

    Raises UserError, naming `where` the tensors came from, when any is missing, unknown or of another shape.
    Buffers that no file stores (non-persistent ones) were computed when the module was built; they move along.
    """
    filling = _Filling(module, placement)
    for name, tensor in tensors:
        filling.put(name, tensor)
    missing = [name for name in filling.wanted if name not in filling.filled]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unknown", filling.unknown), ("that do not fit", filling.misfits))
        if names
    ]
    if problems:
        raise UserError(
            f"{where}: these are not the weights of a {type(module).__name__} with this configuration. Tensors "
            f"{'; '.join(problems)}. Is model.arch right for this model, and is its download complete?"
        )
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name in owner._non_persistent_buffers_set and not buffer.is_meta:
                owner.register_buffer(name, buffer.to(placement.device), persistent=False)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
