"""Which model a job file trains, in what it differs from that model's preset, and what another preset would change."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, JsonValue

from detour import UserError, archs
from detour.archs.presets import Preset, presets
from detour.config import form
from detour.config.explain import lookup
from detour.config.form_edit import kind_of
from detour.config.job import QTYPE_ALIASES

_SAME_WHEN_ABSENT = (
    "model.variant", "model.name_or_path", "model.extras_name_or_path", "train.noise_scheduler", "train.timestep_type",
    "sample.sampler", "sample.sample_steps", "sample.guidance_scale",
)  # fmt: skip
"""Options that come to what the preset says when they are left out (`archs.resolve`)."""


class Difference(BaseModel):
    """An option that is not as the preset says."""

    path: str
    """From the process down."""
    label: str
    value: JsonValue
    preset: JsonValue


class Choice:
    """A process of a job file, and its preset."""

    def __init__(self, data: dict[str, Any], process: int) -> None:
        """`data` with short forms written out (`form_edit.expanded`)."""
        self._process = lookup(data, ("config", "process", process))
        self._kind = kind_of(data, process)
        self.preset = self._found() if self._has_presets() else None

    def differences(self) -> list[Difference]:
        """What was changed by hand."""
        if self.preset is None:
            return []
        fields = form.fields(self._kind)
        return [
            Difference(path=path, label=fields[path].label, value=self._value(path), preset=value)
            for path, value in self.preset.values.items()
            if path not in ("model.arch", "model.variant") and not self._as_preset(path, value)
        ]

    def changes(self, name: str, overwrite: list[str]) -> dict[str, Any]:
        """What to set for another preset, by path. What was changed by hand stays, but for the paths in `overwrite`."""
        wanted = named(name)
        if not self._has_presets():
            raise UserError("presets are for processes of type train")
        by_hand = {difference.path for difference in self.differences()}
        if self.preset is None:
            by_hand = {path for path in wanted.values if self._given(path) is not None} - {"model.arch"}
        changed = {path: value for path, value in wanted.values.items() if path not in by_hand or path in overwrite}
        changed = {path: value for path, value in changed.items() if not self._stands(path, value)}
        return changed | self._resolutions(wanted)

    def defaults(self) -> dict[str, Any]:
        """What the options come to that a file may leave to the preset, by path."""
        if self.preset is None:
            return {}
        return {path: self.preset.values[path] for path in _SAME_WHEN_ABSENT if self.preset.values[path] is not None}

    def new_entry(self, field: form.FormField) -> Any:  # noqa: ANN401
        """What an entry of a list starts with."""
        if len(field.short) == 1:
            return ""
        entry: dict[str, Any] = {row.path.rpartition(".")[2]: None for row in field.rows if row.required}
        if field.path == "datasets" and self.preset is not None:
            entry |= self.preset.other_resolution
        return entry

    def _has_presets(self) -> bool:
        """Presets are for training: making an adapter wants none of its own."""
        return isinstance(self._process, dict) and "datasets" in form.fields(self._kind)

    def _found(self) -> Preset | None:
        """The variant that the file names, or that of the repository, or the architecture's default."""
        model = {name: self._given(f"model.{name}") for name in ("arch", "variant", "name_or_path")}
        if not isinstance(model["arch"], str):
            return None
        name, _, variant = model["arch"].partition(":")
        if name not in archs.built():
            return None
        facts = archs.spec(archs.name_of(name))
        of_repo = [key for key, known in facts.variants.items() if known.repo == model["name_or_path"]]
        chosen = model["variant"] or variant or next(iter(of_repo), facts.default_variant)
        return next((preset for preset in presets() if preset.name == f"{name}:{chosen}"), None)

    def _given(self, path: str) -> Any:  # noqa: ANN401
        return lookup(self._process, tuple(path.split(".")))

    def _value(self, path: str) -> Any:  # noqa: ANN401
        given = self._given(path)
        return form.fields(self._kind)[path].default if given is None else given

    def _as_preset(self, path: str, value: Any) -> bool:  # noqa: ANN401
        given = self._given(path)
        if given is None:
            return path in _SAME_WHEN_ABSENT or self._is_default(path, value)
        if path == "model.qtype" and isinstance(given, str):
            given = QTYPE_ALIASES.get(given, given)
        if path == "model.extras_name_or_path" and value is None:
            return bool(given == self._given("model.name_or_path"))
        return bool(given == value)

    def _stands(self, path: str, value: Any) -> bool:  # noqa: ANN401
        given = self._given(path)
        return bool(given == value) or (given is None and self._is_default(path, value))

    def _is_default(self, path: str, value: Any) -> bool:  # noqa: ANN401
        return bool(value == form.fields(self._kind)[path].default)

    def _resolutions(self, wanted: Preset) -> dict[str, Any]:
        """The datasets' sizes, where they are those of the preset until now."""
        datasets = self._given("datasets")
        usual = (None, list(self.preset.resolution if self.preset is not None else ()))
        return {
            f"datasets[{index}].resolution": list(wanted.resolution)
            for index, dataset in enumerate(datasets if isinstance(datasets, list) else ())
            if isinstance(dataset, dict) and dataset.get("resolution") in usual
        }


def named(name: str) -> Preset:
    """The preset by that name."""
    for preset in presets():
        if preset.name == name:
            return preset
    raise UserError(f"there is no preset {name[:100]!r}; there are {', '.join(preset.name for preset in presets())}")
