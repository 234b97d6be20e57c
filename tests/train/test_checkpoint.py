import errno
import json
import math
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from detour import RefusedError, UserError, files
from detour.train import checkpoint
from detour.train.checkpoint import Snapshot, load, newest_valid, prune, save
from faults import Trap, disk_full, flip, folder_in_memory, fork, names, trapped, wait

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.fixture
def tmp_path(tmp_path):
    with folder_in_memory(tmp_path) as folder:
        yield folder


def snapshot(step: int, *, ema: bool = True) -> Snapshot:
    """A small state of every kind, a pure function of the step."""
    rng = torch.Generator().manual_seed(step)
    weights = {f"layers.{i}.lora_{half}.weight": torch.randn(4, 6, generator=rng) for i in range(3) for half in "AB"}
    moments = {f"{i}.exp_avg": torch.randn(4, 6, generator=rng) for i in range(3)}
    eight = {
        "0.state1": torch.randint(0, 255, (40,), generator=rng, dtype=torch.uint8),
        "0.step": torch.tensor(float(step)),
    }
    tensors = {"weights": weights, "optimizer": moments | eight}
    if ema:
        tensors["ema"] = {name: tensor.bfloat16() for name, tensor in weights.items()}
    state = {"step": step, "lr": 0.1 + step, "data": {"epoch": 2, "index": 3}, "list": [1, None, True, "ü"]}
    return Snapshot(step, tensors, state, f"config:\n  output_name: ü\n  step: {step}\n")


def same(left: Snapshot, right: Snapshot) -> bool:
    """Bit for bit, NaN included."""
    if (left.step, left.job_yaml, left.tensors.keys()) != (right.step, right.job_yaml, right.tensors.keys()):
        return False
    if json.dumps(left.state, sort_keys=True) != json.dumps(right.state, sort_keys=True):
        return False
    return all(
        left.tensors[group].keys() == right.tensors[group].keys()
        and all(checkpoint._same(tensor, right.tensors[group][name]) for name, tensor in left.tensors[group].items())
        for group in left.tensors
    )


def fail(message: str) -> None:
    pytest.fail(message)


# Round trips


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", snapshot(250))
    assert path == tmp_path / "checkpoints" / "step-000000250"
    assert names(path) == [
        "ema.safetensors", "job.yaml", "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors",
    ]  # fmt: skip
    assert names(path.parent) == ["step-000000250"]
    assert same(load(path), snapshot(250))
    assert same(newest_valid(path.parent, fail), snapshot(250))


def test_ema_is_optional(tmp_path):
    path = save(tmp_path, snapshot(1, ema=False))
    assert not (path / "ema.safetensors").exists()
    assert load(path).tensors.keys() == {"weights", "optimizer"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (5, 7), (2, 3, 4)], ids=str)
def test_any_tensor_comes_back_bit_for_bit(tmp_path, dtype, shape):
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    tensors = {"a": tensor, "odd": torch.zeros(3, dtype=torch.uint8), "wide": torch.ones(2, dtype=torch.float64)}
    back = load(save(tmp_path, Snapshot(1, {"weights": tensors}, {}, ""))).tensors["weights"]
    for name, expected in tensors.items():
        assert back[name].dtype == expected.dtype
        assert back[name].shape == expected.shape
        assert torch.equal(checkpoint._bytes(back[name]), checkpoint._bytes(expected))


def test_views_parameters_and_shared_tensors_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "whole": base, "transposed": base.t(), "row": base[1], "every_other": base[:, ::2],
        "expanded": torch.ones(1).expand(3, 2), "parameter": torch.nn.Parameter(base[2:]),
    }  # fmt: skip
    back = load(save(tmp_path, Snapshot(1, {"weights": tensors}, {}, ""))).tensors["weights"]
    for name, expected in tensors.items():
        assert torch.equal(back[name], expected.detach()), name
    back["whole"].zero_()  # each has memory of its own
    assert torch.equal(back["row"], base[1])


def test_our_files_are_what_the_safetensors_package_reads_and_writes(tmp_path):
    from safetensors.torch import save as reference

    tensors = snapshot(3).tensors["optimizer"]
    path = save(tmp_path, Snapshot(3, {"optimizer": tensors}, {}, ""))
    back = load_file(path / "optimizer.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    weights = snapshot(3).tensors["weights"]
    ours = b"".join(bytes(chunk) for chunk in checkpoint._safetensors(weights))
    assert ours == reference(weights)


def test_every_tensor_lies_at_a_multiple_of_its_element_size():
    tensors = {f"{i}": torch.ones(3, dtype=dtype) for i, dtype in enumerate(reversed(DTYPES))}
    content = b"".join(bytes(chunk) for chunk in checkpoint._safetensors(tensors))
    length = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert (8 + length + entry["data_offsets"][0]) % tensors[name].element_size() == 0, name


def test_what_was_loaded_does_not_change_when_the_file_does(tmp_path):
    path = save(tmp_path, Snapshot(1, {"weights": {"a": torch.ones(100_000)}}, {}, ""))
    back = load(path)
    with (path / "weights.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(bytes(300_000))
    assert torch.equal(back.tensors["weights"]["a"], torch.ones(100_000))


def test_names_of_any_text_come_back(tmp_path):
    tensors = {'quo"te': torch.ones(1), "ü/日本\n": torch.zeros(2), "": torch.ones(3)}
    back = load(save(tmp_path, Snapshot(1, {"weights": tensors}, {}, ""))).tensors["weights"]
    assert back.keys() == tensors.keys()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(state=st.dictionaries(st.text(), json_values, max_size=4))
def test_numbers_come_back_exactly(tmp_path_factory, state):
    snap = Snapshot(1, {}, state, "")
    text = checkpoint._state_text(snap)
    back = json.loads(text.encode())["state"]
    assert back == state
    assert repr(json.loads(json.dumps(back, sort_keys=True))) == repr(json.loads(json.dumps(state, sort_keys=True)))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_float_comes_back_exactly(value):
    back = json.loads(checkpoint._state_text(Snapshot(1, {}, {"x": value}, "")))["state"]["x"]
    assert struct.pack("d", back) == struct.pack("d", value) or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize("bad", [(1, 2), {1: 2}, torch.tensor(1), Path("x"), {"a": [{"b": {3}}]}])
def test_state_that_json_would_change_is_refused(tmp_path, bad):
    with pytest.raises(TypeError, match=r"state\.x"):
        save(tmp_path, Snapshot(1, {}, {"x": bad}, ""))
    assert names(tmp_path) == []


def test_tensors_and_groups_that_cannot_be_held_are_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        save(tmp_path, Snapshot(1, {"weights": {"a": torch.ones(1, dtype=torch.complex64)}}, {}, ""))
    with pytest.raises(ValueError, match="group"):
        save(tmp_path, Snapshot(1, {"../weights": {}}, {}, ""))
    assert names(tmp_path) == []


def test_the_same_state_gives_the_same_bytes_in_any_order_and_process(tmp_path):
    def turned(snap: Snapshot) -> Snapshot:
        tensors = {group: dict(reversed(list(items.items()))) for group, items in reversed(snap.tensors.items())}
        return Snapshot(snap.step, tensors, dict(reversed(snap.state.items())), snap.job_yaml)

    first = files.read_manifest(save(tmp_path / "a", snapshot(7)))
    second = files.read_manifest(save(tmp_path / "b", turned(snapshot(7))))
    third = files.read_manifest(save(tmp_path / "c", load(tmp_path / "a" / "step-000000007")))
    assert first == second == third
    assert wait(fork(lambda: save(tmp_path / "d", snapshot(7)))) == 0
    assert files.read_manifest(tmp_path / "d" / "step-000000007") == first
    assert files.read_manifest(save(tmp_path / "e", snapshot(8))) != first


# Reading back, replacing


def test_a_save_that_does_not_read_back_is_refused(tmp_path, monkeypatch):
    save(tmp_path, snapshot(1))
    real = files._write
    for place in ("weights.safetensors", "state.json", "job.yaml"):

        def wrong(fd, data, place=place):
            target = str(Path(f"/proc/self/fd/{fd}").readlink())
            return real(fd, bytes([data[0] ^ 1]) + data[1:] if place in target and len(data) < 500 else data)

        monkeypatch.setattr(files, "_write", wrong)
        with pytest.raises(files.DamagedError, match="did not read back"):
            save(tmp_path, snapshot(2))
        assert names(tmp_path) == ["step-000000001"]
    monkeypatch.setattr(checkpoint, "_safetensors", lambda tensors: [b"junk"])
    monkeypatch.setattr(files, "_write", real)
    with pytest.raises(files.DamagedError, match="did not read back"):
        save(tmp_path, snapshot(2))
    assert same(newest_valid(tmp_path, fail), snapshot(1))


def test_a_step_that_is_there_already_is_replaced(tmp_path):
    save(tmp_path, snapshot(5))
    changed = Snapshot(5, snapshot(6).tensors, {"new": True}, "new")
    save(tmp_path, changed)
    assert names(tmp_path) == ["step-000000005"]
    assert same(newest_valid(tmp_path, fail), changed)


def test_a_damaged_step_is_replaced(tmp_path):
    path = save(tmp_path, snapshot(5))
    (path / "state.json").unlink()
    save(tmp_path, snapshot(5))
    assert same(newest_valid(tmp_path, fail), snapshot(5))


@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
@pytest.mark.parametrize("same_step", [False, True])
def test_a_failure_at_any_call_of_a_save_keeps_the_checkpoint_that_was_there(tmp_path, number, same_step):
    new = Snapshot(1 if same_step else 2, snapshot(2).tensors, {}, "")
    save(tmp_path / "dry", snapshot(1))
    with trapped(Trap()) as dry:
        save(tmp_path / "dry", new)
    named = dry.calls.index(("_rename", next(target for name, target in dry.calls if name == "_mkdir")))  # the new one
    kinds = set()
    for at, (name, target) in enumerate(dry.calls):
        folder, call = tmp_path / f"at-{at}", (at, name, target)
        save(folder, snapshot(1))
        raised = False
        with trapped(Trap(at, "before", disk_full(number))):
            try:
                save(folder, new)
            except UserError as error:
                raised = True
                kinds.add(name)
                assert isinstance(error, files.DiskFullError) == (number == errno.ENOSPC)
                assert str(folder) in str(error)
        assert raised == (at <= named + 2), call  # the name, and the folder that is opened and synced after it
        if at <= named:
            assert names(folder) == ["step-000000001"], call
        assert same(newest_valid(folder, fail), snapshot(1) if at <= named else new), call
        prune(folder, 2)
        assert [name for name in names(folder) if ".tmp-" not in name] == names(tmp_path / "dry")[: 1 + (at > named)], (
            call
        )
        save(folder, snapshot(3))  # and the next save works
        assert same(newest_valid(folder, fail), snapshot(3))
    assert kinds >= {"_open", "_write", "_fsync", "_chmod", "_rename", "_mkdir"}
    assert len(dry.calls) > 60


def test_a_real_file_size_limit_keeps_the_checkpoint_that_was_there(tmp_path):
    save(tmp_path, snapshot(1))

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, 800))
        with pytest.raises(files.DiskFullError, match=r"step-000000002/\w+.safetensors cannot be written"):
            save(tmp_path, snapshot(2))

    assert wait(fork(child)) == 0
    assert names(tmp_path) == ["step-000000001"]
    assert same(newest_valid(tmp_path, fail), snapshot(1))


# Damage


def three(folder: Path) -> list[Path]:
    return [save(folder, snapshot(step)) for step in (1, 2, 3)]


def test_the_newest_is_taken_by_its_number(tmp_path):
    for step in (9, 1000, 100):
        save(tmp_path, snapshot(step))
    assert newest_valid(tmp_path, fail).step == 1000


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert newest_valid(tmp_path, fail) is None
    assert newest_valid(tmp_path / "nothing", fail) is None
    (tmp_path / "other").mkdir()
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-000000004.tmp-000000-1-00000000").mkdir()
    assert newest_valid(tmp_path, fail) is None


def fallen_back(folder: Path, expected: str, step: int = 2) -> None:
    told = []
    assert newest_valid(folder, told.append).step == step
    assert len(told) == 3 - step
    assert expected in told[0]


def test_truncation_at_every_64th_is_found_and_named(tmp_path):
    newest = three(tmp_path)[-1]
    tried = 0
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        for part in range(64):
            file.write_bytes(data[: len(data) * part // 64])
            fallen_back(tmp_path, str(file))
            tried += 1
        file.write_bytes(data)
        assert newest_valid(tmp_path, fail).step == 3
    assert tried == 6 * 64


def test_100_flipped_bytes_in_each_file_are_found_and_named(tmp_path):
    newest = three(tmp_path)[-1]
    rng = random.Random(7)
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        for _ in range(100):
            flip(file, rng)
            fallen_back(tmp_path, str(file))
            file.write_bytes(data)
    assert newest_valid(tmp_path, fail).step == 3


def test_missing_added_and_exchanged_files_are_found_and_named(tmp_path):
    newest = three(tmp_path)[-1]
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        file.unlink()
        fallen_back(tmp_path, file.name)
        file.write_bytes((newest.with_name("step-000000002") / file.name).read_bytes())  # of another step
        fallen_back(tmp_path, file.name if file.name != "manifest.json" else "ema.safetensors")
        file.write_bytes(data)
    (newest / "extra.txt").write_text("x")
    fallen_back(tmp_path, "extra.txt")


def test_two_damaged_ones_are_passed_over(tmp_path):
    paths = three(tmp_path)
    for path in paths[1:]:
        (path / "state.json").write_text("{}")
    told = []
    assert same(newest_valid(tmp_path, told.append), snapshot(1))
    assert [str(path) in text for path, text in zip(reversed(paths[1:]), told, strict=True)] == [True, True]


def test_all_damaged_is_said(tmp_path):
    for path in three(tmp_path):
        (path / "job.yaml").unlink()
    told = []
    assert newest_valid(tmp_path, told.append) is None
    assert len(told) == 4
    assert "none of the 3 checkpoints" in told[-1]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    three(tmp_path)
    (tmp_path / "step-000000003").rename(tmp_path / "step-000000009")
    fallen_back(tmp_path, "holds step 3")


def test_a_whole_directory_that_is_no_checkpoint_is_said_to_be_one(tmp_path):
    for content in ("{}", "[]", "x", '{"format": 1, "step": 3}'):
        with files.new_directory(tmp_path / "step-000000003") as tmp:
            (tmp / "state.json").write_text(content)
        with pytest.raises(files.DamagedError, match="not a checkpoint"):
            load(tmp_path / "step-000000003")
    with files.new_directory(tmp_path / "step-000000003") as tmp:
        (tmp / "state.json").write_text('{"format": 1, "step": 3, "state": {}}')
        (tmp / "job.yaml").write_text("")
        (tmp / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(files.DamagedError, match="not a checkpoint"):
        load(tmp_path / "step-000000003")


def test_a_newer_format_is_said_and_nothing_older_is_taken_instead(tmp_path, monkeypatch):
    save(tmp_path, snapshot(1))
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path, snapshot(2))
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(UserError, match="newer Detour"):
        newest_valid(tmp_path, fail)


@pytest.mark.parametrize("ending", ["pt", "pth", "pkl", "pickle", "ckpt", "bin"])
def test_pickles_are_refused(tmp_path, ending):
    path = tmp_path / f"optimizer.{ending}"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickle, which can run any code"):
        load(path)
    with pytest.raises(UserError, match="pickle"):
        load(tmp_path / f"nothing.{ending}")
    save(tmp_path, snapshot(1))
    told = []
    assert newest_valid(tmp_path, told.append).step == 1
    assert [str(path) in text and "pickle" in text for text in told] == [True]
    path.unlink()
    newest = save(tmp_path, snapshot(2))
    (newest / f"optimizer.{ending}").write_bytes(b"\x80\x04.")
    told = []
    assert newest_valid(tmp_path, told.append).step == 1
    assert ["pickle" in text for text in told] == [True]


def test_load_says_what_a_checkpoint_is(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    for path in (tmp_path / "a.safetensors", tmp_path / "nothing"):
        with pytest.raises(UserError, match="directory such as checkpoints/step-000000250"):
            load(path)


# Pruning


def steps(folder: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(folder)]


def test_the_oldest_are_pruned(tmp_path):
    for step in range(1, 6):
        save(tmp_path, snapshot(step))
    (tmp_path / "note.txt").write_text("mine")
    assert [path.name for path in prune(tmp_path, 3)] == ["step-000000001", "step-000000002"]
    assert names(tmp_path) == ["note.txt", "step-000000003", "step-000000004", "step-000000005"]
    assert prune(tmp_path, 3) == []
    assert prune(tmp_path / "nothing", 3) == []
    with pytest.raises(ValueError, match="keep"):
        prune(tmp_path, 0)


def test_the_newest_whole_one_is_never_pruned(tmp_path):
    paths = [save(tmp_path, snapshot(step)) for step in range(1, 6)]
    for path in paths[2:]:
        (path / "weights.safetensors").write_bytes(b"")
    prune(tmp_path, 2)
    assert steps(tmp_path) == [2, 4, 5]
    assert newest_valid(tmp_path, lambda text: None).step == 2
    (paths[1] / "state.json").unlink()
    save(tmp_path, snapshot(1))
    (paths[0] / "state.json").unlink()
    assert prune(tmp_path, 1) == []  # none is whole: nothing is removed


def test_pruning_trusts_what_was_just_verified_and_reads_only_that_much(tmp_path, monkeypatch):
    for step in range(1, 5):
        newest = save(tmp_path, snapshot(step))
    read = []
    real = files.verify_directory
    monkeypatch.setattr(files, "verify_directory", lambda path: (read.append(path), real(path)))
    prune(tmp_path, 2, verified=newest)
    assert read == []
    prune(tmp_path, 1)
    assert read == [newest]
    assert steps(tmp_path) == [4]


# Space, environment


def test_preflight(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 5 * 2**30)
    checkpoint.preflight(tmp_path / "new", 2**30, 4)
    with pytest.raises(
        RefusedError, match=r"5\.00 GiB are free where 6\.00 GiB are needed: 5 checkpoints of 1\.00"
    ) as caught:
        checkpoint.preflight(tmp_path / "new", 2**30, 5)
    assert caught.value.exit_code == 3
    monkeypatch.undo()
    checkpoint.preflight(tmp_path, 1000, 4)
    with pytest.raises(RefusedError):
        checkpoint.preflight(tmp_path, 2**60, 1)


def test_size_is_close_to_what_is_written(tmp_path):
    snap = Snapshot(1, {"weights": {str(i): torch.zeros(1000) for i in range(50)}}, {"x": 1}, "job" * 100)
    path = save(tmp_path, snap)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert written <= checkpoint.size(snap) <= written + 20_000


def test_environment_names_every_package_and_the_commit(tmp_path):
    found = checkpoint.environment()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"detour", "diffusers", "transformers", "peft", "safetensors"} <= found.keys()
    json.dumps(found)


def test_the_commit_is_read_as_git_says(tmp_path):
    def git(*arguments: str, where: Path = tmp_path) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=where, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-b", "main")
    with pytest.raises(FileNotFoundError):
        checkpoint._git_head(tmp_path / ".git")
    git("commit", "--allow-empty", "-m", "1")
    assert checkpoint._git_head(tmp_path / ".git") == git("rev-parse", "HEAD")
    git("worktree", "add", "-b", "side", str(tmp_path / "side"))
    git("commit", "--allow-empty", "-m", "2", where=tmp_path / "side")
    assert checkpoint._git_head(tmp_path / "side" / ".git") == git("rev-parse", "side")
    git("pack-refs", "--all")
    assert checkpoint._git_head(tmp_path / ".git") == git("rev-parse", "main")
    git("checkout", "--detach")
    assert checkpoint._git_head(tmp_path / ".git") == git("rev-parse", "main")


def test_changes_of_the_environment_are_sentences():
    assert checkpoint.changes({"torch": "1", "peft": "2"}, {"torch": "1", "peft": "3", "bitsandbytes": "4"}) == [
        "bitsandbytes was absent and is now 4",
        "peft was 2 and is now 3",
    ]
    assert checkpoint.changes(checkpoint.environment(), checkpoint.environment()) == []
