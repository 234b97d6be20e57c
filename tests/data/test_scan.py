"""The scan: what is found, and how everything that is wrong is said."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from detour import RefusedError, UserError
from detour.data.scan import scan


def scanned(kit, *configs, trigger=None):
    return scan(configs or (kit.config(),), trigger=trigger, divisibility=16)


def refused(kit, *configs, kind=RefusedError, trigger=None):
    with pytest.raises(UserError) as caught:
        scanned(kit, *configs, trigger=trigger)
    assert type(caught.value) is kind
    return str(caught.value)


def findings(kit, *configs):
    return {finding.message.split(": ")[1]: finding.details for finding in scanned(kit, *configs).findings}


def test_pictures_come_sorted_with_their_captions(kit):
    for name in ("b.png", "sub/a.jpg", "a10.png", "a2.webp", "sub/deep/x.jpeg"):
        kit.draw(name, (80, 64), seed=len(name), caption=f"  {name}, of course \n")
    pictures = scanned(kit).pictures
    assert [picture.key for picture in pictures] == ["a10.png", "a2.webp", "b.png", "sub/a.jpg", "sub/deep/x.jpeg"]
    assert pictures[0].captions == ("a10.png, of course",)
    assert (pictures[0].width, pictures[0].height, pictures[0].dataset) == (80, 64, 0)


def test_one_name_in_two_subfolders(kit):
    kit.draw("one/a.png", seed=1, caption="first")
    kit.draw("two/a.png", seed=2, caption="second")
    assert [(p.key, p.captions) for p in scanned(kit).pictures] == [
        ("one/a.png", ("first",)),
        ("two/a.png", ("second",)),
    ]


def test_not_recursive(kit):
    kit.draw("a.png")
    kit.draw("sub/b.png")
    assert [p.key for p in scanned(kit, kit.config(recursive=False)).pictures] == ["a.png"]


def test_hidden_files_are_left_alone(kit):
    kit.draw("a.png")
    kit.draw(".thumbs/b.png", caption=None)
    kit.draw("._a.png", caption=None)
    assert [p.key for p in scanned(kit).pictures] == ["a.png"]


def test_links_to_folders_are_followed_and_loops_end(kit):
    kit.draw("sub/a.png")
    (kit.root / "pictures" / "again").symlink_to("sub")
    (kit.root / "pictures" / "sub" / "loop").symlink_to("..")
    (kit.root / "pictures" / "above").symlink_to(kit.root)
    assert [p.key for p in scanned(kit).pictures] == ["again/a.png", "sub/a.png"]


def test_missing_folder_suggests_its_neighbour(kit):
    kit.draw("a.png")
    message = refused(kit, kit.config(folder_path=kit.root / "picturs"), kind=UserError)
    assert f"datasets[0]: folder_path: {kit.root}/picturs does not exist; did you mean {kit.root}/pictures?" in message


def test_missing_folder_far_from_anything(kit):
    message = refused(kit, kit.config(folder_path=kit.root / "xyz" / "deep" / "er"), kind=UserError)
    assert f"{kit.root} exists but has no 'xyz'" in message


def test_folder_is_a_file(kit):
    path = kit.draw("a.png")
    assert "is a file; give the folder" in refused(kit, kit.config(folder_path=path), kind=UserError)


def test_no_pictures(kit):
    (kit.root / "pictures").mkdir()
    (kit.root / "pictures" / "notes.md").touch()
    assert f"no pictures (.png, .jpg, .jpeg, .webp, .bmp) in {kit.root}/pictures" in refused(kit, kind=UserError)


def test_no_pictures_that_are_read(kit):
    kit.draw("a.gif", caption=None)
    assert "1 files cannot be used: a.gif is in a format that is not read" in refused(kit, kind=UserError)


def test_formats_that_are_not_read_are_not_passed_over(kit):
    kit.draw("a.png")
    kit.draw("b.gif")
    message = refused(kit)
    assert "pictures/b.gif is in a format that is not read; convert it to PNG, JPEG or WebP" in message
    assert "bad_images: skip" in message


def test_picture_without_caption(kit):
    kit.draw("a.png")
    kit.draw("b.png", seed=1, caption=None)
    message = refused(kit)
    assert "1 problem\n" in message
    assert f"{kit.root}/pictures/b.png has no caption: b.txt is missing; write one, or set default_caption" in message


def test_default_caption_fills_what_is_missing_or_empty(kit):
    kit.draw("a.png", caption=None)
    kit.draw("b.png", seed=1, caption=" \n")
    kit.draw("c.png", seed=2, caption="own")
    captions = [p.captions for p in scanned(kit, kit.config(default_caption="a thing")).pictures]
    assert captions == [("a thing",), ("a thing",), ("own",)]
    assert findings(kit, kit.config(default_caption="a thing"))[
        "empty caption files (the default caption is used)"
    ] == ("b.txt",)


def test_empty_caption_is_a_finding(kit):
    kit.draw("a.png", caption="")
    assert scanned(kit).pictures[0].captions == ("",)
    assert findings(kit) == {"empty caption files (trained without a caption)": ("a.txt",)}


def test_caption_that_is_not_text(kit):
    path = kit.draw("a.png")
    path.with_suffix(".txt").write_bytes(b"\xff\xfea\0")
    assert "a.png has no usable caption: " in refused(kit)
    assert "is not UTF-8 text (UTF-16); save it again as UTF-8" in refused(kit)


@pytest.mark.parametrize(("option", "name"), [("caption", "a.caption"), (".txt", "a.TXT"), ("en.txt", "a.en.txt")])
def test_caption_endings(kit, option, name):
    kit.draw("a.png", caption=None)
    (kit.root / "pictures" / name).write_text("found")
    assert scanned(kit, kit.config(caption_ext=option)).pictures[0].captions == ("found",)


def test_captions_without_picture_are_a_finding(kit):
    kit.draw("a.png")
    (kit.root / "pictures" / "b.txt").write_text("whose?")
    assert findings(kit) == {"caption files without a picture": ("b.txt",)}


def test_two_pictures_with_one_stem(kit):
    kit.draw("a.png")
    kit.draw("a.jpg", seed=1)
    message = refused(kit)
    assert "a.jpg shares its caption or mask with a.png; rename or remove one of them" in message
    assert "a.png shares its caption or mask with a.jpg" in message


def test_captions_file_settles_one_stem(kit):
    kit.draw("a.png", caption=None)
    kit.draw("a.jpg", seed=1, caption=None)
    rows = [{"file": "a.png", "caption": "png"}, {"file": "a.jpg", "caption": ["jpg", "j"]}]
    (kit.root / "pictures" / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [p.captions for p in scanned(kit, kit.config(captions_file="m.jsonl")).pictures] == [("jpg", "j"), ("png",)]


def test_rows_and_pictures_must_match(kit):
    kit.draw("a.png", caption="not this")
    kit.draw("b.png", seed=1, caption=None)
    (kit.root / "m.csv").write_text("file,caption\na.png,this\nc.png,nowhere\n")
    config = kit.config(captions_file=kit.root / "m.csv")
    message = refused(kit, config)
    assert "pictures/c.png does not exist, but line 3 of m.csv names it; correct or remove that line" in message
    assert "b.png has no caption: m.csv has no row for 'b.png'; write one" in message
    skipped = scanned(kit, config.model_copy(update={"bad_images": "skip"}))
    assert [p.captions for p in skipped.pictures] == [("this",)]
    assert sorted(problem.path.name for problem in skipped.skipped) == ["b.png", "c.png"]


def test_broken_captions_file_does_not_hide_broken_pictures(kit):
    kit.draw("a.png").write_bytes(b"")
    (kit.root / "pictures" / "m.jsonl").write_text("{oops")
    message = refused(kit, kit.config(captions_file="m.jsonl"), kind=UserError)
    assert "datasets[0]: captions_file: " in message
    assert "line 1: is not JSON" in message
    assert "a.png is empty" in message


def test_everything_at_once_and_no_more_than_twenty(kit):
    for index in range(30):
        kit.draw(f"{index:02d}.png", seed=index, caption=None)
    (kit.root / "pictures" / "00.png").write_bytes(b"")
    message = refused(kit, kit.config(), kit.config(folder_path=kit.root / "nowhere"), kind=UserError)
    assert "cannot be used as they are: 32 problems" in message
    assert "00.png has no caption" in message
    assert "00.png is empty (0 bytes)" in message
    assert message.count("\n  ") == 21
    assert "and 12 more" in message


def test_skip_leaves_bad_pictures_out_and_lists_them(kit):
    kit.draw("a.png")
    kit.draw("b.png").write_bytes(b"")
    kit.draw("c.png", seed=1, caption=None)
    result = scanned(kit, kit.config(bad_images="skip"))
    assert [p.key for p in result.pictures] == ["a.png"]
    assert [(problem.path.name, problem.reason.split()[1]) for problem in result.skipped] == [
        ("b.png", "empty"),
        ("c.png", "no"),
    ]


def test_skip_is_of_one_dataset(kit):
    kit.draw("a.png")
    kit.draw("b.png").write_bytes(b"")
    message = refused(kit, kit.config(bad_images="skip"), kit.config())
    assert "1 problem\n" in message


def test_nothing_left(kit):
    kit.draw("a.png").write_bytes(b"")
    message = refused(kit, kit.config(bad_images="skip"), kind=UserError)
    assert "no picture is left in" in message


def test_truncated_jpeg_and_bomb_and_animation_are_named(kit):
    path = kit.draw("a.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    kit.draw("b.png", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    kit.draw("c.png", (8, 200))
    message = refused(kit)
    assert "a.jpg is cut off or damaged (image file is truncated" in message
    assert "b.png is animated (2 frames)" in message
    assert "c.png is too small (8 x 200): both sides must have 16 pixels" in message


def test_small_pictures_may_be_enlarged(kit):
    kit.draw("c.png", (8, 200))
    assert scanned(kit, kit.config(upscale=True)).pictures


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_names_that_are_not_utf8(kit):
    path = kit.draw("a.png")
    path.rename(os.fsdecode(os.fsencode(path.parent) + b"/b\xff.png"))
    kit.draw("c.png", seed=1)
    assert "b\\udcff.png has a name that is not UTF-8; rename it" in refused(kit)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
def test_unreadable_files_and_folders(kit):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to others
        kit.root = Path(folder)
        kit.root.chmod(0o755)
        kit.draw("a.png").chmod(0)
        kit.draw("sub/b.png").parent.chmod(0)
        root = os.geteuid() == 0
        if root:  # who may read everything
            os.seteuid(65534)
        try:
            message = refused(kit)
        finally:
            if root:
                os.seteuid(0)
            (kit.root / "pictures" / "sub").chmod(0o755)
    assert "a.png cannot be read: permission denied" in message
    assert "sub is a folder that cannot be read: permission denied" in message


def test_findings_about_pictures(kit):
    kit.draw("cmyk.jpg")
    Image.new("CMYK", (64, 64), (255, 0, 0, 0)).save(kit.root / "pictures" / "cmyk.jpg")
    kit.draw("copy1.png", seed=5)
    kit.draw("copy2.png", seed=5)
    kit.draw("deep.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(kit.root / "pictures" / "deep.png")
    kit.draw("named.jpg", seed=6, format="PNG")
    kit.draw("tiny.png", (32, 16), seed=7)
    kit.draw("soft.png", (64, 64), seed=9)
    Image.fromarray(np.kron(np.eye(4) * 255, np.ones((16, 16))).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(3)
    ).save(kit.root / "pictures" / "soft.png")
    kit.draw(
        "turned.png", (64, 32), seed=8, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    found = findings(kit)
    soft = "pictures that seem blurred or enlarged (at resolution 64 no more to see than at half)"
    assert found.pop(soft) == ("deep.png", "soft.png")
    assert {message.split(" (")[0].split(",")[0]: details for message, details in found.items()} == {
        "pictures named for another format than they have": ("named.jpg (PNG)",),
        "pictures in CMYK": ("cmyk.jpg",),
        "pictures with 16 bits a channel": ("deep.png",),
        "pictures that are there more than once": ("copy1.png = copy2.png",),
        "pictures with less than a quarter of the pixels of resolution 64": ("tiny.png (32 x 16)",),
    }
    assert [(p.width, p.height) for p in scanned(kit).pictures if p.key == "turned.png"] == [(32, 64)]


def test_placeholder_without_trigger_word(kit):
    kit.draw("a.png", caption="a [trigger] there")
    assert "captions contain [trigger], but there is no trigger_word: 1 pictures" in refused(kit, kind=UserError)
    assert "a regularisation set gets no trigger word" in refused(
        kit, kit.config(is_reg=True), trigger="x", kind=UserError
    )
    assert scanned(kit, trigger="x").pictures
    assert scanned(kit, kit.config(trigger_word="y")).pictures


def mask(kit, name, size=(64, 64), value=255):
    path = kit.root / "pictures" / "masks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def test_masks_are_found_by_stem_also_inside_the_folder(kit):
    kit.draw("a.png", (128, 64))
    kit.draw("sub/a.jpg", seed=1)
    first, second = mask(kit, "a.jpg", (64, 32)), mask(kit, "sub/a.png")
    pictures = scanned(kit, kit.config(mask_path=kit.root / "pictures" / "masks")).pictures
    assert [(p.key, p.mask) for p in pictures] == [("a.png", first), ("sub/a.jpg", second)]
    assert pictures[0].mask_sha256 != pictures[1].mask_sha256


def test_mask_problems(kit):
    for index, name in enumerate(("black", "broken", "missing", "twice", "wide")):
        kit.draw(f"{name}.png", seed=index)
    mask(kit, "black.png", value=0)
    mask(kit, "broken.png").write_bytes(b"nothing")
    mask(kit, "twice.png")
    mask(kit, "twice.jpg")
    mask(kit, "wide.png", (64, 32))
    mask(kit, "other.png")
    config = kit.config(mask_path=kit.root / "pictures" / "masks", mask_min_value=0)
    message = refused(kit, config)
    assert "black.png would never count: its mask" in message
    assert "broken.png has a mask that cannot be used: " in message
    assert "missing.png has no mask: " in message
    assert "twice.png has several masks (twice.jpg, twice.png); keep one" in message
    assert "have different proportions (64 x 32, the picture 64 x 64)" in message
    kit.draw("fine.png", seed=9)
    mask(kit, "fine.png")
    skipping = config.model_copy(update={"bad_images": "skip"})
    assert findings(kit, skipping)["masks without a picture"] == ("other.png",)


def test_mask_options(kit):
    kit.draw("a.png")
    both = kit.config(mask_path=kit.root / "pictures", alpha_mask=True)
    assert "mask_path and alpha_mask exclude each other" in refused(kit, both, kind=UserError)
    assert "mask_path: " in refused(kit, kit.config(mask_path=kit.root / "nowhere"), kind=UserError)
    assert findings(kit, kit.config(alpha_mask=True)) == {
        "pictures without transparency to take a mask from (they count in full)": ("a.png",)
    }


def test_progress_counts_over_all_datasets(kit):
    for index in range(3):
        kit.draw(f"{index}.png", seed=index)
    seen = []
    scan(
        (kit.config(), kit.config()),
        trigger=None,
        divisibility=16,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 6), (6, 6)]


def test_no_torch():
    """`detour check` reads datasets without loading torch."""
    code = "import sys, detour.data.scan, detour.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
