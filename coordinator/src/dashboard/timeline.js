// What is drawn over time: where the workers' time went, and the generations.

import {
  $,
  make,
  tint,
  set,
  mark,
  sync,
  whole,
  compact,
  percent,
  plural,
  span,
  moment,
  timeNode,
  showTable,
} from "./parts.js";
import { Chart, bins, shape, ticks, yAxis } from "./charts.js";
import { state, now, ended } from "./state.js";

export const KINDS = [
  ["productive", "Productive"],
  ["recomputed", "Recomputed"],
  ["waiting", "Waiting"],
  ["recovering", "Recovering"],
  ["checkpoint_stall", "Checkpoint stall"],
  ["data_wait", "Data wait"],
  ["start_up", "Start-up"],
  ["idle", "Idle"],
];

const goodputChart = new Chart($("goodput-chart"), { height: 170, left: 34 });

function showKinds(seconds) {
  const sum = seconds.reduce((all, value) => all + value, 0);
  sync(
    $("goodput-kinds"),
    KINDS.map((kind, at) => [...kind, seconds[at]]),
    ([key]) => key,
    ([key, name]) => {
      const item = make("li", undefined, { "data-kind": key });
      const bold = make("b", name);
      item.append(
        tint(make("span", undefined, { class: "mark" }), { "--color": `var(--${key})` }),
        bold,
        make("span", undefined, { class: "amount" }),
      );
      return item;
    },
    (item, [, , value]) =>
      set(
        item.children[2],
        `${sum > 0 ? percent(value / sum) : "–"} · ${value > 0 && value < 10 ? `${value.toFixed(1)} s` : span(value)}`,
      ),
  );
}

export function showGoodput() {
  const goodput = state.status.goodput ?? null;
  const seconds = KINDS.map(([key]) => goodput?.seconds[key] ?? 0);
  const sum = seconds.reduce((all, value) => all + value, 0);
  $("goodput-body").hidden = !(sum > 0);
  if (goodput === null) {
    set($("goodput-text"), "This coordinator does not say where the workers' time goes.");
    return;
  }
  set(
    $("goodput-text"),
    sum > 0
      ? `${percent(goodput.share)} of ${span(sum)} worker time went into steps that count, since ${moment(goodput.since_unix_ms)}`
      : "No worker has spent time on this run yet.",
  );
  if (!(sum > 0)) return;
  const parts = KINDS.map(([key, name], at) => ({ key, name, share: seconds[at] / sum })).filter(
    part => part.share > 0,
  );
  sync(
    $("goodput-share"),
    parts,
    part => part.key,
    part => tint(make("span"), { "--color": `var(--${part.key})`, "--on": `var(--on-${part.key})` }),
    (node, part) => {
      tint(node, { "flex-basis": `${(part.share * 100).toFixed(3)}%` });
      mark(node, "title", `${part.name} ${percent(part.share)}`);
      set(
        node,
        part.share >= 0.3
          ? `${part.name} ${percent(part.share)}`
          : part.share >= 0.08
            ? percent(part.share)
            : "",
      );
    },
  );
  mark($("goodput-share"), "aria-label", parts.map(part => `${part.name} ${percent(part.share)}`).join(", "));

  const { begin_unix_ms: begin, bucket_ms: width, buckets = [] } = goodput.timeline ?? {};
  if (!buckets.length) {
    showTable($("goodput-table"));
    goodputChart.show({ note: "There is no timeline yet.", read: () => showKinds(seconds) });
    return;
  }
  // The newest bucket is not over: it counts for as long as it has lasted.
  const until = at =>
    Math.max(
      begin + at * width + 1,
      Math.min(begin + (at + 1) * width, at === buckets.length - 1 ? state.status.now_unix_ms : Infinity),
    );
  const lasted = at => (until(at) - begin - at * width) / 1000;
  const workers = buckets.map((bucket, at) => bucket.reduce((all, value) => all + value, 0) / lasted(at));
  const high = Math.max(1, ...workers);
  const when = at => `${moment(begin + at * width)} to ${moment(until(at))}`;
  goodputChart.show({
    time: true,
    low: begin,
    high: begin + buckets.length * width,
    xs: buckets.map((_, at) => begin + (at + 0.5) * width),
    paint: frame => {
      const y = value => frame.bottom - (value / high) * (frame.bottom - frame.top);
      yAxis(frame, ticks(0, high, 4).filter(Number.isInteger), y, compact);
      const wide = (frame.right - frame.left) / buckets.length,
        gap = wide > 5 ? 1 : 0;
      const tops = buckets.map(() => 0);
      KINDS.forEach(([key], kind) => {
        let path = "";
        buckets.forEach((bucket, at) => {
          const value = (bucket[kind] ?? 0) / lasted(at);
          if (!(value > 0)) return;
          const from = y(tops[at]),
            to = y((tops[at] += value));
          path += `M${(frame.left + at * wide).toFixed(2)} ${from.toFixed(2)}V${to.toFixed(2)}h${(wide - gap).toFixed(2)}V${from.toFixed(2)}z`;
        });
        if (path) frame.svg.append(shape("path", { class: "area", d: path, color: `var(--${key})` }));
      });
    },
    read: at => {
      set($("goodput-when"), at === null ? "All of the run:" : `${when(at)}:`);
      showKinds(at === null ? seconds : KINDS.map((_, kind) => buckets[at][kind] ?? 0));
    },
    words: at =>
      `${when(at)}: ${
        KINDS.map(([, name], kind) => [name, buckets[at][kind]])
          .filter(([, value]) => value > 0)
          .map(([name, value]) => `${name} ${span(value)}`)
          .join(", ") || "no worker"
      }`,
  });
  showTable($("goodput-table"), ["Time", ...KINDS.map(([, name]) => name)], () =>
    bins(buckets.length, 12).map(([from, to]) => [
      moment(begin + from * width),
      ...KINDS.map((_, kind) =>
        span(buckets.slice(from, to).reduce((all, bucket) => all + (bucket[kind] ?? 0), 0)),
      ),
    ]),
  );
}

const generationChart = new Chart($("generation-chart"), { height: 110, left: 34 });

export function showGenerations() {
  const generations = state.status.generations ?? [];
  set(
    $("generations-text"),
    !generations.length
      ? ""
      : `${plural(generations.length, "generation")}${generations[0].generation > 1 ? " kept" : ""}`,
  );
  // A run that is over did not go on until now.
  const end = Math.max(
    ended() ? (state.status.events[0]?.unix_ms ?? 0) : now(),
    (generations.at(-1)?.unix_ms ?? 0) + 1,
  );
  const until = at => generations[at + 1]?.unix_ms ?? end;
  const change = at => (at === 0 ? 0 : generations[at].world - generations[at - 1].world);
  const signed = number => (number > 0 ? ` (+${number})` : number < 0 ? ` (−${-number})` : "");
  const words = at => {
    const { generation, world, step } = generations[at];
    return `Generation ${whole(generation)}: ${plural(world, "worker")}${signed(change(at))} from step ${whole(step)}`;
  };
  if (!generations.length) {
    generationChart.show({
      note: state.status.generations
        ? "No generation has formed yet."
        : "This coordinator does not list them.",
      read: () => set($("generation-when"), ""),
    });
  } else {
    const high = generations.reduce((most, { world }) => Math.max(most, world), 1);
    generationChart.show({
      time: true,
      low: generations[0].unix_ms,
      high: end,
      xs: generations.map(({ unix_ms }, at) => (unix_ms + until(at)) / 2),
      paint: frame => {
        const y = value => frame.bottom - (value / high) * (frame.bottom - frame.top);
        yAxis(frame, ticks(0, high, 3).filter(Number.isInteger), y, compact);
        generations.forEach(({ generation, world, unix_ms }, at) => {
          const x = frame.x(unix_ms),
            wide = frame.x(until(at)) - x,
            top = y(world);
          const lesser = world < high;
          frame.svg.append(
            shape("rect", {
              class: lesser ? "area lesser" : "area",
              x: x.toFixed(2),
              y: top.toFixed(2),
              width: Math.max(0.75, wide - (wide > 3 ? 1 : 0)).toFixed(2),
              height: (frame.bottom - top).toFixed(2),
              color: "var(--productive)",
            }),
          );
          const label = whole(generation);
          if (wide > label.length * 7 + 8 && frame.bottom - top > 16) {
            frame.svg.append(
              shape(
                "text",
                {
                  class: lesser ? "inside on-lesser" : "inside",
                  x: (x + wide / 2).toFixed(1),
                  y: (top + 13).toFixed(1),
                  "text-anchor": "middle",
                },
                label,
              ),
            );
          }
        });
      },
      read: at =>
        set(
          $("generation-when"),
          at === null
            ? "Height: workers. Orange: fewer than the most."
            : `${words(at)}, for ${span((until(at) - generations[at].unix_ms) / 1000)}: ${generations[at].reason}`,
        ),
      words: at =>
        `${words(at)}, for ${span((until(at) - generations[at].unix_ms) / 1000)}: ${generations[at].reason}`,
    });
  }
  const lines = generations
    .map((generation, at) => ({
      ...generation,
      title: words(at),
      lasted: at === generations.length - 1 ? "" : ` for ${span((until(at) - generation.unix_ms) / 1000)}`,
    }))
    .reverse();
  sync(
    $("generations"),
    lines,
    item => `${item.generation} ${item.unix_ms}`,
    item => {
      const node = make("li", undefined, { "data-generation": `${item.generation}` });
      const when = make("span", undefined, { class: "quiet" });
      when.append(timeNode(item.unix_ms), make("span"));
      node.append(make("b"), when, make("span", undefined, { class: "why" }));
      return node;
    },
    (node, item) => {
      set(node.children[0], item.title);
      set(node.children[1].lastChild, item.lasted);
      set(node.children[2], item.reason);
    },
  );
}
