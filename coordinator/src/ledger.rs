//! The goodput ledger: what became of the time of all workers since the run began. Plain data: the
//! core books in it, the store keeps it from one coordinator to the next, the status page shows it.

use std::collections::BTreeMap;
use std::time::Duration;

use looptrain_proto::Step;
use serde::{Serialize, Serializer};
use serde_json::Value;

/// Buckets of the timeline; when there are more, two neighbours become one.
const BUCKETS: usize = 512;

/// Seconds of the first buckets.
const FIRST_BUCKET: f64 = 1.0;

/// What a second of a worker was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// Part of a step that was committed for the first time, or of an evaluation.
    Productive,
    /// Part of a step that had been committed before, and was lost.
    Recomputed,
    /// There were too few workers to train.
    Waiting,
    /// From the loss of a member, or of the coordinator, until a step is planned again; and the step
    /// that was under way. The same for a generation that forms since somebody joins.
    Recovering,
    /// Copying the state for a checkpoint, or holding for the last one.
    CheckpointStall,
    /// Waiting for tokens.
    DataWait,
    /// From joining to the first place in a generation that formed.
    StartUp,
    /// Nothing to do: a warm spare, or a paused run.
    Idle,
}

impl Category {
    /// All, in the order of the timeline's buckets.
    pub const ALL: [Self; 8] = [
        Self::Productive,
        Self::Recomputed,
        Self::Waiting,
        Self::Recovering,
        Self::CheckpointStall,
        Self::DataWait,
        Self::StartUp,
        Self::Idle,
    ];

    /// Its name in JSON and as a label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Productive => "productive",
            Self::Recomputed => "recomputed",
            Self::Waiting => "waiting",
            Self::Recovering => "recovering",
            Self::CheckpointStall => "checkpoint_stall",
            Self::DataWait => "data_wait",
            Self::StartUp => "start_up",
            Self::Idle => "idle",
        }
    }
}

/// The ledger of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Ledger {
    /// When the run began; times below count from there.
    pub(crate) since_unix_ms: u64,
    /// Seconds of all workers, added up.
    seconds: BTreeMap<Category, f64>,
    /// The same when this coordinator began to keep it.
    #[serde(skip)]
    at_start: BTreeMap<Category, f64>,
    /// The highest step that was ever committed: what is not above it is done again.
    pub(crate) highest: Step,
    bucket_seconds: f64,
    /// Of each bucket, the seconds of each category, in the order of [`Category::ALL`].
    #[serde(serialize_with = "in_milliseconds")]
    buckets: Vec<[f64; 8]>,
}

impl Ledger {
    /// An empty one.
    pub(crate) fn new(since_unix_ms: u64) -> Self {
        Self {
            since_unix_ms,
            seconds: Category::ALL.into_iter().map(|category| (category, 0.0)).collect(),
            at_start: BTreeMap::new(),
            highest: Step(0),
            bucket_seconds: FIRST_BUCKET,
            buckets: Vec::new(),
        }
    }

    /// What another coordinator wrote, for this one to go on with: whatever is no such number, or of a
    /// category that this release does not know, is left out.
    pub(crate) fn from_json(json: &Value, now_unix_ms: u64) -> Option<Self> {
        let since_unix_ms = json["since_unix_ms"].as_u64().filter(|since| *since <= now_unix_ms)?;
        let sane = |value: &Value| value.as_f64().filter(|it| it.is_finite() && *it >= 0.0);
        let mut ledger = Self::new(since_unix_ms);
        for category in Category::ALL {
            let seconds = sane(&json["seconds"][category.name()]).unwrap_or_default();
            ledger.seconds.insert(category, seconds);
        }
        ledger.at_start = ledger.seconds.clone();
        ledger.highest = Step(json["highest"].as_u64().unwrap_or_default());
        let width = sane(&json["bucket_seconds"]).filter(|width| *width >= FIRST_BUCKET);
        if let (Some(width), Some(buckets)) = (width, json["buckets"].as_array()) {
            ledger.bucket_seconds = width;
            let place = |bucket: &Value, at: usize| sane(&bucket[at]).unwrap_or_default();
            let bucket = |bucket: &Value| std::array::from_fn(|at| place(bucket, at));
            ledger.buckets = buckets.iter().take(BUCKETS).map(bucket).collect();
        }
        Some(ledger)
    }

    /// Books the time of one worker from `begin` to `end` (since the run began).
    pub(crate) fn book(&mut self, category: Category, begin: Duration, end: Duration) {
        let (mut at, end) = (begin.as_secs_f64(), end.as_secs_f64());
        if end <= at {
            return;
        }
        *self.seconds.entry(category).or_default() += end - at;
        while end >= BUCKETS as f64 * self.bucket_seconds {
            self.halve();
        }
        let mut bucket = (at / self.bucket_seconds) as usize;
        while at < end {
            if self.buckets.len() <= bucket {
                self.buckets.resize(bucket + 1, [0.0; 8]);
            }
            let until = end.min((bucket + 1) as f64 * self.bucket_seconds);
            self.buckets[bucket][category as usize] += (until - at).max(0.0);
            at = until;
            bucket += 1;
        }
    }

    fn halve(&mut self) {
        let pairs = self.buckets.chunks(2);
        self.buckets = pairs
            .map(|pair| std::array::from_fn(|at| pair.iter().map(|bucket| bucket[at]).sum()))
            .collect();
        self.bucket_seconds *= 2.0;
    }

    /// Seconds of a category.
    pub(crate) fn seconds(&self, category: Category) -> f64 {
        self.seconds.get(&category).copied().unwrap_or_default()
    }

    /// Seconds of a category that this coordinator has booked.
    pub(crate) fn seconds_since_start(&self, category: Category) -> f64 {
        self.seconds(category) - self.at_start.get(&category).copied().unwrap_or_default()
    }

    /// Seconds of all workers.
    pub(crate) fn total(&self) -> f64 {
        self.seconds.values().sum()
    }

    /// The productive share; `None` before there is anything.
    pub(crate) fn share(&self) -> Option<f64> {
        let total = self.total();
        (total > 0.0).then(|| self.seconds(Category::Productive) / total)
    }

    /// As the status page shows it.
    pub(crate) fn view(&self) -> GoodputView {
        GoodputView {
            since_unix_ms: self.since_unix_ms,
            seconds: self.seconds.clone(),
            share: self.share(),
            timeline: TimelineView {
                begin_unix_ms: self.since_unix_ms,
                bucket_ms: (self.bucket_seconds * 1000.0) as u64,
                buckets: self.buckets.iter().map(|bucket| bucket.map(rounded)).collect(),
            },
        }
    }
}

fn rounded(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

/// A millisecond is little, and many digits are much in a file that is written again and again.
fn in_milliseconds<S: Serializer>(buckets: &[[f64; 8]], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(buckets.iter().map(|bucket| bucket.map(rounded)))
}

/// The ledger as JSON for readers.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct GoodputView {
    since_unix_ms: u64,
    seconds: BTreeMap<Category, f64>,
    share: Option<f64>,
    timeline: TimelineView,
}

#[derive(Clone, Debug, Serialize)]
struct TimelineView {
    begin_unix_ms: u64,
    bucket_ms: u64,
    buckets: Vec<[f64; 8]>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const S: fn(f64) -> Duration = Duration::from_secs_f64;

    #[test]
    fn time_is_spread_over_the_buckets_it_falls_into() {
        let mut ledger = Ledger::new(5);
        ledger.book(Category::Productive, S(0.5), S(2.25));
        ledger.book(Category::Idle, S(2.0), S(2.0));
        ledger.book(Category::Waiting, S(1.0), S(2.0));
        let productive: Vec<f64> = ledger.buckets.iter().map(|bucket| bucket[0]).collect();
        assert_eq!(productive, [0.5, 1.0, 0.25]);
        assert_eq!((ledger.total(), ledger.share()), (2.75, Some(1.75 / 2.75)));
        assert_eq!(Ledger::new(0).share(), None);
    }

    #[test]
    fn a_long_run_has_few_buckets_and_loses_no_second() {
        let mut ledger = Ledger::new(0);
        let mut end = 0.0;
        for hour in 0..5000 {
            let category = Category::ALL[hour % 8];
            ledger.book(category, S(end), S(end + 3600.0));
            end += 3600.0;
        }
        let view = ledger.view();
        assert!(view.timeline.buckets.len() <= BUCKETS);
        assert!(view.timeline.buckets.len() > BUCKETS / 3);
        let spread: f64 = view.timeline.buckets.iter().flatten().sum();
        assert!(
            (spread - end).abs() < 1.0 && (ledger.total() - end).abs() < 1e-6,
            "{spread} {end}"
        );
        let width = view.timeline.bucket_ms as f64 / 1000.0;
        assert!(width * view.timeline.buckets.len() as f64 >= end);
    }

    #[test]
    fn it_is_the_same_after_it_was_written_and_read() {
        let mut ledger = Ledger::new(1_700_000_000_000);
        ledger.book(Category::StartUp, S(0.0), S(3.125));
        ledger.highest = Step(7);
        let json = serde_json::to_value(&ledger).unwrap();
        assert_eq!(json["seconds"]["start_up"], 3.125);
        let mut read = Ledger::from_json(&json, 1_800_000_000_000).unwrap();
        assert_eq!(read.seconds_since_start(Category::StartUp), 0.0, "another has booked that");
        read.at_start.clear();
        assert_eq!(read, ledger);
        for (at, category) in Category::ALL.into_iter().enumerate() {
            assert_eq!(category as usize, at);
            assert_eq!(serde_json::to_value(category).unwrap(), category.name());
        }
    }

    #[test]
    fn what_is_damaged_is_left_out_and_stops_nobody() {
        let read = |text: &str| Ledger::from_json(&serde_json::from_str(text).unwrap(), 10);
        assert_eq!(read("{}"), None);
        assert_eq!(read(r#"{"since_unix_ms": 11}"#), None, "it has not begun yet");
        for bucket_seconds in ["0", "-1", "1e-300", "null", "\"x\""] {
            let text = format!(
                r#"{{"since_unix_ms": 5, "seconds": {{"idle": 2, "productive": -1, "new": 3}},
                    "bucket_seconds": {bucket_seconds}, "buckets": [[1], 7]}}"#
            );
            let mut ledger = read(&text).unwrap();
            assert_eq!((ledger.total(), ledger.buckets.len()), (2.0, 0));
            ledger.book(Category::Idle, S(0.0), S(1e7));
            assert!(ledger.buckets.len() <= BUCKETS);
        }
    }
}
