"""The LoRA files of a run: what their names and headers say. No torch, no weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError, safe_open

from detour import UserError, files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from detour.nn.lora_keys import LoraFormat


KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
"""How people write the kinds of adapters."""


@dataclass(frozen=True, kw_only=True)
class LoraOnDisk:
    """A LoRA file of a run."""

    path: Path
    step: int | None
    """None: the finished LoRA."""
    format: LoraFormat
    proof: str | None
    """Who loaded it back when it was written, where the events tell."""

    @property
    def key(self) -> str:
        """Names it among the run's: `final-comfy`, `250-comfy`."""
        return f"{'final' if self.step is None else self.step}-{self.format}"


def loras(
    folder: Path, output_name: str, formats: Sequence[LoraFormat], proofs: Mapping[str, str | None] | None = None
) -> list[LoraOnDisk]:
    """The LoRA files of a run, the finished ones first, then the newest. `proofs` are by file name.

    `output_name` and `formats` are those of its job file. As `train.run` names them: the first format has no suffix,
    and is that of the saves on the way.
    """
    name, known = re.escape(files.safe_name(output_name)), proofs or {}
    pattern = re.compile(rf"{name}(?:-(\d{{9,}}))?(?:\.(comfy|diffusers|kohya))?\.safetensors")
    found = [
        LoraOnDisk(
            path=path,
            step=None if match[1] is None else int(match[1]),
            format=cast("LoraFormat", match[2]) if match[2] else formats[0],
            proof=known.get(path.name),
        )
        for path in sorted(folder.glob("*.safetensors"))
        if (match := pattern.fullmatch(path.name)) is not None and path.is_file() and not path.is_symlink()
    ]
    return sorted(found, key=lambda lora: (lora.step is not None, -(lora.step or 0), lora.path.name))


def header(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file. UserError if it is not one."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({error})") from error
