"use strict";

// Light and dark: the button turns over what is shown; without it the page follows the reader's system.
const theme = document.getElementById("theme");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.hidden = false;
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();

// Tables sort by the column whose header is pressed; what has no value stays last.
function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
}

function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  return String(one).localeCompare(String(other), undefined, { numeric: true });
}

function sort(table, column, header) {
  const down = header.getAttribute("aria-sort") === "ascending";
  const body = table.tBodies[0];
  const known = [], unknown = [];
  for (const row of body.rows) {
    const value = valueOf(row, column);
    (row.cells[column].dataset.nothing === undefined ? known : unknown).push([value, row]);
  }
  known.sort((one, other) => (down ? -1 : 1) * compare(one[0], other[0]));
  body.append(...known.concat(unknown).map(([, row]) => row));
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sorts")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sort(table, column, header));
  });
}

// A long table shows the rows that hold what is typed.
for (const field of document.querySelectorAll("input.filter")) {
  const rows = document.getElementById(field.dataset.table).tBodies[0].rows;
  field.hidden = false;
  field.addEventListener("input", () => {
    const asked = field.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(asked);
  });
}
