"""Random tensors as pure functions of what they are for, drawn on the CPU so that every device gets the same."""

import torch

from detour.seeds import seed_for


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator for one purpose, such as `generator(seed, "noise", step, micro)`."""
    return torch.Generator("cpu").manual_seed(seed_for(*parts))
