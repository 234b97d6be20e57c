"""The section `train` of a job file: how it is trained. See `job.py`."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from detour.config.section import ComputeType, OptimizerName, Section, TimestepType
from detour.config.values import Fraction


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
    train_text_encoder: bool = False
    """Train a LoRA on the text encoders too (Stable Diffusion 1, 2, XL and its kin): on all layers of attention and
    feed-forward (`network.include` and `exclude` choose among the denoiser's alone), with the rank of `network`.
    Captions are then embedded in every step."""
    text_encoder_lr: float | None = Field(default=None, ge=0)
    """Learning rate of the text encoders. Default: `lr`; half of it or less is usual."""
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
    count either way. No effect where the text encoder is trained."""
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
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError("train.text_encoder_lr has no effect without train.train_text_encoder: true")
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
