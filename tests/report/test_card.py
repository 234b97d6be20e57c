"""The model card: what the hub reads in it, code that runs, and nothing that is private."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML

import runs_made
from detour import UserError, archs
from detour.report.card import CardOf, code, instructions, model_card, pictures, plain
from detour.report.folder import open_run

EVIL = "</script><img src=x onerror=alert(1)> | `code` *b* [x](javascript:alert(1))\n---\n```\u2028# \"q\" 'q' \\ 🎨"
TURBO = "Tongyi-MAI/Z-Image-Turbo"


def about(folder: Path, **values: Any) -> CardOf:
    lora = open_run(folder).loras[0]
    given = {"file": lora.path, "name": lora.path.name, "format": lora.format, "step": 10, "proof": lora.proof}
    return CardOf(**(given | values))


def card(run: runs_made.Made, **values: Any) -> str:
    return model_card(open_run(run.folder), about(run.folder, **values))


def front(text: str) -> dict[str, Any]:
    """What the hub reads: the YAML between the first two lines of dashes."""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert head is not None
    found: dict[str, Any] = YAML(typ="safe").load(head[1])
    return found


def script(text: str) -> str:
    found = re.search(r"^```python\n(.*?\n)```$", text, re.DOTALL | re.MULTILINE)  # a fence ends at a line of its own
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = {"name_or_path": TURBO, "assistant_lora_path": archs.spec("zimage").default.adapter}
    return runs_made.whole(tmp_path_factory.mktemp("run"), model=model)


def test_the_front_matter(run):
    assert front(card(run)) == {
        "base_model": TURBO,
        "base_model_relation": "adapter",
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "diffusers", "template:diffusion-lora", "zimage", "detour"],
        "instance_prompt": "zig",
        "widget": [
            {"text": "a zig", "output": {"url": "images/000000010-00.png"}},
            {"text": "a red circle", "output": {"url": "images/000000010-01.png"}},
        ],
    }


def test_what_it_tells(run):
    text = card(run)
    lora = hashlib.sha256((run.folder / "zig.safetensors").read_bytes()).hexdigest()
    adapter = str(archs.spec("zimage").default.adapter).replace("_", "\\_")
    for line in (
        "# zig",
        f"A LoRA for Z-Image turbo ([{TURBO}](https://huggingface.co/{TURBO})), trained for 10 steps with Detour. "
        "Write `zig` in the prompt.",
        "| Pictures | 7 |",
        "| Resolution | 64 |",
        "| Kind | LoRA, rank 4, alpha 4 |",
        "| Optimizer | adamw, learning rate 0.0002, constant |",
        f"| Training adapter | {adapter} (factored) |",
        f"| `zig.safetensors` | `{lora}` |",
        f"| training adapter | `{'c' * 64}` |",
        f"| job file | `{'e' * 64}` |",
        f"| dataset | `{'d' * 64}` |",
        "Put `zig.safetensors` into `models/loras`. Load LoRA with strength 1, then sample with 8 steps and cfg 1. "
        "Without the training adapter: it was on only while the LoRA learnt.",
    ):
        assert line in text.splitlines(), line
    assert card(run) == text


def test_each_architecture_has_a_card(tmp_path):
    """With its licence as the hub writes it, and the guidance of its own programs."""
    for number, name in enumerate(archs.built()):
        spec = archs.spec(name)
        made = runs_made.whole(
            tmp_path / str(number), model={"arch": name, "name_or_path": None, "assistant_lora_path": None}
        )
        head = front(text := card(made))
        assert head["base_model"].count("/") == 1
        assert head["license"] in ("apache-2.0", "creativeml-openrail-m", "openrail++", "other")
        assert ("license_name" in head) == (head["license"] == "other")
        assert head["pipeline_tag"] == ("text-to-video" if spec.frame_factor else "text-to-image")
        process = open_run(made.folder).process
        steps = f"{spec.default.steps} steps"
        assert steps in instructions(process)
        if "```python" in text:
            compile(script(text), "card", "exec")
            assert f"num_inference_steps={spec.default.steps}," in script(text)
            assert f"guidance_scale={spec.diffusers_guidance(spec.default.guidance):.1f}," in script(text)
    assert "FluxGuidance 3.5" in instructions(_process("flux"))
    assert "cfg 1." in instructions(_process("flux", "schnell"))
    assert "FluxGuidance" not in instructions(_process("flux", "schnell"))


def _process(arch: str, variant: str | None = None) -> Any:
    from detour.config.job import TrainProcess

    model = {"arch": arch, "variant": variant}
    return archs.resolve(
        TrainProcess.model_validate({"type": "train", "model": model, "datasets": [{"folder_path": "x"}]})
    )


def test_code_stands_there_only_where_diffusers_has_loaded_the_file(run):
    assert "## With diffusers" in card(run)
    assert "## With diffusers" not in card(run, proof=None)
    assert "## With diffusers" not in card(run, proof="8 layers, loaded by PEFT")
    assert "## With ComfyUI" not in card(run, format="diffusers")


def test_a_scheduler_of_its_own_is_set(tmp_path):
    made = runs_made.whole(tmp_path, model={"arch": "sd2:turbo", "name_or_path": None, "assistant_lora_path": None})
    assert "from diffusers import DiffusionPipeline, EulerDiscreteScheduler\n" in card(made)
    assert (
        "pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing='trailing')\n"
        in card(made)
    )


def test_models_that_are_not_published_are_not_named(tmp_path):
    made = runs_made.whole(tmp_path)
    assert "base_model" not in front(card(made))
    assert "which this card does not name" in card(made)
    assert "| Training adapter | one of its own (factored) |" in card(made)
    named = card(made, base="me/my-model", repository="me/zig")
    assert front(named)["base_model"] == "me/my-model"
    assert "which this card does not name" not in named
    assert "from_pretrained('me/my-model', " in named
    assert "load_lora_weights('me/zig', weight_name='zig.safetensors')" in named


@pytest.mark.parametrize("name", ["x", "/x", "a/b/c", "../b", "a/b\nc", "a/ b", ""])
def test_names_on_the_hub_are_names(run, name):
    with pytest.raises(UserError, match="is not a name on the hub"):
        card(run, base=name)
    with pytest.raises(UserError, match="is not a name on the hub"):
        card(run, repository=name)


def test_pictures_are_those_of_its_step_or_the_last_before(run, tmp_path):
    opened = open_run(run.folder)
    assert [picture.path.name for picture in pictures(opened, 10)] == ["000000010-00.png", "000000010-01.png"]
    assert [picture.path.name for picture in pictures(opened, 7)] == ["000000005-00.png", "000000005-01.png"]
    made = runs_made.whole(tmp_path, prompts=[f"prompt {n}" for n in range(9)])
    (made.folder / "samples" / "000000010-01.png").unlink()
    names = [picture.path.name for picture in pictures(open_run(made.folder), 10)]
    assert names == [f"000000010-0{n}.png" for n in (0, 2, 3, 4, 5, 6)]
    none = runs_made.made(tmp_path / "none")
    none.start()
    none.save(5, final=True)
    text = card(none)
    assert "<Gallery />" not in text
    assert "widget" not in front(text)


def test_no_path_and_no_secret_gets_in(tmp_path):
    made = runs_made.whole(
        tmp_path / "home" / "jane", meta={"token": "hf_topsecret"}, logging={"project_name": "classified"},
        train={"cache_folder": "/mnt/hidden"}, preserve={"prompts": ["unsaid"]}, network={"exclude": ["hidden"]},
    )  # fmt: skip
    text = card(made)
    for secret in (
        str(tmp_path),
        "jane",
        "hf_topsecret",
        "classified",
        "hidden",
        "/elsewhere",
        "unsaid",
        os.environ["PATH"],
    ):
        assert secret not in text, secret


def test_what_the_user_wrote_is_text(tmp_path):
    made = runs_made.whole(tmp_path, prompts=[EVIL], trigger_word=EVIL)
    text = card(made)
    head = front(text)
    assert head["instance_prompt"] == EVIL
    assert head["widget"][0]["text"] == EVIL
    body = text.split("\n---\n", 1)[1]
    assert body.count("---") == body.count("|---|---|") * 2 + 2  # and those in the two texts, inside a line
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```sh", "```"]
    assert '\n# "q"' not in text
    calls = [node for node in ast.walk(ast.parse(script(text))) if isinstance(node, ast.Call)]
    call = next(call for call in calls if ast.unparse(call.func) == "pipe")
    assert ast.literal_eval(next(word.value for word in call.keywords if word.arg == "prompt")) == EVIL


def test_words_in_markdown():
    assert (
        plain("a | b\n# c <x> *y* _z_ [l](u) & `t`") == "a \\| b \\# c \\<x\\> \\*y\\* \\_z\\_ \\[l\\](u) \\& \\`t\\`"
    )
    assert code("a\nb") == "`a b`"
    assert code("a `` b") == "```a `` b```"
    assert code("`a") == "`` `a ``"


def test_the_code_in_the_card_draws_a_picture_with_the_lora(tmp_path, monkeypatch):
    """As it stands in the card, but that the miniature is taken for the published model, in its folder."""
    import torch

    from detour.nano import zimage
    from detour.nn.quiet import quiet_imports

    zimage.write(tmp_path / "model")
    made = runs_made.whole(tmp_path / "run", sample={"width": 64, "height": 64, "seed": 7})
    text = script(card(made))
    assert text.count(f"'{TURBO}'") == 1
    monkeypatch.chdir(made.folder)
    names: dict[str, Any] = {}
    with quiet_imports(), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(text.replace(f"'{TURBO}'", repr(str(tmp_path / "model"))), "card", "exec"), names)
    with Image.open(made.folder / "sample.png") as drawn:
        assert drawn.size == (64, 64)
        with_lora = drawn.tobytes()
    pipe = names["pipe"]
    assert pipe.get_active_adapters() == ["default_0"]
    assert names["result"].images[0].tobytes() == with_lora
    pipe.unload_lora_weights()
    generator = torch.Generator("cpu").manual_seed(42)
    pipe.set_progress_bar_config(disable=True)
    plain_picture = pipe(
        prompt="a zig", num_inference_steps=8, guidance_scale=0.0, width=64, height=64, generator=generator
    ).images[0]
    assert plain_picture.tobytes() != with_lora
