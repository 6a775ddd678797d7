//! What can be done with the checkpoints of a run.

use clap::{Args, Subcommand};

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
