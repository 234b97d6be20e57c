"""Clips: what is one, which frames are taken, what is refused, and the way through cache and batches."""

import dataclasses
import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clips_made as made
from detour import RefusedError, UserError
from detour.config.job import DatasetConfig
from detour.data import buckets, clips, images, loader, order
from detour.data.images import BadPictureError, ClipPart, Transform
from detour.data.scan import scan


def transform(first, frames, fps=16.0, size=made.SIZE):
    part = ClipPart(first, frames, fps)
    return Transform(*size, 0, 0, *size, False, False, False, clip=part)


def taken(path, first, frames, fps=16.0):
    """The numbers of the frames that are taken."""
    facts = clips.check(path, first + frames, fps, whole=True)
    (clip,) = clips.pixels(path, facts.sha256, [transform(first, frames, fps)])
    assert clip.shape == (frames, made.SIZE[1], made.SIZE[0], 3) and clip.dtype == np.uint8
    return made.numbers(clip)


def refused(path, wanted=5, fps=16.0):
    with pytest.raises(BadPictureError) as caught:
        clips.check(path, wanted, fps, whole=False)
    return str(caught.value)


# --- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*made.ENDINGS, ""])
def test_every_kind_of_clip_gives_its_frames_in_order(ending, tmp_path):
    path = made.write(tmp_path / f"clip{ending}", 11)
    facts = clips.check(path, 9, 16.0, whole=True)
    assert (facts.width, facts.height) == made.SIZE
    assert facts.frames == 11
    assert taken(path, 0, 9) == list(range(9))
    assert taken(path, 2, 9) == list(range(2, 11))
    (clip,) = clips.pixels(path, facts.sha256, [transform(0, 1)])
    red, green, blue = clip[0, 24, 4].tolist()
    assert red > 180 and green < 60 and blue < 60, "red and blue are not exchanged"


def test_one_decoding_serves_several_transforms(tmp_path):
    path = made.write(tmp_path / "clip.mkv", 11)
    facts = clips.check(path, 5, 16.0, whole=True)
    flipped = dataclasses.replace(transform(6, 5), flip_x=True)
    smaller = Transform(32, 24, 0, 0, 32, 16, False, False, False, clip=ClipPart(0, 9, 16.0))
    first, second, third = clips.pixels(path, facts.sha256, [transform(1, 5), flipped, smaller])
    assert made.numbers(first) == [1, 2, 3, 4, 5]
    assert made.numbers(second[:, :, ::-1]) == [6, 7, 8, 9, 10]
    assert third.shape == (9, 16, 32, 3) and made.numbers(third) == list(range(9))


@pytest.mark.parametrize(
    ("source", "fps", "expected"),
    [
        (16, 16.0, [0, 1, 2, 3, 4]),
        (32, 16.0, [0, 2, 4, 6, 8]),
        (24, 16.0, [0, 1, 3, 4, 6]),  # 0, 1.5, 3, 4.5, 6: the earlier of two
        (8, 16.0, [0, 0, 1, 1, 2]),
        (16, None, [0, 1, 2, 3, 4]),
        (32, None, [0, 1, 2, 3, 4]),
        (15.984, 16.0, [0, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("ending", [".mkv", ".mp4"])
def test_frames_are_taken_by_time(ending, source, fps, expected, tmp_path):
    """Matroska rounds times to milliseconds, mp4 does not."""
    assert taken(made.write(tmp_path / f"clip{ending}", 11, source), 0, 5, fps) == expected


def test_frames_of_an_animation_last_as_long_as_they_say(tmp_path):
    path = made.write(tmp_path / "clip.gif", 4, durations=[100, 300, 100, 100])
    assert taken(path, 0, 6, 10.0) == [0, 1, 1, 2, 2, 3]
    assert clips.check(path, 2, 10.0, whole=True).frames == 6


def test_a_folder_has_no_times_and_its_names_are_counted(tmp_path):
    path = made.write(tmp_path / "walk", 11)
    assert (path / "10.png").exists() and (path / "2.png").exists()
    (path / ".hidden.png").write_bytes(b"")
    (path / "notes.txt").write_text("not a frame")
    assert taken(path, 0, 11, 16.0) == taken(path, 0, 11, 4.0) == list(range(11))


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 60),
    source=st.floats(4, 120),
    rate=st.floats(4, 60),
    jitter=st.lists(st.floats(-1, 1), min_size=60),
)
def test_every_frame_taken_is_the_nearest_and_none_is_invented(count, source, rate, jitter):
    times = [0.0] + [(k + 0.2 * jitter[k]) / source for k in range(1, count)]
    found = clips._count(times, rate)
    assert found >= 1
    assert (found - 1) / rate <= times[-1] + 1 / source, "a frame is taken from after the end"
    asked = [k / rate for k in range(found)]
    frames = (clips._Frame(time, (1, 1), lambda: None) for time in times)
    for at, frame in zip(asked, clips._nearest(frames, asked), strict=True):
        assert abs(frame.time - at) <= min(abs(time - at) for time in times) + 1e-3


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 200), rate=st.floats(5, 60), start=st.integers(0, 500))
def test_at_its_own_rate_every_frame_is_taken_once(count, rate, start):
    """Whatever rounding to milliseconds does to the times."""
    times = [round(start + 1000 * k / rate) - start for k in range(count)]
    times = [time / 1000 for time in times]
    assert clips._count(times, rate) == count
    frames = (clips._Frame(time, (k, 1), lambda: None) for k, time in enumerate(times))
    assert [f.size[0] for f in clips._nearest(frames, [k / rate for k in range(count)])] == list(range(count))


# --- what a player does ------------------------------------------------------------------------------------------


def turned(path, degrees):
    """The file with a display matrix, as telephones write it: it is shown turned clockwise."""
    data = path.read_bytes()
    at = data.index(b"tkhd")
    one = (0x10000).to_bytes(4, "big")
    minus, zero = (-0x10000).to_bytes(4, "big", signed=True), bytes(4)
    plain = one + zero * 3 + one + zero * 3 + (0x40000000).to_bytes(4, "big")
    a, b, c, d = {90: (zero, one, minus, zero), 180: (minus, zero, zero, minus), 270: (zero, minus, one, zero)}[degrees]
    place = data.index(plain, at)
    matrix = a + b + zero + c + d + zero * 3 + plain[-4:]
    assert len(matrix) == len(plain)
    path.write_bytes(data[:place] + matrix + data[place + len(plain) :])
    return path


@pytest.mark.parametrize(("degrees", "red_edge"), [(90, "top"), (180, "right"), (270, "bottom")])
def test_clips_are_turned_as_players_turn_them(degrees, red_edge, tmp_path):
    path = turned(made.write(tmp_path / "clip.mp4", 5), degrees)
    facts = clips.check(path, 5, 16.0, whole=True)
    upright = made.SIZE if degrees == 180 else made.SIZE[::-1]
    assert (facts.width, facts.height) == upright
    (clip,) = clips.pixels(path, facts.sha256, [transform(0, 5, size=upright)])
    edges = {"top": clip[0, 3, 20], "bottom": clip[0, -4, 20], "left": clip[0, 20, 3], "right": clip[0, 20, -4]}
    assert {name for name, pixel in edges.items() if pixel[0] > 180 and pixel[1] < 60} == {red_edge}


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = made.write(tmp_path / "clip.mp4", 5, aspect="3/2")
    facts = clips.check(path, 5, 16.0, whole=True)
    assert (facts.width, facts.height) == (96, 48)


@pytest.mark.parametrize(("size", "matrix"), [((1280, 720), 1), ((64, 48), 5)])
def test_colours_without_a_named_matrix_are_read_as_players_read_them(size, matrix, tmp_path):
    """BT.709 from 720 lines on, BT.601 below. Read the other way round, pure red would be off by 20 levels."""
    path = made.write(tmp_path / "clip.avi", 2, size=size, matrix=matrix)  # mpeg4 in AVI names none
    facts = clips.check(path, 1, None, whole=False)
    (clip,) = clips.pixels(path, facts.sha256, [transform(0, 1, None, size)])
    red = clip[0, size[1] // 2, size[0] // 16].astype(int)
    assert abs(red - [255, 0, 0]).max() < 8, red


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*made.ENDINGS, ""])
def test_too_short_says_what_was_found_and_asked(ending, tmp_path):
    path = made.write(tmp_path / f"clip{ending}", 7)
    message = refused(path, 9)
    assert message.startswith("is too short: it has 7 frames")
    assert "num_frames asks for 9" in message


def test_too_short_at_another_rate_says_both_numbers(tmp_path):
    message = refused(made.write(tmp_path / "clip.mp4", 11, 32), 9)
    assert "it has 6 frames at 16 a second (11 in the file), and num_frames asks for 9" in message


@pytest.mark.parametrize("ending", made.ENDINGS)
@pytest.mark.parametrize("content", [b"", b"hello" * 100, bytes(range(256)) * 8, b"\x89PNG\r\n\x1a\n" + bytes(200)])
def test_what_is_no_clip_is_said(ending, content, tmp_path):
    path = tmp_path / f"clip{ending}"
    path.write_bytes(content)
    assert "remove it" in refused(path)


def test_playlists_lead_nowhere(tmp_path):
    """A file whose content tells ffmpeg to open others."""
    other = made.write(tmp_path / "other.mp4", 11)
    for name, text in (
        ("a.mp4", f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{other}\n#EXT-X-ENDLIST\n"),
        ("b.mkv", f"ffconcat version 1.0\nfile {other.name}\n"),
    ):
        (tmp_path / name).write_text(text)
        assert "cannot be decoded" in refused(tmp_path / name)


def test_sound_alone_is_no_clip(tmp_path):
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    assert "has no picture track" in refused(path)


@pytest.mark.parametrize("ending", made.ENDINGS)
def test_damage_of_any_kind_raises_nothing_else(ending, tmp_path):
    """Bytes changed and ends cut off: frames, or one sentence."""
    whole = made.write(tmp_path / f"whole{ending}", 11).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / f"clip{ending}"
    outcomes = set()
    for _ in range(25):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 1 + random.integers(0, 40)):
            data[place] = random.integers(0, 256)
        path.write_bytes(bytes(data[: random.integers(1, len(data))] if random.random() < 0.5 else data))
        try:
            facts = clips.check(path, 5, 16.0, whole=True)
            clips.pixels(path, facts.sha256, [transform(facts.frames - 5, 5, size=(16, 16))])
            outcomes.add("read")
        except (BadPictureError, UserError):
            outcomes.add("refused")
    assert "refused" in outcomes


def test_a_clip_that_changes_after_the_check_is_an_error(tmp_path):
    path = made.write(tmp_path / "clip.mkv", 5)
    facts = clips.check(path, 5, 16.0, whole=False)
    made.write(path, 6)
    with pytest.raises(UserError, match="was changed while the dataset was being prepared"):
        clips.pixels(path, facts.sha256, [transform(0, 5)])
    path.unlink()
    with pytest.raises(UserError, match=r"clip\.mkv cannot be read: no such file"):
        clips.pixels(path, facts.sha256, [transform(0, 5)])


def test_frames_in_a_folder_must_be_alike_and_whole(tmp_path):
    path = made.write(tmp_path / "walk", 5)
    Image.new("RGB", (32, 32)).save(path / "3.png")
    assert "has frames of several sizes (64 x 48, 32 x 32)" in refused(path)
    (path / "3.png").write_bytes(b"junk")
    assert "has a frame that cannot be used: 3.png is something else" in refused(path)


# --- datasets ----------------------------------------------------------------------------------------------------


def dataset(folder, **options):
    return DatasetConfig(**({"folder_path": folder, "num_frames": 5, "fps": 16.0, "resolution": [64]} | options))


def captioned(folder, *names, count=7, **options):
    for name in names:
        made.write(folder / name, count, **options)
        stem = name if "." not in name[-5:] else name.rpartition(".")[0]
        (folder / f"{stem}.txt").write_text(f"caption of {name}")
    return folder


def look(config):
    return scan([config], trigger=None, divisibility=16)


def test_clips_and_their_captions_are_found(tmp_path):
    folder = captioned(tmp_path / "set", "a.mp4", "deep/b.webm", "v1.2 walk", "deep/c", "d.gif", "e.webp")
    (folder / "notes.md").write_text("none of our business")
    found = look(dataset(folder))
    assert [(p.key, p.captions) for p in found.pictures] == [
        (key, (f"caption of {key}",)) for key in ["a.mp4", "d.gif", "deep/b.webm", "deep/c", "e.webp", "v1.2 walk"]
    ]
    assert {(p.width, p.height) for p in found.pictures} == {made.SIZE}
    assert [finding.message.partition(": ")[2] for finding in found.findings] == [
        "pictures that are there more than once: 1"  # both folders
    ]
    table = tmp_path / "captions.jsonl"
    rows = [{"file": p.key, "caption": f"from the table: {p.key}"} for p in found.pictures]
    table.write_text("\n".join(map(json.dumps, rows)))
    again = look(dataset(folder, captions_file=table))
    assert [p.captions for p in again.pictures] == [(row["caption"],) for row in rows]


def test_webp_frames_and_webp_clips_are_told_apart(tmp_path):
    folder = captioned(tmp_path / "set", "clip.webp", "walk")
    for path in (folder / "walk").iterdir():
        with Image.open(path) as picture:
            picture.save(path.with_suffix(".webp"))
        path.unlink()
    assert [p.key for p in look(dataset(folder)).pictures] == ["clip.webp", "walk"]


def problems(config):
    with pytest.raises(UserError) as caught:
        look(config)
    return str(caught.value)


def test_every_clip_that_cannot_be_used_is_named_at_once(tmp_path):
    folder = captioned(tmp_path / "set", "a.mp4", "short.mp4", "walk")
    captioned(folder, "short2.mp4", "few", count=3)
    (folder / "bad.mp4").write_bytes(b"junk")
    (folder / "bad.txt").write_text("x")
    (folder / "old.mpg").write_bytes(b"junk")
    Image.new("RGB", (64, 64)).save(folder / "still.png")
    message = problems(dataset(folder))
    for part in (
        "5 problems", "short2.mp4 is too short: it has 3 frames", "few is too short", "bad.mp4 cannot be decoded",
        "old.mpg is in a format that is not read", "still.png is a single picture among clips",
    ):  # fmt: skip
        assert part in message, message
    found = look(dataset(folder, bad_images="skip"))
    assert [p.key for p in found.pictures] == ["a.mp4", "short.mp4", "walk"]
    assert len(found.skipped) == 5


def test_a_video_among_pictures_is_an_error(tmp_path):
    folder = captioned(tmp_path / "set", "a.mp4")
    Image.new("RGB", (64, 64)).save(folder / "b.png")
    (folder / "b.txt").write_text("x")
    message = problems(DatasetConfig(folder_path=folder, resolution=[64]))
    assert "a.mp4 is a video among pictures; models of video take clips (set num_frames)" in message
    with pytest.raises(RefusedError):
        look(DatasetConfig(folder_path=folder, resolution=[64]))


def test_no_clips_says_what_would_be_one(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "b.png")
    assert "no clips (mp4, m4v, mov, mkv, webm, avi, gif, animated webp, or folders of frames) in" in problems(
        dataset(folder)
    )


def test_a_missing_decoder_is_said_once_and_only_where_it_is_needed(tmp_path, monkeypatch):
    folder = captioned(tmp_path / "set", "a.mp4", "b.mp4", "walk")
    monkeypatch.setitem(sys.modules, "av", None)
    message = problems(dataset(folder))
    assert message.count("pip install 'detour[video]'") == 1
    (folder / "a.mp4").unlink()
    (folder / "b.mp4").unlink()
    assert [p.key for p in look(dataset(folder)).pictures] == ["walk"]


def test_a_folder_and_a_file_of_one_name_share_a_caption(tmp_path):
    folder = captioned(tmp_path / "set", "walk", "walk.mp4")
    assert "walk shares its caption or mask with walk.mp4" in problems(dataset(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 1}, "fps and clip_part have no effect on pictures"),
        ({"num_frames": 1, "fps": None, "clip_part": "random"}, "fps and clip_part have no effect on pictures"),
        ({"alpha_mask": True}, "clips have no transparency"),
        ({"num_frames": 0}, "greater than or equal to 1"),
        ({"fps": 0.0}, "greater than 0"),
    ],
)
def test_options_that_do_not_go_together(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, **options)


# --- parts, keys, batches ----------------------------------------------------------------------------------------


def test_the_part_is_a_function_of_content_and_variant():
    sha = hashlib.sha256(b"x").hexdigest()
    assert {buckets.first_frame(40, 5, "start", sha, variant) for variant in range(20)} == {0}
    drawn = [buckets.first_frame(40, 5, "random", sha, variant) for variant in range(1000)]
    assert drawn == [buckets.first_frame(40, 5, "random", sha, variant) for variant in range(1000)]
    assert set(drawn) == set(range(36))
    assert buckets.first_frame(5, 5, "random", sha, 3) == 0
    assert drawn != [buckets.first_frame(40, 5, "random", sha[::-1], variant) for variant in range(1000)]


class PoolingClips:
    """Latents: means of 8 x 8 pixels of each colour, of the first frame and of every four frames."""

    def __init__(self, spec):
        self.spec = dataclasses.replace(spec, frame_factor=4, latent_channels=3)

    def encode_images(self, vae, pixels_B3HW):
        assert pixels_B3HW.ndim == 5
        pooled = torch.nn.functional.avg_pool3d(pixels_B3HW, (1, 8, 8))
        rest = [pooled[:, :, 1 + k : 5 + k].mean(2, keepdim=True) for k in range(0, pooled.shape[2] - 1, 4)]
        return torch.cat([pooled[:, :, :1], *rest], 2)

    def encode_prompts(self, text, prompts):
        return [{"tokens_LD": torch.ones(2, 3)} for _ in prompts]


@pytest.fixture
def clip_kit(kit):
    kit.arch = PoolingClips(kit.arch.spec)
    kit.folder = captioned(kit.root / "clips", "a.mp4", "b.mkv", "walk", count=11)
    return kit


def ordered(kit, *configs, batch_size=2):
    pictures = scan(configs, trigger=None, divisibility=16).pictures
    return order.Order(order.make_items(pictures, configs, 16), configs, None, 0, batch_size, 4)


def batches_of(kit, made_order, epoch=0):
    prepared = kit.prepare(made_order)
    source = loader.Source(kit.store, kit.keys, prepared.datasets, 1.0)
    return [loader.load_batch(source, plan) for plan in prepared.epoch(epoch)]


def test_latents_are_cached_with_frames_and_pictures_are_one(clip_kit):
    kit = clip_kit
    pictures = kit.draw("p.png", size=(64, 48), seed=3)
    configs = (dataset(kit.folder, num_frames=9), kit.config(), dataset(kit.folder))
    found = batches_of(kit, ordered(kit, *configs))
    shapes = {tuple(batch.latents_BCHW.shape[1:]) for batch in found}
    assert shapes == {(3, 3, 6, 8), (3, 1, 6, 8), (3, 2, 6, 8)}, "frames decide who may share a batch"
    assert sum(len(batch.names) for batch in found) == 3 + 1 + 3
    for batch in found:
        for name, latents in zip(batch.names, batch.latents_BCHW, strict=True):
            if name == "pictures/p.png":
                pixels = torch.from_numpy(np.array(Image.open(pictures))).permute(2, 0, 1) / 127.5 - 1
                torch.testing.assert_close(latents[:, 0], torch.nn.functional.avg_pool2d(pixels, 8))
            else:
                greys = latents[:, :, 3, 4].mean(0) * 127.5 + 127.5
                expected = [made.level(0)] + [made.level(2.5 + 4 * k) for k in range(latents.shape[1] - 1)]
                assert greys.tolist() == pytest.approx(expected, abs=3)


def test_keys_tell_every_cut_of_a_clip_apart(clip_kit):
    kit, keys = clip_kit, set()
    for options in ({}, {"num_frames": 9}, {"fps": 8.0}, {"fps": None}, {"clip_part": "random", "crop_variants": 8}):
        config = dataset(kit.folder, **options)
        (item, *_) = ordered(kit, config).items
        keys |= {kit.keys.latents(item, config, crop) for crop in range(order.crop_variants(config))}
    assert len(keys) >= 4 + 4  # of 8 draws among 7 parts some may be alike, and one may begin at the start


def test_epochs_go_through_the_random_parts(clip_kit):
    kit = clip_kit
    config = dataset(kit.folder, clip_part="random", crop_variants=3)
    made_order = ordered(kit, config)
    parts = {}
    for epoch in range(3):
        for plan in made_order.epoch(epoch):
            for draw in plan.draws:
                first = order.transform_of(draw.item, config, draw.crop).clip.first
                parts.setdefault(draw.item.picture.key, []).append(first)
    assert all(len(firsts) == 3 and all(0 <= first <= 6 for first in firsts) for firsts in parts.values())
    assert any(len(set(firsts)) > 1 for firsts in parts.values())
    assert len(batches_of(kit, made_order, epoch=2)) == 2


def test_a_mask_counts_for_every_frame(clip_kit):
    kit = clip_kit
    masks = kit.root / "masks"
    masks.mkdir()
    half = np.zeros((48, 64), np.uint8)
    half[:, 32:] = 255
    for name in ("a", "b", "walk"):
        Image.fromarray(half).save(masks / f"{name}.png")
    config = dataset(kit.folder, mask_path=masks, mask_min_value=0.0, clip_part="random", crop_variants=4)
    made_order = ordered(kit, config)
    keys = {kit.keys.mask(item, config, crop) for item in made_order.items for crop in range(4)}
    assert len(keys) == 1, "the same mask, however a clip is cut in time"
    for batch in batches_of(kit, made_order):
        assert batch.masks_B1HW.shape[1:] == (1, 6, 8)
        assert torch.equal(batch.masks_B1HW[0, 0, 0], torch.tensor([0.0] * 4 + [2.0] * 4))


def test_validation_takes_the_start(clip_kit):
    config = dataset(clip_kit.folder, clip_part="random", crop_variants=4)
    pictures = scan([config], trigger=None, divisibility=16).pictures
    held = order.validation_order(pictures, [config], None, seed=0, batch_size=1, max_images=2, divisibility=16)
    assert {order.transform_of(item, held.datasets[0], 0).clip.first for item in held.items} == {0}


def test_the_fingerprint_knows_how_clips_are_cut(clip_kit):
    prints = {
        ordered(clip_kit, dataset(clip_kit.folder, **options)).fingerprint
        for options in ({}, {"num_frames": 9}, {"fps": 8.0}, {"clip_part": "random"})
    }
    assert len(prints) == 4


def test_checking_a_start_reads_no_further_than_that(tmp_path, monkeypatch):
    """A film of hours costs no more than the clip that is taken of it."""
    path = made.write(tmp_path / "walk", 11)
    opened = []
    inner = images.upright
    monkeypatch.setattr(images, "upright", lambda path: opened.append(path.name) or inner(path))
    assert clips.check(path, 5, 16.0, whole=False).frames == 5
    assert opened == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    shutil.rmtree(path)
