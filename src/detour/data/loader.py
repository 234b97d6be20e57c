"""Reads batches from the cache, from any position of the order to the end of time.

The order is planned in the main process; worker processes only read, so any number of them (or none) gives the same
sequence. Every entry is verified as it is read.

Shapes: B batch, C channels, H W height and width (latent), F frames. Latents named BCHW are BCFHW where the model draws
video.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detour import UserError
from detour.archs.base import Framing
from detour.config.job import DatasetConfig
from detour.data.cache import LATENTS, MASKS, TEXT, Keys, Store
from detour.data.order import BatchPlan, Draw, Order, Position, transform_of

if TYPE_CHECKING:
    from detour.archs.base import Condition

_PREFETCH = 4  # batches that each worker reads ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch."""

    latents_BCHW: Tensor
    """Normalised, float32."""
    conditions: list[Condition]
    weights_B: Tensor
    """Of each picture's loss: the dataset's `loss_weight`, for regularisation sets times `reg_weight`."""
    masks_B1HW: Tensor | None
    """Weight of each latent position, with mean 1 over each picture; see `loss_mask`. None: no picture has a mask."""
    names: list[str]
    """Of the pictures: the dataset's folder and the key."""
    prompts: list[str]
    framings: list[Framing]
    is_reg: bool
    epoch: int

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return replace(
            self,
            latents_BCHW=self.latents_BCHW.to(device),
            conditions=[{name: t.to(device) for name, t in condition.items()} for condition in self.conditions],
            weights_B=self.weights_B.to(device),
            masks_B1HW=None if self.masks_B1HW is None else self.masks_B1HW.to(device),
        )


@dataclass(frozen=True, slots=True)
class Source:
    """Where batches come from, besides the order. Small, since every worker gets a copy."""

    store: Store
    keys: Keys
    datasets: Sequence[DatasetConfig]
    reg_weight: float


def loss_mask(mask: Tensor, floor: float) -> Tensor:
    """The loss's weight at each position, from a mask in [0, 1]: at least `floor`, scaled to mean 1 over the picture.

    The mean is kept, so that a picture counts as much with a mask as without: the mask moves attention inside the
    picture and not between pictures. A mask that is black everywhere, with floor 0, gives zeros.
    """
    weight = floor + (1.0 - floor) * mask
    mean = weight.mean()
    return weight / mean if mean > 0 else weight


def load_batch(source: Source, plan: BatchPlan) -> Batch:
    """Read one batch. UserError naming the picture where the cache lacks something or has it damaged."""
    configs = [source.datasets[draw.item.picture.dataset] for draw in plan.draws]
    pairs = list(zip(plan.draws, configs, strict=True))
    latents = [
        next(iter(_entry(source, LATENTS, source.keys.latents(draw.item, config, draw.crop), draw).values()))
        for draw, config in pairs
    ]
    conditions = [_caption(source, draw) | _control(source, draw, config) for draw, config in pairs]
    masks = [_mask(source, draw, config) for draw, config in pairs]
    factor = source.reg_weight if plan.is_reg else 1.0
    blank_1HW = torch.ones(1, *latents[0].shape[-2:])
    return Batch(
        latents_BCHW=torch.stack(latents),
        conditions=conditions,
        weights_B=torch.tensor([config.loss_weight * factor for config in configs], dtype=torch.float32),
        masks_B1HW=None
        if all(m is None for m in masks)
        else torch.stack([blank_1HW if m is None else m for m in masks]),
        names=[f"{config.folder_path.name}/{draw.item.picture.key}" for draw, config in pairs],
        prompts=[draw.prompt for draw in plan.draws],
        framings=[_framing(draw, config) for draw, config in pairs],
        is_reg=plan.is_reg,
        epoch=plan.epoch,
    )


def _caption(source: Source, draw: Draw) -> Condition:
    """What the caption was embedded to; nothing where that is done while training."""
    return _entry(source, TEXT, source.keys.prompt(draw.prompt), draw) if source.keys.embedded else {}


def _control(source: Source, draw: Draw, config: DatasetConfig) -> Condition:
    """What is told of a control picture, under the name that architectures know it by."""
    key = source.keys.control(draw.item, config, draw.crop)
    return {} if key is None else {"control_CHW": _entry(source, LATENTS, key, draw)["latents_CHW"]}


def _framing(draw: Draw, config: DatasetConfig) -> Framing:
    picture, cut = draw.item.picture, transform_of(draw.item, config, draw.crop)
    return Framing(original=(picture.width, picture.height), crop=(cut.left, cut.top), size=(cut.width, cut.height))


def batches(
    order: Order, source: Source, start: Position, num_workers: int, context: str | None = None
) -> Iterator[tuple[Batch, Position]]:
    """Batches from `start` on, without end, each with the position of the next.

    `context` is how worker processes are started (`fork`, `spawn`, ...); None takes the platform's way.
    """
    loader = DataLoader(
        _Reader(source),
        batch_size=None,
        sampler=_Plans(order, start),
        num_workers=num_workers,
        collate_fn=_as_is,
        worker_init_fn=_leave_signals_to_main,
        prefetch_factor=_PREFETCH if num_workers else None,
        multiprocessing_context=context if num_workers else None,
    )
    with _interrupts_held():
        results = iter(loader)  # starts the workers
    for result in results:
        if isinstance(result, _Failure):
            raise UserError(result.message)
        yield result


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way from a worker: raised there, torch would hide its message in a traceback."""

    message: str


class _Reader(Dataset[tuple[Batch, Position] | _Failure]):
    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, plan: BatchPlan) -> tuple[Batch, Position] | _Failure:
        try:
            return load_batch(self._source, plan), plan.after
        except UserError as error:
            return _Failure(str(error))


class _Plans:
    """The plans from a position on, without end."""

    def __init__(self, order: Order, start: Position) -> None:
        self._order, self._start = order, start

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, first = self._start
        while True:
            yield from self._order.epoch(epoch)[first:]
            epoch, first = epoch + 1, 0


def _as_is(result: object) -> object:
    return result


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the block ends. Processes started inside never get it, not even while they are starting."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main(_worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main process saves first and needs its workers for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _entry(source: Source, kind: str, key: str, draw: Draw) -> dict[str, Tensor]:
    entry = source.store.get(kind, key)
    if entry is None:
        what = {LATENTS: "latents", MASKS: "mask", TEXT: "caption's embedding"}[kind]
        where = source.store.path(kind, key)
        raise UserError(
            f"the {what} of {draw.item.picture.path} went missing from the cache, or was damaged, while training "
            f"({where}); start again: it goes on from the last checkpoint and makes that entry again"
        )
    return entry


def _mask(source: Source, draw: Draw, config: DatasetConfig) -> Tensor | None:
    key = source.keys.mask(draw.item, config, draw.crop)
    return None if key is None else loss_mask(_entry(source, MASKS, key, draw)["mask_1HW"], config.mask_min_value)
