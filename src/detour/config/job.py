"""The schema of a job file. Every option is documented under its field: that one text feeds the docs and the web form.

`None` as a default means "as the architecture says" (see `archs.resolve`), so that such defaults live in one place.
Lengths are in pixels, `step` counts optimizer steps, times are in [0, 1] with 0 clean and 1 noise.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from detour.config.values import Fraction, Regex, Side, as_list, without_dot

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


def _qtype(value: object) -> object:
    return QTYPE_ALIASES.get(value, value) if isinstance(value, str) else value


def _as_prompt(value: object) -> object:
    return {"prompt": value} if isinstance(value, str) else value


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


class DatasetConfig(Section):
    """A folder of pictures with captions. Several may be given; they are mixed in proportion to their size."""

    folder_path: Path
    """Folder, read with its subfolders."""
    recursive: bool = True
    """Read subfolders too."""
    caption_ext: Annotated[str, BeforeValidator(without_dot)] = "txt"
    """Ending of the caption file beside each picture."""
    captions_file: Path | None = None
    """JSONL (`{"file": ..., "caption": ... or [...]}`) or CSV (columns `file`, `caption`) with captions instead of
    caption files. A relative path starts from `folder_path`."""
    default_caption: str | None = None
    """Caption of pictures that have none. Without it a picture without caption is an error."""
    trigger_word: str | None = None
    """Put before captions that lack it, and in place of `[trigger]`. Default: the trigger word of the process."""
    caption_dropout_rate: Fraction = 0.0
    """Share of draws that see an empty caption."""
    shuffle_tokens: bool = False
    """Shuffle the comma-separated parts of the caption at every draw."""
    keep_tokens: int = Field(default=0, ge=0)
    """Number of leading parts that `shuffle_tokens` leaves in place."""
    resolution: Annotated[
        list[Side], Field(min_length=1), BeforeValidator(as_list, json_schema_input_type=Side | list[Side])
    ] = [1024]
    """Side of the square with the area that pictures are scaled to; several give each picture at each size."""
    upscale: bool = False
    """Scale small pictures up to `resolution`. Otherwise they are trained at their own size."""
    num_repeats: int = Field(default=1, ge=1)
    """How often each picture is drawn in an epoch."""
    flip_x: bool = False
    """Add the mirror image (left and right exchanged)."""
    flip_y: bool = False
    """Add the upside-down image."""
    crop: Literal["center", "random"] = "center"
    """Where the part that does not fit the bucket is cut away. `random` is drawn once for each picture and crop
    variant."""
    crop_variants: int = Field(default=1, ge=1, le=64)
    """With `crop: random`, number of different crops of each picture; epochs go through them in turn."""
    mask_path: Path | None = None
    """Folder with a mask for each picture (same stem): white counts fully in the loss, black by `mask_min_value`."""
    alpha_mask: bool = False
    """Take the mask from the picture's alpha channel."""
    mask_min_value: Fraction = 0.1
    """Weight of the black parts of a mask."""
    is_reg: bool = False
    """A regularisation set: its pictures take every second place and get no trigger word."""
    loss_weight: float = Field(default=1.0, ge=0)
    """The loss of this set's pictures is multiplied by it."""
    bad_images: Literal["error", "skip"] = "error"
    """What to do about pictures that cannot be used: refuse to start, or leave them out and list them."""


class EmaConfig(Section):
    """An exponential moving average of the trained weights."""

    use_ema: bool = False
    """Keep the average; previews, validation and exported files use it."""
    ema_decay: float = Field(default=0.99, gt=0, lt=1)
    """Share of the old average kept at each step."""


class TrainConfig(Section):
    """How it is trained."""

    dataset_folder: Path | None = None
    """Short form for a single dataset with default options; for more use `datasets`."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures in a micro-batch (all of one size and one caption length)."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Micro-batches in a step. Their gradients are averaged."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give either `steps` or `epochs`; with neither it is 3000 steps."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data."""
    save_every_n_epochs: int | None = Field(default=None, ge=1)
    """Save after every so many epochs (see also `save.save_every`)."""
    lr: float = Field(default=1e-4, ge=0)
    """Learning rate. Prodigy finds its own: it multiplies this by an estimate and wants 1.0."""
    optimizer: OptimizerName = "adamw"
    """`adamw8bit` holds its state in 8 bits (bitsandbytes)."""
    optimizer_params: dict[str, float | bool | int | str | list[float]] = {}
    """Further arguments of the optimizer, such as `weight_decay` or `betas`."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts"] = "constant"
    """Shape of the learning rate after the warm-up; `linear` and `cosine` fall to `lr_min_ratio`."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero."""
    lr_cycles: int = Field(default=1, ge=1)
    """Restarts of `cosine_with_restarts`."""
    lr_min_ratio: Fraction = 0.0
    """Share of `lr` left at the end of `linear`, `cosine` and each restart."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm. 0 switches it off."""
    noise_scheduler: Literal["flowmatch", "ddpm"] | None = None
    """Must fit the architecture. Default: what the architecture was trained with."""
    timestep_type: TimestepType | None = None
    """How times are drawn (docs/options.md shows each). Default: the architecture's."""
    timestep_bias: Literal["balanced", "high_noise", "low_noise"] = "balanced"
    """Prefer times with much noise (composition) or little noise (texture)."""
    min_timestep: Fraction = 0.0
    """No time below this is drawn."""
    max_timestep: Fraction = 1.0
    """No time above this is drawn."""
    loss_type: Literal["mse", "mae", "huber", "wavelet"] = "mse"
    """`huber` is quadratic below `huber_delta` and linear above; `wavelet` compares Haar bands of the clean picture."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where `huber` turns linear."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Diffusion models (`ddpm`): limits the weight of times with little noise to this signal-to-noise ratio; 5 is the
    usual choice. No effect on flow models is possible, so there it is an error."""
    reg_weight: float = Field(default=1.0, ge=0)
    """Further weight on the loss of regularisation sets."""
    dtype: ComputeType = "bf16"
    """Type the model computes in. Trained weights are always float32."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: far less memory, about 45 % more time at 1024 pixels."""
    unload_text_encoder: bool = True
    """Free the text encoder once every caption and prompt is in the cache. False keeps it in main memory. Captions
    count either way."""
    cache_text_embeddings: bool = True
    """Embed captions once and keep the result. False is not built yet and is an error."""
    cache_folder: Path | None = None
    """Where latents and text embeddings are kept. Default: `$DETOUR_CACHE` or `~/.cache/detour`. May be shared by
    jobs."""
    ema_config: EmaConfig = EmaConfig()
    """Moving average of the weights."""
    seed: int = 42
    """Every random draw is a function of this seed, the step and its purpose."""
    num_workers: int = Field(default=2, ge=0)
    """Processes that read the caches. The result does not depend on it."""
    max_bad_steps: int = Field(default=5, ge=1)
    """Stop after so many steps in a row with a loss or gradient that is not finite. Such steps change no weight."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train.steps and train.epochs exclude each other; keep one")
        if self.min_timestep >= self.max_timestep:
            raise ValueError(
                f"train.min_timestep ({self.min_timestep}) must be below train.max_timestep ({self.max_timestep})"
            )
        if not self.cache_text_embeddings:
            raise ValueError(
                "train.cache_text_embeddings: false is not built; "
                "leave it out (captions are embedded once, and always used)"
            )
        return self


class PromptConfig(Section):
    """A preview. Unset values come from `sample`."""

    prompt: str
    """What to draw. `[trigger]` stands for the trigger word."""
    neg: str | None = None
    """What to steer away from; has an effect with guidance above 1."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the noise."""
    width: int | None = Field(default=None, ge=32)
    """Width of the picture."""
    height: int | None = Field(default=None, ge=32)
    """Height of the picture."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """1 means no guidance."""
    sample_steps: int | None = Field(default=None, ge=1)
    """Denoising steps."""
    network_multiplier: float | None = None
    """Strength of the LoRA in this preview."""


class SampleConfig(Section):
    """Previews: drawn as the finished LoRA will be used, without the training adapter."""

    sampler: Literal["flowmatch", "ddpm"] | None = None
    """Must fit the architecture. Default: the model's own scheduler."""
    sample_steps: int | None = Field(default=None, ge=1)
    """Denoising steps. Default: the variant's (8 for Z-Image Turbo)."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """Classifier-free guidance; 1 means none. Default: the variant's (1 for a turbo model)."""
    width: int = Field(default=1024, ge=32)
    """Width of the pictures."""
    height: int = Field(default=1024, ge=32)
    """Height of the pictures."""
    prompts: list[Annotated[PromptConfig, BeforeValidator(_as_prompt, json_schema_input_type=str | PromptConfig)]] = []
    """What to draw. Without any, the first captions of the dataset are used (up to 4)."""
    neg: str = ""
    """Negative prompt of all previews."""
    seed: int = Field(default=42, ge=0)
    """Seed of the noise."""
    walk_seed: bool = False
    """Add the prompt's place in the list to the seed; otherwise all share one."""
    sample_every: int | None = Field(default=None, ge=1)
    """Draw after every so many steps."""
    sample_every_n_epochs: int | None = Field(default=None, ge=1)
    """Draw after every so many epochs."""
    skip_first_sample: bool = False
    """Do not draw before the first step."""
    disable_sampling: bool = False
    """Draw nothing at all."""


class SaveConfig(Section):
    """Checkpoints (exact state) and LoRA files."""

    save_every: int | None = Field(default=None, ge=1)
    """Save after every so many steps. The end always saves. Default: 250 where no `save_every_n_epochs` is given."""
    max_step_saves_to_keep: int = Field(default=4, ge=1)
    """Older checkpoints and LoRA files are removed once a newer one has been read back."""
    dtype: DType = "bf16"
    """Type of the weights in LoRA files. Checkpoints always hold float32."""
    formats: list[Literal["comfy", "diffusers", "kohya"]] = ["comfy"]
    """LoRA formats written at the end; the first is also written at every save. Files other than the first get the
    format's name as a suffix."""
    include_captions: bool = False
    """Write tag statistics and the trigger word's captions into the LoRA's metadata. Off: nothing private leaves."""


class ValidationConfig(Section):
    """Loss on pictures that are not trained on, always at the same noise and times: comparable between steps and
    runs."""

    validate_every: int | None = Field(default=None, ge=1)
    """Steps between validations. Nothing is validated without it."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training pictures set aside, chosen by their content."""
    dataset: DatasetConfig | None = None
    """A dataset of its own instead of `holdout`."""
    times: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [0.25, 0.5, 0.75, 1.0]
    """Times at which the loss is taken."""
    max_images: int = Field(default=32, ge=1)
    """At most so many pictures."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validate_every is not None and not self.holdout and self.dataset is None:
            raise ValueError(
                "validation.validate_every needs pictures: give validation.holdout (say 0.1) or validation.dataset"
            )
        if self.holdout and self.dataset is not None:
            raise ValueError("validation.holdout and validation.dataset exclude each other; keep one")
        return self


class LoggingConfig(Section):
    """Where figures go besides the terminal and `events.jsonl`."""

    log_every: int = Field(default=1, ge=1)
    """Steps between two lines."""
    tensorboard: bool = False
    """Write TensorBoard files into the run's folder."""
    trackio: bool = False
    """Log to trackio."""
    wandb: bool = False
    """Log to Weights & Biases."""
    project_name: str = "detour"
    """Project at trackio or wandb."""
    run_name: str | None = None
    """Run at trackio or wandb. Default: `output_name`."""


class TrainProcess(Section):
    """Trains an adapter (or the whole denoiser)."""

    type: Literal["train"]
    """What this process does."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """`auto` takes the first CUDA card, else Apple's, else the processor."""
    trigger_word: str | None = None
    """Trigger word of datasets that name none."""
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    network: NetworkConfig = NetworkConfig()
    datasets: list[DatasetConfig] = []
    """Datasets; or use `train.dataset_folder`."""
    sample: SampleConfig = SampleConfig()
    save: SaveConfig = SaveConfig()
    validation: ValidationConfig = ValidationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.dataset_folder is not None and self.datasets:
            raise ValueError("train.dataset_folder and datasets exclude each other; keep one")
        if not self.all_datasets:
            raise ValueError("no pictures: give train.dataset_folder or datasets")
        if all(dataset.is_reg for dataset in self.all_datasets):
            raise ValueError("datasets: every one has is_reg: true; at least one must be the subject")
        if self.network.type == "full" and self.model.quantize:
            raise ValueError("network.type: full trains the base weights, which model.quantize freezes; keep one")
        merged = self.model.assistant_lora_path is not None and self.model.assistant_lora_mode == "merged"
        if merged and self.network.type in ("full", "dora"):
            raise ValueError(
                f"network.type: {self.network.type} is made from the base weights, into which "
                f"model.assistant_lora_mode: merged adds the training adapter; use factored"
            )
        if self.network.type in ("lokr", "loha") and self.model.quantize and self.model.qtype == "nf4":
            raise ValueError(f"network.type: {self.network.type} needs model.qtype int8 or float8, not nf4")
        return self

    @property
    def all_datasets(self) -> list[DatasetConfig]:
        """The datasets, whichever way they were written."""
        if self.train.dataset_folder is not None:
            return [DatasetConfig(folder_path=self.train.dataset_folder)]
        return self.datasets


Process = TrainProcess  # a union, told apart by `type`, once there are more


class JobConfig(Section):
    """One run: where it goes and what is done, in order."""

    output_name: str = Field(min_length=1)
    """Name of the run, its folder and its LoRA."""
    output_folder: Path = Path("output")
    """Folder that holds the run's folder."""
    process: Annotated[list[Process], Field(min_length=1)]
    """What is done, in order."""


class Job(Section):
    """A job file."""

    config: JobConfig
    meta: dict[str, Any] = {}
    """Free notes; nothing reads them."""
