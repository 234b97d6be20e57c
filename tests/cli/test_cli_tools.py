"""`detour sample`, `convert`, `inspect`, `archs`, `nano`, `schema`, `demo`, `check`; `--debug` and the exit codes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from command import detour, program, tree, well
from detour.config.job import ModelArch

# --- a few trained files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """LoRA files of short runs, and a checkpoint."""

    lora: Path
    other: Path
    lokr: Path
    checkpoint: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_job) -> Trained:
    home = tmp_path_factory.mktemp("trained")
    kinds = {"one": {}, "two": {"linear": 2}, "kron": {"type": "lokr", "linear": 4}}
    for name, network in kinds.items():
        # So high a rate shows in the picture after two steps.
        well("run", write_job(home / name, name, network=network, train={"lr": 3e-2, "seed": len(name)}))
    file = {name: home / name / "output" / name / f"{name}.safetensors" for name in kinds}
    checkpoint = file["one"].parent / "checkpoints" / "step-000000002"
    return Trained(file["one"], file["two"], file["kron"], checkpoint)


@pytest.fixture
def sample(world, tmp_path):
    """Draws with the miniature and returns the pixels."""
    count = iter(range(99))

    def draw(*arguments: object, prompt: str = "a zig on a red background") -> np.ndarray:
        out = tmp_path / f"drawn{next(count)}"
        ran = well(
            "sample", "--model", world.model, "--arch", "zimage", "--prompt", prompt, "--steps", 2, "--width", 64,
            "--height", 64, "--dtype", "fp32", "--device", "cpu", "--out", out, *arguments,
        )  # fmt: skip
        assert ran.out == f"{out / '00-seed42.png'}\n" or "--seed" in arguments
        (file,) = out.iterdir()
        return np.asarray(Image.open(file)).astype(int)

    return draw


# --- sample --------------------------------------------------------------------------------------------------------


def test_a_lora_at_scale_zero_is_no_lora_and_scale_one_is_the_default(sample, trained):
    plain, full = sample(), sample("--lora", trained.lora)
    assert np.array_equal(sample("--lora", f"{trained.lora}:0"), plain)
    assert np.array_equal(sample("--lora", f"{trained.lora}:1.0"), full)
    assert np.abs(full - plain).mean() > 1
    half = sample("--lora", f"{trained.lora}:0.5")
    assert 0 < np.abs(half - plain).mean() < np.abs(full - plain).mean()


def test_two_loras_add_up(sample, trained):
    both = sample("--lora", trained.lora, "--lora", f"{trained.other}:0.5")
    assert np.array_equal(both, sample("--lora", f"{trained.other}:0.5", "--lora", trained.lora))
    one, two = sample("--lora", trained.lora), sample("--lora", f"{trained.other}:0.5")
    for alone in (one, two, sample()):
        assert np.abs(both - alone).max() > 3
    # The same LoRA twice at half strength is that LoRA.
    halves = sample("--lora", f"{trained.lora}:0.5", "--lora", f"{trained.lora}:0.5")
    assert np.abs(halves - one).max() <= 1


def test_a_lokr_draws_too(sample, trained):
    plain, full = sample(), sample("--lora", trained.lokr)
    assert np.abs(full - plain).mean() > 0.5
    assert np.array_equal(sample("--lora", f"{trained.lokr}:0"), plain)


def test_seed_prompt_and_size_decide_the_picture(sample, world, tmp_path):
    assert np.array_equal(sample(), sample())
    assert not np.array_equal(sample(), sample("--seed", 43))
    assert not np.array_equal(sample(), sample(prompt="a blue circle"))
    ran = well(
        "sample", "--model", world.model, "--arch", "zimage:base", "--prompt", "a", "--prompt", "b", "--width", 96,
        "--height", 64, "--steps", 1, "--guidance", 2, "--negative", "blur", "--seed", 5, "--json",
        "--out", tmp_path / "x" / "y",
    )  # fmt: skip
    assert ran.json == [str(tmp_path / "x" / "y" / f"{index:02d}-seed5.png") for index in (0, 1)]
    with Image.open(ran.json[1]) as picture:
        assert picture.size == (96, 64)
        text = picture.text
    assert (text["detour:prompt"], text["detour:negative"], text["detour:guidance"]) == ("b", "blur", "2.0")


def test_the_picture_names_the_loras_by_their_hashes(sample, trained, tmp_path):
    sample("--lora", trained.lora)
    (file,) = tmp_path.rglob("*.png")
    found = well("inspect", trained.lora, "--json").json
    with Image.open(file) as picture:
        assert picture.text["detour:lora_0_sha256"] == found["sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "0"], "argument --guidance: '0' is not a number of at least 1 (1 means none)"),
        (["--guidance", "nan"], "argument --guidance: 'nan'"),
        (["--steps", "0"], "argument --steps: '0' is not a whole number of at least 1"),
        (["--width", "-64"], "argument --width: '-64' is not a whole number of at least 1"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
        (["--seed", "99999999999999999999"], "is not a whole number from 0 to 2^63 - 1"),
        (["--width", "70"], "70 x 64 pixels cannot be drawn: zimage needs sides divisible by 16; try 64 x 64"),
        (["--lora", "nope.safetensors"], "--lora nope.safetensors: no such file"),
        (["--lora", "nope.ckpt:0.5"], "opening one runs whatever code is in it"),
        (["--lora", "LORA:nan"], "the scale nan is not a finite number"),
        (["--arch", "zimage:fast"], "'fast' is not a variant of zimage; allowed: turbo, base, deturbo"),
        (["--arch", "flux"], "there is no text_encoder_2/ in"),
        (["--arch", "zimag"], "architecture 'zimag' is not known; did you mean 'zimage'?"),
        (["--device", "cuda:7"], "'cuda:7' is not there; this machine has cpu"),
        (["--device", "tpu"], "'tpu' is not there; this machine has cpu"),
        (["--out", "FILE/pictures"], "is a file where a folder is needed"),
    ],
)
def test_what_cannot_be_drawn_is_said_and_nothing_is_left(world, trained, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    arguments = [argument.replace("LORA", str(trained.lora)) for argument in arguments]
    base = ["--model", world.model, "--arch", "zimage", "--prompt", "a", "--width", 64, "--height", 64, "--steps", 1]
    ran = detour("sample", *base, *arguments)
    assert ran.code == 2
    assert message in ran.err
    assert (ran.out, list(tmp_path.iterdir())) == ("", [tmp_path / "FILE"])


# --- convert -------------------------------------------------------------------------------------------------------

PREFIX = {"comfy": "diffusion_model.", "diffusers": "transformer.", "kohya": "lora_unet_"}


@pytest.mark.parametrize("there", PREFIX)
@pytest.mark.parametrize("here", PREFIX)
def test_convert_goes_every_way_and_back_without_loss(trained, tmp_path, here, there):
    first, second, back = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "back"))
    well("convert", trained.lora, first, "--arch", "zimage", "--to", here)
    ran = well("convert", first, second, "--arch", "zimage", "--to", there)
    assert ran.out == f"{second} (24 layers, proven by loading with diffusers.loaders.ZImageLoraLoaderMixin)\n"
    assert all(name.startswith(PREFIX[there]) for name in load_file(second))
    assert well("inspect", second, "--json").json["format"] == there
    well("convert", second, back, "--arch", "zimage", "--to", "comfy")
    original, returned = load_file(trained.lora), load_file(back)
    assert original.keys() == returned.keys()
    assert all(original[name].equal(returned[name]) for name in original)


def test_every_format_draws_the_same_picture(sample, trained, tmp_path):
    expected = sample("--lora", trained.lora)
    for name in ("diffusers", "kohya"):
        file = tmp_path / f"{name}.safetensors"
        well("convert", trained.lora, file, "--arch", "zimage", "--to", name)
        assert np.array_equal(sample("--lora", file), expected)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("nope.safetensors", "out.safetensors", "nope.safetensors: no such file"),
        ("MODEL/vae/diffusion_pytorch_model.safetensors", "out.safetensors", "not a LoRA; it holds the weights"),
        ("LORA", "out.ckpt", "must end in .safetensors"),
        ("LORA", "FILE/out.safetensors", "is a file where a folder is needed"),
        ("copy.safetensors", "copy.safetensors", "IN and OUT are the same file"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_said_and_nothing_is_left(
    world, trained, tmp_path, monkeypatch, source, target, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    (tmp_path / "copy.safetensors").write_bytes(trained.lora.read_bytes())
    source = source.replace("MODEL", str(world.model)).replace("LORA", str(trained.lora))
    ran = detour("convert", source, target, "--arch", "zimage", "--to", "kohya")
    assert ran.code == 2
    assert message in ran.err
    assert tree(tmp_path) == ["FILE", "copy.safetensors"]
    assert (tmp_path / "copy.safetensors").read_bytes() == trained.lora.read_bytes()


# --- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_a_lora(trained):
    found = well("inspect", trained.lora, "--json").json
    expected = {"what": "lora", "arch": "zimage", "format": "comfy", "kind": "lora", "rank": 4, "alpha": 4.0, "step": 2}
    assert found | expected == found
    assert found["modules"] == 24
    assert found["targets"]["layers.*.attention.to_q"] == 3
    assert found["problem"] is None
    text = well("inspect", trained.lora).out
    for line in ("what: lora", "arch: zimage", "rank: 4", "step: 2", f"sha256: {found['sha256']}"):
        assert line in text.splitlines()


def test_inspect_other_adapters(trained, world):
    assert well("inspect", trained.lokr, "--json").json["kind"] == "lokr"
    found = well("inspect", world.adapter, "--json").json
    assert (found["what"], found["arch"], found["rank"]) == ("training adapter", "zimage", 4)


def test_inspect_a_checkpoint_whole_and_damaged(trained, tmp_path):
    import shutil

    found = well("inspect", trained.checkpoint, "--json").json
    assert (found["what"], found["valid"], found["step"]) == ("checkpoint", True, 2)
    copy = tmp_path / trained.checkpoint.name
    shutil.copytree(trained.checkpoint, copy)
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    damaged = well("inspect", copy, "--json").json
    assert not damaged["valid"]
    assert "weights.safetensors is damaged" in damaged["problem"]


def test_inspect_models(world):
    found = well("inspect", world.model, "--json").json
    assert (found["what"], found["class"]) == ("model", "ZImagePipeline")
    assert {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} <= set(found["components"])
    assert well("inspect", world.model / "vae", "--json").json["class"] == "AutoencoderKL"
    single = world.model / "transformer" / "diffusion_pytorch_model.safetensors"
    assert well("inspect", single, "--json").json["looks_like"].startswith("Z-Image")


def test_inspect_says_what_it_cannot_read(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04N.")
    for name, message in (
        ("cut.safetensors", "not a whole .safetensors file"),
        ("x.ckpt", "opening one runs whatever code is in it"),
        ("nope", "no such file or folder"),
        (".", "a folder that is neither a checkpoint nor a model"),
    ):
        ran = detour("inspect", tmp_path / name)
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err


# --- archs, nano, schema, demo -------------------------------------------------------------------------------------


def test_archs_lists_all_fifteen():
    rows = well("archs", "--json").json
    assert [row["name"] for row in rows] == list(get_args(ModelArch))
    assert len(rows) == 15
    for row in rows:
        assert isinstance(row["built"], bool)
        if row["built"]:
            assert {"objective", "distilled", "default_repo", "default_variant", "variants", "licence"} <= row.keys()
    (zimage,) = [row for row in rows if row["name"] == "zimage"]
    assert (zimage["objective"], zimage["distilled"], zimage["default_repo"]) == (
        "flow",
        True,
        "Tongyi-MAI/Z-Image-Turbo",
    )
    assert zimage["variants"]["turbo"]["steps"] == 8
    text = well("archs").out.splitlines()
    assert len(text) == 15
    assert [line.split()[0] for line in text] == list(get_args(ModelArch))


def test_nano_lists_and_writes_the_same_files_for_a_seed(tmp_path):
    assert "zimage" in well("nano", "--list").out.split()
    for name in ("one", "two"):
        well("nano", tmp_path / name, "--random", "--seed", 3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert "training_adapter.safetensors" not in tree(tmp_path / "one")
    same = [
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        for name in tree(tmp_path / "one")
    ]
    assert all(same)


def test_nano_comes_with_its_adapter_and_pictures(tmp_path):
    well("nano", tmp_path / "model")
    assert (tmp_path / "model" / "training_adapter.safetensors").is_file()
    pictures = sorted((tmp_path / "model" / "dataset").glob("*.png"))
    assert len(pictures) == 30
    assert all(picture.with_suffix(".txt").is_file() for picture in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder to write the miniature into"),
        (["--arch", "flux2", "x"], "there is no miniature of 'flux2'; there is one of"),
        (["FILE"], "is a file; give a folder to write the miniature into"),
    ],
)
def test_nano_says_what_is_wrong(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    ran = detour("nano", *arguments)
    assert ran.code == 2
    assert message in ran.err


def test_schema_is_a_json_schema_that_knows_the_job_file():
    schema = well("schema").json
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["properties"].keys() == {"config", "meta"}
    assert schema["$defs"]["TrainConfig"]["properties"]["lr"]["description"].startswith("Learning rate")
    assert schema["$defs"]["TrainConfig"]["additionalProperties"] is False


@pytest.mark.slow
def test_demo_says_where_everything_is(tmp_path):
    out = tmp_path / "it's: a demo"
    ran = well("demo", "--out", out, "--steps", 2)
    for line in ("comparison.png", "output/mip/mip.safetensors", "output/mip/report.html", "mip_plain.yaml"):
        assert str(out / line) in ran.out
        assert (out / line).exists()
    drifts = [float(line.split()[-1]) for line in ran.out.splitlines() if line.startswith("  trained ")]
    assert len(drifts) == 2
    assert all(0 < drift < 0.5 for drift in drifts), "two steps move little, but something"
    with Image.open(out / "comparison.png") as sheet:
        assert sheet.width > 3 * 128
    # The job file that it wrote goes on like any other.
    more = well("run", out / "mip.yaml", "--set", "train.steps=3")
    assert "goes on at step 2" in more.err


def test_demo_into_a_file_is_an_error(tmp_path):
    (tmp_path / "FILE").touch()
    ran = detour("demo", "--out", tmp_path / "FILE")
    assert ran.code == 2
    assert "is a file where a folder is needed" in ran.err


# --- check ---------------------------------------------------------------------------------------------------------


def test_check_says_what_will_be_trained(write_job, tmp_path):
    ran = well("check", write_job(tmp_path))
    assert ran.out == "ok: Z-Image turbo (distilled, 2 steps, guidance 1), 5 pictures with 5 captions, 2 steps\n"
    assert tree(tmp_path) == ["job.yaml"]


def test_check_as_json(write_job, tmp_path):
    found = well("check", write_job(tmp_path, model={"assistant_lora_path": None}), "--json").json
    assert found["ok"]
    assert (found["exit_code"], found["errors"], found["notes"]) == (0, [], [])
    assert "trained without a training adapter" in found["warnings"][0]
    assert found["processes"] == [{"arch": "zimage", "variant": "turbo", "pictures": 5, "captions": 5, "skipped": 0}]


def test_check_finds_everything_at_once_with_lines(write_job, tmp_path):
    job = write_job(
        tmp_path,
        model={"name_or_path": "./nope", "assistant_lora_path": "./gone.safetensors"},
        sample={"disable_sampling": False, "width": 70},
        dataset={"folder_path": str(tmp_path / "nowhere")},
    )
    lines = {line.split(":")[0].strip(" -"): n for n, line in enumerate(job.read_text().splitlines(), 1)}
    ran = detour("check", job)
    assert ran.code == 2
    for place, message in (
        ("name_or_path", "model.name_or_path: there is no ./nope"),
        ("assistant_lora_path", "model.assistant_lora_path: there is no ./gone.safetensors"),
        ("sample", "sample: 70 x 64 pixels cannot be drawn"),
        ("folder_path", f"datasets[0]: folder_path: {tmp_path / 'nowhere'} does not exist"),
    ):
        assert f"{job}:{lines[place]}: {message}" in ran.err
    found = detour("check", job, "--json")
    assert found.code == 2
    assert (found.json["ok"], len(found.json["errors"])) == (False, 4)


def test_check_looks_at_the_validation_set_too(write_job, tmp_path, world):
    (tmp_path / "held").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "held" / "a.png")
    dataset = {"folder_path": str(tmp_path / "held"), "resolution": 64}
    ran = detour("check", write_job(tmp_path, validation={"validate_every": 1, "dataset": dataset}))
    assert ran.code == 3
    assert "validation.dataset" in ran.err
    assert "has no caption" in ran.err


def test_a_broken_job_file_is_json_too_when_json_is_asked_for(write_job, tmp_path):
    job = write_job(tmp_path, train={"lrr": 1, "steps": "many"})
    found = detour("check", job, "--json")
    assert found.code == 2
    assert not found.json["ok"]
    assert len(found.json["errors"]) == 2
    assert all(error.startswith(f"{job}:") for error in found.json["errors"])


# --- exit codes ----------------------------------------------------------------------------------------------------


def test_no_command_prints_the_help():
    ran = well()
    for command in ("run", "check", "sample", "convert", "inspect", "archs", "nano", "demo", "schema"):
        assert f"    {command} " in ran.out


def test_a_wrong_command_or_option_is_2():
    assert detour("rnu").code == 2
    assert detour("run").code == 2
    assert detour("archs", "--jason").code == 2
    assert detour("run", "--help").code == 0
    assert well("--version").out.startswith("detour ")


def test_debug_shows_where_an_error_came_from_and_nothing_else_does(tmp_path):
    short, long = detour("check", tmp_path / "nope.yaml"), detour("check", tmp_path / "nope.yaml", "--debug")
    assert (short.code, long.code) == (2, 2)
    assert short.err == f"error: {tmp_path / 'nope.yaml'}: there is no such file\n"
    assert "Traceback" in long.err
    assert long.err.endswith(short.err)


def test_an_unexpected_failure_is_1_and_says_how_to_see_more(monkeypatch):
    def fail() -> None:
        raise RuntimeError("the roof is on fire")

    monkeypatch.setattr("detour.archs.table", fail)
    ran = detour("archs")
    assert ran.code == 1
    assert ran.err == "unexpected failure: RuntimeError: the roof is on fire\n(--debug shows where)\n"
    assert "in fail" in detour("archs", "--debug").err


def test_json_is_indented_and_keeps_letters(write_job, tmp_path):
    job = write_job(tmp_path, train={"lrö": 1})
    out = detour("check", job, "--json").out
    assert "lrö" in out
    assert json.dumps(json.loads(out), indent=2, ensure_ascii=False) + "\n" == out


def test_as_a_program_an_error_is_its_exit_code_and_one_line(tmp_path):
    ran = program("check", tmp_path / "nope.yaml")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"error: {tmp_path / 'nope.yaml'}: there is no such file\n"
