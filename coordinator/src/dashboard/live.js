// Where the page's values come from: the coordinator's stream of events, or, when that does not
// come through, its JSON once a second. A coordinator that is gone is asked again until another
// one answers at its address.
//
// `page` takes what comes: `status(status)`, `steps(records)`, `link(state, why)`. It says which
// step is its newest (`newest()`), and `status` answers whether it had to forget its steps.

// The stream says something every 5 s; after this long it is dead, whatever TCP thinks.
const SILENCE_MS = 12_000;
const ANSWER_MS = 6_000;
// A stream that did not come through (an old coordinator, a proxy that holds it back) is tried
// again now and then, while the JSON is asked.
const STREAM_AGAIN_MS = 30_000;
// Browsers open six connections to a host; a page that nobody looks at gives its one back.
const HIDDEN_MS = 60_000;
const HIDDEN_POLL_MS = 15_000;

const sleep = ms => new Promise(wake => setTimeout(wake, ms));

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(ANSWER_MS), cache: "no-store" });
  if (!answer.ok) throw new Error((await answer.text()).slice(0, 200));
  return answer.json();
}

async function fetchSteps(page) {
  for (;;) {
    const more = await ask(`api/steps?after=${page.newest()}`);
    page.steps(more);
    if (more.length < 1000) return;
  }
}

// Until the stream breaks, is silent, or belongs to a past that was undone. Answers whether it
// ever said anything.
function stream(page) {
  return new Promise(resolve => {
    const source = new EventSource(`api/live?after=${page.newest()}`);
    let spoke = false,
      silence,
      hidden;
    const end = () => {
      source.close();
      clearTimeout(silence);
      clearTimeout(hidden);
      document.removeEventListener("visibilitychange", look);
      resolve(spoke);
    };
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(end, SILENCE_MS);
    };
    const look = () => {
      clearTimeout(hidden);
      if (document.hidden) hidden = setTimeout(end, HIDDEN_MS);
    };
    document.addEventListener("visibilitychange", look);
    heard();
    look();
    // The browser would come again by itself, but with the old `after`.
    source.onerror = end;
    source.addEventListener("status", event => {
      heard();
      spoke = true;
      page.link("live");
      // After a rewind the steps are fetched anew, and the stream begins behind them.
      if (page.status(JSON.parse(event.data))) end();
    });
    source.addEventListener("steps", event => {
      heard();
      page.steps(JSON.parse(event.data));
    });
  });
}

function untilVisible(ms) {
  return new Promise(resolve => {
    const done = () => {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    document.addEventListener("visibilitychange", done);
  });
}

// Never returns.
export async function watch(page) {
  let streamAgain = 0,
    pause = 1000;
  for (;;) {
    try {
      page.status(await ask("api/status"));
      if (document.hidden) {
        page.link("polling");
        await untilVisible(HIDDEN_POLL_MS);
        continue;
      }
      await fetchSteps(page);
      pause = 1000;
      if (Date.now() < streamAgain) {
        page.link("polling");
        await sleep(1000);
      } else if (!(await stream(page))) {
        streamAgain = Date.now() + STREAM_AGAIN_MS;
      } else {
        await sleep(200);
      }
    } catch (error) {
      page.link(
        "unreachable",
        error instanceof TypeError || error.name === "TimeoutError" ? "" : error.message,
      );
      await sleep(pause);
      pause = Math.min(pause * 1.5, 5000);
    }
  }
}
