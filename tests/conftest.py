"""Shared by all tests: one thread (two cores are shared), no network."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Of the default tests, by the minutes they take. Workers get whole files in this order: a long one must not come last.
_LONG = ("test_archs_engine", "test_archs_contract", "test_kill_save", "test_resume", "test_text_encoder", "test_arch_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""

    def place(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(_LONG) if item.path.stem.startswith(name)), len(_LONG))

    items.sort(key=place)
