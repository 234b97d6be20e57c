"""The training adapter: its file, spelt in every way and wrong in every way; on, removed, merged, under everything."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from detour import UserError
from detour.config.job import NetworkConfig
from detour.nn import lora
from detour.nn.adapter_file import Pair
from detour.nn.training_adapter import TrainingAdapter, linear_shapes, load_training_adapter
from detour.weights import Placement, materialise
from zstack import DIM, Stack, StackKeys, StackSpec, gradients, inputs, linears, quantise, relative, shapes

KEYS, SPEC, RANK = StackKeys(), StackSpec(), 4
BLOCKS = [name for name in shapes(Stack()) if name.startswith("layers.")]


@cache
def factors(size: float = 0.05, rank: int = RANK, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B for every layer of the main blocks; `size` is |B A| relative to a weight of the stack."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in BLOCKS:
        out_features, in_features = shapes(Stack())[name]
        A, B = torch.randn(rank, in_features, generator=generator), torch.randn(out_features, rank, generator=generator)
        pairs[name] = (A, B * size * Stack().get_submodule(name).weight.norm() / (B @ A).norm())
    return pairs


def comfy(pairs=None) -> dict[str, torch.Tensor]:
    """The published adapters' spelling."""
    return {
        f"diffusion_model.{name}.lora_{half}.weight": tensor.clone()
        for name, pair in (pairs or factors()).items()
        for half, tensor in zip("AB", pair, strict=True)
    }


def write(tmp_path, tensors, metadata=None):
    path = tmp_path / "adapter.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def load(tmp_path, tensors, mode="factored", dtype=torch.float32, metadata=None) -> TrainingAdapter:
    return load_training_adapter(write(tmp_path, tensors, metadata), shapes(Stack()), KEYS, mode, dtype=dtype)


def plain_adapter(mode="factored", dtype=torch.float32, size=0.05) -> TrainingAdapter:
    return TrainingAdapter({n: Pair(A, B, 1.0) for n, (A, B) in factors(size).items()}, mode, dtype=dtype)


def merged_stack(adapter: TrainingAdapter, dtype=torch.float32, quantizer=None) -> Stack:
    """A stack loaded through `patch`, as the trainer loads a model."""
    with torch.device("meta"):
        model = Stack()
    weights = Stack(dtype=dtype).state_dict()
    placement = Placement(dtype, torch.device("cpu"), quantizer, adapter.patch)
    materialise(model, weights.items(), placement, where="test")
    return model.eval()


def expected_stack(pairs, scale=1.0) -> Stack:
    model = Stack()
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            model.get_submodule(name).weight.add_(scale * B @ A)
    return model


# --- spellings ------------------------------------------------------------------------------------------------------


def spell(style: str, pairs, alpha: float | None) -> dict[str, torch.Tensor]:
    halves = {"down_up": ("lora_down.weight", "lora_up.weight"), "old": ("lora.down.weight", "lora.up.weight")}
    prefix, _, names = style.partition("/")
    first, second = halves.get(names, ("lora_A.weight", "lora_B.weight"))
    tensors = {}
    for name, (A, B) in pairs.items():
        stem = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        tensors |= {f"{stem}.{first}": A, f"{stem}.{second}": B}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


STYLES = ["diffusion_model./AB", "diffusion_model./down_up", "transformer./AB", "transformer./old", "/AB", "/down_up"]


@pytest.mark.parametrize("style", [*STYLES, "base_model.model./AB", "lora_unet_/down_up"])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_spelling_means_the_same(tmp_path, style, alpha):
    pairs = factors()
    adapter = load(tmp_path, spell(style, pairs, alpha))
    model = Stack()
    adapter.attach(model)
    expected = expected_stack(pairs, 1.0 if alpha is None else alpha / RANK)
    assert adapter.names == BLOCKS
    assert relative(model(inputs()), expected(inputs())) < 1e-6


def test_peft_adapter_names_in_keys(tmp_path):
    tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in comfy().items()}
    assert load(tmp_path, tensors).names == BLOCKS


def test_ranks_may_differ_between_layers(tmp_path):
    pairs = factors() | {BLOCKS[0]: factors(rank=7)[BLOCKS[0]]}
    model = Stack()
    load(tmp_path, comfy(pairs)).attach(model)
    assert relative(model(inputs()), expected_stack(pairs)(inputs())) < 1e-6


@pytest.mark.parametrize("pattern", [{}, {"^layers\\.0\\.attention\\.to_q": 8, "feed_forward.w2": 1}])
def test_alphas_in_diffusers_header_count(tmp_path, pattern):
    """Written by diffusers' `save_lora_weights`; such a file has no alpha tensors."""
    header = {"transformer.r": RANK, "transformer.lora_alpha": 2, "transformer.alpha_pattern": pattern}
    tensors = spell("transformer./AB", factors(), None)
    adapter = load(tmp_path, tensors, metadata={"lora_adapter_metadata": json.dumps(header)})
    scales = {name: branch.pair.scale for name, branch in adapter._branches.items()}
    expected = {name: 2 / RANK for name in BLOCKS}
    if pattern:
        expected |= {"layers.0.attention.to_q": 8 / RANK}
        expected |= {f"layers.{index}.feed_forward.w2": 1 / RANK for index in (0, 1)}
    assert scales == expected


def test_the_file_is_read_without_the_model(tmp_path):
    with torch.device("meta"):
        on_meta = linear_shapes(Stack())
    path = write(tmp_path, comfy())
    adapter = load_training_adapter(path, on_meta, KEYS, "factored", dtype=torch.float32)
    assert adapter.names == BLOCKS
    assert adapter.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- everything that can be wrong with the file ---------------------------------------------------------------------


def _rename(tensors, old, new):
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def _without(tensors, *parts):
    return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}


def _changed(tensors, key, tensor):
    return tensors | {f"diffusion_model.{key}": tensor}


WRONG = {
    "of another model": (
        lambda t: _rename(t, "layers.", "transformer_blocks."),
        r"another model: 0 of its 14 layers are in this one, and there is no diffusion_model\.transformer_blocks\.0",
    ),
    "deeper model": (lambda t: t | _rename(t, "layers.1", "layers.2"), "14 of its 21 layers are in this one"),
    "unknown prefix": (lambda t: _rename(t, "diffusion_model.", "unet."), "there is no unet.layers.0"),
    "wider model": (
        lambda t: {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in t.items()},
        r"layers\.0\.attention\.to_q needs A rank x 64 and B 64 x rank, but A is 4x128 and B 64x4",
    ),
    "half missing": (lambda t: _without(t, "layers.1.attention.to_k.lora_B"), r"to_k is incomplete: its lora_B \(up\)"),
    "other half missing": (lambda t: _without(t, "layers.1.attention.to_k.lora_A"), r"its lora_A \(down\) is missing"),
    "ranks differ": (
        lambda t: _changed(t, "layers.0.attention.to_q.lora_A.weight", torch.randn(5, DIM)),
        r"halves have different ranks \(5 and 4\)",
    ),
    "rank zero": (
        lambda t: t
        | {
            "diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.randn(0, DIM),
            "diffusion_model.layers.0.attention.to_q.lora_B.weight": torch.randn(DIM, 0),
        },
        "different ranks",
    ),
    "three dimensions": (
        lambda t: _changed(t, "layers.0.attention.to_q.lora_A.weight", torch.randn(4, DIM, 1)),
        "but A is 4x64x1",
    ),
    "a layer missing": (
        lambda t: _without(t, "layers.1.feed_forward.w2."),
        r"of the 2 layers layers\.\*\.feed_forward\.w2, 1 are missing \(layers\.1\.feed_forward\.w2\)",
    ),
    "a block missing": (lambda t: _without(t, "layers.0."), r"layers layers\.\*\.attention\.to_q, 1 are missing"),
    "not finite": (
        lambda t: _changed(t, "layers.0.attention.to_q.lora_B.weight", torch.full((DIM, 4), float("nan"))),
        "to_q holds values that are not finite",
    ),
    "empty": (lambda t: {}, "it holds no tensors"),
    "all zero": (lambda t: {key: torch.zeros_like(tensor) for key, tensor in t.items()}, "it is all zero"),
    "a model": (lambda t: dict(Stack().state_dict()), "it is not a LoRA.*is it a whole model"),
    "with something more": (lambda t: t | {"step": torch.zeros(1)}, "tensors that no LoRA has: step"),
    "a LoKr": (lambda t: {"diffusion_model.layers.0.attention.to_q.lokr_w1": torch.zeros(4, 4)}, "it is a LoKr"),
    "a LoHa": (lambda t: {"layers.0.attention.to_q.hada_w1_a": torch.zeros(4, 4)}, "it is a LoHa"),
    "a DoRA": (lambda t: _changed(t, "layers.0.attention.to_q.dora_scale", torch.zeros(DIM, 1)), "it is a DoRA"),
    "alpha zero": (lambda t: _changed(t, "layers.0.attention.to_q.alpha", torch.tensor(0.0)), "its alpha is 0.0"),
    "alpha nan": (lambda t: _changed(t, "layers.0.attention.to_q.alpha", torch.tensor(torch.nan)), "its alpha is nan"),
    "alpha of many": (lambda t: _changed(t, "layers.0.attention.to_q.alpha", torch.ones(2)), "not one number but 2"),
    "alpha alone": (lambda t: t | {"cap_embedder.1.alpha": torch.tensor(4.0)}, "cap_embedder.1 is incomplete"),
    "twice": (lambda t: t | _rename(t, "diffusion_model.", "transformer."), "twice, under different prefixes"),
    "twice by spelling": (lambda t: t | _rename(t, "lora_A", "lora_down"), "two tensors for the same half"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_an_error_that_says_what(tmp_path, case):
    change, said = WRONG[case]
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path, change(comfy()))
    assert str(tmp_path / "adapter.safetensors") in str(error.value)


@pytest.mark.parametrize(
    "header", ["{", "[1]", '{"transformer.lora_alpha": "much"}', '{"transformer.alpha_pattern": {"(": 1}}']
)
def test_a_header_that_cannot_be_understood_is_an_error(tmp_path, header):
    with pytest.raises(UserError, match="lora_adapter_metadata that cannot be understood"):
        load(tmp_path, spell("transformer./AB", factors(), None), metadata={"lora_adapter_metadata": header})


def test_an_rslora_is_refused(tmp_path):
    with pytest.raises(UserError, match="rsLoRA"):
        load(tmp_path, comfy(), metadata={"lora_adapter_metadata": '{"transformer.use_rslora": true}'})


def test_files_that_are_no_safetensors(tmp_path):
    read = partial(load_training_adapter, shapes=shapes(Stack()), keys=KEYS, mode="factored", dtype=torch.float32)
    path = write(tmp_path, comfy())
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    for wrong in (path, tmp_path / "text.safetensors", tmp_path / "nothing_here.safetensors", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(wrong))):
            read(wrong)


@given(lost=st.sets(st.sampled_from(sorted(comfy())), min_size=1))
@settings(max_examples=20, deadline=None)
def test_whatever_is_lost_from_the_file_is_noticed(tmp_path_factory, lost):
    """Unless whole families went, which makes a smaller adapter, not a broken one."""
    left = {key: tensor for key, tensor in comfy().items() if key not in lost}
    families = Counter(key.split(".", 3)[3].split(".lora_")[0] for key in left)
    folder = tmp_path_factory.mktemp("adapter")
    if left and set(families.values()) == {4}:  # two halves in each of two blocks
        assert len(load(folder, left).names) == 2 * len(families)
    else:
        with pytest.raises(UserError):
            load(folder, left)


# --- factored -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", [None, "int8", "float8", "nf4"])
@pytest.mark.parametrize("wrap", ["none", "before", "after"])
def test_removed_is_the_untouched_model_bit_for_bit(qtype, wrap):
    dtype, x = torch.bfloat16, inputs(dtype=torch.bfloat16)
    model, untouched = (quantise(Stack(dtype=dtype), qtype) if qtype else Stack(dtype=dtype) for _ in range(2))
    adapter = plain_adapter(dtype=dtype)
    if wrap == "after":
        adapter.attach(model)
    if wrap != "none":
        lora.attach(model, BLOCKS, NetworkConfig(linear=2), 1)
    if wrap != "after":
        adapter.attach(model)
    on = model(x)
    assert relative(on, untouched(x)) > 1e-2
    with adapter.removed():
        assert torch.equal(model(x), untouched(x))
    assert torch.equal(model(x), on)
    if wrap != "none":
        model(x).float().square().mean().backward()
        with adapter.removed():
            assert torch.equal(model(x), untouched(x)), "a training step changed the removed model"


def test_attached_before_and_after_peft_train_the_same_lora():
    found = []
    for first in (True, False):
        model, adapter = Stack(), plain_adapter()
        if first:
            adapter.attach(model)
        lora.attach(model, BLOCKS, NetworkConfig(linear=2), 1)
        if not first:
            adapter.attach(model)
        found.append(gradients(model, inputs(), lora.trainable(model)))
    assert all(relative(found[0][name], found[1][name]) < 1e-5 for name in found[0] if found[1][name].any())


def test_the_adapter_is_no_part_of_the_model():
    model, plain = Stack(), Stack()
    adapter = plain_adapter()
    adapter.attach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    lora.attach(model, BLOCKS, NetworkConfig(linear=2), 1)
    model(inputs()).sum().backward()
    branch = adapter._branches[BLOCKS[0]]
    assert not branch.A.requires_grad and not branch.B.requires_grad and branch.A.grad is None
    adapter.detach()
    assert torch.equal(model(inputs()), plain(inputs()))


def test_attached_twice_is_a_mistake():
    adapter = plain_adapter()
    adapter.attach(Stack())
    with pytest.raises(ValueError, match="attached already"):
        adapter.attach(Stack())


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_removed_nests_and_survives_exceptions(mode):
    adapter = plain_adapter(mode)
    model = merged_stack(adapter)
    adapter.attach(model)
    on = model(inputs())
    assert adapter.active
    with adapter.removed():
        off = model(inputs())
        with adapter.removed():
            assert not adapter.active
            assert torch.equal(model(inputs()), off)
        assert not adapter.active and torch.equal(model(inputs()), off)
    with pytest.raises(KeyboardInterrupt), adapter.removed(), adapter.removed():
        raise KeyboardInterrupt
    assert adapter.active and torch.equal(model(inputs()), on)
    assert not torch.equal(on, off)


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_gradients_under_checkpointing_are_bit_equal(mode):
    adapter = plain_adapter(mode)
    model = merged_stack(adapter)
    lora.attach(model, BLOCKS, NetworkConfig(linear=2), 1)
    adapter.attach(model)
    for context in (adapter.removed, torch.enable_grad):
        with context():
            model.checkpointing = False
            plain = gradients(model, inputs(), lora.trainable(model))
            model.checkpointing = True
            again = gradients(model, inputs(), lora.trainable(model))
        assert all(torch.equal(plain[name], again[name]) for name in plain)
        assert any(value.any() for value in plain.values())


def test_sampling_between_two_halves_of_a_step_leaves_the_gradient():
    adapter, model = plain_adapter(), Stack()
    lora.attach(model, BLOCKS, NetworkConfig(linear=2), 1)
    adapter.attach(model)
    model.checkpointing = True
    plain = gradients(model, inputs(), lora.trainable(model))
    model.zero_grad()
    loss = model(inputs()).square().mean()
    with adapter.removed(), torch.no_grad():
        model(inputs(3))
    loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in lora.trainable(model).items())


def test_the_adapter_takes_part_in_the_gradient():
    """Its branch is linear, so the gradient is that of a model with W + D as its weights."""
    pairs = factors()
    model, expected = Stack(), expected_stack(pairs)
    plain_adapter().attach(model)
    found = []
    for stack in (model, expected):
        lora.attach(stack, BLOCKS, NetworkConfig(linear=2), 1)
        with torch.no_grad():
            for name, parameter in lora.trainable(stack).items():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        x = inputs().requires_grad_()
        found.append(gradients(stack, x, lora.trainable(stack)) | {"input": x.grad})
    assert all(relative(found[0][name], value) < 1e-5 for name, value in found[1].items())


def test_a_dora_is_not_scaled_by_nor_scales_the_branch():
    """y = D x + m/|V| V x, so that magnitudes away from |W| multiply the model's part only."""
    model, alone, adapter = Stack(), Stack(), plain_adapter()
    for stack in (model, alone):
        lora.attach(stack, BLOCKS, NetworkConfig(type="dora", linear=2), 1)
        with torch.no_grad():
            for name, parameter in lora.trainable(stack).items():
                parameter.mul_(1.5) if "magnitude" in name else parameter.add_(0.02)
    adapter.attach(model)
    x, name = inputs(), BLOCKS[0]
    A, B = factors()[name]
    assert relative(model.get_submodule(name)(x), alone.get_submodule(name)(x) + x @ A.T @ B.T) < 1e-6
    with lora.scaled(model, 0.0):
        assert relative(model.get_submodule(name)(x), Stack().get_submodule(name)(x) + x @ A.T @ B.T) < 1e-6
    with lora.scaled(model, 0.5), adapter.removed(), lora.disabled(model):
        assert torch.equal(model(x), Stack()(x))


def test_branches_follow_the_type_and_autocast():
    adapter, model = plain_adapter(), Stack()
    adapter.attach(model)
    in_float32 = model(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(inputs()), in_float32) < 0.02
    model.to(torch.bfloat16)
    assert relative(model(inputs(dtype=torch.bfloat16)), in_float32) < 0.02
    # Back in float32, the branch is made from the file's own values again.
    fresh = Stack()
    adapter.detach()
    adapter.attach(fresh)
    assert torch.equal(fresh(inputs()), in_float32)


def test_moving_prepares_the_branches_in_the_models_type():
    adapter = plain_adapter(dtype=torch.bfloat16).to(torch.device("cpu"))
    assert {branch.A.dtype for branch in adapter._branches.values()} == {torch.bfloat16}


# --- merged ---------------------------------------------------------------------------------------------------------

# Relative difference of outputs and of LoRA gradients between the modes. float32: rounding alone. bf16: both are within
# the rounding of bf16 products (measured 0.5 % and 0.8 % here); merged adds the rounding of W + D to it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_factored_and_merged_agree_on_output_and_gradient(dtype):
    outputs, grads = [], []
    for mode in ("factored", "merged"):
        adapter = plain_adapter(mode, dtype)
        model = merged_stack(adapter, dtype)
        lora.attach(model, BLOCKS, NetworkConfig(linear=2), 1)
        adapter.attach(model)
        outputs.append(model(inputs(dtype=dtype)))
        found = gradients(model, inputs(dtype=dtype), lora.trainable(model))
        grads.append(torch.cat([value.flatten() for value in found.values()]))
    assert relative(outputs[1], outputs[0]) < TOLERANCE[dtype]
    assert relative(grads[1], grads[0]) < TOLERANCE[dtype]
    assert relative(outputs[0], Stack()(inputs())) > 0.03, "the adapter must matter here"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merged_and_removed_is_the_model_up_to_rounding(dtype):
    adapter, x = plain_adapter("merged", dtype), inputs(dtype=dtype)
    model = merged_stack(adapter, dtype)
    adapter.attach(model)
    with adapter.removed():
        assert relative(model(x), Stack(dtype=dtype)(x)) < TOLERANCE[dtype]
    assert relative(model(x), expected_stack(factors())(x.float())) < TOLERANCE[dtype]


def test_patch_touches_its_own_weights_only_and_adds_in_float32():
    pairs, adapter = factors(), plain_adapter("merged", torch.bfloat16)
    A, B = pairs[BLOCKS[0]]
    W = Stack(dtype=torch.bfloat16).get_submodule(BLOCKS[0]).weight
    merged = adapter.patch(f"{BLOCKS[0]}.weight", W)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, W.float() + B @ A)
    for name in ("layers.0.norm.weight", "cap_embedder.1.weight", "layers.0.feed_forward.w1.bias", BLOCKS[0]):
        tensor = torch.ones(3)
        assert adapter.patch(name, tensor) is tensor
    factored = plain_adapter()
    assert factored.patch(f"{BLOCKS[0]}.weight", W) is W and factored.merge_error is None


@pytest.mark.parametrize(("size", "kept", "error"), [(0.06, 0.99, 0.05), (0.009, 0.97, 0.3)])
def test_merge_error_is_what_rounding_did(size, kept, error):
    """Figures of the same size as measured on 1024 wide layers: 2.7 % and 17.6 % of the adapter at 6.3 % and 0.9 %."""
    adapter = plain_adapter("merged", torch.bfloat16, size)
    model = merged_stack(adapter, torch.bfloat16)
    measured, plain = adapter.merge_error, Stack(dtype=torch.bfloat16)
    W, M, D = (
        torch.cat([tensor.flatten() for tensor in tensors])
        for tensors in zip(
            *(
                (plain.get_submodule(n).weight.float(), model.get_submodule(n).weight.float(), B @ A)
                for n, (A, B) in factors(size).items()
            ),
            strict=True,
        )
    )
    assert measured.weights == pytest.approx(float((M - D - W).norm() / W.norm()), rel=1e-3)
    assert measured.adapter == pytest.approx(float((M - W - D).norm() / D.norm()), rel=1e-3)
    assert measured.kept == pytest.approx(float((M - W) @ D / (D @ D)), rel=1e-3)
    assert kept < measured.kept < 1.03 and measured.adapter < error
    assert f"{measured.weights:.2%}" in str(measured)


def test_merge_error_in_float32_is_nothing():
    adapter = plain_adapter("merged")
    merged_stack(adapter)
    assert adapter.merge_error.weights < 1e-7 and adapter.merge_error.kept == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("qtype", ["int8", "float8", "nf4"])
def test_merged_before_quantising(qtype):
    from detour.nn.quant import dense_weight, qtype_of, quantizer

    adapter = plain_adapter("merged", torch.bfloat16)
    model = merged_stack(adapter, torch.bfloat16, quantizer(qtype, "", torch.device("cpu")))
    adapter.attach(model)
    assert {qtype_of(linear) for linear in linears(model).values()} == {qtype}
    name = BLOCKS[0]
    A, B = factors()[name]
    assert relative(dense_weight(model.get_submodule(name)), Stack().get_submodule(name).weight + B @ A) < 0.11
    x = inputs(dtype=torch.bfloat16)
    with adapter.removed():
        off = model(x)
    assert relative(off, model(x)) > 1e-2


def test_a_model_that_was_not_loaded_through_patch_is_noticed():
    with pytest.raises(ValueError, match="14 layers were not merged"):
        plain_adapter("merged").attach(Stack())


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_what_trains_the_merged_weights_themselves_is_refused(kind):
    for mode in ("merged", "factored"):
        adapter = plain_adapter(mode)
        model, network = merged_stack(adapter), NetworkConfig(type=kind, linear=2)
        lora.attach(model, lora.linear_names(model, SPEC, network), network, 1)
        if mode == "factored":
            adapter.attach(model)
            continue
        with pytest.raises(UserError, match=f"network.type: {kind}.*assistant_lora_mode: factored"):
            adapter.attach(model)
