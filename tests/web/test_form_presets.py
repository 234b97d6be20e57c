"""Choosing a model fills in what its spec says; what was changed by hand stays, and that is said."""

from pathlib import Path

import pytest

import web_client
from detour import archs
from detour.archs.presets import START, presets
from detour.config.form import fields
from detour.config.load import load_text

ROOT = Path(__file__).parents[2]
P = "config.process[0]."
NAMES = [preset.name for preset in presets()]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return web_client.signed_in(tmp_path_factory.mktemp("ui"))


@pytest.fixture(scope="module")
def begun(client):
    """A new job with a name and a dataset."""
    text = client.get("/api/form/start").json()["form"]["text"]
    return text.replace('""', "cats").replace("null", "datasets/cats")


def chosen(client, text, name, **more):
    answer = client.post("/api/form/preset", json={"text": text, "preset": name, **more})
    assert answer.status_code == 200, answer.json()
    return answer.json()


def process(text):
    return load_text(text).job.config.process[0]


def test_there_is_one_for_each_variant_that_the_specs_know():
    known = [f"{name}:{variant}" for name in archs.built() for variant in archs.spec(name).variants]
    assert sorted(NAMES) == sorted(known)
    assert START in NAMES
    assert len({preset.title for preset in presets()}) == len(NAMES)


def test_z_image_turbo_is_what_it_is_called():
    turbo = next(preset for preset in presets() if preset.name == "zimage:turbo")
    assert turbo.title == "Z-Image Turbo (with training adapter)"
    assert {path: turbo.values[path] for path in turbo.values if path != "model.assistant_lora_path"} == {
        "model.arch": "zimage:turbo", "model.variant": None, "model.name_or_path": "Tongyi-MAI/Z-Image-Turbo",
        "model.extras_name_or_path": None, "model.quantize": True, "model.qtype": "float8", "model.quantize_te": True,
        "model.low_vram": True, "train.noise_scheduler": "flowmatch", "train.timestep_type": "weighted",
        "sample.sampler": "flowmatch", "sample.sample_steps": 8, "sample.guidance_scale": 1, "sample.width": 1024,
        "sample.height": 1024,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_what_its_spec_says(client, begun, name):
    state = chosen(client, begun, name)
    assert (state["errors"], state["preset"], state["differences"]) == ([], name, [])
    arch, variant_name = name.split(":")
    variant = archs.spec(arch).variants[variant_name]
    resolved = archs.resolve(process(state["text"]))
    assert archs.variant_of(resolved) == (variant_name, variant)
    assert resolved.model.name_or_path == variant.repo
    assert resolved.model.assistant_lora_path == variant.adapter
    assert (resolved.sample.sample_steps, resolved.sample.guidance_scale) == (variant.steps, variant.guidance)
    assert resolved.train.timestep_type == variant.timestep_type
    if variant.extras_repo is not None:
        assert resolved.model.extras_name_or_path == variant.extras_repo
    assert archs.spec(arch).size_problem(resolved.sample.width, resolved.sample.height) is None
    # Nothing of the first preset is left over, and nothing says what is the default.
    for path, value in next(preset for preset in presets() if preset.name == name).values.items():
        written = f"{path.partition('.')[2]}: " in state["text"]
        assert written == (value != fields("train")[path].default)
    back = chosen(client, state["text"], START)["text"]
    assert sorted(back.splitlines()) == sorted(begun.splitlines())


EXAMPLES = [path for path in sorted((ROOT / "examples").glob("train_*.yaml")) if "advanced" not in path.name]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_presets_hold_in_8_bits_what_the_examples_do(path):
    written = process(path.read_text())
    name = f"{written.model.arch}:{archs.variant_of(written)[0]}"
    values = next(preset for preset in presets() if preset.name == name).values
    assert (written.model.quantize, written.model.quantize_te) == (
        values["model.quantize"],
        values["model.quantize_te"],
    )
    if "12gb" not in path.name:
        assert (written.sample.width, written.sample.height) == (values["sample.width"], values["sample.height"])


def test_what_was_changed_by_hand_stays_and_is_said(client, begun):
    text = "# mine\n" + begun.replace("Tongyi-MAI/Z-Image-Turbo", "/models/mine").replace("true", "false", 1)
    text += "      network: {linear: 8}\n"
    state = chosen(client, text, "sdxl:turbo")
    model = process(state["text"]).model
    assert (model.arch, model.variant, model.name_or_path, model.quantize) == ("sdxl", "turbo", "/models/mine", False)
    assert state["text"].startswith("# mine\n")
    assert process(state["text"]).network.linear == 8
    assert [(one["label"], one["value"], one["preset"]) for one in state["differences"]] == [
        ("Model path", "/models/mine", "stabilityai/sdxl-turbo")
    ]
    state = chosen(client, state["text"], "sdxl:turbo", overwrite=["model.name_or_path"])
    assert (state["differences"], process(state["text"]).model.name_or_path) == ([], "stabilityai/sdxl-turbo")


def test_a_dataset_follows_the_size_of_the_model_unless_it_was_changed(client, begun):
    two = begun.replace(
        "- folder_path: datasets/cats", "- folder_path: datasets/cats\n        - {folder_path: b, resolution: [640]}"
    )
    small = chosen(client, two, "sd1:v1-5")["text"]
    assert [entry.resolution for entry in process(small).datasets] == [[512], [640]]
    added = client.post("/api/form/list", json={"text": small, "path": P + "datasets", "action": "add"}).json()["text"]
    assert "- folder_path: null\n          resolution: [512]\n" in added
    large = chosen(client, small, "sdxl:base")["text"]
    assert [entry.resolution for entry in process(large).datasets] == [[1024], [640]]


def test_a_file_that_names_no_model_takes_a_preset_too(client):
    text = "config:\n  output_name: a\n  process:\n    - type: train\n      datasets: [{folder_path: x}]\n"
    state = chosen(client, text, "flux:schnell")
    assert (state["preset"], state["errors"], state["differences"]) == ("flux:schnell", [], [])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{arch: zimage}", "zimage:turbo"), ("{arch: 'zimage:base'}", "zimage:base"),
        ("{arch: zimage, variant: deturbo}", "zimage:deturbo"),
        ("{arch: zimage, name_or_path: Tongyi-MAI/Z-Image}", "zimage:base"), ("{arch: nothing}", None),
        ("{arch: 'zimage:nothing'}", None), ("text", None), ("{name_or_path: x}", None),
    ],
)  # fmt: skip
def test_a_file_is_known_by_what_it_says_of_its_model(client, model, expected):
    text = f"config: {{output_name: a, process: [{{type: train, model: {model}, datasets: [{{folder_path: x}}]}}]}}"
    assert client.post("/api/form/read", json={"text": text}).json()["preset"] == expected


def test_unknown_presets_and_processes_without_presets_are_refused(client, begun):
    answer = client.post("/api/form/preset", json={"text": begun, "preset": "nope"})
    assert (answer.status_code, "there is no preset 'nope'" in answer.json()["error"]) == (400, True)
    adapter = "config: {output_name: a, process: [{type: adapter, model: {arch: zimage}}]}"
    answer = client.post("/api/form/preset", json={"text": adapter, "preset": START})
    assert (answer.status_code, "type train" in answer.json()["error"]) == (400, True)
    assert client.post("/api/form/preset", json={"text": begun, "preset": START, "process": 4}).status_code == 400
