//! `looptrain bench checkpoint`: what a save takes of a step, and how fast it reaches the store.

use anyhow::Result;
use looptrain_storage::Store;
use looptrain_worker::bench::Saves;
use serde_json::{Value, json};

use super::figures::{Samples, machine, rounded};
use crate::cli::CheckpointBench;
use crate::progress::print_line;

/// What is aimed at: the stall in copies, and the share of what the client reaches alone.
const MOST_COPIES: f64 = 1.2;
const LEAST_SHARE: f64 = 0.8;

pub(super) async fn run(args: CheckpointBench) -> Result<Value> {
    let CheckpointBench { store, mib, ranks, rounds } = args;
    let store = Store::open(&store)?;
    store.check_writable().await?;
    let mut saves = Saves::new(store, u64::from(mib) << 20, ranks as usize);
    let figures = measure(&mut saves, rounds).await;
    saves.clean_up().await?;
    figures
}

async fn measure(saves: &mut Saves, rounds: u32) -> Result<Value> {
    // Once each for memory and connections that are not there yet.
    let _ = saves.copy();
    saves.save().await?;
    saves.bare().await?;
    let (mut copies, mut stalls, mut uploads, mut bares) = (vec![], vec![], vec![], vec![]);
    let mut written = 0;
    for round in 1..=rounds {
        let copy = saves.copy().as_secs_f64();
        let save = saves.save().await?;
        let (stall, upload) = (save.stall.as_secs_f64(), save.upload.as_secs_f64());
        let bare = saves.bare().await?.as_secs_f64();
        print_line(&format!(
            "round {round} of {rounds}: copy {copy:.3} s, stall {stall:.3} s, upload {upload:.3} s, \
             the client alone {bare:.3} s"
        ));
        written = save.bytes;
        copies.push(copy);
        stalls.push(stall);
        uploads.push(upload);
        bares.push(bare);
    }
    let [copy, stall, upload, bare] =
        [copies, stalls, uploads, bares].map(|times| Samples::new(times).median());
    let bytes = written as f64;
    Ok(json!({
        "bench": "checkpoint",
        "bytes": written,
        "ranks": saves.ranks(),
        "rounds": rounds,
        "copy_ms": rounded(copy * 1e3),
        "stall_ms": rounded(stall * 1e3),
        "stall_in_copies": rounded(stall / copy),
        "target_stall_in_copies": MOST_COPIES,
        "upload_megabytes_per_second": rounded(bytes / upload / 1e6),
        "client_alone_megabytes_per_second": rounded(bytes / bare / 1e6),
        "share_of_client_alone": rounded(bare / upload),
        "target_share": LEAST_SHARE,
        "machine": machine(),
    }))
}
