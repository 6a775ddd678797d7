//! The control plane in a simulated world: the coordinator and the workers' sessions as they are, on
//! turmoil's network and clocks, over one object store; the gradient work is pretended. A seed decides
//! everything: how long messages take, who dies or is cut off and when, which store calls fail, whose
//! clock runs ahead. [`witness`] says what must be true at every moment, [`world`] what must be true
//! at the end.
//!
//! - `LOOPTRAIN_SIM_SEED=7` runs that seed alone and tells what happens.
//! - `LOOPTRAIN_SIM_SEEDS=100000` runs so many seeds, in place of a thousand.
//! - `LOOPTRAIN_SIM_FIRST=5000` begins with that seed.
#![allow(clippy::unwrap_used)]

mod arithmetic;
mod dice;
mod door;
mod hosts;
mod mime;
mod network;
mod objects;
mod plan;
mod shared;
mod witness;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::plan::{COORDINATORS, Cut, Fault, Plan, Timed, WORKERS};
use crate::world::{Counts, Report, run};

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`; it takes a number")))
}

/// As [`run`]; a panic is one more thing that may be wrong.
fn attempt(plan: &Plan, aloud: bool) -> Result<Report, Vec<String>> {
    catch_unwind(AssertUnwindSafe(|| run(plan, aloud))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(vec![format!("a panic: {}", text.unwrap_or_default())])
    })
}

fn replay(seed: u64) -> String {
    format!(
        "LOOPTRAIN_SIM_SEED={seed} cargo test --release --workspace --test simulation -- \
         --nocapture every_seed"
    )
}

#[test]
fn every_seed_ends_at_the_weights_of_an_undisturbed_run() {
    let undisturbed = attempt(&Plan::calm(0), false).unwrap().weights;
    if let Some(seed) = variable("LOOPTRAIN_SIM_SEED") {
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .without_time()
            .with_writer(std::io::stderr)
            .finish();
        let plan = Plan::draw(seed);
        eprintln!("{plan:#?}");
        let report = tracing::subscriber::with_default(subscriber, || attempt(&plan, true));
        let report = report.unwrap_or_else(|wrong| panic!("seed {seed}: {}", wrong.join("\n")));
        assert_eq!(report.weights, undisturbed);
        let (end, recovery) = (report.virtual_time, report.recovery);
        eprintln!(
            "seed {seed}: over after {end:?}, {recovery:?} after the last fault; {}",
            report.counts
        );
        return;
    }
    let first = variable("LOOPTRAIN_SIM_FIRST").unwrap_or(1);
    let seeds = variable("LOOPTRAIN_SIM_SEEDS").unwrap_or(1000);
    let (next, began) = (AtomicU64::new(first), Instant::now());
    let (failures, totals) = (Mutex::new(Vec::new()), Mutex::new(Totals::default()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds || failures.lock().unwrap().len() >= 10 {
                        return;
                    }
                    match attempt(&Plan::draw(seed), false) {
                        Ok(report) if report.weights == undisturbed => {
                            totals.lock().unwrap().add(seed, &report);
                        }
                        Ok(report) => {
                            let what = format!("seed {seed} ended at {}", report.weights);
                            failures.lock().unwrap().push(what);
                        }
                        Err(wrong) => {
                            let what = format!("seed {seed}: {}", wrong.join("; "));
                            eprintln!("{what}\n  replay: {}", replay(seed));
                            failures.lock().unwrap().push(what);
                        }
                    }
                }
            });
        }
    });
    let (failures, totals) = (failures.into_inner().unwrap(), totals.into_inner().unwrap());
    eprintln!("{seeds} seeds in {:.1} s: {totals}", began.elapsed().as_secs_f64());
    assert!(failures.is_empty(), "{} seeds failed:\n{}", failures.len(), failures.join("\n"));
    // A simulation in which nothing happens proves nothing.
    if seeds >= 1000 {
        for (what, count) in &totals.counts.0 {
            assert!(*count > 0, "no seed brought about: {what}");
        }
    }
}

#[test]
fn the_same_seed_runs_the_same_way_twice() {
    let first = variable("LOOPTRAIN_SIM_FIRST").unwrap_or(1);
    for seed in first..first + 50 {
        let [one, two] = [(); 2].map(|()| attempt(&Plan::draw(seed), false).unwrap().trace);
        let differs = one.iter().zip(&two).find(|(one, two)| one != two);
        assert_eq!(differs, None, "seed {seed} depends on more than its number");
        assert_eq!(one.len(), two.len(), "seed {seed} depends on more than its number");
    }
}

#[test]
fn a_coordinator_that_nobody_can_reach_is_fenced_by_the_store_while_the_next_one_goes_on() {
    let (at, until) = (Duration::from_secs(2), Duration::from_secs(9));
    let cut = Fault::Isolation(COORDINATORS[0], Cut::Drop);
    let next = Fault::Failover(WORKERS.to_vec());
    let faults = [cut, next].map(|fault| Timed { at, until, fault }).into();
    let report = attempt(&Plan { faults, calm: until, ..Plan::calm(3) }, false).unwrap();
    assert_eq!(report.counts.0["coordinators fenced"], 1);
    assert_eq!(report.weights, attempt(&Plan::calm(0), false).unwrap().weights);
}

#[test]
fn workers_that_stay_with_an_old_coordinator_commit_nothing_that_the_next_one_would_not() {
    let (at, until) = (Duration::from_secs(2), Duration::from_secs(7));
    // Nobody is told of the next one before the old one has seen it in the store.
    let faults = vec![Timed { at, until, fault: Fault::Failover(Vec::new()) }];
    let report = attempt(&Plan { faults, calm: until, ..Plan::calm(4) }, false).unwrap();
    assert_eq!(report.counts.0["coordinators fenced"], 1);
    // The old one's machine is gone by the time that they look for the next: that answers nothing.
    let recovery = report.recovery.as_secs_f64();
    assert!(recovery < 25.0, "it took {recovery:.1} s, of which 12 are for the steps");
    assert_eq!(report.weights, attempt(&Plan::calm(0), false).unwrap().weights);
}

/// What all seeds have brought about.
#[derive(Debug, Default)]
struct Totals {
    counts: Counts,
    virtual_time: Duration,
    /// The longest, and whose that was.
    recovery: (Duration, u64),
}

impl Totals {
    fn add(&mut self, seed: u64, report: &Report) {
        self.counts.add(&report.counts);
        self.virtual_time += report.virtual_time;
        self.recovery = self.recovery.max((report.recovery, seed));
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (longest, seed) = self.recovery;
        write!(
            f,
            "{:.0} s of virtual time, the longest way from the last fault to the end {:.1} s (seed \
             {seed}); {}",
            self.virtual_time.as_secs_f64(),
            longest.as_secs_f64(),
            self.counts
        )
    }
}
