// Shows a trace: one canvas at one step as a grid of cells, and the controls to walk through all of them.
// Knows traces, but neither conversations nor the server.

import { calm, el, icon, iconButton } from "./dom.js";
import { heat } from "./trace.js";

const STEP_MS = 90;
const CANVAS_MS = 450; // rest on a settled canvas before the next one
const DENSE = 64; // positions from which cells are small

export class CanvasPlayer {
  // `onCanvas` is told which canvas is shown, whenever another one is.
  constructor(trace, onCanvas) {
    this.trace = trace;
    this._onCanvas = onCanvas;
    this._told = -1;
    this.canvas = 0;
    this.step = 0;
    this.follow = true; // until the reader takes the slider, the newest step is shown
    this._cells = [];
    this._bars = [];
    this._timer = 0;
    this._name = `canvas-${crypto.getRandomValues(new Uint32Array(1))[0]}`;

    this.grid = el("div", { class: "grid", role: "img" });
    this.grid.addEventListener("pointerover", (event) => this._point(event.target));
    this.grid.addEventListener("pointerleave", () => this._point(null));
    this.readout = el("p", { class: "readout" });
    this.slider = el("input", { type: "range", class: "steps", min: "0", value: "0", "aria-label": "Step" });
    this.slider.addEventListener("input", () => this.pick(this.canvas, Number(this.slider.value)));
    this.count = el("span", { class: "count" });
    this.play = iconButton("play", "Play", () => this.toggle(), { class: "icon play" });
    this.bars = el("fieldset", { class: "canvases" }, el("legend", { text: "Canvas" }));
    this.element = el("section", { class: "player", "aria-label": "Canvas, step by step" },
      this.grid, this.readout,
      el("div", { class: "transport" },
        iconButton("back", "Previous step", () => this.move(-1)), this.play,
        iconButton("forward", "Next step", () => this.move(1)), this.slider, this.count),
      this.bars);
    this.element.addEventListener("keydown", (event) => this._key(event));
  }

  // The trace has grown by a step.
  grown() {
    if (this.follow) this.show(this.trace.canvases.length - 1, this.trace.canvases.at(-1).steps.length - 1);
    else this._controls();
  }

  // The reader chose this step: live steps no longer move the view, unless it is the newest.
  pick(canvas, step) {
    this.pause();
    this.show(canvas, step);
    this.follow = this._isLast();
  }

  show(canvas, step) {
    const one = this.trace.canvases[canvas];
    if (!one) return;
    [this.canvas, this.step] = [canvas, Math.max(0, Math.min(step, one.steps.length - 1))];
    this._draw(one, one.steps[this.step]);
    this._controls();
    if (this._told !== canvas) this._onCanvas(canvas);
    this._told = canvas;
  }

  move(by) {
    const size = this.trace.canvases[this.canvas]?.steps.length ?? 0;
    if (this.step + by >= size && this.trace.canvases[this.canvas + 1]) this.pick(this.canvas + 1, 0);
    else if (this.step + by < 0 && this.canvas > 0) this.pick(this.canvas - 1, Infinity);
    else this.pick(this.canvas, this.step + by);
  }

  toggle() {
    if (this._timer) return this.pause();
    if (this._isLast()) this.show(0, 0);
    this.follow = false;
    this._playing(true);
    this._next();
  }

  pause() {
    clearTimeout(this._timer);
    this._timer = 0;
    this._playing(false);
  }

  _next() {
    const ends = this.step >= this.trace.canvases[this.canvas].steps.length - 1;
    this._timer = setTimeout(() => {
      if (ends && this.canvas >= this.trace.canvases.length - 1) return this.pause();
      this.show(this.canvas + ends, ends ? 0 : this.step + 1);
      this._next();
    }, ends ? CANVAS_MS : STEP_MS);
  }

  _playing(yes) {
    const label = yes ? "Pause" : "Play";
    if (this.play.title === label) return;
    this.play.title = label;
    this.play.setAttribute("aria-label", label);
    this.play.replaceChildren(icon(yes ? "pause" : "play"));
  }

  _isLast() {
    const last = this.trace.canvases.length - 1;
    return this.canvas === last && this.step === this.trace.canvases[last].steps.length - 1;
  }

  // The slider has the arrows, Home and End by itself; a button has the space bar.
  _key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const act = {
      " ": event.target.closest("button") ? null : () => this.toggle(),
      PageUp: () => this.pick(Math.max(this.canvas - 1, 0), 0),
      PageDown: () => this.pick(Math.min(this.canvas + 1, this.trace.canvases.length - 1), 0),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  _draw(canvas, step) {
    this._size(canvas, step);
    step.tokens.forEach((token, place) => {
      const cell = this._cells[place];
      const text = this.trace.piece(token);
      const look = ["cell", `heat-${heat(step.entropy[place])}`, step.accepted.has(place) ? "accepted" : "",
        step.corrected.has(place) ? "corrected" : "", this.trace.isBlank(token) ? "blank" : ""].filter(Boolean).join(" ");
      if (cell.firstChild.data !== text) cell.firstChild.data = text;
      if (cell.className !== look) cell.className = look;
      if (step.corrected.has(place) && !calm()) flash(cell);
    });
    const told = summary(canvas, step);
    this.readout.textContent = told;
    const words = step.tokens.map((token) => this.trace.piece(token)).join("");
    this.grid.setAttribute("aria-label", `Canvas ${canvas.number + 1}, step ${step.number}. ${told}. It reads: ${words}`);
  }

  _size(canvas, step) {
    while (this._cells.length > canvas.width) this._cells.pop().remove();
    while (this._cells.length < canvas.width) {
      const cell = el("span", { class: "cell", data: { place: this._cells.length } }, document.createTextNode(""));
      this._cells.push(cell);
      this.grid.append(cell);
    }
    this.grid.classList.toggle("dense", canvas.width >= DENSE);
    // A board of single signs (Sudoku) is shown as the square it is.
    const side = Math.sqrt(canvas.width);
    const square = Number.isInteger(side) && side > 4 && step.tokens.every((one) => this.trace.piece(one).length === 1);
    this.grid.classList.toggle("square", square);
    this.grid.style.setProperty("--side", square ? side : "initial");
  }

  _controls() {
    const canvas = this.trace.canvases[this.canvas];
    const step = canvas.steps[this.step];
    this.slider.max = canvas.steps.length - 1;
    this.slider.value = this.step;
    this.slider.disabled = canvas.steps.length < 2;
    this.slider.setAttribute("aria-valuetext", `Step ${step.number} of ${canvas.steps.length}. ${summary(canvas, step)}`);
    this.slider.style.setProperty("--track", track(canvas.steps));
    this.count.textContent = `${step.number} / ${canvas.steps.length}`;
    this._canvases();
  }

  // One bar a canvas, as high as the steps it took; a radio button each, so arrows walk them.
  _canvases() {
    while (this._bars.length < this.trace.canvases.length) {
      const number = this._bars.length;
      const radio = el("input", { type: "radio", name: this._name, on: { change: () => this.pick(number, 0) } });
      const bar = el("span", { class: "bar" });
      this._bars.push({ radio, bar });
      this.bars.append(el("label", {}, radio, bar));
    }
    const most = Math.max(...this.trace.canvases.map((one) => one.steps.length), 8);
    this._bars.forEach(({ radio, bar }, index) => {
      const steps = this.trace.canvases[index].steps.length;
      radio.checked = index === this.canvas;
      radio.setAttribute("aria-label", `Canvas ${index + 1}, ${steps} steps`);
      radio.parentElement.title = `Canvas ${index + 1}: ${steps} steps`;
      bar.style.height = `${Math.round((100 * steps) / most)}%`;
    });
    this.bars.hidden = this._bars.length < 2;
  }

  _point(target) {
    const canvas = this.trace.canvases[this.canvas];
    if (!canvas) return;
    const place = Number(target?.closest?.(".cell")?.dataset.place ?? NaN);
    const step = canvas.steps[this.step];
    if (Number.isNaN(place)) {
      this.readout.textContent = summary(canvas, step);
      return;
    }
    const entropy = step.entropy[place];
    const parts = [`Position ${place + 1}`, `“${this.trace.piece(step.tokens[place]).trim()}”`,
      entropy === null ? "no number" : `${entropy.toFixed(2)} nats`];
    if (step.accepted.has(place)) parts.push("accepted");
    if (step.corrected.has(place)) parts.push("corrected");
    this.readout.textContent = parts.join(" · ");
  }
}

function summary(canvas, step) {
  const parts = [`${step.accepted.size} of ${canvas.width} accepted`,
    step.mean === null ? "entropy unknown" : `mean entropy ${step.mean.toFixed(2)} nats`,
    `temperature ${step.temperature.toFixed(2)}`];
  if (step.corrected.size) parts.push(`${step.corrected.size} corrected`);
  return parts.join(" · ");
}

// The slider's own picture: how hot the canvas was at each step.
function track(steps) {
  const stops = steps.map((step, index) => {
    const level = heat(step.mean);
    const share = steps.length > 1 ? index / (steps.length - 1) : 0;
    return `${level ? `var(--heat-${level})` : "var(--line)"} calc(9px + (100% - 18px) * ${share.toFixed(4)})`;
  });
  return `linear-gradient(to right, ${stops.length > 1 ? stops.join(", ") : `${stops[0]}, ${stops[0]}`})`;
}

function flash(cell) {
  const accent = getComputedStyle(cell).getPropertyValue("--accent");
  cell.animate([{ backgroundColor: accent, transform: "scale(1.08)" }, { transform: "none" }],
    { duration: 650, easing: "ease-out" });
}
