//! What a person sees while it runs: bars on a terminal, plain lines elsewhere; all on stderr.

use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, MultiProgress, ProgressBar, ProgressStyle};
use looptrain_coordinator::{EvaluationRecord, RunEvent, StepRecord};
use looptrain_proto::Step;
use looptrain_storage::PrepareEvent;

/// Plain output prints at most one line per this interval.
const LINE_INTERVAL: Duration = Duration::from_secs(2);
/// Weight of the newest step in the mean that rates and the remaining time are taken from.
const SMOOTHING: f64 = 0.1;

/// All bars of the process: lines printed meanwhile must pass above them.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// The time of day, UTC.
pub(crate) fn time_of_day(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// Prints a line on stderr without disturbing the bars.
pub(crate) fn print_line(line: &str) {
    // Nobody may be left to read it: a worker's parent, or the other end of a pipe.
    bars().suspend(|| drop(writeln!(std::io::stderr(), "{line}")));
}

fn on_terminal() -> bool {
    std::io::stderr().is_terminal()
}

fn bar(total: u64, template: &str) -> ProgressBar {
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bars().add(ProgressBar::new(total).with_style(style.progress_chars("━╸─")))
}

/// Lets one line through per interval.
struct Pace(Option<Instant>);

impl Pace {
    fn ready(&mut self) -> bool {
        let now = Instant::now();
        let ready = self.0.is_none_or(|last| now - last >= LINE_INTERVAL);
        if ready {
            self.0 = Some(now);
        }
        ready
    }
}

/// Progress of making one dataset.
pub(crate) struct PrepareProgress {
    name: String,
    bar: Option<ProgressBar>,
    pace: Pace,
    /// When the first text was done, and how many bytes then were.
    begun: Option<(Instant, u64)>,
}

impl PrepareProgress {
    pub(crate) fn new(name: &str) -> Self {
        let template = "{prefix} {bar:20.cyan/blue} {percent:>3}%  {wide_msg}";
        let bar = on_terminal().then(|| bar(1, template).with_prefix(format!("data {name}")));
        Self { name: name.to_owned(), bar, pace: Pace(None), begun: None }
    }

    pub(crate) fn show(&mut self, event: &PrepareEvent) {
        let (share, text, always) = match event {
            PrepareEvent::Collecting { files, bytes } => {
                let text =
                    format!("collecting: {} files, {}", HumanCount(*files), HumanBytes(*bytes));
                (None, text, false)
            }
            PrepareEvent::Collected { documents, bytes } => {
                let (documents, bytes) = (HumanCount(*documents), HumanBytes(*bytes));
                (None, format!("collected {documents} documents, {bytes}"), true)
            }
            PrepareEvent::TrainingTokenizer { bytes, vocabulary } => {
                let bytes = HumanBytes(*bytes);
                (None, format!("training a tokenizer of {vocabulary} entries on {bytes}"), true)
            }
            PrepareEvent::TokenizerTrained { vocabulary } => {
                (None, format!("tokenizer of {vocabulary} entries trained"), true)
            }
            PrepareEvent::Resumed { shards, tokens } => {
                let tokens = HumanCount(*tokens);
                (None, format!("going on behind {shards} shards with {tokens} tokens"), true)
            }
            PrepareEvent::Restarted => {
                let text = "what lies there is of other options or texts, or damaged; beginning anew \
                            beside it (it goes at the end)";
                (None, text.to_owned(), true)
            }
            PrepareEvent::Malformed { place, reason } => {
                print_line(&format!("data {}: {place} is malformed: {reason}", self.name));
                return;
            }
            PrepareEvent::Tokenizing { bytes, total_bytes, tokens, shards, malformed } => {
                let left_out = match malformed {
                    0 => String::new(),
                    _ => format!(", {} malformed", HumanCount(*malformed)),
                };
                let text = format!(
                    "tokenizing: {} of {}, {} tokens, {} shards{left_out}{}",
                    HumanBytes(*bytes),
                    HumanBytes(*total_bytes),
                    HumanCount(*tokens),
                    HumanCount(*shards),
                    self.speed(*bytes, *total_bytes),
                );
                (Some((*bytes, *total_bytes)), text, false)
            }
            PrepareEvent::Done { train_tokens, validation_tokens, shards } => {
                let (train, held) = (HumanCount(*train_tokens), HumanCount(*validation_tokens));
                (
                    Some((1, 1)),
                    format!("{train} tokens to train, {held} to validate, {shards} shards"),
                    true,
                )
            }
        };
        match &self.bar {
            Some(bar) => {
                if let Some((done, total)) = share {
                    bar.set_length(total.max(1));
                    bar.set_position(done);
                }
                bar.set_message(text);
                if matches!(event, PrepareEvent::Done { .. }) {
                    bar.finish();
                }
            }
            None if always || self.pace.ready() => {
                print_line(&format!("data {}: {text}", self.name))
            }
            None => {}
        }
    }
}

impl PrepareProgress {
    /// Bytes a second since the first ones, and what is left at that pace.
    fn speed(&mut self, bytes: u64, total: u64) -> String {
        let (begun, first) = *self.begun.get_or_insert((Instant::now(), bytes));
        speed(bytes - first.min(bytes), total - bytes.min(total), begun.elapsed())
    }
}

/// `, 12 MiB/s, eta 3m07s`, once there is something to tell.
fn speed(done: u64, left: u64, time: Duration) -> String {
    let rate = done as f64 / time.as_secs_f64();
    if done == 0 || !rate.is_finite() {
        return String::new();
    }
    format!(", {}/s, eta {}", HumanBytes(rate as u64), clock(left as f64 / rate))
}

/// Progress of reading a dataset.
pub(crate) struct ReadProgress {
    name: String,
    total: u64,
    bar: Option<ProgressBar>,
    pace: Pace,
    begun: Instant,
}

impl ReadProgress {
    pub(crate) fn new(name: &str, total: u64) -> Self {
        let template = "{prefix} {bar:20.cyan/blue} {percent:>3}%  {wide_msg}";
        let bar =
            on_terminal().then(|| bar(total.max(1), template).with_prefix(format!("data {name}")));
        // A dataset that is read at once is not worth a line.
        let pace = Pace(Some(Instant::now()));
        Self { name: name.to_owned(), total, bar, pace, begun: Instant::now() }
    }

    pub(crate) fn show(&mut self, bytes: u64) {
        let (done, total) = (HumanBytes(bytes), HumanBytes(self.total));
        let speed = speed(bytes, self.total.saturating_sub(bytes), self.begun.elapsed());
        let text = format!("reading: {done} of {total}{speed}");
        match &self.bar {
            Some(bar) => {
                bar.set_position(bytes);
                bar.set_message(text);
                if bytes >= self.total {
                    bar.finish_and_clear();
                }
            }
            None if self.pace.ready() => print_line(&format!("data {}: {text}", self.name)),
            None => {}
        }
    }
}

/// Progress of a run, from its events.
pub(crate) struct RunProgress {
    total: Step,
    bar: Option<ProgressBar>,
    pace: Pace,
    seconds_per_step: Option<f64>,
}

impl RunProgress {
    /// Progress that begins after committed step `from`.
    pub(crate) fn new(total: Step, from: Step) -> Self {
        let template = "step {pos}/{len} {bar:20.green/blue} {wide_msg}";
        let bar = on_terminal().then(|| {
            let bar = bar(total.0, template);
            bar.set_position(from.0);
            bar
        });
        Self { total, bar, pace: Pace(None), seconds_per_step: None }
    }

    pub(crate) fn show(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Committed(record) => self.committed(record),
            // Among the run's last words, on stdout.
            RunEvent::Evaluated(record) if record.step == self.total => {}
            RunEvent::Evaluated(record) => print_line(&evaluation_line(record)),
            RunEvent::WorkerJoined { name, host, spare, .. } => {
                let role = if *spare { " as a spare" } else { "" };
                print_line(&format!("worker {name} on {host} joined{role}"));
            }
            RunEvent::WorkerRefused { name, reason } => {
                print_line(&format!("worker {name} refused: {reason}"));
            }
            RunEvent::WorkerLost { name, reason, .. } => {
                print_line(&format!("worker {name} lost: {reason}"));
            }
            RunEvent::Formed { generation, world, step, reason } => print_line(&format!(
                "generation {generation}: {world} worker{} at step {step} ({reason})",
                if *world == 1 { "" } else { "s" },
            )),
            RunEvent::CheckpointSaved { step, seconds, bytes, .. } => print_line(&format!(
                "checkpoint of step {step}: {} in {seconds:.1} s",
                HumanBytes(*bytes)
            )),
            RunEvent::CheckpointFailed { step, reason } => {
                print_line(&format!(
                    "checkpoint of step {step} failed, training goes on: {reason}"
                ));
            }
            RunEvent::Rewound { to, reason } => {
                print_line(&format!("back to step {to}: {reason}"));
                if let Some(bar) = &self.bar {
                    bar.set_position(to.0);
                }
            }
            RunEvent::Waiting { .. }
            | RunEvent::CheckpointDelayed { .. }
            | RunEvent::Straggles { .. }
            | RunEvent::CaughtUp { .. }
            | RunEvent::GateCollapsed { .. }
            | RunEvent::GateRecovered { .. }
            | RunEvent::LoopLossRises { .. }
            | RunEvent::LoopLossFalls { .. }
            | RunEvent::StoreAway { .. }
            | RunEvent::StoreBack { .. }
            | RunEvent::Draining { .. }
            | RunEvent::Pausing { .. }
            | RunEvent::Resumed
            | RunEvent::Stopping { .. } => print_line(&event.to_string()),
            RunEvent::Finished { .. } | RunEvent::Failed { .. } => {
                if let Some(bar) = &self.bar {
                    bar.abandon();
                }
            }
        }
    }

    fn committed(&mut self, record: &StepRecord) {
        if record.skipped.is_some() {
            print_line(&RunEvent::Committed(Box::new(record.clone())).to_string());
        }
        let seconds = match self.seconds_per_step {
            Some(mean) => mean + SMOOTHING * (record.seconds - mean),
            None => record.seconds,
        };
        self.seconds_per_step = Some(seconds);
        let rate = record.step_tokens as f64 / seconds.max(1e-9);
        let left = (self.total.0 - record.step.0) as f64 * seconds;
        // On a narrow terminal the end is cut off.
        let text = format!(
            "loss {:.4}  eta {}  {} tok/s  depth {:.2}  loops {}",
            record.loss,
            clock(left),
            HumanCount(rate as u64),
            record.mean_depth,
            join(&record.loss_per_loop),
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(record.step.0);
                bar.set_message(text);
            }
            None if self.pace.ready() || record.step == self.total => {
                print_line(&format!("step {}/{}  {text}", record.step, self.total));
            }
            None => {}
        }
    }
}

fn join(losses: &[f64]) -> String {
    losses.iter().map(|loss| format!("{loss:.3}")).collect::<Vec<_>>().join(" ")
}

/// Seconds as `1h02m`, `3m07s` or `9s`.
fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// An evaluation on one line.
pub(crate) fn evaluation_line(record: &EvaluationRecord) -> String {
    format!(
        "validation at step {}: loss per loop {}  perplexity {:.1}  mean exit depth {:.2}",
        record.step,
        join(&record.loss_per_loop),
        record.perplexity,
        record.mean_depth,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_tells_what_is_left_once_something_is_done() {
        let text = speed(10 << 20, 30 << 20, Duration::from_secs(5));
        assert_eq!(text, ", 2.00 MiB/s, eta 15s");
        assert_eq!(speed(0, 100, Duration::from_secs(5)), "");
        assert_eq!(speed(100, 100, Duration::ZERO), "");
    }

    #[test]
    fn remaining_time_reads_like_a_clock() {
        let texts = [0.4, 59.6, 187.0, 3720.0].map(clock);
        assert_eq!(texts, ["0s", "1m00s", "3m07s", "1h02m"]);
    }
}
