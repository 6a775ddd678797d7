//! Object storage as the durable truth of a run.
//!
//! Whatever must survive a process lives behind one [`Store`]: datasets (token shards, tokenizer,
//! manifest), weights to begin from, and per run the record, the checkpoints and the metrics log.
//!
//! ```text
//! <store>/datasets/<name>/manifest.json, tokenizer.json, tokens-00000.arrow, validation-00000.arrow
//! <store>/models/<name>/checkpoints/step-0000000000/state-0000-of-0002.safetensors, manifest.json
//! <store>/runs/<run>/record/00000000000000000007.json
//! <store>/runs/<run>/checkpoints/step-0000001000/state-0003-of-0008.safetensors, manifest.json
//! <store>/runs/<run>/readers/step-0000001000-0123456789abcdef
//! <store>/runs/<run>/metrics/steps-0000000001.jsonl
//! <store>/runs/<run>/audit/step-0000000001/incarnation-1-generation-1-rank-0.jsonl
//! ```
//!
//! Two rules hold everywhere. Data first, index last: a dataset or a checkpoint exists once its
//! manifest does, so an interrupted writer leaves nothing that looks whole. And one winner: where
//! two processes could write the same thing, the write is a put-if-absent.
//!
//! [`Order`] is the other half of the data path: a pure function from a position in a stage to a
//! sequence of a dataset.

mod audit;
mod checkpoint;
mod dataset;
mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod metrics;
mod order;
mod record;
mod store;

pub use audit::{Attempt, AuditSummary, SlotUse, StepUse, check_audit, read_audit, write_audit};
pub use checkpoint::{
    CheckpointManifest, Checkpoints, FIRST_MOMENT, Hold, PartEntry, Pruning, Retention,
    SECOND_MOMENT, SkippedCheckpoint, Stored, StoredTensor, Tensor, WeightsHasher, split_tensors,
    weights_digest,
};
pub use dataset::{
    BadFile, Bucket, Dataset, DatasetManifest, Input, InputSample, Lengths, Mano, Origin,
    PrepareEvent, ReadCounts, Reading, ReadingOptions, Recipe, SampleText, ShardEntry,
    SourceSummary, Split, SplitManifest, Synthetic, TextTokenizer, TokenType, TrainedTokenizer,
    check_fit, dataset_prefix, inspect, prepare, prepare_from, read_sequences, read_tokenizer,
    synthetic, train_tokenizer, verify, write_tokenizer,
};
pub use error::{Error, Result, Tries};
pub use metrics::{
    MetricsLog, copy_metrics, read_metrics, read_metrics_by_segment, read_newest_metrics,
};
pub use order::{Order, SequenceRef};
pub use record::{Finished, Register, RunRecord, Witness, read_record};
pub use store::{Faults, Measured, ObjectInfo, Store, Version};

/// Where everything of a run lives in its store; deleting this prefix forgets the run.
#[must_use]
pub fn run_prefix(run: &str) -> String {
    format!("runs/{run}")
}

/// Where the weights of a model are that runs may begin from.
#[must_use]
pub fn model_prefix(model: &str) -> String {
    format!("models/{model}")
}

/// Runs `work` off the async threads: hashing, decoding and other things that take a core.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => Ok(value),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::Interrupted),
    }
}
