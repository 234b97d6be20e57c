"""Every architecture's miniature: a function of its seed alone, small, and in the type that published weights have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from detour import UserError, archs, nano

names = pytest.mark.parametrize("name", archs.built())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@names
def test_it_is_a_function_of_the_seed_and_leaves_the_random_state_alone(name: Any, tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        nano.write(tmp_path / folder, name, seed=seed, random=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    first, again, other = (files_of(tmp_path / folder) for folder in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys() and first != other
    assert sum(map(len, first.values())) < 5_000_000
    component = archs.spec(name).denoiser
    weights = [path for path in (tmp_path / "first" / component).glob("*.safetensors")]
    assert weights
    for path in weights:
        with safe_open(path, "pt") as opened:
            assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {"BF16"}  # noqa: SIM118


@names
def test_an_unknown_variant_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name}:nonsense is not known here; .*{name}"):
        nano.write(tmp_path / "model", f"{name}:nonsense", random=True)
