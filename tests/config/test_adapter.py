"""The process `type: adapter`: its own defaults, and every mistake in it with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from detour import UserError, archs
from detour.config.job import AdapterProcess, TrainProcess
from detour.config.load import dump_job, load_job, load_text

JOB = """\
config:
  output_name: a
  process:
    - type: adapter
      model: {arch: zimage}
      train: {dtype: fp32}
      network: {linear: 16}
      adapter:
        pictures: 100
"""


def process(text: str = JOB) -> AdapterProcess:
    found = load_text(text).job.config.process[0]
    assert isinstance(found, AdapterProcess)
    return found


def test_it_is_slower_than_training_unless_told():
    """Other defaults than training's, whether the section is there or not; what is given counts."""
    assert (process().train.lr, process().train.steps) == (1e-5, 10_000)
    assert process(JOB.replace("      train: {dtype: fp32}\n", "")).train.lr == 1e-5
    told = process(JOB.replace("{dtype: fp32}", "{lr: 2e-5, steps: 7}")).train
    assert (told.lr, told.steps) == (2e-5, 7)
    assert TrainProcess.model_fields["train"].default.lr == 1e-4


def test_it_reads_back_equal_with_every_default_filled_in(tmp_path):
    job = load_text(JOB).job
    resolved = archs.resolve(process())
    whole = job.model_copy(update={"config": job.config.model_copy(update={"process": [resolved]})})
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(whole), encoding="utf-8")
    assert load_job(path).job == whole
    written = yaml.safe_load(path.read_text())["config"]["process"][0]
    assert written["adapter"]["sizes"] == [{"width": 1024, "height": 1024}]
    assert written["adapter"]["sample_steps"] == 8
    assert (written["model"]["name_or_path"], written["train"]["timestep_type"]) == (
        "Tongyi-MAI/Z-Image-Turbo", "weighted",
    )  # fmt: skip


def test_a_number_is_a_square():
    sizes = process(JOB + "        sizes: [512, {width: 832, height: 1216}]\n").adapter.sizes
    assert [(size.width, size.height) for size in sizes] == [(512, 512), (832, 1216)]


def test_the_training_in_it_is_one_like_any_other():
    made = archs.resolve(process(JOB + "        stop: {held_out: 20, every: 50, times: [0.5]}\n"))
    training = made.training()
    assert (training.model, training.train, training.network) == (made.model, made.train, made.network)
    assert (training.validation.validate_every, training.validation.times) == (50, [0.5])
    assert training.preserve.strategy == "none" and training.preserve.drift.measure


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{dtype: fp32}", "{dataset_folder: x}", "job.yaml:6: train.dataset_folder: the model draws the pictures"),
        ("{dtype: fp32}", "{epochs: 3}", "job.yaml:6: train.epochs: give train.steps, the limit"),
        ("{dtype: fp32}", "{lr: 0}", "job.yaml:6: train.lr must be above 0"),
        ("{dtype: fp32}", "{train_text_encoder: true}", "job.yaml:6: train.train_text_encoder: a training adapter is"),
        ("{dtype: fp32}", "{timestep_type: next_sample}", "job.yaml:6: train.timestep_type: next_sample rehearses"),
        ("{linear: 16}", "{type: lokr}", "job.yaml:7: network.type: lokr: a training adapter is a plain LoRA"),
        ("{linear: 16}", "{linear: 16, linear_alpha: 8}", "job.yaml:7: network.linear_alpha: files of training"),
        ("{arch: zimage}", "{arch: zimage, assistant_lora_path: a/b/c.safetensors}", "job.yaml:5: model.assistant"),
        ("pictures: 100", "pictures: 32", "job.yaml:9: adapter.pictures (32) must be more than adapter.stop.held_out"),
        ("pictures: 100", "prompts: [a]\n        prompts_file: b", "adapter.prompts and adapter.prompts_file exclude"),
        ("pictures: 100", "prompts: ['']", "job.yaml:9: adapter.prompts: one of them is empty"),
        ("pictures: 100", "sizes: [[512, 768]]", "job.yaml:9: adapter.sizes[0]: expected a section"),
        ("pictures: 100", "stop: {tolerance: 1}", "job.yaml:9: adapter.stop.tolerance: must be below 1"),
        ("      adapter:", "      datasets: []\n      adapter:", "job.yaml:8: datasets: unknown option"),
        ("pictures: 100", "rank: 4", "job.yaml:9: adapter.rank: unknown option; here it is network.linear"),
        ("type: adapter", "type: adaptor", "job.yaml:4: type: 'adaptor' is not one of train, adapter; did you mean"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line(old, new, message):
    with pytest.raises(UserError) as caught:
        load_text(JOB.replace(old, new))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_come_all_at_once():
    text = JOB.replace("{linear: 16}", "{type: dora}").replace("pictures: 100", "pictures: 1\n        seed: -1")
    with pytest.raises(UserError) as caught:
        load_text(text)
    assert [line.strip().partition(": ")[0] for line in str(caught.value).splitlines()[1:]] == [
        "job.yaml:7", "job.yaml:9", "job.yaml:10",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{arch: 'zimage:base'}", "adapter.sample_steps: Z-Image base is not distilled"),
        ("{arch: sd1}", "adapter.sample_steps: Stable Diffusion 1 v1-5 is not distilled"),
    ],
)
def test_a_model_that_is_not_distilled_is_refused_unless_its_steps_are_given(text, message):
    """Weights that are distilled all the same can be named; then it is a warning."""
    made = process(JOB.replace("{arch: zimage}", text))
    with pytest.raises(UserError, match="not distilled") as caught:
        archs.resolve(made)
    assert str(caught.value).startswith(message)
    told = archs.resolve(made.model_copy(update={"adapter": made.adapter.model_copy(update={"sample_steps": 4})}))
    assert ["is not distilled: a training adapter for it has nothing" in line for line in archs.advice(told)] == [True]
    assert archs.advice(archs.resolve(process())) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sizes: [{width: 1000, height: 512}]", "adapter.sizes: 1000 x 512 pixels cannot be drawn and trained on"),
        ("num_frames: 5", "adapter.num_frames: 5 frames: zimage knows pictures only"),
        (f"seed: {2**63 - 1}", "adapter.seed: "),
    ],
)
def test_what_the_architecture_cannot_draw_is_an_error(option, message):
    with pytest.raises(UserError) as caught:
        archs.resolve(process(f"{JOB}        {option}\n"))
    assert str(caught.value).startswith(message)


def test_a_second_process_may_make_what_the_first_does_not(tmp_path):
    """Processes of both kinds in a file, told apart by their type."""
    path = Path(tmp_path / "job.yaml")
    path.write_text(JOB + "    - {type: train, model: {arch: zimage}, train: {dataset_folder: x}}\n", encoding="utf-8")
    assert [made.type for made in load_job(path).job.config.process] == ["adapter", "train"]
