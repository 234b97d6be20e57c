"""The section `datasets` of a job file: what it is trained on. See `job.py`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from detour.config.section import Section
from detour.config.values import Fraction, Side, as_list, without_dot


class DatasetConfig(Section):
    """A folder of pictures (or clips, see `num_frames`) with captions. Several may be given; they are mixed in
    proportion to their size."""

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
    rich_caption_ext: Annotated[str | None, BeforeValidator(without_dot)] = None
    """Ending of a second, long caption beside each picture, which the teacher of `preserve` is told (`long.txt`)."""
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
    """With `crop: random` or `clip_part: random`, number of different crops of each picture or clip; epochs go through
    them in turn."""
    num_frames: int = Field(default=1, ge=1)
    """Models of video: frames of each clip, 4 k + 1 for Wan. Above 1 the folder holds clips instead of pictures: video
    files (mp4, m4v, mov, mkv, webm, avi), animated GIF or WebP, and folders with one picture for each frame, in the
    order of their names. A caption lies beside its clip: `walk.txt` for `walk.mp4` as for the folder `walk`."""
    fps: float | None = Field(default=None, gt=0, le=1000)
    """Frames a second at which clips are taken: at each time the frame nearest to it. Frames that lie in a folder have
    no times and are taken one by one. Default: the architecture's (16 for Wan)."""
    clip_part: Literal["start", "random"] = "start"
    """Which part of a clip is taken that is longer than `num_frames`: its beginning, or one drawn once for each clip
    and crop variant."""
    mask_path: Path | None = None
    """Folder with a mask for each picture (same stem): white counts fully in the loss, black by `mask_min_value`."""
    alpha_mask: bool = False
    """Take the mask from the picture's alpha channel."""
    mask_min_value: Fraction = 0.1
    """Weight of the black parts of a mask."""
    control_path: Path | None = None
    """Models that take a control picture (Flex.2): folder with one for each picture (same stem), such as its depth,
    lines or pose. It is scaled, cut and mirrored as the picture is."""
    is_reg: bool = False
    """A regularisation set: its pictures take every second place and get no trigger word."""
    loss_weight: float = Field(default=1.0, ge=0)
    """The loss of this set's pictures is multiplied by it."""
    bad_images: Literal["error", "skip"] = "error"
    """What to do about pictures that cannot be used: refuse to start, or leave them out and list them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_frames > 1 and self.alpha_mask:
            raise ValueError("alpha_mask: clips have no transparency; use mask_path (one mask for the whole clip)")
        if self.num_frames == 1 and (self.fps is not None or self.clip_part != "start"):
            raise ValueError("fps and clip_part have no effect on pictures; set num_frames, or leave them out")
        return self
