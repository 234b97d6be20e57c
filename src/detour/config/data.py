"""The section `datasets` of a job file: what it is trained on. See `job.py`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from detour.config.section import Section
from detour.config.values import Fraction, Side, as_list, without_dot


class DatasetConfig(Section):
    """A folder of pictures with captions. Several may be given; they are mixed in proportion to their size."""

    folder_path: Path
    """Folder, read with its subfolders."""
    recursive: bool = True
    """Read subfolders too."""
    caption_ext: Annotated[str, BeforeValidator(without_dot)] = "txt"
    """Ending of the caption file beside each picture."""
    captions_file: Path | None = None
    """JSONL (`{"file": ..., "caption": ... or [...]}`) or CSV (columns `file`, `caption`) with captions instead of
    caption files. A relative path starts from `folder_path`."""
    default_caption: str | None = None
    """Caption of pictures that have none. Without it a picture without caption is an error."""
    trigger_word: str | None = None
    """Put before captions that lack it, and in place of `[trigger]`. Default: the trigger word of the process."""
    caption_dropout_rate: Fraction = 0.0
    """Share of draws that see an empty caption."""
    shuffle_tokens: bool = False
    """Shuffle the comma-separated parts of the caption at every draw."""
    keep_tokens: int = Field(default=0, ge=0)
    """Number of leading parts that `shuffle_tokens` leaves in place."""
    resolution: Annotated[
        list[Side], Field(min_length=1), BeforeValidator(as_list, json_schema_input_type=Side | list[Side])
    ] = [1024]
    """Side of the square with the area that pictures are scaled to; several give each picture at each size."""
    upscale: bool = False
    """Scale small pictures up to `resolution`. Otherwise they are trained at their own size."""
    num_repeats: int = Field(default=1, ge=1)
    """How often each picture is drawn in an epoch."""
    flip_x: bool = False
    """Add the mirror image (left and right exchanged)."""
    flip_y: bool = False
    """Add the upside-down image."""
    crop: Literal["center", "random"] = "center"
    """Where the part that does not fit the bucket is cut away. `random` is drawn once for each picture and crop
    variant."""
    crop_variants: int = Field(default=1, ge=1, le=64)
    """With `crop: random`, number of different crops of each picture; epochs go through them in turn."""
    mask_path: Path | None = None
    """Folder with a mask for each picture (same stem): white counts fully in the loss, black by `mask_min_value`."""
    alpha_mask: bool = False
    """Take the mask from the picture's alpha channel."""
    mask_min_value: Fraction = 0.1
    """Weight of the black parts of a mask."""
    is_reg: bool = False
    """A regularisation set: its pictures take every second place and get no trigger word."""
    loss_weight: float = Field(default=1.0, ge=0)
    """The loss of this set's pictures is multiplied by it."""
    bad_images: Literal["error", "skip"] = "error"
    """What to do about pictures that cannot be used: refuse to start, or leave them out and list them."""
