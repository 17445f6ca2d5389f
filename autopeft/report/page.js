"use strict";
(() => {
  const { figures, texts } = JSON.parse(document.getElementById("figures").textContent);
  const shown = { front: "vram", curves: "quality", timeline: "time" };
  const hidden = new Set();
  let range = "all";

  // "@ink" and its like become what the style sheet says in the current colour scheme.
  function resolve(value, style) {
    if (typeof value === "string") return value.startsWith("@") ? style.getPropertyValue("--" + value.slice(1)).trim() || value : value;
    if (Array.isArray(value)) return value.map((item) => resolve(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
  }

  // Data arrays are left alone: only colours are tokens, and a name may well begin with "@".
  const DATA = new Set(["x", "y", "base", "text", "hovertext", "legendgroup"]);
  function themed(figure) {
    const style = getComputedStyle(document.documentElement);
    const data = figure.data.map((trace) =>
      Object.fromEntries(Object.entries(trace).map(([key, item]) => [key, DATA.has(key) ? item : resolve(item, style)])));
    for (const trace of data) if (trace.hovertext) trace.hovertext = trace.hovertext.map((place) => texts[place] ?? "");
    const layout = resolve({ ...figure.layout, annotations: [] }, style);
    layout.annotations = (figure.layout.annotations || []).map((note) => ({ ...resolve(note, style), text: note.text }));
    return { data, layout };
  }

  function draw(name) {
    const box = document.getElementById("figure-" + name);
    if (!box) return;
    const { data, layout } = themed(figures[name][shown[name]]);
    for (const trace of data) trace.visible = !hidden.has(trace.legendgroup);
    if (name === "front" && layout.meta.ranges[range]) layout.yaxis.range = layout.meta.ranges[range].slice();
    const touch = matchMedia("(pointer: coarse)").matches;
    if (touch) layout.dragmode = false; // a finger on a figure should scroll the page
    Plotly.react(box, data, layout, { responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false });
  }

  const press = (buttons, chosen) => buttons.forEach((b) => b.setAttribute("aria-pressed", String(chosen(b))));
  const all = (selector) => [...document.querySelectorAll(selector)];

  for (const button of all("button[data-figure]")) {
    button.addEventListener("click", () => {
      const { figure, view } = button.dataset;
      shown[figure] = view;
      press(all(`button[data-figure="${figure}"]`), (b) => b === button);
      draw(figure);
    });
  }
  for (const button of all("button[data-range]")) {
    button.addEventListener("click", () => {
      range = button.dataset.range;
      press(all("button[data-range]"), (b) => b === button);
      draw("front");
    });
  }
  for (const button of all("button[data-method]")) {
    button.addEventListener("click", () => {
      const { method } = button.dataset;
      if (!hidden.delete(method)) hidden.add(method);
      press(all("button[data-method]"), (b) => !hidden.has(b.dataset.method));
      draw("front");
      draw("curves");
    });
  }

  const drawAll = () => Object.keys(shown).forEach(draw);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // The table: empty cells stay last whichever way it is sorted.
  const table = document.getElementById("trials");
  if (table) {
    const body = table.tBodies[0];
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const numeric = header.classList.contains("number");
      const value = (row) => {
        const raw = row.cells[column].dataset.value;
        return raw === undefined ? null : numeric ? Number(raw) : raw;
      };
      header.querySelector("button").addEventListener("click", () => {
        const before = header.getAttribute("aria-sort");
        // Scores and shares are read from the top, everything else from the bottom.
        const first = /^(Quality|Test|On front)$/.test(header.textContent.trim()) ? "descending" : "ascending";
        const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...body.rows].map((row) => [value(row), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * (numeric ? a - b : a.localeCompare(b));
        });
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", order);
        body.append(...rows.map(([, row]) => row));
      });
    });

    const text = document.getElementById("filter-text");
    const state = document.getElementById("filter-state");
    const count = document.getElementById("row-count");
    const filter = () => {
      const words = text.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
      let kept = 0;
      for (const row of body.rows) {
        const content = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        const rightState = state.value === "" || (state.value === "front" ? row.classList.contains("front") : state.value === "state:" + row.dataset.state);
        row.hidden = !(rightState && words.every((word) => content.includes(word)));
        kept += row.hidden ? 0 : 1;
      }
      count.textContent = kept === body.rows.length ? `${kept} rows` : `${kept} of ${body.rows.length} rows`;
    };
    text.addEventListener("input", filter);
    state.addEventListener("change", filter);
  }

  if (navigator.clipboard) {
    for (const button of all("button[data-copy]")) {
      button.hidden = false;
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(button.dataset.copy);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
    }
  }
})();
