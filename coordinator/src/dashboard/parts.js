// Small parts that every section is made of: elements, tables, numbers and times as text.
//
// Everything shown goes through textContent: names and reasons come from other machines. What did
// not change is left alone, so that scroll positions, focus and selected text survive an update.

export const $ = id => document.getElementById(id);

export function make(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}
export function tint(node, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (node.style.getPropertyValue(name) !== value) node.style.setProperty(name, value);
  }
  return node;
}
export function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
export function mark(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// Makes the children of `parent` be those of `items`: one that is there already (by `key`) stays
// the same node. `fill(node, item)` brings it up to date.
export function sync(parent, items, key, create, fill = () => {}) {
  const known = parent.kept ?? new Map(),
    kept = new Map(),
    seen = new Map();
  const nodes = items.map(item => {
    let name = key(item);
    const before = seen.get(name) ?? 0;
    seen.set(name, before + 1);
    if (before) name = `${name}\u0000${before}`;
    const node = known.get(name) ?? create(item);
    fill(node, item);
    kept.set(name, node);
    return node;
  });
  // What is new comes above what its reader looks at: it stays where it was.
  const below = parent.scrollTop > 0 ? parent.scrollHeight : 0;
  let place = parent.firstChild;
  const gone = new Set(parent.childNodes);
  for (const node of nodes) gone.delete(node);
  for (const node of nodes) {
    while (place && gone.has(place)) place = place.nextSibling;
    if (node === place) place = place.nextSibling;
    else parent.insertBefore(node, place);
  }
  if (below) parent.scrollTop += parent.scrollHeight - below;
  for (const node of gone) node.remove();
  parent.kept = kept;
}

export function row(cells, classes, head) {
  const node = make("tr");
  cells.forEach((_, at) => {
    const cell = at === head ? make("th", undefined, { scope: "row" }) : make("td");
    cell.className = classes[at] ?? "";
    node.append(cell);
  });
  return node;
}
function fillRow(node, cells) {
  cells.forEach((text, at) => set(node.children[at], text));
}

// A table of a few lines; `rows` are arrays of text, the first cell is the line's name.
export function showRows(body, rows, classes, nothing) {
  if (!rows.length) {
    const node = make("tr");
    node.append(make("td", nothing, { colspan: `${Math.max(1, classes.length)}`, class: "quiet name" }));
    body.replaceChildren(node);
    body.kept = undefined;
    return;
  }
  if (!body.kept) body.replaceChildren();
  sync(
    body,
    rows,
    cells => `${cells.length} ${cells[0]}`,
    cells => row(cells, classes, 0),
    fillRow,
  );
}

export const finite = Number.isFinite;
export const whole = value => (finite(value) ? value.toLocaleString("en") : "–");
export const fixed = (value, digits = 3) => (finite(value) ? value.toFixed(digits) : "–");
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
export const compact = value => (finite(value) ? COMPACT.format(value) : "–");
export const percent = (share, digits = 1) => (finite(share) ? `${(share * 100).toFixed(digits)} %` : "–");
export const si = value => {
  const power = Math.max(0, Math.min(6, Math.floor(Math.log10(value) / 3)));
  return `${(value / 1000 ** power).toFixed(1)} ${["", "k", "M", "G", "T", "P", "E"][power]}`;
};
export const size = bytes => (bytes > 0 ? `${si(bytes)}B` : "–");
export const millis = seconds =>
  !finite(seconds)
    ? "–"
    : seconds >= 1
      ? `${seconds.toFixed(2)} s`
      : `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
export const short = name => (name.length > 40 ? `${name.slice(0, 39)}…` : name);
export const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;
export function span(seconds) {
  if (!finite(seconds)) return "–";
  const s = Math.round(Math.max(0, seconds)),
    m = Math.floor(s / 60),
    h = Math.floor(m / 60),
    d = Math.floor(h / 24);
  return d > 2 ? `${d} d ${h % 24} h` : h ? `${h} h ${m % 60} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}
const TIME = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });
export function moment(ms) {
  const date = new Date(ms),
    time = TIME.format(date);
  return date.toDateString() === new Date().toDateString() ? time : `${DAY.format(date)} ${time}`;
}
export function timeNode(ms) {
  const date = new Date(ms);
  return make("time", moment(ms), finite(ms) ? { datetime: date.toISOString(), title: date.toString() } : {});
}

// Tables that say what a chart shows; filled while they are open.

const tables = new Map();

// Without `rows` there is nothing to say.
export function showTable(details, head, rows) {
  details.hidden = !rows;
  if (!rows) return;
  tables.set(details, { head, rows });
  if (details.open) fillTable(details);
}

function fillTable(details) {
  const { head, rows } = tables.get(details) ?? { head: [], rows: () => [] };
  let table = details.querySelector("table");
  if (!table) {
    const box = make("div", undefined, {
      class: "scroll",
      tabindex: "0",
      role: "region",
      "aria-label": details.querySelector("summary").textContent,
    });
    table = make("table");
    table.append(make("thead"), make("tbody"));
    box.append(table);
    details.append(box);
  }
  const names = head.join("\n");
  if (table.head !== names) {
    const top = make("tr");
    head.forEach((name, at) => top.append(make("th", name, { scope: "col", class: at ? "n" : "" })));
    table.tHead.replaceChildren(top);
    table.head = names;
  }
  showRows(
    table.tBodies[0],
    rows(),
    head.map((_, at) => (at ? "n" : "")),
    "Nothing yet.",
  );
}

for (const details of document.querySelectorAll("details")) {
  details.addEventListener("toggle", () => {
    if (details.open) fillTable(details);
  });
}
