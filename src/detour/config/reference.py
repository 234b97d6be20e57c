"""Writes the reference of job files from the schema, so that it cannot drift: a test compares the files with this.

python -m detour.config.reference > docs/options.md
python -m detour.config.reference schema > docs/job.schema.json
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from detour.config import aitoolkit_keys as keys
from detour.config.aitoolkit_part import shown
from detour.config.explain import pattern_words
from detour.config.job import QTYPE_ALIASES
from detour.config.load import json_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROCESS = "config.process[]"
COMMAND = "python -m detour.config.reference > docs/options.md"
SCHEMA_COMMAND = "python -m detour.config.reference schema > docs/job.schema.json"

_INTRO = f"""\
# Options of a job file

<!-- Written by `{COMMAND}`; change the schema in src/detour/config/ instead. -->

A job file is YAML (1.2). Its shape:

```yaml
config:
  output_name: my_lora
  process:
    - type: train
      model: {{arch: zimage, ...}}
      train: {{...}}
      network: {{...}}
      datasets: [{{folder_path: ./dataset, ...}}]
      sample: {{...}}
      save: {{...}}
```

- Only `config.output_name`, `type`, `model.arch` and the pictures have to be given. `detour check JOB.yaml` reports
  every mistake at once, with its line; the run's folder gets a `job.yaml` in which every value is visible.
- Where no default is shown, the option is not set, or set as its text says. What depends on the architecture is listed
  by `detour archs`.
- Relative paths start from the folder that the command runs in.
- `--set path=value` changes a value for one run: `--set train.lr=5e-5`, `--set datasets.0.num_repeats=2`,
  `--set process.1.train.steps=500` where there are several processes. The value is YAML.
- Editors complete and check a file whose first line is `# yaml-language-server: $schema=` with the address or path of
  `docs/job.schema.json` (`detour schema` prints it).
- Job files of ai-toolkit are read too, see [below](#job-files-of-ai-toolkit).
"""

_TIMES = """\
## Times

Training draws a time t for every picture: 0 is the clean picture, 1 is noise. `train.timestep_type` says how.

| `timestep_type` | times | loss weight |
|---|---|---|
| `linear` | all alike | 1 |
| `weighted` | all alike | 0.45 at t = 0, 0.72 at 0.1, 0.86 at 0.45, 1.5 at 0.85 to 0.93, 0.91 at 1 (mean 1) |
| `sigmoid` | the sigmoid of a normal number: most around 0.5, few at the ends | 1 |
| `shift` | even times u pushed to noise as the model's schedule does, `s u / (1 + (s - 1) u)`; Z-Image: s = 3 | 1 |
| `lognorm_blend` | three quarters log-normal around 0.66, one quarter even | 1 |
| `next_sample` | those of sampling in 8 steps; the model takes a step by itself and is trained where it arrives | 1 |
| `one_step` | 1 | 1 |
| `two_step` | 1, 0.501 | 1 |
| `four_step` | 1, 0.75, 0.5, 0.25 | 1 |
| `eight_step` | 1, 0.875, ... 0.125 | 1 |

`timestep_bias` shifts any of them: `high_noise` to times near 1, where composition is decided, `low_noise` to times
near 0, where texture is. `min_timestep` and `max_timestep` cut the ends off; what is left keeps its shape.
"""

_QUANTISATION = """\
## Quantisation

`model.quantize: true` holds the linear layers of the frozen model in `model.qtype`. Gradients flow through all of
these; the LoRA itself is always float32. The names of quanto in other trainers' files run as the type of that width.

| runs as | bytes a weight | library | names in job files |
|---|---|---|---|
"""
_QTYPE_FACTS = {"int8": ("1.01", "torchao"), "float8": ("1.01", "torchao"), "nf4": ("0.52", "bitsandbytes")}

_AITOOLKIT = """\
## Job files of ai-toolkit

A file with `job: extension`, or with a process of type `diffusion_trainer`, `sd_trainer` or `ui_trainer`, is read as
ai-toolkit reads it: its names, its defaults (a file without `lr` trains at 1e-6), its `[name]`. `detour check` lists
what works out differently. The main differences:

- Gradient accumulation averages here and adds up there.
- `linear_alpha` is ignored for transformers there (alpha is the rank), so also here, when the file is in that layout.
- `unload_text_encoder: true` drops the captions there; here captions always count.
- `min_denoising_steps` and `max_denoising_steps` are places in a list of 1000 falling times; they become
  `max_timestep` and `min_timestep`.
- `content_or_style: content` is `timestep_bias: high_noise`, `style` is `low_noise`.
- `loss_type: pseudo_huber` runs as `huber` with `huber_delta: 0.01`.
- `optimizer: prodigy` with an `lr` below 0.1 runs with 1.0, as there. `eps` is 1e-6, as there.
- `lr_scheduler: linear` rises from a third of `lr` there. It is an error here, unless `lr_scheduler_params` has
  `start_factor: 1.0`.
- A name that ai-toolkit does not know is an error here. There it is ignored.

"""


def options_markdown() -> str:
    """The text of docs/options.md."""
    return "\n".join([_INTRO, *_sections(), _TIMES, _quantisation(), _aitoolkit()])


def schema_json() -> str:
    """The text of docs/job.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _sections() -> Iterator[str]:
    """A table for each section, outer ones first."""
    schema = json_schema()
    waiting, seen = [("", schema)], {""}
    while waiting:
        path, section = waiting.pop(0)
        rows = [
            _row(name, option, name in section.get("required", ())) for name, option in section["properties"].items()
        ]
        table = ["| option | allowed | default | meaning |", "|---|---|---|---|", *rows]
        yield f"## {_title(path, section)}\n\n{_flat(section['description'])}\n\n" + "\n".join(table) + "\n"
        prefix = "" if path in ("", _PROCESS) else f"{path}."
        inner = [
            (f"{prefix}{name}" + ("[]" if option.get("type") == "array" else ""), kind)
            for name, option in section["properties"].items()
            for kind in _inner(option)
            if kind not in seen
        ]
        seen |= {kind for _, kind in inner}
        waiting = [(place, schema["$defs"][kind]) for place, kind in inner] + waiting


def _title(path: str, section: dict[str, Any]) -> str:
    if path == _PROCESS:
        return f"A process of type `{section['properties']['type']['const']}`"
    return f"`{path}`" if path else "The file"


def _inner(option: dict[str, Any]) -> list[str]:
    """Names of the sections that an option holds."""
    if "$ref" in option:
        return [option["$ref"].rsplit("/", 1)[-1]]
    parts = [*option.get("anyOf", ()), *option.get("oneOf", ()), option.get("items", {})]
    return [name for part in parts if part for name in _inner(part)]


def _row(name: str, option: dict[str, Any], required: bool) -> str:
    default = "required" if required else _default(option)
    return f"| `{name}` | {allowed(option)} | {default} | {_flat(option.get('description', ''))} |"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(option: dict[str, Any]) -> str:
    value = option.get("default")
    if value is None or isinstance(value, dict) or "$ref" in option:
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`" if value != "" else "empty"


def allowed(option: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "enum" in option or "const" in option:
        return ", ".join(f"`{name}`" for name in option.get("enum", [option.get("const")]))
    if "$ref" in option:
        return "section"
    if forms := option.get("anyOf") or option.get("oneOf"):
        parts = [allowed(part) for part in forms if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    kind = option.get("type")
    if kind == "array":
        return f"list of: {allowed(option.get('items', {}))}"
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "object": "section"}
    text = "path" if option.get("format") == "path" else words.get(str(kind), "text")
    if "pattern" in option:
        text = pattern_words(option["pattern"]) if "title" in option else str(option["description"])
    return ", ".join([text, *_bounds(option)])


def _bounds(option: dict[str, Any]) -> Iterator[str]:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    for name, word in words.items():
        if name in option:
            yield f"{word} {option[name]:g}"


def _quantisation() -> str:
    rows = []
    for kind, (size, library) in _QTYPE_FACTS.items():
        names = ", ".join(f"`{name}`" for name, ours in QTYPE_ALIASES.items() if ours == kind)
        rows.append(f"| `{kind}` | {size} | {library} | {names} |")
    return _QUANTISATION + "\n".join(rows) + "\n"


def _aitoolkit() -> str:
    tables = {
        "": keys.PROCESS, "model": keys.MODEL, "network": keys.NETWORK, "save": keys.SAVE, "datasets": keys.DATASET,
        "train": keys.TRAIN, "sample": keys.SAMPLE, "logging": keys.LOGGING,
    }  # fmt: skip
    lists = []
    for kind, title in (("noted", "Listed as left out, without an effect on the training:"), ("refused", "Errors:")):
        reasons: dict[str, list[str]] = {}
        for section, rules in tables.items():
            for name, rule in rules.items():
                if rule.kind == kind:
                    option = f"{section}.{name}".removeprefix(".")
                    fine = f" (other than {' or '.join(map(shown, rule.fine))})" if rule.fine else ""
                    reasons.setdefault(rule.why, []).append(f"`{option}`{fine}")
        lists.append("\n".join([title, "", *(f"- {', '.join(names)}: {why}." for why, names in reasons.items()), ""]))
    return _AITOOLKIT + "\n".join(lists)


if __name__ == "__main__":
    sys.stdout.write(schema_json() if sys.argv[1:] == ["schema"] else options_markdown())
