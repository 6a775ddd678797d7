// What is drawn over the steps: loss, tokens per second and the exit distribution.

import {
  $,
  make,
  tint,
  set,
  mark,
  sync,
  finite,
  whole,
  fixed,
  compact,
  percent,
  millis,
  showTable,
} from "./parts.js";
import { Chart, bins, line, mean, ramp, shape, spread, ticks, yAxis } from "./charts.js";
import { state } from "./state.js";

const lossChart = new Chart($("loss-chart"), { height: 250, right: 24 });
const rateChart = new Chart($("rate-chart"), { height: 280 });
const exitChart = new Chart($("exit-chart"), { height: 190, right: 24 });

// Loops that are named where there is no room for all.
function named(count) {
  if (count <= 8) return Array.from({ length: count }, (_, at) => at);
  return [...new Set([0, 1, 2, 3, 4, 5, 6].map(at => Math.round((at * (count - 1)) / 6)))];
}

// Steps at which generations began, those that are shown.
function beginnings(steps) {
  const found = [];
  for (let at = 1; at < steps.length; at++)
    if (steps[at].generation !== steps[at - 1].generation) found.push(steps[at].step);
  return found;
}

function paintBeginnings(frame, found) {
  // Too many lines would hide the curves: then they are short.
  const top = found.length > (frame.right - frame.left) / 14 ? frame.bottom - 8 : frame.top;
  const path = found.map(step => `M${frame.x(step).toFixed(1)} ${top}V${frame.bottom}`).join("");
  if (path) frame.svg.append(shape("path", { class: "began", d: path }));
}

export function showSteps() {
  const range = Number($("range").value);
  const steps = range ? state.steps.slice(-range) : state.steps;
  if (steps.length < 2) {
    const note = "The curve starts with the second step.";
    lossChart.show({
      note,
      read: () => {
        set($("loss-when"), "");
      },
    });
    rateChart.show({
      note,
      read: () => {
        set($("rate-when"), "");
      },
    });
    exitChart.show({ note, read: () => showExits(state.status.last) });
    sync($("loss-legend"), [], String, String);
    for (const id of ["loss-table", "rate-table", "exit-table"]) showTable($(id));
    return;
  }
  const loops = steps.reduce((most, record) => Math.max(most, record.loss_per_loop.length), 0);
  const binned = bins(steps.length, loops > 12 ? 160 : 600);
  const xs = binned.map(([from, to]) => (steps[from].step + steps[to - 1].step) / 2);
  const low = steps[0].step,
    high = steps[steps.length - 1].step;
  const shared = { xs, low, high };
  const where = at => {
    const [from, to] = binned[at],
      [first, last] = [steps[from].step, steps[to - 1].step];
    return first === last ? `Step ${whole(first)}` : `Steps ${whole(first)} to ${whole(last)}`;
  };
  const began = beginnings(steps);
  const sampled = bins(binned.length, 12).map(([from, to]) => [from, to - 1]);
  showLoss(steps, loops, binned, shared, where, began, sampled);
  showRate(steps, binned, shared, where, began, sampled);
  showExitArea(steps, binned, shared, where, sampled);
}

function showLoss(steps, loops, binned, shared, where, began, sampled) {
  const stage = binned.map(bin => mean(bin, at => steps[at].loss));
  const curves = Array.from({ length: loops }, (_, loop) =>
    binned.map(bin => mean(bin, at => steps[at].loss_per_loop[loop])),
  );
  let low = Infinity,
    high = -Infinity;
  for (const curve of [stage, ...curves])
    for (const value of curve) {
      if (finite(value)) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
  if (!finite(low)) {
    low = 0;
    high = 1;
  }
  if (!(high > low)) {
    low -= 0.5;
    high += 0.5;
  }
  const pad = (high - low) * 0.03,
    skipped = steps.filter(record => record.skipped || !finite(record.loss)).map(record => record.step);
  [low, high] = [low - pad, high + pad];
  const { xs } = shared,
    digits = high - low < 0.05 ? 4 : high - low < 0.5 ? 3 : 2;
  lossChart.show({
    ...shared,
    paint: frame => {
      const y = value => frame.top + ((high - value) / (high - low)) * (frame.bottom - frame.top);
      yAxis(frame, ticks(low, high, 5), y, value => value.toFixed(digits - 1));
      paintBeginnings(frame, began);
      const place = values => values.map((value, at) => [xs[at], value]);
      frame.svg.append(shape("path", { class: "curve stage", d: line(place(stage), frame.x, y) }));
      curves.forEach((curve, loop) =>
        frame.svg.append(
          shape("path", {
            class: loops > 12 ? "curve thin" : "curve",
            d: line(place(curve), frame.x, y),
            color: ramp(loop, loops),
          }),
        ),
      );
      const ends = named(loops).map(loop => ({
        text: `${loop + 1}`,
        y: y(curves[loop].findLast(finite) ?? NaN),
        weight: loop === loops - 1 ? 99 : -loop,
      }));
      for (const label of spread(
        ends.filter(end => finite(end.y)),
        frame.top,
        frame.bottom,
        11,
      )) {
        frame.svg.append(shape("text", { x: frame.right + 5, y: label.y + 4 }, label.text));
      }
      const crosses = skipped
        .map(step => {
          const x = frame.x(step).toFixed(1);
          return `M${x} ${frame.bottom - 9}v8`;
        })
        .join("");
      if (crosses) frame.svg.append(shape("path", { class: "skipped", d: crosses }));
    },
    read: at => {
      const newest = steps[steps.length - 1];
      set(
        $("loss-when"),
        at === null ? `Step ${whole(newest.step)}, nats per token:` : `${where(at)}, nats per token:`,
      );
      const value = loop => (at === null ? newest.loss_per_loop[loop] : curves[loop][at]);
      const entries = [
        ["stage", "Stage I loss", at === null ? newest.loss : stage[at]],
        ...named(loops).map(loop => [`${loop}/${loops}`, `loop ${loop + 1}`, value(loop), ramp(loop, loops)]),
      ];
      if (began.length) entries.push(["began", `new generation (${began.length})`]);
      if (skipped.length) entries.push(["skipped", `no loss, or skipped (${skipped.length})`]);
      sync(
        $("loss-legend"),
        entries,
        ([key]) => key,
        ([, , , color]) => {
          const item = make("li");
          item.append(make("span", undefined, { class: "mark stroke" }), make("span"));
          if (color) tint(item.firstChild, { "--color": color });
          return item;
        },
        (item, [key, name, number]) => {
          const kind = { stage: " dashes", began: " dots", skipped: " cross" }[key] ?? "";
          mark(item.firstChild, "class", `mark stroke${kind}`);
          set(item.lastChild, number === undefined ? name : `${name} ${fixed(number)}`);
        },
      );
    },
    words: at =>
      `${where(at)}: Stage I loss ${fixed(stage[at])}, ${named(loops)
        .map(loop => `loop ${loop + 1} ${fixed(curves[loop][at])}`)
        .join(", ")}`,
  });
  showTable($("loss-table"), ["Step", "Stage I loss", ...named(loops).map(loop => `Loop ${loop + 1}`)], () =>
    sampled.map(([, at]) => [
      where(at).replace(/^Steps? /, ""),
      fixed(stage[at], 4),
      ...named(loops).map(loop => fixed(curves[loop][at], 4)),
    ]),
  );
}

function showRate(steps, binned, shared, where, began, sampled) {
  const rates = binned.map(([from, to]) => {
    let tokens = 0,
      seconds = 0;
    for (let at = from; at < to; at++) {
      tokens += steps[at].step_tokens;
      seconds += steps[at].seconds;
    }
    return seconds > 0 ? tokens / seconds : NaN;
  });
  const high = Math.max(1, ...rates.filter(finite)) * 1.06;
  rateChart.show({
    ...shared,
    paint: frame => {
      const y = value => frame.bottom - (value / high) * (frame.bottom - frame.top);
      yAxis(frame, ticks(0, high, 4), y, compact);
      paintBeginnings(frame, began);
      const path = line(
        rates.map((rate, at) => [shared.xs[at], rate]),
        frame.x,
        y,
      );
      if (rates.every(finite)) {
        frame.svg.append(
          shape("path", {
            class: "under",
            d: `${path}L${frame.x(shared.xs.at(-1)).toFixed(1)} ${frame.bottom}L${frame.x(shared.xs[0]).toFixed(1)} ${frame.bottom}z`,
          }),
        );
      }
      frame.svg.append(shape("path", { class: "curve", d: path, color: "var(--productive)" }));
    },
    read: at => {
      const newest = steps[steps.length - 1];
      set(
        $("rate-when"),
        at === null
          ? `Step ${whole(newest.step)}: ${compact(newest.step_tokens / newest.seconds)} tokens/s in ${millis(newest.seconds)}`
          : `${where(at)}: ${compact(rates[at])} tokens/s`,
      );
    },
    words: at => `${where(at)}: ${compact(rates[at])} tokens per second`,
  });
  showTable($("rate-table"), ["Step", "Tokens per second"], () =>
    sampled.map(([, at]) => [where(at).replace(/^Steps? /, ""), compact(rates[at])]),
  );
}

function showExitArea(steps, binned, shared, where, sampled) {
  const loops = steps.reduce((most, record) => Math.max(most, record.exit_pdf.length), 0);
  if (loops < 2) {
    exitChart.show({
      note: loops ? "One loop: every token leaves after it." : "No exit distribution yet.",
      read: () => showExits(state.status.last),
    });
    showTable($("exit-table"));
    return;
  }
  // A step without a usable slot has no distribution (null); one with fewer loops has zeros behind them.
  const shares = Array.from({ length: loops }, (_, loop) =>
    binned.map(bin => mean(bin, at => (loop < steps[at].exit_pdf.length ? steps[at].exit_pdf[loop] : 0))),
  );
  const drawn = binned.map((_, at) => at).filter(at => shares.every(share => finite(share[at])));
  exitChart.show({
    ...shared,
    paint: frame => {
      const y = share => frame.bottom - share * (frame.bottom - frame.top);
      yAxis(frame, [0, 0.25, 0.5, 0.75, 1], y, share => `${share * 100} %`);
      if (!drawn.length) return;
      // Each reaches down to the axis and covers those above it: no seams between neighbours.
      const group = shape("g", { class: "exit" }),
        below = drawn.map(() => 0),
        labels = [];
      const ends = [drawn[0], drawn[drawn.length - 1]].map(at => frame.x(shared.xs[at]).toFixed(1));
      shares.forEach((share, loop) => {
        const from = below[below.length - 1];
        const over = drawn.map(
          (at, place) => `${frame.x(shared.xs[at]).toFixed(1)} ${y((below[place] += share[at])).toFixed(1)}`,
        );
        group.prepend(
          shape("path", {
            class: loops > 12 ? "area" : "area band",
            d: `M${over.join("L")}L${ends[1]} ${frame.bottom}L${ends[0]} ${frame.bottom}z`,
            color: ramp(loop, loops),
          }),
        );
        labels.push({
          text: `${loop + 1}`,
          y: y((from + below[below.length - 1]) / 2),
          weight: below[below.length - 1] - from,
        });
      });
      frame.svg.append(group);
      const few = new Set(named(loops).map(loop => `${loop + 1}`));
      for (const label of spread(
        labels.filter(label => few.has(label.text)),
        frame.top + 4,
        frame.bottom - 2,
        12,
      )) {
        frame.svg.append(shape("text", { x: frame.right + 5, y: label.y + 4 }, label.text));
      }
    },
    read: at =>
      at === null
        ? showExits(state.status.last)
        : showExits({ exit_pdf: shares.map(share => share[at]) }, where(at)),
    words: at =>
      `${where(at)}: ${named(loops)
        .map(loop => `loop ${loop + 1} ${percent(shares[loop][at])}`)
        .join(", ")}`,
  });
  showTable($("exit-table"), ["Step", ...named(loops).map(loop => `Loop ${loop + 1}`)], () =>
    sampled.map(([, at]) => [
      where(at).replace(/^Steps? /, ""),
      ...named(loops).map(loop => percent(shares[loop][at])),
    ]),
  );
}

function showExits(record, when) {
  const pdf = record?.exit_pdf ?? [];
  set($("exit-when"), when ?? (record ? `Step ${whole(record.step)}` : "Newest step"));
  sync(
    $("exits"),
    pdf.flatMap((share, at) => ["name", "bar", "number"].map(part => ({ part, share, at }))),
    cell => `${cell.part} ${cell.at}/${pdf.length}`,
    cell => {
      if (cell.part === "name") return make("span", `loop ${cell.at + 1}`);
      if (cell.part === "number") return make("span", undefined, { class: "number" });
      const bar = make("div", undefined, { class: "bar" });
      bar.append(tint(make("i"), { "--color": ramp(cell.at, pdf.length) }));
      return bar;
    },
    (node, cell) => {
      if (cell.part === "bar")
        tint(node.firstChild, { "--part": `${(finite(cell.share) ? cell.share * 100 : 0).toFixed(2)}%` });
      else if (cell.part === "number") set(node, percent(cell.share));
    },
  );
}
