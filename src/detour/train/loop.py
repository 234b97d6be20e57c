"""The training loop: what happens in what order. The mathematics is one call below (`objective`, `optim`, `preserve`).

`step` counts optimizer steps. A step takes `gradient_accumulation` micro-batches and averages their gradients.
Every random draw is a pure function of (seed, step, purpose), so a resumed run goes on bit for bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

import torch

from detour import UserError
from detour.events import PlateauEvent, StepEvent, StopEvent, WarningEvent
from detour.seeds import seed_for
from detour.train import optim, plateau
from detour.train.controls import told
from detour.train.schedule import lr_at, set_lr, text_lr_at

if TYPE_CHECKING:
    from torch import Tensor

    from detour.config.adapter import StopConfig
    from detour.train.control import Control
    from detour.train.run import Run

FINISHED = "finished"


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds besides tensors."""

    step: int = 0
    epoch: int = 0
    """Epoch of the next micro-batch."""
    batch: int = 0
    """Place of the next micro-batch in its epoch."""
    bad_steps: int = 0
    """Steps in a row that were not taken because something was not finite."""
    seconds: float = 0.0
    """Time spent training, over all sessions."""
    held_out: list[float] = field(default_factory=list)
    """Where a training adapter is made: the loss on held-out pictures, from before the first step on."""
    below_alarm: int | None = None
    """The last saved step at which the drift was measured and was below its alarm: its checkpoint is never pruned."""


@dataclass(frozen=True)
class Outcome:
    """What a step found."""

    loss: float
    grad_norm: float
    lr: float
    taken: bool
    pictures: list[tuple[str, float]]
    """Pictures of the step with their times; where some loss was not finite, those only."""
    picture_losses: list[tuple[float, float]] | None
    """Time and loss of each picture, for the event."""


def train(run: Run, progress: Progress, control: Control) -> str:
    """Train to the last step or until asked to stop, and return the reason of the end. The caller writes the LoRA."""
    settings, previous_end = run.process, time.monotonic()
    epochs = (progress.epoch, progress.epoch)  # complete ones before and after the last step
    resumed_at = progress.step if progress.step > 0 else None

    while True:
        requests = control.poll(progress.step)
        new = progress.step != resumed_at  # else the checkpoint of this very step was just taken up

        # Validate: at the same noise and times each time. A training adapter may be done by it.
        _validated(run, progress, new)

        # Measure how far the model has moved where it should not.
        moved = _measured(run, progress, control) if new else None
        last = progress.step >= run.total_steps or control.stop_reason is not None
        if control.stop_reason is not None and progress.step < run.total_steps:
            run.sink.emit(StopEvent(step=progress.step, reason=control.stop_reason))

        # Save: at step 0 (a full disk or a damaged write shows in the first minute), when due, when asked, at the end.
        if new and (last or progress.step == 0 or "save" in requests or run.due_save(progress.step, epochs)):
            progress.below_alarm = progress.step if moved is False else progress.below_alarm
            run.save(progress, required=last or progress.step == 0)
        elif not new:
            run.catch_up(progress)

        # Draw previews as the finished LoRA will be used: without the training adapter.
        due = run.due_sample(progress.step, epochs) and (new or not run.previews_drawn(progress.step))
        if due or "sample" in requests:
            run.draw_previews(progress.step)

        if last:
            break

        epoch_before, step_started = progress.epoch, time.monotonic()
        outcome = train_step(run, progress)
        epochs = (epoch_before, progress.epoch)
        _count_bad_steps(run, progress, outcome)
        now = time.monotonic()
        progress.seconds += now - previous_end
        if progress.step % settings.logging.log_every == 0 or not outcome.taken or progress.step == run.total_steps:
            run.sink.emit(
                StepEvent(
                    step=progress.step,
                    epoch=progress.epoch,
                    loss=outcome.loss,
                    lr=outcome.lr,
                    grad_norm=outcome.grad_norm,
                    seconds=now - step_started,
                    seconds_outside=step_started - previous_end,
                    memory_bytes=run.memory_bytes(),
                    picture_losses=outcome.picture_losses,
                )
            )
        previous_end = now

    if progress.step >= run.total_steps:
        return FINISHED
    assert control.stop_reason is not None
    return control.stop_reason


def _validated(run: Run, progress: Progress, new: bool) -> None:
    """Validate if it is due. The run ends here where it makes a training adapter and that loss has stopped falling."""
    if not run.due_validation(progress.step):
        return
    loss = run.validate(progress.step) if new else None
    if run.making is None:
        return
    if loss is not None:
        if progress.step and not progress.held_out:
            progress.held_out.append(run.untouched_loss())  # other pictures are held out than before
        progress.held_out.append(loss)
    if not all(isfinite(value) for value in progress.held_out):
        raise UserError(
            f"step {progress.step}: the held-out loss is not finite; try a lower train.lr or model.dtype: fp32"
        )
    _judge(run, progress, run.making.process.adapter.stop, new)


def _judge(run: Run, progress: Progress, stop: StopConfig, new: bool) -> None:
    """End a run whose held-out loss is flat; where it ends without that, say how it stands. `new`: it was not said."""
    verdict = plateau.judge(progress.held_out, stop)
    state, reason = verdict.state, verdict.reason
    if state == "flat" and stop.sharpness is not None and (sharp := run.sharpness(progress.step)) >= stop.sharpness:
        sharply = f"few-step pictures still have {sharp:.0%} of their sharpness"
        state, reason = "falling", f"{reason}; but {sharply} (adapter.stop.sharpness: {stop.sharpness:.0%})"
    at_limit = progress.step >= run.total_steps
    if state == "flat":
        run.total_steps = progress.step
    if not new:
        return
    if state == "flat":
        run.sink.emit(PlateauEvent(step=progress.step, reason=reason))
    elif at_limit or (state == "unmoved" and len(progress.held_out) == stop.patience + 1):
        limit = f"train.steps ({run.total_steps}) is reached before adapter.stop: " if at_limit else ""
        run.sink.emit(WarningEvent(step=progress.step, message=limit + reason))


def _measured(run: Run, progress: Progress, control: Control) -> bool | None:
    """Measure the drift if it is due: is it above its alarm? Where the job says so, that ends the run."""
    if not run.due_drift(progress.step):
        return None
    above = run.measure_drift(progress)
    if above and run.process.preserve.drift.stop:
        control.stop_reason = control.stop_reason or "the drift is above its alarm"
    return above


def train_step(run: Run, progress: Progress) -> Outcome:
    """One optimizer step. Where a loss or the gradient is not finite, nothing but `progress` changes."""
    settings = run.process.train
    losses: list[Tensor] = []
    times: list[Tensor] = []
    names: list[str] = []
    for micro in range(settings.gradient_accumulation):
        batch, position = next(run.batches)
        if run.process.network.dropout:  # the one draw from torch's own generator; seeding it is not free
            torch.manual_seed(seed_for(settings.seed, "dropout", progress.step, micro))
        share = 1 / settings.gradient_accumulation
        batch = told(batch, run.process.controls, settings.seed, progress.step, micro)
        out = run.objective.backward(batch.to(run.device), progress.step, micro, share)
        losses.append(out.per_sample_B)
        times.append(out.t_B)
        names += batch.names
        progress.epoch, progress.batch = position

    loss_of = torch.cat(losses).tolist()
    time_of = torch.cat(times).tolist()
    drawn = list(zip(names, time_of, strict=True))
    bad = [draw for draw, value in zip(drawn, loss_of, strict=True) if not isfinite(value)]
    lr = lr_at(settings, progress.step, run.total_steps)
    taken, grad_norm = False, float("nan")
    if bad:
        optim.discard(run.parameters)
    else:
        set_lr(run.optimizer, lr, text_lr_at(settings, progress.step, run.total_steps))
        update = optim.update(run.optimizer, run.parameters, settings.max_grad_norm)
        taken, grad_norm = update.taken, update.grad_norm
    if taken and run.ema is not None:
        run.ema.update()
    progress.step += 1
    loss = sum(loss_of) / len(loss_of)
    timed = [(round(t, 4), value) for t, value in zip(time_of, loss_of, strict=True)] if run.objective.timed else None
    return Outcome(loss=loss, grad_norm=grad_norm, lr=lr, taken=taken, pictures=bad or drawn, picture_losses=timed)


def _count_bad_steps(run: Run, progress: Progress, outcome: Outcome) -> None:
    """Report a step that was not taken; give up after too many in a row, with the last checkpoint intact."""
    if outcome.taken:
        progress.bad_steps = 0
        return
    progress.bad_steps += 1
    what = "gradient" if isfinite(outcome.loss) else "loss"
    details = [f"{name} at t = {t:.3f}" for name, t in outcome.pictures]
    message = f"step {progress.step}: the {what} is not finite; no weight was changed"
    run.sink.emit(WarningEvent(step=progress.step, message=message, details=details))
    limit = run.process.train.max_bad_steps
    if progress.bad_steps >= limit:
        raise UserError(
            f"{progress.bad_steps} steps in a row had a {what} that is not finite (train.max_bad_steps: {limit}); "
            f"the last were on {', '.join(details[:8])}. The last checkpoint is intact. Try a lower train.lr, "
            f"train.dtype: fp32, or look at those pictures."
        )
