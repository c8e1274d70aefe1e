// A request step by step: takes lines of the trace format (docs/trace.md) and keeps every canvas at every step.
// Knows no page. Heats and numbers mean what `dgemma.view` means by them.

export const HEAT_NATS = [0.02, 0.1, 0.3, 0.8, 1.6, 2.8, 4.2];
export const BLANK = "·";

// 0 (sure) to 7 of an entropy in nats; null, which is no number, counts as unsure.
export function heat(entropy) {
  if (entropy === null) return HEAT_NATS.length;
  let level = 0;
  while (level < HEAT_NATS.length && HEAT_NATS[level] <= entropy) level += 1;
  return level;
}

export class Trace {
  constructor(lines = []) {
    this.lines = [];
    this.header = null;
    this.canvases = []; // {number, width, steps: [Step], stop}
    this.tokens = 0; // committed ones
    this.texts = []; // final text, a part a canvas; what was held back to the end is in the last
    this.words = []; // the same parts as tokens [{text, entropy, revisions, change, steps}]; null where that is unknown
    this.finished = null;
    this.seconds = 0;
    this._pieces = new Map();
    this._blank = new Set();
    this._commits = 0;
    for (const line of lines) this.push(line);
  }

  // Takes a line; gives [canvas, step] as indices if it was a draft, else null.
  push(line) {
    this.lines.push(line);
    this.seconds = line.seconds ?? this.seconds;
    if (line.format === "dgemma-trace") {
      this.header = line;
      this._blank = new Set(line.blank);
    } else if (line.type === "draft") return this._draft(line);
    else if (line.type === "committed") this._committed(line);
    else if (line.type === "finished") {
      this.finished = line;
      if (line.text && this.texts.length) this.texts[this.texts.length - 1] += line.text;
    }
    return null;
  }

  piece(token) {
    return this._blank.has(token) ? BLANK : (this._pieces.get(token) ?? "\ufffd");
  }

  isBlank(token) {
    return this._blank.has(token);
  }

  _draft(line) {
    for (const [id, text] of Object.entries(line.pieces ?? {})) this._pieces.set(Number(id), text);
    let canvas = this.canvases.at(-1);
    if (canvas?.number !== line.canvas) {
      canvas = { number: line.canvas, width: line.width, steps: [], stop: "", once: new Set() };
      this.canvases.push(canvas);
    }
    const last = canvas.steps.at(-1);
    const tokens = last ? last.tokens.slice() : new Array(line.width).fill(null);
    const corrected = new Set();
    for (const [place, token] of line.tokens) {
      // It was accepted at some earlier step, and now the prediction is another: the model corrects itself.
      if (last && canvas.once.has(place) && tokens[place] !== token) corrected.add(place);
      tokens[place] = token;
    }
    for (const place of line.accepted) canvas.once.add(place);
    const known = line.entropy.filter((value) => value !== null);
    canvas.steps.push({
      number: line.step, cap: line.max_steps, temperature: line.temperature, seconds: line.seconds,
      tokens, corrected, accepted: new Set(line.accepted), entropy: line.entropy,
      mean: known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null,
    });
    return [this.canvases.length - 1, canvas.steps.length - 1];
  }

  _committed(line) {
    this.tokens += line.tokens.length;
    this._commits += 1;
    this.texts.push(line.text ?? "");
    this.words.push(this._words(line));
    const canvas = this.canvases.at(-1);
    if (canvas?.number === line.canvas) canvas.stop = line.stop;
  }

  // How sure the canvas was of each token. Pieces are text but for newlines and parts of a character: where they do
  // not spell the text, as with thoughts and stop texts, nothing is told.
  _words(line) {
    if (!line.entropy) return null;
    const words = line.tokens.map((token, place) => ({
      text: this._blank.has(token) ? "" : (this._pieces.get(token) ?? "\ufffd").replaceAll("↵", "\n"),
      entropy: line.entropy[place], revisions: line.revisions[place], change: line.last_change[place], steps: line.steps,
    }));
    return words.map((word) => word.text).join("") === (line.text ?? "") ? words : null;
  }

  get steps() {
    return this.canvases.reduce((sum, canvas) => sum + canvas.steps.length, 0);
  }

  // Denoising steps and encoded canvases (or tokens, where there are no drafts).
  get forwards() {
    if (!this.canvases.length) return this._commits;
    if (this.finished) return this.steps + this.finished.encode_passes;
    const open = !this.canvases.at(-1).stop;
    return this.steps + (open ? this._commits : Math.max(this._commits - 1, 0));
  }
}
