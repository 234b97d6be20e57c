"""The trained adapter: which layers, first values, products, switches, state, and how each kind bears each base."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detour import UserError
from detour.config.job import NetworkConfig
from detour.nn import lora
from detour.nn.quant import dense_weight
from zstack import DIM, Stack, StackSpec, gradients, inputs, linears, quantise, relative

SPEC = StackSpec()
KINDS = ["lora", "dora", "lokr", "loha"]
SEED = 42
Q = "layers.0.attention.to_q"


def attached(kind: str = "lora", *, model: Stack | None = None, seed: int = SEED, **options) -> Stack:
    model = model or Stack()
    network = NetworkConfig(type=kind, **{"linear": 4, **options})
    lora.attach(model, lora.linear_names(model, SPEC, network), network, seed)
    return model


def stirred(model: Stack, seed: int = 7, size: float = 0.3) -> Stack:
    """The adapter away from its first values, magnitudes included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.trainable(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator) * parameter.new_tensor(0.5))
    return model


# --- which layers ---------------------------------------------------------------------------------------------------


def test_main_blocks_or_every_layer():
    model = Stack()
    blocks = lora.linear_names(model, SPEC, NetworkConfig())
    every = lora.linear_names(model, SPEC, NetworkConfig(transformer_only=False))
    assert len(blocks) == 2 * 7 and all(name.startswith("layers.") for name in blocks)
    assert len(every) == 3 * 7 + 1 and every == list(linears(model))
    assert "layers.1.attention.to_out.0" in blocks


def test_include_and_exclude_search_anywhere_and_exclude_wins():
    network = NetworkConfig(include=["attention", r"layers\.1\..*w2"], exclude=[r"to_out"])
    names = lora.linear_names(Stack(), SPEC, network)
    assert names == [
        "layers.0.attention.to_q", "layers.0.attention.to_k", "layers.0.attention.to_v",
        "layers.1.attention.to_q", "layers.1.attention.to_k", "layers.1.attention.to_v", "layers.1.feed_forward.w2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include": ["atention"]}, r"network.include: 'atention' matches none of the 14 layers.*layers\.0\.attention"),
        ({"exclude": ["nothing_like_it"]}, "network.exclude: 'nothing_like_it' matches none"),
        ({"include": ["noise_refiner"]}, "network.transformer_only: false"),
        ({"exclude": ["layers"]}, "leave none of the 14 layers"),
    ],
)
def test_patterns_that_cannot_be_meant_are_errors(options, said):
    with pytest.raises(UserError, match=said):
        lora.linear_names(Stack(), SPEC, NetworkConfig(**options))


def test_only_the_named_layers_are_wrapped_even_where_names_end_alike():
    """PEFT matches lists of names by their ends: `layers.0...` would hit `noise_refiner.layers.0...` too."""
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8)}), "q": torch.nn.Linear(8, 8)})
    lora.attach(model, ["q"], NetworkConfig(linear=2), SEED)
    assert list(lora.trainable(model)) == ["q.lora_A.weight", "q.lora_B.weight"]


# --- first values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_identity_bit_for_bit(kind, dtype):
    x = inputs(dtype=dtype)
    untouched = Stack(dtype=dtype)(x)
    model = attached(kind, model=Stack(dtype=dtype))
    assert torch.equal(model(x), untouched)
    assert all(parameter.dtype == torch.float32 for parameter in lora.trainable(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_depend_on_the_seed_and_the_name_alone(kind):
    before = torch.get_rng_state()
    first = lora.state(attached(kind))
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(999)
    fewer = lora.state(attached(kind, model=Stack(dtype=torch.bfloat16), include=[r"layers\.1"]))
    quantised = lora.state(attached(kind, model=quantise(Stack(dtype=torch.bfloat16), "int8")))
    for other in (fewer, quantised):
        drawn = [name for name in other if "magnitude" not in name]  # |W| is a measurement of the base
        assert drawn and all(torch.equal(other[name], first[name]) for name in drawn)
    other_seed = lora.state(attached(kind, seed=SEED + 1))
    assert any(not torch.equal(other_seed[name], first[name]) for name in first)


def test_layers_do_not_share_first_values():
    first, second = (lora.state(attached())[f"layers.{i}.attention.to_q.lora_A.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_first_values_have_the_spread_that_peft_gives():
    A = lora.state(attached(linear=64))["layers.0.attention.to_q.lora_A.weight"]
    bound = DIM**-0.5  # kaiming_uniform with a = sqrt(5)
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


# --- names, parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("lora", ["lora_A.weight", "lora_B.weight"]),
        ("dora", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]),
        ("lokr", ["lokr_w1", "lokr_w2_a", "lokr_w2_b"]),
        ("loha", ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]),
    ],
)
def test_names_carry_no_adapter_name(kind, parts):
    options = {"linear": 2} if kind == "lokr" else {}
    names = list(lora.trainable(attached(kind, include=[Q], **options)))
    assert names == [f"layers.0.attention.to_q.{part}" for part in parts]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(kind):
    model = stirred(attached(kind))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = inputs().requires_grad_()
    model(x).square().mean().backward()
    trained = {id(p) for p in lora.trainable(model).values()}
    assert len(trained) == {"lora": 28, "dora": 42, "lokr": 34, "loha": 56}[kind]
    assert x.grad is not None and x.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
        assert torch.equal(parameter, before[name])


def test_state_shares_memory_and_loads_back_exactly():
    model, other = stirred(attached()), attached(seed=1)
    saved = {name: tensor.clone() for name, tensor in lora.state(model).items()}
    lora.load_state(other, saved)
    assert torch.equal(model(inputs()), other(inputs()))
    next(iter(lora.state(other).values())).zero_()
    assert not next(iter(lora.trainable(other).values())).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(f"{Q}.lora_A.weight"), rf"of 28, 27 are there; 1 are missing \({Q}\.lora_A"),
        (lambda s: s.update({"layers.7.w.lora_A.weight": torch.zeros(4, DIM)}), "1 are not trained by this job"),
        (lambda s: s.update({f"{Q}.lora_A.weight": torch.zeros(8, DIM)}), "is 8x64, this job trains 4x64.*linear: 8"),
        (lambda s: s.clear(), "of 28, 0 are there"),
    ],
)
def test_loading_is_strict_and_changes_nothing_on_error(change, said):
    model = stirred(attached())
    before = {name: tensor.clone() for name, tensor in lora.state(model).items()}
    tensors = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    change(tensors)
    with pytest.raises(UserError, match=said):
        lora.load_state(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.state(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretrained_lora_of_another_alpha_gives_the_same_output(kind):
    source = stirred(attached(kind, linear_alpha=2.0))
    layers = {name.split(".lo")[0].split(".hada")[0] for name in lora.state(source)}
    target = attached(kind, linear_alpha=8.0, seed=3)
    lora.load_pretrained(target, {n: t.clone() for n, t in lora.state(source).items()}, dict.fromkeys(layers, 2.0 / 4))
    assert relative(target(inputs()), source(inputs())) < 1e-6
    assert relative(target(inputs()), Stack()(inputs())) > 1e-3


def test_a_pretrained_lora_of_another_rank_is_an_error_that_says_so():
    source = attached(linear=8)
    with pytest.raises(UserError, match=r"set network\.linear: 8"):
        lora.load_pretrained(attached(linear=4), lora.state(source), {})


# --- products -------------------------------------------------------------------------------------------------------


def dense_delta(kind: str, model: Stack, layer: str, scale: float) -> torch.Tensor:
    """What an adapter adds to a weight, from the formulas in lora.py's heading."""
    part = {name.removeprefix(f"{layer}."): t for name, t in lora.state(model).items() if name.startswith(f"{layer}.")}
    base = dense_weight(model.get_submodule(layer).base_layer)
    if kind == "lokr":
        w2 = part["lokr_w2"] if "lokr_w2" in part else part["lokr_w2_a"] @ part["lokr_w2_b"]
        return scale * torch.kron(part["lokr_w1"], w2)
    if kind == "loha":
        return scale * (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
    delta = scale * part["lora_B.weight"] @ part["lora_A.weight"]
    if kind == "lora":
        return delta
    whole = base + delta
    return part["lora_magnitude_vector"][:, None] * whole / whole.norm(dim=1, keepdim=True) - base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_products_are_the_formulas(kind, alpha):
    model = stirred(attached(kind, linear_alpha=alpha))
    scale = 1.0 if alpha is None else alpha / 4
    merged = Stack()
    with torch.no_grad():
        for name in lora.linear_names(merged, SPEC, NetworkConfig()):
            merged.get_submodule(name).weight.add_(dense_delta(kind, model, name, scale))
    assert relative(model(inputs()), merged(inputs())) < 1e-6
    assert relative(model(inputs()), Stack()(inputs())) > 1e-2


@pytest.mark.parametrize(
    ("factor", "whole", "w1", "w2"),
    [(-1, False, (8, 8), None), (4, False, (4, 4), None), (-1, True, (8, 8), (8, 8)), (2, True, (2, 2), (32, 32))],
)
def test_lokr_factor_and_full_rank(factor, whole, w1, w2):
    model = attached("lokr", linear=1, lokr_factor=factor, lokr_full_rank=whole, include=[Q])
    state = lora.state(model)
    assert tuple(state[f"{Q}.lokr_w1"].shape) == w1
    if whole:
        assert tuple(state[f"{Q}.lokr_w2"].shape) == w2
    else:
        assert state[f"{Q}.lokr_w2_a"].shape[1] == 1


def test_lokr_full_rank_keeps_the_scale_exact():
    model = stirred(attached("lokr", linear=3, linear_alpha=1.0, lokr_full_rank=True))
    (layer,) = {id(m.scaling): m for n, m in model.named_modules() if n == "layers.0.attention.to_q"}.values()
    assert layer.scaling[lora.ADAPTER] == 1.0 / 3


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_train_mode_only_and_leaves_the_base_in_eval_mode(kind):
    model = stirred(attached(kind, dropout=0.5))
    still = model(inputs())
    assert torch.equal(model(inputs()), still), "dropout acts before training"
    lora.train_mode(model, True)
    torch.manual_seed(0)
    first = model(inputs())
    second = model(inputs())
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(model(inputs()), first)
    assert not model.training and not model.layers[0].norm.training
    assert all(not module.training for name, module in model.named_modules() if name.endswith("base_layer"))
    lora.train_mode(model, False)
    assert torch.equal(model(inputs()), still)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_checkpointing_are_bit_equal(kind):
    model = stirred(attached(kind, dropout=0.25))
    lora.train_mode(model, True)
    torch.manual_seed(5)
    plain = gradients(model, inputs(), lora.trainable(model))
    model.checkpointing = True
    torch.manual_seed(5)
    again = gradients(model, inputs(), lora.trainable(model))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(value.abs().sum() > 0 for value in plain.values())


# --- switches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_the_base_bit_for_bit_and_comes_back(kind):
    base, x = Stack()(inputs()), inputs()
    model = stirred(attached(kind))
    on = model(x)
    with lora.disabled(model):
        assert torch.equal(model(x), base)
        with lora.disabled(model):
            pass
        assert torch.equal(model(x), base), "the inner one switched it on again"
    assert torch.equal(model(x), on)
    with pytest.raises(RuntimeError, match="inside"), lora.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(x), on)


def test_disabled_between_forward_and_backward_does_not_change_the_gradient():
    model = stirred(attached())
    plain = gradients(model, inputs(), lora.trainable(model))
    names = list(lora.trainable(model))
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        loss = model(inputs()).square().mean()
        with lora.disabled(model), torch.no_grad():
            model(inputs(2))
        loss.backward()
        assert list(lora.trainable(model)) == names
        assert all(torch.equal(p.grad, plain[name]) for name, p in lora.trainable(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_multiplies_the_change_exactly_and_restores(kind):
    x = inputs()
    model = stirred(attached(kind))
    layer, base_layer = model.get_submodule("layers.0.attention.to_q"), Stack().get_submodule("layers.0.attention.to_q")
    on, base = layer(x), base_layer(x)
    for factor in (0.5, 2.0, -1.0, 0.0, 1.3):
        with lora.scaled(model, factor):
            assert torch.allclose(layer(x) - base, factor * (on - base), rtol=0, atol=1e-5)
            assert factor != 0 or torch.equal(layer(x), base)
    assert torch.equal(layer(x), on)


@given(factors=st.lists(st.floats(-3, 3, allow_nan=False), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_scaled_restores_bit_for_bit_whatever_the_factors(factors):
    model = _SHARED
    before = model(inputs())
    with pytest.raises(RuntimeError, match="out"):
        _nest(model, factors)
    assert torch.equal(model(inputs()), before)


def _nest(model, factors):
    if not factors:
        raise RuntimeError("out")
    with lora.scaled(model, factors[0]):
        _nest(model, factors[1:])


def test_scaled_by_one_is_bit_equal():
    model = stirred(attached("dora"))
    on = model(inputs())
    with lora.scaled(model, 1.0):
        assert torch.equal(model(inputs()), on)


# --- the whole model ------------------------------------------------------------------------------------------------


def test_full_trains_every_parameter_in_float32():
    model, plain = Stack(dtype=torch.bfloat16), Stack(dtype=torch.bfloat16)
    network = NetworkConfig(type="full")
    lora.attach(model, lora.linear_names(model, SPEC, network), network, SEED)
    trained = lora.trainable(model)
    assert list(trained) == [name for name, _ in model.named_parameters()]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in trained.values())
    assert torch.equal(model(inputs()), plain.float()(inputs()))
    lora.load_state(model, {name: tensor * 2 for name, tensor in lora.state(plain.requires_grad_(True)).items()})
    assert torch.equal(trained[f"{Q}.weight"], 2 * plain.get_parameter(f"{Q}.weight"))


def test_full_honours_include_and_exclude_and_stays_of_one_type():
    model = Stack(dtype=torch.bfloat16)
    network = NetworkConfig(type="full", include=["attention"], exclude=[r"layers\.0"])
    lora.attach(model, lora.linear_names(model, SPEC, network), network, SEED)
    assert set(lora.trainable(model)) == {
        f"{block}.attention.{part}.weight"
        for block in ("noise_refiner.0", "layers.1")
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(inputs()).sum().backward()


def test_full_has_nothing_to_switch_off_and_says_so():
    model, network = Stack(), NetworkConfig(type="full")
    lora.attach(model, lora.linear_names(model, SPEC, network), network, SEED)
    with pytest.raises(UserError, match=r"network\.type: full"), lora.disabled(model):
        pass
    with pytest.raises(UserError, match=r"network_multiplier: 0.5"), lora.scaled(model, 0.5):
        pass
    with lora.scaled(model, 1.0):
        pass


def test_full_refuses_a_quantised_base():
    model, network = quantise(Stack(), "int8"), NetworkConfig(type="full")
    with pytest.raises(UserError, match=r"model\.quantize: false"):
        lora.attach(model, lora.linear_names(model, SPEC, network), network, SEED)


# --- every kind on every base ---------------------------------------------------------------------------------------

REFUSED = {("lokr", "nf4"), ("loha", "nf4")}


@pytest.mark.parametrize("qtype", ["int8", "float8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_on_each_quantised_base_works_or_is_refused(kind, qtype):
    base = quantise(Stack(dtype=torch.bfloat16), qtype)
    if (kind, qtype) in REFUSED:
        with pytest.raises(UserError, match=f"network.type: {kind} cannot be trained on a base in nf4"):
            attached(kind, model=base)
        return
    x = inputs(dtype=torch.bfloat16)
    untouched = base(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = attached(kind, model=base)
    assert torch.equal(model(x), untouched), "a fresh adapter must be the identity"
    reference = Stack()  # float32, with the weights that the quantised base stands for
    with torch.no_grad():
        for name, linear in linears(reference).items():
            wrapped = model.get_submodule(name)
            inner = wrapped.base_layer if "base_layer" in dict(wrapped.named_children()) else wrapped
            linear.weight.copy_(dense_weight(inner))
    attached(kind, model=reference)
    stirred(model)
    lora.load_state(reference, lora.state(model))
    assert relative(model(x), reference(x.float())) < 0.02
    expected = gradients(reference, x.float(), lora.trainable(reference))
    found = gradients(model, x, lora.trainable(model))
    total = torch.cat([found[name].flatten() for name in expected])
    assert relative(total, torch.cat([value.flatten() for value in expected.values()])) < 0.02
    with lora.disabled(model):
        assert torch.equal(model(x), untouched)


_SHARED = stirred(attached("dora", include=["attention"]))
