"""Whatever a user can get wrong, from the command line: the message, the exit code, and that nothing was begun.

2 means that the job file, an option or an input is wrong; 3 that the job is right but was refused before it started.
"""

import contextlib
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from command import Ran, detour, events, tree, well
from detour.nano import drawn

NAME = "zig"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three good pictures that a test may spoil."""
    drawn.write_dataset(tmp_path / "pictures", n=3, size=64)
    return tmp_path / "pictures"


@pytest.fixture
def home(tmp_path) -> Path:
    """Where the job file goes, and the output."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Never blurred."""
    return Image.effect_noise(size, 80).convert(mode)


def add(folder: Path, name: str, save: Callable[[Path], None]) -> Path:
    """A picture with a caption."""
    save(folder / name)
    (folder / name).with_suffix(".txt").write_text(f"a {Path(name).stem}")
    return folder / name


def line_of(job: Path, option: str) -> int:
    """The line of an option in a job file."""
    return next(
        n for n, line in enumerate(job.read_text().splitlines(), 1) if line.strip(" -").startswith(f"{option}:")
    )


def refused(job: Path, code: int, *messages: str, arguments: tuple[str, ...] = ()) -> Ran:
    """`detour run` says all of this, ends with the code, and has begun nothing."""
    before = tree(job.parent)
    ran = detour("run", job, *arguments)
    for message in messages:
        assert message in ran.err, ran.err
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert tree(job.parent) == before
    assert not (job.parent / "output").exists()
    return ran


# --- pictures and captions -----------------------------------------------------------------------------------------


def test_no_such_folder(home, write_job, pictures):
    job = write_job(home, dataset={"folder_path": str(pictures.with_name("picturse"))})
    place = f"{job}:{line_of(job, 'folder_path')}: datasets[0]: folder_path: {pictures.with_name('picturse')}"
    refused(job, 2, f"{place} does not exist; did you mean {pictures}?")


def test_no_such_folder_in_the_short_form(home, write_job, tmp_path):
    job = write_job(home, train={"dataset_folder": str(tmp_path / "nowhere")})
    text = job.read_text()
    job.write_text(text[: text.index("      datasets:")] + text[text.index("      model:") :])
    line = line_of(job, "dataset_folder")
    refused(job, 2, f"{job}:{line}: datasets[0]: folder_path: {tmp_path / 'nowhere'} does not exist")


def test_a_file_instead_of_a_folder(home, write_job, pictures):
    job = write_job(home, dataset={"folder_path": str(pictures / "0000.png")})
    refused(job, 2, f"{pictures / '0000.png'} is a file; give the folder that holds the pictures")


def test_no_pictures(home, write_job, tmp_path):
    (tmp_path / "empty").mkdir()
    job = write_job(home, dataset={"folder_path": str(tmp_path / "empty")})
    refused(
        job,
        2,
        f"{job}:{line_of(job, 'folder_path')}: ",
        f"no pictures (.png, .jpg, .jpeg, .webp, .bmp) in {tmp_path / 'empty'}",
    )


def test_a_picture_without_caption(home, write_job, pictures):
    (pictures / "0001.txt").unlink()
    job = write_job(home, dataset={"folder_path": str(pictures)})
    refused(job, 3, f"{pictures / '0001.png'} has no caption: 0001.txt is missing; write one, or set default_caption")
    well("check", job, "--set", "datasets.0.default_caption=a zig")


def test_every_bad_picture_is_named_at_once_or_left_out(home, write_job, pictures):
    add(pictures, "cut.jpg", lambda path: noise().save(path))
    whole = (pictures / "cut.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    add(pictures, "zero.png", lambda path: path.write_bytes(b""))
    add(pictures, "text.png", lambda path: path.write_text("hello"))
    add(pictures, "page.png", lambda path: path.write_text("<html>not found</html>"))
    frames = [noise() for _ in range(3)]
    add(pictures, "moving.png", lambda path: frames[0].save(path, save_all=True, append_images=frames[1:]))
    add(pictures, "moving.gif", lambda path: frames[0].save(path, save_all=True, append_images=frames[1:]))
    add(pictures, "bomb.png", lambda path: path.write_bytes(bomb()))
    add(pictures, "tiny.png", lambda path: noise(size=(16, 16)).save(path))
    job = write_job(home, dataset={"folder_path": str(pictures)})
    reasons = {
        "cut.jpg": "is cut off or damaged (image file is truncated",
        "zero.png": "is empty (0 bytes); copy it again or remove it",
        "text.png": "is something else, not a PNG, JPEG, WebP or BMP picture; convert it or remove it",
        "page.png": "is a web page, not a PNG",
        "moving.png": "is animated (3 frames); save one frame as a picture of its own",
        "moving.gif": "is in a format that is not read; convert it to PNG, JPEG or WebP, or move it away",
        "bomb.png": "is too large (more than 400 million pixels, at most 200); scale it down",
        "tiny.png": "is too small (16 x 16): both sides must have 32 pixels; use a larger one, or set upscale: true",
    }
    messages = [f"{pictures / name} {reason}" for name, reason in reasons.items()]
    refused(job, 3, f"{len(reasons)} problems", *messages, "leave such pictures out with `bad_images: skip`")
    checked = detour("check", job)
    assert checked.code == 3
    assert all(message in checked.err for message in messages)

    skipped = well("run", job, "--set", "datasets.0.bad_images=skip")
    assert f"{len(reasons)} pictures are left out, as bad_images: skip asks" in skipped.err
    (warning,) = events(home / "output" / NAME, "warning")
    assert warning["details"] == sorted(warning["details"])
    assert len(warning["details"]) == len(reasons)
    assert "ss_num_train_items: 3" in well("inspect", home / "output" / NAME / f"{NAME}.safetensors").out.replace(
        '"', ""
    )


def bomb() -> bytes:
    """A PNG of 300 bytes that claims ten billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_odd_pictures_are_used_and_told(home, write_job, pictures):
    add(pictures, "misnamed.jpg", lambda path: noise().save(path, format="PNG"))
    add(pictures, "print.jpg", lambda path: noise("CMYK").save(path))
    deep = (np.random.default_rng(0).random((64, 64)) * 65535).astype(np.uint16)
    add(pictures, "deep.png", lambda path: Image.fromarray(deep).save(path))
    ran = well("run", write_job(home, dataset={"folder_path": str(pictures)}))
    for message, name in (
        ("pictures named for another format than they have (used as what they are): 1", "misnamed.jpg (PNG)"),
        ("pictures in CMYK, for print (converted to RGB", "print.jpg"),
        ("pictures with 16 bits a channel (scaled to 8): 1", "deep.png"),
    ):
        assert message in ran.err
        assert f"\n  {name}\n" in ran.err
    assert len(events(home / "output" / NAME, "warning")) == 3


def test_a_picture_is_turned_as_its_camera_says(home, write_job, tmp_path, world):
    """Lying pixels with "turn right" in the EXIF data train exactly as the same pixels turned right."""
    red_over_blue = np.zeros((96, 64, 3), np.uint8)
    red_over_blue[:48, :, 0] = red_over_blue[48:, :, 2] = 255
    upright = Image.fromarray(red_over_blue)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its left side: turn right to see it
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    for name, picture, more in (("plain", upright, {}), ("turned", lying, {"exif": exif})):
        folder = tmp_path / name
        folder.mkdir()
        add(folder, "a.png", lambda path, picture=picture, more=more: picture.save(path, **more))
        well("run", write_job(home / name, dataset={"folder_path": str(folder)}))
    loras = [(home / name / "output" / NAME / f"{NAME}.safetensors") for name in ("plain", "turned")]
    one, two = map(load_file, loras)
    assert all(one[key].equal(two[key]) for key in one)


def test_two_pictures_with_one_stem(home, write_job, pictures):
    noise().save(pictures / "0001.jpg")
    job = write_job(home, dataset={"folder_path": str(pictures)})
    refused(
        job,
        3,
        f"{pictures / '0001.jpg'} shares its caption or mask with 0001.png; rename or remove one of them",
        f"{pictures / '0001.png'} shares its caption or mask with 0001.jpg",
    )


def test_the_same_name_in_two_subfolders_is_fine(home, write_job, pictures):
    for part in ("a", "b"):
        (pictures / part).mkdir()
        add(pictures / part, "same.png", lambda path: noise().save(path))
        (pictures / part / "same.txt").write_text(f"the one in {part}")
    ran = well("check", write_job(home, dataset={"folder_path": str(pictures)}))
    assert "5 pictures with 5 captions" in ran.out


def test_a_caption_that_is_not_text(home, write_job, pictures):
    (pictures / "0002.txt").write_bytes(b"caf\xe9 \xff\xfe")
    job = write_job(home, dataset={"folder_path": str(pictures)})
    refused(job, 3, f"{pictures / '0002.png'} has no usable caption: ", "UTF-8")


# --- the job file --------------------------------------------------------------------------------------------------


DRAWN = {"disable_sampling": False}
WRONG = [
    # section, its options, the option whose line is named, what is said
    ("network", {"rank": 4}, "rank", "network.rank: unknown option; here it is network.linear"),
    ("train", {"stepz": 4}, "stepz", "train.stepz: unknown option; did you mean 'steps'?"),
    ("network", {"linear": "four"}, "linear", "network.linear: expected a whole number, found the text 'four'"),
    ("network", {"linear": -4}, "linear", "network.linear: must be at least 1, found the number -4"),
    ("train", {"lr": "fast"}, "lr", "train.lr: expected a number, found the text 'fast'"),
    ("model", {"layer_offloading": True}, "layer_offloading", "model.layer_offloading is not built yet; use model.qua"),
    ("model", {"arch": "zimag"}, "arch", "model.arch: 'zimag' is not one of sd1, sd2,"),
    ("model", {"arch": "flux"}, "name_or_path", "there is no text_encoder_2/ in"),
    ("model", {"arch": "zimage:fast"}, "model", "model.variant: 'fast' is not a variant of zimage; allowed: turbo,"),
    ("train", {"noise_scheduler": "ddpm"}, "noise_scheduler", "train.noise_scheduler: 'ddpm' does not fit zimage"),
    ("train", {"min_snr_gamma": 5}, "min_snr_gamma", "train.min_snr_gamma: zimage is a flow model, which has no min-"),
    ("sample", DRAWN | {"width": 100}, "sample", "100 x 64 pixels cannot be drawn: zimage needs sides divisible by 16"),
    ("sample", DRAWN | {"seed": 10**30}, "sample", "is not a whole number from 0 to 2^63 - 1"),
    ("network", {"include": ["no_such"]}, "include", "network.include: 'no_such' matches none of the"),
]


@pytest.mark.parametrize(("section", "options", "named", "message"), WRONG, ids=[row[3][:30] for row in WRONG])
def test_a_wrong_option_is_named_with_its_line(home, write_job, section, options, named, message):
    job = write_job(home, **{section: options})
    refused(job, 2, f"{job}:{line_of(job, named)}: ", message)


def test_a_device_that_is_not_there(home, write_job):
    job = write_job(home)
    job.write_text(job.read_text().replace('device: "cpu"', 'device: "cuda"'))
    refused(job, 2, f"{job}:{line_of(job, 'device')}: device: 'cuda' is not there; this machine has cpu")
    job.write_text(job.read_text().replace('device: "cuda"', 'device: "gpu"'))
    refused(
        job,
        2,
        f"{job}:{line_of(job, 'device')}: device: the text 'gpu' does not fit; allowed: auto, cpu, mps, cuda[:N]",
    )


def test_an_override_is_named_instead_of_a_line(home, write_job):
    job = write_job(home)
    for value, code, message in (
        ("network.linear=-4", 2, "--set network.linear=-4: network.linear: must be at least 1"),
        ("device=cuda", 2, "--set device=cuda: device: 'cuda' is not there"),
        (
            "datasets.0.folder_path=./nope",
            2,
            "--set datasets.0.folder_path=./nope: datasets[0]: folder_path: nope does not exist",
        ),
        ("nonsense", 2, "--set nonsense: write it as path=value, for example train.lr=1e-4"),
    ):
        refused(job, code, message, arguments=("--set", value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty; a job file begins with 'config:'"),
        ("config:\n\t- x\n", ":2: not YAML: "),
        ("config: [1, 2\n", "not YAML: "),
        ("- a\n- b\n", ":1: a job file is a mapping that begins with 'config:', found a list"),
        ("config: !!python/object:os.system {}\n", "the tag !!python/object:os.system is not allowed"),
        ("config:\n  output_name: x\n  output_name: y\n", "given twice (lines 2 and 3); keep one"),
    ],
)
def test_a_file_that_is_no_job(home, text, message):
    (home / "job.yaml").write_text(text)
    refused(home / "job.yaml", 2, f"{home / 'job.yaml'}", message)


# --- training adapter and model ------------------------------------------------------------------------------------


def test_a_training_adapter_that_is_not_there(home, write_job, tmp_path):
    job = write_job(home, model={"assistant_lora_path": str(tmp_path / "gone.safetensors")})
    place = f"{job}:{line_of(job, 'assistant_lora_path')}: model.assistant_lora_path"
    refused(
        job, 2, f"{place} {tmp_path / 'gone.safetensors'}: no such file. Give a local .safetensors file or user/repo/"
    )
    assert f"{place}: there is no {tmp_path / 'gone.safetensors'}" in detour("check", job).err


def renamed(adapter: dict) -> dict:
    return {name.replace("layers.", "double_blocks."): tensor for name, tensor in adapter.items()}


def without(part: str) -> Callable[[dict], dict]:
    return lambda adapter: {name: tensor for name, tensor in adapter.items() if part not in name}


def narrower(adapter: dict) -> dict:
    return {n: t[:, :40].contiguous() if "lora_A" in n else t for n, t in adapter.items()}


SPOILT = {
    "another model's": (renamed, "it was made for another model: 0 of its 24 layers are in this one"),
    "a layer is missing": (
        without("layers.1.attention.to_q"),
        "of the 3 layers layers.*.attention.to_q, 1 are missing",
    ),
    "half a pair": (without("layers.2.feed_forward.w1.lora_B"), "layers.2.feed_forward.w1"),
    "wrong shapes": (narrower, "needs A rank x 96 and B 96 x rank, but A is 4x40"),
    "not a LoRA": (lambda adapter: {"model.weight": next(iter(adapter.values()))}, "it is not a LoRA"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_a_training_adapter_that_does_not_fit(home, write_job, world, tmp_path, spoil, message):
    adapter = tmp_path / "adapter.safetensors"
    save_file(spoil(load_file(world.adapter)), adapter)
    job = write_job(home, model={"assistant_lora_path": str(adapter)})
    place = f"{job}:{line_of(job, 'assistant_lora_path')}: model.assistant_lora_path: training adapter {adapter}: "
    refused(job, 2, place, message)


def test_a_lora_to_start_from_that_is_none(home, write_job, world):
    vae = world.model / "vae" / "diffusion_pytorch_model.safetensors"
    job = write_job(home, network={"pretrained_lora_path": str(vae)})
    line = line_of(job, "pretrained_lora_path")
    refused(job, 2, f"{job}:{line}: network.pretrained_lora_path: {vae}: not a LoRA; it holds the weights of a model")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["cut", "header", "pickle", "gone"])
def test_a_model_that_is_damaged_is_refused_before_anything_is_cached(
    home, write_job, world, tmp_path, component, damage
):
    model = tmp_path / "model"
    shutil.copytree(world.model, model, ignore=shutil.ignore_patterns("dataset"))
    (file,) = (model / component).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "cut":
        file.write_bytes(data[:-100])
    elif damage == "header":
        data[4] = 0xFF
        file.write_bytes(data)
    elif damage == "pickle":
        file.with_name("pytorch_model.bin").write_bytes(b"\x80\x04N.")
    job = write_job(home, model={"name_or_path": str(model)}, train={"cache_folder": str(tmp_path / "cache")})
    place = f"{job}:{line_of(job, 'name_or_path')}: model.name_or_path: {model / component}"
    said = {
        "cut": "not a whole .safetensors file",
        "header": "delete it and fetch it again",
        "pickle": "only pickled weights (pytorch_model.bin), which run code when opened; take the .safetensors one",
        "gone": "no .safetensors file; is the download complete?",
    }
    refused(job, 2, place, said[damage])
    assert not (tmp_path / "cache").exists()


def test_weights_of_another_model(home, write_job, world, tmp_path):
    """Right headers, wrong layers: found when they are read."""
    model = tmp_path / "model"
    shutil.copytree(world.model, model, ignore=shutil.ignore_patterns("dataset"))
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("layers.1.attention.to_q.weight")
    save_file(tensors, file)
    ran = detour("run", write_job(home, model={"name_or_path": str(model)}))
    assert ran.code == 2
    assert "1 missing: layers.1.attention.to_q.weight" in ran.err


class Sentinel:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("option", ["model.name_or_path", "model.assistant_lora_path", "network.pretrained_lora_path"])
@pytest.mark.parametrize("ending", ["ckpt", "pt", "bin"])
def test_a_pickle_is_refused_and_never_opened(home, write_job, tmp_path, option, ending):
    import pickle

    (tmp_path / f"model.{ending}").write_bytes(pickle.dumps(Sentinel(tmp_path / "opened")))
    section, name = option.split(".")
    job = write_job(home, **{section: {name: str(tmp_path / f"model.{ending}")}})
    refused(
        job,
        2,
        f"{job}:{line_of(job, name)}: {option}",
        f".{ending} files are pickles, and opening one runs whatever code is in it",
    )
    checked = detour("check", job)
    assert checked.code == 2
    assert f"{option}: {tmp_path / 'model'}.{ending} is a pickle, which runs code when opened" in checked.err
    assert not (tmp_path / "opened").exists()


def test_a_model_on_the_hub_without_a_network(home, write_job):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    job = write_job(home, model={"name_or_path": "somebody/some-model"})
    message = (
        "not (completely) in the cache, and HF_HUB_OFFLINE is set; unset it once to download, or give a local path"
    )
    refused(job, 2, f"{job}:{line_of(job, 'name_or_path')}: model.name_or_path: model somebody/some-model: {message}")
    job = write_job(home, model={"assistant_lora_path": "somebody/adapters/v1.safetensors"})
    refused(job, 2, f"model.assistant_lora_path somebody/adapters/v1.safetensors: {message}")


def test_a_model_that_is_nowhere(home, write_job):
    job = write_job(home, model={"name_or_path": "./models/z-image"})
    refused(
        job,
        2,
        f"{job}:{line_of(job, 'name_or_path')}: model.name_or_path: model ./models/z-image: no such folder or file.",
    )


# --- the disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own; skipped where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount")
    if subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_for_the_checkpoints(home, write_job, tmp_path):
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=300k", "tmpfs") as disk:
        ran = detour("run", write_job(home), "--set", f"output_folder={disk}")
        assert ran.code == 3
        assert "GiB are free where" in ran.err
        assert "lower save.max_step_saves_to_keep, or choose another output_folder" in ran.err
        assert not list(disk.rglob("step-*"))


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(home, write_job, tmp_path):
    """It fits at first; then somebody else takes the space."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        job = write_job(home, train={"steps": 1}, save={"save_every": 1, "max_step_saves_to_keep": 1})
        arguments = ("--set", f"output_folder={disk}")
        well("run", job, *arguments)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        (disk / "others").write_bytes(bytes(free - 60_000))
        full = detour("run", job, *arguments, "--set", "train.steps=2")
        assert full.code in (2, 3)
        assert "no space" in full.err or "are free where" in full.err
        assert "Traceback" not in full.err
        (disk / "others").unlink()
        more = well("run", job, *arguments, "--set", "train.steps=2")
        assert "goes on at step 1" in more.err


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is Unix's")
def test_a_quota_on_the_size_of_files(home, write_job):
    """Needs no privilege: the kernel itself refuses to let a file grow."""
    job, soft = write_job(home), resource.getrlimit(resource.RLIMIT_FSIZE)
    detour("run", job, "--dry-run")  # fills the caches
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, soft[1]))
    try:
        ran = detour("run", job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert ran.code == 2
    assert "weights.safetensors cannot be written: no space (File too large" in ran.err
    assert "Free some, raise the quota, or choose another folder; what was there is untouched" in ran.err
    assert [name for name in tree(home) if "step-" in name] == []
    assert well("run", job).out.startswith("finished at step 2")


def test_no_room_for_the_caches(home, write_job, monkeypatch, tmp_path):
    monkeypatch.setattr("detour.files.free_bytes", lambda path: 1000)
    ran = detour("run", write_job(home), "--set", f"train.cache_folder={tmp_path / 'cache'}")
    assert ran.code == 3
    assert f"{tmp_path / 'cache'} has no room for the " in ran.err
    assert "choose another place with train.cache_folder or $DETOUR_CACHE" in ran.err


def test_an_output_folder_below_a_file(home, write_job):
    (home / "file").touch()
    job = write_job(home)
    refused(
        job,
        2,
        f"{home / 'file'} is a file where a folder is needed",
        arguments=("--set", f"output_folder={home / 'file' / 'sub'}"),
    )


def test_an_output_folder_that_is_read_only(home, write_job, tmp_path):
    with mounted(tmp_path / "frozen", "-t", "tmpfs", "-o", "ro", "tmpfs") as disk:
        ran = detour("run", write_job(home), "--set", f"output_folder={disk / 'output'}")
    assert ran.code == 2
    assert f"{disk / 'output'} cannot be written: Read-only file system. Mount that file system writable" in ran.err


@pytest.mark.skipif(sys.platform != "linux", reason="/sys takes no folder from anybody, root included")
def test_an_output_folder_where_nobody_may_write(home, write_job):
    ran = detour("run", write_job(home), "--set", "output_folder=/sys/detour")
    assert ran.code == 2
    assert "/sys/detour cannot be written: " in ran.err
    assert "choose another folder" in ran.err


def test_a_name_that_cannot_be_a_folder(home, write_job):
    job = write_job(home)
    refused(job, 2, "'...' cannot be a file name: nothing is left of it", arguments=("--set", "output_name='...'"))
