"""What the page of a new job asks for: reading a text, changing it, checking it, and what a form begins with."""

import json
from pathlib import Path

import pytest
from PIL import Image

import web_client
from detour.config import form
from detour.config.explain import lookup
from detour.config.form_edit import key_of
from detour.config.load import load_text
from detour.web import form_api

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "examples").glob("*.yaml")), *sorted((ROOT / "tests" / "cases").glob("*.yaml"))]
P = "config.process[0]."
BEGINNING = """\
config:
  output_name: ""
  process:
    - type: train
      model:
        arch: "zimage:turbo"
        name_or_path: Tongyi-MAI/Z-Image-Turbo
        assistant_lora_path: ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors
        quantize: true
        quantize_te: true
        low_vram: true
      datasets:
        - folder_path: null
      train:
        noise_scheduler: flowmatch
        timestep_type: weighted
      sample:
        sampler: flowmatch
        sample_steps: 8
        guidance_scale: 1
        sample_every: 250
"""
GOOD = BEGINNING.replace('""', "cats").replace("null", "datasets/cats")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return web_client.signed_in(tmp_path_factory.mktemp("ui"))


def asked(client, what, **body):
    answer = client.post(f"/api/form/{what}", json=body)
    assert answer.status_code == 200, answer.json()
    return answer.json()


def dataset(client, name, pictures=2):
    folder = client.app.state.context.datasets / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        Image.new("RGB", (64, 64), (number, 90, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture")
    return folder


# The page and its description.


def test_the_page_has_no_script_or_style_of_its_own(client):
    answer = client.get("/jobs/new")
    assert answer.status_code == 200
    assert "<script>" not in answer.text
    assert "style=" not in answer.text
    for name in ("form.js", "form_fields.js", "form_editor.js", "form.css"):
        assert client.get(f"/static/{name}").status_code == 200


def test_the_description_holds_every_field_and_preset(client):
    told = client.get("/api/form").json()
    listed = {field["path"] for group in told["kinds"]["train"] for field in group["fields"]}
    rows = {row["path"] for group in told["kinds"]["train"] for field in group["fields"] for row in field["rows"]}
    assert listed | rows == {path for path in form.fields("train") if not path.endswith("[]")}
    assert told["first"] == list(form.FIRST)
    assert "zimage:turbo" in [preset["name"] for preset in told["presets"]]


# What it begins with.


def test_a_new_job_begins_as_z_image_turbo_with_its_adapter(client):
    start = client.get("/api/form/start").json()
    assert start["form"]["text"] == BEGINNING
    assert (start["form"]["preset"], start["form"]["differences"]) == ("zimage:turbo", [])
    assert [error["where"] for error in start["form"]["errors"]] == [
        "config.output_name",
        P + "datasets[0].folder_path",
    ]
    assert not client.app.state.context.datasets.exists()
    assert (start["edit"], start["copy_of"], start["folder"]) == (None, None, str(client.app.state.context.folder))


def test_a_new_job_may_begin_with_a_dataset(tmp_path):
    client = web_client.signed_in(tmp_path)
    dataset(client, "my cats")
    start = client.get("/api/form/start", params={"dataset": "my cats"}).json()
    assert 'folder_path: "datasets/my cats"\n' in start["form"]["text"]
    assert start["datasets"] == [
        {"name": "my cats", "path": "datasets/my cats", "caption_ext": "txt", "trigger_word": ""}
    ]
    assert client.get("/api/form/start", params={"dataset": "../x"}).json()["form"]["text"] == BEGINNING
    (client.app.state.context.datasets / "my cats" / ".detour").mkdir()
    (client.app.state.context.datasets / "my cats" / ".detour" / "settings.json").write_text("damaged")
    assert client.get("/api/form/start").status_code == 200


def test_editing_begins_with_the_jobs_file_and_copying_with_another_name(tmp_path):
    client = web_client.signed_in(tmp_path)
    text = "# mine\n" + GOOD
    for name in ("cats", "cats_2"):
        added = client.post("/api/jobs", json={"text": text.replace("name: cats", f"name: {name}"), "queued": False})
        assert added.status_code == 201
    edit = client.get("/api/form/start", params={"edit": 1}).json()
    assert (edit["form"]["text"], edit["edit"]) == (
        text,
        {"id": 1, "name": "cats", "state": "stopped", "draft": True, "locked": False},
    )
    copy = client.get("/api/form/start", params={"from": 1}).json()
    assert (copy["form"]["text"], copy["copy_of"]["id"]) == (text.replace("name: cats", "name: cats_3"), 1)
    assert client.get("/api/form/start", params={"edit": 7}).status_code == 404
    assert client.get("/api/form/start", params={"edit": 10**30}).status_code == 422
    changed = client.put("/api/jobs/1", json={"text": text.replace("sample_every: 250", "sample_every: 99")})
    assert changed.status_code == 200
    assert "# mine" in client.app.state.context.store.text(1)


def test_a_copy_counts_its_paths_from_where_the_job_does(tmp_path):
    client = web_client.signed_in(tmp_path / "ui")
    store = client.app.state.context.store
    (tmp_path / "elsewhere").mkdir()
    store.add(GOOD, cwd=tmp_path / "elsewhere", queued=False)
    dataset(client, "dogs")
    start = client.get("/api/form/start", params={"from": 1}).json()
    assert start["folder"] == str(tmp_path / "elsewhere")
    assert start["datasets"][0]["path"] == str(client.app.state.context.datasets / "dogs")
    added = client.post("/api/jobs", json={"text": start["form"]["text"], "queued": False, "like": 1})
    assert added.status_code == 201
    assert store.job(2).cwd == tmp_path / "elsewhere"
    assert client.post("/api/jobs", json={"text": GOOD, "queued": False, "like": 99}).status_code == 404


# Reading.


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_example_opens_without_loss(client, path):
    text = path.read_text()
    state = asked(client, "read", text=text)
    assert (state["text"], state["broken"], state["errors"]) == (text, False, [])
    assert state["foreign"] == (path.name == "aitoolkit_style.yaml")
    assert (state["preset"] is None) == (state["kinds"] == ["adapter"])
    written = load_text(text).job.config.process[0]
    shown = state["values"]["config"]["process"][0]
    assert shown["model"]["name_or_path"] == written.model.name_or_path
    assert [entry.get("prompt") for entry in shown["sample"].get("prompts", ())] == [
        prompt.prompt for prompt in written.sample.prompts
    ]
    # Setting what is there already changes nothing.
    if not state["foreign"]:
        for name in ("arch", "name_or_path"):
            value = shown["model"][name]
            assert asked(client, "set", text=text, path=f"{P}model.{name}", value=value)["text"] == text


def test_errors_come_all_at_once_with_paths_and_lines(client):
    text = GOOD.replace("8", "many").replace("quantize: true", "quantise: true") + "      network: {linear: 0}\n"
    errors = {error["where"]: error for error in asked(client, "read", text=text)["errors"]}
    assert set(errors) == {P + "sample.sample_steps", P + "model.quantise", P + "network.linear"}
    assert errors[P + "sample.sample_steps"]["line"] == text[: text.index("many")].count("\n") + 1
    assert "did you mean 'quantize'?" in errors[P + "model.quantise"]["message"]


def test_what_does_not_fit_the_architecture_is_said_at_its_option(client):
    text = GOOD.replace("flowmatch", "ddpm", 1) + "      controls: {inpaint: 0.5}\n"
    errors = asked(client, "read", text=text)["errors"]
    assert [(error["where"], error["line"]) for error in errors] == [(P + "train.noise_scheduler", 15)]
    errors = asked(client, "read", text=GOOD + "      controls: {inpaint: 0.5}\n")["errors"]
    assert [(error["where"], error["line"]) for error in errors] == [(P + "controls.inpaint", 22)]


def test_defaults_of_the_architecture_are_told_for_what_is_left_out(client):
    state = asked(client, "read", text=GOOD)
    assert state["defaults"]["train.steps"] == 3000
    assert state["defaults"]["model.qtype_te"] == "float8"
    state = asked(client, "read", text=GOOD.replace("timestep_type: weighted", "steps: 5"))
    assert "train.steps" not in state["defaults"]
    assert state["defaults"]["train.timestep_type"] == "weighted"


def test_advice_of_the_architecture_is_shown(client):
    text = GOOD.replace("        assistant_lora_path:", "        revision:")
    assert any("training adapter" in warning for warning in asked(client, "read", text=text)["warnings"])


def test_each_process_has_its_own_fields(client):
    text = GOOD + '    - type: adapter\n      model: {arch: "sdxl:turbo"}\n'
    first, second = asked(client, "read", text=text), asked(client, "read", text=text, process=1)
    assert first["kinds"] == ["train", "adapter"]
    assert (first["preset"], second["preset"]) == ("zimage:turbo", None)
    new = asked(client, "set", text=text, process=1, path="config.process[1].train.lr", value="1e-4")
    assert new["text"].endswith('      model: {arch: "sdxl:turbo"}\n      train:\n        lr: 1e-4\n')
    assert new["errors"] == []


def test_numbers_that_a_browser_cannot_hold_are_sent_as_text(client):
    text = GOOD + f"      save: {{save_every: {2**60}}}\nmeta: {{a: .inf, b: .nan, c: 0.5}}\n"
    values = asked(client, "read", text=text)["values"]
    assert values["config"]["process"][0]["save"]["save_every"] == str(2**60)
    assert values["meta"] == {"a": "inf", "b": "nan", "c": 0.5}


HOSTILE = {
    "NUL": "config: \0",
    "10 MB": "a: " + "x" * 10_000_000,
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcde", "bcdef", strict=True)),
    "object": "config: !!python/object/apply:os.system ['true']",
    "itself": "config: &a {process: [*a]}",
    "deep": "{a: " * 5000,
    "digits": "config: " + "9" * 5000,
    "half": 'config: "\\ud800"',
    "half name": '"\\ud800": 1',
    "list": "- config",
    "number": "5",
    "empty": "",
    "shapes": "config: {process: [1, {model: x, datasets: [3], train: [], sample: {prompts: {a: 1}}}]}",
    "processes": "config: {process: {a: 1}}",
    "arch": "config: {output_name: a, process: [{type: train, model: {arch: [1], variant: {}}}]}",
    "arch name": "config: {output_name: a, process: [{type: [], model: {arch: 'nope:x', name_or_path: 5}}]}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_get_a_clear_answer(client, name):
    text = HOSTILE[name]
    state = asked(client, "read", text=text)
    assert state["errors"]
    assert all(error["message"] for error in state["errors"])
    assert state["text"] == text
    for action, body in (
        ("set", {"path": P + "train.lr", "value": "1e-3"}),
        ("list", {"path": P + "datasets", "action": "add"}),
        ("list", {"path": P + "datasets", "action": "remove"}),
        ("preset", {"preset": "sd1:v1-5"}),
        ("translate", {}),
    ):
        answer = client.post(f"/api/form/{action}", json={"text": text, **body})
        assert answer.status_code in (200, 400)
        assert answer.json().get("error", "x")


def test_half_characters_in_a_request_are_refused(client):
    for body in (b'{"text": "\\ud800"}', b'{"text": "", "path": "a", "value": "\\ud800"}'):
        action = "set" if b"path" in body else "read"
        assert client.post(f"/api/form/{action}", content=body).status_code in (400, 422)


def test_a_request_says_nothing_that_the_api_does_not_know(client):
    assert client.post("/api/form/read", json={"text": "", "more": 1}).status_code == 422
    assert client.post("/api/form/list", json={"text": "", "path": "a", "action": "burn"}).status_code == 422
    assert client.post("/api/form/read", json={"text": "", "process": -1}).status_code == 422


# Changing.


def test_a_broken_text_is_left_alone(client):
    answer = client.post("/api/form/set", json={"text": GOOD + "  x: [", "path": P + "train.lr", "value": 1})
    assert answer.status_code == 400
    assert "not YAML" in answer.json()["error"]
    state = asked(client, "read", text=GOOD + "  x: [")
    assert (state["broken"], state["text"], state["errors"][0]["line"]) == (True, GOOD + "  x: [", 22)


def test_what_is_typed_wrongly_is_kept_and_said_at_its_field(client):
    state = asked(client, "set", text=GOOD, path=P + "train.lr", value="1e-")
    assert 'lr: "1e-"\n' in state["text"]
    assert [(error["where"], error["message"]) for error in state["errors"]] == [
        (P + "train.lr", "expected a number, found the text '1e-'")
    ]


def simple_value(field):
    """Some value that is not the default."""
    if field.choices:
        value = next(choice for choice in field.choices if choice != field.default)
        return [field.choices[-1]] if field.kind == "choices" else value
    values = {"switch": not field.default, "integer": "3", "number": "0.7", "numbers": "0.5, 1", "texts": ["x", "y: z"]}
    values |= {"mapping": "a: 1", "text": "some text"}
    return "64" if "resolution" in field.path else values[field.kind]


def test_every_option_of_the_schema_can_be_set(client):
    """One alone; tests/config/test_form.py has any value in any file."""
    lines = set(GOOD.splitlines())
    for path, field in form.fields("train").items():
        if field.kind == "rows" or path.endswith("[]"):
            continue
        full = path if path.startswith("config.") else P + path.replace("[]", "[0]")
        state = asked(client, "set", text=GOOD, path=full, value=simple_value(field))
        assert not state["broken"], path
        shown = lookup(state["values"], key_of(full))
        assert shown not in (None, field.default), path
        assert len(lines - set(state["text"].splitlines())) <= 1, path


def test_lists_grow_shrink_and_change_their_order(client):
    path = P + "sample.prompts"
    state = asked(client, "list", text=GOOD, path=path, action="add")
    state = asked(client, "set", text=state["text"], path=path + "[0].prompt", value="one")
    state = asked(client, "list", text=state["text"], path=path, action="add")
    state = asked(client, "set", text=state["text"], path=path + "[1].prompt", value="two: 2")
    state = asked(client, "list", text=state["text"], path=path, action="move", index=1, to=0)
    assert '        prompts:\n          - "two: 2"\n          - "one"\n' in state["text"]
    assert state["values"]["config"]["process"][0]["sample"]["prompts"] == [{"prompt": "two: 2"}, {"prompt": "one"}]
    for _ in range(2):
        state = asked(client, "list", text=state["text"], path=path, action="remove", index=0)
    assert state["text"] == GOOD
    answer = client.post("/api/form/list", json={"text": GOOD, "path": path, "action": "remove", "index": 3})
    assert answer.status_code == 400


def test_every_list_of_the_schema_can_get_an_entry(client):
    lists = [field.path for field in form.fields("train").values() if field.kind in ("rows", "texts")]
    assert {"datasets", "sample.prompts", "preserve.terms", "network.include"} <= set(lists)
    for path in lists:
        state = asked(client, "list", text=GOOD, path=P + path, action="add")
        assert not state["broken"]
        assert asked(client, "list", text=state["text"], path=P + path, action="add")["text"] != state["text"]


def test_a_file_of_ai_toolkit_is_shown_and_rewritten_on_demand(client):
    text = (ROOT / "tests" / "cases" / "aitoolkit_style.yaml").read_text()
    state = asked(client, "read", text=text)
    assert (state["foreign"], state["values"]["config"]["output_name"]) == (True, "my_first_lora_v1")
    answer = client.post("/api/form/set", json={"text": text, "path": P + "train.lr", "value": 1})
    assert answer.status_code == 400
    assert "ai-toolkit" in answer.json()["error"]
    new = asked(client, "translate", text=text)
    assert (new["foreign"], new["errors"]) == (False, [])
    assert load_text(new["text"]).job == load_text(text).job


# Checking.


def test_a_check_looks_at_pictures_and_paths(tmp_path):
    client = web_client.signed_in(tmp_path)
    dataset(client, "cats")
    report = asked(client, "check", text=GOOD)
    assert (report["ok"], report["errors"]) == (True, [])
    assert "2 pictures" in report["summary"][0]
    report = asked(client, "check", text=GOOD.replace("Tongyi-MAI/Z-Image-Turbo", "/not/there"))
    assert not report["ok"]
    assert (report["errors"][0]["line"], "/not/there" in report["errors"][0]["message"]) == (7, True)
    assert str(tmp_path) not in json.dumps(report)
    assert list((tmp_path / "cache").glob("check-*")) == []


def test_a_check_takes_no_longer_than_it_may(client, monkeypatch):
    monkeypatch.setattr(form_api, "CHECK_LIMIT", 0.01)
    answer = client.post("/api/form/check", json={"text": GOOD})
    assert answer.status_code == 400
    assert "not done after 0.01 seconds" in answer.json()["error"]
    assert list((client.app.state.context.folder / "cache").glob("check-*")) == []


def test_more_than_two_checks_at_once_are_refused(client):
    held = [form_api._checks.acquire(blocking=False) for _ in range(2)]
    try:
        assert held == [True, True]
        assert client.post("/api/form/check", json={"text": GOOD}).status_code == 409
    finally:
        for _ in held:
            form_api._checks.release()
