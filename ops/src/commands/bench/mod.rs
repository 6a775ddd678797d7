//! `looptrain bench`: figures of one part of the system on this machine, one JSON line on stdout.
//!
//! One file a bench, thin over what the crates offer. `docs/performance.md` says how to read the
//! figures, and what they were.

mod checkpoint;
mod commit;
mod data;
mod figures;
mod orchestration;
mod reduce;
mod step;
mod tokenize;
mod transfer;

use anyhow::Result;

use crate::cli::Bench;
use crate::telemetry::Telemetry;

pub(crate) async fn run(bench: Bench, telemetry: &Telemetry) -> Result<()> {
    let figures = match bench {
        Bench::Commit(args) => commit::run(args).await?,
        Bench::Checkpoint(args) => checkpoint::run(args).await?,
        Bench::Data(args) => data::run(args).await?,
        Bench::Transfer(args) => transfer::run(args).await?,
        Bench::Reduce(args) => reduce::run(args).await?,
        Bench::Step(args) => step::run(args).await?,
        Bench::Tokenize(args) => tokenize::run(args).await?,
        Bench::Orchestration(args) => orchestration::run(args, telemetry).await?,
    };
    outln!("{figures}");
    Ok(())
}
