"""Pictures: which files may be opened, the full check before training, and the pixels for the encoder. No torch.

The content decides what a file is, never its name. Only the four decoders named in `FORMATS` are ever reached, and the
number of pixels is checked from the header, before anything is decoded.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from detour import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
UNREAD_ENDINGS = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".dng"})
"""Pictures that are not read: named to the user, not passed over."""
MAX_PIXELS = 200_000_000  # the largest telephone cameras give 199.8 million; 600 MB once decoded
MAX_BYTES = 1 << 30
LOOK = 16
RESAMPLE = Image.Resampling.LANCZOS  # Pillow widens its filter when scaling down, so nothing aliases

# Pillow warns above this number and refuses above its double. The limit that counts is ours, checked in `_open`.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})
# What Pillow's decoders raise on damaged files (found by flipping bytes, tests/data/test_images.py).
DECODING = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, KeyError, IndexError, TypeError,
             OverflowError)  # fmt: skip
_MAGIC = {
    b"GIF8": "a GIF", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"8BPS": "a Photoshop file", b"%PDF": "a PDF",
    b"<svg": "an SVG drawing", b"<!DO": "a web page", b"<htm": "a web page", b"PK\3\4": "a ZIP",
    b"vers": "a Git LFS pointer (run `git lfs pull`)",
}  # fmt: skip

Note = Literal["cmyk", "deep", "ending", "exif"]
"""What the user is told of a picture that can be used: converted from CMYK or 16 bits, misnamed, EXIF unreadable."""


class BadPictureError(Exception):
    """A picture that cannot be used; the message goes on from its name: "is cut off ..."."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the check found in a picture that can be used."""

    sha256: str
    """Of the file's bytes."""
    width: int
    """Upright, as the EXIF orientation says."""
    height: int
    kind: str
    """The content's format, one of `FORMATS`."""
    alpha: bool
    """Something in it is transparent."""
    sharpness: float
    """Of its finest detail beside coarser detail, at the size it is trained at: see `_sharpness`."""
    notes: tuple[Note, ...]
    frames: int = 1
    """Of a clip: so many at the rate at which they are taken, as far as that was looked into."""
    look: bytes = b""
    """It as `LOOK` x `LOOK` pixels RGB, upright, to compare with others; empty for clips."""


@dataclass(frozen=True, slots=True)
class ClipPart:
    """Which frames of a clip are taken."""

    first: int
    frames: int
    fps: float | None
    """Frames a second that are counted; None counts them as they are."""


@dataclass(frozen=True, slots=True)
class Transform:
    """All that is done to a picture before it is encoded; goes into the cache key as it stands. Pixels."""

    scaled_w: int
    scaled_h: int
    left: int
    top: int
    width: int
    height: int
    flip_x: bool
    flip_y: bool
    flatten: bool
    """Transparent parts become white; otherwise the colour below them is used."""
    clip: ClipPart | None = None
    """Of clips: the frames."""


class Budget:
    """Lets threads decode at once only so many pixels, so that large pictures do not fill the memory together."""

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self._limit = pixels
        self._used = 0
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait for room. What is larger than the budget goes through alone."""
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._limit)
            self._used += pixels
        try:
            yield
        finally:
            with self._freed:
                self._used -= pixels
                self._freed.notify_all()


def check(path: Path, budget: Budget, resolution: int) -> Facts:
    """Read, hash and decode a picture in full; BadPictureError if it cannot be used.

    JPEGs much larger than `resolution` are decoded at a half to an eighth of their size: every byte of their data is
    read all the same, so a cut is found as surely, in less time and memory.
    """
    data = _read(path)
    picture = _open(data)
    width, height = picture.size
    notes: list[Note] = []
    if picture.mode == "CMYK":
        notes.append("cmyk")
    if _is_deep(picture, data):
        notes.append("deep")
    if ENDINGS.get(path.suffix.lower()) != _kind(picture):
        notes.append("ending")
    with budget.hold(width * height):
        alpha, sharpness, look = _decode_fully(picture, resolution)
    turn = 1
    try:
        turn = _orientation(picture)
    except BadPictureError:
        notes.append("exif")
    if turn in _SIDEWAYS:
        width, height = height, width
    digest, seen = hashlib.sha256(data).hexdigest(), _upright(look, turn).tobytes()
    return Facts(digest, width, height, _kind(picture), alpha, sharpness, tuple(notes), look=seen)


def check_mask(path: Path, budget: Budget) -> tuple[str, int, int, int]:
    """Sha256, upright size and the brightest value of a mask; BadPictureError if it cannot be used."""
    data = _read(path)
    picture = _open(data)
    with budget.hold(picture.width * picture.height):
        mask = _mask(data)
    return hashlib.sha256(data).hexdigest(), mask.width, mask.height, int(np.asarray(mask).max())


def pixels(path: Path, sha256: str, transforms: list[Transform]) -> list[np.ndarray]:
    """The picture, decoded once, as each transform makes it: RGB as uint8 of shape (height, width, 3)."""
    data = _read_again(path, sha256)
    upright: dict[bool, Image.Image] = {}
    for transform in transforms:
        if transform.flatten not in upright:
            upright[transform.flatten] = _rgb(data, transform.flatten)
    return [applied(upright[transform.flatten], transform) for transform in transforms]


def mask_pixels(path: Path, sha256: str, transforms: list[Transform], alpha: bool) -> list[np.ndarray]:
    """The mask, treated as its picture is: uint8 of shape (height, width), 255 where the loss counts in full.

    `alpha` takes it from the transparency of the picture at `path`; otherwise `path` is a picture of the mask.
    """
    data = _read_again(path, sha256)
    mask = _alpha(data) if alpha else _mask(data)
    return [applied(mask, transform) for transform in transforms]


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size == 0:
            raise BadPictureError("is empty (0 bytes); copy it again or remove it")
        if size > MAX_BYTES:
            raise BadPictureError(f"has {size / 2**30:.1f} GiB; at most 1 GiB is read, save it smaller")
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or "unknown reason").lower()
        raise BadPictureError(f"cannot be read: {reason}; check the file and its permissions") from None


def _read_again(path: Path, sha256: str) -> bytes:
    """The bytes that were checked: other bytes would be stored in the cache under the wrong hash."""
    try:
        data = _read(path)
    except BadPictureError as error:
        raise UserError(f"{path} {error} (it was fine when the dataset was checked; start again)") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} was changed while the dataset was being prepared; start again")
    return data


def upright(path: Path) -> Image.Image:
    """A picture in RGB, upright, transparent parts white; BadPictureError if it cannot be used."""
    return _rgb(_read(path), flatten=True)


def small(path: Path, side: int, budget: Budget) -> Image.Image:
    """As `upright`, with no side longer than `side`; JPEGs are decoded only as large as is needed for that."""
    picture = _open(_read(path))
    turn, scale = _turn(picture), min(1.0, side / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    with budget.hold(picture.width * picture.height):
        try:
            if isinstance(picture, JpegImageFile):
                picture.draft(None, size)
            picture.load()
        except DECODING as error:
            raise BadPictureError(_damaged(error)) from None
        return _upright(_flat(_eight_bits(picture), flatten=True).resize(size, RESAMPLE, reducing_gap=3.0), turn)


def require_size(width: int, height: int) -> None:
    """BadPictureError for more pixels than are ever decoded."""
    count = width * height
    if count > MAX_PIXELS:
        raise BadPictureError(_too_large(f"{width} x {height}, {count / 1e6:.0f}"))


def _open(data: bytes) -> ImageFile.ImageFile:
    """Header only. Refuses other formats, too many pixels, and animations."""
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadPictureError(_too_large(f"more than {2 * MAX_PIXELS / 1e6:.0f}")) from None
    except UnidentifiedImageError:
        found = f"is {_guess(data)}, not a PNG, JPEG, WebP or BMP picture"
        raise BadPictureError(f"{found}; convert it or remove it") from None
    except DECODING as error:
        raise BadPictureError(_damaged(error)) from None
    require_size(picture.width, picture.height)
    if isinstance(picture, PngImageFile | WebPImageFile) and picture.n_frames > 1:
        raise BadPictureError(f"is animated ({picture.n_frames} frames); save one frame as a picture of its own")
    return picture


def _decode_fully(picture: ImageFile.ImageFile, resolution: int) -> tuple[bool, float, Image.Image]:
    """Decode everything: is anything transparent, how sharp is it at that resolution, its look (not yet upright)."""
    scale = min(1.0, resolution / math.sqrt(picture.width * picture.height))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    try:
        if isinstance(picture, JpegImageFile):
            picture.draft(None, size)
        picture.load()
        alpha = _has_alpha(picture) and picture.convert("RGBA").getchannel("A").getextrema() != (255, 255)
        even = _eight_bits(picture)
        return alpha, _sharpness(even.convert("L"), size), _flat(even, alpha).resize((LOOK, LOOK), Image.Resampling.BOX)
    except DECODING as error:
        raise BadPictureError(_damaged(error)) from None


def _sharpness(grey: Image.Image, size: tuple[int, int]) -> float:
    """How strong the finest detail of a picture is beside coarser detail, when it is scaled to `size`.

    At each of four sizes, each half of the one before, the detail is what gets lost when the picture is halved and
    doubled again: the root mean square in the blocks of 32 x 32 pixels (of the first size) that lose most (95th
    percentile), in the middle 512 x 512. A sharp edge has sqrt(2) times as much at each next size, so the finest detail
    is compared with each of the others by that measure, and the smallest ratio counts. Less than 0.6 grey levels is
    rounding. Contrast does not matter: twice as much is twice as much at all sizes.

    Twenty photographs gave 0.45 to 1.4, drawn pictures 0.4 and more. After a blur of 1.5 pixels all had at most 0.26,
    enlarged to four times their size at most 0.31; twice their size gave 0.1 to 0.67, two thirds of them below 0.35.
    Infinite where a side is too short to tell, or there is nothing to see.
    """
    scaled = grey.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    w, h = (min(512, side) // 32 * 32 for side in size)
    if min(w, h) < 64:
        return math.inf
    left, top = (size[0] - w) // 2, (size[1] - h) // 2
    part = scaled.crop((left, top, left + w, top + h))
    found: list[float] = []
    for block in (32, 16, 8, 4):
        half = part.reduce(2)
        again = half.resize(part.size, Image.Resampling.BICUBIC)
        lost = (np.asarray(part, np.float32) - np.asarray(again, np.float32)) ** 2
        blocks = lost.reshape(lost.shape[0] // block, block, lost.shape[1] // block, block).mean(axis=(1, 3))
        found.append(float(np.sqrt(np.percentile(blocks, 95))))
        part = half
    finest = math.sqrt(max(0.0, found[0] ** 2 - 0.6**2))
    if max(found[1:]) < 2.0:
        return math.inf
    return min(finest * 2 ** (step / 2) / found[step] for step in (1, 2, 3) if found[step] > 0)


def _upright(picture: Image.Image, turn: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else picture


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; BadPictureError where the EXIF data cannot be read."""
    try:
        turn = picture.getexif().get(_ORIENTATION, 1)
    except DECODING as error:
        raise BadPictureError(f"has unreadable EXIF data ({error})") from None
    return turn if turn in _UPRIGHT else 1


def _turn(picture: Image.Image) -> int:
    """As `_orientation`; pictures whose EXIF data cannot be read are taken as upright (the check has said so)."""
    try:
        return _orientation(picture)
    except BadPictureError:
        return 1


def _loaded(data: bytes) -> tuple[Image.Image, int]:
    """The decoded picture with 8 bits a channel, and its orientation."""
    picture = _open(data)
    try:
        picture.load()
    except DECODING as error:
        raise BadPictureError(_damaged(error)) from None
    turn = _turn(picture)
    return _eight_bits(picture), turn


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits. Pillow's own conversion clips at 255: nearly everything would turn white."""
    if not picture.mode.startswith("I"):
        return picture  # 16-bit colour: the decoder already keeps the upper byte
    deep = np.asarray(picture).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((deep + 128) // 257).astype(np.uint8))


def _has_alpha(picture: Image.Image) -> bool:
    return picture.has_transparency_data and not picture.mode.startswith("I")


def _rgb(data: bytes, flatten: bool) -> Image.Image:
    picture, turn = _loaded(data)
    return _upright(_flat(picture, flatten), turn)


def _flat(picture: Image.Image, flatten: bool) -> Image.Image:
    """In RGB: transparent parts become white, or the colour below them is used."""
    if not _has_alpha(picture):
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    return (Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear) if flatten else clear).convert("RGB")


def _alpha(data: bytes) -> Image.Image:
    picture, turn = _loaded(data)
    if not _has_alpha(picture):
        return _upright(Image.new("L", picture.size, 255), turn)
    return _upright(picture.convert("RGBA").getchannel("A"), turn)


def _mask(data: bytes) -> Image.Image:
    """Brightness; transparent parts are black, since masks are often saved as white on nothing."""
    picture, turn = _loaded(data)
    if _has_alpha(picture):
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, "black"), clear)
    return _upright(picture.convert("RGB").convert("L"), turn)


def applied(picture: Image.Image, transform: Transform) -> np.ndarray:
    """The picture as a transform makes it: uint8 of shape (height, width) with its channels, if it has several."""
    size = (transform.scaled_w, transform.scaled_h)
    scaled = picture if picture.size == size else picture.resize(size, RESAMPLE)
    right, bottom = transform.left + transform.width, transform.top + transform.height
    part = np.asarray(scaled.crop((transform.left, transform.top, right, bottom)))
    part = part[:, ::-1] if transform.flip_x else part
    return np.array(part[::-1] if transform.flip_y else part, order="C")


def _kind(picture: ImageFile.ImageFile) -> str:
    """The format's name. A JPEG with further pictures after it ("MPO", written by telephones) counts as a JPEG."""
    return "JPEG" if isinstance(picture, JpegImageFile) else str(picture.format)


def _is_deep(picture: ImageFile.ImageFile, data: bytes) -> bool:
    return isinstance(picture, PngImageFile) and data[24] == 16  # bit depth in the header, at a fixed place


def _too_large(found: str) -> str:
    return f"is too large ({found} million pixels, at most {MAX_PIXELS / 1e6:.0f}); scale it down"


def _damaged(error: Exception) -> str:
    return f"is cut off or damaged ({error}); copy or save it again, or remove it"


def _guess(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "an AVIF, HEIC or video file"
    return _MAGIC.get(data[:4], "something else")
