"""What every part of the schema shares: the names that options may take, and how a section reads them."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

ModelArch = Literal[
    "sd1", "sd2", "sd3", "sdxl", "vega", "ssd", "pixart", "pixart_sigma",
    "auraflow", "flux", "flex1", "flex2", "lumina2", "wan21", "zimage",
]  # fmt: skip

DType = Literal["fp32", "bf16", "fp16"]
ComputeType = Literal[
    "fp32", "bf16"
]  # fp16 overflows in the activations of Z-Image and its kin, and needs loss scaling
QType = Literal["int8", "float8", "nf4"]
TimestepType = Literal[
    "sigmoid", "weighted", "linear", "shift", "lognorm_blend", "next_sample",
    "one_step", "two_step", "four_step", "eight_step",
]  # fmt: skip
OptimizerName = Literal[
    "adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedulefree",
]  # fmt: skip

# Names found in users' files, and what runs for each. quanto's types (q...) map onto the torchao and bitsandbytes
# types of the same width: those have a tested backward (docs/options.md, quantisation).
QTYPE_ALIASES: dict[str, QType] = {
    "qfloat8": "float8", "fp8": "float8", "float8": "float8",
    "qint8": "int8", "int8": "int8", "uint8": "int8",
    "qint4": "nf4", "uint4": "nf4", "int4": "nf4", "nf4": "nf4", "4bit": "nf4",
}  # fmt: skip


class Section(BaseModel):
    """Common to every section: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_as_number(cls, data: object) -> object:
        """`true` would pass as the number 1 (`batch_size: true`), which nobody means; as a word it is refused."""
        if not isinstance(data, dict):
            return data
        return {
            name: str(value).lower() if cls._is_number(name) and isinstance(value, bool) else value
            for name, value in data.items()
        }

    @classmethod
    def _is_number(cls, name: str) -> bool:
        annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
        kinds = {annotation, *get_args(annotation)}
        return bool not in kinds and bool(kinds & {int, float})
