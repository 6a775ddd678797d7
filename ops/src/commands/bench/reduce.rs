//! `looptrain bench reduce`: how fast a gradient is summed over a ring, as floats and in fixed point.
//!
//! Both sums are of the same gradient; in fixed point it takes twice the bytes. Bus bandwidth is the
//! measure of all-reduces that does not depend on the number of ranks: each rank has to send, and to
//! receive, `2 (n - 1) / n` times the bytes of its sums, so that is divided by the time. (The formula
//! is that of NVIDIA's nccl-tests.)

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use looptrain_proto::spec::Reduction;
use looptrain_proto::transport::{Authority, Credentials, Identity, Role};
use looptrain_proto::{Digest, Generation, Incarnation, Rank};
use looptrain_worker::reduce::tcp::{Peer, PeerListener, Peers, Ring, RingId};
use looptrain_worker::reduce::{Arithmetic, Collective, Sums};
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
    /// Those of the last round, whose memory is used again.
    sums: Option<Sums>,
    /// The listener, which ends with this.
    _peers: Peers,
}

/// Seconds that one kind of sum took, a sample a round; adding and taking the mean, of one rank.
#[derive(Default)]
struct Times {
    bytes: usize,
    add: Vec<f64>,
    reduce: Vec<f64>,
    mean: Vec<f64>,
}

pub(super) async fn run(args: ReduceBench) -> Result<Value> {
    let ReduceBench { workers, bytes, reduction, streams, secured, rounds } = args;
    let elements = usize::try_from(bytes)? / size_of::<f32>();
    // On a grid that fixed point and floats hold exactly, so that no sum is rounded.
    let values: Vec<f32> = (0..elements).map(|index| ((index % 8191) as f32) / 4096.0).collect();
    let mut means = vec![0.0; elements];
    let mut members = ring(workers, streams, secured).await?;
    let kinds = match reduction {
        Some(reduction) => vec![reduction.into()],
        None => vec![Reduction::Exact, Reduction::Fast, Reduction::FastBf16],
    };
    let mut times: Vec<Times> = kinds.iter().map(|_| Times::default()).collect();
    // Of each kind one round more, first, for memory that has never been touched.
    for round in 0..=rounds {
        for (kind, times) in kinds.iter().zip(&mut times) {
            let arithmetic = Arithmetic::new(*kind, FRACTION_BITS, workers);
            let add = add(&mut members, arithmetic, &values)?;
            let tag = u64::from(round);
            let reduce = reduce(&mut members, tag).await?.as_secs_f64();
            let mut mean = 0.0;
            for sums in members.iter().filter_map(|member| member.sums.as_ref()) {
                let start = Instant::now();
                sums.mean(f64::from(workers), &mut means);
                mean = start.elapsed().as_secs_f64();
                times.bytes = sums.bytes();
                // All ranks had the same values. Each addition in bf16 rounds to eight bits.
                let error = match kind {
                    Reduction::FastBf16 => (workers + 2) as f32 / 256.0,
                    Reduction::Exact | Reduction::Fast => 0.0,
                };
                let near = |(mean, value): (&f32, &f32)| (mean - value).abs() <= error * value;
                let right = means.iter().zip(&values).all(near);
                ensure!(right, "the mean over the ranks is not what each of them had");
            }
            if round > 0 {
                print_line(&format!("round {round} of {rounds}, {kind:?}: {reduce:.3} s"));
                times.add.push(add.as_secs_f64());
                times.reduce.push(reduce);
                times.mean.push(mean);
            }
        }
    }
    let mut figures = json!({
        "bench": "reduce",
        "workers": workers,
        "streams": streams,
        "secured": secured,
        "bytes": elements * size_of::<f32>(),
        "rounds": rounds,
        "bus_formula": "2 (workers - 1) / workers * bytes / seconds, each rank's sending and receiving",
        "machine": machine(),
    });
    let medians: Vec<f64> = times.iter().map(|times| median(&times.reduce)).collect();
    if let [exact, fast, bf16] = medians[..] {
        figures["exact_over_fast"] = rounded(exact / fast).into();
        figures["fast_over_fast_bf16"] = rounded(fast / bf16).into();
    }
    for (kind, times) in kinds.iter().zip(times) {
        let name = match kind {
            Reduction::Exact => "exact",
            Reduction::Fast => "fast",
            Reduction::FastBf16 => "fast_bf16",
        };
        figures[name] = times.figures(workers);
    }
    Ok(figures)
}

fn median(seconds: &[f64]) -> f64 {
    Samples::new(seconds.to_vec()).median()
}

impl Times {
    fn figures(&self, workers: u32) -> Value {
        let seconds = median(&self.reduce);
        let bus = 2.0 * f64::from(workers - 1) / f64::from(workers) * self.bytes as f64 / seconds;
        let least = self.reduce.iter().copied().fold(f64::INFINITY, f64::min);
        json!({
            "sum_bytes": self.bytes,
            "reduce_ms": rounded(seconds * 1e3),
            "reduce_min_ms": rounded(least * 1e3),
            "bus_gigabytes_per_second": rounded(bus / 1e9),
            "add_ms": rounded(median(&self.add) * 1e3),
            "mean_ms": rounded(median(&self.mean) * 1e3),
        })
    }
}

/// Forms a ring whose ranks are all here.
async fn ring(workers: u32, streams: u32, secured: bool) -> Result<Vec<Member>> {
    let credentials = if secured { Some(credentials()?) } else { None };
    let id = RingId { incarnation: Incarnation(1), generation: Generation(1) };
    let (mut peers, mut all) = (Vec::new(), Vec::new());
    for rank in (0..workers).map(Rank) {
        let listener = PeerListener::bind(([127, 0, 0, 1], 0).into()).await?;
        let listener = listener.secured(credentials.clone());
        let address = listener.address().to_string();
        peers.push(Peer { rank, name: format!("rank-{rank}"), address });
        all.push((rank, listener.serve(Digest::of(b"bench")).0));
    }
    let mut forming = JoinSet::new();
    for (rank, own) in all {
        let peers = peers.clone();
        forming.spawn(async move {
            let collective = Ring::form(&own, id, rank, &peers, streams, FORM_TIME).await?;
            anyhow::Ok(Member { collective, sums: None, _peers: own })
        });
    }
    let mut members = Vec::new();
    while let Some(member) = forming.join_next().await {
        members.push(member.context("a rank failed")??);
    }
    Ok(members)
}

/// What all ranks show, good for as long as a bench takes.
fn credentials() -> Result<Arc<Credentials>> {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    let directory = std::env::temp_dir().join(format!("looptrain-bench-{}", std::process::id()));
    let identity = Identity::new(Role::Worker, "bench")?;
    let issued = Authority::new("bench", now - hour..now + hour)?.issue(
        &identity,
        &[],
        now - hour..now + hour,
    )?;
    issued.write(&directory, true)?;
    let credentials = Credentials::load(&directory, &[Role::Worker]);
    std::fs::remove_dir_all(&directory)?;
    Ok(credentials?)
}

/// Gives every rank the sums of one slot with this gradient; the time that the last of them took.
fn add(members: &mut [Member], arithmetic: Arithmetic, gradient: &[f32]) -> Result<Duration> {
    let mut time = Duration::ZERO;
    for member in members {
        let mut sums = Sums::zeroed(arithmetic, gradient.len(), 0, member.sums.take());
        let start = Instant::now();
        sums.add(gradient)?;
        time = start.elapsed();
        member.sums = Some(sums);
    }
    Ok(time)
}

/// Reduces the sums of all ranks; the time until the last one has the result.
async fn reduce(members: &mut Vec<Member>, tag: u64) -> Result<Duration> {
    let mut running = JoinSet::new();
    let start = Instant::now();
    for mut member in members.drain(..) {
        running.spawn(async move {
            let sums = member.sums.take().context("a rank has no sums")?;
            member.sums = Some(member.collective.all_reduce(tag, sums).await?.sums);
            anyhow::Ok(member)
        });
    }
    while let Some(member) = running.join_next().await {
        members.push(member.context("a rank failed")??);
    }
    Ok(start.elapsed())
}
