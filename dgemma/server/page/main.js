// Puts the page together: models, the list of conversations, the composer, the two side panels, the keys.

import { hasKey, models } from "./api.js";
import { Chat } from "./chat.js";
import { byId, el, growing } from "./dom.js";
import { problem } from "./problems.js";
import { speaks } from "./run.js";
import { Settings } from "./settings.js";
import { conversations, deleteConversation, newConversation, onConversationsElsewhere, saveConversation, title } from "./store.js";

const STARTS = {
  chat: ["Tell me a story.", "Write a story about a fox.", "Tell me a bedtime story."],
  demo: ["Once upon a time", "One bright morning, a happy badger named Pip", "In a small village near the old mill, there"],
  sudoku: ["53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"],
};
const NARROW = matchMedia("(max-width: 899px)");

const input = byId("input");
const fit = growing(input);
const settings = new Settings((count) => {
  byId("open-sampler").dataset.count = count || "";
});
const chat = new Chat({
  settings: () => settings.body(),
  pace: () => Number(byId("pace").value),
  onChange: () => list(),
  onBusy: (yes) => {
    document.body.classList.toggle("busy", yes);
    byId("send").hidden = yes;
    byId("stop").hidden = !yes;
    byId("input").focus({ preventScroll: true });
  },
});

// -- models ----------------------------------------------------------------------------

let known = [];

async function start() {
  const banner = byId("banner");
  try {
    known = await models();
    banner.hidden = true;
    banner.replaceChildren();
  } catch (error) {
    const told = { message: error.message, status: error.status ?? 0, retryAfter: error.retryAfter, repeated: hasKey() };
    banner.hidden = false;
    banner.replaceChildren(...problem(told, start));
    banner.querySelector("input, button")?.focus();
    return;
  }
  byId("model").replaceChildren(...known.map(({ id }) => el("option", { value: id, text: id })));
  byId("models").hidden = known.length < 2;
  choose(known[0]);
  input.focus();
}

function choose(model) {
  chat.model = model;
  const talks = speaks(model);
  settings.model(model);
  byId("name").textContent = model.id;
  byId("system-row").hidden = !talks;
  input.placeholder = talks ? "Write a message" : "Write the beginning of a text";
  byId("send").disabled = false;
  byId("welcome-title").textContent = talks ? "What shall it write?" : "How does it begin?";
  byId("welcome-plain").hidden = talks;
  const starts = model.id === "sudoku" ? STARTS.sudoku : model.dgemma?.demo ? STARTS[talks ? "chat" : "demo"] : [];
  byId("starts").replaceChildren(...starts.map((text) =>
    el("button", { type: "button", text, on: { click: () => submit(text) } })));
}

byId("model").addEventListener("change", () => choose(known.find(({ id }) => id === byId("model").value)));

// -- composer ----------------------------------------------------------------------------

function submit(text) {
  if (!text.trim() || chat.busy || !chat.model) return;
  input.value = "";
  fit();
  chat.send(text);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit(input.value);
});
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit(input.value);
});
byId("stop").addEventListener("click", () => chat.stop());

const system = byId("system");
const fitSystem = growing(system);
system.addEventListener("input", () => {
  chat.conversation.system = system.value;
  if (chat.conversation.turns.length) saveConversation(chat.conversation);
});

// -- conversations -------------------------------------------------------------------------

function open(conversation) {
  chat.open(conversation);
  system.value = conversation.system;
  byId("system-row").open = Boolean(conversation.system);
  fitSystem();
  list();
}

function list() {
  const current = chat.conversation;
  byId("conversations").replaceChildren(...conversations().map((one) => {
    const name = title(one);
    const show = el("button", { type: "button", class: "open", text: name, title: name,
      "aria-current": one.id === current?.id ? "true" : null,
      on: { click: () => {
        if (one.id !== chat.conversation.id) open(one);
        closeOver();
        input.focus();
      } } });
    const drop = el("button", { type: "button", class: "drop", text: "Delete", "aria-label": `Delete “${name}”` });
    drop.addEventListener("click", () => {
      if (!drop.classList.contains("sure")) {
        drop.classList.add("sure");
        drop.textContent = "Sure?";
        return;
      }
      const shown = one.id === chat.conversation.id;
      if (shown) chat.forget();
      deleteConversation(one);
      if (shown) open(newConversation());
      else list();
      byId("new").focus();
    });
    drop.addEventListener("blur", () => {
      drop.classList.remove("sure");
      drop.textContent = "Delete";
    });
    return el("li", {}, show, drop);
  }));
}

byId("new").addEventListener("click", () => {
  open(newConversation());
  closeOver();
  input.focus();
});
onConversationsElsewhere(list);

// -- panels and keys -------------------------------------------------------------------------

// Shows one side panel ("list", "sampler") or none. On a narrow screen it lies over the page, which then rests.
function panel(name) {
  for (const id of ["list", "sampler"]) {
    byId(id).classList.toggle("shown", id === name);
    byId(`open-${id}`).setAttribute("aria-expanded", String(id === name));
  }
  byId("main").inert = NARROW.matches && Boolean(name);
  byId("shade").hidden = !name;
  document.body.dataset.panel = name ?? "";
}

function flip(name) {
  const shown = !byId(name).classList.contains("shown");
  panel(shown ? name : null);
  if (shown) byId(name).querySelector("button, input, select")?.focus();
}

for (const name of ["list", "sampler"]) {
  byId(`open-${name}`).addEventListener("click", () => flip(name));
  byId(`close-${name}`).addEventListener("click", () => closePanel());
}
byId("doubts").addEventListener("change", () => document.body.toggleAttribute("data-doubts", byId("doubts").checked));
byId("shade").addEventListener("click", () => closePanel());

function closePanel() {
  const name = document.body.dataset.panel;
  panel(null);
  if (name) byId(`open-${name}`).focus();
}

// A panel that lies over the page gives way to what was chosen in it.
function closeOver() {
  if (NARROW.matches) panel(null);
}

addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.isComposing) return;
  const writing = event.target.closest?.("input:not([type=range], [type=radio], [type=checkbox]), textarea, select");
  if (event.key === "Escape") {
    if (chat.busy) chat.stop();
    else if (document.body.dataset.panel) closePanel();
  } else if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    closeOver();
    input.focus();
  }
});
NARROW.addEventListener("change", () => panel(null));
addEventListener("scroll", () => chat.noteScroll(), { passive: true });

open(conversations()[0] ?? newConversation());
start();
