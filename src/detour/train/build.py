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
from detour.adapter import FOLDER, Making, Painter, draw_missing
from detour.config.job import AdapterProcess, PromptConfig
from detour.data import cache, controls, order
from detour.data.loader import Source, batches, load_batch
from detour.data.prepare import prepare_captions, prepare_latents
from detour.data.scan import Scan, scan
from detour.draw import DTYPES, lora_shapes, pick_device
from detour.events import StageEvent, WarningEvent
from detour.lora_formats import unsupported
from detour.nn import lora, training_adapter
from detour.nn.together import from_file, with_encoders
from detour.train import beside, checkpoint, checks, keep, optim, text
from detour.train.deployment import Deployment
from detour.train.ema import Ema
from detour.train.encoders import Models, quantizer
from detour.train.objective import Task
from detour.train.run import Preview, Run
from detour.train.timesteps import check_times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

    from detour.archs.base import Arch, ArchSpec, Condition, TextEncoders
    from detour.config.job import DatasetConfig, Process, TrainProcess
    from detour.data.loader import Batch
    from detour.data.order import Order
    from detour.events import Sink
    from detour.export import LoraFile
    from detour.nn.training_adapter import TrainingAdapter
    from detour.train.teachers import Base

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
    beside: beside.Beside
    pretrained: LoraFile | None
    rich: dict[str, str]
    """The long captions that a teacher is told, by picture."""
    picture_tokens: int
    """How many tokens a picture is for a teacher that is told it."""
    training: Order
    validation: Order | None
    requests: list[sample.Request]
    making: Making | None
    """Where a training adapter is made: the rest is the training that this contains."""


def gather(process: Process, sink: Sink) -> Inputs:
    """Check pictures, model files, training adapter and layers of a resolved process. Raises UserError."""
    arch = archs.get(process.model.arch)
    spec = arch.spec
    name, variant = archs.variant_of(process)
    messages, making = archs.advice(process), None
    if isinstance(process, AdapterProcess):
        making = Making.of(process, spec, variant)
        process = making.training
    messages += [*optim.optimizer_advice(process.train), *checks.advice(process, variant)]
    for message in messages:
        sink.emit(WarningEvent(step=None, message=message))
    checks.check(process, spec, variant)
    text.check(process, spec)
    check_times(process.train, spec.shift_at((64, 64), variant))
    _check_formats(process)
    device = pick_device(process.device)

    found, training, validation = _data(process, arch, sink) if making is None else making.data()
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
    keep.check_grid(process, arch, source, variant)
    layers = lora.linear_names(denoiser, spec, process.network)
    if making is not None:
        making.check_layers(denoiser, layers)
    return Inputs(
        process=process,
        arch=arch,
        device=device,
        source=source,
        denoiser=denoiser,
        adapter=_adapter(process, arch, denoiser),
        lora_layers=layers,
        beside=beside.find(process, arch, denoiser, layers),
        pretrained=_pretrained(process, arch, denoiser, source),
        rich=checks.rich_captions(process, [item.picture for item in training.items]),
        picture_tokens=checks.picture_tokens(process, spec, source.find("text_encoder")),
        training=training,
        validation=validation,
        requests=requests,
        making=making,
    )


def build(  # `pause` is called between the pictures that a model draws to learn from: it may end the run there
    inputs: Inputs, folder: Path, name: str, job_yaml: str, sink: Sink, pause: Callable[[], None] = lambda: None
) -> Run:
    """Fill the caches, load the denoiser, put the adapters on it, make the optimizer."""
    process, arch, device = inputs.process, inputs.arch, inputs.device
    settings, model = process.train, process.model
    assert model.dtype is not None  # resolved
    dtype = DTYPES[model.dtype]

    making = inputs.making
    store = cache.Store(settings.cache_folder or cache.default_root(), folder / FOLDER if making else None)
    models = Models(inputs, store, dtype)
    epochs, total_steps = _length(process, inputs.training)
    prompts = {prompt for request in inputs.requests for prompt in request.prompts(arch.spec)}
    prompts |= {*checks.extra_prompts(process), *inputs.rich.values()}
    orders = [inputs.training] + ([inputs.validation] if inputs.validation else [])
    lengths = prepare_captions(orders, epochs, prompts, models.encoders(), store, sink)
    if making is None:
        prepare_latents(orders, models.encoders(), store, sink)
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

    loaded = _load(inputs, dtype, trained_text, sink)
    keys, facts = models.keys, dict[str, str]()
    if making is not None:
        keys, facts = making.identify(store, keys, arch.spec, inputs.source)
        painter = Painter(arch=arch, model=loaded.deployment, condition=condition)
        draw_missing(making, painter, store, keys, sink, pause)
    denoiser, trained = loaded.denoiser, loaded.deployment.trained
    trainable = lora.trainable(trained)
    _, variant = archs.variant_of(process)
    scheduler = arch.load_scheduler(inputs.source, variant.scheduler)
    ema = Ema(trainable, settings.ema_config.ema_decay) if settings.ema_config.use_ema else None
    task = replace(Task.of(arch, scheduler, settings, variant), text=trained_text)
    objective = replace(
        keep.objective(process, task, denoiser, variant, condition, inputs.rich, inputs.picture_tokens),
        scheduler=scheduler,
        adapter=inputs.adapter,
        ema=ema,
        base=loaded.base,
        mixed_precision=partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.dtype == "bf16"),
    )
    source = Source(store, keys, training.datasets, settings.reg_weight)
    pixels = partial(arch.decode, vae)
    return Run(
        name=name,
        folder=folder,
        process=process,
        job_yaml=job_yaml,
        arch=arch,
        objective=objective,
        gate=keep.teacher_gate(process, objective, training, source, pixels),
        drift=keep.drift_meter(process, arch, loaded.deployment, condition, pixels),
        drift_schedule=keep.drift_schedule(process, total_steps) if process.preserve.drift.measure else None,
        device=device,
        sink=sink,
        denoiser=denoiser,
        trained=trained,
        deployment=loaded.deployment,
        vae=vae,
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
        validation=_validation_batches(inputs.validation, store, keys, lengths, arch.spec.text_multiple),
        making=making,
        facts=_facts(inputs, keys, training) | facts,
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


def _data(process: TrainProcess, arch: Arch, sink: Sink) -> tuple[Scan, Order, Order | None]:
    """What the datasets hold, and the orders of training and validation."""
    datasets = process.all_datasets
    found = scan(
        datasets,
        trigger=process.trigger_word,
        divisibility=arch.spec.bucket_divisibility,
        progress=lambda done, total: sink.emit(StageEvent(name="pictures", done=done, total=total)),
    )
    _tell(found, sink)
    return found, *_orders(process, found, datasets, arch, sink)


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


@dataclass(frozen=True)
class _Loaded:
    """The models that denoise."""

    denoiser: nn.Module
    deployment: Deployment
    base: Base | None


def _load(inputs: Inputs, dtype: torch.dtype, encoders: TextEncoders, sink: Sink) -> _Loaded:
    """The denoiser with what is trained on it (on `encoders` too, where they are given), and what stands beside it."""
    process, arch, others = inputs.process, inputs.arch, inputs.beside
    settings, model = process.train, process.model
    placement = weights.Placement(
        dtype,
        inputs.device,
        quantizer=quantizer(model.qtype if model.quantize else None, arch.spec.quantize_exclude, inputs.device),
        keep_float32=arch.spec.keep_float32,
    )
    elsewhere = others.load_deployed(
        arch, placement, lambda other: lora.attach(other, inputs.lora_layers, process.network, settings.seed)
    )
    denoiser = _load_denoiser(inputs, placement, sink)
    parts = {} if encoders is None else {part: encoders.models[part] for part in arch.spec.lora_keys.text}
    trained = with_encoders(arch.spec.denoiser, denoiser, parts)
    lora.attach(trained, text.layers(trained, arch.spec, inputs.lora_layers), process.network, settings.seed)
    if inputs.pretrained is not None:
        tensors, scales = inputs.pretrained.for_training()
        lora.load_pretrained(trained, from_file(trained, tensors), from_file(trained, scales))
    if inputs.adapter is not None:
        inputs.adapter.attach(denoiser)
    if settings.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]  # every diffusers model has it
    lora.train_mode(trained, True)
    drawn = inputs.source if others.deployed is None else others.deployed.source
    deployment = Deployment(
        denoiser=denoiser if elsewhere is None else elsewhere,
        trained=trained,
        scheduler=arch.load_scheduler(drawn, archs.drawn_variant(process)[1].scheduler),
        device=inputs.device,
        adapter=inputs.adapter if elsewhere is None else None,
        patch=others.branch(placement),
        patch_sha256=others.patch_sha256,
        elsewhere=elsewhere is not None,
    )
    return _Loaded(denoiser, deployment, others.load_base(arch, placement))


def _load_denoiser(inputs: Inputs, placement: weights.Placement, sink: Sink) -> nn.Module:
    """Stream the weights in, one layer at a time: merged with the adapter if so asked, cast, quantised, moved."""
    arch, adapter = inputs.arch, inputs.adapter
    sink.emit(StageEvent(name="model", done=0, total=1))
    if adapter is not None and adapter.mode == "merged":
        placement = replace(placement, patch=adapter.patch)
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
