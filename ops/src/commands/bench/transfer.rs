//! `looptrain bench transfer`: how fast a joiner gets the state of the members.

use anyhow::{Context, Result};
use looptrain_worker::bench::Transfers;
use serde_json::{Value, json};

use super::figures::{Samples, machine, rounded};
use crate::cli::TransferBench;
use crate::progress::print_line;

/// What is aimed at, in bytes per second.
const TARGET: f64 = 1e9;

/// Bytes of a parameter's state: weight and two moments.
const PARAMETER_BYTES: u64 = 12;

pub(super) async fn run(args: TransferBench) -> Result<Value> {
    let TransferBench { mib, sources, rounds } = args;
    let parameters = (u64::from(mib) << 20) / PARAMETER_BYTES;
    let parameters = usize::try_from(parameters).context("the state is too large")?;
    let mut transfers = Transfers::new(parameters, sources).await?;
    let bytes = transfers.bytes() as f64;
    let mut speeds = Vec::new();
    for round in 1..=rounds {
        let seconds = transfers.fetch().await?.as_secs_f64();
        print_line(&format!("round {round} of {rounds}: {seconds:.3} s"));
        speeds.push(bytes / seconds);
    }
    let speeds = Samples::new(speeds);
    Ok(json!({
        "bench": "transfer",
        "bytes": transfers.bytes(),
        "sources": sources,
        "rounds": rounds,
        "gigabytes_per_second": rounded(speeds.median() / 1e9),
        "best_gigabytes_per_second": rounded(speeds.max() / 1e9),
        "target_gigabytes_per_second": TARGET / 1e9,
        "machine": machine(),
    }))
}
