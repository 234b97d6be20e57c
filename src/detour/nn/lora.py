"""The trained part of the denoiser: LoRA, DoRA, LoKr and LoHa on PEFT's layers, or the whole model (`full`).

PEFT builds the layers and computes their products (`lowrank.py` those of a plain LoRA); everything that must be
repeatable is done here. PEFT creates its parameters in the type of the base and draws them from the global generator;
here they are float32 whatever the base is held in, and every tensor's first value is a pure function of (seed, its own
name).

Names are those of PEFT's files without prefix: `layers.0.attention.to_q.lora_A.weight`, `...lora_magnitude_vector`.
Products, with s = alpha / rank:

    lora  y = W x + s B A x                     A (rank, in), B (out, rank) = 0
    dora  y = m/|W + s B A| (W + s B A) x       m (out,) = |W|, norms over each row
    lokr  y = W x + s (w1 kron w2) x            w2 = w2_a w2_b or whole, = 0
    loha  y = W x + s ((w1_a w1_b) * (w2_a w2_b)) x    w2_b = 0

so that every fresh adapter leaves the model's output as it is, bit for bit.
"""

from __future__ import annotations

import math
import re
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from detour import UserError
from detour.nn.lowrank import use_low_rank
from detour.nn.quant import qtype_of
from detour.nn.quiet import quiet_imports
from detour.nn.rng import generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from peft import PeftConfig

    from detour.config.job import NetworkConfig

ADAPTER = "default"
"""PEFT's name of the one adapter. It becomes an attribute of a ModuleDict: names of its methods (`train`) crash."""

_WHOLE_RANK = 2**24
"""PEFT keeps LoKr's larger factor whole when the rank is at least half its side; no layer is wider than twice this.
A power of two, so that alpha * _WHOLE_RANK / rank / _WHOLE_RANK is alpha / rank exactly."""

_ADAPTER_PARAMETER = re.compile(rf"(.*\.(lora_A|lora_B|lora_magnitude_vector|lokr_\w+|hada_\w+))\.{ADAPTER}(\.weight)?")
_ZERO_AT_FIRST = ("lora_B.weight", "lokr_w2", "lokr_w2_b", "hada_w2_b")
_CARRIES_SCALE = ("lora_B.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a")
"""The one factor of each kind that a file's own alpha / rank can be multiplied into."""
_SHOWN = 3
"""Names quoted in an error."""


class Targets(Protocol):
    """The facts of an architecture that are needed here (`archs.base.ArchSpec`)."""

    @property
    def lora_blocks(self) -> str:
        """Regular expression for the full names of the linear layers of the main blocks."""

    @property
    def lora_all(self) -> str:
        """The same for every linear layer that may be trained."""


def linear_names(denoiser: nn.Module, spec: Targets, network: NetworkConfig) -> list[str]:
    """The layers that get an adapter, in the model's order: the architecture's, of those `include`, without `exclude`.

    For `full` it is every module that holds parameters of its own, and `transformer_only` has no effect.
    Raises UserError when a pattern matches nothing, or when nothing is left.
    """
    if network.type == "full":
        base = [name for name, module in denoiser.named_modules() if list(_floating(module))]
        elsewhere: list[str] = []
    else:
        linears = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        every = [name for name in linears if re.fullmatch(spec.lora_all, name)]
        blocks = [name for name in linears if re.fullmatch(spec.lora_blocks, name)]
        base, elsewhere = (blocks, every) if network.transformer_only else (every, [])
    if not base:
        raise ValueError(f"the architecture's layer pattern matches no linear layer of {type(denoiser).__name__}")
    included = [_search("include", text, base, elsewhere) for text in network.include]
    excluded = [_search("exclude", text, base, elsewhere) for text in network.exclude]
    chosen = [
        name
        for name in base
        if (not included or any(name in names for names in included)) and not any(name in names for names in excluded)
    ]
    if not chosen:
        raise UserError(
            f"network.include and network.exclude leave none of the {len(base)} layers (such as {_some(base)}); "
            "make exclude narrower"
        )
    return chosen


def _search(option: str, text: str, base: Sequence[str], elsewhere: Sequence[str]) -> set[str]:
    """The names in which the pattern is found; it must be found somewhere."""
    pattern = re.compile(text)
    found = {name for name in base if pattern.search(name)}
    if not found:
        outside = [name for name in elsewhere if pattern.search(name)]
        hint = f"; it does match {_some(outside)}: set network.transformer_only: false" if outside else ""
        raise UserError(
            f"network.{option}: {text!r} matches none of the {len(base)} layers; names look like {_some(base)}{hint}"
        )
    return found


def _some(names: Sequence[str]) -> str:
    """A few names for an error, spread over the list so that they show its kinds."""
    step = max(1, len(names) // _SHOWN)
    shown = list(names[::step][:_SHOWN])
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(names) > len(shown) else "")


def attach(denoiser: nn.Module, names: Sequence[str], network: NetworkConfig, seed: int) -> None:
    """Put the adapter on the layers of these names; afterwards exactly its parameters are float32 and trainable.

    The first values depend on the seed and on each tensor's name only: not on the global generator (which is left as
    it is), on the order of layers, or on how the base is held. For `full` the model's floating parameters all become
    float32 (mixed types would not multiply), and those of the named modules trainable: run it under autocast to compute
    in bf16. Raises UserError for combinations that do not work (see `_check_base`).
    """
    if network.type == "full":
        _train_whole(denoiser, names)
        return
    _check_base(denoiser, names, network)
    with quiet_imports(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # True of every quantised layer here, and of no consequence: nothing is ever merged into the base.
        warnings.filterwarnings("ignore", message=".*was instantiated without `get_apply_tensor_subclass`")
        from peft import inject_adapter_in_model

        inject_adapter_in_model(_peft_config(names, network), denoiser, ADAPTER)
    layers = _layers(denoiser)
    if list(layers) != list(names):
        raise ValueError(f"PEFT wrapped {len(layers)} layers, {len(names)} were named")
    for name, parameter in trainable(denoiser).items():
        if not name.endswith("lora_magnitude_vector"):
            parameter.data = _first_value(name, parameter, seed).to(parameter.device)
    if network.type == "dora":
        _measure_magnitudes(layers)
    if network.type == "lora":
        use_low_rank(layers, ADAPTER)
    train_mode(denoiser, denoiser.training)  # new layers come in train mode: dropout would act in an eval-mode model


def _check_base(denoiser: nn.Module, names: Sequence[str], network: NetworkConfig) -> None:
    """LoKr and LoHa form a dense delta in the shape of the base weight, which PEFT takes from the packed nf4 tensor."""
    if network.type not in ("lokr", "loha"):
        return
    packed = [name for name in names if qtype_of(denoiser.get_submodule(name)) == "nf4"]  # type: ignore[arg-type]
    if packed:
        raise UserError(
            f"network.type: {network.type} cannot be trained on a base in nf4 (layers such as {_some(packed)}); "
            "use model.qtype: int8 or float8, or network.type: lora or dora"
        )


def _peft_config(names: Sequence[str], network: NetworkConfig) -> PeftConfig:
    """The layers are named in full: PEFT's own lists match suffixes, which also hit layers of other blocks."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    target = "|".join(re.escape(name) for name in names)
    rank, alpha = network.linear, network.linear_alpha or float(network.linear)
    if network.type == "loha":
        return LoHaConfig(r=rank, alpha=alpha, rank_dropout=network.dropout, target_modules=target)
    if network.type == "lokr":
        if network.lokr_full_rank:
            rank, alpha = _WHOLE_RANK, alpha * _WHOLE_RANK / rank
        return LoKrConfig(
            r=rank,
            alpha=alpha,
            rank_dropout=network.dropout,
            rank_dropout_scale=True,
            decompose_factor=network.lokr_factor,
            target_modules=target,
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=network.dropout,
        target_modules=target,
        use_dora=network.type == "dora",
    )


def _first_value(name: str, parameter: Tensor, seed: int) -> Tensor:
    """Zero for the factor that makes the product vanish, else uniform in +-1/sqrt(fan_in), float32 on the CPU."""
    value = torch.zeros(parameter.shape)
    if not name.endswith(_ZERO_AT_FIRST):
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator(seed, "network", name))
    return value


def _measure_magnitudes(layers: Mapping[str, Any]) -> None:
    """DoRA's |W| again, in float32. PEFT measured it in the type of the base; rounded to bf16 it is off by up to 0.2 %
    from the norm that every forward pass divides by, and a fresh adapter would not be the identity.
    """
    for layer in layers.values():
        layer.lora_magnitude_vector[ADAPTER].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[ADAPTER].weight.data,
            lora_B=layer.lora_B[ADAPTER].weight.data,
            scaling=layer.scaling[ADAPTER],
        )


def _train_whole(denoiser: nn.Module, names: Sequence[str]) -> None:
    """float32 master weights are the parameters themselves; only those of the named modules are trained."""
    quantised = [
        name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear) and qtype_of(module)
    ]
    if quantised:
        raise UserError(
            f"network.type: full trains the base weights, but {_some(quantised)} are quantised; "
            "set model.quantize: false"
        )
    denoiser.requires_grad_(False)
    for module in denoiser.modules():
        for parameter in _floating(module):
            parameter.data = parameter.data.float()
    for name in names:
        for parameter in _floating(denoiser.get_submodule(name)):
            parameter.requires_grad_(True)


def _floating(module: nn.Module) -> Iterator[nn.Parameter]:
    """The floating parameters that a module itself holds."""
    return (parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point())


def _layers(denoiser: nn.Module) -> dict[str, Any]:
    """PEFT's layers by name, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}


def _own_name(name: str) -> str:
    """A parameter's name as PEFT writes it into files, without prefix: no adapter name, no `.weight` on magnitudes."""
    match = _ADAPTER_PARAMETER.fullmatch(name)
    if match is None:
        return name
    stem, kind, weight = match.groups()
    return stem if kind == "lora_magnitude_vector" or weight is None else f"{stem}{weight}"


def trainable(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters in the model's order, by name."""
    return {_own_name(name): parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name: float32, sharing memory with the parameters."""
    return {name: parameter.detach() for name, parameter in trainable(denoiser).items()}


def load_state(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `state` gave back in. Raises UserError unless names and shapes are exactly the same."""
    parameters = trainable(denoiser)
    _check_names(parameters, tensors)
    wrong = [name for name, parameter in parameters.items() if parameter.shape != tensors[name].shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{len(wrong)} of {len(parameters)} trained tensors have another shape: {name} is "
            f"{_shape(tensors[name])}, this job trains {_shape(parameters[name])}{_rank_hint(name, tensors[name])}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_pretrained(denoiser: nn.Module, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
    """Start from the LoRA of `network.pretrained_lora_path` instead of from zero.

    `tensors` carries the names of `state`; `scales` maps each layer's name to the alpha / rank that the file means.
    Where that differs from this job's, the ratio is multiplied into one factor, so that the first output is the file's.
    Layers, kind and rank must be this job's, else UserError.
    """
    weights = dict(tensors)
    for layer_name, layer in _layers(denoiser).items():
        ratio = scales.get(layer_name, 1.0) / layer.scaling[ADAPTER]
        for part in _CARRIES_SCALE:
            name = f"{layer_name}.{part}"
            if name in weights and ratio != 1:
                weights[name] = weights[name].float() * ratio
    load_state(denoiser, weights)


def _check_names(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in parameters if name not in tensors]
    unknown = [name for name in tensors if name not in parameters]
    if not missing and not unknown:
        return
    parts = [f"{len(missing)} are missing ({_some(missing)})"] if missing else []
    parts += [f"{len(unknown)} are not trained by this job ({_some(unknown)})"] if unknown else []
    raise UserError(
        f"the trained tensors do not fit: of {len(parameters)}, {len(parameters) - len(missing)} are there; "
        f"{' and '.join(parts)}; network.type, include, exclude and transformer_only must be those they were made with"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)


def _rank_hint(name: str, tensor: Tensor) -> str:
    if name.endswith("lora_A.weight"):
        return f"; its rank is {tensor.shape[0]}: set network.linear: {tensor.shape[0]}"
    return "; network.linear and network.lokr_factor must be those it was made with"


def train_mode(denoiser: nn.Module, on: bool) -> None:
    """Switch the adapter's dropout on or off, and nothing of the base model, which stays in eval mode."""
    for layer in _layers(denoiser).values():
        layer.training = on  # not train(): that would reach the base layer
        for name, child in layer.named_children():
            if name != "base_layer":
                child.train(on)


@contextmanager
def disabled(denoiser: nn.Module) -> Iterator[None]:
    """The base model's own prediction inside. A backward pass through checkpoints belongs inside as well."""
    with ExitStack() as undo:
        for layer in _adapter_layers(denoiser, "the base model's own prediction").values():
            if not layer.disable_adapters:
                layer.enable_adapters(False)
                undo.callback(layer.enable_adapters, True)
        yield


@contextmanager
def scaled(denoiser: nn.Module, factor: float) -> Iterator[None]:
    """The adapter's change multiplied by `factor` inside (`network_multiplier`); nested factors multiply.

    The old scale is put back, not divided back, so that leaving is exact.
    """
    if factor == 1:
        yield
        return
    with ExitStack() as undo:
        for layer in _adapter_layers(denoiser, f"network_multiplier: {factor}").values():
            undo.callback(_scale_dora(layer, factor) if _is_dora(layer) else _scale(layer, factor))
        yield


def _adapter_layers(denoiser: nn.Module, purpose: str) -> dict[str, Any]:
    layers = _layers(denoiser)
    if not layers:
        raise UserError(f"{purpose} needs an adapter; network.type: full has changed the base weights themselves")
    return layers


def _is_dora(layer: Any) -> bool:  # noqa: ANN401  PEFT's layers share no typed interface
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer) and bool(layer.use_dora[ADAPTER])


def _scale(layer: Any, factor: float) -> Callable[[], None]:  # noqa: ANN401
    """Scale an additive adapter; returns what undoes it."""
    before = layer.scaling[ADAPTER]
    layer.scaling[ADAPTER] = before * factor

    def restore() -> None:
        layer.scaling[ADAPTER] = before

    return restore


def _scale_dora(layer: nn.Module, factor: float) -> Callable[[], None]:
    """DoRA's scale stands inside its norm, so that the change is not proportional to it: the outputs are blended, as
    ComfyUI blends the weights. Runs before other hooks, so that a training adapter's branch on the layer stays whole.
    """

    def blend(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        base: Tensor = module.get_submodule("base_layer")(*args)
        return base + factor * (output - base)

    return layer.register_forward_hook(blend, prepend=True).remove
