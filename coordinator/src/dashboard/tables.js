// Checkpoints, workers, loops and evaluations, as tables.

import {
  $,
  make,
  tint,
  set,
  mark,
  sync,
  row,
  showRows,
  finite,
  whole,
  fixed,
  percent,
  size,
  millis,
  short,
  plural,
  span,
  moment,
} from "./parts.js";
import { state, now } from "./state.js";

// Rows of the workers' table until somebody asks for all.
const WORKERS = 100;
// How often all of them are brought up to date.
const ALL_WORKERS_MS = 4000;
const SECTIONS = [
  ["Data wait", "--data_wait", s => s.data_wait],
  ["Compute", "--productive", s => s.compute],
  ["Send", "--recomputed", s => s.send],
  ["Rest of reduce", "--waiting", s => Math.max(0, s.reduce - s.send)],
  ["Optimizer", "--start_up", s => s.optimizer],
];
const CHECKPOINT = {
  written: ["○", "written", "plain"],
  verified: ["✓", "verified", "good"],
  damaged: ["✗", "damaged", "bad"],
};

export function showCheckpoints() {
  const status = state.status,
    checkpoints = status.checkpoints ?? [];
  const verified = checkpoints.findLast(checkpoint => checkpoint.state === "verified");
  const damaged = checkpoints.filter(checkpoint => checkpoint.state === "damaged").length;
  set(
    $("checkpoints-text"),
    [
      status.saving_step !== null ? `Saving step ${whole(status.saving_step)}.` : "",
      checkpoints.length
        ? verified
          ? `Newest verified: step ${whole(verified.step)}.`
          : "None is verified yet."
        : "",
      damaged ? `${damaged} damaged.` : "",
    ]
      .filter(Boolean)
      .join(" "),
  );
  $("checkpoints-scroll").hidden = !checkpoints.length;
  if (!checkpoints.length) {
    set(
      $("checkpoints-text"),
      status.saving_step !== null
        ? `Saving step ${whole(status.saving_step)}; there is none before it.`
        : status.checkpoint_step === null
          ? "There is none yet. A run that is lost before its first begins anew."
          : `The newest is of step ${whole(status.checkpoint_step)}.`,
    );
  }
  sync(
    $("checkpoints"),
    [...checkpoints].reverse(),
    item => `${item.step} ${item.unix_ms}`,
    () => {
      const node = row(["", "", "", ""], ["n", "n", "n", ""], 0);
      node.children[3].append(make("span", undefined, { class: "sign" }), make("span"));
      return node;
    },
    (node, item) => {
      const [sign, words, tone] = CHECKPOINT[item.state] ?? ["?", item.state, "plain"];
      mark(node, "data-step", `${item.step}`);
      set(node.children[0], whole(item.step));
      set(node.children[1], size(item.bytes));
      set(node.children[2], span((now() - item.unix_ms) / 1000));
      mark(node.children[2], "title", moment(item.unix_ms));
      set(node.children[3].firstChild, `${sign} `);
      set(node.children[3].lastChild, words);
      mark(node.children[3], "class", `state-of ${tone}`);
    },
  );
}

export function showLoops() {
  const last = state.status.last;
  set(
    $("depth"),
    !last
      ? ""
      : !finite(last.mean_depth)
        ? "Not known of the newest step."
        : `Mean exit after ${fixed(last.mean_depth, 2)} loops, entropy ${fixed(last.entropy, 2)} nats`,
  );
  showRows(
    $("loops"),
    (last?.loss_per_loop ?? []).map((loss, at) => [
      `loop ${at + 1}`,
      fixed(loss, 4),
      fixed(last.loss_rise_per_loop?.[at], 4),
      percent(last.agreement_per_loop?.[at]),
      fixed(last.hidden_rms_per_loop?.[at], 2),
      fixed(last.gradient_norm_per_loop?.[at], 4),
    ]),
    ["", "n", "n", "n", "n", "n"],
    "What each loop does is known with the first step.",
  );
}

let allWorkers = false,
  allDrawn = -Infinity;

export function showWorkers() {
  // Thousands of cells are not laid out anew each second.
  if (allWorkers && state.status.workers.length > WORKERS && performance.now() - allDrawn < ALL_WORKERS_MS)
    return;
  allDrawn = performance.now();
  const workers = state.status.workers,
    sections = workers.map(worker => worker.sections ?? {});
  const total = section => SECTIONS.reduce((sum, [, , seconds]) => sum + (seconds(section) || 0), 0);
  const most = Math.max(1e-9, ...sections.map(total));
  const members = workers.filter(worker => worker.rank !== null).length;
  const slow = workers.filter(worker => worker.straggles_in);
  const some = slow
    .slice(0, 3)
    .map(worker => `${short(worker.name)} (${worker.straggles_in})`)
    .join(", ");
  set(
    $("workers-text"),
    !workers.length
      ? ""
      : [
          `${plural(members, "member")}, ${plural(workers.length - members, "spare")}`,
          slow.length ? `slow: ${some}${slow.length > 3 ? ` and ${slow.length - 3} more` : ""}` : "",
        ]
          .filter(Boolean)
          .join("; "),
  );
  const rank = worker => worker.rank ?? Infinity;
  const by = {
    rank: (a, b) => rank(a) - rank(b) || a.id - b.id,
    compute: (a, b) => (b.sections?.compute ?? 0) - (a.sections?.compute ?? 0),
    heard: (a, b) => b.seconds_since_heard - a.seconds_since_heard,
  }[$("order").value];
  const sorted = [...workers].sort(by),
    shown = allWorkers ? sorted : sorted.slice(0, WORKERS);
  $("all-workers").hidden = workers.length <= WORKERS;
  set($("all-workers"), allWorkers ? `Show ${WORKERS}` : `Show all ${whole(workers.length)}`);
  const body = $("workers");
  if (!shown.length) {
    showRows(body, [], Array(12).fill(""), "No worker is here.");
    return;
  }
  if (!body.kept) body.replaceChildren();
  sync(
    body,
    shown,
    worker => `${worker.id} ${worker.name}`,
    worker => {
      const node = row(
        Array(12).fill(""),
        ["name", "", "", "n", "n", "n", "n", "n", "n", "n", "n", "name"],
        0,
      );
      mark(node, "data-worker", worker.name);
      node.children[0].append(make("span", worker.name), make("span", undefined, { class: "badge" }));
      const box = make("div", undefined, { class: "sections" }),
        stack = make("span", undefined, { class: "stack", role: "img" });
      for (const [, color] of SECTIONS) stack.append(tint(make("i"), { "--color": `var(${color})` }));
      box.append(stack, make("span", undefined, { class: "number" }));
      node.children[1].append(box);
      return node;
    },
    (node, worker) => {
      const s = total(worker.sections ?? {}) > 0 ? worker.sections : {},
        cells = node.children,
        badge = cells[0].lastChild;
      const spare = worker.rank === null ? (worker.warm ? "warm spare" : "waits for a place") : "";
      set(badge, worker.straggles_in ? `slow: ${worker.straggles_in}` : spare);
      badge.hidden = badge.textContent === "";
      mark(badge, "class", worker.straggles_in ? "badge slow" : "badge");
      const [stack, sum] = cells[1].firstChild.children;
      const words = [];
      SECTIONS.forEach(([name, , seconds], at) => {
        const value = seconds(s) || 0;
        tint(stack.children[at], { "--part": `${((value / most) * 100).toFixed(1)}%` });
        words.push(`${name} ${millis(value)}`);
      });
      mark(stack, "aria-label", words.join(", "));
      set(sum, total(s) > 0 ? millis(total(s)) : "–");
      [
        worker.rank === null ? "–" : `${worker.rank}`,
        whole(worker.slots),
        millis(s.data_wait),
        millis(s.compute),
        millis(s.reduce),
        millis(s.send),
        millis(s.optimizer),
        worker.slots_per_second >= 100
          ? whole(Math.round(worker.slots_per_second))
          : fixed(worker.slots_per_second, 1),
        `${fixed(worker.seconds_since_heard, 1)} s ago`,
        worker.host,
      ].forEach((text, at) => set(cells[at + 2], text));
    },
  );
}

export function showEvaluations() {
  const evaluations = state.status.evaluations ?? [];
  $("validation").hidden = evaluations.length === 0;
  $("halves").classList.toggle("alone", evaluations.length === 0);
  if (!evaluations.length) return;
  const loops = evaluations[evaluations.length - 1].loss_per_loop.length;
  const names = [
    "Step",
    "Loss",
    ...Array.from({ length: loops }, (_, at) => `Loop ${at + 1}`),
    "Perplexity",
    "Mean exit",
  ];
  const head = $("evaluation-head");
  if (head.names !== names.length) {
    head.names = names.length;
    const top = make("tr");
    names.forEach(name => top.append(make("th", name, { class: "n", scope: "col" })));
    head.replaceChildren(top);
  }
  showRows(
    $("evaluations"),
    evaluations
      .slice(-12)
      .reverse()
      .map(e => [
        whole(e.step),
        fixed(e.loss, 4),
        ...Array.from({ length: loops }, (_, at) => fixed(e.loss_per_loop[at], 4)),
        fixed(e.perplexity, 2),
        fixed(e.mean_depth, 2),
      ]),
    names.map(() => "n"),
    "",
  );
}

// `redraw` is called when somebody asks for other rows.
export function listenToTables(redraw) {
  $("order").addEventListener("change", () => {
    allDrawn = -Infinity;
    redraw();
  });
  $("all-workers").addEventListener("click", () => {
    [allWorkers, allDrawn] = [!allWorkers, -Infinity];
    redraw();
  });
  sync(
    $("section-legend"),
    SECTIONS,
    ([name]) => name,
    ([name, color]) => {
      const item = make("li");
      item.append(
        tint(make("span", undefined, { class: "mark" }), { "--color": `var(${color})` }),
        make("span", name),
      );
      return item;
    },
  );
}
