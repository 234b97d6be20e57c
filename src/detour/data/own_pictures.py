"""The pictures that a distilled model draws to learn from: which, told what, from which noise. No torch.

All of it is a pure function of the job. A picture's hash is one over what it is drawn from, not over its pixels, which
do not exist: it stays in the latent space. So the order of the data can be planned before anything is drawn.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detour import UserError
from detour.data import everyday
from detour.data.buckets import Bucket
from detour.data.order import Item, Order
from detour.data.scan import Picture
from detour.seeds import seed_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detour.config.job import AdapterConfig, DatasetConfig, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A picture to draw. Sizes are pixels."""

    prompt: str
    seed: int
    """Of its noise."""
    width: int
    height: int
    frames: int

    @property
    def sha256(self) -> str:
        """Of all this."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def plan(config: AdapterConfig) -> list[Drawing]:
    """Every picture of a resolved job: the held-out ones come first. UserError where the prompts cannot be read.

    More `pictures` add to those that were there.
    """
    prompts = prompts_of(config)
    drawings = []
    for index in range(config.pictures):
        # Where sizes and prompts share a divisor, the turn keeps a prompt from always having the same size.
        size = config.sizes[(index + index // len(prompts)) % len(config.sizes)]
        drawings.append(
            Drawing(
                prompt=prompts[index % len(prompts)],
                seed=config.seed + index,
                width=size.width,
                height=size.height,
                frames=config.num_frames,
            )
        )
    return drawings


def prompts_of(config: AdapterConfig) -> list[str]:
    """The prompts that pictures take in turn."""
    if config.prompts_file is None:
        return list(config.prompts) or [everyday.prompt(index) for index in range(config.pictures)]
    path = config.prompts_file.expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"adapter.prompts_file: {path} cannot be read: {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"adapter.prompts_file: {path} holds no prompt; write one a line")
    return prompts


def orders(
    drawings: Sequence[Drawing], dataset: DatasetConfig, train: TrainConfig, held_out: int
) -> tuple[Order, Order]:
    """The order of training on these pictures, and that of the held-out ones, which are the first."""
    items = [_item(index, drawing) for index, drawing in enumerate(drawings)]
    calm = dataset.model_copy(update={"caption_dropout_rate": 0.0})
    return (
        Order(items[held_out:], [dataset], None, train.seed, train.batch_size),
        Order(items[:held_out], [calm], None, train.seed, train.batch_size),
    )


def _item(index: int, drawing: Drawing) -> Item:
    key = f"{index:06d}"
    picture = Picture(
        path=Path("pictures") / key,
        key=key,
        dataset=0,
        sha256=drawing.sha256,
        width=drawing.width,
        height=drawing.height,
        captions=(drawing.prompt,),
        frames=drawing.frames,
    )
    whole = Bucket(drawing.width, drawing.height, drawing.width, drawing.height)
    return Item(picture, whole, flip_x=False, flip_y=False, number=seed_for("own picture", index))
