"""Optimizers: what they compute, that they never poison weights, and that their state survives exactly."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from detour import UserError
from detour.config.job import OptimizerName, TrainConfig
from detour.train import optim
from detour.train.optim import build_optimizer, discard, for_evaluation, optimizer_advice, pack, unpack, update
from detour.train.schedule import lr_at, set_lr

ALL = get_args(OptimizerName)
LR = {"adamw": 1e-2, "adamw8bit": 1e-2, "adafactor": 1e-2, "prodigy": 1.0, "lion": 1e-2, "schedulefree": 3e-2}


def config(name="adamw", **options) -> TrainConfig:
    return TrainConfig(optimizer=name, **{"lr": LR[name], **options})


def weights(seed=0) -> dict[str, nn.Parameter]:
    """A pair as of a LoRA (B zero), one large enough for 8-bit state (4096 values), a vector."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"to_q.lora_A.weight": (4, 24), "to_q.lora_B.weight": (24, 4), "big.weight": (64, 80), "v": (7,)}
    return {n: nn.Parameter(torch.randn(s, generator=g) * ("lora_B" not in n)) for n, s in shapes.items()}


def set_grads(params, step) -> None:
    """Gradients towards 2, with noise: any difference in the weights spreads, and prodigy's d moves."""
    g = torch.Generator().manual_seed(1000 + step)
    for param in params.values():
        param.grad = param.detach() - 2 + 0.5 * torch.randn(param.shape, generator=g)


def advance(optimizer, params, cfg, steps) -> None:
    for step in steps:
        set_lr(optimizer, lr_at(cfg, step, 20))
        set_grads(params, step)
        assert update(optimizer, params.values(), 1.0).taken


def as_bytes(params):
    return {name: param.detach().numpy().tobytes() for name, param in params.items()}


def through_files(tensors, scalars, folder):
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(scalars, allow_nan=False))
    return load_file(folder / "optimizer.safetensors"), json.loads((folder / "optimizer.json").read_text())


# --- what they compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_reaches_the_minimum_of_a_quadratic(name):
    target = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(9)) for n, p in weights().items()}
    params, cfg = weights(), config(name, optimizer_params={"weight_decay": 0.0})
    optimizer = build_optimizer(cfg, params)

    def loss():
        return sum((p - target[n]).square().sum() for n, p in params.items())

    before = loss().item()
    for _ in range(300):
        loss().backward()
        update(optimizer, params.values(), 0)
    with for_evaluation(optimizer):
        assert loss().item() < 0.05 * before


def reference(name, params):
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(params, lr=1e-2, relative_step=False, scale_parameter=False)
    return torch.optim.AdamW(params, lr=1e-2, foreach=False)


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-6), ("adafactor", 1e-5), ("adamw8bit", 3e-2)])
def test_equals_a_reference_implementation(name, tolerance):
    """Float AdamW against the 8-bit one shows the error of 8 bits: relative to how far the weights have moved."""
    ours, theirs, start = weights(), weights(), weights()
    mine, other = build_optimizer(config(name), ours), reference(name, theirs.values())
    for step in range(30):
        set_grads(ours, step)
        for n, param in theirs.items():
            param.grad = ours[n].grad.clone()
        update(mine, ours.values(), 0)
        other.step()
    for n in ours:
        a, b, c = (params[n].detach() for params in (ours, theirs, start))
        assert float((a - b).norm() / (b - c).norm()) < tolerance, n


def test_adamw8bit_really_holds_8_bits_on_this_machine():
    params = weights()
    optimizer = build_optimizer(config("adamw8bit"), params)
    advance(optimizer, params, config("adamw8bit"), range(2))
    state = optimizer.state[params["big.weight"]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    assert optimizer.state[params["v"]]["state1"].dtype == torch.float32


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_options_reach_the_optimizer_and_numbers_may_be_text(name):
    optimizer = build_optimizer(config(name, optimizer_params={"weight_decay": "1e-4"}), weights())
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4


def test_betas_are_a_list_in_the_file():
    optimizer = build_optimizer(config("adamw", optimizer_params={"betas": [0.8, 0.95], "eps": 1e-6}), weights())
    assert (optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]) == ((0.8, 0.95), 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"weight_decays": 0.1}, r"adamw has no such argument; did you mean 'weight_decay'\? Allowed: betas"),
        ("lion", {"momentum": 1}, r"momentum: lion has no such argument.* Allowed: betas, weight_decay"),
        ("adamw", {"lr": 1}, "set train.lr instead"),
        ("schedulefree", {"warmup_steps": 5}, "set train.lr_warmup_steps instead"),
        ("adamw", {"maximize": True}, "no such argument"),
        ("adamw", {"betas": 0.9}, "a list of 2 numbers is needed, not 0.9"),
        ("adamw", {"betas": [0.9]}, "a list of 2 numbers"),
        ("adamw", {"betas": [0.9, 1.5]}, "adamw refuses them: Invalid beta"),
        ("adamw", {"weight_decay": "much"}, "a number is needed, not 'much'"),
        ("adamw", {"weight_decay": "nan"}, "a number is needed"),
        ("adamw", {"weight_decay": True}, "a number is needed"),
        ("prodigy", {"decouple": 1.0}, "true or false is needed"),
        ("adamw8bit", {"weight_decay": -1.0}, "refuses them"),
        ("adafactor", {"eps1": -1.0}, "refuses them"),
    ],
)  # fmt: skip
def test_wrong_options_are_explained(name, options, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(config(name, optimizer_params=options), weights())


@pytest.mark.parametrize("name", [n for n in ALL if n != "adamw"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    for package in ("bitsandbytes", "bitsandbytes.optim", "pytorch_optimizer", "prodigyopt", "schedulefree"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'{name} needs the package .*pip install "detour\[optim\]"'):
        build_optimizer(config(name), weights())


def test_prodigy_with_a_small_rate_is_advised_against_and_obeyed():
    cfg = config("prodigy", lr=1e-4)
    assert "use 1.0" in optimizer_advice(cfg)[0]
    assert build_optimizer(cfg, weights()).param_groups[0]["lr"] == 1e-4
    assert not any(optimizer_advice(config(name)) for name in ALL)


def test_doubtful_combinations_are_advised_against():
    cfg = config("schedulefree", lr_scheduler="cosine", ema_config={"use_ema": True})
    assert len(optimizer_advice(cfg)) == 2
    assert len(optimizer_advice(config("adafactor", optimizer_params={"relative_step": True}))) == 1


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_printed(name, capfd):
    build_optimizer(config(name, optimizer_params={"weight_decay": 0.1}), weights())
    assert capfd.readouterr().out == ""


# --- clipping and numbers that are not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, 1e9, 0.0])
def test_clipping_is_that_of_torch_and_the_norm_is_the_one_before(limit):
    ours, theirs = weights(), weights()
    for params in (ours, theirs):
        set_grads(params, 0)
    norm = float(torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in ours.values()])))
    if limit:
        torch.nn.utils.clip_grad_norm_(theirs.values(), limit)
    result = update(torch.optim.SGD(ours.values(), lr=1.0), ours.values(), limit)
    torch.optim.SGD(theirs.values(), lr=1.0).step()
    assert result.taken
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert as_bytes(ours) == as_bytes(theirs)
    assert all(p.grad is None for p in ours.values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_gradient_changes_no_weight_and_no_state(name, bad):
    params, cfg = weights(), config(name)
    optimizer = build_optimizer(cfg, params)
    advance(optimizer, params, cfg, range(2))
    before, (tensors, scalars) = as_bytes(params), pack(optimizer)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    set_grads(params, 2)
    params["v"].grad[3] = bad
    result = update(optimizer, params.values(), 1.0)
    assert not result.taken
    assert result.grad_norm != result.grad_norm or result.grad_norm == float("inf")
    assert as_bytes(params) == before
    after, scalars_after = pack(optimizer)
    assert scalars == scalars_after
    assert all(torch.equal(tensors[key], after[key]) for key in tensors)
    assert all(p.grad is None for p in params.values())


def test_discard_drops_gradients():
    params = weights()
    set_grads(params, 0)
    discard(params.values())
    assert all(p.grad is None for p in params.values())


# --- schedule-free --------------------------------------------------------------------------------------------------


def test_schedulefree_shows_its_average_and_trains_on_bit_for_bit():
    """A run that looks at its weights in between equals one that does not; what it shows is the library's average."""
    looked, plain, library = weights(), weights(), weights()
    cfg = config("schedulefree")
    optimizers = [build_optimizer(cfg, params) for params in (looked, plain, library)]
    for step in range(6):
        for optimizer, params in zip(optimizers, (looked, plain, library), strict=True):
            advance(optimizer, params, cfg, [step])
        with pytest.raises(KeyError), for_evaluation(optimizers[0]):
            shown = as_bytes(looked)
            raise KeyError("an error while drawing a preview")
    assert as_bytes(looked) == as_bytes(plain)
    optimizers[2].eval()
    assert shown == as_bytes(library)
    assert shown != as_bytes(looked)


def test_packing_the_weights_to_look_at_is_a_programming_error():
    params = weights()
    optimizer = build_optimizer(config("schedulefree"), params)
    with for_evaluation(optimizer), pytest.raises(AssertionError):
        pack(optimizer)


def test_for_evaluation_leaves_other_optimizers_alone():
    params = weights()
    with for_evaluation(build_optimizer(config("adamw"), params)):
        assert as_bytes(params) == as_bytes(weights())


# --- exact state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=4, deadline=None)
@given(k=st.integers(0, 6))
def test_resuming_equals_going_on_bit_for_bit(name, k, tmp_path_factory):
    """k steps, state and weights through files, the rest in a new optimizer; prodigy with an infinite growth rate."""
    cfg = config(name, lr_scheduler="cosine", lr_warmup_steps=3)
    whole = weights()
    advance(build_optimizer(cfg, whole), whole, cfg, range(9))

    first = weights()
    optimizer = build_optimizer(cfg, first)
    advance(optimizer, first, cfg, range(k))
    folder = tmp_path_factory.mktemp("state")
    tensors, scalars = through_files(*pack(optimizer), folder)
    save_file({n: p.detach() for n, p in first.items()}, folder / "weights.safetensors")

    second = weights(seed=5)
    with torch.no_grad():
        for n, value in load_file(folder / "weights.safetensors").items():
            second[n].copy_(value)
    again = build_optimizer(cfg, second)
    unpack(again, tensors, scalars)
    advance(again, second, cfg, range(k, 9))
    assert as_bytes(second) == as_bytes(whole)


@pytest.mark.parametrize("name", ALL)
def test_unpacked_state_is_the_packed_state(name):
    params, cfg = weights(), config(name)
    optimizer = build_optimizer(cfg, params)
    advance(optimizer, params, cfg, range(3))
    tensors, scalars = pack(optimizer)
    fresh = build_optimizer(cfg, weights())
    unpack(fresh, tensors, json.loads(json.dumps(scalars)))
    again, scalars_again = pack(fresh)
    assert scalars_again == scalars
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) and again[key].dtype == tensors[key].dtype for key in tensors)
    taken = {t.data_ptr() for t in again.values()} & {t.data_ptr() for t in tensors.values()}
    assert not taken, "the new optimizer must not write into the tensors it was given"


def test_parameters_are_told_apart_by_name_not_by_place():
    cfg, params = config("adamw"), weights()
    optimizer = build_optimizer(cfg, params)
    advance(optimizer, params, cfg, range(3))
    fresh = build_optimizer(cfg, dict(reversed(weights().items())))
    unpack(fresh, *pack(optimizer))
    names = dict(zip(fresh.param_groups[0]["param_names"], fresh.param_groups[0]["params"], strict=True))
    for name, param in names.items():
        assert torch.equal(fresh.state[param]["exp_avg"], optimizer.state[params[name]]["exp_avg"])


def test_shared_tables_are_stored_once():
    params = weights() | {"second.weight": nn.Parameter(torch.ones(64, 80))}
    optimizer = build_optimizer(config("adamw8bit"), params)
    advance(optimizer, params, config("adamw8bit"), range(1))
    tensors, scalars = pack(optimizer)
    assert sum(key.endswith("qmap1") for key in tensors) == 1
    assert scalars["shared"] == {f"second.weight.qmap{i}": f"big.weight.qmap{i}" for i in (1, 2)}


def test_options_come_from_the_job_when_resuming():
    params = weights()
    optimizer = build_optimizer(config("prodigy", optimizer_params={"weight_decay": 0.3}), params)
    advance(optimizer, params, config("prodigy"), range(3))
    fresh = build_optimizer(config("prodigy", optimizer_params={"weight_decay": 0.1}), weights())
    unpack(fresh, *pack(optimizer))
    assert fresh.param_groups[0]["weight_decay"] == 0.1
    assert fresh.param_groups[0]["d"] == optimizer.param_groups[0]["d"] > 1.1e-6, "the running estimate is state"


def test_the_state_of_another_optimizer_or_network_is_refused_and_nothing_changes():
    params = weights()
    optimizer = build_optimizer(config("adamw"), params)
    advance(optimizer, params, config("adamw"), range(1))
    packed = pack(optimizer)
    with pytest.raises(UserError, match="optimizer is AdamW, the job's is Lion"):
        unpack(build_optimizer(config("lion"), weights()), *packed)
    for other in (
        {n: p for n, p in weights().items() if n != "v"},
        weights() | {"v": nn.Parameter(torch.ones(8))},
        weights() | {"w": nn.Parameter(torch.ones(8))},
    ):
        fresh = build_optimizer(config("adamw"), other)
        with pytest.raises(UserError, match=r"belongs to other weights: [vw] \(1 in all\)"):
            unpack(fresh, *packed)
        assert not fresh.state


def test_a_value_that_json_cannot_hold_is_a_programming_error():
    params = weights()
    optimizer = build_optimizer(config("adamw"), params)
    optimizer.state[params["v"]] = {"history": object()}
    with pytest.raises(TypeError, match="object"):
        pack(optimizer)


def test_infinite_values_survive_json():
    params = weights()
    optimizer = build_optimizer(config("adamw"), params)
    optimizer.state[params["v"]] = {"best": float("-inf"), "on": True, "nothing": None, "third": 1 / 3}
    tensors, scalars = pack(optimizer)
    fresh = build_optimizer(config("adamw"), params)
    unpack(fresh, tensors, json.loads(json.dumps(scalars, allow_nan=False)))
    assert fresh.state[params["v"]] == {"best": float("-inf"), "on": True, "nothing": None, "third": 1 / 3}


RESUME = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from test_optim import advance, build_optimizer, config, torch, unpack, weights
for name in sys.argv[3:]:
    folder = Path(sys.argv[2]) / name
    params = weights(seed=3)
    with torch.no_grad():
        for n, value in load_file(folder / "weights.safetensors").items():
            params[n].copy_(value)
    optimizer = build_optimizer(config(name), params)
    unpack(optimizer, load_file(folder / "optimizer.safetensors"), json.loads((folder / "optimizer.json").read_text()))
    advance(optimizer, params, config(name), range(4, 8))
    save_file({n: p.detach() for n, p in params.items()}, folder / "resumed.safetensors")
"""


@pytest.mark.slow
def test_resuming_in_another_process_is_bit_exact(tmp_path):
    expected = {}
    for name in ALL:
        params, folder = weights(), tmp_path / name
        folder.mkdir()
        optimizer = build_optimizer(config(name), params)
        advance(optimizer, params, config(name), range(4))
        through_files(*pack(optimizer), folder)
        save_file({n: p.detach() for n, p in params.items()}, folder / "weights.safetensors")
        advance(optimizer, params, config(name), range(4, 8))
        expected[name] = as_bytes(params)
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RESUME, here, str(tmp_path), *ALL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for name in ALL:
        assert as_bytes(load_file(tmp_path / name / "resumed.safetensors")) == expected[name], name


# --- the learning rate ----------------------------------------------------------------------------------------------


def transformers_schedule(cfg, total):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    name = "constant_with_warmup" if cfg.lr_scheduler == "constant" else cfg.lr_scheduler
    extra = {"num_cycles": cfg.lr_cycles} if name == "cosine_with_restarts" else {}
    scheduler = get_scheduler(name, optimizer, cfg.lr_warmup_steps, total, scheduler_specific_kwargs=extra)
    for _ in range(total + 1):
        yield optimizer.param_groups[0]["lr"]
        scheduler.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("cycles", [1, 3])
@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "cosine_with_restarts"])
def test_shapes_are_those_of_transformers_but_for_the_warm_up_of_one_step_earlier(shape, cycles, warmup):
    cfg, total = config(lr_scheduler=shape, lr_cycles=cycles, lr_warmup_steps=warmup), 40
    theirs = list(transformers_schedule(cfg, total))
    ours = [lr_at(cfg, step, total) for step in range(total + 1)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])


@given(
    shape=st.sampled_from(["linear", "cosine", "cosine_with_restarts"]),
    ratio=st.floats(0, 1),
    warmup=st.integers(0, 30),
    total=st.integers(1, 30),
)
def test_the_rate_stays_between_its_ends(shape, ratio, warmup, total):
    cfg = config(lr=2.0, lr_scheduler=shape, lr_min_ratio=ratio, lr_warmup_steps=warmup, lr_cycles=2)
    after = [lr_at(cfg, step, total) for step in range(warmup, total + 5)]
    assert all(2.0 * ratio - 1e-12 <= lr <= 2.0 + 1e-12 for lr in after)
    assert lr_at(cfg, max(total, warmup + 1), total) == pytest.approx(2.0 * ratio)
    assert all(0 < lr_at(cfg, step, total) <= 2.0 for step in range(warmup))


def test_set_lr_reaches_every_group():
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))]}]
    )
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_every_optimizer_of_the_schema_has_a_row_in_the_docs_of_the_module():
    assert isinstance(optim, types.ModuleType)
    assert all(f"| {name} |" in (optim.__doc__ or "") for name in ALL)
