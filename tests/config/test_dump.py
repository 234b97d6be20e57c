"""`dump_job` writes every value and `load_job` reads back an equal job: for jobs drawn from the schema itself."""

import types
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from detour.config.job import Job, Section
from detour.config.load import changed_options, dump_job, load_job

TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["no", "1e-4", "~", "null", "0123", "2024-01-01", "<<", "=", "1:30", "a: b", "# x", " x ", "*a"]),
    st.sampled_from(["!x", "-", "'", '"', "\\", "é😀", "Yes", ".inf", "-.5e3"]),
    st.sampled_from(["0x1F", "[a]", "{a}", "?", "%a", "@", "`", "a\nb\t\x85\u2028\ufeff", "1_000", "+1", "y", "&a b"]),
)
NOTES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


def bounds(metadata):
    low = next((m.ge for m in metadata if isinstance(m, Ge)), next((m.gt for m in metadata if isinstance(m, Gt)), None))
    high = next(
        (m.le for m in metadata if isinstance(m, Le)), next((m.lt for m in metadata if isinstance(m, Lt)), None)
    )
    open_low, open_high = any(isinstance(m, Gt) for m in metadata), any(isinstance(m, Lt) for m in metadata)
    return low, high, open_low, open_high


def values(annotation, metadata=()):
    """Values of a type as they stand in a job file."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(args[0], (*metadata, *args[1:]))
    if origin in (Union, types.UnionType):
        return st.one_of([values(part, metadata) for part in args])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        least = next((m.min_length for m in metadata if isinstance(m, MinLen)), 0)
        return st.lists(values(args[0]), min_size=least, max_size=3)
    if origin is dict:
        return st.dictionaries(TEXT, NOTES if "Any" in str(args[1]) else values(args[1]), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return section(annotation)
    return scalar(annotation, metadata)


def scalar(annotation, metadata):
    low, high, open_low, open_high = bounds(metadata)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(low, high if high is not None else (low or 0) + 10**6)
    if annotation is float:
        return st.floats(low, high, exclude_min=open_low, exclude_max=open_high, allow_nan=False, allow_infinity=False)
    if annotation is Path:
        return TEXT.filter(lambda text: "\0" not in text)
    if any("pattern" in str(m) for m in metadata):
        return st.sampled_from(["auto", "cpu", "mps", "cuda", "cuda:1"])
    if annotation is type(None):
        return st.none()
    return TEXT.filter(bool) if any(isinstance(m, MinLen) for m in metadata) else TEXT


def section(model):
    """Some of a section's options, always those that it must have."""
    options = {name: values(option.annotation, option.metadata) for name, option in model.model_fields.items()}
    must = {name: options[name] for name, option in model.model_fields.items() if option.is_required()}
    return st.fixed_dictionaries(must, optional={name: options[name] for name in options if name not in must})


def loads(data):
    """The job, after taking out what its rules exclude."""
    for process in data["config"]["process"]:
        train, model, validation = (process.get(name, {}) for name in ("train", "model", "validation"))
        model.pop("layer_offloading", None)
        for name in ("epochs", "dataset_folder", "cache_text_embeddings", "min_timestep"):
            train.pop(name, None)
        if process.get("network", {}).get("type") == "full":
            model.pop("quantize", None)
        validation.pop("validate_every" if not validation.get("holdout") else "dataset", None)
        for name in ("include", "exclude"):
            process.get("network", {}).pop(name, None)
        if process["type"] == "train":
            process["datasets"] = [*process.get("datasets", []), {"folder_path": "x"}]
        else:
            process["network"] = {}
            process["model"].pop("assistant_lora_path", None)
            process.get("adapter", {}).pop("stop", None)
    try:
        return Job.model_validate(data)
    except ValidationError:
        return None


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=section(Job))
def test_every_job_reads_back_equal(tmp_path, data):
    job = loads(data)
    assume(job is not None)
    path = tmp_path / "job.yaml"
    text = dump_job(job)
    path.write_text(text, encoding="utf-8")
    loaded = load_job(path)
    assert loaded.job == job
    assert loaded.notes == []
    assert dump_job(loaded.job) == text
    # YAML 1.1 readers agree on every value too.
    assert yaml.safe_load(text) == job.model_dump(mode="json")


def test_most_drawn_jobs_are_valid():
    """The test above must not be passing on nothing."""
    valid = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=section(Job))
    def draw(data):
        valid.append(loads(data) is not None)

    draw()
    assert sum(valid) > len(valid) / 4


def test_every_option_is_written(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        "config: {output_name: a, process: [{type: train, model: {arch: zimage}, train: {dataset_folder: x}}]}"
    )
    text = dump_job(load_job(path).job)
    plain = yaml.safe_load(text)["config"]["process"][0]
    process = load_job(path).job.config.process[0]
    for name in ("model", "train", "network", "sample", "save", "validation", "logging"):
        assert list(plain[name]) == list(type(getattr(process, name)).model_fields)
    assert "        lr: 0.0001\n" in text
    assert "        resolution" not in text
    assert "        times: [0.25, 0.5, 0.75, 1.0]\n" in text


NASTY = [
    ".5",
    "no", "yes", "On", "off", "y", "N", "null", "~", "true", ".inf", ".nan", "-.5e3", "1e-4", "1E5", "+1", "0123",
    "0x1F", "0o7", "1_000", "1:30", "2024-01-01", "<<", "=", "-", "?", "*", "&", "!", "%", "@", "`", "'",
    "", " ", " x ", "a: b", "# x", "a #b", "a\nb", "\ttab", '"', "\\", "\\n", "[a]", "{a}", "é", "😀", "\x85", "\u2028",
    "\ufeff", "\0", "\x7f", "x" * 5000,
]  # fmt: skip
NUMBERS = [1e-4, 1e-7, 1e22, 1e300, 5e-324, -0.0, 0.1, 3.0, 10**20, -1, 0]


@pytest.mark.parametrize(
    "value", [*NASTY, *NUMBERS, [NASTY, [NUMBERS]], {"a": [], "b": {}, "c": [{}, [[]], {"d": [1]}]}]
)
def test_no_value_turns_into_another(tmp_path, value):
    """Read back by YAML 1.2 (ours) and by YAML 1.1 (PyYAML), of the same type."""
    job = Job.model_validate(
        {
            "config": {
                "output_name": "a",
                "process": [{"type": "train", "model": {"arch": "zimage"}, "train": {"dataset_folder": "x"}}],
            },
            "meta": {"value": value} | ({value: 1} if isinstance(value, str) and len(value) < 1000 else {}),
        }
    )
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(job), encoding="utf-8")
    assert repr(load_job(path).job.meta) == repr(job.meta)
    assert repr(yaml.safe_load(path.read_text(encoding="utf-8"))["meta"]) == repr(job.meta)


def test_changed_options_are_named_with_both_values(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        "config: {output_name: a, process: [{type: train, model: {arch: zimage}, datasets: [{folder_path: x}]}]}"
    )
    texts = [
        dump_job(load_job(path, overrides).job)
        for overrides in ([], ["train.lr=1e-3", "datasets.0.resolution=[512, 768]", "sample.prompts.0.prompt=a cat"])
    ]
    assert changed_options(texts[0], texts[0]) == []
    found = changed_options(*texts)
    assert found[:2] == ["train.lr: 0.0001 -> 0.001", "datasets[0].resolution: [1024] -> [512, 768]"]
    assert 'sample.prompts[0].prompt: not set -> "a cat"' in found
    assert "train.lr: 0.001 -> 0.0001" in changed_options(*reversed(texts))
