"""The schema of a job file. Every option is documented under its field: that one text feeds the docs and the web form.

`None` as a default means "as the architecture says" (see `archs.resolve`), so that such defaults live in one place.
Lengths are in pixels, `step` counts optimizer steps, times are in [0, 1] with 0 clean and 1 noise.

The sections lie in `model`, `data`, `training` and `outputs`; they are all to be had here.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from detour.config.adapter import AdapterConfig, SizeConfig
from detour.config.controls import ControlsConfig
from detour.config.data import DatasetConfig
from detour.config.model import ModelConfig, NetworkConfig
from detour.config.outputs import LoggingConfig, PromptConfig, SampleConfig, SaveConfig, ValidationConfig
from detour.config.preserve import DriftConfig, PreserveConfig, strategy_terms
from detour.config.section import (
    QTYPE_ALIASES,
    ComputeType,
    DType,
    ModelArch,
    OptimizerName,
    QType,
    Section,
    TimestepType,
)
from detour.config.training import EmaConfig, TrainConfig

__all__ = [
    "QTYPE_ALIASES", "AdapterConfig", "AdapterProcess", "ComputeType", "ControlsConfig", "DType", "DatasetConfig",
    "EmaConfig", "Job", "JobConfig", "LoggingConfig", "ModelArch", "ModelConfig", "NetworkConfig", "OptimizerName",
    "Process", "PromptConfig", "QType", "SampleConfig", "SaveConfig", "Section", "SizeConfig", "TimestepType",
    "TrainConfig", "TrainProcess", "ValidationConfig",
]  # fmt: skip

ADAPTER_LR, ADAPTER_STEPS = 1e-5, 10_000
"""What making a training adapter takes where the job says nothing."""


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
    preserve: PreserveConfig = PreserveConfig()
    controls: ControlsConfig = ControlsConfig()

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
        terms = strategy_terms(self.preserve)
        if any(term.target == "average" for term in terms) and not self.train.ema_config.use_ema:
            raise ValueError("preserve: a term with target: average needs train.ema_config.use_ema: true")
        apart = self.preserve.deploy_on is not None
        if self.network.type == "full" and (apart or any(term.target not in ("data", "contrast") for term in terms)):
            raise ValueError(
                "preserve: network.type: full changes the weights that the untouched model is made of; train an adapter"
            )
        if self.preserve.strategy == "training_adapter" and self.model.assistant_lora_path is None:
            raise ValueError("preserve.strategy: training_adapter needs model.assistant_lora_path, the adapter")
        if self.network.type in ("lokr", "loha") and self.model.quantize and self.model.qtype == "nf4":
            raise ValueError(f"network.type: {self.network.type} needs model.qtype int8 or float8, not nf4")
        return self

    @model_validator(mode="after")
    def _check_controls(self) -> Self:
        if self.controls.control_dropout and all(dataset.control_path is None for dataset in self.all_datasets):
            raise ValueError("controls.control_dropout has no effect: no dataset has a control_path")
        return self

    @property
    def all_datasets(self) -> list[DatasetConfig]:
        """The datasets, whichever way they were written."""
        if self.train.dataset_folder is not None:
            return [DatasetConfig(folder_path=self.train.dataset_folder)]
        return self.datasets


class AdapterProcess(Section):
    """Makes a training adapter: a distilled model draws pictures, and a LoRA learns from them until the model with it
    is an ordinary one. docs/adapter.md tells how."""

    type: Literal["adapter"]
    """What this process does."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """`auto` takes the first CUDA card, else Apple's, else the processor."""
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig(lr=ADAPTER_LR, steps=ADAPTER_STEPS)
    """As for `type: train`, but with an `lr` of 1e-5 and at most 10000 `steps` where they are not given."""
    network: NetworkConfig = NetworkConfig()
    sample: SampleConfig = SampleConfig()
    save: SaveConfig = SaveConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _slower(cls, data: object) -> object:
        """Other defaults than training's: the adapter must follow the pictures' mean, not single ones."""
        if isinstance(data, dict) and isinstance(train := data.get("train", {}), dict):
            steps = {} if "epochs" in train else {"steps": ADAPTER_STEPS}
            return data | {"train": {"lr": ADAPTER_LR, **steps, **train}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        train, network = self.train, self.network
        if train.dataset_folder is not None:
            raise ValueError("train.dataset_folder: the model draws the pictures itself (adapter.prompts); take it out")
        if train.epochs is not None:
            raise ValueError("train.epochs: give train.steps, the limit; adapter.stop says when it is done")
        if train.train_text_encoder:
            raise ValueError("train.train_text_encoder: a training adapter is for the denoiser alone; take it out")
        if train.lr == 0:
            raise ValueError("train.lr must be above 0, or nothing would be learnt")
        if train.timestep_type == "next_sample":
            raise ValueError("train.timestep_type: next_sample rehearses few steps, which an adapter is to undo")
        if network.type != "lora":
            raise ValueError(f"network.type: {network.type}: a training adapter is a plain LoRA for all who read it")
        if network.linear_alpha not in (None, network.linear):
            raise ValueError("network.linear_alpha: files of training adapters hold no alpha; take it out")
        if self.model.assistant_lora_path is not None:
            raise ValueError(
                "model.assistant_lora_path: the pictures must come from the distilled model as it is; take it out "
                "(network.pretrained_lora_path goes on from an adapter)"
            )
        return self

    def training(self) -> TrainProcess:
        """The training on those pictures, which is one like any other. Its dataset stands for what is yet drawn."""
        chosen, stop = self.adapter, self.adapter.stop
        sides = [max(size.width, size.height) for size in chosen.sizes] or [max(self.sample.width, self.sample.height)]
        dataset = DatasetConfig(
            folder_path=Path("pictures"),
            resolution=sides,
            num_frames=chosen.num_frames,
            caption_dropout_rate=chosen.caption_dropout_rate,
        )
        checks = ValidationConfig(
            validate_every=stop.every,
            holdout=stop.held_out / chosen.pictures,
            times=stop.times,
            max_images=stop.held_out,
        )
        return TrainProcess(
            type="train",
            device=self.device,
            model=self.model,
            train=self.train,
            network=self.network,
            datasets=[dataset],
            sample=self.sample,
            save=self.save,
            validation=checks,
            logging=self.logging,
            preserve=PreserveConfig(
                strategy="none", drift=DriftConfig(measure=True, every=stop.every, long_steps=chosen.long_steps)
            ),
        )


Process = TrainProcess | AdapterProcess


class JobConfig(Section):
    """One run: where it goes and what is done, in order."""

    output_name: str = Field(min_length=1)
    """Name of the run, its folder and its LoRA."""
    output_folder: Path = Path("output")
    """Folder that holds the run's folder."""
    process: Annotated[list[Annotated[Process, Field(discriminator="type")]], Field(min_length=1)]
    """What is done, in order."""


class Job(Section):
    """A job file."""

    config: JobConfig
    meta: dict[str, Any] = {}
    """Free notes; nothing reads them."""
