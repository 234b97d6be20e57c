"""Clips: video files, animated GIF and WebP, and folders with one picture for each frame. No torch.

Video files are decoded with PyAV (`pip install 'detour[video]'`), the others with Pillow. As with pictures the content
decides what a file is; of ffmpeg's many formats only those of `_CONTAINERS` are reached, and no other file or address
that a playlist may name. A clip is read frame by frame and never held whole.

Frames are taken by time: at `fps` a second, each time the frame nearest to it, counted from the first. So clips of
other rates keep their speed, at worst with a frame left out or shown twice. Frames in a folder have no times and count
as they are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from detour import UserError, files
from detour.data import images
from detour.data.images import BadPictureError

if TYPE_CHECKING:
    import av

    from detour.data.images import Transform

VIDEO_ENDINGS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})
UNREAD_ENDINGS = frozenset({".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv"})
"""Videos that are not read: named to the user, not passed over."""
DESCRIPTION = "mp4, m4v, mov, mkv, webm, avi, gif, animated webp, or folders of frames"
_CONTAINERS = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
_UNSPECIFIED, _BT709 = 2, 1  # of ffmpeg's colour matrices
_HD = 720  # lines from which an unnamed matrix is BT.709, as players have it
_TIE = 1e-3  # seconds to which Matroska rounds times: the same clip gives the same frames from any container
_STILL = 0.1  # seconds of an animation's frame that names no duration, as browsers have it
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True)
class _Frame:
    time: float
    """Seconds since the first frame; of frames in a folder, the number."""
    size: tuple[int, int]
    """Width and height as shown: upright, with square pixels."""
    picture: Callable[[], Image.Image]
    """Upright, in RGB."""


# --------------------------------------------------------------------------------------------------- what is a clip


@dataclass(frozen=True, slots=True)
class Sorted:
    """The files of a folder, as clips."""

    clips: list[str]
    """Keys of video files and animations, and of folders of frames."""
    folders: frozenset[str]
    """Those of `clips` that are folders of frames."""
    misplaced: dict[str, str]
    """Files that are no clips but should not be passed over, with the reason."""


def sort(folder: Path, keys: Sequence[str]) -> Sorted:
    """Which files of a dataset are clips, and which are the frames of one. Others are none of our business."""
    found: set[str] = set()
    frames: set[str] = set()
    misplaced: dict[str, str] = {}
    for key in keys:
        suffix, parent = PurePosixPath(key).suffix.lower(), PurePosixPath(key).parent.as_posix()
        if suffix in VIDEO_ENDINGS or suffix == ".gif" or (suffix == ".webp" and _is_animated_webp(folder / key)):
            found.add(key)
        elif suffix in UNREAD_ENDINGS or suffix in images.UNREAD_ENDINGS:
            misplaced[key] = "is in a format that is not read; convert it to MP4 or PNG, or move it away"
        elif suffix in images.ENDINGS and parent != ".":
            frames.add(parent)
        elif suffix in images.ENDINGS:
            advice = "put frames of a clip into a folder of their own, pictures into a dataset with num_frames: 1"
            misplaced[key] = f"is a single picture among clips; {advice}"
    return Sorted(sorted(found | frames), frozenset(frames), misplaced)


def _is_animated_webp(path: Path) -> bool:
    """By the flag in its header, whether a WebP is an animation; false for what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(21)
    except OSError:
        return False
    return len(head) == 21 and head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def decoder_problem(keys: Sequence[str]) -> str | None:
    """What is missing to decode these files, or None."""
    videos = [key for key in keys if PurePosixPath(key).suffix.lower() in VIDEO_ENDINGS]
    if not videos:
        return None
    try:
        import av  # noqa: F401
    except ImportError:
        return f"video files ({videos[0]}) are decoded with PyAV, which is not installed: pip install 'detour[video]'"
    return None


# ------------------------------------------------------------------------------------------------- check and pixels


def check(path: Path, wanted: int, fps: float | None, *, whole: bool) -> images.Facts:
    """Hash a clip and decode it, as far as `wanted` frames reach or `whole`; BadPictureError if it cannot be used."""
    try:
        digest = _digest(path)
    except OSError as error:
        raise BadPictureError(_unreadable(error)) from None
    rate = _rate(path, fps)
    size, times = (0, 0), list[float]()
    for frame in _frames(path, rate):
        if times and frame.size != size and path.is_dir():
            raise BadPictureError(f"has frames of several sizes ({_size(size)}, {_size(frame.size)}); make them alike")
        size = size if times else frame.size
        times.append(frame.time)
        if not whole and _count(times, rate) >= wanted:
            break
    found = _count(times, rate)
    if found < wanted:
        at = "" if rate is None or fps is None else f" at {fps:g} a second ({len(times)} in the file)"
        advice = "take a longer clip, or lower num_frames"
        raise BadPictureError(f"is too short: it has {found} frames{at}, and num_frames asks for {wanted}; {advice}")
    return images.Facts(digest, *size, "clip", alpha=False, sharpness=math.inf, notes=(), frames=found)


def pixels(path: Path, sha256: str, transforms: Sequence[Transform]) -> list[np.ndarray]:
    """The clip, decoded once, as each transform makes it: RGB as uint8 of shape (frames, height, width, 3)."""
    try:
        changed = _digest(path) != sha256
    except OSError as error:
        raise UserError(f"{path} {_unreadable(error)} (it was fine when the dataset was checked)") from None
    if changed:
        raise UserError(f"{path} was changed while the dataset was being prepared; start again")
    parts = [transform.clip for transform in transforms]
    assert all(part is not None for part in parts)
    made = [np.empty((p.frames, t.height, t.width, 3), np.uint8) for t, p in zip(transforms, parts, strict=True) if p]
    rate = _rate(path, parts[0].fps if parts[0] else None)
    numbers = sorted({number for part in parts if part for number in range(part.first, part.first + part.frames)})
    try:
        frames = _nearest(_frames(path, rate), [number / (rate or 1) for number in numbers])
        for number, frame in zip(numbers, frames, strict=True):
            picture = frame.picture()
            for array, transform, part in zip(made, transforms, parts, strict=True):
                if part is not None and part.first <= number < part.first + part.frames:
                    array[number - part.first] = images.applied(picture, transform)
    except BadPictureError as error:
        raise UserError(f"{path} {error}") from None
    return made


def _rate(path: Path, fps: float | None) -> float | None:
    """Frames a second to take, or None to take them as they are."""
    return None if path.is_dir() else fps


def _count(times: Sequence[float], rate: float | None) -> int:
    """Frames at that rate in a clip whose frames are at these times: none later than half a frame after the last."""
    if rate is None or len(times) < 2:
        return len(times)
    span = times[-1]
    return math.floor((span + span / (len(times) - 1) / 2) * rate) + 1


def _nearest(frames: Iterator[_Frame], times: Sequence[float]) -> Iterator[_Frame]:
    """The frame nearest to each of these times, which must rise; the earlier of two that are alike to `_TIE`."""
    before: _Frame | None = None
    wanted = 0
    for frame in frames:
        while wanted < len(times) and frame.time >= times[wanted]:
            earlier = before is not None and times[wanted] - before.time <= frame.time - times[wanted] + _TIE
            yield before if before is not None and earlier else frame
            wanted += 1
        if wanted == len(times):
            return
        before = frame
    for _ in times[wanted:]:
        if before is None:
            return
        yield before


def _digest(path: Path) -> str:
    """Of a file its sha256; of a folder that of its frames' in order."""
    if not path.is_dir():
        return files.sha256_file(path)
    together = hashlib.sha256()
    for frame in _frames_in(path):
        together.update(files.sha256_file(frame).encode())
    return together.hexdigest()


# ----------------------------------------------------------------------------------------------------------- frames


def _frames(path: Path, rate: float | None) -> Iterator[_Frame]:
    """The frames in order, at rising times; numbered instead where no rate is asked for."""
    if path.is_dir():
        yield from _of_folder(path)
        return
    frames = _of_animation(path) if path.suffix.lower() in (".gif", ".webp") else _of_video(path)
    for number, frame in enumerate(frames):
        yield frame if rate is not None else _Frame(number, frame.size, frame.picture)


def _frames_in(folder: Path) -> list[Path]:
    """The pictures of a folder, in the order of their names, numbers by their value."""
    pictures = [
        path for path in folder.iterdir() if path.suffix.lower() in images.ENDINGS and not path.name.startswith(".")
    ]
    return sorted(pictures, key=lambda path: ([_part(part) for part in re.split(r"(\d+)", path.name)], path.name))


def _part(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (-1, text)


def _of_folder(folder: Path) -> Iterator[_Frame]:
    for number, path in enumerate(_frames_in(folder)):
        try:
            picture = images.upright(path)
        except BadPictureError as error:
            raise BadPictureError(f"has a frame that cannot be used: {path.name} {error}") from None
        yield _Frame(number, picture.size, lambda picture=picture: picture)  # type: ignore[misc]


def _of_animation(path: Path) -> Iterator[_Frame]:
    """GIF and WebP; transparent parts become white."""
    try:
        with Image.open(path, formats=("GIF", "WEBP")) as opened:
            images.require_size(*opened.size)
            time = 0.0
            for frame in ImageSequence.Iterator(opened):
                clear = frame.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
                yield _Frame(time, picture.size, lambda picture=picture: picture)  # type: ignore[misc]
                time += frame.info.get("duration", 0) / 1000 or _STILL
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise BadPictureError("is not an animation in the GIF or WebP format; convert it or remove it") from None
    except images.DECODING as error:
        raise BadPictureError(_damaged(str(error))) from None


def _of_video(path: Path) -> Iterator[_Frame]:
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path), options=dict(_CONTAINERS), metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadPictureError("has no picture track, only sound; remove it")
            stream = container.streams.video[0]
            aspect = float(stream.sample_aspect_ratio or 1) or 1.0
            step = 1 / float(stream.average_rate or 25)
            start: float | None = None
            last = 0.0
            for decoded in container.decode(stream):
                if decoded.is_corrupt:
                    raise BadPictureError(_damaged(f"after {last:.2f} s"))
                images.require_size(decoded.width, decoded.height)
                time = (start or 0.0) + last + step if decoded.time is None else decoded.time
                start = time if start is None else start
                last = max(time - start, last)
                yield _Frame(last, _shown(decoded, aspect), lambda frame=decoded: _rgb(frame))  # type: ignore[misc]
    except (FFmpegError, OSError) as error:
        raise BadPictureError(_damaged(str(error.strerror))) from None
    if start is None:
        raise BadPictureError("holds no frame that can be decoded; convert it or remove it")


def _shown(frame: av.VideoFrame, aspect: float) -> tuple[int, int]:
    """Width and height with square pixels, upright."""
    size = (max(1, round(frame.width * aspect)), frame.height)
    return size if frame.rotation % 180 == 0 else (size[1], size[0])


def _rgb(frame: av.VideoFrame) -> Image.Image:
    from av.error import FFmpegError

    matrix = _BT709 if frame.colorspace == _UNSPECIFIED and frame.height >= _HD else None
    try:
        picture = Image.fromarray(frame.reformat(format="rgb24", src_colorspace=matrix).to_ndarray())
    except FFmpegError as error:
        raise BadPictureError(_damaged(str(error.strerror))) from None
    turn = _TURNS.get(frame.rotation)
    return picture if turn is None else picture.transpose(turn)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _damaged(reason: str) -> str:
    return f"cannot be decoded ({reason}): it is cut off, damaged or no video; copy or convert it again, or remove it"


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {(error.strerror or 'unknown reason').lower()}; check the file and its permissions"
