//! What can be done with the checkpoints of a run.

use std::str::FromStr;

use clap::{Args, Subcommand};
use looptrain_proto::Step;

#[derive(Debug, Subcommand)]
pub(crate) enum Checkpoint {
    /// List what is stored: checkpoints, and what saves that came to nothing have left
    #[command(after_help = "Example: looptrain checkpoint list --store file://.looptrain \
        --run quickstart --json")]
    List(CheckpointList),
    /// Read checkpoints back and check every part; exit status 1 when one is not what was saved
    #[command(after_help = "Example: looptrain checkpoint verify --store file://.looptrain \
        --run quickstart --step 600")]
    Verify(CheckpointVerify),
    /// Remove what the run's retention has no use for; never the newest checkpoint that verifies,
    /// nor one that is being read
    #[command(after_help = "Example: looptrain checkpoint prune --store file://.looptrain \
        --run quickstart --keep 1 --dry-run")]
    Prune(CheckpointPrune),
}

/// The run whose checkpoints they are.
#[derive(Debug, Args)]
pub(crate) struct StoredRun {
    /// URL of the store
    #[arg(long, value_name = "URL")]
    pub(crate) store: String,
    /// Name of the run in the store
    #[arg(long)]
    pub(crate) run: String,
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointList {
    #[command(flatten)]
    pub(crate) of: StoredRun,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointVerify {
    #[command(flatten)]
    pub(crate) of: StoredRun,
    /// Only the checkpoint of this step
    #[arg(long)]
    pub(crate) step: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckpointPrune {
    #[command(flatten)]
    pub(crate) of: StoredRun,
    /// Keep the newest so many; the run's checkpoint.keep by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep: Option<u32>,
    /// Also keep those of steps that are multiples of this, 0 for none; the run's
    /// checkpoint.keep_every_steps by default
    #[arg(long, value_name = "STEPS")]
    pub(crate) keep_every: Option<u64>,
    /// Remove files of saves that came to nothing when they are so old; the run's
    /// checkpoint.orphan_seconds by default
    #[arg(long, value_name = "SECONDS")]
    pub(crate) orphan_seconds: Option<u64>,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Sequences {
    #[command(flatten)]
    pub(crate) of: StoredRun,
    /// The step, committed or to come
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) step: u64,
    /// Only this slot
    #[arg(long)]
    pub(crate) slot: Option<u32>,
    /// Print one JSON object, with the tokens
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Branch {
    /// URL of the checkpoint: STORE/runs/NAME for the newest of a run
    #[arg(value_name = "URL")]
    pub(crate) from: CheckpointUrl,
    /// Name of the new run
    #[arg(long)]
    pub(crate) name: String,
    /// Pass over the data of so many steps
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    pub(crate) skip_steps: u64,
    /// Override a key of the spec, such as `optimizer.clip_norm=0.5`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

/// Where a checkpoint is: `STORE/runs/NAME/checkpoints/step-NUMBER`, or `STORE/runs/NAME` for the
/// newest one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CheckpointUrl {
    /// URL of the store.
    pub(crate) store: String,
    /// Name of the run.
    pub(crate) run: String,
    /// The step; `None` for the newest.
    pub(crate) step: Option<Step>,
}

impl FromStr for CheckpointUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let form = "write STORE/runs/NAME or STORE/runs/NAME/checkpoints/step-NUMBER";
        let (store, rest) = url.trim_end_matches('/').rsplit_once("/runs/").ok_or(form)?;
        let (run, step) = match rest.split_once('/') {
            None => (rest, None),
            Some((run, below)) => {
                let number = below.strip_prefix("checkpoints/step-").and_then(|it| it.parse().ok());
                (run, Some(Step(number.ok_or(form)?)))
            }
        };
        if !store.contains("://") || run.is_empty() {
            return Err(form.into());
        }
        Ok(Self { store: store.to_owned(), run: run.to_owned(), step })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_named_by_its_url_or_that_of_its_run() {
        let url = |store: &str, run: &str, step: Option<u64>| CheckpointUrl {
            store: store.into(),
            run: run.into(),
            step: step.map(Step),
        };
        for (text, meant) in [
            ("file://.looptrain/runs/a", url("file://.looptrain", "a", None)),
            ("s3://lab/x/runs/a/", url("s3://lab/x", "a", None)),
            ("s3://lab/runs/a/checkpoints/step-0000000600", url("s3://lab", "a", Some(600))),
            ("file:///old/runs/b/runs/a", url("file:///old/runs/b", "a", None)),
        ] {
            assert_eq!(text.parse(), Ok(meant), "{text}");
        }
        for wrong in ["a", "file://.looptrain", "runs/a", "s3://lab/runs/a/checkpoints/step-x"] {
            assert!(wrong.parse::<CheckpointUrl>().is_err_and(|said| said.contains("/runs/NAME")));
        }
    }
}
