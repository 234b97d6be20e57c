"""Lets a miniature stand in for the model of a job file, so that any ready job file can be tried in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageChops

from detour import archs, nano
from detour.config.job import AdapterProcess
from detour.config.load import load_job
from detour.nano import drawn
from detour.nano.adapter import write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from detour.config.job import DatasetConfig, Process, TrainProcess

SIZE = 64
"""Pixels of pictures and previews."""
FRAMES = 5
"""Of clips."""


def changes(path: Path, home: Path, steps: int) -> list[str]:
    """`option=value` for `--set`, which turn a job file into one of a few steps on a miniature.

    Only paths, device, sizes and the number of steps change. Miniature and pictures are written below `home`, where
    they are not there yet, and so is what the job puts out.
    """
    process = load_job(path).job.config.process[0]
    model = _model(process, home)
    pictures = _pictures(home)
    theirs = "training_folder" in path.read_text(encoding="utf-8")  # ai-toolkit's layout
    options: dict[str, object] = {
        "training_folder" if theirs else "output_folder": home / "output",
        "device": "cpu",
        "model.name_or_path": model,
        "train.steps": steps,
        "sample.width": SIZE,
        "sample.height": SIZE,
        "sample.num_frames": min(process.sample.num_frames, FRAMES),
    }
    if not theirs:
        options["train.cache_folder"] = home / "cache"
    if process.train.epochs is not None:
        options["train.epochs"] = "null"
    if process.model.assistant_lora_path is not None:
        options["model.assistant_lora_path"] = _adapter(process, model)
    if process.model.extras_name_or_path is not None:
        options["model.extras_name_or_path"] = model
    options |= _OWN_PICTURES if isinstance(process, AdapterProcess) else _of_datasets(process, pictures, home)
    for index, prompt in enumerate(process.sample.prompts):
        if prompt.width is not None:
            options[f"sample.prompts.{index}.width"] = SIZE
            options[f"sample.prompts.{index}.height"] = SIZE
        if prompt.control is not None:
            options[f"sample.prompts.{index}.control"] = min(_controls(pictures, home / "controls").iterdir())
    return [f"{option}={value}" for option, value in options.items()]


_OWN_PICTURES: dict[str, object] = {
    "adapter.pictures": 4, "adapter.sizes": f"[{SIZE}]", "adapter.stop.held_out": 2, "adapter.stop.every": 1,
}  # fmt: skip
"""Where a model draws its pictures itself."""


def _of_datasets(process: TrainProcess, pictures: Path, home: Path) -> dict[str, object]:
    options = _beside(process, home)
    if process.train.dataset_folder is not None:
        options["train.dataset_folder"] = pictures
    for index, dataset in enumerate(process.datasets):
        options |= {f"datasets.{index}.{name}": value for name, value in _of_dataset(dataset, pictures, home).items()}
    return options


def _of_dataset(dataset: DatasetConfig, pictures: Path, home: Path) -> dict[str, object]:
    options: dict[str, object] = {"folder_path": pictures, "resolution": SIZE}
    if dataset.num_frames > 1:
        options |= {"folder_path": _clips(pictures, home / "clips"), "num_frames": FRAMES}
    if dataset.mask_path is not None:
        options["mask_path"] = _masks(pictures, home / "masks")
    if dataset.control_path is not None:
        options["control_path"] = _controls(pictures, home / "controls")
    if dataset.rich_caption_ext is not None:
        for caption in sorted(path for path in pictures.glob("*.txt") if "." not in path.stem):
            text = caption.read_text(encoding="utf-8").strip() + ", with every detail"
            caption.with_suffix(f".{dataset.rich_caption_ext}").write_text(text, encoding="utf-8")
    return options


def _model(process: Process, home: Path) -> Path:
    """The miniature of the variant that a process trains."""
    return _miniature(process, archs.variant_of(process)[0], home)


def _miniature(process: Process, variant: str, home: Path) -> Path:
    name = process.model.arch
    folder = home / f"{name}-{variant}"
    if not folder.exists():
        nano.write(folder, f"{name}:{variant}", random=True)
    return folder


def _beside(process: TrainProcess, home: Path) -> dict[str, object]:
    """What stands in for the models and LoRAs besides the one that is trained."""
    preserve = process.preserve
    options: dict[str, object] = {"preserve.drift.long_steps": 2} if preserve.drift.measure else {}
    if preserve.delta is not None:
        base = _miniature(process, "base", home)
        options |= {"preserve.delta.model": base, "preserve.delta.lora": _adapter(process, base)}
    if preserve.deploy_on is not None:
        options["preserve.deploy_on"] = _miniature(process, archs.drawn_variant(process)[0], home)
    if preserve.distill_patch is not None:
        options["preserve.distill_patch"] = _adapter(process, _model(process, home))
    if process.network.pretrained_lora_path is not None:
        path = home / "pretrained.safetensors"
        write_adapter(path, process.model.arch, _model(process, home), rank=process.network.linear)
        options["network.pretrained_lora_path"] = path
    return options


def _pictures(home: Path) -> Path:
    folder = home / "pictures"
    if not folder.exists():
        drawn.write_dataset(folder, n=5, size=SIZE)
    return folder


def _clips(pictures: Path, folder: Path) -> Path:
    """A folder of frames for each picture, which moves to the right."""
    for picture in sorted(pictures.glob("*.png")):
        clip = folder / picture.stem
        clip.mkdir(parents=True, exist_ok=True)
        with Image.open(picture) as opened:
            for number in range(2 * FRAMES):
                ImageChops.offset(opened.convert("RGB"), 4 * number, 0).save(clip / f"{number}.png")
        clip.with_suffix(".txt").write_text(picture.with_suffix(".txt").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def _adapter(process: Process, model: Path) -> Path:
    path = model / "training_adapter.safetensors"
    if not path.exists():
        write_adapter(path, process.model.arch, model)
    return path


def _masks(pictures: Path, folder: Path) -> Path:
    """A white mask for each picture."""
    folder.mkdir(exist_ok=True)
    for picture in pictures.glob("*.png"):
        Image.new("L", (SIZE, SIZE), 255).save(folder / picture.name)
    return folder


def _controls(pictures: Path, folder: Path) -> Path:
    """A grey copy of each picture, to follow."""
    folder.mkdir(exist_ok=True)
    for picture in pictures.glob("*.png"):
        with Image.open(picture) as opened:
            opened.convert("L").save(folder / picture.name)
    return folder
