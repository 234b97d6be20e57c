"""Quantised base, training adapter and LoRA together on the miniature Z-Image, loaded as the trainer loads it."""

from __future__ import annotations

import pytest
import torch

from detour import archs
from detour.config.job import NetworkConfig
from detour.nano import zimage as nano
from detour.nn import lora
from detour.nn.quant import linear_bytes, qtype_of, quantizer
from detour.nn.training_adapter import linear_shapes, load_training_adapter
from detour.weights import Placement, find_model, materialise
from zstack import gradients, relative

ARCH = archs.get("zimage")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of the miniature, and its training adapter."""
    folder = tmp_path_factory.mktemp("model")
    nano.write(folder)
    nano.write_adapter(folder / "adapter.safetensors", folder)
    return folder


def load(folder, mode=None, qtype=None, dtype=torch.bfloat16):
    """Denoiser and adapter: the adapter is checked before any weight is read."""
    source = find_model(str(folder), components=ARCH.spec.components, denoiser=ARCH.spec.denoiser)
    denoiser = ARCH.build_denoiser(source)
    adapter = None
    if mode is not None:
        path, shapes = folder / "adapter.safetensors", linear_shapes(denoiser)
        adapter = load_training_adapter(path, shapes, ARCH.spec.lora_keys, mode, dtype=dtype)
    quantise = quantizer(qtype, ARCH.spec.quantize_exclude, CPU) if qtype else None
    placement = Placement(dtype, CPU, quantise, adapter.patch if adapter else None)
    materialise(denoiser, ARCH.denoiser_tensors(source), placement, where=str(folder))
    return denoiser.eval().requires_grad_(False), adapter


def predict(denoiser):
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    text = denoiser.config.cap_feat_dim
    tokens = torch.randn(9, text, generator=torch.Generator().manual_seed(1))
    return ARCH.predict(denoiser, latents, torch.tensor([0.6]), [{"tokens_LD": tokens}])


def with_lora(denoiser, network):
    names = lora.linear_names(denoiser, ARCH.spec, network)
    lora.attach(denoiser, names, network, seed=42)
    return names


def test_the_architectures_patterns_name_the_layers_of_its_blocks(model):
    denoiser, _ = load(model)
    blocks = lora.linear_names(denoiser, ARCH.spec, NetworkConfig())
    every = lora.linear_names(denoiser, ARCH.spec, NetworkConfig(transformer_only=False))
    assert len(blocks) == nano.LAYERS * 8
    assert every == list(linear_shapes(denoiser))


@pytest.mark.parametrize("qtype", [None, "int8", "float8", "nf4"])
def test_sampling_with_a_fresh_lora_is_the_untouched_turbo_bit_for_bit(model, qtype):
    with torch.no_grad():
        untouched = predict(load(model, qtype=qtype)[0])
        denoiser, adapter = load(model, "factored", qtype)
        with_lora(denoiser, NetworkConfig(linear=4))
        adapter.attach(denoiser)
        assert relative(predict(denoiser), untouched) > 0.02
        with adapter.removed():
            assert torch.equal(predict(denoiser), untouched)
    kinds = {qtype_of(module) for module in denoiser.modules() if isinstance(module, torch.nn.Linear)}
    assert qtype in kinds
    if qtype:
        assert linear_bytes(denoiser.layers[0]) < linear_bytes(load(model)[0].layers[0])


@pytest.mark.parametrize("mode", ["factored", "merged"])
def test_a_training_step_under_diffusers_checkpointing_is_bit_equal(model, mode):
    denoiser, adapter = load(model, mode, "float8")
    names = with_lora(denoiser, NetworkConfig(linear=4))
    adapter.attach(denoiser)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        found.append(gradients(denoiser, None, lora.trainable(denoiser), forward=predict))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert len(found[0]) == 2 * len(names) and all(v.any() for n, v in found[0].items() if n.endswith("lora_B.weight"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_both_modes_train_the_same_lora(model, dtype, tolerance):
    grads, outputs = [], []
    for mode in ("factored", "merged"):
        denoiser, adapter = load(model, mode, dtype=dtype)
        with_lora(denoiser, NetworkConfig(linear=4))
        adapter.attach(denoiser)
        outputs.append(predict(denoiser))
        found = gradients(denoiser, None, lora.trainable(denoiser), forward=predict)
        grads.append(torch.cat([value.flatten() for value in found.values()]))
    assert relative(outputs[1], outputs[0]) < tolerance
    assert relative(grads[1], grads[0]) < tolerance
