// What the page knows.

export const state = { status: null, heard: 0, era: "", steps: [], link: "connecting", lost: 0, why: "" };

// The coordinator's clock, as far as it can be told.
export const now = () =>
  state.status.now_unix_ms + (state.link === "unreachable" ? 0 : performance.now() - state.heard);
export const ended = () => state.status.phase === "finished" || state.status.phase === "failed";
