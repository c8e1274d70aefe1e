// One answer: the text as it becomes final, the canvas below it, the numbers, and what went wrong if it did.
// Draws what it is given; asks no server.

import { CanvasPlayer } from "./canvas.js";
import { el } from "./dom.js";
import { Doubts } from "./doubts.js";
import { loadTrace } from "./store.js";
import { Trace } from "./trace.js";

export class AnswerView {
  // `record` is what the store keeps. `lead` is the prompt it continues, where there is no conversation.
  constructor(record, { lead = "", model = "" } = {}) {
    this.record = record;
    this.trace = null;
    this.player = null;
    this._queue = [];
    this._frame = 0;
    this._drawn = 0;
    this._drained = null;
    this._parts = null;
    this.pace = 0; // steps a second that are shown; 0 is as they come
    this.onToggle = () => {};

    this.thought = el("div", { class: "words" });
    this._thoughts = el("details", { class: "thought", hidden: true }, el("summary", { text: "Thought" }), this.thought);
    this.text = el("div", { class: "words" });
    if (lead) this.text.append(el("span", { class: "lead", text: lead }));
    this.doubts = new Doubts(this.text);
    this.note = el("p", { class: "note", hidden: true });
    this._place = el("div", { class: "place" });
    this.numbers = el("dl", { class: "numbers" });
    this.actions = el("div", { class: "actions" });
    this.problem = el("div", { class: "problem", role: "alert", hidden: true });
    this.element = el("article", { class: "answer", "aria-label": `Answer of ${model || "the model"}` },
      this._thoughts, this.text, this.doubts.readout, this.note, this._place, this.problem, this.numbers, this.actions);
    if (record.thought) this._think(record.thought);
    if (record.text) this.text.append(el("span", { class: "final", text: record.text }));
  }

  // -- live ------------------------------------------------------------------------

  begin(pace) {
    this.pace = pace;
    this.trace = new Trace();
    this.element.setAttribute("aria-busy", "true");
    this.element.classList.add("live");
  }

  // An event: {line} of the trace, or {text}, or {thought}. Shown in order, drafts at the chosen pace.
  feed(event) {
    this._queue.push(event);
    this._frame ||= requestAnimationFrame((now) => this._show(now));
  }

  // Resolves when everything fed has been shown. `now` skips what waits.
  async drained(now = false) {
    if (now) {
      this.pace = 0;
      cancelAnimationFrame(this._frame);
      this._show(performance.now());
    }
    if (!this._queue.length) return;
    await new Promise((resolve) => { this._drained = resolve; });
  }

  end() {
    this.element.removeAttribute("aria-busy");
    this.element.classList.remove("live");
    if (this.trace && !this.trace.canvases.length) this.trace = null;
    this._split();
    if (this.isOpen) this._mark(this.player.canvas);
  }

  _show(now) {
    this._frame = 0;
    let grown = false;
    while (this._queue.length) {
      const event = this._queue[0];
      const draft = event.line?.type === "draft";
      if (draft && this.pace && (grown || now - this._drawn < 1000 / this.pace)) break;
      this._queue.shift();
      if (event.line) grown = Boolean(this.trace.push(event.line)) || grown;
      if (event.text) this.text.append(el("span", { class: "fresh", text: event.text }));
      if (event.thought) this._think(event.thought);
    }
    if (grown) {
      this._drawn = now;
      this._open();
      this.player.grown();
    }
    this._live();
    if (this._queue.length) this._frame = requestAnimationFrame((later) => this._show(later));
    else {
      this._drained?.();
      this._drained = null;
    }
  }

  _think(text) {
    this._thoughts.hidden = false;
    this.thought.append(text);
  }

  _live() {
    const { trace } = this;
    const draft = trace.canvases.at(-1);
    const open = draft && !draft.stop ? draft.steps.at(-1).accepted.size : 0;
    const settled = trace.tokens + open;
    this.showNumbers({ tokens: settled, seconds: trace.seconds, steps: trace.steps,
      perForward: trace.forwards ? settled / trace.forwards : 0 });
  }

  // -- canvas ----------------------------------------------------------------------

  get isOpen() {
    return Boolean(this.player) && !this._place.hidden;
  }

  _open() {
    this._place.hidden = false;
    if (this.player) return;
    this.player = new CanvasPlayer(this.trace, (canvas) => this._mark(canvas));
    this._place.append(this.player.element);
  }

  // Reads the stored trace, if there is none yet. False where there is none any more.
  async load() {
    const lines = this.trace ? null : await loadTrace(this.record.id);
    if (lines?.length) {
      this.trace ??= new Trace(lines);
      this._split();
    }
    return Boolean(this.trace?.canvases.length);
  }

  // Shows or hides the canvas. False where there is none to show.
  async toggle(open = !this.isOpen) {
    if (open && !(await this.load())) return false;
    if (open) {
      this._open();
      this.player.show(this.trace.canvases.length - 1, Infinity);
      this._mark(this.player.canvas);
    } else {
      this.player?.pause();
      this._place.hidden = true;
      this._mark(-1);
    }
    this.onToggle();
    return true;
  }

  // The text in the parts that the canvases wrote; left whole where a stop string cut it otherwise.
  _split() {
    const parts = this.trace?.texts ?? [];
    if (parts.join("") !== this.record.text) return;
    for (const old of this.text.querySelectorAll(".final, .fresh, .part")) old.remove();
    this._parts = parts.map((text, index) => el("span", { class: "part" },
      ...this.doubts.spans(text, this.trace.words[index])));
    this.text.append(...this._parts);
    this.doubts.begin();
  }

  _mark(canvas) {
    if (this._parts?.length > 1) this._parts.forEach((part, index) => part.classList.toggle("now", index === canvas));
  }

  // -- numbers and faults -------------------------------------------------------------

  showNumbers({ tokens, seconds, steps, perForward, seed }) {
    const parts = [];
    if (tokens && seconds > 0) parts.push(["tokens a second", Math.round(tokens / seconds).toLocaleString("en")]);
    if (steps) parts.push(["steps", steps.toLocaleString("en")]);
    if (perForward) parts.push(["tokens a forward pass", perForward.toFixed(2)]);
    if (seconds > 0) parts.push(["seconds", seconds.toFixed(1)]);
    if (tokens) parts.push(["tokens", tokens.toLocaleString("en")]);
    if (seed !== undefined && seed !== null) parts.push(["seed", String(seed)]);
    while (this.numbers.children.length > parts.length) this.numbers.lastChild.remove();
    parts.forEach(([name, value], index) => {
      if (!this.numbers.children[index]) this.numbers.append(el("div", {}, el("dt"), el("dd")));
      const pair = this.numbers.children[index];
      pair.className = name === "seed" ? "" : "unit"; // "138 steps", but "seed 3"
      if (pair.firstChild.textContent !== name) pair.firstChild.textContent = name;
      if (pair.lastChild.textContent !== value) pair.lastChild.textContent = value;
    });
  }

  // How the answer ended, where that is not by itself.
  showEnd() {
    const told = { abort: "Stopped.", length: "It ends here because it may not be longer." }[this.record.reason];
    this.note.textContent = told ?? "";
    this.note.hidden = !told;
  }

  showProblem(...content) {
    this.problem.hidden = !content.length;
    this.problem.replaceChildren(...content);
  }
}
