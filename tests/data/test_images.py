"""Pictures: what is accepted, what is refused and how that is said; pixels are what Pillow's own tools make."""

import io
import random
import struct
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from detour import UserError
from detour.data import images
from detour.data.images import BadPictureError, Budget, Transform


def noise(size=(64, 48), seed=0, channels=3):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(array if channels > 1 else array[..., 0])


def whole(size, **changes):
    place = {"scaled_w": size[0], "scaled_h": size[1], "left": 0, "top": 0, "width": size[0], "height": size[1]}
    return Transform(**(place | {"flip_x": False, "flip_y": False, "flatten": True} | changes))


def checked(path):
    return images.check(path, Budget(), 1024)


def loaded(path, **changes):
    facts = checked(path)
    return images.pixels(path, facts.sha256, [whole((facts.width, facts.height), **changes)])[0]


def refused(path):
    with pytest.raises(BadPictureError) as caught:
        checked(path)
    return str(caught.value)


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "A.PNG"])
def test_formats(tmp_path, name):
    noise().save(tmp_path / name)
    facts = checked(tmp_path / name)
    assert (facts.width, facts.height, facts.alpha, facts.notes) == (64, 48, False, ())
    assert np.array_equal(loaded(tmp_path / name), np.asarray(Image.open(tmp_path / name).convert("RGB")))


def test_zero_bytes(tmp_path):
    (tmp_path / "a.png").touch()
    assert refused(tmp_path / "a.png").startswith("is empty (0 bytes)")


def test_unreadable(tmp_path):
    (tmp_path / "a.png").symlink_to("nowhere.png")
    assert refused(tmp_path / "a.png").startswith("cannot be read: no such file")
    (tmp_path / "b.png").symlink_to("b.png")
    assert refused(tmp_path / "b.png").startswith("cannot be read: too many levels")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
def test_truncated(tmp_path, kind, share):
    buffer = io.BytesIO()
    noise((256, 256)).save(buffer, kind)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    assert "damaged" in refused(path) or "not a PNG" in refused(path)


def test_truncated_jpeg_is_found_at_every_scale(tmp_path):
    """The check decodes large JPEGs at a fraction of their size."""
    for progressive in (False, True):
        noise((800, 800)).save(tmp_path / "a.jpg", progressive=progressive)
        data = (tmp_path / "a.jpg").read_bytes()
        (tmp_path / "a.jpg").write_bytes(data[: len(data) * 9 // 10])
        for resolution in (64, 200, 400, 800):
            with pytest.raises(BadPictureError, match="cut off or damaged"):
                images.check(tmp_path / "a.jpg", Budget(), resolution)


def test_flipped_byte_in_a_png_is_found_by_its_checksum(tmp_path):
    noise().save(tmp_path / "a.png", compress_level=0)  # stored: the pixels decode whatever they are
    whole_file = (tmp_path / "a.png").read_bytes()
    start, end = whole_file.index(b"IDAT") + 4, whole_file.index(b"IEND") - 8
    for place in range(start, end, (end - start) // 40):
        data = bytearray(whole_file)
        data[place] ^= 1
        (tmp_path / "a.png").write_bytes(data)
        assert "damaged" in refused(tmp_path / "a.png")


def test_damage_of_any_kind_raises_nothing_else(tmp_path):
    """A damaged file is refused, or still decodes; no other exception comes through."""
    draws = random.Random(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 40
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        noise((40, 30)).save(buffer, kind, **({} if kind == "BMP" else {"exif": exif}))
        for _ in range(150):
            data = bytearray(buffer.getvalue())
            for _ in range(draws.choice([1, 3, 20])):
                data[int(draws.random() ** 2 * len(data))] = draws.randrange(256)
            path = tmp_path / "a.png"
            path.write_bytes(data)
            try:
                facts = checked(path)
            except BadPictureError:
                continue
            assert loaded(path).shape == (facts.height, facts.width, 3)


@pytest.mark.parametrize(("width", "height"), [(20_000, 15_000), (100_000, 100_000), (2**31 - 1, 1)])
def test_decompression_bombs_are_refused_from_their_header(tmp_path, width, height):
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    tracemalloc.start()
    message = refused(tmp_path / "a.png")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert "too large" in message
    assert "at most 200" in message


def test_a_large_telephone_picture_is_no_bomb(tmp_path):
    (tmp_path / "a.png").write_bytes(png_header(16_320, 12_240))
    with Image.open(tmp_path / "a.png") as picture:
        assert images._open((tmp_path / "a.png").read_bytes()).size == picture.size


def test_too_many_bytes(tmp_path, monkeypatch):
    noise().save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    assert "at most 1 GiB" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animated(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    noise().save(path, kind, save_all=True, append_images=[noise(seed=1), noise(seed=2)])
    assert refused(path) == "is animated (3 frames); save one frame as a picture of its own"


def test_telephone_jpegs_with_further_pictures_count_as_jpegs(tmp_path):
    noise().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise((16, 16), 1)])
    facts = checked(tmp_path / "a.jpg")
    assert (facts.kind, facts.notes, facts.width) == ("JPEG", (), 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a" + b"\0" * 50, "is a GIF, not a PNG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\0\0\0\x20ftypavif" + b"\0" * 50, "is an AVIF, HEIC or video file"),
        (b"what is this", "is something else, not a PNG"),
    ],
)
def test_other_content_is_named(tmp_path, data, message):
    (tmp_path / "a.jpg").write_bytes(data)
    assert message in refused(tmp_path / "a.jpg")


def test_other_decoders_are_never_reached(tmp_path):
    noise().save(tmp_path / "a.png", "TIFF")
    assert "is a TIFF, not a PNG" in refused(tmp_path / "a.png")
    noise().save(tmp_path / "a.png", "PPM")
    assert "not a PNG" in refused(tmp_path / "a.png")


def test_png_named_jpg_is_used_and_noted(tmp_path):
    noise().save(tmp_path / "a.jpg", "PNG")
    facts = checked(tmp_path / "a.jpg")
    assert (facts.kind, facts.notes) == ("PNG", ("ending",))
    assert np.array_equal(loaded(tmp_path / "a.jpg"), np.asarray(noise()))


def test_cmyk_is_converted_and_noted(tmp_path):
    Image.new("CMYK", (32, 32), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    assert checked(tmp_path / "a.jpg").notes == ("cmyk",)
    assert np.allclose(loaded(tmp_path / "a.jpg"), (0, 255, 255), atol=4)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert checked(tmp_path / "a.png").notes == ("deep",)
    assert np.abs(loaded(tmp_path / "a.png")[..., 0] - deep / 257).max() <= 0.5


def test_16_bit_colour_is_scaled(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert checked(tmp_path / "a.png").notes == ("deep",)
    assert np.abs(loaded(tmp_path / "a.png") - deep / 257).max() <= 1


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    noise().save(tmp_path / "a.png", exif=exif)
    facts = checked(tmp_path / "a.png")
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert (facts.width, facts.height) == expected.size
    assert np.array_equal(loaded(tmp_path / "a.png"), np.asarray(expected))


def test_unreadable_exif_is_noted_and_taken_as_upright(tmp_path):
    noise().save(tmp_path / "a.png", exif=b"Exif\0\0XXXXXXXXXXXX")
    assert checked(tmp_path / "a.png").notes == ("exif",)
    assert loaded(tmp_path / "a.png").shape == (48, 64, 3)


def test_transparency_is_flattened_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    clear.putpixel((1, 1), (200, 0, 0, 255))
    clear.putpixel((2, 2), (200, 0, 0, 128))
    clear.save(tmp_path / "a.png")
    assert checked(tmp_path / "a.png").alpha
    flat = loaded(tmp_path / "a.png")
    assert flat[0, 0].tolist() == [255, 255, 255]
    assert flat[1, 1].tolist() == [200, 0, 0]
    assert np.allclose(flat[2, 2], [227, 127, 127], atol=1)
    assert loaded(tmp_path / "a.png", flatten=False)[0, 0].tolist() == [200, 0, 0]


def test_opaque_pictures_with_an_alpha_channel_have_no_alpha(tmp_path):
    noise(channels=3).convert("RGBA").save(tmp_path / "a.png")
    assert not checked(tmp_path / "a.png").alpha


def test_palettes(tmp_path):
    paletted = Image.new("P", (4, 4), 1)
    paletted.putpalette([9, 9, 9, 10, 20, 30])
    paletted.putpixel((0, 0), 0)
    paletted.save(tmp_path / "a.png", transparency=0)
    assert checked(tmp_path / "a.png").alpha
    assert loaded(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 255]
    assert loaded(tmp_path / "a.png")[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_other_modes(tmp_path, mode):
    noise().convert(mode).save(tmp_path / "a.png")
    expected = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert np.array_equal(loaded(tmp_path / "a.png"), expected)


def test_scaling_cropping_and_flipping(tmp_path):
    noise((300, 200)).save(tmp_path / "a.png")
    facts = checked(tmp_path / "a.png")
    place = {"scaled_w": 96, "scaled_h": 64, "left": 10, "top": 4, "width": 64, "height": 48}
    flips = [(False, False), (True, False), (False, True), (True, True)]
    made = images.pixels(
        tmp_path / "a.png", facts.sha256, [whole((1, 1), **place, flip_x=x, flip_y=y) for x, y in flips]
    )
    expected = np.asarray(noise((300, 200)).resize((96, 64), Image.Resampling.LANCZOS).crop((10, 4, 74, 52)))
    assert np.array_equal(made[0], expected)
    assert np.array_equal(made[1], expected[:, ::-1])
    assert np.array_equal(made[2], expected[::-1])
    assert np.array_equal(made[3], expected[::-1, ::-1])


def test_scaling_down_does_not_alias(tmp_path):
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    facts = checked(tmp_path / "a.png")
    small = images.pixels(tmp_path / "a.png", facts.sha256, [whole((90, 90))])[0].astype(int)
    assert np.abs(small[:, 3:-3] - 127.5).max() < 8


def test_masks(tmp_path):
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    sha, *facts = images.check_mask(tmp_path / "m.png", Budget())
    assert facts == [40, 40, 255]
    made = images.mask_pixels(tmp_path / "m.png", sha, [whole((40, 40), flip_x=True)], alpha=False)[0]
    assert np.array_equal(made, mask[:, ::-1])


def test_transparent_parts_of_a_mask_are_black(tmp_path):
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "m.png")
    assert images.check_mask(tmp_path / "m.png", Budget())[3] == 0


def test_alpha_as_mask(tmp_path):
    clear = noise((8, 8)).convert("RGBA")
    clear.putalpha(Image.new("L", (8, 8), 77))
    clear.save(tmp_path / "a.png")
    noise((8, 8)).save(tmp_path / "b.png")
    for name, expected in (("a.png", 77), ("b.png", 255)):
        sha = checked(tmp_path / name).sha256
        made = images.mask_pixels(tmp_path / name, sha, [whole((8, 8))], alpha=True)[0]
        assert (made == expected).all()


def test_a_picture_that_changed_since_the_check_is_refused(tmp_path):
    noise().save(tmp_path / "a.png")
    sha = checked(tmp_path / "a.png").sha256
    noise(seed=1).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png was changed while the dataset was being prepared; start again"):
        images.pixels(tmp_path / "a.png", sha, [whole((64, 48))])
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        images.pixels(tmp_path / "a.png", sha, [whole((64, 48))])


def sharpness(folder, picture, resolution):
    picture.save(folder / "measured.png")
    return images.check(folder / "measured.png", Budget(), resolution).sharpness


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "rocket.jpg", "camera.png", "moon.png", "brick.png"])
def test_sharpness_tells_photographs_from_blurred_and_enlarged_ones(tmp_path, name):
    from pathlib import Path

    from skimage import data

    from detour.data.scan import BLURRED

    photograph = Image.open(Path(data.__file__).parent / name).convert("RGB")
    assert sharpness(tmp_path, photograph, 1024) > 1.4 * BLURRED
    pale = Image.fromarray((np.asarray(photograph) // 4 + 90).astype(np.uint8))
    assert sharpness(tmp_path, pale, 1024) > BLURRED, "contrast does not matter"
    for radius in (1.5, 2, 4):
        assert sharpness(tmp_path, photograph.filter(ImageFilter.GaussianBlur(radius)), 1024) < 0.8 * BLURRED
    large = photograph.resize((photograph.width * 4, photograph.height * 4), Image.Resampling.BICUBIC)
    assert sharpness(tmp_path, large, 2048) < 0.8 * BLURRED
    assert sharpness(tmp_path, large, min(photograph.size)) > BLURRED, "sharp at the size it has"


def test_sharpness_where_nothing_is_to_be_seen(tmp_path):
    assert sharpness(tmp_path, Image.new("RGB", (256, 256), "teal"), 256) == np.inf
    assert sharpness(tmp_path, noise((63, 256)), 256) == np.inf, "too narrow to tell"


def test_the_look_of_a_picture_is_upright_and_flat(tmp_path):
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (32, 0, 64, 32))
    picture.save(tmp_path / "a.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)  # the camera was held the other way, and wrote down how
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b.png", exif=exif)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.new("L", picture.size, 0))
    clear.save(tmp_path / "c.png")
    looks = [np.frombuffer(checked(tmp_path / f"{name}.png").look, np.uint8).reshape(16, 16, 3) for name in "abc"]
    assert looks[0][0, 0].tolist() == [255, 0, 0]
    assert looks[0][0, 15].tolist() == [0, 0, 255]
    assert (looks[0] == looks[1]).all()
    assert (looks[2] == 255).all()


@pytest.mark.parametrize("save", [{}, {"quality": 95}])
def test_small_pictures_are_upright_and_close_to_the_whole(tmp_path, save):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / ("a.jpg" if save else "a.png")
    noise((1200, 800)).filter(ImageFilter.GaussianBlur(20)).save(path, exif=exif, **save)
    small = images.small(path, 200, Budget())
    assert small.size == (133, 200)
    whole_one = images.upright(path).resize((133, 200), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small, int) - np.asarray(whole_one, int)).max() <= 2
    assert images.small(path, 5000, Budget()).size == (800, 1200), "never enlarged"


def test_budget_lets_only_so_many_pixels_through():
    budget, most, held, lock = Budget(100), [0], [0], threading.Lock()

    def work(pixels):
        with budget.hold(pixels):
            with lock:
                held[0] += pixels
                most[0] = max(most[0], held[0])
            threading.Event().wait(0.001)
            with lock:
                held[0] -= pixels

    threads = [threading.Thread(target=work, args=(size,)) for size in [30, 50, 70, 90, 20] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert 50 < most[0] <= 100
    with budget.hold(1000):  # alone
        pass
