// The conversation on the page: its turns, the one that is being answered, editing and asking again.

import { AnswerView } from "./answer.js";
import { byId, el, growing, plural } from "./dom.js";
import { problem } from "./problems.js";
import { requestOf, run, speaks } from "./run.js";
import { deleteTrace, newId, saveConversation, saveTrace } from "./store.js";

export class Chat {
  // `settings` gives what a request carries, `pace` the steps a second to show; `onChange` is told of every save.
  constructor({ settings, pace, onChange, onBusy }) {
    Object.assign(this, { settings, pace, onChange, onBusy });
    this.model = null;
    this.conversation = null;
    this._thread = byId("turns");
    this._views = new Map();
    this._running = null;
  }

  get busy() {
    return Boolean(this._running);
  }

  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this._views.clear();
    this._thread.replaceChildren();
    for (const turn of conversation.turns) this._draw(turn);
    this._actions();
    byId("welcome").hidden = conversation.turns.length > 0;
    this._views.get(conversation.turns.at(-1))?.view?.toggle(true);
    this._toEnd();
  }

  send(text) {
    const turn = { user: text, answer: null };
    for (const { view } of this._views.values()) view?.toggle(false);
    this.conversation.turns.push(turn);
    this._draw(turn);
    byId("welcome").hidden = true;
    return this._answer(turn);
  }

  // Stops the answer in work; what there is of it stays.
  stop() {
    this._running?.controller.abort();
    this._running?.view.drained(true);
  }

  // Drops the last answer and asks again, with other words if there are any.
  again(text = null) {
    const turn = this.conversation.turns.at(-1);
    if (!turn || this.busy) return null;
    if (text !== null) turn.user = text;
    if (turn.answer) deleteTrace(turn.answer.id);
    turn.answer = null;
    this._views.get(turn)?.element.remove();
    this._draw(turn);
    return this._answer(turn);
  }

  async _answer(turn) {
    const { conversation } = this;
    const record = { id: newId(), text: "", thought: "", reason: "", model: this.model.id, plain: !speaks(this.model),
      seed: null, traceId: "", numbers: null, error: null };
    turn.answer = record;
    const request = requestOf(this.model, conversation, turn, this.settings());
    const view = this._views.get(turn).show(record);
    const controller = new AbortController();
    this._running = { controller, view };
    this._busy(true, "Writing");
    view.begin(this.pace());
    this._save(conversation);
    this._toEnd();
    const follow = new ResizeObserver(() => this._atEnd && this._toEnd());
    this._atEnd = true;
    follow.observe(this._thread);
    let lines = [];
    try {
      lines = await run(request, record, (event) => {
        if (event.line) lines.push(event.line);
        view.feed(event);
      }, controller.signal);
    } catch (error) {
      if (error.name === "AbortError") record.reason = "abort";
      else record.error = { message: error.message, status: error.status ?? 0, retryAfter: error.retryAfter ?? 0 };
    }
    this._save(conversation);
    if (!conversation.gone && lines.some((line) => line.type === "draft")) saveTrace(record.id, lines);
    await view.drained(Boolean(record.error));
    follow.disconnect();
    view.end();
    this._running = null;
    this._finish(turn, view);
    this._busy(false, record.error ? "" : `Answer finished, ${plural(record.numbers.tokens, "token")}`);
  }

  _busy(yes, told) {
    byId("status").textContent = told;
    this.onBusy(yes);
    this._actions();
  }

  // The conversation was deleted: what is still being written of it goes nowhere.
  forget() {
    this.conversation.gone = true;
    this.stop();
  }

  _save(conversation) {
    if (conversation.gone) return;
    conversation.updated = Date.now();
    const kept = saveConversation(conversation);
    byId("unkept").hidden = kept;
    this.onChange();
  }

  // -- drawing -----------------------------------------------------------------------

  _draw(turn) {
    const question = el("div", { class: "question" });
    const element = el("div", { class: "turn" }, question);
    const entry = { element, question, view: null, show: (record) => {
      const lead = record.plain ? turn.user : "";
      entry.view?.element.remove();
      entry.view = new AnswerView(record, { lead, model: record.model });
      element.append(entry.view.element);
      this._ask(turn, entry);
      return entry.view;
    } };
    this._views.set(turn, entry);
    this._thread.append(element);
    this._ask(turn, entry);
    if (turn.answer) this._finish(turn, entry.show(turn.answer));
  }

  // The question as text. A prompt that the answer continues stands in the answer itself.
  _ask(turn, { question }) {
    question.hidden = Boolean(turn.answer?.plain);
    question.replaceChildren(el("p", { class: "said", text: turn.user }));
  }

  _finish(turn, view) {
    const { record } = view;
    view.showNumbers({ ...record.numbers, seed: record.seed });
    view.showProblem(...(record.error ? problem(record.error, () => this.again()) : []));
    view.showEnd();
    this._actions();
  }

  // What can be done with each turn. Editing and asking again belong to the last one.
  _actions() {
    const last = this.conversation?.turns.at(-1);
    for (const [turn, { view, question }] of this._views) {
      question.querySelector(".actions")?.remove();
      if (!view) continue;
      const live = this._running?.view === view;
      view.actions.replaceChildren(...(live ? [] : this._ofAnswer(view)));
      if (turn !== last || this.busy) continue;
      const edit = el("button", { type: "button", text: "Edit", on: { click: () => this._edit(turn) } });
      if (turn.answer.plain) view.actions.append(edit);
      else question.append(el("div", { class: "actions" }, edit));
      if (!turn.answer.error) {
        view.actions.append(el("button", { type: "button", text: "Again", title: "Answer again",
          on: { click: () => this.again() } }));
      }
    }
  }

  _ofAnswer(view) {
    const buttons = [];
    if (view.record.numbers?.steps) {
      const canvas = el("button", { type: "button", text: "Canvas" });
      view.onToggle = () => canvas.setAttribute("aria-expanded", String(view.isOpen));
      view.onToggle();
      canvas.addEventListener("click", async () => {
        if (!(await view.toggle())) canvas.replaceWith(el("span", { class: "gone", text: "Its steps were not kept" }));
      });
      buttons.push(canvas, el("button", { type: "button", text: "Save trace", on: { click: () => saveFile(view) } }));
    }
    if (view.record.text) {
      buttons.push(el("button", { type: "button", text: "Copy", on: { click: (event) => copy(view, event.target) } }));
    }
    return buttons;
  }

  _edit(turn) {
    const { element, question, view } = this._views.get(turn);
    const area = el("textarea", { "aria-label": "Edit the message", rows: "1", value: turn.user });
    const close = () => {
      form.remove();
      this._ask(turn, { question });
      this._actions();
    };
    const form = el("form", { class: "edit", on: { submit: (event) => {
      event.preventDefault();
      if (area.value.trim()) this.again(area.value);
    } } }, area, el("div", { class: "actions" },
      el("button", { type: "submit", class: "primary", text: "Send again" }),
      el("button", { type: "button", text: "Cancel", on: { click: () => close() } })));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    question.hidden = true;
    element.insertBefore(form, view.element);
    growing(area);
    area.focus();
  }

  noteScroll() {
    const page = document.scrollingElement;
    this._atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 120;
  }

  _toEnd() {
    document.scrollingElement.scrollTop = document.scrollingElement.scrollHeight;
  }
}

async function copy(view, button) {
  try {
    await navigator.clipboard.writeText(view.record.text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// The steps as a file that `dgemma replay` plays.
async function saveFile(view) {
  if (!(await view.load())) return;
  const text = view.trace.lines.map((line) => `${JSON.stringify(line)}\n`).join("");
  const address = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
  el("a", { href: address, download: `dgemma-${view.record.id}.jsonl` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
