"""Optimizers: built from the job, stepped without poisoning weights, and packed into tensors and JSON exactly.

| `train.optimizer` | runs | note |
|---|---|---|
| adamw | `torch.optim.AdamW`, fused | |
| adamw8bit | `bitsandbytes.optim.AdamW8bit` | 8-bit state on the CPU too; tensors below 4096 values keep 32 bits |
| adafactor | `pytorch_optimizer.AdaFactor` | `lr` is absolute (`relative_step`, `scale_parameter` off), no momentum |
| prodigy | `prodigyopt.Prodigy` | `lr` multiplies its own estimate |
| lion | `pytorch_optimizer.Lion` | |
| schedulefree | `schedulefree.AdamWScheduleFree` | previews, validation and exports inside `for_evaluation` |

`torch.optim.Adafactor` is not taken because its `lr` is relative to the size of each weight: a LoRA's B starts at zero,
so that the usual 1e-4 would mean steps of 1e-7.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from detour import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from detour.config.job import OptimizerName, TrainConfig

    Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
    OptimizerClass = Callable[..., Optimizer]

# Arguments that are the engine's to give or that would break it (`maximize` climbs the loss).
HIDDEN = frozenset([
    "params", "lr", "foreach", "fused", "maximize", "capturable", "differentiable", "fsdp_in_use", "momentum_dtype",
    "warmup_steps", "optim_bits", "args", "is_paged", "amsgrad",
])  # fmt: skip
INSTEAD = {"lr": "train.lr", "warmup_steps": "train.lr_warmup_steps"}


@dataclass(frozen=True, slots=True)
class _Kind:
    load: Callable[[], OptimizerClass]
    fixed: Mapping[str, object]
    """What the engine gives and the user may not."""
    defaults: Mapping[str, object]
    """Where this project's default differs from the library's."""


def _adamw8bit() -> OptimizerClass:
    from bitsandbytes.optim import AdamW8bit

    return cast("OptimizerClass", AdamW8bit)


def _adafactor() -> OptimizerClass:
    from pytorch_optimizer import AdaFactor

    return cast("OptimizerClass", AdaFactor)


def _prodigy() -> OptimizerClass:
    from prodigyopt import Prodigy

    return cast("OptimizerClass", Prodigy)


def _lion() -> OptimizerClass:
    from pytorch_optimizer import Lion

    return cast("OptimizerClass", Lion)


def _schedulefree() -> OptimizerClass:
    from schedulefree import AdamWScheduleFree

    return cast("OptimizerClass", AdamWScheduleFree)


_ABSOLUTE = {"betas": (None, 0.999), "relative_step": False, "scale_parameter": False}
_KINDS: dict[OptimizerName, _Kind] = {
    "adamw": _Kind(lambda: AdamW, {"fused": True}, {}),
    "adamw8bit": _Kind(_adamw8bit, {}, {}),
    "adafactor": _Kind(_adafactor, {"momentum_dtype": torch.float32}, _ABSOLUTE),
    "prodigy": _Kind(_prodigy, {}, {}),
    "lion": _Kind(_lion, {}, {}),
    "schedulefree": _Kind(_schedulefree, {}, {}),
}


def build_optimizer(config: TrainConfig, params: Mapping[str, nn.Parameter], text: Collection[str] = ()) -> Optimizer:
    """The optimizer of a job over named parameters, ready to train. Those named in `text` get a group at the end.

    `UserError` for a package that is missing, an argument that the optimizer does not have, or a value it refuses.
    """
    kind = _KINDS[config.optimizer]
    cls = _class(config.optimizer)
    arguments: dict[str, Any] = {**kind.defaults, **_checked_params(config), **kind.fixed}
    groups = [{"params": [(name, param) for name, param in params.items() if name not in text]}]
    if text:
        groups.append({"params": [(name, params[name]) for name in text]})
    try:
        with redirect_stdout(StringIO()):  # prodigyopt prints a line about weight decay
            optimizer = cls(groups, lr=config.lr, **arguments)
    except ValueError as error:
        raise UserError(f"train.optimizer_params: {config.optimizer} refuses them: {error}") from error
    if _averages(optimizer):
        cast("_ScheduleFree", optimizer).train()
    return optimizer


def optimizer_advice(config: TrainConfig) -> list[str]:
    """Warnings about settings that are obeyed but seldom meant. Nothing is changed because of them."""
    name, advice = config.optimizer, []
    if name == "prodigy" and config.lr < 0.1:
        advice.append(
            f"train.lr: {config.lr:g} with prodigy: it finds the learning rate itself and multiplies it by train.lr, "
            "so that this trains very slowly; use 1.0 unless it is meant"
        )
    if name == "schedulefree" and config.lr_scheduler != "constant":
        advice.append(
            f"train.lr_scheduler: {config.lr_scheduler} with schedulefree: its averaging takes the place of a falling "
            "learning rate; use constant (lr_warmup_steps is fine)"
        )
    if name == "schedulefree" and config.ema_config.use_ema:
        advice.append("train.ema_config with schedulefree: its weights are an average already; switch one of them off")
    if name == "adafactor" and config.optimizer_params.get("relative_step"):
        advice.append("train.optimizer_params.relative_step: adafactor takes its own steps, train.lr has no effect")
    return advice


def allowed_params(name: OptimizerName) -> dict[str, object]:
    """The arguments that `train.optimizer_params` may set for an optimizer, with their defaults."""
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(_class(name)).parameters.values()
    own = {p.name: p.default for p in found if p.kind in keyword and p.name not in HIDDEN}
    return {**own, **_KINDS[name].defaults}


def _class(name: OptimizerName) -> OptimizerClass:
    try:
        return _KINDS[name].load()
    except ImportError as error:
        raise UserError(
            f"train.optimizer: {name} needs the package {error.name!r}, which is not installed; "
            'run: pip install "detour[optim]"'
        ) from error


def _checked_params(config: TrainConfig) -> dict[str, object]:
    allowed = allowed_params(config.optimizer)
    chosen: dict[str, object] = {}
    for option, value in config.optimizer_params.items():
        where = f"train.optimizer_params.{option}"
        if option in INSTEAD:
            raise UserError(f"{where}: set {INSTEAD[option]} instead")
        if option not in allowed:
            near = get_close_matches(option, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: {config.optimizer} has no such argument{hint} Allowed: {', '.join(allowed)}")
        chosen[option] = _checked_value(where, value, allowed[option])
    return chosen


def _checked_value(where: str, value: float | bool | str | list[float], default: object) -> object:
    """The value in the type that the default has. Text that is a number counts as one: YAML 1.1 reads 1e-4 as text."""
    if isinstance(default, tuple):
        if not isinstance(value, list) or len(value) != len(default):
            raise UserError(f"{where}: a list of {len(default)} numbers is needed, not {value!r}")
        return tuple(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{where}: true or false is needed, not {value!r}")
        return value
    number = _as_number(value)
    if number is None:
        raise UserError(f"{where}: a number is needed, not {value!r}")
    return number


def _as_number(value: float | bool | str | list[float]) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return None if isinstance(value, bool | list) or isnan(value) else value


# --- a step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Update:
    """What came of a step."""

    grad_norm: float
    """Norm of all gradients together, before clipping."""
    taken: bool
    """False when the norm is not finite: weights and optimizer are untouched."""


def update(optimizer: Optimizer, params: Iterable[nn.Parameter], max_grad_norm: float) -> Update:
    """Clip gradients to `max_grad_norm` (0: no limit), take the step, clear the gradients.

    A norm that is NaN or infinite (a single such element is enough) takes no step: neither the weights nor the state
    of the optimizer change, and the gradients are cleared. Waits for the device once, for the norm.
    """
    params = list(params)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    value = float(norm)
    if taken := isfinite(value):
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
        optimizer.step()
    discard(params)
    return Update(value, taken)


def discard(params: Iterable[nn.Parameter]) -> None:
    """Drop gradients without using them: for a step of which a micro-batch had a loss that is not finite."""
    for param in params:
        param.grad = None


# --- weights to look at ---------------------------------------------------------------------------------------------


class _ScheduleFree(Protocol):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def _averages(optimizer: Optimizer) -> bool:
    """Whether the optimizer trains at another point than the one to use: schedule-free says so in its group."""
    return "train_mode" in optimizer.param_groups[0]


@contextmanager
def for_evaluation(optimizer: Optimizer) -> Iterator[None]:
    """The weights are those to preview, validate and export inside; afterwards those to train on, bit for bit.

    Schedule-free trains at a point y between its average x and its base z, and x is the result. Its own way there and
    back rounds, so y is kept aside. Nothing happens with other optimizers.
    """
    if not _averages(optimizer):
        yield
        return
    held = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    cast("_ScheduleFree", optimizer).eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in held:
                param.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True


# --- exact state ----------------------------------------------------------------------------------------------------


def pack(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """The whole state as tensors (`<parameter>.<key>`, on the CPU) and JSON, without pickle.

    Options that the job gives (learning rate, betas, ...) are left out: they come from the job on resuming, too.
    Tensors that several parameters share are stored once. Tensors are not copied where they are on the CPU already:
    write them before the next step.
    """
    assert all(group.get("train_mode", True) for group in optimizer.param_groups), "pack() inside for_evaluation()"
    tensors: dict[str, Tensor] = {}
    values: dict[str, Json] = {}
    shared: dict[str, Json] = {}
    first: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    for name, param in _named(optimizer).items():
        for key, value in optimizer.state.get(param, {}).items():
            place = f"{name}.{key}"
            if not isinstance(value, Tensor):
                values[place] = _encode(value)
                continue
            source = first.setdefault((value.data_ptr(), value.shape, value.dtype), place)
            if source != place and value.numel():
                shared[place] = source
            else:
                tensors[place] = value.detach().to("cpu").contiguous()
    groups: list[Json] = [_progress(optimizer, group) for group in optimizer.param_groups]
    shapes: dict[str, Json] = {name: list(param.shape) for name, param in _named(optimizer).items()}
    scalars: dict[str, Json] = {"optimizer": type(optimizer).__name__, "parameters": shapes, "groups": groups}
    return tensors, scalars | {"values": values, "shared": shared}


def unpack(optimizer: Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Puts a packed state into an optimizer built from the same job: its next steps are the old one's, bit for bit.

    `UserError` when the state is that of another optimizer or of other parameters; the optimizer is unchanged then.
    """
    params = _named(optimizer)
    _check_fits(optimizer, params, scalars)
    state: dict[Tensor, dict[str, object]] = {}
    moved: dict[tuple[str, torch.device], Tensor] = {}
    sources = {place: place for place in tensors} | dict(scalars["shared"])
    for place, source in sources.items():
        name, key = place.rsplit(".", 1)
        where = (source, params[name].device)
        if where not in moved:
            moved[where] = tensors[source].to(params[name].device, copy=True)
        state.setdefault(params[name], {})[key] = moved[where]
    for place, value in scalars["values"].items():
        name, key = place.rsplit(".", 1)
        state.setdefault(params[name], {})[key] = _decode(value)
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, saved in zip(optimizer.param_groups, scalars["groups"], strict=True):
        group.update({key: _decode(value) for key, value in saved.items()})


def _check_fits(optimizer: Optimizer, params: Mapping[str, nn.Parameter], scalars: Mapping[str, Any]) -> None:
    kind, saved = type(optimizer).__name__, scalars["parameters"]
    if scalars["optimizer"] != kind:
        raise UserError(
            f"the checkpoint's optimizer is {scalars['optimizer']}, the job's is {kind}; resume with the optimizer it "
            "was trained with, or start a new run from its LoRA (network.pretrained_lora_path)"
        )
    wrong = [name for name in sorted(params.keys() | saved.keys()) if name not in params or name not in saved]
    wrong += [name for name in params if name in saved and list(params[name].shape) != saved[name]]
    if wrong:
        raise UserError(
            f"the checkpoint's optimizer belongs to other weights: {', '.join(wrong[:3])} ({len(wrong)} in all) are "
            "missing on one side or have another shape; the job's network section must be that of the checkpoint"
        )


def _named(optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Parameters by the names that `build_optimizer` gave them."""
    groups = optimizer.param_groups
    return {name: p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}


def _progress(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Json]:
    """What an optimizer keeps in a group besides its options: counters and running estimates (Prodigy's d, ...)."""
    options = inspect.signature(type(optimizer)).parameters.keys() | {"params", "param_names"}
    return {key: _encode(value) for key, value in group.items() if key not in options}


def _encode(value: object) -> Json:
    """A plain value for JSON. Finite floats come back exactly (shortest repr); NaN and infinities have no JSON form."""
    if isinstance(value, float) and not isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an optimizer keeps a {type(value).__name__} in its state, which pack() does not know")


def _decode(value: Json) -> object:
    return float(cast("str", value["float"])) if isinstance(value, dict) else value
