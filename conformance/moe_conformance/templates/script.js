"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  const search = one("search"), concept = one("concept"), differs = one("differs"), target = one("target");
  const entries = all(".requirement").map((element) => ({
    element,
    text: element.textContent.toLowerCase(),
    cells: [...element.querySelectorAll("td[data-status]")],
  }));
  const chosen = new Set();

  function show() {
    if (!search) return;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const each of target ? all("[data-target]") : []) {
      each.hidden = Boolean(target.value) && each.dataset.target !== target.value;
    }
    for (const { element, text, cells } of entries) {
      const data = element.dataset;
      const statuses = data.status
        ? [data.status]
        : cells.filter((cell) => !cell.hidden).map((cell) => cell.dataset.status);
      const fits =
        (!chosen.size || statuses.some((status) => chosen.has(status))) &&
        (!concept.value || concept.value === data.concept) &&
        (!differs || !differs.checked || data.differs === "yes") &&
        words.every((word) => text.includes(word));
      element.hidden = !fits;
      shown += fits;
    }
    for (const group of all(".concept")) {
      group.hidden = !group.querySelector(".requirement:not([hidden])");
    }
    one("shown").textContent = `${shown} of ${entries.length} shown`;
    one("empty").hidden = shown > 0;
  }

  for (const chip of all(".chip")) {
    chip.addEventListener("click", () => {
      const status = chip.dataset.status;
      const on = !chosen.delete(status);
      if (on) chosen.add(status);
      chip.setAttribute("aria-pressed", on);
      show();
    });
  }
  for (const control of [search, concept, differs, target]) control?.addEventListener("input", show);

  const unfold = one("unfold");
  unfold?.addEventListener("click", () => {
    const open = unfold.getAttribute("aria-pressed") !== "true";
    unfold.setAttribute("aria-pressed", open);
    unfold.textContent = open ? "close all" : "open all";
    for (const { element } of entries) if (!element.hidden) element.open = open;
  });

  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "copied";
      } catch {
        // No clipboard outside a secure context: leave the text selected instead.
        getSelection().selectAllChildren(code);
        button.textContent = "selected";
      }
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.key === "/" && search && !typing) {
      event.preventDefault();
      search.focus();
    }
  });

  // A link to a requirement opens it, and takes back filters that would hide it.
  function follow() {
    const element = location.hash && one(decodeURIComponent(location.hash.slice(1)));
    if (!element || element.tagName !== "DETAILS") return;
    if (element.hidden) {
      chosen.clear();
      for (const chip of all(".chip")) chip.setAttribute("aria-pressed", false);
      search.value = concept.value = "";
      show();
    }
    element.open = true;
    element.scrollIntoView();
  }
  addEventListener("hashchange", follow);
  show();
  follow();
})();
