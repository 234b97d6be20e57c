"""Reading LoRA files of every make, refusing what would load wrong, and converting without loss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_cases as cases
from detour import UserError
from detour.archs.zimage import SPEC
from detour.export import convert, read_lora, write_lora
from detour.nn import lora as peft_layers
from detour.nn.families import count_by_family, guess

Q, K = "layers.0.attention.to_q", "layers.0.attention.to_k"
METADATA = {"modelspec.title": "x", "ss_network_dim": "4", "other": "ü"}


def pair(
    stem: str, *, rank: int = 2, out: int = 48, inside: int = 48, down: str = "lora_A", up: str = "lora_B"
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(len(stem))
    return {
        f"{stem}.{down}.weight": torch.randn(rank, inside, generator=g),
        f"{stem}.{up}.weight": torch.randn(out, rank, generator=g),
    }


def alpha(stem: str, value: float) -> dict[str, Tensor]:
    return {f"{stem}.alpha": torch.tensor(value)}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, name: str = "in.safetensors") -> Path:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return write


# ---- without loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [4.0, 1.3])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_there_and_back_through_every_format_is_the_same_file(tmp_path: Path, value: float, dtype: str) -> None:
    _, lora = cases.file_of("lora", alpha=value)
    first = tmp_path / "comfy.safetensors"
    write_lora(first, lora, cases.base(), "comfy", dtype=dtype, metadata=METADATA)
    path, trail = first, []
    for number, fmt in enumerate(("diffusers", "kohya", "diffusers", "comfy")):
        written = convert(path, tmp_path / f"{number}.safetensors", SPEC, fmt)
        assert written.proof.modules == 37
        path = written.path
        trail.append(read_lora(path, SPEC))
    assert path.read_bytes() == first.read_bytes()
    for back in trail:
        assert all(found == pytest.approx(value, rel=1e-7) for found in back.alphas.values())
        assert back.metadata["modelspec.title"] == "x"
        assert back.metadata["other"] == "ü"


@pytest.mark.parametrize("kind", ["lokr", "dora", "loha"])
def test_other_kinds_keep_every_bit(tmp_path: Path, kind: str) -> None:
    _, lora = cases.file_of(kind, alpha=4)
    start = {"dora": "diffusers"}.get(kind, "comfy")
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_lora(first, lora, cases.base(), start, dtype="bf16", metadata={})
    if kind == "lokr":
        convert(first, second, SPEC, "diffusers", cases.shapes())
        convert(second, third, SPEC, "comfy", cases.shapes())
    else:
        convert(first, third, SPEC, start)
    assert read_lora(third, SPEC).kind == kind
    if kind != "lokr":  # the nominal rank of a LoKr with whole factors is not in a file
        assert third.read_bytes() == first.read_bytes()
    a, b = read_lora(first, SPEC), read_lora(third, SPEC)
    assert all(torch.equal(b.tensors[name], tensor) for name, tensor in a.tensors.items())


def test_a_converted_file_gives_the_same_picture(tmp_path: Path) -> None:
    model, lora = cases.file_of("lora", alpha=3)
    write_lora(tmp_path / "a.safetensors", lora, cases.base(), "kohya", dtype="fp32", metadata={})
    for fmt in ("comfy", "diffusers"):
        convert(tmp_path / "a.safetensors", tmp_path / f"{fmt}.safetensors", SPEC, fmt)
        loaded, count = cases.through_pipeline(tmp_path / f"{fmt}.safetensors")
        assert count == 37
        assert torch.allclose(cases.output(loaded), cases.output(model), rtol=0, atol=1e-5)


# ---- files of other programs ---------------------------------------------------------------------------------------


def test_a_file_without_alpha_is_read_as_every_loader_does(save: Callable[..., Path], tmp_path: Path) -> None:
    """ai-toolkit's: comfy keys, scaled to alpha = rank, no alpha."""
    path = save(pair(f"diffusion_model.{Q}", rank=3) | pair(f"diffusion_model.{K}", rank=2))
    lora = read_lora(path, SPEC)
    assert (lora.format, lora.kind) == ("comfy", "lora")
    assert lora.ranks == {Q: 3, K: 2}
    assert lora.alphas == {Q: 3.0, K: 2.0}
    assert lora.notes == ("no alpha in the file: taken as the rank, a scale of 1, as every loader does",)
    written = convert(path, tmp_path / "out.safetensors", SPEC, "kohya")
    assert lora.notes[0] in written.notes
    assert read_lora(written.path, SPEC).alphas == lora.alphas


def test_alpha_of_some_layers_only_is_said(save: Callable[..., Path]) -> None:
    q, k = f"diffusion_model.{Q}", f"diffusion_model.{K}"
    lora = read_lora(save(pair(q) | alpha(q, 1) | pair(k)), SPEC)
    assert lora.alphas == {Q: 1.0, K: 2.0}
    assert "no alpha for 1 of 2 layers" in lora.notes[0]


def test_an_alpha_in_the_header_alone_is_said_to_count_for_nothing(save: Callable[..., Path]) -> None:
    lora = read_lora(save(pair(f"diffusion_model.{Q}"), {"ss_network_alpha": "1"}), SPEC)
    assert lora.alphas == {Q: 2.0}
    assert any("ss_network_alpha 1" in note for note in lora.notes)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_kohya_names_of_every_layer_are_understood(save: Callable[..., Path], prefix: str) -> None:
    tensors: dict[str, Tensor] = {}
    for name, (out, inside) in cases.shapes().items():
        stem = prefix + name.replace(".", "_")
        tensors |= pair(stem, out=out, inside=inside, down="lora_down", up="lora_up") | alpha(stem, 1.0)
    path = save(tensors)
    for known in (None, cases.shapes()):
        lora = read_lora(path, SPEC, known)
        assert set(lora.modules) == set(cases.layers())
        assert set(lora.alphas.values()) == {1.0}


@pytest.mark.parametrize(
    ("down", "up"), [("lora.down", "lora.up"), ("lora_A.default", "lora_B.default"), ("lora_down", "lora_up")]
)
def test_other_spellings_of_the_factors(save: Callable[..., Path], down: str, up: str) -> None:
    lora = read_lora(save(pair(f"transformer.{Q}", down=down, up=up)), SPEC)
    assert set(lora.tensors) == {f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"}


def test_diffusers_own_file_with_its_header(tmp_path: Path) -> None:
    """As `save_lora_weights` writes it from a training script, alpha 2 at rank 4."""
    from diffusers import ZImagePipeline
    from diffusers.training_utils import _collate_lora_metadata

    model, tensors = cases.trained("lora", alpha=2)
    header = _collate_lora_metadata({"transformer": model})
    ZImagePipeline.save_lora_weights(tmp_path, tensors, weight_name="x.safetensors", **header)
    lora = read_lora(tmp_path / "x.safetensors", SPEC, cases.shapes())
    assert (lora.format, lora.rank, lora.alpha, len(lora.modules)) == ("diffusers", 4, 2.0, 37)
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", SPEC, "comfy")
    loaded, _ = cases.through_pipeline(tmp_path / "y.safetensors")
    assert torch.allclose(cases.output(loaded), cases.output(model), rtol=0, atol=1e-6)


def test_pefts_own_file_with_its_config_beside_it(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(pair(f"base_model.model.{Q}", rank=4))
    assert read_lora(path, SPEC).alphas == {Q: 4.0}
    options = {"r": 4, "lora_alpha": 8, "alpha_pattern": {}, "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    lora = read_lora(path, SPEC)
    assert (lora.format, lora.alphas, lora.notes) == ("peft", {Q: 8.0}, ())
    (tmp_path / "adapter_config.json").write_text(json.dumps(options | {"use_rslora": True}))
    assert read_lora(path, SPEC).scale(Q) == pytest.approx(8 / 4**0.5)
    (tmp_path / "adapter_config.json").write_text("not json")
    with pytest.raises(UserError, match="cannot be read"):
        read_lora(path, SPEC)


def test_a_pattern_in_the_header_is_pefts_regular_expression(save: Callable[..., Path]) -> None:
    options = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"to_k": 1}}
    path = save(pair(f"transformer.{Q}") | pair(f"transformer.{K}"), {"lora_adapter_metadata": json.dumps(options)})
    assert read_lora(path, SPEC).alphas == {Q: 2.0, K: 1.0}


def test_alpha_under_diffusers_names_is_said_to_be_comfys(save: Callable[..., Path]) -> None:
    lora = read_lora(save(pair(f"transformer.{Q}") | alpha(f"transformer.{Q}", 1.0)), SPEC)
    assert lora.alphas == {Q: 1.0}
    assert "diffusers itself refuses" in lora.notes[0]


@pytest.mark.parametrize("stem", ["diffusion_model.layers.1.attention.{}", "lora_unet_layers_1_attention_{}"])
@pytest.mark.parametrize("known", [False, True])
def test_layers_that_are_one_in_the_original_layout_are_taken_apart(
    save: Callable[..., Path], tmp_path: Path, stem: str, known: bool
) -> None:
    """Trained on the model in its original layout, as kohya's programs do: `attention.qkv` is q, k and v."""
    qkv, out = stem.format("qkv"), stem.format("out")
    tensors = pair(qkv, out=3 * 48, down="lora_down", up="lora_up") | alpha(qkv, 1.0)
    tensors |= pair(out, down="lora_down", up="lora_up") | alpha(out, 2.0)
    lora = read_lora(save(tensors), SPEC, cases.shapes() if known else None)
    names = [f"layers.1.attention.to_{part}" for part in "qkv"]
    assert set(lora.modules) == {*names, "layers.1.attention.to_out.0"}
    changes = [
        lora.scale(name) * lora.tensors[f"{name}.lora_B.weight"] @ lora.tensors[f"{name}.lora_A.weight"]
        for name in names
    ]
    torch.testing.assert_close(
        torch.cat(changes), 0.5 * tensors[f"{qkv}.lora_up.weight"] @ tensors[f"{qkv}.lora_down.weight"]
    )
    written = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", SPEC, "comfy")
    assert written.proof.modules == 4 and written.proof.loader.startswith("diffusers")


# ---- refused -------------------------------------------------------------------------------------------------------


def prefixed(prefix: str, *names: str) -> dict[str, Tensor]:
    return {key: tensor for name in names for key, tensor in pair(prefix + name).items()}


C = "diffusion_model."
CQ, CK = C + Q, C + K
STRANGERS = {
    "bare names": (prefixed("", Q, K), r"layers without a prefix \(layers.0.attention.to_"),
    "flux": (
        prefixed("transformer.", "single_transformer_blocks.0.attn.to_q"),
        "not a LoRA of Z-Image: it looks like FLUX",
    ),
    "flux of kohya": (prefixed("lora_unet_", "double_blocks_0_img_attn_qkv"), "looks like FLUX"),
    "sdxl": (prefixed("lora_unet_", "down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_q"), "Diffusion XL"),
    "sd1": (prefixed("lora_unet_", "up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"), "Stable Diffusion 1"),
    "sd3": (prefixed("transformer.", "transformer_blocks.0.attn.add_q_proj"), "Stable Diffusion 3"),
    "wan": (prefixed(C, "blocks.0.self_attn.q"), "looks like Wan 2"),
    "lumina": (prefixed("transformer.", "layers.0.attn.to_q"), "looks like Lumina 2"),
    "qwen": (prefixed("transformer.", "transformer_blocks.0.img_mod.1"), "looks like Qwen-Image"),
    "fused, of another size": (prefixed(C, "layers.0.attention.qkv"), "48 inputs and 48 outputs is none of this model"),
    "fused, of diffusers": (prefixed("transformer.", "layers.0.attention.qkv"), "original layout"),
    "unknown": (prefixed(C, "no.such.layer"), r"1 of 1 layers are unknown to Z-Image \(diffusion_model.no"),
    "one unknown": (prefixed(C, Q, "no.such.layer"), "1 of 2 layers are unknown"),
    "a norm": (prefixed(C, "layers.0.attention_norm1"), "1 of 1 layers are unknown"),
    "text encoder": (prefixed("lora_te_", "model_layers_0_mlp") | prefixed("lora_unet_", "x"), "text encoder"),
    "two formats": (prefixed(C, Q) | prefixed("transformer.", K), "ambiguous"),
    "a model": ({f"{Q}.weight": torch.zeros(2, 2)}, r"not a LoRA; it holds the weights of a model \(Z-Image"),
    "anything": ({"x": torch.zeros(2)}, "not a LoRA; it holds no adapter's tensors, such as x"),
    "nothing": ({}, "empty"),
    "conv": (
        {f"{CQ}.lora_A.weight": torch.zeros(2, 4, 1, 1), f"{CQ}.lora_B.weight": torch.zeros(4, 2, 1, 1)},
        "only linear layers",
    ),
    "tucker": (pair(CQ) | {f"{CQ}.lokr_t2": torch.zeros(1)}, "of a kind that is not supported"),
    "diff": ({f"{CQ}.diff": torch.zeros(2, 2)}, "of a kind that is not supported"),
    "half a pair": ({f"{CQ}.lora_A.weight": torch.zeros(2, 4)}, "incomplete; layers.0.attention.to_q has lora_A"),
    "alpha alone": (pair(CQ) | alpha(CK, 1), "incomplete; .* has alpha alone"),
    "two kinds": (
        pair(CQ) | {f"{CK}.hada_w{i}_{s}": torch.ones(2, 2) for i in (1, 2) for s in "ab"},
        "several kinds of adapter",
    ),
    "twice": (pair(CQ) | pair(CQ, down="lora_down", up="lora_up"), "twice"),
    "ranks apart": (pair(CQ) | {f"{CQ}.lora_B.weight": torch.zeros(4, 3)}, "do not fit each other"),
    "alpha zero": (pair(CQ) | alpha(CQ, 0.0), "alpha of .* is 0.0; one positive number"),
    "alpha nan": (pair(CQ) | alpha(CQ, float("nan")), "one positive number"),
    "norms": (pair(CQ) | {f"{CQ}.dora_scale": torch.ones(1, 7)}, "7 norms for 48 output"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_would_load_wrong_is_refused(save: Callable[..., Path], tmp_path: Path, name: str) -> None:
    tensors, says = STRANGERS[name]
    path = save(tensors)
    with pytest.raises(UserError, match=says) as caught:
        convert(path, tmp_path / "out.safetensors", SPEC, "comfy")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_sizes_of_another_model_are_refused(save: Callable[..., Path]) -> None:
    path = save(pair(f"diffusion_model.{Q}", out=96))
    assert read_lora(path, SPEC).modules == [Q]
    with pytest.raises(UserError, match="48 inputs and 96 outputs; this model's has 48 and 48"):
        read_lora(path, SPEC, cases.shapes())


def test_layers_that_this_model_lacks_are_refused(save: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="1 of 1 layers are unknown"):
        read_lora(save(pair("diffusion_model.layers.29.attention.to_q")), SPEC, cases.shapes())


def test_ambiguous_kohya_names_are_refused(save: Callable[..., Path]) -> None:
    shapes = {"a.b_c": (48, 48), "a_b.c": (48, 48)}
    with pytest.raises(UserError, match=r"a_b_c may mean a.b_c or a_b.c"):
        read_lora(save(pair("lora_unet_a_b_c")), SPEC, shapes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"transformer.r": 3, "transformer.lora_alpha": 3}, "its header says rank 3 .* its tensors have 2"),
        ({"transformer.r": 2}, "no rank and alpha"),
        ({"transformer.lora_alpha": 2}, "no rank and alpha"),
        ({"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.rank_pattern": {"(": 1}}, "no rank and alpha"),
        ([1], "cannot be read"),
    ],
)
def test_a_header_that_contradicts_the_tensors_is_refused(
    save: Callable[..., Path], options: object, says: str
) -> None:
    path = save(pair(f"transformer.{Q}"), {"lora_adapter_metadata": json.dumps(options)})
    with pytest.raises(UserError, match=says):
        read_lora(path, SPEC)


def test_damaged_and_foreign_files_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    whole = save(pair(f"diffusion_model.{Q}")).read_bytes()
    for name, data, says in (
        ("cut.safetensors", whole[:-5], "not a whole .safetensors"),
        ("zeros.safetensors", bytes(100), "not a whole .safetensors"),
        ("pickle.safetensors", b"\x80\x04K\x01.", "not a whole .safetensors"),
        ("lora.pt", b"\x80\x04K\x01.", "pickles, and opening one runs"),
        ("lora.ckpt", whole, "pickles"),
        ("lora.zip", whole, "not a .safetensors file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=says):
            read_lora(tmp_path / name, SPEC)
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "a/b/c.safetensors", SPEC)


def test_a_dora_for_comfyui_cannot_be_turned_back(tmp_path: Path) -> None:
    _, lora = cases.file_of("dora", alpha=4)
    path = tmp_path / "a.safetensors"
    write_lora(path, lora, cases.base(), "comfy", dtype=None, metadata={})
    with pytest.raises(UserError, match="cannot be turned back"):
        convert(path, tmp_path / "b.safetensors", SPEC, "diffusers")
    with pytest.raises(UserError, match="training cannot start from it"):
        read_lora(path, SPEC).for_training()
    assert convert(path, tmp_path / "b.safetensors", SPEC, "comfy").proof.modules == 37
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_a_failed_conversion_leaves_what_was_there(save: Callable[..., Path], tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(UserError):
        convert(save(prefixed("", Q)), target, SPEC, "comfy")
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


# ---- going on from a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fmt"),
    [("lora", "kohya"), ("lora", "diffusers"), ("lokr", "diffusers"), ("loha", "comfy"), ("dora", "diffusers")],
)
def test_training_starts_where_the_file_ended(tmp_path: Path, kind: str, fmt: str) -> None:
    """Whatever the file's alpha: the network has another, and the first output is the file's."""
    names = [name for name in cases.layers() if name.startswith("layers.")]
    model, lora = cases.file_of(kind, alpha=3, names=names)
    write_lora(tmp_path / "a.safetensors", lora, cases.base(), fmt, dtype="fp32", metadata={})
    fresh = cases.transformer()
    peft_layers.attach(fresh, names, cases.network(kind, alpha=cases.RANK), seed=0)
    peft_layers.load_pretrained(fresh, *read_lora(tmp_path / "a.safetensors", SPEC).for_training())
    limit = 1e-5 if kind != "dora" else 1e-4
    assert torch.allclose(cases.output(fresh), cases.output(model), rtol=0, atol=limit)


# ---- names ---------------------------------------------------------------------------------------------------------


def test_families() -> None:
    names = [f"layers.{i}.attention.{part}" for i in range(30) for part in ("to_q", "to_out.0")] + ["t_embedder.mlp.2"]
    assert count_by_family(names) == {
        "layers.*.attention.to_out.0": 30,
        "layers.*.attention.to_q": 30,
        "t_embedder.mlp.2": 1,
    }


def test_guesses() -> None:
    assert guess(f"transformer.{name}" for name in cases.layers()) == "Z-Image"
    assert guess(["lora_unet_" + name.replace(".", "_") for name in cases.layers()]) == "Z-Image"
    assert guess(["something.else"]) is None
