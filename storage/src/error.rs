//! What can go wrong with stored things. Every message is one line that names the place and,
//! where there is one, the remedy; none holds credentials.

use std::fmt;
use std::time::Duration;

use looptrain_proto::{Digest, Incarnation, Step};

use crate::Split;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a stored thing could not be read, written or trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URL names no store.
    #[error("the store URL {url} {reason}")]
    Url {
        /// The URL as given.
        url: String,
        /// What is wrong with it and what to write.
        reason: String,
    },
    /// The store is there but takes no objects.
    #[error("cannot write to the store {url}: {reason}; {remedy}")]
    Unwritable {
        /// The store.
        url: String,
        /// What the system or the server said.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// A single operation failed for good, retries included.
    #[error("cannot {operation} {place}: {reason}{tries}")]
    Operation {
        /// `read`, `look at`, `write`, `list`, `delete`.
        operation: &'static str,
        /// URL of the object.
        place: String,
        /// What the system or the server said.
        reason: String,
        /// How often it was tried.
        tries: Tries,
    },
    /// The store cannot do such a thing, or not with such a key.
    #[error("cannot {operation} {place}: {reason}")]
    Unsupported {
        /// As in [`Error::Operation`].
        operation: &'static str,
        /// URL of the object.
        place: String,
        /// What the client said.
        reason: String,
    },
    /// There is no such object.
    #[error("{place} does not exist")]
    NotFound {
        /// URL of the object.
        place: String,
    },
    /// An object is not what was written.
    #[error("{place} is damaged: its digest is {found}, the manifest says {expected}; {remedy}")]
    Corrupt {
        /// URL of the object.
        place: String,
        /// What the manifest says.
        expected: Digest,
        /// What was read.
        found: Digest,
        /// What to do.
        remedy: String,
    },
    /// An object has an unexpected size, form or content.
    #[error("{place} cannot be used: {reason}")]
    Malformed {
        /// URL of the object.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The text of a new dataset cannot be collected.
    #[error("dataset `{dataset}`: {reason}")]
    Text {
        /// The dataset to be made.
        dataset: String,
        /// What is missing and how to provide it.
        reason: String,
    },
    /// A dataset that is there was made from another source than the spec now gives.
    #[error(
        "dataset `{dataset}` was made with other options than its [datasets.source] gives: {differences}; put them back, give the dataset another name, or remove {place}"
    )]
    OtherSource {
        /// The dataset.
        dataset: String,
        /// Where it lies.
        place: String,
        /// Each option that differs, with both values.
        differences: String,
    },
    /// The tokenizer cannot be trained, read or applied.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What the tokenizer said.
        reason: String,
    },
    /// A stage needs more text than there is.
    #[error(
        "stage `{stage}` needs at least {needed} {split} sequences of {sequence_length} tokens, but there are {available} in {datasets}; lower stages.{index}.sequence_length or stages.{index}.slots, or add text"
    )]
    TooSmall {
        /// Name of the stage.
        stage: String,
        /// Index of the stage.
        index: usize,
        /// Sequences needed at least.
        needed: u64,
        /// Which split.
        split: Split,
        /// Tokens per sequence.
        sequence_length: usize,
        /// The datasets, each in backticks.
        datasets: String,
        /// Sequences there are.
        available: u64,
    },
    /// A sequence past the end of its split was asked for.
    #[error(
        "{place} has {sequences} sequences of {sequence_length} tokens; there is no number {index}"
    )]
    OutOfRange {
        /// The dataset and split.
        place: String,
        /// The sequence asked for.
        index: u64,
        /// How many there are.
        sequences: u64,
        /// Tokens per sequence.
        sequence_length: usize,
    },
    /// Another checkpoint of the same step is committed already, or another dataset of the same name.
    #[error("{place} is there already and differs: {reason}")]
    Conflict {
        /// The file in the way.
        place: String,
        /// What differs and what to do.
        reason: String,
    },
    /// There are checkpoints, but none that can be loaded.
    #[error(
        "none of the {count} checkpoints of run `{run}` can be used; the newest, step {step}: {reason}; restore it, or begin again with --fresh"
    )]
    NoGoodCheckpoint {
        /// The run.
        run: String,
        /// How many were tried.
        count: usize,
        /// The newest one.
        step: Step,
        /// Why that one was refused.
        reason: String,
    },
    /// A newer coordinator holds the run record.
    #[error("run `{run}` has been taken over by coordinator incarnation {by}; this one must stop")]
    Fenced {
        /// The run.
        run: String,
        /// Who holds the record now.
        by: Incarnation,
    },
    /// The claimant saw the recorded run and declined.
    #[error("{reason}")]
    Refused {
        /// The run.
        run: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A run has not used what its order draws.
    #[error("the audit does not hold at step {step}: {reason}")]
    OutOfOrder {
        /// The step.
        step: Step,
        /// What differs.
        reason: String,
    },
    /// The process is shutting down.
    #[error("interrupted: the process is shutting down")]
    Interrupted,
}

impl Error {
    /// Whether the same operation may succeed later, when the store or the way to it is well again.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Operation { tries: Tries { may_pass: true, .. }, .. })
    }
}

/// How often an operation was tried before it was given up, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tries {
    /// The first one included.
    pub attempts: u32,
    /// From its begin to the last failure.
    pub elapsed: Duration,
    /// Whether the same operation may succeed later: the store or the way to it is at fault.
    pub may_pass: bool,
}

impl fmt::Display for Tries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.attempts {
            0 | 1 => Ok(()),
            attempts => write!(f, " ({attempts} attempts in {:.1} s)", self.elapsed.as_secs_f64()),
        }
    }
}

/// An error's text on one line, and not endless: servers answer with whole documents.
pub(crate) fn one_line(text: &str) -> String {
    const LIMIT: usize = 400;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_answers_of_a_server_become_one_bounded_line() {
        assert_eq!(one_line("a\n  b\t c"), "a b c");
        let long = one_line(&"é ".repeat(1000));
        assert!(long.ends_with(" ...") && long.chars().count() == 404, "{long}");
    }
}
