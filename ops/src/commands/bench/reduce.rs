//! `looptrain bench reduce`: how fast sums go round a ring, and what fixed point adds to that.
//!
//! Bus bandwidth is the measure of all-reduces that does not depend on the number of ranks: each
//! rank has to send, and to receive, `2 (n - 1) / n` times the bytes of its sums, so that is divided
//! by the time. (The formula is that of NVIDIA's nccl-tests.)

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use looptrain_proto::{Digest, Generation, Incarnation, Rank};
use looptrain_worker::reduce::Collective;
use looptrain_worker::reduce::exact::FixedPoint;
use looptrain_worker::reduce::tcp::{Peer, PeerListener, Peers, Ring, RingId};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::figures::{Samples, machine, rounded};
use crate::cli::ReduceBench;
use crate::progress::print_line;

/// As in the specs' default.
const FRACTION_BITS: u32 = 40;

/// A ring on the loopback stands at once.
const FORM_TIME: Duration = Duration::from_secs(10);

/// One rank of the ring.
struct Member {
    collective: Collective,
    sums: Vec<i64>,
    /// The listener, which ends with this.
    _peers: Peers,
}

pub(super) async fn run(args: ReduceBench) -> Result<Value> {
    let ReduceBench { mib, ranks, rounds } = args;
    let elements = (mib as usize) << 17;
    let values: Vec<f32> = (0..elements).map(|index| ((index % 8191) as f32) / 4096.0).collect();
    let fixed = FixedPoint::new(FRACTION_BITS, ranks);
    let mut members = ring(ranks).await?;

    let mut encoding = Vec::new();
    for member in &mut members {
        member.sums = vec![0; elements];
        // Once for the pages of the new buffer, which a worker has from the step before.
        fixed.encode_add(&mut member.sums, &values)?;
        member.sums.fill(0);
        let start = Instant::now();
        fixed.encode_add(&mut member.sums, &values)?;
        encoding.push(start.elapsed().as_secs_f64());
    }
    let own = members[0].sums.clone();
    let mut times = Vec::new();
    for round in 1..=rounds {
        let seconds = reduce(&mut members, &own, u64::from(round)).await?.as_secs_f64();
        print_line(&format!("round {round} of {rounds}: {seconds:.3} s"));
        times.push(seconds);
    }
    let mut decoded = vec![0.0; elements];
    let mut decoding = Vec::new();
    for member in &members {
        let start = Instant::now();
        fixed.decode(&member.sums, f64::from(ranks), &mut decoded);
        decoding.push(start.elapsed().as_secs_f64());
    }
    // All ranks had the same values, on a grid that fixed point holds exactly.
    ensure!(decoded == values, "the mean over the ranks is not what each of them had");

    let times = Samples::new(times);
    let bytes = (elements * size_of::<i64>()) as f64;
    let bus = 2.0 * f64::from(ranks - 1) / f64::from(ranks) * bytes / times.median();
    Ok(json!({
        "bench": "reduce",
        "bytes": bytes as u64,
        "ranks": ranks,
        "rounds": rounds,
        "reduce_ms": rounded(times.median() * 1e3),
        "bus_gigabytes_per_second": rounded(bus / 1e9),
        "bus_formula": "2 (ranks - 1) / ranks * bytes / seconds, each rank's sending and receiving",
        "encode_ms": rounded(Samples::new(encoding).median() * 1e3),
        "decode_ms": rounded(Samples::new(decoding).median() * 1e3),
        "machine": machine(),
    }))
}

/// Forms a ring whose ranks are all here.
async fn ring(ranks: u32) -> Result<Vec<Member>> {
    let id = RingId { incarnation: Incarnation(1), generation: Generation(1) };
    let (mut peers, mut all) = (Vec::new(), Vec::new());
    for rank in (0..ranks).map(Rank) {
        let listener = PeerListener::bind(([127, 0, 0, 1], 0).into()).await?;
        let address = listener.address().to_string();
        peers.push(Peer { rank, name: format!("rank-{rank}"), address });
        all.push((rank, listener.serve(Digest::of(b"bench")).0));
    }
    let mut forming = JoinSet::new();
    for (rank, own) in all {
        let peers = peers.clone();
        forming.spawn(async move {
            let collective = Ring::form(&own, id, rank, &peers, FORM_TIME).await?;
            anyhow::Ok(Member { collective, sums: Vec::new(), _peers: own })
        });
    }
    let mut members = Vec::new();
    while let Some(member) = forming.join_next().await {
        members.push(member.context("a rank failed")??);
    }
    Ok(members)
}

/// Reduces `own` on every rank; the time until the last one has the sum.
async fn reduce(members: &mut Vec<Member>, own: &[i64], tag: u64) -> Result<Duration> {
    members.iter_mut().for_each(|member| member.sums.copy_from_slice(own));
    let mut running = JoinSet::new();
    let start = Instant::now();
    for mut member in members.drain(..) {
        running.spawn(async move {
            member.collective.all_reduce(tag, &mut member.sums).await?;
            anyhow::Ok(member)
        });
    }
    while let Some(member) = running.join_next().await {
        members.push(member.context("a rank failed")??);
    }
    Ok(start.elapsed())
}
