"""Every ready job file and both cases run on a miniature: only paths, device, sizes and step counts change."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from command import events, well
from detour import archs
from detour.config.load import load_job
from detour.config.preserve import STRATEGIES
from detour.nano import standing_in

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
CASES = sorted((ROOT / "tests" / "cases").glob("*.yaml"))
# Always run; the others take their time with quantising.
QUICK = {"train_lora_zimage_turbo_24gb.yaml", "zimage_turbo_24gb.yaml", "aitoolkit_style.yaml"}


def test_all_are_found():
    assert len(EXAMPLES) >= 5
    assert [path.name for path in CASES] == ["aitoolkit_style.yaml", "zimage_turbo_24gb.yaml"]
    assert {path.name for path in [*EXAMPLES, *CASES]} >= QUICK


def parameters() -> list:
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(path, id=path.name, marks=marks[path.name in QUICK]) for path in [*EXAMPLES, *CASES]]


def test_every_architecture_has_an_example():
    found = {load_job(path).job.config.process[0].model.arch for path in EXAMPLES}
    assert found == set(archs.built())


def test_every_strategy_has_an_example():
    jobs = {path: load_job(path).job.config.process[0] for path in EXAMPLES}
    found = {process.preserve.strategy: path.stem for path, process in jobs.items() if process.type == "train"}
    assert set(STRATEGIES) == set(found) - {None}
    assert all(stem == f"train_lora_zimage_turbo_{name}" for name, stem in found.items() if name is not None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where the miniatures are that stand in for the models, each written when first asked for."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("path", parameters())
def test_it_runs(path, models):
    job = load_job(path).job
    assert len(job.config.process) == 1
    changes = standing_in.changes(path, models, steps=2)
    ran = well("run", path, *(part for option in changes for part in ("--set", option)), "--fresh")
    folder = models / "output" / job.config.output_name
    assert ran.out.startswith("finished at step 2: ")
    assert [event["step"] for event in events(folder, "step")][-1] == 2
    prompts = len(job.config.process[0].sample.prompts) or 4  # without any, the first captions are drawn
    assert len(list((folder / "samples").glob("000000002-*.png"))) == prompts
    with Image.open(folder / "samples" / "000000002-00.png") as picture:
        assert picture.size == (standing_in.SIZE, standing_in.SIZE)
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
