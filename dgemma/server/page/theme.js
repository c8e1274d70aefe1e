// Light or dark, before the first paint (so no module): what the reader chose, else what the system says.
"use strict";

(() => {
  const KEY = "dgemma.theme";
  const root = document.documentElement;
  const read = () => {
    try {
      return localStorage.getItem(KEY) ?? "auto";
    } catch {
      return "auto"; // storage is forbidden: the system decides
    }
  };
  root.dataset.theme = read();

  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => {
      button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[root.dataset.theme] ?? "Auto";
      button.setAttribute("aria-label", `Colours: ${button.textContent}. Change`);
    };
    button.addEventListener("click", () => {
      root.dataset.theme = { auto: "light", light: "dark", dark: "auto" }[root.dataset.theme] ?? "auto";
      try {
        localStorage.setItem(KEY, root.dataset.theme);
      } catch {
        // not kept, but it holds until the page is left
      }
      name();
    });
    name();
  });
})();
