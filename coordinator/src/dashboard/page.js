// The status page: takes what the coordinator says and shows it, section by section.

import {
  $,
  make,
  set,
  mark,
  sync,
  finite,
  whole,
  fixed,
  compact,
  percent,
  si,
  plural,
  span,
  moment,
  timeNode,
} from "./parts.js";
import { KINDS, showGoodput, showGenerations } from "./timeline.js";
import { showCheckpoints, showLoops, showWorkers, showEvaluations, listenToTables } from "./tables.js";
import { showSteps } from "./curves.js";
import { state, now, ended } from "./state.js";
import { watch } from "./live.js";

// Steps that the page keeps; of older ones every second goes.
const STEPS = 6000;
// How often the page is drawn at most, and how often a problem is read out.
const DRAW_MS = 1000;
const SAY_MS = 10_000;

function showHead() {
  const status = state.status,
    gone = state.link === "unreachable";
  set(
    $("link-text"),
    { live: "live", polling: "asking once a second", unreachable: "unreachable", connecting: "connecting" }[
      state.link
    ],
  );
  mark($("link"), "data-state", state.link);
  document.body.classList.toggle("old", gone && status !== null);
  const over = status !== null && ended();
  const phase = gone && !over ? "unreachable" : (status?.phase ?? "connecting");
  const sign = { failed: "✗ ", unreachable: "✗ ", finished: "✓ " }[phase] ?? "";
  set($("phase"), sign + phase);
  mark($("phase"), "class", `phase ${phase}`);
  set(
    $("reason"),
    !status ? "" : gone && !over ? `when last heard: ${status.phase}, ${status.reason}` : status.reason,
  );
  $("gone").hidden = !gone;
  if (gone) {
    set(
      $("gone-text"),
      !status
        ? "The coordinator is unreachable."
        : over
          ? `The coordinator is gone. The run had ${status.phase} when it was last heard.`
          : "The coordinator is unreachable. These are its last values.",
    );
    showGoneAge();
  }
  if (!status) return;
  const share = status.total_steps ? Math.floor((status.step / status.total_steps) * 100) : 0;
  const title = `${sign}${share}% ${status.run}: step ${status.step} of ${status.total_steps}`;
  if (document.title !== title) document.title = title;
  set($("run"), status.run);
  set($("coordinator"), `Coordinator ${status.incarnation} of this run.`);
}

function showGoneAge() {
  const since = state.status
    ? `Last heard ${span((Date.now() - state.lost) / 1000)} ago, at ${moment(state.lost)}. `
    : "";
  set($("gone-age"), `${since}Trying again.${state.why ? ` It said: ${state.why}` : ""}`);
}

function figures() {
  const status = state.status,
    last = status.last,
    rate = status.tokens_per_second;
  const done = status.step >= status.total_steps && status.total_steps > 0;
  const left = last && rate > 0 ? ((status.total_steps - status.step) * last.step_tokens) / rate : NaN;
  const members = status.workers.filter(worker => worker.rank !== null).length;
  const spares = status.workers.length - members;
  const slow = status.workers.filter(worker => worker.straggles_in).length;
  const goodput = status.goodput;
  const spent = goodput ? KINDS.reduce((sum, [key]) => sum + (goodput.seconds[key] ?? 0), 0) : 0;
  const generation = (status.generations ?? []).at(-1);
  const saved = status.checkpoint_step,
    behind = status.step - saved;
  const risk =
    finite(status.checkpoint_unix_ms) && saved !== null
      ? `, ${span((now() - status.checkpoint_unix_ms) / 1000)} ago`
      : "";
  const damaged = (status.checkpoints ?? []).some(checkpoint => checkpoint.state === "damaged");
  return [
    [
      "Step",
      whole(status.step),
      `of ${whole(status.total_steps)}, ${percent(status.step / Math.max(1, status.total_steps))}`,
    ],
    [
      "Loss",
      last ? fixed(last.loss, 4) : "–",
      last?.skipped ? "newest step skipped" : "nats per token",
      Boolean(last?.skipped),
    ],
    ["Tokens per second", rate > 0 ? compact(rate) : "–", last ? `${compact(last.step_tokens)} a step` : ""],
    [
      "Time left",
      done ? "done" : span(left),
      done || !finite(left) ? "" : `until ${moment(now() + left * 1000)}`,
    ],
    ["Goodput", goodput ? percent(goodput.share) : "–", spent > 0 ? `of ${span(spent)} worker time` : ""],
    [
      "Workers",
      whole(members),
      [spares ? `+ ${plural(spares, "spare")}` : "", slow ? `${slow} slow` : ""].filter(Boolean).join(", "),
      slow > 0,
    ],
    ["Tokens", compact(status.tokens ?? last?.tokens ?? 0), "in all"],
    [
      "Generation",
      whole(status.generation),
      generation?.generation === status.generation && !ended()
        ? `for ${span((now() - generation.unix_ms) / 1000)}`
        : "",
    ],
    [
      "Checkpoint",
      saved === null ? "none yet" : `step ${whole(saved)}`,
      damaged
        ? "a damaged one is there"
        : status.saving_step !== null
          ? `saving ${whole(status.saving_step)}`
          : saved === null
            ? ""
            : `${plural(behind, "step")}${risk}`,
      damaged,
    ],
    ["Learning rate", last ? last.lr.toExponential(2) : "–", ""],
    ["Gradient norm", last ? fixed(last.grad_norm) : "–", "before clipping"],
    [
      "Compute",
      last && last.flops > 0 && last.seconds > 0 ? `${si(last.flops / last.seconds)}FLOP/s` : "–",
      last && finite(last.mfu) ? `MFU ${percent(last.mfu)}` : last ? "MFU not known" : "",
    ],
  ];
}

function showFigures() {
  sync(
    $("figures"),
    figures(),
    ([name]) => name,
    ([name]) => {
      const box = make("div", undefined, { "data-figure": name });
      box.append(
        make("dt", name),
        make("dd", undefined, { class: "value" }),
        make("dd", undefined, { class: "detail" }),
      );
      return box;
    },
    (box, [, value, detail, bad]) => {
      set(box.children[1], value);
      set(box.children[2], detail);
      mark(box.children[2], "class", bad ? "detail bad" : "detail");
    },
  );
  const bar = $("progress");
  bar.max = Math.max(1, state.status.total_steps);
  bar.value = state.status.step;
}

let newestSaid = null,
  saidAt = 0;

function showEvents() {
  const events = state.status.events ?? [];
  sync(
    $("events"),
    events,
    event => `${event.unix_ms} ${event.text}`,
    event => {
      const node = make("li", undefined, { class: event.tone });
      node.append(
        timeNode(event.unix_ms),
        make("span", { good: "✓", bad: "✗", plain: "·" }[event.tone] ?? "·", { class: "sign" }),
        make("span", event.text, { class: "what" }),
      );
      return node;
    },
  );
  const bad = events.filter(event => event.tone === "bad"),
    only = $("problems").getAttribute("aria-pressed") === "true";
  set($("problems"), `Problems only (${bad.length})`);
  $("events").classList.toggle("problems", only);
  $("events").hidden = !events.length || (only && !bad.length);
  set(
    $("no-events"),
    !events.length
      ? "Nothing has happened yet."
      : only && !bad.length
        ? `No problem among the newest ${plural(events.length, "event")}.`
        : "",
  );
  // Read out what is bad and new, and no more than now and then.
  const newest = bad[0]?.unix_ms ?? 0;
  if (newestSaid === null) newestSaid = newest;
  else if (newest > newestSaid && Date.now() - saidAt > SAY_MS) {
    [newestSaid, saidAt] = [newest, Date.now()];
    set($("news"), bad[0].text);
  }
}

let drawn = 0,
  planned = null;

function draw() {
  clearTimeout(planned);
  planned = null;
  if (document.hidden) return showHead();
  drawn = performance.now();
  showHead();
  if (!state.status) return;
  showFigures();
  showGoodput();
  showEvents();
  showSteps();
  showGenerations();
  showCheckpoints();
  showWorkers();
  showLoops();
  showEvaluations();
}

function changed() {
  const wait = drawn + DRAW_MS - performance.now();
  if (wait <= 0 || !drawn) draw();
  else planned ??= setTimeout(draw, wait);
}

// What the charts need of a step record; a page that is open for days keeps thousands.
function lean(record) {
  const { step, generation, loss, loss_per_loop, exit_pdf, step_tokens, seconds, skipped } = record;
  return { step, generation, loss, loss_per_loop, exit_pdf, step_tokens, seconds, skipped };
}

watch({
  newest: () => (state.steps.length ? state.steps[state.steps.length - 1].step : 0),
  status(status) {
    // Steps that were undone, another coordinator, another run: all of them begin anew.
    const era = `${status.run} ${status.incarnation} ${status.rewinds}`,
      forgot = era !== state.era;
    if (forgot) [state.era, state.steps] = [era, []];
    [state.status, state.heard] = [status, performance.now()];
    if (state.link === "unreachable") this.link("connecting");
    changed();
    return forgot;
  },
  steps(records) {
    for (const record of records) if (record.step > this.newest()) state.steps.push(lean(record));
    if (state.steps.length > STEPS) {
      const half = state.steps.length / 2;
      state.steps = state.steps.filter((_, at) => at > half || at % 2 === 0);
    }
    changed();
  },
  link(link, why = "") {
    if (link === "unreachable" && state.link !== "unreachable")
      state.lost = Date.now() - (state.status ? performance.now() - state.heard : 0);
    if (link === state.link && why === state.why) return;
    [state.link, state.why] = [link, why];
    if (document.hidden || !state.status) showHead();
    else draw();
  },
});

$("range").addEventListener("change", draw);
$("problems").addEventListener("click", event => {
  mark(event.currentTarget, "aria-pressed", `${event.currentTarget.getAttribute("aria-pressed") !== "true"}`);
  draw();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) draw();
});
listenToTables(draw);
setInterval(() => {
  if (state.link === "unreachable") showGoneAge();
}, 1000);
