//! The metrics log: one JSON line a committed step, in segments.
//!
//! Object stores cannot append, so the open segment is written anew at each flush; it is called
//! after the first step in it (`steps-0000000001.jsonl`). Segments are sealed at checkpoints. A run
//! that resumes at a checkpoint opens the log after that step: every later line is removed, and
//! what is trained again is logged again, once.
//!
//! A writer that is replaced by another one may have a write under way, which nothing stops: it puts
//! lines back into an older segment that its successor has logged anew in the next one. So a segment
//! ends where the next one begins, whatever is in it.
//!
//! The log is for people: a line that is no JSON (a hand's edit, a torn copy) is passed over with a
//! warning, and keeps no run from going on.
//!
//! Caller: the coordinator, which alone publishes steps.

use futures::{StreamExt, TryStreamExt};
use looptrain_proto::Step;
use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result, Store, run_prefix};

/// A segment that has grown to this many bytes is sealed, so that no flush rewrites more.
const SEGMENT_BYTES: usize = 1 << 20;

/// Segments that are read at once.
const READERS: usize = 8;

/// The log of one run, open for lines after some step.
#[derive(Debug)]
pub struct MetricsLog {
    store: Store,
    prefix: String,
    /// Full segments that are not written yet, and the open one.
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    first: Step,
    lines: String,
    dirty: bool,
    sealed: bool,
}

impl MetricsLog {
    /// Opens the log of `run` for lines after step `after`, and removes such lines of an earlier
    /// try.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn open(store: &Store, run: &str, after: Step) -> Result<Self> {
        let prefix = prefix(run);
        let segments = segments(store, &prefix).await?;
        // Newest first: should this be interrupted, what is left is still a log without a gap.
        for (first, key) in segments.iter().rev() {
            if *first > after {
                store.delete(key).await?;
                continue;
            }
            // Only this one can reach past the step; those before it end where it begins.
            let text = store.get(key).await?;
            let mut kept = Vec::with_capacity(text.len());
            for (line, value) in readable(store, key, &text) {
                if step_of(&value).is_some_and(|step| step <= after) {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                }
            }
            if kept != text {
                store.put(key, kept).await?;
            }
            break;
        }
        Ok(Self { store: store.clone(), prefix, segments: Vec::new() })
    }

    /// Takes a line, a JSON object with an integer `step`; it is written with the next flush.
    ///
    /// # Errors
    /// When it is no such object.
    pub fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let malformed =
            |reason: String| Error::Malformed { place: "the metrics line".to_owned(), reason };
        let value = serde_json::to_value(line).map_err(|error| malformed(error.to_string()))?;
        let step =
            step_of(&value).ok_or_else(|| malformed("it has no integer `step`".to_owned()))?;
        match self.segments.last_mut() {
            Some(segment) if !segment.sealed => segment.push(&value),
            _ => {
                let mut segment =
                    Segment { first: step, lines: String::new(), dirty: true, sealed: false };
                segment.push(&value);
                self.segments.push(segment);
            }
        }
        Ok(())
    }

    /// Whether everything is written.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.segments.iter().all(|segment| !segment.dirty)
    }

    /// Writes what is not written yet.
    ///
    /// # Errors
    /// When the store fails; the lines are kept for the next flush.
    pub async fn flush(&mut self) -> Result<()> {
        for segment in self.segments.iter_mut().filter(|segment| segment.dirty) {
            let key = segment_key(&self.prefix, segment.first);
            self.store.put(&key, segment.lines.clone()).await?;
            segment.dirty = false;
        }
        self.segments.retain(|segment| segment.dirty || !segment.sealed);
        Ok(())
    }

    /// Ends the open segment, and flushes.
    ///
    /// # Errors
    /// As [`MetricsLog::flush`]; the segment is ended all the same.
    pub async fn seal(&mut self) -> Result<()> {
        if let Some(segment) = self.segments.last_mut() {
            segment.sealed = true;
        }
        self.flush().await
    }
}

impl Segment {
    fn push(&mut self, line: &Value) {
        self.lines.push_str(&line.to_string());
        self.lines.push('\n');
        self.dirty = true;
        self.sealed = self.lines.len() >= SEGMENT_BYTES;
    }
}

/// All lines of `run` that are JSON, in the order of steps; none of a segment that the next one has.
///
/// # Errors
/// When the store fails.
pub async fn read_metrics(store: &Store, run: &str) -> Result<Vec<Value>> {
    let mut values = Vec::new();
    read_metrics_by_segment(store, run, |mut lines| values.append(&mut lines)).await?;
    Ok(values)
}

/// Hands out the lines of [`read_metrics`], some thousands at a time, for who does not want all of them in
/// memory.
///
/// # Errors
/// When the store fails.
pub async fn read_metrics_by_segment(
    store: &Store,
    run: &str,
    mut take: impl FnMut(Vec<Value>),
) -> Result<()> {
    let segments = segments(store, &prefix(run)).await?;
    let ends = segments.iter().skip(1).map(|(next, _)| *next).chain([Step(u64::MAX)]);
    let ends: Vec<Step> = ends.collect();
    let reads = segments.into_iter().zip(ends);
    let reads = reads.map(|((_, key), end)| async move {
        let text = store.get(&key).await?;
        Ok::<_, Error>((key, text, end))
    });
    let mut texts = futures::stream::iter(reads).buffered(READERS);
    while let Some((key, text, end)) = texts.try_next().await? {
        let lines = readable(store, &key, &text).map(|(_, value)| value);
        take(lines.filter(|value| step_of(value).is_none_or(|step| step < end)).collect());
    }
    Ok(())
}

/// Makes the log of run `to` that of run `from` up to step `last`, a segment at a time.
///
/// # Errors
/// When the store fails; the log is then to be made again.
pub async fn copy_metrics(store: &Store, from: &str, to: &str, last: Step) -> Result<()> {
    let target = prefix(to);
    store.delete_prefix(&target).await?;
    let segments = segments(store, &prefix(from)).await?;
    let ends = segments.iter().skip(1).map(|(next, _)| *next).chain([Step(u64::MAX)]);
    for ((first, key), end) in segments.iter().zip(ends).filter(|((first, _), _)| *first <= last) {
        let text = store.get(key).await?;
        let mut kept = Vec::with_capacity(text.len());
        for (line, value) in readable(store, key, &text) {
            if step_of(&value).is_some_and(|step| step <= last && step < end) {
                kept.extend_from_slice(line);
                kept.push(b'\n');
            }
        }
        store.put(&segment_key(&target, *first), kept).await?;
    }
    Ok(())
}

/// The newest `count` lines of `run` that are JSON, in the order of steps.
///
/// # Errors
/// When the store fails.
pub async fn read_newest_metrics(store: &Store, run: &str, count: usize) -> Result<Vec<Value>> {
    let mut newest: Vec<Value> = Vec::new();
    let mut end = Step(u64::MAX);
    for (first, key) in segments(store, &prefix(run)).await?.into_iter().rev() {
        let text = store.get(&key).await?;
        let lines = readable(store, &key, &text).map(|(_, value)| value);
        let mut lines: Vec<Value> =
            lines.filter(|value| step_of(value).is_none_or(|step| step < end)).collect();
        lines.append(&mut newest);
        newest = lines;
        end = first;
        if newest.len() >= count {
            break;
        }
    }
    Ok(newest.split_off(newest.len().saturating_sub(count)))
}

fn prefix(run: &str) -> String {
    format!("{}/metrics", run_prefix(run))
}

fn segment_key(prefix: &str, first: Step) -> String {
    format!("{prefix}/steps-{:010}.jsonl", first.0)
}

/// First step and key of every segment, ascending.
async fn segments(store: &Store, prefix: &str) -> Result<Vec<(Step, String)>> {
    let first = |key: &str| {
        let name = key.rsplit('/').next()?;
        name.strip_prefix("steps-")?.strip_suffix(".jsonl")?.parse().ok().map(Step)
    };
    let objects = store.list(prefix).await?;
    let mut segments: Vec<(Step, String)> =
        objects.into_iter().filter_map(|object| Some((first(&object.key)?, object.key))).collect();
    segments.sort();
    Ok(segments)
}

/// Each line, as it stands and as JSON; those that are none are passed over with a warning.
fn readable<'a>(
    store: &Store,
    key: &str,
    text: &'a [u8],
) -> impl Iterator<Item = (&'a [u8], Value)> {
    lines(store.place(key), text).filter_map(|(line, value)| match value {
        Ok(value) => Some((line, value)),
        Err(error) => {
            tracing::warn!(%error, "passing over a line of the metrics log");
            None
        }
    })
}

/// Each line that is not empty, as it stands and as JSON; an error names `place` and line.
fn lines(place: String, text: &[u8]) -> impl Iterator<Item = (&[u8], Result<Value>)> {
    let numbered = text.split(|&byte| byte == b'\n').zip(1_usize..);
    numbered.filter(|(line, _)| !line.is_empty()).map(move |(line, number)| {
        let malformed = |error: serde_json::Error| Error::Malformed {
            place: format!("{place}:{number}"),
            reason: error.to_string(),
        };
        (line, serde_json::from_slice(line).map_err(malformed))
    })
}

fn step_of(value: &Value) -> Option<Step> {
    value.get("step")?.as_u64().map(Step)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn a_copy_ends_where_it_should_and_leaves_out_what_does_not_count() {
        let store = Store::open("memory://").unwrap();
        let put = async |run: &str, first: u64, steps: &[u64]| {
            let line = |step: &u64| format!("{{\"step\":{step},\"of\":\"{run}\"}}\n");
            let text: String = steps.iter().map(line).collect();
            store.put(&segment_key(&prefix(run), Step(first)), text).await.unwrap();
        };
        // Lines past the next segment are of a writer that was replaced.
        put("r", 1, &[1, 2, 3, 4]).await;
        put("r", 3, &[3, 4, 5]).await;
        put("r", 6, &[6, 7]).await;
        put("b", 6, &[6, 9]).await;
        copy_metrics(&store, "r", "b", Step(4)).await.unwrap();
        let steps: Vec<_> = read_metrics(&store, "b").await.unwrap();
        let steps: Vec<u64> = steps.iter().filter_map(|line| line["step"].as_u64()).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(read_metrics(&store, "r").await.unwrap().len(), 7);
    }

    async fn log(
        store: &Store,
        log: &mut MetricsLog,
        steps: std::ops::RangeInclusive<u64>,
        try_: u32,
    ) {
        for step in steps {
            log.append(&json!({ "step": step, "loss": 1.0 / step as f64, "try": try_ })).unwrap();
            log.flush().await.unwrap();
            if step % 10 == 0 {
                log.seal().await.unwrap();
            }
        }
        assert!(!store.list("runs/r/metrics").await.unwrap().is_empty());
    }

    /// Each step and the try that logged it.
    async fn logged(store: &Store) -> Vec<(u64, u64)> {
        let lines = read_metrics(store, "r").await.unwrap();
        lines.iter().map(|l| (l["step"].as_u64().unwrap(), l["try"].as_u64().unwrap())).collect()
    }

    #[tokio::test]
    async fn segments_end_at_checkpoints_and_read_as_one_log() {
        let store = Store::open("memory://").unwrap();
        let mut metrics = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        log(&store, &mut metrics, 1..=25, 1).await;
        let keys: Vec<String> =
            store.list("runs/r").await.unwrap().into_iter().map(|object| object.key).collect();
        assert_eq!(
            keys,
            [1, 11, 21].map(|first| format!("runs/r/metrics/steps-{first:010}.jsonl"))
        );
        assert_eq!(logged(&store).await, (1..=25).map(|step| (step, 1)).collect::<Vec<_>>());
        for count in [0, 3, 8, 25, 99] {
            let newest = read_newest_metrics(&store, "r", count).await.unwrap();
            let steps: Vec<u64> =
                newest.iter().map(|line| line["step"].as_u64().unwrap()).collect();
            assert_eq!(
                steps,
                (26_u64.saturating_sub(count as u64).max(1)..=25).collect::<Vec<_>>()
            );
        }
        let lines = read_metrics(&store, "r").await.unwrap();
        assert_eq!(lines[2]["loss"].as_f64(), Some(1.0 / 3.0), "floats survive to the bit");
    }

    #[tokio::test]
    async fn what_is_trained_again_is_logged_once() {
        // 10 and 20 are checkpoints; 13 stands for one whose segment was not sealed.
        for resume in [0, 10, 13, 20, 25] {
            let store = Store::open("memory://").unwrap();
            let mut metrics = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
            log(&store, &mut metrics, 1..=25, 1).await;
            let mut metrics = MetricsLog::open(&store, "r", Step(resume)).await.unwrap();
            log(&store, &mut metrics, resume + 1..=30, 2).await;
            let expected: Vec<_> =
                (1..=30).map(|step| (step, if step <= resume { 1 } else { 2 })).collect();
            assert_eq!(logged(&store).await, expected, "resumed at {resume}");
        }
    }

    #[tokio::test]
    async fn lines_that_a_replaced_writer_puts_back_late_are_not_read() {
        let store = Store::open("memory://").unwrap();
        let mut old = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        for step in 1..=7 {
            old.append(&json!({ "step": step, "try": 1 })).unwrap();
        }
        // Its successor goes on from step 5 while the write is under way.
        let mut new = MetricsLog::open(&store, "r", Step(5)).await.unwrap();
        log(&store, &mut new, 6..=8, 2).await;
        old.flush().await.unwrap();
        let expected: Vec<_> = (1..=8).map(|step| (step, if step <= 5 { 1 } else { 2 })).collect();
        assert_eq!(logged(&store).await, expected);
    }

    #[tokio::test]
    async fn lines_are_kept_until_the_store_takes_them() {
        let store = Store::open("memory://").unwrap();
        let mut metrics = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        metrics.append(&json!({ "step": 1, "try": 1 })).unwrap();
        assert!(read_metrics(&store, "r").await.unwrap().is_empty());
        metrics.seal().await.unwrap();
        metrics.seal().await.unwrap();
        assert_eq!(logged(&store).await, [(1, 1)]);
    }

    #[tokio::test]
    async fn a_segment_does_not_grow_without_end() {
        let store = Store::open("memory://").unwrap();
        let mut metrics = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        let note = "x".repeat(SEGMENT_BYTES / 4);
        for step in 1..=9 {
            metrics.append(&json!({ "step": step, "try": 1, "note": note })).unwrap();
        }
        metrics.flush().await.unwrap();
        assert_eq!(store.list("runs/r/metrics").await.unwrap().len(), 3);
        assert_eq!(logged(&store).await, (1..=9).map(|step| (step, 1)).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn lines_without_a_step_are_refused() {
        let store = Store::open("memory://").unwrap();
        let mut metrics = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        assert!(metrics.append(&json!({ "loss": 1.0 })).is_err());
        assert!(metrics.append(&7).is_err());
    }

    #[tokio::test]
    async fn a_broken_line_is_passed_over_and_keeps_no_run_from_going_on() {
        let store = Store::open("memory://").unwrap();
        let key = "runs/r/metrics/steps-0000000001.jsonl";
        let text =
            b"{\"step\":1,\"try\":1}\n{\"step\":2,\n\n\xff\n{\"step\":3,\"try\":1}\n{\"step\":4";
        store.put(key, text.to_vec()).await.unwrap();
        assert_eq!(logged(&store).await, [(1, 1), (3, 1)]);

        let mut metrics = MetricsLog::open(&store, "r", Step(3)).await.unwrap();
        log(&store, &mut metrics, 4..=5, 2).await;
        assert_eq!(logged(&store).await, [(1, 1), (3, 1), (4, 2), (5, 2)]);
        let healed = store.get(key).await.unwrap();
        assert_eq!(healed, "{\"step\":1,\"try\":1}\n{\"step\":3,\"try\":1}\n");
    }

    #[test]
    fn a_broken_line_is_named_with_its_object() {
        let lines: Vec<_> = lines("memory://x.jsonl".into(), b"{}\n\n{\n7").collect();
        let errors: Vec<String> =
            lines.iter().filter_map(|(_, value)| Some(value.as_ref().err()?.to_string())).collect();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].starts_with("memory://x.jsonl:3 "), "{errors:?}");
        assert_eq!(lines.len(), 3, "an empty line is no line");
    }
}
