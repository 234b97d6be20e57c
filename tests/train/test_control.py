"""A stop that arrives while a run is being prepared ends it, whoever swallows the exception."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from detour import steering
from detour.train.control import Control


class Swallowing:
    """As a destructor, or a callback of the import machinery: what is raised inside only gets printed."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def control() -> Iterator[Control]:
    own = Control()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    own.install()
    yield own
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_was_swallowed_ends_the_preparation_at_its_next_part(control: Control, tmp_path: Path) -> None:
    control.begin(0, tmp_path)
    control.end_if_asked()
    one = Swallowing()
    del one
    with pytest.raises(KeyboardInterrupt, match="SIGINT received before the first step"):
        control.end_if_asked()
    with pytest.raises(KeyboardInterrupt):
        control.begin(1, tmp_path)


def test_a_signal_before_the_first_step_raises_and_one_after_it_waits_for_the_step(
    control: Control, tmp_path: Path
) -> None:
    control.begin(0, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM before the first step"):
        signal.raise_signal(signal.SIGTERM)
    training = Control()
    training.install()
    training.begin(0, tmp_path)
    training.poll(1)
    signal.raise_signal(signal.SIGTERM)
    assert training.stop_reason == "SIGTERM received"
    with pytest.raises(KeyboardInterrupt, match="second"):
        signal.raise_signal(signal.SIGTERM)


def test_a_request_ends_the_preparation(control: Control, tmp_path: Path) -> None:
    control.begin(0, tmp_path)
    steering.request(tmp_path, "stop")
    with pytest.raises(KeyboardInterrupt, match="stop requested"):
        control.end_if_asked()
