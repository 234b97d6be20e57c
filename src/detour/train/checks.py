"""What `preserve` asks for, and what cannot work: found from the job and small files, without torch.

`detour check` reports it, and a run refuses it before anything expensive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from detour import UserError, archs
from detour.config.preserve import PLAIN, strategy_terms

if TYPE_CHECKING:
    from collections.abc import Iterable

    from detour.archs.base import ArchSpec, Variant
    from detour.config.job import DatasetConfig, TrainProcess
    from detour.data.scan import Picture

NEUTRAL = (
    "a photo of a dog running on a beach", "a bowl of fruit on a wooden table", "a city street at night in the rain",
    "portrait of an old man with a beard", "a red car parked in front of a house", "a mountain lake at sunrise",
    "a cat sleeping on a sofa", "a woman reading a book in a cafe", "an oil painting of a sailing ship in a storm",
    "a close-up of a sunflower", "a modern kitchen with white cupboards", "a child flying a kite in a field",
    "a watercolour of a village in the hills", "a glass of water on a dark background", "a train crossing a bridge",
    "a group of friends around a campfire", "a snowy forest with a wooden cabin", "a bicycle leaning against a wall",
    "a plate of pasta with tomato sauce", "an owl on a branch at dusk", "a lighthouse on a cliff",
    "a desk with a laptop and a cup of coffee", "a market stall with vegetables", "an astronaut on the moon",
)  # fmt: skip
"""Everyday subjects for rollouts without a picture, where the job names none."""
MOST_STEPS = 1000
"""Noise levels of every model here: no grid has more times."""


def neutral_prompts(process: TrainProcess) -> list[str]:
    """The prompts of rollouts that are told no caption, and of the drift meter. Never one with a trigger word."""
    return list(process.preserve.prompts) or [prompt for prompt in NEUTRAL if not _held(process, prompt)]


def control_prompts(process: TrainProcess) -> list[str]:
    """The prompts of the drift meter."""
    drift = process.preserve.drift
    return list(drift.prompts or neutral_prompts(process)[:2]) if drift.measure else []


def extra_prompts(process: TrainProcess) -> list[str]:
    """What must be embedded besides captions and previews. Long captions come from `rich_captions`."""
    terms = strategy_terms(process.preserve)
    wanted = control_prompts(process)
    if any(term.told == "neutral" for term in terms):
        wanted += neutral_prompts(process)
    if any(term.target == "contrast" for term in terms):
        wanted.append("")
    return wanted


def grid_steps(process: TrainProcess, variant: Variant) -> int:
    """Steps of rollouts and of the grid."""
    return process.preserve.steps or process.sample.sample_steps or variant.steps


def check(process: TrainProcess, spec: ArchSpec, variant: Variant) -> None:
    """Refuse what cannot work, before anything expensive. For a resolved process."""
    terms = strategy_terms(process.preserve)
    draws = any(term.states == "rollout" or term.target == "preference" for term in terms)
    _check_trigger(process)
    _check_models(process, spec, variant)
    only_flow = [term for term in terms if term.weighting != "velocity" or term.target in ("path", "bounded")]
    if spec.objective != "flow" and only_flow:
        raise UserError(
            f"preserve: {spec.name} is no flow model, which weightings other than velocity and target: path and "
            f"bounded are for"
        )
    guidance = process.sample.guidance_scale or 1.0
    if spec.guidance_kind == "negative" and guidance > 1 and draws:
        raise UserError(
            f"preserve: rollouts draw without guidance, as distilled models do, but sample.guidance_scale is "
            f"{guidance:g}; set it to 1, or take another strategy"
        )
    steps = grid_steps(process, variant)
    if steps > MOST_STEPS and (draws or any(term.states == "grid" for term in terms)):
        raise UserError(f"preserve.steps: {steps}; the sampler's grid has at most {MOST_STEPS} times")
    if process.train.timestep_type == "next_sample" and terms != [PLAIN]:
        raise UserError(
            "preserve: timestep_type: next_sample rehearses sampling by itself; take another, or strategy: none"
        )
    _check_picture_context(process, spec)


def _check_models(process: TrainProcess, spec: ArchSpec, variant: Variant) -> None:
    """The models besides the one that is trained."""
    preserve = process.preserve
    if preserve.strategy == "de_turbo" and variant.distilled:
        others = [f"{spec.name}:{name}" for name, other in spec.variants.items() if not other.distilled]
        choice = f"set model.arch: {' or '.join(others)}" if others else "this architecture has none"
        raise UserError(f"preserve.strategy: de_turbo trains an undistilled model, but this one is distilled; {choice}")
    name, drawn = archs.drawn_variant(process)
    if preserve.deploy_on is not None and not drawn.distilled:
        raise UserError(
            f"preserve.deploy_on: {preserve.deploy_on} is {spec.title} {name}, which is not distilled; name the model "
            f"whose few steps are to be kept, or leave it out"
        )
    if preserve.deploy_on is not None and process.train.train_text_encoder:
        raise UserError(
            "preserve.deploy_on: previews are drawn with another model, which has no trained text encoder; leave out "
            "train.train_text_encoder"
        )


def advice(process: TrainProcess, variant: Variant) -> list[str]:
    """Settings that are obeyed but seldom meant."""
    preserve, terms, steps = process.preserve, strategy_terms(process.preserve), grid_steps(process, variant)
    found: list[str] = []
    if (terms != [PLAIN] or preserve.distill_patch is not None) and not archs.drawn_variant(process)[1].distilled:
        found.append("preserve: this model is not distilled; there are no few steps to keep")
    drawn = process.sample.sample_steps or variant.steps
    if any(term.states != "data" for term in terms) and drawn % steps and steps % drawn:
        found.append(
            f"preserve.steps: {steps} does not divide sample.sample_steps: {drawn}, so that the sampler visits other "
            f"times than are trained"
        )
    return found


def _check_trigger(process: TrainProcess) -> None:
    preserve = process.preserve
    for option, prompts in (("preserve.prompts", preserve.prompts), ("preserve.drift.prompts", preserve.drift.prompts)):
        for prompt in prompts:
            if held := _held(process, prompt):
                raise UserError(
                    f"{option}: {prompt!r} holds the trigger word {held[0]!r}; these prompts are for what must "
                    f"not change, so take it out"
                )
    told = any(term.told == "neutral" for term in strategy_terms(preserve))
    if (told or (preserve.drift.measure and not preserve.drift.prompts)) and not neutral_prompts(process):
        raise UserError(
            "preserve.prompts: a trigger word is in every one of the default prompts; give prompts without it, or "
            "choose a trigger word that is in no other word"
        )


def _held(process: TrainProcess, prompt: str) -> list[str]:
    """The trigger words in a prompt."""
    words = {process.trigger_word, *(dataset.trigger_word for dataset in process.all_datasets)} - {None, ""}
    return [word for word in words if word and word.lower() in prompt.lower()]


# --- what a teacher is told -------------------------------------------------------------------------------------------


def _asks(process: TrainProcess, context: str) -> bool:
    return any(term.teacher_told == context for term in strategy_terms(process.preserve))


def rich_captions(process: TrainProcess, pictures: Iterable[Picture]) -> dict[str, str]:
    """The long caption of each picture, by its name in batches; empty where no term asks for any.

    UserError naming every picture that has none.
    """
    if not _asks(process, "rich"):
        return {}
    found: dict[str, str] = {}
    missing: list[str] = []
    for picture in pictures:
        config = process.all_datasets[picture.dataset]
        path = _beside(picture, config)
        text = path.read_text(encoding="utf-8").strip() if path is not None and path.is_file() else ""
        if text:
            found[f"{config.folder_path.name}/{picture.key}"] = text
        else:
            missing.append(str(picture.path))
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise UserError(
            f"preserve: the teacher is to be told a long caption (teacher_told: rich), but these have none: {names}. "
            f"Put one beside each picture and name its ending in datasets.rich_caption_ext (long.txt), or take a "
            f"strategy whose teacher needs none (prior_anchor, anchor)"
        )
    return found


def _beside(picture: Picture, config: DatasetConfig) -> Path | None:
    if config.rich_caption_ext is None:
        return None
    return picture.path.with_suffix(f".{config.rich_caption_ext}")


def _check_picture_context(process: TrainProcess, spec: ArchSpec) -> None:
    """Of an architecture, and of a model in a folder on this machine: others are looked at when they are there."""
    if not _asks(process, "picture"):
        return
    if not spec.picture_tokens:
        raise UserError(_no_context(spec.title))
    for place in (process.model.name_or_path, process.model.extras_name_or_path):
        if place is not None and (folder := Path(place).expanduser() / "text_encoder").is_dir():
            picture_tokens(process, spec, folder)
            return


def picture_tokens(process: TrainProcess, spec: ArchSpec, encoder: Path | None) -> int:
    """How many tokens the model in whose folder `encoder` is takes for a picture; 0 where no teacher is told one.

    UserError where it takes none.
    """
    if not _asks(process, "picture"):
        return 0
    if encoder is None:
        raise UserError(_no_context(spec.title))
    try:
        config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
        count, width = int(config.get("picture_tokens", 0)), int(config.get("hidden_size", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{encoder / 'config.json'}: not a readable config ({error})") from error
    if count < 1:
        raise UserError(_no_context(str(encoder.parent)))
    if count * spec.latent_channels != width:
        raise UserError(
            f"{encoder / 'config.json'}: picture_tokens: {count} of {spec.latent_channels} latent channels make "
            f"{count * spec.latent_channels} features, but the encoder has {width}"
        )
    return count


def _no_context(model: str) -> str:
    return (
        f"preserve: the teacher needs a context: rich captions (teacher_told: rich, and datasets.rich_caption_ext) or "
        f"a model whose encoder reads pictures, which that of {model} does not (teacher_told: picture)"
    )
