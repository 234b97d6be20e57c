"""The sections `train`, `datasets` and `sample` of an ai-toolkit job file, translated. See `aitoolkit.py`."""

from __future__ import annotations

from math import exp
from statistics import NormalDist
from typing import Any

from detour.config import aitoolkit_keys as keys
from detour.config.aitoolkit_part import Part, Value, shown
from detour.config.document import Problem
from detour.config.explain import one_of

# Models that predict noise; timestep_type means nothing for them.
_NOISE_MODELS = (*keys.UNETS, "pixart", "pixart_sigma")
_FIXED_TIMES = ("one_step", "two_step", "four_step", "eight_step", "next_sample")
_BIAS = {"balanced": "balanced", "content": "high_noise", "style": "low_noise"}


def train_of(part: Part, arch: str, datasets: list[Part]) -> dict[str, Any]:
    """The section `train`."""
    section: dict[str, Any] = {
        "batch_size": part.value("batch_size", 1),
        "gradient_accumulation": part.value("gradient_accumulation", 1),
        "steps": part.value("steps", 1000),
        "reg_weight": part.value("reg_weight", 1.0),
        "dtype": part.value("dtype", "fp32").map(lambda name: keys.DTYPES.get(str(name), name)),
        "gradient_checkpointing": part.value("gradient_checkpointing", True),
        **_optimizer(part),
        **_schedule(part),
        **_times(part, arch),
        **_loss(part),
        **_average(part),
    }
    if part.number("gradient_accumulation", 1) > 1:
        part.note(
            "gradient_accumulation",
            f"{shown(part.raw('gradient_accumulation'))}: ai-toolkit adds the gradients up, Detour averages them; "
            "only max_grad_norm and the optimizer's eps can tell the difference",
        )
    if part.number("min_snr_gamma", 0) > 0:
        if arch in _NOISE_MODELS:
            section["min_snr_gamma"] = part.value("min_snr_gamma")
        else:
            part.note("min_snr_gamma", "has no effect on a flow model in ai-toolkit either")
    if part.has("noise_scheduler"):
        section["noise_scheduler"] = part.value("noise_scheduler")
    if part.has("unload_text_encoder"):
        section["unload_text_encoder"] = part.value("unload_text_encoder")
        if part.flag("unload_text_encoder", default=False):
            part.note("unload_text_encoder", "true: ai-toolkit then trains without captions; Detour always uses them")
    if part.flag("train_text_encoder", default=False):
        if arch in keys.UNETS:
            section["train_text_encoder"] = part.value("train_text_encoder")
        else:
            part.refuse("train_text_encoder", f"only text encoders of {', '.join(keys.UNETS)} are trained; remove it")
    workers = next((dataset.value("num_workers") for dataset in datasets if dataset.has("num_workers")), None)
    if workers is not None:
        section["num_workers"] = workers
    _guidance(part)
    _validation(part)
    return section


def _optimizer(part: Part) -> dict[str, Any]:
    name = part.text("optimizer", "adamw").lower()
    if name not in keys.OPTIMIZERS:
        part.refuse("optimizer", one_of(name, keys.OPTIMIZERS))
    ours, difference = keys.OPTIMIZERS.get(name, ("adamw", ""))
    if difference:
        part.note("optimizer", f"{name}: {difference}")
    params = part.value("optimizer_params", {})
    if isinstance(params.value, dict):
        extra: dict[str, Any] = {"eps": 1e-6} if ours in ("adamw", "adamw8bit", "prodigy") else {}
        if name in ("adam", "adam8", "adam8bit"):
            extra["weight_decay"] = 0.0
        params = Value(extra | params.value, params.key)
    lr = part.value("lr", 1e-6)
    if ours == "prodigy" and part.number("lr", 1e-6) < 0.1:
        part.note("lr", f"{shown(lr.value)}: ai-toolkit runs prodigy with 1.0 instead; so does this job")
        lr = Value(1.0, lr.key)
    clip = part.value("max_grad_norm", 1.0)
    if ours == "adafactor":
        if clip.given and clip.value:
            part.note(
                "max_grad_norm", f"{shown(clip.value)}: ai-toolkit does not clip with adafactor; nor does this job"
            )
        clip = Value(0.0, clip.key)
    return {
        "optimizer": Value(ours, part.key("optimizer"), part.has("optimizer")),
        "optimizer_params": params,
        "lr": lr,
        "max_grad_norm": clip,
    }


def _schedule(part: Part) -> dict[str, Any]:
    """The learning rate over the run. There, `linear` is a rise from a third of it, not a fall to zero."""
    name = part.text("lr_scheduler", "constant")
    params = part.part("lr_scheduler_params", keys.SCHEDULER)
    key = part.key("lr_scheduler")
    lr = part.number("lr", 1e-6)
    if name == "constant_with_warmup":
        return {"lr_warmup_steps": params.value("num_warmup_steps", 1000)}
    if name == "constant":
        if params.number("factor", 1.0) != 1.0:
            params.refuse("factor", f"write the product into train.lr: {lr * params.number('factor', 1.0):g}")
        return {}
    if name in ("cosine", "cosine_with_restarts"):
        ratio = params.number("eta_min", 0.0) / lr if lr else 0.0
        return {"lr_scheduler": Value(name, key), "lr_min_ratio": Value(ratio, params.key("eta_min"))}
    if name == "linear":
        if params.number("start_factor", 1 / 3) == 1.0:
            return {"lr_scheduler": Value("linear", key), "lr_min_ratio": params.value("end_factor", 1.0)}
        part.refuse(
            "lr_scheduler",
            "'linear' rises from a third of the learning rate in ai-toolkit, which Detour does not have; "
            "set lr_scheduler_params start_factor: 1.0 and end_factor for a fall, or use constant_with_warmup",
        )
        return {}
    allowed = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts")
    part.refuse("lr_scheduler", one_of(name, allowed))
    return {}


def _times(part: Part, arch: str) -> dict[str, Any]:
    """Which times are drawn."""
    bias = part.text("content_or_style", "balanced")
    if bias not in _BIAS:
        part.refuse("content_or_style", one_of(bias, _BIAS))
    section: dict[str, Any] = {"timestep_bias": Value(_BIAS.get(bias, "balanced"), part.key("content_or_style"))}
    if arch in _NOISE_MODELS:
        return section | _limits(part, "linear")
    kind = part.value("timestep_type", "sigmoid")
    if kind.value in ("flux_shift", "lumina2_shift"):
        part.note("timestep_type", f"{kind.value}: runs as shift, with the architecture's own shift")
        kind = kind.map(lambda _: "shift")
    section["timestep_type"] = kind
    if kind.value in _FIXED_TIMES and bias != "balanced":
        part.note("content_or_style", f"{bias}: has no effect with {kind.value} in ai-toolkit; left out")
        del section["timestep_bias"]
    return section | _limits(part, str(kind.value))


def _limits(part: Part, kind: str) -> dict[str, Any]:
    """ai-toolkit's limits are places in a list of 1000 falling times: 0 is the noisiest."""
    first, last = part.number("min_denoising_steps", 0), part.number("max_denoising_steps", 999)
    if first <= 0 and last >= 999:
        return {}
    name = "min_denoising_steps" if first > 0 else "max_denoising_steps"
    if kind in _FIXED_TIMES:
        part.note(name, f"{shown(part.raw(name))}: has no effect with {kind} in ai-toolkit; left out")
        return {}
    if kind not in ("linear", "weighted", "sigmoid"):
        part.refuse(name, f"cannot be translated for timestep_type {kind}; allowed with linear, weighted and sigmoid")
        return {}
    if first >= last:
        part.refuse(name, "min_denoising_steps must be smaller than max_denoising_steps")
        return {}
    highest, lowest = round(_time_at(first, kind), 6), round(_time_at(last, kind), 6)
    part.note(
        name, f"{shown(part.raw(name))}: a place in a list of falling times; times from {lowest} to {highest} here"
    )
    return {
        "min_timestep": Value(lowest, part.key("max_denoising_steps")),
        "max_timestep": Value(highest, part.key("min_denoising_steps")),
    }


def _time_at(place: float, kind: str) -> float:
    if place <= 0 or place >= 999:
        return 1.0 if place <= 0 else 0.0
    share = 1 - place / 1000
    return 1 / (1 + exp(-NormalDist().inv_cdf(share))) if kind == "sigmoid" else share


def _loss(part: Part) -> dict[str, Any]:
    name = part.text("loss_type", "mse")
    if name == "pseudo_huber":
        part.note("loss_type", "pseudo_huber: runs as huber with train.huber_delta 0.01, where both turn linear")
        return {"loss_type": Value("huber", part.key("loss_type")), "huber_delta": Value(0.01, part.key("loss_type"))}
    if name not in ("mse", "mae", "wavelet"):
        part.refuse("loss_type", one_of(name, ("mse", "mae", "wavelet", "pseudo_huber")))
        return {}
    return {"loss_type": Value(name, part.key("loss_type"))}


def _average(part: Part) -> dict[str, Any]:
    ema = part.part("ema_config", keys.EMA)
    if not ema.flag("use_ema", default=False):
        return {}
    return {"ema_config": {"use_ema": Value(True, ema.key("use_ema")), "ema_decay": ema.value("ema_decay", 0.999)}}


def _guidance(part: Part) -> None:
    loss = part.flag("do_guidance_loss", default=False)
    if loss:
        part.refuse("do_guidance_loss", "true is not available in Detour (training runs without guidance); remove it")
    if part.flag("do_differential_guidance", default=False):
        if loss:
            part.refuse("do_differential_guidance", "true is not available in Detour; remove it")
        else:
            part.note(
                "do_differential_guidance", "true: has no effect in ai-toolkit without do_guidance_loss; nor here"
            )


def _validation(part: Part) -> None:
    validation = part.part("validation_config", keys.VALIDATION)
    if validation.raw("validation_items"):
        part.note(
            "validation_config",
            "no single pictures here; put them into a folder and use validation.dataset in Detour's own layout",
        )


def datasets_of(process: Part, parts: list[Part], train: Part) -> list[dict[str, Any]]:
    """The section `datasets`."""
    if not parts:
        process.refuse("datasets", "missing; give at least one, with its folder_path")
        return [{"folder_path": "missing"}]
    return [_dataset(part, train) for part in parts]


def _dataset(part: Part, train: Part) -> dict[str, Any]:
    folder = part.value("folder_path") if part.has("folder_path") else part.value("dataset_path")
    if str(folder.value).endswith(".json"):
        part.refuse("dataset_path", "captions in a .json are not read; use a folder with caption files")
    if part.has("batch_size") and part.raw("batch_size") != train.raw("batch_size", 1):
        part.refuse("batch_size", f"all datasets train with train.batch_size ({train.raw('batch_size', 1)})")
    section: dict[str, Any] = {
        "caption_ext": part.value("caption_type") if part.has("caption_type") else part.value("caption_ext", "txt"),
        "caption_dropout_rate": part.value("caption_dropout_rate", 0.0),
        "trigger_word": part.value("trigger_word").map(lambda word: word or None),
        "shuffle_tokens": part.value("shuffle_tokens", False),
        "keep_tokens": part.value("keep_tokens", 0),
        "resolution": part.value("resolution", 512),
        "num_repeats": part.value("num_repeats", 1),
        "flip_x": part.value("flip_x", False),
        "flip_y": part.value("flip_y", False),
        "crop": Value("random" if part.flag("random_crop", default=False) else "center", part.key("random_crop")),
        "is_reg": part.value("is_reg", False),
        "loss_weight": part.value("loss_multiplier", 1.0),
        "alpha_mask": part.value("alpha_mask", False),
    }
    if folder.given:
        section["folder_path"] = folder
    if part.has("default_caption"):
        section["default_caption"] = part.value("default_caption")
    if part.raw("control_path"):
        section["control_path"] = _one(part, "control_path")
    if part.raw("mask_path"):
        section["mask_path"] = part.value("mask_path")
    if part.raw("mask_path") or part.flag("alpha_mask", default=False):
        section["mask_min_value"] = part.value("mask_min_value", 0.0)
    return section


def _one(part: Part, name: str) -> Value:
    """A folder that may also be written as a list of folders, of which one is read."""
    value = part.value(name)
    folders = value.value if isinstance(value.value, list) else [value.value]
    if len(folders) > 1:
        part.refuse(name, f"{len(folders)} folders: one is read; put other controls into datasets of their own")
    return value.map(lambda _: folders[0])


def controls_of(model: Part, train: Part, arch: str) -> dict[str, Any]:
    """The section `controls`, out of flex2's `model_kwargs`; and what is said of the embedding of guidance."""
    bypass = train.flag("bypass_guidance_embedding", default=arch in keys.BYPASSED)
    if bypass and arch == "flux":
        train.refuse("bypass_guidance_embedding", "flux is told a guidance of 1; for Flex.1 set model.arch: flex1")
    elif not bypass and arch in keys.BYPASSED:
        train.refuse("bypass_guidance_embedding", f"{arch} always leaves its embedding of guidance out; remove it")
    if arch not in keys.CONTROLLED:
        if model.raw("model_kwargs"):
            model.refuse("model_kwargs", "the architecture has no such switch; remove it")
        return {}
    part = model.part("model_kwargs", keys.MODEL_KWARGS)
    section: dict[str, Any] = {}
    if part.number("control_dropout", 0.0):
        section["control_dropout"] = part.value("control_dropout")
    if not part.flag("do_random_inpainting", default=False):
        return section
    share = Value(1 - part.number("inpaint_dropout", 0.0), part.key("inpaint_dropout"))
    if not share.value:
        return section
    return section | {
        "inpaint": share,
        "inpaint_invert": part.value("invert_inpaint_mask_chance", 0.0),
        "inpaint_soften": part.value("random_blur_mask", False),
        "inpaint_vary": part.value("random_dialate_mask", False),
    }


def sample_of(process: Part, train: Part, arch: str) -> dict[str, Any]:
    """The section `sample`, with the two switches that ai-toolkit keeps in `train`."""
    part = process.part("sample", keys.SAMPLE)
    section: dict[str, Any] = {
        "width": part.value("width", 512),
        "height": part.value("height", 512),
        "neg": part.value("neg", "").map(lambda text: text or ""),
        "seed": part.value("seed", 0),
        "walk_seed": part.value("walk_seed", False),
        "sample_every": part.value("sample_every", 100).map(lambda steps: steps or None),
        "sample_steps": part.value("sample_steps", 20),
        "guidance_scale": _guidance_scale(part, part.value("guidance_scale", 7.0)),
        "skip_first_sample": train.value("skip_first_sample", False),
        "disable_sampling": train.value("disable_sampling", False),
        "prompts": [_with_control(prompt, arch, process) for prompt in _prompts(part)],
    }
    given = [name for name in ("sampler", "num_frames", "fps") if part.has(name)]
    section |= {name: part.value(name) for name in given if name == "sampler" or _is_clip(part)}
    if not section["prompts"] and not train.flag("disable_sampling", default=False):
        process.note("sample", "without prompts ai-toolkit draws no previews; nor does this job")
        section["disable_sampling"] = Value(True, process.key("sample"))
    return section


def _is_clip(part: Part) -> bool:
    """Does it ask for more than a picture, which has 0 frames or 1 in ai-toolkit?"""
    return part.raw("num_frames", 1) not in (0, 1)


def _guidance_scale(part: Part, value: Value) -> Value:
    if isinstance(value.value, int | float) and value.value < 1:
        part.note(str(value.key[-1]), f"{shown(value.value)}: below 1 there is no guidance, in ai-toolkit too; 1 here")
        return value.map(lambda _: 1.0)
    return value


def _prompts(part: Part) -> list[dict[str, Any]]:
    """Both forms of the list. Without `walk_seed`, a prompt's seed there holds for those that follow it too."""
    strength = part.number("network_multiplier", 1.0)
    walk = part.flag("walk_seed", default=False)
    if part.has("samples"):
        items = part.parts("samples", keys.SAMPLE_ITEM)
    else:
        listed = part.raw("prompts", [])
        items = [
            Part(part.out, keys.SAMPLE_ITEM, {"prompt": prompt}, (*part.key("prompts"), index))
            for index, prompt in enumerate(listed if isinstance(listed, list) else [listed])
        ]
    prompts: list[dict[str, Any]] = []
    seed: Value | None = None
    for item in items:
        prompt: dict[str, Any] = {
            name: item.value(name)
            for name in ("neg", "seed", "width", "height", "sample_steps", "network_multiplier", "ctrl_img")
            if item.has(name)
        }
        if _is_clip(item):
            prompt["num_frames"] = item.value("num_frames")
        if item.has("guidance_scale"):
            prompt["guidance_scale"] = _guidance_scale(item, item.value("guidance_scale"))
        seed = prompt.get("seed", seed if not walk else None)
        if seed is not None:
            prompt["seed"] = seed
        if strength != 1.0:
            prompt.setdefault("network_multiplier", part.value("network_multiplier"))
        prompts.append(prompt | _with_flags(item))
    return prompts


def _with_control(prompt: dict[str, Any], arch: str, process: Part) -> dict[str, Any]:
    """A prompt whose control image goes where its name says: there, one with a hole is called `*.inpaint.*`."""
    prompt = {name: value for name, value in prompt.items() if name != "ctrl_idx"}
    picture: Value | None = prompt.pop("ctrl_img", None)
    if picture is None:
        return prompt
    if arch not in keys.CONTROLLED:
        process.out.notes.append(Problem(picture.key, f"{picture.value}: previews take no control image with {arch}"))
        return prompt
    return prompt | {"inpaint" if ".inpaint." in str(picture.value) else "control": picture}


def _with_flags(item: Part) -> dict[str, Any]:
    """A prompt without its inline flags, and what they say (`a cat --w 512 --d 7`)."""
    whole = item.value("prompt")
    if not isinstance(whole.value, str):
        return {"prompt": whole}
    text, *flags = whole.value.strip().split("--")
    found: dict[str, Any] = {"prompt": whole.map(lambda _: text.strip())}
    for flag in flags:
        name, _, content = flag.partition(" ")
        if name not in keys.PROMPT_FLAGS:
            item.note("prompt", f"--{flag.strip()}: left out of the prompt; previews have no such flag")
            continue
        option, kind = keys.PROMPT_FLAGS[name]
        try:
            value = Value(kind(content.strip()), whole.key)
        except ValueError:
            item.refuse("prompt", f"--{name} wants a number, found {content.strip()!r}")
            continue
        found[option] = _guidance_scale(item, value) if option == "guidance_scale" else value
    return found
