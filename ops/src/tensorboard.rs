//! A run's numbers as TensorBoard event files, for those who look at their runs there.
//!
//! The format is that of TensorFlow's `event.proto` and of its record files: each record is a length, a
//! masked CRC-32C of that, an `Event` message, and a masked CRC-32C of the message. A start of the
//! coordinator, or a return to an earlier step, writes a session start, at which TensorBoard forgets what
//! it had read of later steps. Writing never fails a run.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use looptrain_coordinator::{EvaluationRecord, RunEvent, StepRecord};
use looptrain_proto::Step;
use looptrain_worker::host_name;
use prost::Message;

/// What is written reaches the file after this time at the latest, if something more is written.
const FLUSH_EVERY: Duration = Duration::from_secs(2);

/// `tensorflow.Event`.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorflow.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// `tensorflow.SessionLog`.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `tensorflow.SessionLog.SessionStatus.START`.
const START: i32 = 1;

/// One file of events.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: BufWriter<File>,
    flushed: Instant,
    /// It could not be written, and that has been said.
    broken: bool,
    /// What comes next may be a step that an earlier file has as well.
    begins: bool,
}

impl EventFile {
    /// A new file below `directory`, in a folder with the name of the run.
    pub(crate) fn create(directory: &Path, run: &str) -> Result<Self> {
        let folder = directory.join(run);
        let now = seconds();
        let name = format!(
            "events.out.tfevents.{:010}.{}.{}",
            now as u64,
            host_name(),
            std::process::id()
        );
        let path = folder.join(name);
        let open = || {
            fs::create_dir_all(&folder)?;
            File::create(&path)
        };
        let file = open().with_context(|| {
            format!("cannot write TensorBoard's events to {}; check --tensorboard", path.display())
        })?;
        let mut events = Self {
            path,
            file: BufWriter::new(file),
            flushed: Instant::now(),
            broken: false,
            begins: true,
        };
        events.write(Step(0), What::FileVersion("brain.Event:2".into()));
        events.flush();
        Ok(events)
    }

    /// Takes what happened.
    pub(crate) fn record(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Committed(record) => {
                if std::mem::take(&mut self.begins) {
                    // Here and not at the start: workers may hold later steps than the checkpoint.
                    self.write(record.step, What::SessionLog(SessionLog { status: START }));
                }
                self.summary(record.step, of_step(record));
            }
            RunEvent::Evaluated(record) => self.summary(record.step, of_evaluation(record)),
            RunEvent::Rewound { .. } => self.begins = true,
            RunEvent::Finished { .. } | RunEvent::Failed { .. } => self.flush(),
            _ => {}
        }
    }

    fn summary(&mut self, step: Step, values: Vec<(String, f64)>) {
        let value = |(tag, value): (String, f64)| Value { tag, simple_value: value as f32 };
        let value = values.into_iter().map(value).collect();
        self.write(step, What::Summary(Summary { value }));
        if self.flushed.elapsed() >= FLUSH_EVERY {
            self.flush();
        }
    }

    fn write(&mut self, step: Step, what: What) {
        let step = i64::try_from(step.0).unwrap_or(i64::MAX);
        let event = Event { wall_time: seconds(), step, what: Some(what) };
        let written = self.file.write_all(&framed(&event.encode_to_vec()));
        self.tell(written);
    }

    fn flush(&mut self) {
        self.flushed = Instant::now();
        let flushed = self.file.flush();
        self.tell(flushed);
    }

    fn tell(&mut self, result: std::io::Result<()>) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.broken, true)
        {
            let path = self.path.display();
            tracing::warn!(%error, "{path} lacks events for TensorBoard from here on");
        }
    }
}

impl Drop for EventFile {
    fn drop(&mut self) {
        self.flush();
    }
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// A message as a record of a file.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(message);
    record.extend_from_slice(&masked_crc(message).to_le_bytes());
    record
}

/// As in TensorFlow's record files: a checksum of data with checksums in it must not be one of those.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn per_loop(name: &str, values: &[f64]) -> Vec<(String, f64)> {
    let tagged = |(at, value): (usize, &f64)| (format!("{name}/loop_{}", at + 1), *value);
    values.iter().enumerate().map(tagged).collect()
}

fn of_step(record: &StepRecord) -> Vec<(String, f64)> {
    let mut values = vec![
        ("train/loss".to_owned(), record.loss),
        ("train/gradient_norm".into(), record.grad_norm),
        ("train/learning_rate".into(), record.lr),
        ("exit/mean_depth".into(), record.mean_depth),
        ("exit/entropy".into(), record.entropy),
        ("run/tokens".into(), record.tokens as f64),
        ("run/world".into(), f64::from(record.world)),
        ("time/step_seconds".into(), record.seconds),
        ("time/data_wait_seconds".into(), record.sections.data_wait),
        ("time/reduce_seconds".into(), record.sections.reduce),
    ];
    if record.seconds > 0.0 {
        let rate = record.step_tokens as f64 / record.seconds;
        values.push(("time/tokens_per_second".into(), rate));
    }
    values.extend(record.mfu.map(|mfu| ("time/mfu".to_owned(), mfu)));
    values.extend(per_loop("train_loss", &record.loss_per_loop));
    values.extend(per_loop("exit_probability", &record.exit_pdf));
    values.extend(per_loop("agreement", &record.agreement_per_loop));
    values.extend(per_loop("hidden_rms", &record.hidden_rms_per_loop));
    values.extend(per_loop("gradient_norm", &record.gradient_norm_per_loop));
    values
}

fn of_evaluation(record: &EvaluationRecord) -> Vec<(String, f64)> {
    let mut values = vec![
        ("validation/loss".to_owned(), record.loss),
        ("validation/perplexity".into(), record.perplexity),
        ("validation/mean_depth".into(), record.mean_depth),
    ];
    values.extend(per_loop("validation_loss", &record.loss_per_loop));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_framed_as_tensorflow_does() {
        // CRC-32C of "123456789" is a published check value; the mask is TensorFlow's.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let record = framed(b"123456789");
        assert_eq!(record.len(), 8 + 4 + 9 + 4);
        assert_eq!(record[..8], 9_u64.to_le_bytes());
        let masked = 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(record[21..], masked.to_le_bytes());
    }
}
