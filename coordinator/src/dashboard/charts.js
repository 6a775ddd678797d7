// Charts without a library: SVG in pixels of its own width, so that text stays legible on a phone.
//
// A chart is read with the pointer, a finger or the arrow keys; to a screen reader it is a slider
// whose value is said in words. Colours come from the style sheet.

const NS = "http://www.w3.org/2000/svg";

export function shape(tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) {
    // The page's policy lets no style attribute pass, only what a script sets.
    if (key === "color") node.style.setProperty("--color", value);
    else node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  return node;
}

// The colour of place `at` among `count` that have an order.
export function ramp(at, count) {
  const place = count > 1 ? (at / (count - 1)) * 3 : 3;
  const from = Math.min(2, Math.floor(place));
  return `color-mix(in oklab, var(--ramp-${from + 1}) ${((place - from) * 100).toFixed(1)}%, var(--ramp-${from}))`;
}

// Round numbers from `low` to `high`, about `count` of them.
export function ticks(low, high, count) {
  const rough = (high - low) / count;
  if (!(rough > 0) || !Number.isFinite(rough)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].find(factor => factor * power >= rough * 0.75) * power;
  const found = [];
  for (let at = Math.ceil(low / stride - 1e-9); at * stride <= high + stride * 1e-9; at++)
    found.push(at * stride || 0);
  return found;
}

const MINUTE = 60_000,
  HOUR = 60 * MINUTE,
  DAY = 24 * HOUR;
const STRIDES = [
  1000,
  5000,
  15_000,
  30_000,
  MINUTE,
  5 * MINUTE,
  15 * MINUTE,
  30 * MINUTE,
  HOUR,
  2 * HOUR,
  6 * HOUR,
  12 * HOUR,
  DAY,
  2 * DAY,
  7 * DAY,
  28 * DAY,
];

// The same for moments, in local time.
export function timeTicks(low, high, count) {
  const stride = STRIDES.find(ms => ms >= (high - low) / count) ?? STRIDES[STRIDES.length - 1];
  const offset = new Date(low).getTimezoneOffset() * MINUTE;
  const found = [];
  for (let at = Math.ceil((low - offset) / stride) * stride + offset; at <= high; at += stride)
    found.push(at);
  return { stride, found };
}

const clock = options => new Intl.DateTimeFormat("en-GB", options);
const WITH_SECONDS = clock({ hour: "2-digit", minute: "2-digit", second: "2-digit" });
const WITH_MINUTES = clock({ hour: "2-digit", minute: "2-digit" });
const WITH_DAY = clock({ day: "numeric", month: "short" });

function timeLabel(ms, stride) {
  const date = new Date(ms);
  if (stride >= DAY || (stride >= HOUR && date.getHours() === 0 && date.getMinutes() === 0))
    return WITH_DAY.format(date);
  return (stride < MINUTE ? WITH_SECONDS : WITH_MINUTES).format(date);
}

// Neighbours share a bin, so that no chart draws more points than its pixels can show: pairs of
// indices, the second one excluded.
export function bins(count, limit) {
  const size = Math.max(1, Math.ceil(count / limit));
  const found = [];
  for (let at = 0; at < count; at += size) found.push([at, Math.min(count, at + size)]);
  return found;
}

// Mean of the finite values in a bin; NaN when there are none.
export function mean([from, to], value) {
  let sum = 0,
    count = 0;
  for (let at = from; at < to; at++) {
    const number = value(at);
    if (Number.isFinite(number)) {
      sum += number;
      count++;
    }
  }
  return count ? sum / count : NaN;
}

// A line through points; where a value is missing, it is interrupted.
export function line(points, x, y) {
  let path = "",
    pen = false;
  points.forEach(([at, value], index) => {
    if (!Number.isFinite(value)) {
      pen = false;
      return;
    }
    const place = `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    const alone = !pen && !Number.isFinite(points[index + 1]?.[1]);
    path += alone ? `M${place}h.01` : `${pen ? "L" : "M"}${place}`;
    pen = true;
  });
  return path;
}

// Moves labels apart that would cover each other; those that find no room are left out. Each is
// `{ y, weight }`, and heavier ones go first.
export function spread(labels, top, bottom, gap) {
  const placed = [];
  for (const label of [...labels].sort((a, b) => b.weight - a.weight)) {
    const y = Math.min(bottom, Math.max(top, label.y));
    const free = [0, 1, -1]
      .map(way => y + way * gap)
      .find(
        place => place >= top && place <= bottom && placed.every(other => Math.abs(other.y - place) >= gap),
      );
    if (free !== undefined) placed.push({ ...label, y: free });
  }
  return placed;
}

export class Chart {
  #host;
  #svg;
  #height;
  #left;
  #right;
  #model = null;
  #pinned = null;
  #drawn = 0;
  #seen = false;
  #stale = false;

  // `left` and `right` are what labels need beside the plot; on a phone `height` is less.
  constructor(host, { height = 220, left = 44, right = 12 } = {}) {
    this.#host = host;
    this.#height = height;
    this.#left = left;
    this.#right = right;
    this.#svg = shape("svg", { "aria-hidden": "true", focusable: "false" });
    host.append(this.#svg);
    host.setAttribute("aria-valuemin", "0");
    host.setAttribute("aria-valuenow", "0");
    host.setAttribute("aria-valuetext", "nothing yet");
    new ResizeObserver(() => {
      if (host.clientWidth !== this.#drawn) this.#render();
    }).observe(host);
    // What nobody sees is drawn when it comes near.
    new IntersectionObserver(
      entries => {
        this.#seen = entries[entries.length - 1].isIntersecting;
        if (this.#seen && this.#stale) this.#render();
      },
      { rootMargin: "300px" },
    ).observe(host);
    host.addEventListener("pointermove", event => this.#point(event));
    host.addEventListener("pointerdown", event => this.#point(event));
    host.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") this.#pin(null);
    });
    host.addEventListener("blur", () => this.#pin(null));
    host.addEventListener("keydown", event => this.#key(event));
  }

  // `model`: `xs`, the places that can be read, in order; `low` and `high` of the x axis, or `time`
  // when it shows moments; `paint(frame)`; `read(at)`, told the index that is pointed at, or null;
  // `words(at)`, what it says there. Or `note`, when there is nothing to draw.
  show(model) {
    this.#model = model;
    this.#render();
  }

  #index() {
    if (this.#pinned === null) return null;
    const { xs } = this.#model;
    let best = 0;
    xs.forEach((x, at) => {
      if (Math.abs(x - this.#pinned) < Math.abs(xs[best] - this.#pinned)) best = at;
    });
    return best;
  }

  #pin(x) {
    if (x === this.#pinned || !this.#model || this.#model.note) return;
    this.#pinned = x;
    this.#mark();
  }

  #point(event) {
    const model = this.#model;
    if (!model || model.note) return;
    const box = this.#host.getBoundingClientRect();
    const share = (event.clientX - box.left - this.#left) / (box.width - this.#left - this.#right);
    this.#pin(model.low + Math.min(1, Math.max(0, share)) * (model.high - model.low));
  }

  #key(event) {
    const model = this.#model;
    if (!model || model.note || !model.xs.length) return;
    const last = model.xs.length - 1,
      at = this.#index() ?? last,
      far = Math.max(1, Math.round(last / 10));
    const to = {
      ArrowLeft: at - 1,
      ArrowDown: at - 1,
      ArrowRight: at + 1,
      ArrowUp: at + 1,
      PageDown: at - far,
      PageUp: at + far,
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") this.#pin(null);
    else if (to === undefined) return;
    else this.#pin(model.xs[Math.min(last, Math.max(0, to))]);
    event.preventDefault();
    this.#say();
  }

  // Said when its reader asks; a value that moves by itself is not announced while it has the focus.
  #say() {
    const model = this.#model,
      host = this.#host;
    const last = model.note ? 0 : Math.max(0, model.xs.length - 1);
    const at = model.note ? null : (this.#index() ?? last);
    const say = {
      "aria-valuemax": `${last}`,
      "aria-valuenow": `${at ?? 0}`,
      "aria-valuetext": model.note ?? model.words(at),
    };
    for (const [key, value] of Object.entries(say))
      if (host.getAttribute(key) !== value) host.setAttribute(key, value);
  }

  #mark() {
    const model = this.#model,
      at = this.#index();
    this.#svg.querySelector(".cursor")?.remove();
    if (at !== null && at < model.xs.length) {
      const x = this.#frame().x(model.xs[at]);
      this.#svg.append(shape("line", { class: "cursor", x1: x, x2: x, y1: 6, y2: this.#tall() - 20 }));
    }
    model.read(at);
  }

  #tall() {
    if (this.#model.note) return 64;
    return Math.round(Math.min(this.#height, Math.max(100, this.#host.clientWidth * 0.62)));
  }

  #frame() {
    const { low = 0, high = 1 } = this.#model;
    const width = Math.max(120, this.#host.clientWidth),
      left = this.#left,
      right = width - this.#right;
    const frame = {
      svg: this.#svg,
      width,
      height: this.#tall(),
      left,
      right,
      top: 8,
      bottom: this.#tall() - 20,
    };
    frame.x = value => left + (high > low ? (value - low) / (high - low) : 0.5) * (right - left);
    return frame;
  }

  #render() {
    const model = this.#model;
    if (!model || !this.#host.clientWidth) return;
    if (document.activeElement !== this.#host) this.#say();
    this.#stale = !this.#seen && !model.note;
    if (this.#stale) {
      model.read(this.#index());
      return;
    }
    const frame = this.#frame();
    this.#drawn = this.#host.clientWidth;
    this.#svg.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
    this.#svg.replaceChildren();
    if (model.note) {
      this.#svg.append(
        shape(
          "text",
          { class: "note", x: frame.width / 2, y: frame.height / 2, "text-anchor": "middle" },
          model.note,
        ),
      );
      this.#pinned = null;
      model.read?.(null);
    } else {
      model.paint(frame);
      this.#xAxis(frame);
      this.#mark();
    }
  }

  #xAxis(frame) {
    const { low, high, time } = this.#model;
    frame.svg.append(
      shape("line", {
        class: "base",
        x1: frame.left,
        x2: frame.right,
        y1: frame.bottom + 0.5,
        y2: frame.bottom + 0.5,
      }),
    );
    const count = Math.max(2, Math.floor((frame.right - frame.left) / 85));
    const marks = time
      ? timeTicks(low, high, count)
      : { found: ticks(low, high, count).filter(Number.isInteger) };
    let free = -Infinity;
    for (const value of marks.found) {
      const label = time ? timeLabel(value, marks.stride) : value.toLocaleString("en");
      const half = label.length * 3.2;
      const at = Math.min(frame.width - half - 1, Math.max(half + 1, frame.x(value)));
      if (at - half < free) continue;
      free = at + half + 12;
      frame.svg.append(shape("text", { x: at, y: frame.height - 5, "text-anchor": "middle" }, label));
    }
  }
}

// Horizontal lines with their values.
export function yAxis(frame, values, y, label) {
  for (const value of values) {
    const at = Math.round(y(value)) + 0.5;
    frame.svg.append(
      shape("line", { class: "grid", x1: frame.left, x2: frame.right, y1: at, y2: at }),
      shape("text", { x: frame.left - 7, y: at + 3.5, "text-anchor": "end" }, label(value)),
    );
  }
}
