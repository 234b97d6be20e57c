"""Holds back what libraries log while they are imported, about parts of them that nothing here uses. No torch."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOISE = {
    "torchao": re.compile(r"Failed to load .*_C\w*"),
    "torch.utils._pytree": re.compile(r".*register_constant\(\) on Enum subclasses"),
    "bitsandbytes.backends.cpu.ops": re.compile(r"Failed to load CPU gemm_4bit_forward"),
    "diffusers.models.modeling_utils": re.compile(r"There are modules in \w+ that should be kept in float32: \[\]"),
    "diffusers.quantizers.torchao.torchao_quantizer": re.compile(r"Unable to import `torchao` Tensor objects"),
    "transformers.utils.import_utils": re.compile(r"`\w+ImageProcessor` requires torchvision"),
}
"""By logger: optional kernels, a notice to torchao's own authors, a caution of diffusers' about no module at all, its
reader of quantised checkpoints, and processors for pictures that pipelines know and nothing here uses."""


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bar of transformers' for what takes a millisecond."""
    from transformers.utils import logging as shown

    on = shown.is_progress_bar_enabled()
    shown.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            shown.enable_progress_bar()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hold back exactly the notices of `_NOISE` while torchao, bitsandbytes and those that import them are imported.

    Everything else that is logged passes. May be nested.
    """

    def keep(record: logging.LogRecord) -> bool:
        return _NOISE[record.name].match(record.getMessage()) is None

    loggers = [logging.getLogger(name) for name in _NOISE]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
