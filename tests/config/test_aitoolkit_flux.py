"""What ai-toolkit's files say of FLUX.1, Flex.1 and Flex.2 alone: adapter, guidance left out, controls and holes."""

from pathlib import Path

import pytest
import yaml

from detour.config.aitoolkit import translate
from detour.config.load import JobError, load_job

FLEX2 = """\
job: extension
config:
  name: lena
  process:
    - type: sd_trainer
      training_folder: out
      network: {type: lora, linear: 16, linear_alpha: 16}
      model:
        name_or_path: ostris/Flex.2-preview
        arch: flex2
        model_kwargs:
          invert_inpaint_mask_chance: 0.2
          inpaint_dropout: 0.4
          control_dropout: 0.5
          inpaint_random_chance: 0.2
          do_random_inpainting: true
          random_blur_mask: true
          random_dialate_mask: false
      datasets:
        - folder_path: pictures
          controls: []
          control_path: [depth]
      train: {steps: 500, lr: 1e-4, bypass_guidance_embedding: true}
      sample:
        prompts:
          - "a cat --ctrl_idx 1 --ctrl_img depth/a.png"
          - "a dog --ctrl_idx 0 --ctrl_img holes/a.inpaint.png"
"""


def job_of(tmp_path: Path, **changes: object) -> tuple[object, list[str]]:
    data = yaml.safe_load(FLEX2)
    process = data["config"]["process"][0]
    for option, value in changes.items():
        section, _, name = option.partition("__")
        target = process[section][0] if section == "datasets" else process[section]
        target[name] = value
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(data))
    loaded = load_job(tmp_path / "job.yaml")
    return loaded.job.config.process[0], [note.partition(": ")[2] for note in loaded.notes]


def test_controls_and_holes_of_flex2(tmp_path: Path) -> None:
    process, notes = job_of(tmp_path)
    assert process.controls.model_dump() == {
        "control_dropout": 0.5, "inpaint": 0.6, "inpaint_invert": 0.2, "inpaint_soften": True, "inpaint_vary": False,
    }  # fmt: skip
    assert process.datasets[0].control_path == Path("depth")
    first, second = process.sample.prompts
    assert (first.prompt, first.control, first.inpaint) == ("a cat", Path("depth/a.png"), None)
    assert (second.prompt, second.control, second.inpaint) == ("a dog", None, Path("holes/a.inpaint.png"))
    assert any("inpaint_random_chance: 0.2: every hole is drawn at random" in note for note in notes)


def test_without_random_holes_there_are_none(tmp_path: Path) -> None:
    assert job_of(tmp_path, model__model_kwargs={"inpaint_dropout": 0.5})[0].controls.inpaint == 0
    everything = {"inpaint_dropout": 1.0, "do_random_inpainting": True, "invert_inpaint_mask_chance": 0.5}
    assert job_of(tmp_path, model__model_kwargs=everything)[0].controls.inpaint == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__model_kwargs": {"inpaint_dropuot": 0.5}}, "inpaint_dropuot: ai-toolkit has no such option"),
        ({"datasets__control_path": ["a", "b"]}, "control_path: 2 folders: one is read"),
        ({"datasets__controls": ["depth"]}, r"controls: .* \(make control pictures beforehand"),
        ({"datasets__inpaint_path": "x"}, r"inpaint_path: .*\(holes are drawn at random \(controls\.inpaint\)"),
        ({"train__bypass_guidance_embedding": False}, "flex2 always leaves its embedding of guidance out"),
        ({"model__arch": "flux"}, "bypass_guidance_embedding: flux is told a guidance of 1; .* flex1"),
        ({"model__arch": "flex1"}, "model_kwargs: the architecture has no such switch"),
    ],
)
def test_what_cannot_be_had(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    with pytest.raises(JobError, match=says):
        job_of(tmp_path, **changes)


def test_its_adapter_for_schnell_is_a_repository_there() -> None:
    model = {"name_or_path": "black-forest-labs/FLUX.1-schnell", "is_flux": True}
    for given, expected in (
        (
            "ostris/FLUX.1-schnell-training-adapter",
            "ostris/FLUX.1-schnell-training-adapter/pytorch_lora_weights.safetensors",
        ),
        ("user/repo/file.safetensors", "user/repo/file.safetensors"),
        ("adapter.safetensors", "adapter.safetensors"),
        ("", None),
    ):
        process = {
            "type": "sd_trainer",
            "datasets": [{"folder_path": "x"}],
            "model": model | {"assistant_lora_path": given},
        }
        found = translate({"config": {"name": "a", "process": [process]}}).data["config"]["process"][0]["model"]
        assert (found["arch"], found["assistant_lora_path"]) == ("flux", expected)
