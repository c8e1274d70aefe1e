// The sampler's controls: a table of fields, filled from what the model says its defaults are.
// Only what differs from them is kept, and sent.

import { byId, el, plural } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";

// place: "top" is a field of OpenAI's API, "dgemma" one of the extension object.
// none: the word for null, which an empty field stands for.
const GROUPS = [
  ["Answer", [
    { name: "max_tokens", label: "Most tokens", place: "top", min: 1, step: 1, help: "The answer ends there at the latest." },
    { name: "temperature", label: "Temperature", place: "top", min: 0, max: 2, step: 0.05,
      help: "Scales the draw only. 0 takes the most likely token; acceptance and stop keep the schedule." },
    { name: "top_p", label: "Top p", place: "top", min: 0, max: 1, step: 0.05,
      help: "Draw from the most likely tokens of this total probability. Below 1 is slower." },
    { name: "top_k", label: "Top k", place: "top", min: 0, step: 1, help: "Draw from so many of the most likely tokens. 0 is all." },
    { name: "seed", label: "Seed", place: "top", step: 1, none: "random", help: "The same seed gives the same answer." },
  ]],
  ["Canvas", [
    { name: "mode", label: "Mode", options: ["diffusion", "ar", "verified"],
      help: "Whole canvases, token by token, or token by token with canvases as drafts." },
    { name: "verify_pace", label: "Drafts, mode verified", options: ["adaptive", "fixed"], help: "As they pay, or always." },
    { name: "verify_draft", label: "What they propose", options: ["argmax", "sample"],
      help: "The likeliest tokens, or tokens drawn from the canvas. The answer's law is the same." },
    { name: "steps", label: "Most steps a canvas", min: 1, step: 1, help: "Denoising steps after which a canvas is committed as it is." },
    { name: "canvas_length", label: "Positions a canvas", min: 1, step: 1, none: "default", help: "A width that the model was not trained at is approximate." },
    { name: "narrow", label: "Narrow canvases", options: ["auto", "never", "short", "adaptive"],
      help: "Fewer positions where the rest is short, or at first, too (adaptive)." },
  ]],
  ["Acceptance", [
    { name: "sampler", label: "Sampler", options: [], help: "Decides which positions a step accepts." },
    { name: "entropy_bound", label: "Entropy bound", min: 0, step: 0.05, only: "entropy_bound",
      help: "Nats that the positions accepted in one step may sum to." },
    { name: "accept_confidence", label: "Least probability", min: 0, max: 1, step: 0.05, only: "confidence",
      help: "A position is accepted from this probability on." },
    { name: "t_max", label: "Temperature, first step", min: 0, step: 0.05, help: "The schedule begins here." },
    { name: "t_min", label: "Temperature, last step", min: 0, step: 0.05, help: "The schedule comes close to this." },
  ]],
  ["Stop", [
    { name: "stability_threshold", label: "Steps without change", min: 0, step: 1, none: "off",
      help: "A canvas may stop after as many steps with the same prediction." },
    { name: "confidence_threshold", label: "Mean entropy", min: 0, step: 0.005, none: "off",
      help: "Nats below which a canvas may stop." },
    { name: "convention", label: "Convention", options: ["hf", "jax"], help: "Stop and commit as either reference does." },
  ]],
  ["Record", [
    { name: "trace", label: "Keep a trace on the server", flag: true, help: "Every step stays readable at /v1/traces/ for a while." },
  ]],
];
const FIELDS = GROUPS.flatMap(([, fields]) => fields);

export class Settings {
  constructor(onChange) {
    this._onChange = onChange;
    this._inputs = new Map();
    this._defaults = {};
    this._values = {};
    for (const [name, value] of Object.entries(loadSettings())) {
      if (FIELDS.some((field) => field.name === name)) this._values[name] = value;
    }
    byId("reset").addEventListener("click", () => {
      this._values = {};
      this._changed();
      this._fill();
    });
  }

  // `about` is the model's entry of GET /v1/models; without its "dgemma" part OpenAI's own fields remain.
  model(about) {
    const own = about.dgemma;
    const given = own?.generation ?? {};
    this._defaults = { ...given, seed: null, trace: false };
    this._defaults.max_tokens = given.max_new_tokens ?? null;
    for (const [name, usual] of [["temperature", 1], ["top_p", 1], ["top_k", 0]]) this._defaults[name] ??= usual;
    const form = byId("settings");
    form.replaceChildren();
    for (const [title, fields] of GROUPS) {
      const known = fields.filter((field) => field.place === "top" || (own && field.name in this._defaults));
      if (known.length) {
        form.append(el("fieldset", {}, el("legend", { text: title }),
          ...known.map((field) => this._row(field.name === "sampler" ? { ...field, options: own.samplers } : field))));
      }
    }
    this._fill();
    this._changed();
  }

  // What a request has to carry, as in {temperature: 0.5, dgemma: {steps: 20}}: what differs, nothing else.
  body() {
    const body = {};
    for (const { name, place } of FIELDS) {
      if (!this._differs(name)) continue;
      if (place === "top") body[name] = this._values[name];
      else (body.dgemma ??= {})[name] = this._values[name];
    }
    return body;
  }

  set(name, value) {
    this._values[name] = value;
    this._changed();
    this._fill();
  }

  _differs(name) {
    return name in this._values && this._inputs.has(name) && this._values[name] !== this._defaults[name];
  }

  _row(field) {
    const id = `set-${field.name}`;
    const props = { id, name: field.name, "aria-describedby": `${id}-help`, on: { change: () => this._read(field, input) } };
    let input;
    if (field.options) {
      input = el("select", props, ...field.options.map((one) => el("option", { value: one, text: one })));
    } else if (field.flag) {
      input = el("input", { ...props, type: "checkbox" });
    } else {
      input = el("input", { ...props, type: "number", inputmode: "decimal", min: field.min, max: field.max,
        step: field.step === 1 ? 1 : "any", placeholder: field.none });
    }
    const row = el("div", { class: field.flag ? "row flag" : "row" },
      el("label", { for: id, text: field.label }), input, el("p", { id: `${id}-help`, class: "help", text: field.help }));
    this._inputs.set(field.name, { field, input, row });
    return row;
  }

  _read(field, input) {
    if (!input.reportValidity()) return;
    let value = input.value;
    if (field.flag) value = input.checked;
    else if (!field.options) value = value === "" ? (field.none ? null : this._defaults[field.name]) : Number(value);
    this._values[field.name] = value;
    this._changed();
    this._fill();
  }

  _fill() {
    const sampler = this._values.sampler ?? this._defaults.sampler;
    for (const [name, { field, input, row }] of this._inputs) {
      const value = this._differs(name) ? this._values[name] : this._defaults[name];
      if (field.flag) input.checked = Boolean(value);
      else input.value = value ?? "";
      row.classList.toggle("changed", this._differs(name));
      row.hidden = Boolean(field.only) && field.only !== sampler;
    }
  }

  _changed() {
    const differing = FIELDS.filter((field) => this._differs(field.name));
    this._values = Object.fromEntries(differing.map(({ name }) => [name, this._values[name]]));
    saveSettings(this._values);
    byId("reset").disabled = !differing.length;
    byId("changed").textContent = differing.length ? `${plural(differing.length, "setting")} changed` : "As the model has them";
    this._onChange(differing.length);
  }
}
