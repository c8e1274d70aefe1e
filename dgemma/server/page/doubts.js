// Marks the words of a finished answer of which its canvas was not sure, and tells about each. Knows words and no trace.

import { el, plural } from "./dom.js";
import { heat } from "./trace.js";

const DOUBT = 1; // the heat from which a word is marked: 0.02 nats, as on the canvas

export class Doubts {
  // `text` is the element that the spans will stand in. One tab stop for all of them: arrows walk from one to the next.
  constructor(text) {
    this.readout = el("p", { class: "readout", hidden: true });
    this._text = text;
    this._marked = [];
    text.addEventListener("focusin", (event) => this._tell(event.target));
    text.addEventListener("focusout", () => this._tell(null));
    text.addEventListener("pointerover", (event) => this._tell(event.target));
    text.addEventListener("pointerleave", () => this._tell(document.activeElement));
    text.addEventListener("keydown", (event) => this._key(event));
  }

  // The text of a canvas as nodes; `words` are its tokens, null if they are not known.
  spans(text, words) {
    if (!words || words.map((word) => word.text).join("") !== text) return [text];
    return words.flatMap((word) => {
      const level = heat(word.entropy);
      const bare = word.text.trimStart(); // a line under a space would tie words together
      if (level < DOUBT || !bare) return [word.text];
      const told = tell(word);
      return [word.text.slice(0, word.text.length - bare.length),
        el("span", { class: `doubt heat-${level}`, text: bare, role: "note", tabindex: "-1", title: told,
          "aria-label": told })];
    });
  }

  // The spans stand in the text.
  begin() {
    this._marked = [...this._text.querySelectorAll(".doubt")];
    this._marked[0]?.setAttribute("tabindex", "0");
    this._tell(null);
  }

  _tell(target) {
    const word = target?.closest?.(".doubt");
    const count = this._marked.length;
    this.readout.hidden = !count;
    this.readout.textContent = this._marked.includes(word) ? word.title : `${plural(count, "word")} in doubt`;
  }

  _key(event) {
    const index = this._marked.indexOf(event.target);
    if (index < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const last = this._marked.length - 1;
    const next = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0,
      End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const word = this._marked[Math.max(0, Math.min(next, last))];
    event.target.setAttribute("tabindex", "-1");
    word.setAttribute("tabindex", "0");
    word.focus();
  }
}

function tell({ text, entropy, revisions, change, steps }) {
  const sure = entropy === null ? "no number" : `${entropy.toFixed(2)} nats`;
  const history = revisions ? `changed ${plural(revisions, "time")}, last in step ${change} of ${steps}`
    : `the same in all ${plural(steps, "step")}`;
  return `“${text.trim()}” · ${sure} · ${history}`;
}
