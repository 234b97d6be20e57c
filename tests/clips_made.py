"""Clips for tests: frame `i` is one grey, `level(i)`, with a red left edge, so that frames can be told apart."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIZE = (64, 48)  # width and height
CODECS = {
    ".mp4": "libx264", ".m4v": "libx264", ".mov": "libx264", ".mkv": "ffv1", ".webm": "libvpx-vp9", ".avi": "mpeg4",
}  # fmt: skip
ENDINGS = (*CODECS, ".gif", ".webp")


def level(number: int) -> int:
    """The grey of a frame: neighbours are 20 apart."""
    return 20 + number * 20 % 221


def frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    array = np.full((size[1], size[0], 3), level(number), np.uint8)
    array[:, : size[0] // 8] = (255, 0, 0)
    return array


def write(path: Path, count: int, fps: float = 16, size: tuple[int, int] = SIZE, **options) -> Path:
    """A clip of so many frames; a path without an ending becomes a folder of frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [frame(number, size) for number in range(count)]
    if path.suffix in CODECS:
        _video(path, frames, fps, **options)
    elif path.suffix in (".gif", ".webp"):
        pictures = [Image.fromarray(array) for array in frames]
        durations = options.get("durations", round(1000 / fps))
        more = {"lossless": True} if path.suffix == ".webp" else {"disposal": 1}
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **more)
    else:
        path.mkdir()
        for number, array in enumerate(frames):
            Image.fromarray(array).save(path / f"{number}.png")
    return path


def _video(
    path: Path, frames: list[np.ndarray], fps: float, codec: str = "", aspect: str = "", matrix: int = 0
) -> None:
    name = codec or CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0" if name == "ffv1" else "yuv420p"
        if name in ("libx264", "mpeg4"):
            stream.options = {"crf": "1", "qmin": "1", "qmax": "2"}
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        for array in frames:
            picture = av.VideoFrame.from_ndarray(array, format="rgb24")
            if matrix:
                picture = picture.reformat(format=stream.pix_fmt, dst_colorspace=matrix)
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def numbers(clip: np.ndarray) -> list[int]:
    """Which frames (0-10) these are, by their grey; fails where one is none of them."""
    greys = [float(np.median(picture[:, picture.shape[1] // 4 :])) for picture in clip]
    found = [round((grey - 20) / 20) for grey in greys]
    assert all(abs(grey - level(number)) < 5 for grey, number in zip(greys, found, strict=True)), greys
    return found
