"""Kinds of values in a job file that need checking, or that may be written in more than one way."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field


def regex(value: str) -> str:
    """Text that compiles as a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{value!r} is not a regular expression ({error}); a literal '.', '[', '(' or '*' needs a backslash"
        ) from None
    return value


def without_dot(value: object) -> object:
    """`.txt` and `txt` are the same ending."""
    return value.removeprefix(".") if isinstance(value, str) else value


def as_list(value: object) -> object:
    """One number stands for a list of one."""
    return [value] if isinstance(value, int) else value


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Regex = Annotated[str, AfterValidator(regex)]
Side = Annotated[int, Field(ge=32)]
