// What went wrong, in words, and what the reader can do about it.

import { setKey } from "./api.js";
import { el } from "./dom.js";

// Nodes for an error {message, status, retryAfter}. `retry` is called when it is worth another try.
export function problem(error, retry) {
  if (error.status === 401) return [keyForm(error, retry)];
  const again = el("button", { type: "button", text: "Try again", on: { click: retry } });
  const words = [el("strong", { text: headline(error) }), el("span", { text: detail(error) })];
  return [el("p", {}, ...words), el("div", { class: "actions" }, again)];
}

function headline({ status }) {
  if (status === 0) return "The server is not there. ";
  if (status === 429) return "The server is full. ";
  if (status === 503) return "The server is shutting down. ";
  if (status === 504) return "That took too long. ";
  return status < 500 ? "The server refused this. " : "The server failed. ";
}

function detail({ status, message, retryAfter }) {
  const wait = retryAfter ? ` It suggests to wait ${Math.ceil(retryAfter)} s.` : "";
  return status === 429 ? `As many answers are being written as it can hold.${wait}` : `${message}${wait}`;
}

function keyForm(error, retry) {
  const input = el("input", { type: "password", id: "key", autocomplete: "off", required: true, spellcheck: "false" });
  return el("form", { class: "key", on: { submit: (event) => {
    event.preventDefault();
    setKey(input.value.trim());
    retry();
  } } },
  el("label", { for: "key" }, el("strong", { text: "This server asks for an API key. " }),
    el("span", { text: error.repeated ? "The one you gave is not among its keys." : "It stays in this tab and goes when the tab is closed." })),
  el("div", { class: "pair" }, input, el("button", { type: "submit", class: "primary", text: "Use key" })));
}
