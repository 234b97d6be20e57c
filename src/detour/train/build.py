"""Builds a run in two halves: `gather` finds and checks everything cheap, `build` reads the heavy weights.

Whatever can be wrong with the inputs is an error in the first half, before a weight is read or a folder is touched.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from detour import UserError, archs, export, sample, weights
from detour.config.job import PromptConfig
from detour.data import cache, controls, order
from detour.data.loader import Source, batches, load_batch
from detour.data.prepare import Encoders, prepare
from detour.data.scan import scan
from detour.draw import DTYPES, lora_shapes, pick_device
from detour.events import StageEvent, WarningEvent
from detour.lora_formats import unsupported
from detour.nn import lora, quant, training_adapter
from detour.nn.together import from_file, with_encoders
from detour.train import checkpoint, keep, optim, text
from detour.train.ema import Ema
from detour.train.objective import Task
from detour.train.run import Preview, Run
from detour.train.timesteps import check_times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from detour.archs.base import Arch, ArchSpec, Condition
    from detour.config.job import DatasetConfig, QType, TrainProcess
    from detour.data.loader import Batch
    from detour.data.order import Order
    from detour.data.scan import Scan
    from detour.events import Sink
    from detour.export import LoraFile
    from detour.nn.training_adapter import TrainingAdapter

DEFAULT_PROMPTS = 4  # captions drawn as previews when the job names no prompt


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Found, checked, and still light: no weight has been read."""

    process: TrainProcess
    arch: Arch
    device: torch.device
    source: weights.ModelSource
    denoiser: nn.Module
    """On the meta device."""
    adapter: TrainingAdapter | None
    lora_layers: list[str]
    pretrained: LoraFile | None
    rich: dict[str, str]
    """The long captions that a teacher is told, by picture."""
    training: Order
    validation: Order | None
    requests: list[sample.Request]


def gather(process: TrainProcess, sink: Sink) -> Inputs:
    """Check pictures, model files, training adapter and layers of a resolved process. Raises UserError."""
    arch = archs.get(process.model.arch)
    spec = arch.spec
    name, variant = archs.variant_of(process)
    for message in [
        *archs.advice(process), *optim.optimizer_advice(process.train), *keep.advice(process, variant),
    ]:  # fmt: skip
        sink.emit(WarningEvent(step=None, message=message))
    keep.check(process, spec, variant)
    text.check(process, spec)
    check_times(process.train, spec.shift_at((64, 64), variant))
    _check_formats(process)
    device = pick_device(process.device)

    datasets = process.all_datasets
    found = scan(
        datasets,
        trigger=process.trigger_word,
        divisibility=spec.bucket_divisibility,
        progress=lambda done, total: sink.emit(StageEvent(name="pictures", done=done, total=total)),
    )
    _tell(found, sink)
    training, validation = _orders(process, found, datasets, arch, sink)
    requests = _requests(process, found)
    with _about("sample"):
        for request in requests:
            sample.check_request(spec, request)
            controls.check(request)

    model = process.model
    assert model.name_or_path is not None  # resolved
    with _about("model.name_or_path"):
        source = weights.find_model(
            model.name_or_path,
            components=spec.components,
            denoiser=spec.denoiser,
            optional=spec.optional,
            extras=model.extras_name_or_path,
            revision=model.revision,
        )
        _check_weights(source, spec)
        denoiser = arch.build_denoiser(source)
        archs.check_variant(spec, name, denoiser.config)  # type: ignore[arg-type]  # every diffusers model has it
    return Inputs(
        process=process,
        arch=arch,
        device=device,
        source=source,
        denoiser=denoiser,
        adapter=_adapter(process, arch, denoiser),
        lora_layers=lora.linear_names(denoiser, spec, process.network),
        pretrained=_pretrained(process, arch, denoiser, source),
        rich=keep.rich_captions(process, training),
        training=training,
        validation=validation,
        requests=requests,
    )


def build(inputs: Inputs, folder: Path, name: str, job_yaml: str, sink: Sink) -> Run:
    """Fill the caches, load the denoiser, put the adapters on it, make the optimizer."""
    process, arch, device = inputs.process, inputs.arch, inputs.device
    settings, model = process.train, process.model
    assert model.dtype is not None  # resolved
    dtype = DTYPES[model.dtype]

    store = cache.Store(settings.cache_folder or cache.default_root())
    models = _Models(inputs, store, dtype)
    epochs, total_steps = _length(process, inputs.training)
    prompts = {prompt for request in inputs.requests for prompt in request.prompts(arch.spec)}
    prompts |= {*keep.extra_prompts(process), *inputs.rich.values()}
    orders = [inputs.training] + ([inputs.validation] if inputs.validation else [])
    lengths = prepare(orders, epochs, prompts, models.encoders(), store, sink)
    training = replace(inputs.training, lengths=lengths, text_multiple=arch.spec.text_multiple)
    if settings.epochs is not None:
        batches_in_all = sum(training.count(epoch) for epoch in range(settings.epochs))
        total_steps = max(1, -(-batches_in_all // settings.gradient_accumulation))

    def condition(prompt: str) -> Condition:
        return _condition(store, models.keys, prompt) if models.keys.embedded else {}

    vae = models.vae()
    told = [controls.told(arch, vae, request, device) for request in inputs.requests]
    previews = [
        Preview(request, [condition(prompt) | pictures for prompt in request.prompts(arch.spec)])
        for request, pictures in zip(inputs.requests, told, strict=True)
    ]
    models.release()
    trained_text = None if models.keys.embedded else models.load_text()

    denoiser = _load_denoiser(inputs, dtype, sink)
    encoders = {} if trained_text is None else {part: trained_text.models[part] for part in arch.spec.lora_keys.text}
    trained = with_encoders(arch.spec.denoiser, denoiser, encoders)
    lora.attach(trained, text.layers(trained, arch.spec, inputs.lora_layers), process.network, settings.seed)
    if inputs.pretrained is not None:
        tensors, scales = inputs.pretrained.for_training()
        lora.load_pretrained(trained, from_file(trained, tensors), from_file(trained, scales))
    if inputs.adapter is not None:
        inputs.adapter.attach(denoiser)
    if settings.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]  # every diffusers model has it
    lora.train_mode(trained, True)

    trainable = lora.trainable(trained)
    _, variant = archs.variant_of(process)
    scheduler = arch.load_scheduler(inputs.source, variant.scheduler)
    ema = Ema(trainable, settings.ema_config.ema_decay) if settings.ema_config.use_ema else None
    task = replace(Task.of(arch, scheduler, settings, variant), text=trained_text)
    objective = replace(
        keep.objective(process, task, denoiser, scheduler, variant, condition, inputs.rich),
        adapter=inputs.adapter,
        ema=ema,
        mixed_precision=partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.dtype == "bf16"),
    )
    source = Source(store, models.keys, training.datasets, settings.reg_weight)
    return Run(
        name=name,
        folder=folder,
        process=process,
        job_yaml=job_yaml,
        arch=arch,
        objective=objective,
        drift=keep.drift_meter(process, objective, condition, partial(arch.decode, vae)),
        drift_schedule=keep.drift_schedule(process, total_steps) if process.preserve.drift.measure else None,
        device=device,
        sink=sink,
        denoiser=denoiser,
        trained=trained,
        vae=vae,
        scheduler=scheduler,
        adapter=inputs.adapter,
        text=models.text,
        trainable=trainable,
        optimizer=optim.build_optimizer(settings, trainable, text.names(trained, arch.spec)),
        ema=ema,
        open_batches=lambda start: batches(training, source, start, settings.num_workers),
        total_steps=total_steps,
        previews=previews,
        images=len({item.picture.sha256 for item in training.items}),
        captions=_captions(training),
        validation=_validation_batches(inputs.validation, store, models.keys, lengths, arch.spec.text_multiple),
        facts=_facts(inputs, models.keys, training),
    )


# --- inputs ----------------------------------------------------------------------------------------------------------


@contextmanager
def _about(option: str) -> Iterator[None]:
    """Begin errors with the option they are about, so that the command line can say its line in the job file."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(option):
            raise
        raise type(error)(f"{option}: {error}") from error


def _tell(found: Scan, sink: Sink) -> None:
    for finding in found.findings:
        sink.emit(WarningEvent(step=None, message=finding.message, details=list(finding.details)))
    if found.skipped:
        details = [f"{problem.path} {problem.reason}" for problem in found.skipped]
        message = f"{len(found.skipped)} pictures are left out, as bad_images: skip asks"
        sink.emit(WarningEvent(step=None, message=message, details=details))


def _orders(
    process: TrainProcess, found: Scan, datasets: list[DatasetConfig], arch: Arch, sink: Sink
) -> tuple[Order, Order | None]:
    """The order of training and, where asked for, that of validation."""
    settings, checks = process.train, process.validation
    divisibility = arch.spec.bucket_divisibility
    pictures, held, held_datasets = found.pictures, found.pictures[:0], datasets
    if checks.validate_every is not None and checks.holdout:
        pictures, held = order.hold_out(pictures, datasets, checks.holdout, settings.seed)
    elif checks.validate_every is not None and checks.dataset is not None:
        held_datasets = [checks.dataset]
        held_scan = scan(held_datasets, trigger=process.trigger_word, divisibility=divisibility)
        _tell(held_scan, sink)
        held = held_scan.pictures
    items = order.make_items(pictures, datasets, divisibility)
    training = order.Order(items, datasets, process.trigger_word, settings.seed, settings.batch_size)
    if not held:
        return training, None
    validation = order.validation_order(
        held,
        held_datasets,
        process.trigger_word,
        seed=settings.seed,
        batch_size=settings.batch_size,
        max_images=checks.max_images,
        divisibility=divisibility,
    )
    return training, validation


def _check_formats(process: TrainProcess) -> None:
    """Formats that cannot carry this kind of adapter are known before the first step, not after the last."""
    kind = process.network.type
    if kind == "full":
        return
    spec = archs.spec(process.model.arch)
    reasons = [reason for fmt in process.save.formats if (reason := unsupported(kind, fmt, spec))]
    if reasons:
        raise UserError(f"save.formats: {'; '.join(reasons)}")


def _requests(process: TrainProcess, found: Scan) -> list[sample.Request]:
    """What to draw: the job's prompts, or the first captions of the pictures."""
    settings = process.sample
    if settings.disable_sampling:
        return []
    prompts = list(settings.prompts)
    if not prompts:
        captions = dict.fromkeys(caption for picture in found.pictures for caption in picture.captions if caption)
        prompts = [PromptConfig.model_validate({"prompt": caption}) for caption in list(captions)[:DEFAULT_PROMPTS]]
    assert settings.sample_steps is not None and settings.guidance_scale is not None  # resolved
    trigger = process.trigger_word or ""
    return [
        sample.Request(
            prompt=prompt.prompt.replace("[trigger]", trigger),
            negative=settings.neg if prompt.neg is None else prompt.neg,
            seed=(settings.seed + (index if settings.walk_seed else 0)) if prompt.seed is None else prompt.seed,
            width=prompt.width or settings.width,
            height=prompt.height or settings.height,
            frames=prompt.num_frames or settings.num_frames,
            fps=settings.fps or sample.FPS,
            steps=prompt.sample_steps or settings.sample_steps,
            guidance=prompt.guidance_scale or settings.guidance_scale,
            lora_scale=1.0 if prompt.network_multiplier is None else prompt.network_multiplier,
            control=None if prompt.control is None else str(prompt.control.expanduser()),
            inpaint=None if prompt.inpaint is None else str(prompt.inpaint.expanduser()),
        )
        for index, prompt in enumerate(prompts)
    ]


def _check_weights(source: weights.ModelSource, spec: ArchSpec) -> None:
    """Read the headers of all weight files: a download that is cut off must not show after an hour of caching."""
    if source.single_file is not None:
        weights.tensor_shapes([source.single_file])
    folders = [folder for part in spec.components if (folder := source.find(part)) is not None]
    for folder in folders:
        if (folder / "config.json").is_file():  # tokenizers and schedulers have none, and no weights
            weights.tensor_shapes(weights.component_files(folder))


def _adapter(process: TrainProcess, arch: Arch, denoiser: nn.Module) -> TrainingAdapter | None:
    model = process.model
    if model.assistant_lora_path is None:
        return None
    assert model.dtype is not None
    path = weights.find_file(model.assistant_lora_path, what="model.assistant_lora_path")
    shapes, mode = training_adapter.linear_shapes(denoiser), model.assistant_lora_mode
    with _about("model.assistant_lora_path"):
        return training_adapter.load_training_adapter(
            path, shapes, arch.spec.lora_keys, mode, dtype=DTYPES[model.dtype]
        )


def _pretrained(process: TrainProcess, arch: Arch, denoiser: nn.Module, source: weights.ModelSource) -> LoraFile | None:
    if process.network.pretrained_lora_path is None:
        return None
    path = weights.find_file(process.network.pretrained_lora_path, what="network.pretrained_lora_path")
    with_text = process.train.train_text_encoder
    shapes = lora_shapes(arch, denoiser, source) if with_text else training_adapter.linear_shapes(denoiser)
    with _about("network.pretrained_lora_path"):
        return export.read_lora(path, arch.spec, shapes)


# --- models ----------------------------------------------------------------------------------------------------------


class _Models:
    """The encoders: loaded when first needed, each moved off the card when its work is done."""

    def __init__(self, inputs: Inputs, store: cache.Store, dtype: torch.dtype) -> None:
        self._inputs, self._dtype = inputs, dtype
        self._vae: nn.Module | None = None
        self.text: Any = None
        model = inputs.process.model
        # Latents are made in float32 where memory allows: the VAE is small (84 M parameters for Z-Image).
        self._vae_dtype = dtype if model.low_vram else torch.float32
        self._te_quantizer = _quantizer(model.qtype_te if model.quantize_te else None, "", inputs.device)
        self.keys = self._keys(store)

    def _keys(self, store: cache.Store) -> cache.Keys:
        source, model, spec = self._inputs.source, self._inputs.process.model, self._inputs.arch.spec

        def places(*kinds: str) -> list[Path]:
            parts = [part for part in spec.components if part.startswith(kinds)]
            file = source.single_file if set(parts) & set(spec.bundled) else None
            folders = [source.component(part) for part in parts if not source.lacks(part)]
            return folders + ([file] if file is not None else [])

        text = cache.identity(
            store.root,
            places("text_encoder", "tokenizer"),
            spec.name,  # architectures may share encoders but not how they ask them
            str(self._dtype),
            str(model.qtype_te if model.quantize_te else None),
            archs.variant_of(self._inputs.process)[1].text_tokens or spec.text_tokens,
            *(f"{name}={value}" for name, value in source.options(spec.options).items()),
        )
        vae = cache.identity(store.root, places("vae"), str(self._vae_dtype))
        embedded = not self._inputs.process.train.train_text_encoder
        return cache.Keys(vae=vae, text=text, spatial_factor=spec.spatial_factor, embedded=embedded)

    def encoders(self) -> Encoders:
        arch, device = self._inputs.arch, self._inputs.device
        return Encoders(arch=arch, load_vae=self.vae, load_text=self.load_text, keys=self.keys, device=device)

    def load_text(self) -> Any:  # noqa: ANN401  each architecture has a type of its own
        inputs = self._inputs
        placement = weights.Placement(self._dtype, inputs.device, self._te_quantizer)
        self.text = inputs.arch.load_text_encoders(inputs.source, placement)
        return self.text

    def vae(self) -> nn.Module:
        if self._vae is None:
            self._vae = self._inputs.arch.load_vae(self._inputs.source, self._vae_dtype, self._inputs.device)
        return self._vae

    def release(self) -> None:
        """Make room: free the text encoder, or keep it in main memory if so asked; with `low_vram` move the VAE out."""
        if self.text is not None:
            self.text = None if self._inputs.process.train.unload_text_encoder else self.text.to(torch.device("cpu"))
        if self._vae is not None and self._inputs.process.model.low_vram:
            self._vae.to("cpu")
        if self._inputs.device.type == "cuda":
            torch.cuda.empty_cache()


def _quantizer(qtype: QType | None, exclude: str, device: torch.device) -> Callable[[str, nn.Linear], nn.Module] | None:
    return None if qtype is None else quant.quantizer(qtype, exclude, device)


def _load_denoiser(inputs: Inputs, dtype: torch.dtype, sink: Sink) -> nn.Module:
    """Stream the weights in, one layer at a time: merged with the adapter if so asked, cast, quantised, moved."""
    arch, model, adapter = inputs.arch, inputs.process.model, inputs.adapter
    sink.emit(StageEvent(name="model", done=0, total=1))
    placement = weights.Placement(
        dtype,
        inputs.device,
        quantizer=_quantizer(model.qtype if model.quantize else None, arch.spec.quantize_exclude, inputs.device),
        patch=adapter.patch if adapter is not None and adapter.mode == "merged" else None,
        keep_float32=arch.spec.keep_float32,
    )
    weights.materialise(inputs.denoiser, arch.denoiser_tensors(inputs.source), placement, where=inputs.source.name)
    sink.emit(StageEvent(name="model", done=1, total=1))
    if adapter is not None:
        adapter.to(inputs.device)
        if adapter.merge_error is not None:
            sink.emit(WarningEvent(step=None, message=str(adapter.merge_error)))
    return inputs.denoiser


# --- data ------------------------------------------------------------------------------------------------------------


def _captions(training: Order) -> list[str]:
    pictures = {item.picture.path: item.picture for item in training.items}
    return [caption for picture in pictures.values() for caption in picture.captions]


def _length(process: TrainProcess, training: Order) -> tuple[int, int]:
    """Epochs that may be touched, and steps where the job gives them (0 where it gives epochs)."""
    settings = process.train
    if settings.epochs is not None:
        return settings.epochs + 1 + settings.gradient_accumulation, 0  # the last step may reach into later epochs
    assert settings.steps is not None
    return training.most_epochs(settings.steps * settings.gradient_accumulation), settings.steps


def _validation_batches(
    validation: Order | None, store: cache.Store, keys: cache.Keys, lengths: dict[str, int], text_multiple: int
) -> list[Batch]:
    if validation is None:
        return []
    plans = replace(validation, lengths=lengths, text_multiple=text_multiple).epoch(0)
    return [load_batch(Source(store, keys, validation.datasets, 1.0), plan) for plan in plans]


def _condition(store: cache.Store, keys: cache.Keys, prompt: str) -> dict[str, torch.Tensor]:
    condition = store.get(cache.TEXT, keys.prompt(prompt))
    assert condition is not None  # `prepare` has just made it
    return condition


def _facts(inputs: Inputs, keys: cache.Keys, training: Order) -> dict[str, Any]:
    """What identifies data, model and program. Compared on resuming."""
    adapter = inputs.adapter
    return checkpoint.environment() | {
        "model": inputs.source.name,
        "vae_sha256": keys.vae,
        "text_encoder_sha256": keys.text,
        "training_adapter_sha256": adapter.sha256 if adapter else "none",
        "training_adapter_mode": adapter.mode if adapter else "none",
        "dataset_sha256": training.fingerprint,
    }
