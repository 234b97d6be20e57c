"use strict";
// Without this the report is whole: it lets one read figures off the curves, and look at pictures larger.
const data = JSON.parse(document.getElementById("data").textContent);

/** A figure in at most five digits. */
const figure = (value) => (value === null ? "not finite" : String(Number(value.toPrecision(5))));

/** Place of the step nearest to one, in a list that rises. */
function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

for (const chart of data.charts) {
  const shown = document.getElementById(`chart-${chart.key}`);
  const svg = shown.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const legend = shown.querySelector(".legend");
  const names = [...legend.children].map((entry) => entry.textContent);
  const [left, right] = [Number(svg.dataset.left), Number(svg.dataset.right)];
  const [first, last] = chart.domain;
  let step = last;

  const read = () => {
    const x = left + ((step - first) / Math.max(last - first, 1)) * (right - left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    chart.curves.forEach((curve, number) => {
      const place = nearest(curve.steps, step);
      legend.children[number].textContent = `${curve.name}: ${figure(curve.values[place])} (step ${curve.steps[place]})`;
    });
  };
  const rest = () => {
    cursor.style.visibility = "hidden";
    names.forEach((name, number) => { legend.children[number].textContent = name; });
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    step = first + (Math.min(Math.max(x, left), right) - left) / (right - left) * (last - first);
    read();
  });
  svg.addEventListener("pointerleave", rest);
  svg.addEventListener("blur", rest);
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const steps = chart.curves[0].steps;
    const place = Math.min(Math.max(nearest(steps, step) + way, 0), steps.length - 1);
    step = steps[place];
    read();
  });
}

const dialog = document.getElementById("larger");
for (const button of document.querySelectorAll(".samples button")) {
  button.addEventListener("click", () => {
    const picture = button.querySelector("img");
    dialog.querySelector("img").src = picture.src;
    dialog.querySelector("img").alt = picture.alt;
    dialog.querySelector("p").textContent = picture.alt;
    dialog.showModal();
  });
}
dialog.addEventListener("click", () => dialog.close());
