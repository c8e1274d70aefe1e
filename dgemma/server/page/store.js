// What the browser keeps: conversations in localStorage (one key each, so that two tabs do not overwrite each
// other's), their traces in IndexedDB. Where a browser forbids storage everything works until the page is left.

const PREFIX = "dgemma.conversation.";
const SETTINGS = "dgemma.settings";
const memory = new Map();
const traces = new Map();

function read(key) {
  if (memory.has(key)) return memory.get(key);
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

// False where it is only kept until the page is left (storage full or forbidden).
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    memory.delete(key);
    return true;
  } catch {
    memory.set(key, value);
    return false;
  }
}

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
}

export function newConversation() {
  return { id: newId(), system: "", turns: [], updated: Date.now() };
}

export function title(conversation) {
  const first = conversation.turns[0]?.user.trim().replace(/\s+/g, " ") ?? "";
  return first.length > 60 ? `${first.slice(0, 59)}…` : first || "New conversation";
}

// Newest first.
export function conversations() {
  const keys = new Set(memory.keys());
  try {
    for (let index = 0; index < localStorage.length; index += 1) keys.add(localStorage.key(index));
  } catch {
    // memory alone
  }
  return [...keys].filter((key) => key.startsWith(PREFIX)).map(read)
    .filter((one) => one && Array.isArray(one.turns)).sort((a, b) => b.updated - a.updated);
}

export function saveConversation(conversation) {
  return write(PREFIX + conversation.id, conversation);
}

export function deleteConversation(conversation) {
  memory.delete(PREFIX + conversation.id);
  try {
    localStorage.removeItem(PREFIX + conversation.id);
  } catch {
    // memory alone
  }
  for (const turn of conversation.turns) if (turn.answer) deleteTrace(turn.answer.id);
}

export function onConversationsElsewhere(act) {
  addEventListener("storage", (event) => {
    if (event.key?.startsWith(PREFIX)) {
      memory.delete(event.key);
      act();
    }
  });
}

export const loadSettings = () => read(SETTINGS) ?? {};
export const saveSettings = (values) => write(SETTINGS, values);

let opening = null;

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("dgemma", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("traces");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

async function inStore(mode, act) {
  const store = (await database()).transaction("traces", mode).objectStore("traces");
  return new Promise((resolve, reject) => {
    const request = act(store);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// Traces are worth keeping, not worth an error: what the database refuses stays in memory.
export async function saveTrace(id, lines) {
  await inStore("readwrite", (store) => store.put(lines, id)).catch(() => traces.set(id, lines));
}

export async function loadTrace(id) {
  return traces.get(id) ?? (await inStore("readonly", (store) => store.get(id)).catch(() => null)) ?? null;
}

export function deleteTrace(id) {
  traces.delete(id);
  inStore("readwrite", (store) => store.delete(id)).catch(() => {});
}
