"""Every ready job file and both cases run on the miniature: only paths, device, sizes and step counts change."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from command import events, well
from detour.config.load import load_job

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
CASES = sorted((ROOT / "tests" / "cases").glob("*.yaml"))
SIZE = 64  # pixels
# Always run; the others take their time with quantising.
QUICK = {"train_lora_zimage_turbo_24gb.yaml", "zimage_turbo_24gb.yaml", "aitoolkit_style.yaml"}


def test_all_are_found():
    assert len(EXAMPLES) >= 5
    assert [path.name for path in CASES] == ["aitoolkit_style.yaml", "zimage_turbo_24gb.yaml"]
    assert {path.name for path in [*EXAMPLES, *CASES]} >= QUICK


def parameters() -> list:
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(path, id=path.name, marks=marks[path.name in QUICK]) for path in [*EXAMPLES, *CASES]]


@pytest.mark.parametrize("path", parameters())
def test_it_runs(path, world, tmp_path):
    job = load_job(path).job
    assert len(job.config.process) == 1
    ran = well("run", path, *(part for option in overrides(path, world, tmp_path) for part in ("--set", option)))
    folder = tmp_path / "output" / job.config.output_name
    assert ran.out.startswith("finished at step 2: ")
    assert [event["step"] for event in events(folder, "step")][-1] == 2
    prompts = len(job.config.process[0].sample.prompts) or 4  # without any, the first captions are drawn
    assert len(list((folder / "samples").glob("000000002-*.png"))) == prompts
    with Image.open(folder / "samples" / "000000002-00.png") as picture:
        assert picture.size == (SIZE, SIZE)
    process = job.config.process[0]
    if process.network.type == "full":
        assert (folder / job.config.output_name).is_dir()
    else:
        found = well("inspect", folder / f"{job.config.output_name}.safetensors", "--json").json
        assert (found["kind"], found["step"]) == (process.network.type, 2)
        if process.network.type == "lora":
            assert (found["rank"], found["alpha"]) == (
                process.network.linear,
                process.network.linear_alpha or found["rank"],
            )
    used = load_job(folder / "job.yaml").job.config.process[0]
    assert (used.model.assistant_lora_path is None) == (process.model.assistant_lora_path is None)


def overrides(path: Path, world, home: Path) -> list[str]:
    """What a miniature needs to stand in for the model, in the names of the file's own layout."""
    job = load_job(path).job
    process = job.config.process[0]
    theirs = "training_folder" in path.read_text()  # ai-toolkit's layout
    options = {
        "training_folder" if theirs else "output_folder": home / "output",
        "device": "cpu",
        "model.name_or_path": world.model,
        "train.steps": 2,
        "sample.width": SIZE,
        "sample.height": SIZE,
    }
    if not theirs:
        options["train.cache_folder"] = home / "cache"
    if process.train.epochs is not None:
        options["train.epochs"] = "null"
    if process.model.assistant_lora_path is not None:
        options["model.assistant_lora_path"] = world.adapter
    if process.model.extras_name_or_path is not None:
        options["model.extras_name_or_path"] = world.model
    if process.train.dataset_folder is not None:
        options["train.dataset_folder"] = world.pictures
    for index, dataset in enumerate(process.datasets):
        options[f"datasets.{index}.folder_path"] = world.pictures
        options[f"datasets.{index}.resolution"] = SIZE
        if dataset.mask_path is not None:
            options[f"datasets.{index}.mask_path"] = masks(world.pictures, home / "masks")
    for index, prompt in enumerate(process.sample.prompts):
        if prompt.width is not None:
            options[f"sample.prompts.{index}.width"] = SIZE
            options[f"sample.prompts.{index}.height"] = SIZE
    return [f"{option}={value}" for option, value in options.items()]


def masks(pictures: Path, folder: Path) -> Path:
    """A white mask for each picture."""
    folder.mkdir()
    for picture in pictures.glob("*.png"):
        Image.new("L", (SIZE, SIZE), 255).save(folder / picture.name)
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_what_the_comments_promise_is_there(path):
    """The files and commands that an example's comments name."""
    text = path.read_text(encoding="utf-8")
    schema = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).is_file()
    for word in text.split():
        if word.startswith("docs/"):
            assert (ROOT / word.rstrip(".,:;)")).is_file(), word


def test_an_example_is_checked_from_where_it_is_read(world, tmp_path, monkeypatch):
    """As the comments say: pictures in ./dataset, then `detour check`. Relative paths start from where one stands."""
    shutil.copytree(world.pictures, tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    ran = well("check", ROOT / "examples" / "train_lora_zimage_turbo_24gb.yaml")
    assert ran.out.splitlines()[-1] == (
        "ok: Z-Image turbo (distilled, 8 steps, guidance 1), 5 pictures with 5 captions, 10 epochs"
    )
