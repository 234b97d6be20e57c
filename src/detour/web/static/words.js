/* Figures in words that people read, with their units. */

/** `42 s`, `3 min 05 s`, `1 h 02 min`, `2 d 03 h`. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "?";
  const whole = Math.max(0, Math.round(seconds));
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${two(Math.floor((whole % 86400) / 3600))} h`;
}

/** `1.24 s/step`, `5.0 steps/s`. */
export function speed(seconds) {
  return seconds >= 1 ? `${seconds.toFixed(2)} s/step` : `${(1 / Math.max(seconds, 1e-6)).toFixed(1)} steps/s`;
}

/** `512 bytes`, `3.1 MiB`, `12.3 GiB`. */
export function bytes(count) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= unit) return `${(count / unit).toFixed(1)} ${name}`;
  }
  return `${count} bytes`;
}

/** Unix seconds in this browser's time and language. */
export function moment(time) {
  return new Date(time * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

/** A figure with four digits that count. */
export function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "not finite";
  const size = Math.abs(value);
  return value !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** A job's state in a word or two. */
export function stateText(job) {
  if (job.state === "queued") return `queued, place ${job.position}`;
  return job.state === "stopped" && job.attempts === 0 ? "draft" : job.state;
}

/** `step 12 of 300 · 1.24 s/step · 5 min 57 s left`: how far a job is. */
export function progressText(progress) {
  if (!progress) return "";
  const parts = [progress.total_steps ? `step ${progress.step} of ${progress.total_steps}` : `step ${progress.step}`];
  if (progress.processes > 1) parts.unshift(`process ${progress.process} of ${progress.processes}`);
  if (progress.seconds_per_step !== null) parts.push(speed(progress.seconds_per_step));
  if (progress.seconds_left !== null) parts.push(`${duration(progress.seconds_left)} left`);
  return parts.join(" · ");
}

/** Sets a progress bar: without a total it moves to and fro while a job is at work. */
export function showProgress(bar, progress, atWork) {
  const stage = atWork ? progress?.stage : null;
  const done = stage ? stage.done : (progress?.step ?? 0);
  const total = stage ? stage.total : progress?.total_steps;
  bar.hidden = !progress && !atWork;
  if (total) {
    bar.max = total;
    bar.value = Math.min(done, total);
  } else if (atWork) {
    bar.removeAttribute("value");
  } else {
    bar.max = 1;
    bar.value = 0;
  }
}
