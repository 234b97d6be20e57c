"""Job files: every mistake in one go with its line, `--set`, and the way back to YAML."""

import subprocess
import sys
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from detour import UserError
from detour.config import document
from detour.config.job import ModelConfig, Section, TrainProcess
from detour.config.load import JobError, dump_job, load_job

CASES = Path(__file__).parent.parent / "cases"

GOOD = """\
config:
  output_name: cat
  process:
    - type: train
      model:
        arch: zimage
      train:
        steps: 100
      datasets:
        - folder_path: ./cats
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a job file in the current folder, so that messages begin with its bare name."""
    monkeypatch.chdir(tmp_path)

    def _write(text, name="job.yaml"):
        path = Path(name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def mistakes(path, *overrides):
    """The mistakes of a file as shown, without the header."""
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    return [str(mistake) for mistake in caught.value.mistakes]


def process(path, *overrides):
    return load_job(path, overrides).job.config.process[0]


def edited(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_small_job_loads(write):
    loaded = load_job(write(GOOD))
    assert loaded.job.config.output_name == "cat"
    assert loaded.job.config.process[0].train.steps == 100
    assert (loaded.notes, loaded.text, loaded.path) == ([], GOOD, Path("job.yaml"))


def test_relative_paths_stay_as_written(write):
    assert process(write(GOOD)).datasets[0].folder_path == Path("cats")
    assert process(write(edited("./cats", "~/cats"))).datasets[0].folder_path == Path("~/cats")


# Values.


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", '"1e-4"', ".0001"])
def test_a_learning_rate_is_a_number_however_it_is_written(write, text):
    assert process(write(edited("steps: 100", f"lr: {text}"))).train.lr == 1e-4


def test_words_that_old_yaml_takes_for_switches_are_text_where_text_is_wanted(write):
    text = edited("type: train", "type: train\n      trigger_word: no")
    assert process(write(text)).trigger_word == "no"
    assert (
        process(write(edited("type: train", "type: train\n      trigger_word: 2024-01-01"))).trigger_word
        == "2024-01-01"
    )


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("on", True), ("True", True), ("no", False), ("off", False)]
)
def test_those_words_are_switches_where_a_switch_is_wanted(write, text, value):
    assert process(write(edited("arch: zimage", f"arch: zimage\n        quantize: {text}"))).model.quantize is value


def test_octal_hexadecimal_and_underscores(write):
    assert [process(write(edited("100", text))).train.steps for text in ("0o17", "0x1F", "1_000", "010", "+5")] == [
        15, 31, 1000, 10, 5,
    ]  # fmt: skip


def test_short_forms(write):
    text = GOOD + "          resolution: 512\n      sample:\n        prompts: [a cat, {prompt: a dog, seed: 3}]\n"
    found = process(write(text))
    assert found.datasets[0].resolution == [512]
    assert [(prompt.prompt, prompt.seed) for prompt in found.sample.prompts] == [("a cat", None), ("a dog", 3)]


def test_a_variant_after_a_colon(write):
    found = process(write(edited("zimage", '"zimage:base"'))).model
    assert (found.arch, found.variant) == ("zimage", "base")


def test_byte_order_mark_and_windows_line_ends(write):
    assert process(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())).train.steps == 100


def test_json_is_yaml(write):
    text = '{"config": {"output_name": "cat", "process": [{"type": "train", "model": {"arch": "zimage"},\n'
    assert process(write(text + '"train": {"dataset_folder": "x"}}]}}')).model.arch == "zimage"


def test_anchors_and_merges(write):
    text = GOOD + "        - {folder_path: ./dogs, <<: &common {num_repeats: 2, flip_x: true}}\n"
    text += "        - <<: *common\n          folder_path: ./birds\n          num_repeats: 5\n"
    text += "        - {folder_path: ./fish, <<: [*common, {num_repeats: 9, flip_y: true}]}\n"  # the earlier one wins
    cats, dogs, birds, fish = process(write(text)).datasets
    assert (fish.num_repeats, fish.flip_x, fish.flip_y) == (2, True, True)
    assert (cats.num_repeats, dogs.num_repeats, birds.num_repeats, birds.flip_x) == (1, 2, 5, True)


# Mistakes, one at a time.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 100", "stpes: 100", "job.yaml:8: train.stpes: unknown option; did you mean 'steps'?"),
        ("arch: zimage", "arch: z-imgae", "; did you mean 'zimage'?"),
        ("arch: zimage", "arch: Z_Image", "; did you mean 'zimage'?"),
        ("arch: zimage", "arch: 'zimag:turbo'", "job.yaml:6: model.arch: 'zimag' is not one of sd1, sd2,"),
        ("arch: zimage", "name_or_path: x", "job.yaml:5: model.arch: missing; one of sd1, sd2, sd3,"),
        ("steps: 100", "steps: ten", "job.yaml:8: train.steps: expected a whole number, found the text 'ten'"),
        ("steps: 100", "steps: 1.5", "job.yaml:8: train.steps: expected a whole number, found the number 1.5"),
        ("steps: 100", "batch_size: true", "train.batch_size: expected a whole number, found the text 'true'"),
        ("steps: 100", "lr: [1]", "job.yaml:8: train.lr: expected a number, found a list"),
        ("steps: 100", "lr: .nan", "job.yaml:8: train.lr: expected a finite number, found the number nan"),
        ("steps: 100", "lr: 1e400", "job.yaml:8: train.lr: expected a finite number, found the number inf"),
        ("steps: 100", "steps: 0", "job.yaml:8: train.steps: must be at least 1, found the number 0"),
        ("steps: 100", "caption_dropout_rate: 1", "it belongs elsewhere (datasets.caption_dropout_rate)"),
        ("steps: 100", "learning_rate: 1", "job.yaml:8: train.learning_rate: unknown option; here it is train.lr"),
        ("steps: 100", "xyz: 1", "job.yaml:8: train.xyz: unknown option; there are dataset_folder, batch_size,"),
        ("steps: 100", "optimizer: adamw8bits", "; did you mean 'adamw8bit'?"),
        ("steps: 100", "min_timestep: 1.5", "job.yaml:8: train.min_timestep: must be at most 1, found the number 1.5"),
        ("steps: 100", "huber_delta: 0", "job.yaml:8: train.huber_delta: must be above 0, found the number 0"),
        ("steps: 100", "optimizer_params: {betas: [a]}", "betas[0]: expected a number, found the text 'a'"),
        ("output_name: cat", "output_name: 7", "expected text, found the number 7; put it in quotes"),
        ("output_name: cat", 'output_name: ""', "job.yaml:2: config.output_name: must not be empty"),
        ("type: train", "type: trian", "job.yaml:4: type: 'trian' is not one of train, adapter; did you mean 'train'?"),
        ("type: train", "type: train\n      device: gpu", "'gpu' does not fit; allowed: auto, cpu, mps, cuda[:N]"),
        ("type: train", "type: train\n      network: {linear: -4}", "network.linear: must be at least 1, found"),
        ("type: train", "type: train\n      network: {rank: 4}", "unknown option; here it is network.linear"),
        ("type: train", "type: train\n      network: {include: ['(']}", "job.yaml:5: network.include[0]: '(' is not a"),
        ("type: train", "type: train\n      network:", "job.yaml:5: network: expected a section (lines of"),
        ("type: train", "type: train\n      training_adapter: x", "here it is model.assistant_lora_path"),
        ("arch: zimage", "arch: zimage\n        qtype: qfloat9", "is not one of int8, float8, nf4, qfloat8,"),
        ("- folder_path: ./cats", "folder_path: ./cats", "job.yaml:9: datasets: expected a list, found a section"),
        ("- folder_path: ./cats", "- ./cats", "datasets[0]: expected a section (lines of"),
        ("- folder_path: ./cats", "- {}", "job.yaml:10: datasets[0].folder_path: missing; it has no default"),
        ("- folder_path: ./cats", "- {folder_path: x, resolution: []}", "datasets[0].resolution: must not be empty"),
        ("- folder_path: ./cats", "- {folder_path: x, resolution: [512, 8]}", "[1]: must be at least 32, found"),
        ("- folder_path: ./cats", "- {folder_path: x, is_reg: true}", "job.yaml:9: datasets: every one has is_reg"),
        ("        - folder_path: ./cats", "        []", "no pictures: give train.dataset_folder or datasets"),
        ("steps: 100", "dataset_folder: x", "train.dataset_folder and datasets exclude each other; keep one"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line(write, old, new, message):
    found = mistakes(write(edited(old, new)))
    assert len(found) == 1, found
    assert message in found[0]


def test_steps_and_epochs(write):
    found = mistakes(write(edited("steps: 100", "steps: 100\n        epochs: 5")))
    assert found == ["job.yaml:8: train.steps and train.epochs exclude each other; keep one"]


def test_duplicate_keys(write):
    found = mistakes(write(edited("steps: 100", "steps: 100\n        lr: 1\n        steps: 200")))
    assert found == ["job.yaml:10: train.steps: given twice (lines 8 and 10); keep one"]


def test_every_mistake_in_one_go(write):
    """Wrong types, unknown names, missing ones, and rules across options in four sections."""
    text = """\
config:
  output_nme: cat
  process:
    - type: train
      model:
        arch: zimag
        qtype: qint9
      train:
        steps: 5
        epochs: 5
        lr: fast
        min_timestep: 0.9
        max_timestep: 0.1
      network:
        linear: -1
        linear: -2
      datasets:
        - folder_path: a
        - resolution: x
      validation: {validate_every: 5}
      sample:
        sampel_steps: 8
"""
    with pytest.raises(JobError) as caught:
        load_job(write(text))
    lines = str(caught.value).splitlines()
    assert lines[0] == "job.yaml: 13 mistakes"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        f"job.yaml:{line}" for line in (1, 2, 6, 7, 9, 11, 12, 16, 16, 19, 19, 20, 22)
    ]
    assert "  job.yaml:1: config.output_name: missing; it has no default" in lines
    assert "  job.yaml:12: train.min_timestep (0.9) must be below train.max_timestep (0.1)" in lines
    assert "  job.yaml:20: validation.validate_every needs pictures: give validation.holdout (say 0.1) or" in str(
        caught.value
    )
    assert caught.value.exit_code == 2


def test_a_mistake_does_not_make_up_others(write):
    """What is taken out to look further must not be missed afterwards."""
    text = "config: {output_name: a, process: [{type: train, model: {arch: zimage}, train: {dataset_folder: [1]}}]}"
    assert mistakes(write(text)) == ["job.yaml:1: train.dataset_folder: expected a path, found a list"]


def test_a_mistake_in_a_list_does_not_hide_the_rules_of_its_section(write):
    text = edited("steps: 100", "steps: 100\n        epochs: 5\n        optimizer_params: {betas: [a]}")
    assert mistakes(write(text)) == [
        "job.yaml:8: train.steps and train.epochs exclude each other; keep one",
        "job.yaml:10: train.optimizer_params.betas[0]: expected a number, found the text 'a'",
    ]


def test_several_processes_are_numbered(write):
    text = GOOD + "    - type: train\n      model: {arch: zimage}\n      train: {dataset_folder: x, lrr: 1}\n"
    assert mistakes(write(text)) == ["job.yaml:13: process[1].train.lrr: unknown option; did you mean 'lr'?"]
    assert load_job(write(text.replace("lrr", "lr"))).place("train.lr", process=1) == "job.yaml:13"


class OtherProcess(Section):
    """A second kind of process."""

    type: Literal["other"]
    model: ModelConfig
    strength: float = Field(default=1.0, ge=0)


class Choice(Section):
    """Processes told apart by their type."""

    output_name: str
    process: list[Annotated[TrainProcess | OtherProcess, Field(discriminator="type")]]


class ChoiceJob(Section):
    """A job with a choice of processes."""

    config: Choice


def test_kinds_of_process_are_told_apart(write, monkeypatch):
    """pydantic puts the kind's name into its locations; it is not part of the file."""
    monkeypatch.setattr("detour.config.explain.Job", ChoiceJob)
    text = """\
config:
  output_name: a
  process:
    - {type: othr, model: {arch: zimage, lora: 1}}
    - {type: other, model: {arch: zimag}, strength: -1, strenth: 2}
    - {type: train, train: {dataset_folder: x, lr: fast}, model: {arch: zimage}, strength: 1}
    - {model: {arch: zimage}}
"""
    found = mistakes(write(text))
    assert sorted(line.partition("; ")[0].partition(" is not one of")[0] for line in found) == [
        "job.yaml:4: process[0].model.lora: unknown option",
        "job.yaml:4: process[0].type: 'othr'",
        "job.yaml:5: process[1].model.arch: 'zimag'",
        "job.yaml:5: process[1].strength: must be at least 0, found the number -1",
        "job.yaml:5: process[1].strenth: unknown option",
        "job.yaml:6: process[2].strength: unknown option",
        "job.yaml:6: process[2].train.lr: expected a number, found the text 'fast'",
        "job.yaml:7: process[3].type: missing",
    ]


def test_lines_of_options_for_later_errors(write):
    loaded = load_job(write(GOOD), ["train.lr=1"])
    assert loaded.place("model.arch") == "job.yaml:6"
    assert loaded.place("datasets[0].folder_path") == "job.yaml:10"
    assert loaded.place("train.lr") == "--set train.lr=1"
    assert loaded.place("model.revision") == "job.yaml:5"
    assert loaded.place("save.dtype") == "job.yaml:4"


# Files that are not job files.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job.yaml: the file is empty; a job file begins with 'config:'"),
        ("# nothing\n", "job.yaml: the file is empty"),
        ("- a\n", "job.yaml:1: a job file is a mapping that begins with 'config:', found a list"),
        ("hello", "found the text 'hello'"),
        ("a: b", "job.yaml:1: config: missing"),
        (b"config: \xff", "job.yaml:1: is not UTF-8 text (byte 0xff); save it as UTF-8"),
        ("config:\n\tx: 1", "job.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("config:\n\tx: 1", "indent with spaces, not tabs"),
        (
            "config: a: b",
            "job.yaml:1: not YAML: mapping values are not allowed here; a text with ': ' in it needs quotes",
        ),
        ("config: [1", "job.yaml:1: not YAML: expected ',' or ']'"),
        ("config: 1\n---\nconfig: 2", "a job file holds one document"),
        ("config:\n  - a\n b: 2", "job.yaml:3: not YAML"),
        ("config: *nobody", "a text that begins with '*' needs quotes"),
        ("config: @x", "a text that begins with this character needs quotes"),
        ('config: "\x01"', "job.yaml:1: the character U+0001 is not allowed"),
        ("%YAML 9.9\n---\na: 1", "job.yaml"),
        ("? [a, b]\n: c", "a name must be text (line 1)"),
        ("x: &a [*a]", "an alias stands inside what it stands for"),
        ("x: 1" + "0" * 5000, "the number has too many digits"),
        ("<<: 5", "<<: takes a mapping, found the number 5"),
        ("[" * 600, "is nested too deeply"),
        ("#" * 600_000, "600000 bytes are too many for a job file"),
    ],
)
def test_what_is_not_a_job_file(write, text, message):
    with pytest.raises(UserError) as caught:
        load_job(write(text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!x y", "!!set {a}"]
)
def test_tags_build_nothing(write, tag):
    found = mistakes(write(edited("output_name: cat", f"output_name: {tag}")))
    assert len(found) == 1
    assert found[0].startswith("job.yaml:2: config.output_name: the tag !")
    assert not Path("pwned").exists()


def test_a_small_file_cannot_stand_for_a_huge_one(write):
    """Billion laughs: nine aliases of nine aliases, ten deep."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij")]
    with pytest.raises(UserError, match="more than 50000 values"):
        load_job(write("\n".join(lines)))


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: there is no such file"):
        load_job(Path("nowhere.yaml"))
    with pytest.raises(UserError, match="is a folder"):
        load_job(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_job(write(GOOD) / "inside")


# --set


@pytest.mark.parametrize(
    "path",
    [
        "train.lr",
        "process.0.train.lr",
        "process[0].train.lr",
        "config.process.0.train.lr",
        "config.process[0].train.lr",
    ],
)
def test_set_finds_the_option_by_its_long_and_short_name(write, path):
    assert process(write(GOOD), f"{path}=1e-3").train.lr == 1e-3


def test_set_makes_sections_and_entries_that_are_not_there(write):
    found = load_job(
        write(GOOD),
        ["output_name=dog", "meta.author=me", "sample.prompts.0=a cat", "sample.prompts.1.prompt=a dog",
         "datasets.0.resolution=[512, 768]", "datasets[0].resolution[1]=640", "network.exclude=[x]"],
    ).job  # fmt: skip
    assert (found.config.output_name, found.meta) == ("dog", {"author": "me"})
    only = found.config.process[0]
    assert [prompt.prompt for prompt in only.sample.prompts] == ["a cat", "a dog"]
    assert (only.datasets[0].resolution, only.network.exclude) == ([512, 640], ["x"])


def test_set_replaces_a_mistake(write):
    assert process(write(edited("steps: 100", "steps: 1\n        steps: x")), "train.steps=5").train.steps == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "--set train.lrr=1: train.lrr: unknown option; did you mean 'lr'?"),
        ("trian.lr=1", "--set trian.lr=1: trian: unknown option; did you mean 'train'?"),
        ("train.lr=fast", "--set train.lr=fast: train.lr: expected a number, found the text 'fast'"),
        ("train.lr=", "--set train.lr=: train.lr: expected a number, found nothing"),
        ("train.lr", "--set train.lr: write it as path=value"),
        ("=1", "--set =1: write it as path=value"),
        ("train..lr=1", "--set train..lr=1: write it as path=value"),
        ("model.arch.x=1", "--set model.arch.x=1: model.arch is the text 'zimage', which has no 'x'"),
        ("process.1.train.lr=1", "config.process is a list of 1; '1' is not a place in it"),
        ("datasets.x.flip_x=1", "datasets is a list of 1; 'x' is not a place in it"),
        ("train.lr=[1", "--set train.lr=[1: the value is not YAML"),
        ("sample.prompts.0=[trigger] cat", "or put it in quotes"),
        ("train.lr=!!python/name:os.system", "the tag !!python/name:os.system is not allowed"),
        ("train.epochs=3", "train.steps and train.epochs exclude each other"),
    ],
)
def test_a_wrong_set_says_so(write, override, message):
    if override.startswith("process.1"):
        override = override.replace("process.1.", "process.7.")
        message = message.replace("'1'", "'7'")
    with pytest.raises(UserError) as caught:
        load_job(write(GOOD), [override])
    assert message in str(caught.value)


def test_set_asks_which_process_is_meant(write):
    text = GOOD + "    - {type: train, model: {arch: zimage}, train: {dataset_folder: x}}\n"
    with pytest.raises(UserError, match=r"has 2 processes; say which: process\.0\.train\.lr"):
        load_job(write(text), ["train.lr=1"])
    assert load_job(write(text), ["process.1.train.lr=0.5"]).job.config.process[1].train.lr == 0.5
    with pytest.raises(UserError, match=r"has no config\.process"):
        load_job(write("config: {}"), ["train.lr=1"])


# Whatever stands in the file, the answer is a job or a list of mistakes.


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@`#,? \n\t1.0<~\\"), max_size=60))
def test_any_text_loads_or_is_a_user_error(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        load_job(path)


def places(value, key=()):
    yield key
    for part, inner in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        yield from places(inner, (*key, part))


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2000), st.floats(), st.sampled_from(["", "x", "no", "a b", "[", "--w x"]),
    st.just([]), st.just({}), st.just([{}]), st.just([None]), st.just({"x": {"y": [1]}}), st.lists(st.text(max_size=2)),
)  # fmt: skip


@pytest.mark.parametrize("case", ["zimage_turbo_24gb", "aitoolkit_style"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_odd_value_anywhere_is_a_mistake_with_a_line_or_loads(monkeypatch, case, data):
    path = CASES / f"{case}.yaml"
    whole = document.read(path)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(list(places(whole.data))[1:]))
        parent = whole.data
        for part in key[:-1]:
            parent = parent[part]
        parent[key[-1]] = deepcopy(data.draw(ODD))
    monkeypatch.setattr("detour.config.load.read", lambda _: whole)
    try:
        load_job(path)
    except JobError as error:
        assert error.mistakes
        assert all(mistake.place.rpartition(":")[2].isdigit() for mistake in error.mistakes), str(error)


def test_neither_torch_nor_the_parser_is_imported_too_early():
    program = (
        "import sys; from pathlib import Path; from detour.config.load import load_job\n"
        "assert 'ruamel' not in sys.modules and 'ruamel.yaml' not in sys.modules\n"
        f"load_job(Path({str(CASES / 'aitoolkit_style.yaml')!r}))\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'PIL', 'safetensors', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_dump_shows_every_value(write):
    text = dump_job(load_job(write(GOOD)).job)
    assert "      train:\n        dataset_folder: null\n        batch_size: 1\n" in text
    assert "        lr: 0.0001\n" in text
