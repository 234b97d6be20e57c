"""The schema as fields of a form, and what a form does to the text of a job file."""

from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detour import UserError
from detour.config import form, form_edit
from detour.config.document import dotted, parse
from detour.config.explain import check, lookup
from detour.config.job import Job

ROOT = Path(__file__).parents[2]
TEXTS = {
    path.name: path.read_text()
    for path in (*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "tests" / "cases" / "zimage_turbo_24gb.yaml")
}
P = "config.process[0]."
SMALL = """\
config:
  output_name: cat
  process:
    - type: train
      model: {arch: zimage}
      datasets:
        - folder_path: ./cats  # theirs
"""


def process(text):
    return parse(text, "x").data["config"]["process"][0]


# The fields.


def schema_paths(section, schema, prefix=""):
    """Every option in the schema, from a section down."""
    for name, option in section["properties"].items():
        if "const" in option:
            continue
        parts = [part for part in option.get("anyOf", [option]) if part.get("type") != "null"]
        inner = parts[0].get("$ref") or (parts[0].get("items", {})).get("$ref")
        many = "[]." if "$ref" in parts[0].get("items", {}) else "."
        if "$ref" not in parts[0]:
            yield f"{prefix}{name}"
        if inner:
            yield from schema_paths(schema["$defs"][inner.rpartition("/")[2]], schema, f"{prefix}{name}{many}")


@pytest.mark.parametrize(("kind", "section"), [("train", "TrainProcess"), ("adapter", "AdapterProcess")])
def test_every_option_of_the_schema_is_a_field(kind, section):
    schema = Job.model_json_schema(mode="serialization")
    wanted = {*schema_paths(schema["$defs"][section], schema), "config.output_name", "config.output_folder"}
    fields = form.fields(kind)
    assert {path for path in fields if not path.endswith("[]")} == wanted
    assert len(wanted) > 100
    assert all(field.help and field.label for field in fields.values())
    assert all(group.help for group in form.kinds()[kind])


def test_the_tables_of_the_form_name_what_there_is():
    paths = {path for kind in form.kinds() for path in form.fields(kind)}
    names = {path.removesuffix("[]").rpartition(".")[2] for path in paths}
    assert set(form.FIRST) <= paths
    assert set(form._LABELS) <= paths | names
    assert set(form._UNITS) <= paths | names
    assert set(form._GROUPS) <= {group.name for groups in form.kinds().values() for group in groups}


def test_a_field_says_what_the_schema_says():
    fields = form.fields("train")
    lr, kind, prompts = fields["train.lr"], fields["train.timestep_type"], fields["sample.prompts"]
    assert (lr.label, lr.kind, lr.default, lr.allowed, lr.first) == (
        "Learning rate", "number", 1e-4, "number, at least 0", "always",
    )  # fmt: skip
    assert "Prodigy" in lr.help
    assert (kind.kind, kind.default, "weighted" in kind.choices) == ("choice", None, True)
    assert (prompts.kind, prompts.short, prompts.rows[0].path) == (
        "rows", ("prompt",), "sample.prompts[].prompt",
    )  # fmt: skip
    assert form.fields("adapter")["train.lr"].default == 1e-5
    assert form.fields("adapter")["adapter.sizes"].short == ("width", "height")
    assert fields["config.output_name"].required
    assert not fields["preserve.delta.model"].required
    assert fields["save.save_every"].unit == "steps"


# One option is set.


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("train.lr", "5e-5", 5e-5), ("train.lr", 0.001, 0.001), ("train.steps", " 200 ", 200),
        ("train.lr", "fast", "fast"),
        ("model.quantize", True, True), ("model.qtype", "nf4", "nf4"),
        ("datasets[0].resolution", "512, 768", [512, 768]),
        ("datasets[0].resolution", [256], [256]), ("save.formats", "comfy,kohya", ["comfy", "kohya"]),
        ("train.optimizer_params", "weight_decay: 0.1", {"weight_decay": 0.1}),
        ("train.optimizer_params", "{betas: [0.9, 0.99]}", {"betas": [0.9, 0.99]}),
        ("train.optimizer_params", "nonsense", "nonsense"), ("network.include", ["a", "b"], ["a", "b"]),
        ("validation.dataset.folder_path", "held", "held"), ("preserve.terms[0].target", "frozen", "frozen"),
        ("preserve.drift.measure", True, True), ("trigger_word", "5", "5"),
    ],
)  # fmt: skip
def test_a_value_goes_where_it_belongs(path, value, expected):
    new = form_edit.set_value(SMALL, P + path, value)
    assert lookup(process(new), form_edit.key_of(path)) == expected
    assert set(SMALL.splitlines()) - set(new.splitlines()) <= {"      model: {arch: zimage}"}
    if not isinstance(expected, bool):
        assert form_edit.set_value(new, P + path, value) == new


def test_numbers_stay_as_they_are_typed():
    assert "lr: 5e-5\n" in form_edit.set_value(SMALL, P + "train.lr", "5e-5")


@pytest.mark.parametrize(
    ("path", "value", "default"),
    [("train.lr", "1e-3", "0.0001"), ("train.lr", "1e-3", ""), ("network.linear", 8, " "),
     ("train.loss_type", "huber", ""),
     ("preserve.drift.measure", True, False), ("train.epochs", 3, None),
     ("datasets[0].caption_ext", "caption", "txt"), ("datasets[0].flip_x", True, False), ("trigger_word", "w", ""),
     ("save.formats", "kohya", "comfy"), ("save.formats", "kohya", ""), ("network.exclude", ["x"], []),
     ("train.optimizer_params", "{a: 1}", ""), ("validation.dataset.folder_path", "x", None)],
)  # fmt: skip
def test_only_what_differs_from_the_default_stands_in_the_text(path, value, default):
    new = form_edit.set_value(SMALL, P + path, value)
    assert new != SMALL
    assert form_edit.set_value(new, P + path, default) == SMALL
    assert form_edit.set_value(SMALL, P + path, default) == SMALL


def test_a_line_with_a_comment_stays_when_its_default_is_set():
    text = SMALL.replace("# theirs", "# theirs\n          flip_x: true  # mirrored")
    assert "flip_x: false  # mirrored\n" in form_edit.set_value(text, P + "datasets[0].flip_x", False)


def test_what_has_to_be_given_is_not_taken_out():
    assert 'output_name: ""\n' in form_edit.set_value(SMALL, "config.output_name", "")
    assert "folder_path: null  # theirs\n" in form_edit.set_value(SMALL, P + "datasets[0].folder_path", None)


def test_short_forms_are_written_out_when_they_must_be():
    text = SMALL + "      sample:\n        prompts:\n          - a cat\n"
    assert form_edit.set_value(text, P + "sample.prompts[0].prompt", "a dog").endswith('          - "a dog"\n')
    assert form_edit.set_value(text, P + "sample.prompts[0].seed", None) == text
    longer = form_edit.set_value(text, P + "sample.prompts[0].seed", 7)
    assert longer.endswith("          - prompt: a cat\n            seed: 7\n")
    sizes = "config:\n  output_name: a\n  process:\n    - type: adapter\n      adapter:\n        sizes: [512]\n"
    new = form_edit.set_value(sizes, P + "adapter.sizes[0].width", 768)
    assert process(new)["adapter"]["sizes"] == [{"width": 768, "height": 512}]


def test_entries_are_added_taken_out_and_moved():
    text = form_edit.add_entry(SMALL, P + "datasets", {"folder_path": None})
    text = form_edit.change_entry(text, P + "datasets", "move", 0, 1)
    assert [entry["folder_path"] for entry in process(text)["datasets"]] == [None, "./cats"]
    assert form_edit.change_entry(text, P + "datasets", "remove", 0) == SMALL
    text = form_edit.add_entry(SMALL, P + "preserve.prompts", "x")
    assert process(text)["preserve"] == {"prompts": ["x"]}
    with pytest.raises(UserError, match="is not a list"):
        form_edit.add_entry(SMALL, P + "train.lr", 1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("config.process[0].train.lrr", "no such option"), ("config.process[0].type", "no such option"),
        ("meta.x", "no such option"), ("", "not the path"), ("a[b]", "not the path"), ("__class__", "no such option"),
        ("config.process[99999999].x", "not the path"), ("config..x", "not the path"), ("x" * 5000, "no such option"),
        ("config.process[5].train.lr", "no such place"),
    ],
)  # fmt: skip
def test_only_options_can_be_set(path, message):
    with pytest.raises(UserError, match=message):
        form_edit.set_value(SMALL, path, 1)


def test_half_characters_are_refused():
    with pytest.raises(UserError, match="half a character"):
        form_edit.set_value(SMALL, "config.output_name", "\ud800")
    for text in ('config: "\\ud800"', '"\\ud800": 1'):
        problems = parse(text, "x").problems
        assert len(problems) == 1
        assert "half a character" in problems[0].what


# Any option, any value, any file.

_BOUNDS = {"minimum": "min_value", "maximum": "max_value"}


def values(option):
    """Values that an option of the schema allows."""
    forms = [part for part in option.get("anyOf", [option]) if part.get("type") != "null"]
    if len(forms) > 1:
        return st.one_of(*(values(part) for part in forms))
    bare = forms[0]
    bounds = {ours: bare[name] for name, ours in _BOUNDS.items() if name in bare}
    if "enum" in bare:
        return st.sampled_from(bare["enum"])
    match bare["type"]:
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(**{"min_value": 0, "max_value": 2**64, **bounds})
        case "number":
            low = bare.get("exclusiveMinimum", bare.get("minimum", 0))
            high = bare.get("exclusiveMaximum", bare.get("maximum", 1e6))
            return st.floats(low, high, exclude_min="exclusiveMinimum" in bare, exclude_max="exclusiveMaximum" in bare)
        case "array":
            return st.lists(values(bare["items"]), min_size=1, max_size=3)
        case "object":
            return st.dictionaries(st.text(min_size=1, max_size=5), st.floats(0, 1), min_size=1, max_size=2)
    texts = st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text)
    return st.sampled_from(["auto", "cpu", "cuda:1"]) if "pattern" in bare else texts


SCHEMA = Job.model_json_schema(mode="serialization")


def option_at(path, section):
    """The schema of an option."""
    schema = SCHEMA
    here = schema["$defs"]["JobConfig" if path.startswith("config.") else section]
    for name in path.removeprefix("config.").split("."):
        if "properties" not in here:
            parts = [part for part in here.get("anyOf", [here]) if part.get("type") != "null"]
            reference = parts[0].get("$ref") or parts[0]["items"]["$ref"]
            here = schema["$defs"][reference.rpartition("/")[2]]
        here = here["properties"][name.removesuffix("[]")]
    return here["items"] if path.endswith("[]") else here


def put(data, key, value):
    """The same change, to the values."""
    here = data
    for part, following in pairwise(key):
        empty = [] if isinstance(following, int) else {}
        if isinstance(here, list):
            here.extend([empty] * (part + 1 - len(here)))
            here[part] = empty if here[part] is None else here[part]
        else:
            here[part] = empty if here.get(part) is None else here[part]
        here = here[part]
    if isinstance(here, list):
        here[key[-1] :] = [value]
    else:
        here[key[-1]] = value


def blocks(old, new):
    """In how many places two texts differ, by lines."""
    codes = SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False).get_opcodes()
    return sum(code[0] != "equal" for code in codes)


def comments(text):
    return [line for line in text.splitlines() if line.strip().startswith("#")]


SETTABLE = {
    kind: sorted(path for path, field in form.fields(kind).items() if field.kind != "rows") for kind in form.kinds()
}
SECTIONS = {"train": "TrainProcess", "adapter": "AdapterProcess"}


def drawn_change(data, kind):
    """A field of a kind of process, the path to set, and a value."""
    path = data.draw(st.sampled_from(SETTABLE[kind]))
    value = data.draw(values(option_at(path, SECTIONS[kind])))
    full = path if path.startswith("config.") else P + path
    return form.fields(kind)[path], full.replace("[]", "[0]"), value


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_setting_any_option_gives_a_job_with_that_value_and_leaves_every_other_line(data):
    text = TEXTS[data.draw(st.sampled_from(sorted(TEXTS)))]
    field, full, value = drawn_change(data, process(text)["type"])
    new = form_edit.set_value(text, full, value)

    wanted = form_edit.expanded(parse(text, "x").data)
    put(wanted, form_edit.key_of(full), value)
    if value == field.default and lookup(parse(text, "x").data, form_edit.key_of(full)) is None:
        assert new == text  # so a section that may be left out is not begun by a default
        return
    job, problems = check(wanted)
    found, said = check(parse(new, "x").data)
    assert found == job, dotted(form_edit.key_of(full))
    assert {problem.what for problem in said} == {problem.what for problem in problems}
    assert blocks(text, new) <= 1
    assert comments(new) == comments(text)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_walk_of_changes_ends_where_the_same_walk_over_the_values_ends(data):
    text = TEXTS[data.draw(st.sampled_from(sorted(TEXTS)))]
    wanted = form_edit.expanded(parse(text, "x").data)
    kept = comments(text)
    for _ in range(data.draw(st.integers(2, 6))):
        field, full, value = drawn_change(data, process(text)["type"])
        if value == field.default:
            continue
        text = form_edit.set_value(text, full, value)
        put(wanted, form_edit.key_of(full), value)
    assert check(parse(text, "x").data)[0] == check(wanted)[0]
    assert comments(text) == kept
