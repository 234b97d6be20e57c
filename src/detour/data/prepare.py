"""Fills the cache with all that training will read: latents, masks, and the conditions of every prompt.

Encoders are loaded only if something is missing. Pictures and prompts are encoded one at a time, although several at
once would be a little faster: batched kernels round differently, and then an entry that had to be made again would
not be the one that was there before.

Shapes: C channels, F frames, H W height and width (latent), L tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from detour import RefusedError, UserError, files
from detour.data import clips, images
from detour.data.cache import LATENTS, MASKS, TEXT, Keys, Store, control_transform, mask_source
from detour.data.order import Order, crop_variants, transform_of
from detour.events import Sink, StageEvent, WarningEvent

if TYPE_CHECKING:
    from detour.archs.base import Arch, Condition
    from detour.data.images import Transform

READERS, WRITERS = 4, 2  # threads that decode pictures ahead of the encoder, and write behind it
_TOGETHER = 8 << 20  # pixels of one file's crops that are decoded at once, where several fit: 24 MB
_WAITING = 256 << 20  # bytes of pixels that may wait for the encoder: two clips of 81 frames at 832 x 480
_Source = TypeVar("_Source")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """What turns pictures and prompts into tensors. The loaders are called at most once, and only if needed."""

    arch: Arch
    load_vae: Callable[[], nn.Module]
    load_text: Callable[[], Any]
    """Gives what `Arch.encode_prompts` takes."""
    keys: Keys
    device: torch.device
    """Where pixels are sent."""


@dataclass(frozen=True, slots=True)
class _Missing:
    """A tensor that is not in the cache, and how to make it."""

    kind: str
    key: str
    transform: Transform

    @property
    def frames(self) -> int:
        """How many pictures are decoded for it."""
        return self.transform.clip.frames if self.transform.clip is not None and self.kind == LATENTS else 1

    @property
    def pixels(self) -> int:
        """Of all its frames."""
        return self.transform.width * self.transform.height * self.frames


def prepare(
    orders: Sequence[Order], epochs: int, prompts: Iterable[str], encoders: Encoders, store: Store, sink: Sink
) -> dict[str, int]:
    """Cache all that these orders can ask for in so many epochs, and further prompts; tokens of every prompt.

    What is in the cache is verified in full. Raises UserError or RefusedError for what the user can put right.
    """
    lengths = prepare_captions(orders, epochs, prompts, encoders, store, sink)
    prepare_latents(orders, encoders, store, sink)
    return lengths


def prepare_captions(
    orders: Sequence[Order], epochs: int, prompts: Iterable[str], encoders: Encoders, store: Store, sink: Sink
) -> dict[str, int]:
    """As `prepare`, without the latents."""
    store.remove_leftovers()
    owners: dict[str, list[str]] = defaultdict(list)
    for order in orders:
        for item in order.items:
            for caption in order.variants(item):
                owners[caption].append(item.picture.key)
    wanted = set(prompts).union(*(order.prompts(range(epochs)) for order in orders))
    lengths = prepare_prompts(sorted(wanted), encoders, store, sink)
    _warn_of_long_prompts(lengths, owners, encoders.arch, sink)
    return lengths


def token_count(condition: Condition) -> int:
    """Tokens in a condition: the longest of its tensors whose shape, by their name (`..._LD`), begins with L."""
    return max((t.shape[0] for name, t in condition.items() if name.rpartition("_")[2].startswith("L")), default=0)


# ------------------------------------------------------------------------------------------------------- prompts


def prepare_prompts(prompts: Sequence[str], encoders: Encoders, store: Store, sink: Sink) -> dict[str, int]:
    """Cache the conditions of these prompts; tokens of each (where none are cached: the most there can be)."""
    if not encoders.keys.embedded:
        return dict.fromkeys(prompts, encoders.arch.spec.text_tokens)
    meter = Meter(sink, "captions", len(prompts))
    lengths: dict[str, int] = {}
    missing: list[str] = []
    damaged = len(store.damaged)
    with ThreadPoolExecutor(READERS) as readers:
        read = _ahead(readers, lambda prompt: store.get(TEXT, encoders.keys.prompt(prompt)), prompts)
        for prompt, condition in read:
            if condition is None:
                missing.append(prompt)
            else:
                lengths[prompt] = token_count(condition)
                meter.add(1)
    _warn_of_damage(store, damaged, sink)
    if missing:
        text = encoders.load_text()
        with _Writer(store) as writer, torch.no_grad():
            for index, prompt in enumerate(missing):
                (condition,) = encoders.arch.encode_prompts(text, [prompt])
                for name, tensor in condition.items():
                    _require_finite(
                        tensor, f"the text encoder gave {name} of {prompt[:80]!r} values that are not finite"
                    )
                if index == 0:
                    _require_space(store, len(missing) * _bytes(condition.values()), "text embeddings")
                lengths[prompt] = token_count(condition)
                writer.put(TEXT, encoders.keys.prompt(prompt), condition)
                meter.add(1)
    meter.finish()
    return lengths


def _warn_of_long_prompts(lengths: dict[str, int], owners: dict[str, list[str]], arch: Arch, sink: Sink) -> None:
    """Captions that fill the text encoder's limit were most likely cut.

    Architectures that pad every prompt to the limit cannot be judged by it; their captions all round up to one length.
    """
    limit = arch.spec.text_tokens
    if arch.spec.text_multiple >= limit:
        return
    cut = [prompt for prompt, length in lengths.items() if length >= limit]
    details = [f"{', '.join(dict.fromkeys(owners.get(prompt, ['prompt'])))}: {prompt[:60]}..." for prompt in cut]
    if cut:
        message = f"captions as long as the limit of {limit} tokens; what goes beyond it has no effect: {len(cut)}"
        sink.emit(WarningEvent(step=None, message=message, details=details))


# ------------------------------------------------------------------------------------------------------- latents


def prepare_latents(orders: Sequence[Order], encoders: Encoders, store: Store, sink: Sink) -> None:
    """Cache latents and masks of every item in every crop variant."""
    # (picture or mask file, its hash, is it read for its transparency) -> what is made from it
    wanted: dict[tuple[Path, str, bool], dict[str, _Missing]] = defaultdict(dict)
    for order in orders:
        for item in order.items:
            config = order.datasets[item.picture.dataset]
            source = mask_source(item.picture, config)
            for crop in range(crop_variants(config)):
                transform = transform_of(item, config, crop)
                key = encoders.keys.latents(item, config, crop)
                wanted[item.picture.path, item.picture.sha256, False][key] = _Missing(LATENTS, key, transform)
                mask = encoders.keys.mask(item, config, crop)
                control = encoders.keys.control(item, config, crop)
                if control is not None and item.picture.control is not None:
                    beside = (item.picture.control, str(item.picture.control_sha256), False)
                    wanted[beside][control] = _Missing(LATENTS, control, control_transform(item, config, crop))
                if source is not None and mask is not None:
                    wanted[*source, config.alpha_mask][mask] = _Missing(MASKS, mask, transform)
    meter = Meter(sink, "latents", sum(map(len, wanted.values())))
    damaged = len(store.damaged)
    missing: list[tuple[tuple[Path, str, bool], _Missing]] = []
    listed = [(source, entry) for source, entries in wanted.items() for entry in entries.values()]
    with ThreadPoolExecutor(READERS) as readers:
        for pair, there in _ahead(readers, lambda pair: store.has(pair[1].kind, pair[1].key), listed):
            if there:
                meter.add(1)
            else:
                missing.append(pair)
    _warn_of_damage(store, damaged, sink)
    if missing:
        _require_space(store, sum(_expected_bytes(entry, encoders.arch) for _, entry in missing), "latents")
        _encode(missing, encoders, store, meter)
    meter.finish()


def _encode(
    missing: Sequence[tuple[tuple[Path, str, bool], _Missing]], encoders: Encoders, store: Store, meter: Meter
) -> None:
    """Decode in threads, encode one at a time, write in threads. The VAE is loaded if a picture is among them."""
    vae = encoders.load_vae() if any(entry.kind == LATENTS for _, entry in missing) else None
    tasks = list(_tasks(missing))
    waiting = _WAITING // (3 * max(sum(entry.pixels for entry in task.entries) for task in tasks))
    with ThreadPoolExecutor(READERS) as readers, _Writer(store) as writer, torch.no_grad():
        for task, arrays in _ahead(readers, _decoded, tasks, min(2 * READERS, waiting)):
            for entry, array in zip(task.entries, arrays, strict=True):
                if entry.kind == MASKS:
                    tensors = {"mask_1HW": _pooled(array, encoders.keys.spatial_factor)}
                else:
                    assert vae is not None
                    latents = _latents(encoders, vae, array, task.path)
                    tensors = {"latents_CHW" if latents.ndim == 3 else "latents_CFHW": latents}
                writer.put(entry.kind, entry.key, tensors)
                meter.add(1)


@dataclass(frozen=True, slots=True)
class _Task:
    """Some entries made from one file."""

    path: Path
    sha256: str
    alpha: bool
    entries: tuple[_Missing, ...]


def _tasks(missing: Sequence[tuple[tuple[Path, str, bool], _Missing]]) -> Iterator[_Task]:
    """One file after another, each decoded once for a few entries of one kind."""
    groups: dict[tuple[tuple[Path, str, bool], str], list[_Missing]] = defaultdict(list)
    for source, entry in missing:
        groups[source, entry.kind].append(entry)
    for (source, _), entries in groups.items():
        together = max(1, _TOGETHER // max(entry.pixels for entry in entries))
        for start in range(0, len(entries), together):
            yield _Task(*source, tuple(entries[start : start + together]))


def _decoded(task: _Task) -> list[np.ndarray]:
    transforms = [entry.transform for entry in task.entries]
    if task.entries[0].kind == MASKS:
        return images.mask_pixels(task.path, task.sha256, transforms, task.alpha)
    if transforms[0].clip is not None:
        return clips.pixels(task.path, task.sha256, transforms)
    return images.pixels(task.path, task.sha256, transforms)


def _latents(encoders: Encoders, vae: nn.Module, array: np.ndarray, path: Path) -> Tensor:
    """Latents of RGB bytes (H, W, 3), or of a clip's (F, H, W, 3). A model of video takes a picture as one frame."""
    if encoders.arch.spec.frame_factor is not None and array.ndim == 3:
        array = array[None]
    pixels_3HW = torch.from_numpy(array).movedim(-1, 0).float() / 127.5 - 1.0
    latents_1CHW = encoders.arch.encode_images(vae, pixels_3HW[None].to(encoders.device))
    _require_finite(latents_1CHW, f"the VAE gave {path} values that are not finite; give the VAE a wider type")
    return latents_1CHW[0]


def _pooled(array: np.ndarray, factor: int) -> Tensor:
    """A mask's bytes (H, W) as the mean over each latent position's pixels, in [0, 1], shape (1, H / f, W / f)."""
    mask_1HW = torch.from_numpy(array)[None].float() / 255.0
    return nn.functional.avg_pool2d(mask_1HW, factor)


# ---------------------------------------------------------------------------------------------------- helping hands


class Meter:
    """Tells the sink how far it is: at the start, twice a second, and at the end."""

    def __init__(self, sink: Sink, name: str, total: int) -> None:
        self._sink, self._name, self._total = sink, name, total
        self._done = 0
        self._last = 0.0

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._last >= 0.5 and self._done < self._total:
            self._emit()

    def finish(self) -> None:
        if self._total:
            self._emit()

    def _emit(self) -> None:
        self._last = time.monotonic()
        self._sink.emit(StageEvent(name=self._name, done=self._done, total=self._total))


class _Writer:
    """Writes entries in threads, so that the encoder does not wait for the disk; few enough are under way to fit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(WRITERS)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        while kind is None and self._pending:
            self._pending.popleft().result()

    def put(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Write soon. Raises what an earlier write raised."""
        own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._pending.append(self._pool.submit(self._store.put, kind, key, own))
        while len(self._pending) > 4 * WRITERS or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Source], _Result], sources: Iterable[_Source], ahead: int = 2 * READERS
) -> Iterator[tuple[_Source, _Result]]:
    """Results in order, with so many worked on ahead of whoever takes them."""
    pending: deque[tuple[_Source, Future[_Result]]] = deque()
    for source in sources:
        pending.append((source, pool.submit(work, source)))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def _require_finite(tensor: Tensor, problem: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{problem} (bf16 and fp32 have the range that fp16 lacks)")


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _expected_bytes(entry: _Missing, arch: Arch) -> int:
    """Float32 latents, or a float32 mask."""
    shape = arch.spec.latent_shape(entry.transform.width, entry.transform.height, entry.frames)
    return 4 * prod(shape if entry.kind == LATENTS else shape[-2:])


def _require_space(store: Store, needed: int, what: str) -> None:
    free = files.free_bytes(store.root)
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        advice = "free some, or choose another place with train.cache_folder or $DETOUR_CACHE"
        raise RefusedError(f"{store.root} has no room for the {what}, which need about {sizes}; {advice}")


def _warn_of_damage(store: Store, before: int, sink: Sink) -> None:
    damaged = store.damaged[before:]
    if damaged:
        message = f"entries of the cache were damaged; they are removed and made again: {len(damaged)}"
        sink.emit(WarningEvent(step=None, message=message, details=[str(path) for path in damaged]))
