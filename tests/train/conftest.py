"""One miniature for all tests of the engine."""

import pytest

from miniature import World, write_world
from terms import mini, trained

__all__ = ["mini", "trained"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))
