// Builds elements. Text always goes in as text nodes: nothing here, or anywhere on the page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = {
  play: "M5 3.5v9l7.5-4.5z",
  pause: "M4.5 3.5h2.5v9h-2.5zM9 3.5h2.5v9h-2.5z",
  back: "M4 4h1.6v8H4zM12 4v8L6.4 8z",
  forward: "M10.4 4H12v8h-1.6zM4 4v8l5.6-4z",
  send: "M8 2.5l5 5.5h-3.2v5.5h-3.6v-5.5h-3.2z",
  stop: "M4 4h8v8h-8z",
};

// Properties in `props`: class, text, on (listeners), data (data-*); a boolean sets or leaves out an attribute.
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "value") node.value = value;
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, act, props = {}) {
  return el("button", { type: "button", class: "icon", "aria-label": label, title: label, on: { click: act }, ...props },
    icon(name));
}

export const byId = (id) => document.getElementById(id);

export function calm() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

export function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

// An element's height follows its text.
export function growing(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  };
  area.addEventListener("input", fit);
  requestAnimationFrame(fit);
  return fit;
}
