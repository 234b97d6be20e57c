"""Clips from the command line, on the miniature of the model of video: training, previews, drawing, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clips_made as made
from command import detour, events, well
from detour.config.job import TrainConfig
from detour.nano import drawn
from detour.sample import Request, save_picture
from detour.train.objective import sample_loss
from detour.weights import read_tensors

SIZE = 64  # pixels


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "model"
    well("nano", folder, "--arch", "wan21", "--random")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A video, an animation and a folder of frames, of eleven frames each, and pictures in a folder of their own."""
    root = tmp_path_factory.mktemp("clips")
    for name in ("a.mp4", "b.gif", "c"):
        made.write(root / "clips" / name, 11)
        (root / "clips" / f"{name[0]}.txt").write_text(f"a zig {name[0]}")
    drawn.write_dataset(root / "pictures", n=2, size=SIZE)
    return root


@pytest.fixture
def job(model, clips, write_job):
    def write(folder, dataset=None, **sections):
        dataset = {"folder_path": str(clips / "clips"), "resolution": SIZE, "num_frames": 5} | (dataset or {})
        options = {
            "model": {"arch": "wan21", "name_or_path": str(model), "assistant_lora_path": None},
            "sample": {"disable_sampling": True, "width": SIZE, "height": SIZE, "sample_steps": 2},
        }
        merged = {key: options.get(key, {}) | sections.get(key, {}) for key in {*options, *sections} - {"dataset"}}
        return write_job(folder, dataset=dataset, **merged)

    return write


def frames_of(path):
    """Each frame of a PNG with the milliseconds it stays. Frames that are all alike are one that stays longer."""
    with Image.open(path) as picture:
        found = []
        for index in range(picture.n_frames):
            picture.seek(index)
            found.append((np.asarray(picture.convert("RGB")), picture.info.get("duration")))
        return found, dict(picture.text)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clips_are_trained_and_previewed_and_go_on_bit_for_bit(job, tmp_path):
    sample = {"disable_sampling": False, "num_frames": 5, "prompts": ["a zig", {"prompt": "a dog", "num_frames": 1}]}
    train = {"steps": 4, "batch_size": 2, "loss_type": "wavelet"}
    options = {"sample": sample, "train": train, "save": {"save_every": 2}}
    whole = well("run", job(tmp_path / "whole", **options))
    assert whole.out.startswith("finished at step 4: ")
    folder = tmp_path / "whole" / "output" / "zig"
    losses = [event["loss"] for event in events(folder, "step")]
    assert len(losses) == 4 and all(np.isfinite(losses))
    clip, text = frames_of(folder / "samples" / "000000004-00.png")
    # The miniature's VAE repeats what it decodes: the first frame, then four alike.
    assert [duration for _, duration in clip] == [62, 250]
    assert clip[0][0].shape == (SIZE, SIZE, 3)
    assert (text["detour:frames"], text["detour:fps"]) == ("5", "16.0")
    still, text = frames_of(folder / "samples" / "000000004-01.png")
    assert len(still) == 1 and "detour:frames" not in text

    part = job(tmp_path / "part", **options)
    well("run", part, "--set", "train.steps=2")
    again = well("run", part)
    assert again.out.startswith("finished at step 4: ")
    folders = [tmp_path / run / "output" / "zig" for run in ("part", "whole")]
    ours, theirs = (read_tensors(folder / "zig.safetensors")[0] for folder in folders)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("000000004-00.png", "000000004-01.png"):
        first, second = ((folder / "samples" / name).read_bytes() for folder in folders)
        assert first == second
    used = (folder / "job.yaml").read_text()
    assert "fps: 16.0" in used, "every default is visible"


def test_pictures_and_clips_are_trained_together(job, clips, tmp_path):
    path = job(tmp_path, train={"steps": 5, "batch_size": 2})
    text = path.read_text()
    more = f'        - folder_path: "{clips / "pictures"}"\n          resolution: {SIZE}\n'
    head, _, tail = text.partition("      datasets:\n")
    path.write_text(f"{head}      datasets:\n{more}{tail}")
    well("run", path, "--set", "datasets.1.clip_part=random", "--set", "datasets.1.crop_variants=2")
    report = well("check", path, "--json").json
    assert report["processes"][0]["pictures"] == 5


def test_a_mask_weighs_every_frame_of_a_clip_whatever_the_loss():
    drawn_with = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 3, 3, 6, 8, generator=drawn_with) for _ in range(2))
    left = torch.zeros(2, 1, 6, 8)
    left[..., :4] = 2.0
    for loss_type in ("mse", "mae", "huber", "wavelet"):
        config = TrainConfig(loss_type=loss_type)
        plain = sample_loss(prediction, target, config)
        torch.testing.assert_close(sample_loss(prediction, target, config, torch.ones(2, 1, 6, 8)), plain)
        half = sample_loss(prediction[..., :4], target[..., :4], config)
        torch.testing.assert_close(sample_loss(prediction, target, config, left), half)


# --- drawing -----------------------------------------------------------------------------------------------------


def test_sample_draws_clips(model, tmp_path):
    arguments = ["sample", "--model", model, "--arch", "wan21", "--prompt", "a zig", "--steps", 2, "--width", SIZE,
                 "--height", 48, "--dtype", "fp32", "--device", "cpu", "--json"]  # fmt: skip
    (path,) = well(*arguments, "--frames", 9, "--fps", 8, "--out", tmp_path / "clip").json
    clip, text = frames_of(path)
    assert [duration for _, duration in clip] == [125, 500, 500]
    assert clip[0][0].shape == (48, SIZE, 3)
    settings = json.loads(text["parameters"])
    assert (settings["frames"], settings["fps"], settings["architecture"]) == (9, 8.0, "wan21")
    (path,) = well(*arguments, "--out", tmp_path / "still").json
    still, text = frames_of(path)
    assert len(still) == 1 and "frames" not in json.loads(text["parameters"])
    (again,) = well(*arguments, "--frames", 9, "--fps", 8, "--out", tmp_path / "again").json
    assert (tmp_path / "clip" / Path(again).name).read_bytes() == Path(again).read_bytes()


@pytest.mark.parametrize(("fps", "total"), [(16.0, 312), (24.0, 208), (7.5, 667), (1000.0, 5)])
def test_a_clip_lasts_as_long_as_its_rate_says(fps, total, tmp_path):
    from detour.archs.wan21 import SPEC

    request = Request(prompt="", seed=0, width=8, height=8, steps=1, frames=5, fps=fps)
    pictures = [Image.new("RGB", (8, 8), (10 * number, 0, 0)) for number in range(5)]
    save_picture(tmp_path / "clip.png", pictures, request, SPEC, {})
    clip, _ = frames_of(tmp_path / "clip.png")
    assert sum(duration for _, duration in clip) == total
    assert [frame[0, 0, 0] for frame, _ in clip] == [0, 10, 20, 30, 40]


# --- bad input ---------------------------------------------------------------------------------------------------


def line_of(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("command", ["check", "run"])
def test_numbers_of_frames_that_do_not_fit(command, job, tmp_path):
    sample = {"num_frames": 8, "prompts": [{"prompt": "a zig", "num_frames": 3}]}
    path = job(tmp_path, dataset={"num_frames": 32}, sample=sample)
    ran = detour(command, path)
    assert ran.code == 2
    for option, text, advice in (
        ("num_frames: 32", "32 frames: wan21 needs 4 k + 1 of them", "try 29 or 33"),
        ("num_frames: 8", "8 frames: wan21 needs 4 k + 1 of them", "try 5 or 9"),
        ("num_frames\": 3", "3 frames: wan21 needs 4 k + 1 of them", "try 1 or 5"),
    ):  # fmt: skip
        assert f"{text}; {advice}" in ran.err, option
    assert f"job.yaml:{line_of(path, 'num_frames: 32')}: datasets[0].num_frames: " in ran.err
    assert not (tmp_path / "output").exists()


def test_frames_for_a_model_of_pictures(world, write_job, tmp_path):
    dataset = {"folder_path": str(world.pictures), "resolution": SIZE, "num_frames": 5}
    path = write_job(tmp_path, dataset=dataset, sample={"fps": 8})
    ran = detour("check", path)
    assert ran.code == 2
    assert "datasets[0].num_frames: 5 frames: zimage knows pictures only; leave it out" in ran.err
    assert "sample.fps: zimage draws pictures, which have no frames; leave it out" in ran.err
    ran = detour("sample", "--model", world.model, "--arch", "zimage", "--prompt", "x", "--frames", 5)
    assert ran.code == 2 and "5 frames: zimage knows pictures only" in ran.err
    for value in ("0", "x", "-1"):
        assert detour("sample", "--model", "x", "--arch", "wan21", "--prompt", "x", "--fps", value).code == 2


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_video_given_to_a_model_of_pictures(command, world, clips, write_job, tmp_path):
    path = write_job(tmp_path, dataset={"folder_path": str(clips / "clips"), "default_caption": "x"})
    ran = detour(command, path)
    assert ran.code == 3
    assert "a.mp4 is a video among pictures" in ran.err
    assert "others know pictures only" in ran.err


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_clip_shorter_than_asked(command, job, tmp_path):
    ran = detour(command, job(tmp_path, dataset={"num_frames": 13}))
    assert ran.code == 3
    assert "a.mp4 is too short: it has 11 frames at 16 a second (11 in the file), and num_frames asks for 13" in ran.err
    assert "clips/c is too short: it has 11 frames, and num_frames asks for 13" in ran.err
    assert not (tmp_path / "output").exists()


def test_a_video_that_cannot_be_read(job, tmp_path):
    folder = tmp_path / "clips"
    made.write(folder / "good.mp4", 11)
    data = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "text.mp4").write_text("hello")
    ran = detour("check", job(tmp_path, dataset={"folder_path": str(folder), "default_caption": "x"}))
    assert ran.code == 3 and "2 problems" in ran.err
    assert "cut.mp4 cannot be decoded" in ran.err and "text.mp4 cannot be decoded" in ran.err
    skipped = {"folder_path": str(folder), "default_caption": "x", "bad_images": "skip"}
    ran = well("check", job(tmp_path, dataset=skipped))
    assert "left out: " in ran.out and "1 pictures" in ran.out
