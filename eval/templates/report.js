"use strict";
// Sorting: every heading of a sortable table is a button; rows are sorted inside their group, so that budgets stay together.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
        const value = (row) => {
          const text = row.cells[column].textContent.trim();
          const number = parseFloat(text.replace("−", "-"));
          return { text, number };
        };
        rows.sort((a, b) => {
          const x = value(a), y = value(b);
          if (Number.isNaN(x.number) !== Number.isNaN(y.number)) return Number.isNaN(x.number) ? 1 : -1;
          const difference = Number.isNaN(x.number) ? x.text.localeCompare(y.text) : x.number - y.number;
          return order === "ascending" ? difference : -difference;
        });
        body.append(...rows);
      }
    });
  });
}
// Samples: one question type at a time, and all open or all closed.
const samples = [...document.querySelectorAll("details.sample")];
const kinds = document.getElementById("kinds");
if (kinds) {
  document.getElementById("controls").hidden = false;
  kinds.addEventListener("change", () => {
    for (const sample of samples) sample.hidden = kinds.value !== "" && sample.dataset.kind !== kinds.value;
  });
  document.getElementById("open").addEventListener("click", () => samples.forEach((s) => { s.open = true; }));
  document.getElementById("close").addEventListener("click", () => samples.forEach((s) => { s.open = false; }));
}
