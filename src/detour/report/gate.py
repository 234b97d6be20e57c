"""What the teacher gate of a run found (`train.gate`), in words: for the report and for the job's page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from detour.report import words

TITLE = "Teacher gate"
ABOUT = (
    "Before the first step: does it help the teacher to be told more than the caption? The untouched model draws the "
    "first training pictures twice, told the caption alone and told more. No training comes closer than its teacher."
)


@dataclass(frozen=True)
class Gate:
    """A verdict with its figures."""

    passed: bool
    figures: list[tuple[str, str]]
    """Label and value."""
    reasons: list[str]
    """Why it should not teach as it is; empty where it may."""
    picture: str
    """Name of the file in the run's `samples`: the drawings beside the pictures."""

    @property
    def says(self) -> str:
        """The verdict."""
        return "passed: being told more helps this teacher" if self.passed else "not passed: look at the drawings"


def read(record: dict[str, Any]) -> Gate:
    """From an event. KeyError, TypeError or ValueError for one that is not as Detour writes it."""
    red, green, blue = (_figure(value, "+.2f") for value in record["colour"])
    gain, error = _figure(record["gain"], "+.1%"), _figure(record["gain_error"], ".1%")
    return Gate(
        passed=record["passed"] is True,
        figures=[
            ("Closer to the training pictures by", f"{gain} of the distance (standard error {error})"),
            ("Context gap: what being told more changes", _figure(record["gap"], ".4g")),
            ("Colour, less that of the pictures", f"red {red}, green {green}, blue {blue} of 0 to 1"),
            ("Frame that fits better", str(record["frame"]) or "none"),
        ],
        reasons=[str(reason) for reason in list(record["reasons"])],
        picture=words.last_part(record["path"]),
    )


def told(record: dict[str, Any]) -> tuple[str, list[str]]:
    """A sentence and its details, for a timeline. Of an event that is not as it should be, the sentence alone."""
    try:
        found = read(record)
    except (KeyError, TypeError, ValueError):
        return f"{TITLE.lower()}: this event is damaged", []
    return f"{TITLE.lower()} {found.says}", [*(f"{label}: {value}" for label, value in found.figures), *found.reasons]


def _figure(value: float | None, form: str) -> str:
    """None stands for what was not finite."""
    return words.figure(None) if value is None else format(float(value), form)
