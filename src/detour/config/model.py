"""The sections `model` and `network` of a job file: what is trained. See `job.py`."""

from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from detour.config.section import QTYPE_ALIASES, ComputeType, ModelArch, QType, Section
from detour.config.values import Regex


def _qtype(value: object) -> object:
    return QTYPE_ALIASES.get(value, value) if isinstance(value, str) else value


# What an editor is told about `arch`: a name, or a name with a variant (`ModelConfig._split_variant` takes it apart).
_ARCH_SCHEMA = {
    "anyOf": [
        {"type": "string", "enum": list(get_args(ModelArch))},
        {
            "type": "string",
            "pattern": f"^({'|'.join(get_args(ModelArch))}):[A-Za-z0-9_.-]+$",
            "description": "a name with a variant",
        },
    ]
}

Arch = Annotated[ModelArch, WithJsonSchema(_ARCH_SCHEMA, mode="validation")]
AnyQType = Annotated[QType, BeforeValidator(_qtype, json_schema_input_type=Literal[tuple(QTYPE_ALIASES)])]


class ModelConfig(Section):
    """Which model is trained and how its weights are held in memory."""

    arch: Arch
    """Architecture. A variant may follow a colon: `zimage:base`."""
    variant: str | None = None
    """Variant of the architecture (`detour archs` lists them). Found from `name_or_path` when that is a known
    repository."""
    name_or_path: str | None = None
    """Folder in the diffusers layout, single `.safetensors` file, or hub id `user/repo`."""
    extras_name_or_path: str | None = None
    """Where VAE, text encoder, tokenizer and scheduler come from when `name_or_path` holds the denoiser alone."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository. A commit makes the run repeatable."""
    assistant_lora_path: str | None = None
    """Training adapter: a local file or `user/repo/file.safetensors`. On while training, gone while sampling."""
    assistant_lora_mode: Literal["factored", "merged"] = "factored"
    """`factored` keeps the base weights bit for bit, so that removal is exact. `merged` adds the adapter into the
    weights before they are quantised (cheapest per step, removal is approximate and its error is logged)."""
    dtype: ComputeType | None = None
    """Type of the frozen weights. Default: `train.dtype`."""
    quantize: bool = False
    """Hold the denoiser's linear layers in `qtype`."""
    qtype: AnyQType = "float8"
    """`int8` and `float8` (weight-only, torchao), `nf4` (4 bits, bitsandbytes). The names `qfloat8`, `qint8`,
    `uint4`, ... of other trainers' files are understood."""
    quantize_te: bool = False
    """Hold the text encoder's linear layers in `qtype_te`."""
    qtype_te: AnyQType | None = None
    """As `qtype`, for the text encoder. Default: `qtype`."""
    low_vram: bool = False
    """Read, quantise and move one layer at a time, and keep text encoder and VAE off the card except while they
    work."""
    layer_offloading: bool = False
    """Keep layers in main memory and bring them to the card when needed. Not built yet: true is an error."""

    @model_validator(mode="before")
    @classmethod
    def _split_variant(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(arch := data.get("arch"), str) and ":" in arch:
            name, variant = arch.split(":", 1)
            return data | {"arch": name, "variant": data.get("variant", variant)}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layer_offloading:
            raise ValueError(
                "model.layer_offloading is not built yet; "
                "use model.quantize, model.low_vram and train.gradient_checkpointing"
            )
        return self


class NetworkConfig(Section):
    """The adapter that is trained."""

    type: Literal["lora", "lokr", "loha", "dora", "full"] = "lora"
    """`full` trains the denoiser's own weights instead of an adapter."""
    linear: int = Field(default=32, ge=1)
    """Rank."""
    linear_alpha: float | None = Field(default=None, gt=0)
    """The adapter is scaled by alpha / rank. Default: the rank, a scale of 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the adapter while training (LoKr and LoHa drop rows of what they add)."""
    transformer_only: bool = True
    """Only the architecture's main blocks, as existing toolkits do; false adds every other linear layer (refiners,
    embedders, ...). No effect with `type: full`."""
    include: list[Regex] = []
    """Regular expressions: only layers whose full name matches one of them anywhere (`attention`,
    `layers\\.1[0-9]`)."""
    exclude: list[Regex] = []
    """Regular expressions: layers whose full name matches one of them are left alone. Wins over `include`."""
    lokr_factor: int = Field(default=-1, ge=-1)
    """LoKr: size of the small Kronecker factor. -1 takes the most even split."""
    lokr_full_rank: bool = False
    """LoKr: keep the larger factor whole instead of rank `linear`."""
    pretrained_lora_path: str | None = None
    """Start from this LoRA (local file or `user/repo/file.safetensors`) instead of from zero."""
