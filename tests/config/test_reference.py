"""The shipped job files, the schema for editors and the table of options: each is compared with the code."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from detour import archs
from detour.config import reference
from detour.config.job import Job, TimestepType
from detour.config.load import json_schema, load_job

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
CASES = sorted((ROOT / "tests" / "cases").glob("*.yaml"))


def errors(value, schema, whole, where="$"):
    """A small JSON Schema validator: the keywords that the schema of job files uses."""
    if "$ref" in schema:
        yield from errors(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole, where)
    forms = schema.get("anyOf", []) + schema.get("oneOf", [])
    if forms and all(list(errors(value, part, whole, where)) for part in forms):
        yield f"{where}: none of the forms"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} not in {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r} is not {schema['const']!r}"
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
        "null": type(None),
    }  # fmt: skip
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        yield f"{where}: {value!r} is not of type {kind}"
        return
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        yield f"{where}: {value!r} does not match {schema['pattern']}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value < schema.get("minimum", value) or value > schema.get("maximum", value):
            yield f"{where}: {value} is out of bounds"
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            yield f"{where}: {value} is out of bounds"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{where}: {name} is missing"
        for name, inner in value.items():
            further = schema.get("additionalProperties", True)
            if name in known:
                yield from errors(inner, known[name], whole, f"{where}.{name}")
            elif further is False:
                yield f"{where}.{name}: unknown"
            elif isinstance(further, dict):
                yield from errors(inner, further, whole, f"{where}.{name}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from errors(item, schema.get("items", {}), whole, f"{where}[{index}]")


def plain(path):
    """The file's values as YAML 1.2 sees them."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(path)


def test_there_are_examples():
    assert len(EXAMPLES) >= 7
    assert len(CASES) == 2


@pytest.mark.parametrize("path", [*EXAMPLES, *CASES], ids=lambda path: path.name)
def test_every_shipped_job_file_loads_and_fits_its_architecture(path):
    job = load_job(path).job
    assert len(job.config.process) > 0
    for process in job.config.process:
        resolved = archs.resolve(process)
        assert None not in (resolved.model.name_or_path, resolved.train.timestep_type, resolved.sample.sample_steps)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_right_for_editors_too(path):
    first = path.read_text().splitlines()[0]
    address = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / address).resolve() == ROOT / "docs" / "job.schema.json"
    schema = json.loads((path.parent / address).read_text())
    assert list(errors(plain(path), schema, schema)) == []


def test_the_example_of_the_main_job_is_the_job_of_record():
    """Everything that the job of record says, the example says too (its dataset in the long form)."""
    case = ROOT / "tests" / "cases" / "zimage_turbo_24gb.yaml"
    record, example = (
        load_job(case).job.config,
        load_job(ROOT / "examples" / "train_lora_zimage_turbo_24gb.yaml").job.config,
    )
    assert (record.output_name, record.output_folder) == (example.output_name, example.output_folder)
    theirs, ours = archs.resolve(record.process[0]), archs.resolve(example.process[0])
    assert theirs.model == ours.model
    assert theirs.all_datasets[0].folder_path == ours.all_datasets[0].folder_path
    written = plain(case)["config"]["process"][0]
    for name in {*written["train"]} - {"dataset_folder", "unload_text_encoder"}:  # the example lets the encoder go
        assert getattr(theirs.train, name) == getattr(ours.train, name)
    for section in ("network", "sample"):
        for name in written[section]:
            assert getattr(getattr(theirs, section), name) == getattr(getattr(ours, section), name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train_lora_zimage_turbo_24gb.yaml", ("turbo", 8, 1.0, True)),
        ("train_lora_zimage_turbo_12gb.yaml", ("turbo", 8, 1.0, True)),
        ("train_lora_zimage_turbo_advanced.yaml", ("turbo", 8, 1.0, True)),
        ("train_lokr_zimage_turbo.yaml", ("turbo", 8, 1.0, True)),
        ("train_lora_zimage_base.yaml", ("base", 30, 4.0, False)),
        ("train_lora_zimage_deturbo.yaml", ("deturbo", 25, 3.0, False)),
        ("finetune_zimage_base_80gb.yaml", ("base", 30, 4.0, False)),
    ],
)
def test_a_distilled_model_has_its_adapter_and_the_others_none(name, expected):
    process = archs.resolve(load_job(ROOT / "examples" / name).job.config.process[0])
    adapter = process.model.assistant_lora_path is not None
    assert (process.model.variant, process.sample.sample_steps, process.sample.guidance_scale, adapter) == expected


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("qtype: qfloat8", True), ("qtype: float8", True), ("qtype: qfloat9", False), ("arch: 'zimage:turbo'", True),
        ("arch: 'zimag:turbo'", False), ("arch: zimag", False), ("quantize: 1.5", False), ("lora: x", False),
    ],
)  # fmt: skip
def test_the_schema_knows_the_short_and_the_other_names(text, right):
    model = {"arch": "zimage"} | yaml.safe_load(text)
    job = {"config": {"output_name": "a", "process": [{"type": "train", "model": model}]}}
    assert (list(errors(job, json_schema(), json_schema())) == []) is right


def test_the_schema_knows_short_forms_of_lists():
    dataset = {"folder_path": "x", "resolution": 512}
    job = {
        "config": {
            "output_name": "a",
            "process": [
                {"type": "train", "model": {"arch": "zimage"}, "datasets": [dataset], "sample": {"prompts": ["a cat"]}}
            ],
        }
    }
    assert list(errors(job, json_schema(), json_schema())) == []
    dataset["resolution"] = [8]
    assert list(errors(job, json_schema(), json_schema())) != []


def test_the_schema_describes_every_option():
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    sections = {name: section for name, section in schema["$defs"].items() if "properties" in section}
    assert len(sections) >= 11
    assert all(section["description"] for section in sections.values())
    undescribed = [
        f"{section}.{name}"
        for section, content in sections.items()
        for name, option in content["properties"].items()
        if "description" not in option and "$ref" not in option
    ]
    assert undescribed == []
    assert set(Job.model_fields) == set(schema["properties"])


@pytest.mark.parametrize(
    ("file", "text", "command"),
    [
        ("options.md", reference.options_markdown, reference.COMMAND),
        ("job.schema.json", reference.schema_json, reference.SCHEMA_COMMAND),
    ],
)
def test_the_written_reference_is_what_the_code_says(file, text, command):
    assert (ROOT / "docs" / file).read_text() == text(), f"docs/{file} is out of date; write it again: {command}"


def test_the_reference_names_everything():
    text = reference.options_markdown()
    for option in [name for section in json_schema()["$defs"].values() for name in section.get("properties", ())]:
        assert f"| `{option}` |" in text
    for name in get_args(TimestepType):
        assert f"| `{name}` |" in text.partition("## Times")[2]
