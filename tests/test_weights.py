"""Finding models, on this machine and on a hub on loopback; reading weights; filling a module on the meta device."""

import gc
import json
import os
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from detour import UserError
from detour.weights import (
    ModelSource,
    Placement,
    component_config,
    component_files,
    find_file,
    find_model,
    materialise,
    read_tensors,
    stream_tensors,
    tensor_shapes,
)
from hub_server import Hub, serving

CPU = torch.device("cpu")
FLOAT = Placement(torch.float32, CPU)


def model_folder(folder: Path, parts: tuple[str, ...] = ("transformer", "vae")) -> Path:
    for part in parts:
        (folder / part).mkdir(parents=True)
        save_file({f"{part}.w": torch.ones(2)}, folder / part / "model.safetensors")
    return folder


# --- on this machine ---------------------------------------------------------------------------------------------


def test_a_folder_gives_its_components(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    source = find_model(str(folder), components=("transformer", "vae"), denoiser="transformer")
    assert source == ModelSource(str(folder), folder=folder)
    assert source.component("vae") == folder / "vae"
    assert source.find("scheduler") is None
    with pytest.raises(UserError, match=r"there is no scheduler/ in .*found: transformer, vae.*extras_name_or_path"):
        source.component("scheduler")


def test_a_missing_component_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(UserError, match="no text_encoder/"):
        find_model(str(folder), components=("transformer", "vae", "text_encoder"), denoiser="transformer")


def test_extras_hold_what_the_model_lacks_and_win_over_nothing_it_has(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", ("transformer",))
    extras = model_folder(tmp_path / "extras", ("vae", "scheduler"))
    source = find_model(
        str(model), components=("transformer", "vae", "scheduler"), denoiser="transformer", extras=str(extras)
    )
    assert source.component("transformer") == model / "transformer"
    assert source.component("vae") == extras / "vae"
    with pytest.raises(UserError, match="no text_encoder"):
        find_model(str(model), components=("transformer", "text_encoder"), denoiser="transformer", extras=str(extras))


def test_a_single_file_holds_the_denoiser_alone(tmp_path: Path) -> None:
    file = tmp_path / "turbo.safetensors"
    save_file({"w": torch.ones(2)}, file)
    extras = model_folder(tmp_path / "extras", ("vae",))
    assert find_model(str(file), components=("transformer",), denoiser="transformer").single_file == file
    source = find_model(str(file), components=("transformer", "vae"), denoiser="transformer", extras=str(extras))
    assert source.component("vae") == extras / "vae"
    with pytest.raises(UserError, match=r"no vae, because a single file holds the denoiser alone; set model\.extras"):
        find_model(str(file), components=("transformer", "vae"), denoiser="transformer")


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".pth", ".pkl"])
def test_pickles_are_refused_whether_or_not_they_exist(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"model{ending}"
    for _ in range(2):
        with pytest.raises(UserError, match="pickle"):
            find_model(str(file), components=("transformer",), denoiser="transformer")
        with pytest.raises(UserError, match=r"^training adapter .*pickle"):
            find_file(str(file), what="training adapter")
        file.write_bytes(b"\x80\x04.")


def test_other_files_and_folders_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"not a \.safetensors file"):
        find_model(str(tmp_path / "notes.txt"), components=("transformer",), denoiser="transformer")
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"this is a folder; name the file in it \(found: a\.safetensors\)"):
        find_file(str(tmp_path), what="LoRA")
    assert find_file(str(tmp_path / "a.safetensors"), what="LoRA") == tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/model",
        "./model",
        "model",
        "a/b/c",
        "a b/c",
        "user/repo/../x.safetensors",
        "user/repo/a/../x.safetensors",
        "",
    ],
)
def test_a_path_that_cannot_be_a_hub_id_is_not_asked_for(name: str) -> None:
    with pytest.raises(UserError, match=r"no such f|name the file in it|there is no transformer"):
        find_model(name, components=("transformer",), denoiser="transformer")
    with pytest.raises(UserError, match=r"no such file|this is a folder"):
        find_file(name, what="LoRA")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model_folder(tmp_path / "model")
    source = find_model("~/model", components=("transformer",), denoiser="transformer")
    assert source.folder == tmp_path / "model"


def test_a_revision_of_a_local_model_is_an_error(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    with pytest.raises(UserError, match=r"model\.revision: 'abc' has no meaning"):
        find_model(str(folder), components=("transformer",), denoiser="transformer", revision="abc")


# --- the files of a component ------------------------------------------------------------------------------------


def shard(folder: Path, tensors: list[dict[str, Tensor]], stem: str = "model") -> None:
    weight_map = {}
    for number, part in enumerate(tensors):
        name = f"{stem}-{number + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    parts = [{"a": torch.ones(2), "z": torch.zeros(1)}, {"m": torch.full((3,), 2.0)}]
    shard(tmp_path, parts)
    save_file({"other": torch.ones(1)}, tmp_path / "model.fp16.safetensors")  # a variant beside them
    files = component_files(tmp_path)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert {name: tensor.tolist() for name, tensor in stream_tensors(files)} == {
        "a": [1, 1],
        "z": [0],
        "m": [2, 2, 2],
    }
    assert tensor_shapes(files) == {"a": (2,), "z": (1,), "m": (3,)}
    files[1].unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards are missing \(model-00002-of-00002\.safetensors\)"):
        component_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "\xff"])
def test_an_unreadable_index_is_named(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: not a readable index"):
        component_files(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="outside its folder"):
        component_files(tmp_path)


def test_which_single_file_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        component_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        component_files(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "odd_name.safetensors")
    assert component_files(tmp_path) == [tmp_path / "odd_name.safetensors"]
    save_file({"w": torch.ones(1)}, tmp_path / "another.safetensors")
    with pytest.raises(UserError, match=r"several weight files and no index \(another\.safetensors, odd_name"):
        component_files(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert component_files(tmp_path) == [tmp_path / "diffusion_pytorch_model.safetensors"]


def test_the_config_must_be_of_the_expected_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: not a readable config"):
        component_config(tmp_path, "_class_name", "A")
    for text in ("{", "[]", "\xff\xfe"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="not a readable config"):
            component_config(tmp_path, "_class_name", "A")
    (tmp_path / "config.json").write_text('{"_class_name": "B", "dim": 3}')
    with pytest.raises(UserError, match=r"this is a B, where the architecture has a A; is model\.arch right"):
        component_config(tmp_path, "_class_name", "A")
    assert component_config(tmp_path, "_class_name", "B") == {"_class_name": "B", "dim": 3}


# --- damaged files -----------------------------------------------------------------------------------------------


def read_all(path: Path) -> None:
    for _ in stream_tensors([path]):
        pass
    read_tensors(path)
    tensor_shapes([path])


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "w.safetensors"
    save_file({"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)}, path)
    return path.read_bytes()


def test_read_tensors_gives_metadata_and_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"a": torch.ones(4)}, path, metadata={"ss_network_dim": "4"})
    tensors, metadata = read_tensors(path)
    assert metadata == {"ss_network_dim": "4"}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert tensors["a"].tolist() == [1, 1, 1, 1]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, whole_file: bytes, data: st.DataObject) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole_file[: data.draw(st.integers(0, len(whole_file) - 1))])
    for read in (lambda: list(stream_tensors([path])), lambda: read_tensors(path), lambda: tensor_shapes([path])):
        with pytest.raises(UserError, match=r"cut\.safetensors: not a whole \.safetensors file"):
            read()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_never_another_error(tmp_path: Path, whole_file: bytes, data: st.DataObject) -> None:
    header = 8 + struct.unpack("<Q", whole_file[:8])[0]
    damaged = bytearray(whole_file)
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(bytes(damaged))
    try:
        read_all(path)
    except UserError as error:
        assert "damaged.safetensors" in str(error)


@pytest.mark.parametrize("length", [2**63, 200_000_000, 0])
def test_an_absurd_header_length_is_an_error(tmp_path: Path, whole_file: bytes, length: int) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", length) + whole_file[8:])
    with pytest.raises(UserError, match=r"long\.safetensors: not a whole"):
        read_all(path)


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        read_all(tmp_path / "gone.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(UserError, match=r"dir\.safetensors"):
        read_all(tmp_path / "dir.safetensors")


# --- filling a module --------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Linear layers with and without bias, an embedding tied to the head, a norm, a counter and a table."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.zeros(4), persistent=False)


def toy_weights(layers: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = {name: torch.randn_like(tensor, dtype=torch.float32) for name, tensor in Toy(layers).state_dict().items()}
    del weights["head.weight"]  # tied: stored once, as safetensors demands
    return weights | {"count": torch.tensor(7)}


def on_meta(layers: int = 3) -> Toy:
    with torch.device("meta"):
        return Toy(layers)


def fill(weights: dict[str, Tensor], placement: Placement = FLOAT, layers: int = 3) -> Toy:
    module = on_meta(layers)
    materialise(module, weights.items(), placement, where="toy")
    return module


def test_every_tensor_is_placed_frozen_and_cast() -> None:
    weights = toy_weights()
    module = fill(weights, Placement(torch.bfloat16, CPU))
    assert all(torch.equal(module.state_dict()[name], t.to(torch.bfloat16)) for name, t in weights.items() if t.ndim)
    assert module.count.dtype == torch.int64 and module.count.item() == 7
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in module.parameters())
    assert module.head.weight is module.embed.weight, "tied weights stay one tensor"


def test_order_does_not_matter_and_the_other_tied_name_will_do() -> None:
    weights = toy_weights()
    turned = {("head.weight" if name == "embed.weight" else name): weights[name] for name in reversed(weights)}
    ours, theirs = fill(turned).state_dict(), fill(weights).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    both = weights | {"head.weight": weights["embed.weight"]}
    assert torch.equal(fill(both).head.weight, weights["embed.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.bias"), r"Tensors 1 missing: norm\.bias\. Is model\.arch right"),
        (lambda w: w.update(extra=torch.ones(1)), r"Tensors 1 unknown: extra\."),
        (lambda w: w.update({"norm.bias": torch.ones(9)}), r"1 that do not fit: norm\.bias \[9\] instead of \[8\]"),
        (lambda w: w.clear(), r"11 missing: count, embed\.weight, .* and 5 more\."),
    ],
)
def test_what_does_not_fit_is_listed(change, message: str) -> None:
    weights = toy_weights()
    change(weights)
    with pytest.raises(UserError, match=rf"^toy: these are not the weights of a Toy .*{message}"):
        fill(weights)


def test_all_kinds_of_misfit_are_reported_at_once_and_nothing_more_is_converted() -> None:
    weights = {"wrong": torch.ones(1)} | toy_weights() | {"norm.bias": torch.ones(9)}
    del weights["count"]
    seen = []
    placement = Placement(torch.float32, CPU, patch=lambda name, tensor: seen.append(name) or tensor)
    with pytest.raises(UserError, match=r"Tensors 1 missing: count; 1 unknown: wrong; 1 that do not fit: norm\.bias"):
        fill(weights, placement)
    assert seen == []


def test_a_tensor_stored_twice_is_an_error() -> None:
    weights = toy_weights()
    twice = [*weights.items(), ("norm.bias", torch.zeros(8))]
    with pytest.raises(UserError, match=r"norm\.bias is stored twice"):
        materialise(on_meta(), twice, FLOAT, where="toy")


def test_the_patch_sees_the_stored_tensor_before_the_cast() -> None:
    seen: dict[str, torch.dtype] = {}

    def patch(name: str, tensor: Tensor) -> Tensor:
        seen[name] = tensor.dtype
        return tensor + 1 if name == "layers.1.weight" else tensor

    weights = toy_weights()
    module = fill(weights, Placement(torch.bfloat16, CPU, patch=patch))
    assert seen == {name: tensor.dtype for name, tensor in weights.items()}
    assert torch.equal(module.layers[1].weight, (weights["layers.1.weight"] + 1).to(torch.bfloat16))


def test_weights_do_not_depend_on_the_file_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights = toy_weights()
    save_file(weights, path)
    module = on_meta()
    materialise(module, stream_tensors([path]), FLOAT, where="toy")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(module.layers[0].weight, weights["layers.0.weight"])


class Tiny(nn.Module):
    """What a quantiser may put in place of a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def test_linears_are_quantised_as_soon_as_they_are_whole_one_at_a_time() -> None:
    weights = toy_weights(20)
    module = on_meta(20)
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    seen: list[str] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        """As a file gives them: each tensor exists only once it is asked for."""
        nonlocal most
        for name in sorted(weights):
            tensor = weights[name].clone()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, tensor
            del tensor

    def quantizer(name: str, linear: nn.Linear) -> nn.Module:
        assert not linear.weight.is_meta and (linear.bias is None or not linear.bias.is_meta)
        whole = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and not m.weight.is_meta]
        assert [n for n in whole if n != "head"] in ([name], []), "another layer is still unquantised"
        seen.append(name)
        return linear if name == "head" else Tiny(linear)

    materialise(module, stream(), Placement(torch.float32, CPU, quantizer=quantizer), where="toy")
    gc.collect()
    assert sorted(seen) == sorted(["head", *(f"layers.{n}" for n in range(20))])
    assert all(isinstance(layer, Tiny) for layer in module.layers)
    assert most <= 2, "tensors that were read pile up"
    assert sum(ref() is not None for ref in alive) == 0
    assert not any(parameter.requires_grad for parameter in module.parameters())


# --- a hub on loopback -------------------------------------------------------------------------------------------

CALLS = """
import json, sys
from detour import UserError
from detour.weights import find_file, find_model
answers = []
for kind, name, options in json.loads(sys.stdin.read()):
    try:
        if kind == "file":
            answers.append(["ok", str(find_file(name, what="training adapter", **options))])
        else:
            source = find_model(name, denoiser="transformer", **options)
            answers.append(["ok", str(source.folder or source.single_file)])
    except UserError as error:
        answers.append(["error", str(error)])
print(json.dumps(answers))
"""
BOTH = {"components": ["transformer", "vae"]}


def ask(endpoint: str, home: Path, calls: list[tuple[str, str, dict[str, object]]], **env: str) -> list[list[str]]:
    """Run calls in a process of its own: huggingface_hub reads its settings when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings_of = clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
    code = "import sys; sys.modules['hf_xet'] = None\n" + CALLS  # the accelerated transfer must not be needed
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=settings_of,
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[list[str]] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving(Hub()) as running:
        yield running


@pytest.fixture(scope="module")
def home(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache filled by the first calls; `answers.json` in it holds what they returned."""
    folder = tmp_path_factory.mktemp("hf")
    files = {
        "model_index.json": b"{}",
        "README.md": b"#",
        "transformer/config.json": b"{}",
        "transformer/model.safetensors": b"v1" * 1000,
        "transformer/model.fp16.safetensors": b"half",
        "transformer/pytorch_model.bin": b"pickle",
        "vae/model.safetensors": b"vae",
        "vae/script.py": b"import os",
        "tokenizer/chat_template.jinja": b"{{ messages }}",
        "loras/adapter v2.safetensors": b"adapter",
    }
    first = hub.add("user/model", files)
    second = hub.add("user/model", files | {"transformer/model.safetensors": b"v2" * 1000})
    hub.add("user/gated", {"a.safetensors": b"x"})
    hub.gated.add("user/gated")
    hub.add("user/bare", {"turbo.safetensors": b"x"})
    calls: dict[str, tuple[str, str, dict[str, object]]] = {
        "model": ("model", "user/model", BOTH),
        "pinned": ("model", "user/model", {"components": ["transformer"], "revision": first}),
        "file": ("file", "user/model/loras/adapter v2.safetensors", {}),
        "old file": ("file", "user/model/transformer/model.safetensors", {"revision": first}),
        "single": ("model", "user/bare/turbo.safetensors", {"components": ["transformer"], "extras": "user/model"}),
        "no such file": ("file", "user/model/none.safetensors", {}),
        "no such repo": ("model", "user/nothing", BOTH),
        "no such repo for a file": ("file", "user/nothing/a.safetensors", {}),
        "no such revision": ("model", "user/model", BOTH | {"revision": "v9"}),
        "no such revision of a file": ("file", "user/model/loras/adapter v2.safetensors", {"revision": "v9"}),
        "gated": ("file", "user/gated/a.safetensors", {}),
        "no component": ("model", "user/bare", BOTH),
    }
    answers = dict(zip(calls, ask(hub.url, folder, list(calls.values())), strict=True))
    (folder / "answers.json").write_text(json.dumps({"first": first, "second": second, "answers": answers}))
    return folder


def answer(home: Path, name: str) -> tuple[str, str]:
    status, text = json.loads((home / "answers.json").read_text())["answers"][name]
    return status, text


def test_a_hub_id_is_fetched_without_what_is_not_needed(home: Path) -> None:
    status, folder = answer(home, "model")
    assert status == "ok", folder
    assert json.loads((home / "answers.json").read_text())["second"] in folder
    # The cache is shared: the file call after it put one more file into the same snapshot.
    fetched = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    assert fetched - {"loras/adapter v2.safetensors"} == {
        "model_index.json",
        "transformer/config.json",
        "transformer/model.safetensors",
        "vae/model.safetensors",
    }
    assert (Path(folder) / "transformer/model.safetensors").read_bytes() == b"v2" * 1000


def test_a_revision_is_pinned(home: Path) -> None:
    status, folder = answer(home, "pinned")
    assert status == "ok"
    assert (Path(folder) / "transformer/model.safetensors").read_bytes() == b"v1" * 1000
    assert Path(answer(home, "old file")[1]).read_bytes() == b"v1" * 1000


def test_a_file_on_the_hub_by_user_repo_and_path(home: Path) -> None:
    status, file = answer(home, "file")
    assert status == "ok" and Path(file).read_bytes() == b"adapter"
    status, file = answer(home, "single")
    assert status == "ok", file


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("no such file", "training adapter user/model/none.safetensors: the repository exists but has no such file"),
        ("no such repo", "model user/nothing: no such path on this machine, and no such repository on the hub"),
        ("no such repo for a file", "training adapter user/nothing/a.safetensors: no such path on this machine"),
        ("no such revision", "model user/model: the repository has no revision 'v9'"),
        ("no such revision of a file", "adapter v2.safetensors: the repository has no revision 'v9'"),
        ("gated", "the repository is gated; accept its terms on its page, then `hf auth login` or set HF_TOKEN"),
        ("no component", "user/bare: there is no transformer/"),
    ],
)
def test_what_the_hub_refuses_is_explained(home: Path, call: str, message: str) -> None:
    status, text = answer(home, call)
    assert status == "error"
    assert message in text


def test_offline_takes_the_cache_and_asks_nobody(hub: Hub, home: Path, tmp_path: Path) -> None:
    first = json.loads((home / "answers.json").read_text())["first"]
    before = len(hub.requests)
    calls: list[tuple[str, str, dict[str, object]]] = [
        ("model", "user/model", BOTH),
        ("model", "user/model", {"components": ["transformer"], "revision": first}),
        ("file", "user/model/loras/adapter v2.safetensors", {}),
        ("model", "user/model", {"components": ["transformer", "tokenizer"]}),
        ("model", "user/other", BOTH),
        ("file", "user/other/a.safetensors", {}),
    ]
    answers = ask(hub.url, home, calls, HF_HUB_OFFLINE="1")
    assert [status for status, _ in answers] == ["ok", "ok", "ok", "error", "error", "error"]
    for _, text in answers[3:]:
        assert "not (completely) in the cache, and HF_HUB_OFFLINE is set" in text
    assert len(hub.requests) == before


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_reason(home: Path) -> None:
    calls: list[tuple[str, str, dict[str, object]]] = [("model", "user/other", BOTH), ("model", "user/model", BOTH)]
    refused, cached = ask("http://127.0.0.1:9", home, calls)
    assert refused[0] == "error"
    assert "the hub cannot be reached ([Errno" in refused[1]
    assert "give a local path" in refused[1]
    assert cached[0] == "ok", "what is in the cache still works"


@pytest.mark.slow
def test_a_download_that_breaks_off_is_an_error_and_can_be_repeated(hub: Hub, tmp_path: Path) -> None:
    content = os.urandom(50_000)
    hub.add("user/broken", {"b.safetensors": content})
    hub.truncated["b.safetensors"] = 6  # huggingface_hub resumes five times before it gives up
    call: tuple[str, str, dict[str, object]] = ("file", "user/broken/b.safetensors", {})
    broken, repeated = ask(hub.url, tmp_path, [call, call])
    assert broken[0] == "error"
    assert "training adapter user/broken/b.safetensors: the download failed" in broken[1]
    assert repeated[0] == "ok" and Path(repeated[1]).read_bytes() == content
    assert hub.truncated["b.safetensors"] == 0


@pytest.mark.slow
def test_a_file_from_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """huggingface_hub tries five times, 23 seconds in all, before it gives up on a single file."""
    ((status, text),) = ask("http://127.0.0.1:9", tmp_path, [("file", "user/model/a.safetensors", {})])
    assert status == "error" and "the hub cannot be reached" in text
