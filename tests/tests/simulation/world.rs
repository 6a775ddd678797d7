//! The world of one seed, and the hand that lets the plan happen to it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use looptrain_coordinator::{Outcome, StepRecord};
use looptrain_proto::{Digest, Step};
use looptrain_storage::{Store, read_metrics, read_record};

use crate::arithmetic;
use crate::hosts::{coordinate, work};
use crate::plan::{COORDINATORS, Cut, Fault, Plan, Timed, WORKERS};
use crate::shared::{STORE_URL, Shared, lock, spec};

/// How finely the hosts' times run beside each other, and the least that a message takes.
const TICK: Duration = Duration::from_millis(10);

/// Within this time after the last fault the run must be over.
const PATIENCE: Duration = Duration::from_secs(120);

/// What became of a seed.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) trace: Vec<String>,
    pub(crate) weights: Digest,
    /// Virtual time from the last fault to the end.
    pub(crate) recovery: Duration,
    pub(crate) virtual_time: Duration,
    pub(crate) counts: Counts,
}

/// What the faults have brought about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts(pub(crate) BTreeMap<&'static str, u64>);

impl Counts {
    pub(crate) fn add(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            *self.0.entry(what).or_default() += count;
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> =
            self.0.iter().map(|(what, count)| format!("{what} {count}")).collect();
        f.write_str(&all.join(", "))
    }
}

/// The hand of fate.
struct World<'a> {
    sim: turmoil::Sim<'a>,
    shared: Arc<Shared>,
    active: Vec<Fault>,
    /// The cuts that the network has at the moment.
    cuts: BTreeMap<(&'static str, &'static str), Cut>,
    counts: Counts,
}

/// Runs a plan to its end.
///
/// # Errors
/// What is wrong with it, one line each.
pub(crate) fn run(plan: &Plan, aloud: bool) -> Result<Report, Vec<String>> {
    let shared = Arc::new(Shared::new(plan, spec(), aloud));
    let mut world = World::build(plan, Arc::clone(&shared));
    let ended = world.live(plan);
    let weights = ended.map_err(|what| {
        let mut all = shared.witness().violations().to_vec();
        all.push(what);
        all
    })?;
    let now = world.sim.elapsed();
    drop(world.sim);
    let mut counts = world.counts;
    let mut witness = shared.witness();
    for (what, count) in [
        ("failed store calls", witness.storms),
        ("states loaded", witness.loads),
        ("states fetched", witness.fetches),
        ("prepared steps committed by a new generation", witness.caught_up),
        ("rewinds", witness.rewinds),
        ("steps done again", witness.repeated),
        ("generations", witness.generations),
        ("workers lost", witness.lost),
        ("coordinators fenced", witness.fenced),
        ("failed checkpoints", witness.failed_saves),
    ] {
        counts.0.insert(what, count);
    }
    let recovery = now.saturating_sub(plan.calm);
    Ok(Report { trace: witness.take_trace(), weights, recovery, virtual_time: now, counts })
}

impl World<'_> {
    fn build(plan: &Plan, shared: Arc<Shared>) -> Self {
        let mut sim = turmoil::Builder::new()
            .rng_seed(plan.seed)
            .epoch(UNIX_EPOCH)
            .simulation_duration(Duration::from_secs(3600))
            .tick_duration(TICK)
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(1))
            .tcp_capacity(1024)
            .enable_random_order()
            .build();
        for host in COORDINATORS {
            let shared = Arc::clone(&shared);
            sim.host(host, move || coordinate(Arc::clone(&shared), host));
        }
        for host in WORKERS {
            let shared = Arc::clone(&shared);
            sim.host(host, move || work(Arc::clone(&shared), host));
        }
        // These are started later.
        sim.crash(COORDINATORS[1]);
        sim.crash(WORKERS[3]);
        Self { sim, shared, active: Vec::new(), cuts: BTreeMap::new(), counts: Counts::default() }
    }

    /// The weights at the end, or what is wrong.
    fn live(&mut self, plan: &Plan) -> Result<Digest, String> {
        let mut coming = plan.faults.clone();
        let mut ending: Vec<Timed> = Vec::new();
        let (mut spare, mut calm) = (false, false);
        loop {
            let now = self.sim.elapsed();
            self.shared.witness().set_now(now);
            if !spare && now >= plan.spare_at {
                spare = true;
                self.start(WORKERS[3]);
            }
            while let Some(timed) = ending.pop_if(|timed| timed.until <= now) {
                self.end(&timed.fault);
            }
            while coming.first().is_some_and(|timed| timed.at <= now) {
                let timed = coming.remove(0);
                self.begin(&timed.fault);
                ending.push(timed);
                ending.sort_by_key(|timed| std::cmp::Reverse(timed.until));
            }
            if !calm && coming.is_empty() && ending.is_empty() && spare && now >= plan.calm {
                calm = true;
                self.calm_down();
            }
            if calm && now.as_millis().is_multiple_of(1000) {
                self.keep_up();
            }
            self.sim.step().map_err(|error| format!("a host failed: {error}"))?;
            if !self.shared.witness().violations().is_empty() {
                return Err("stopped at the first violation".into());
            }
            if let Some(outcome) = lock(&self.shared.outcome).take() {
                return self.judge(&outcome);
            }
            if now > plan.calm + PATIENCE {
                let (steps, last) = self.shared.witness().decided();
                return Err(format!(
                    "no end in sight {} s after the last fault: {steps} steps were decided, the \
                     last decision was at {:.1} s",
                    PATIENCE.as_secs(),
                    last.as_secs_f64()
                ));
            }
        }
    }

    fn start(&mut self, host: &'static str) {
        if !self.sim.is_host_running(host) {
            self.sim.bounce(host);
        }
    }

    /// A process dies. Its connections are closed in an order that depends on more than the seed, so
    /// they are held meanwhile, and all ends are delivered at once.
    fn kill(&mut self, host: &'static str) {
        let others = COORDINATORS.into_iter().chain(WORKERS).filter(|other| *other != host);
        let whole: Vec<&'static str> = others
            .filter(|other| !self.cuts.contains_key(&(host.min(other), host.max(*other))))
            .collect();
        whole.iter().for_each(|other| self.sim.hold(host, *other));
        self.sim.crash(host);
        whole.iter().for_each(|other| self.sim.release(host, *other));
    }

    fn begin(&mut self, fault: &Fault) {
        self.shared.witness().note("fate", fault);
        let kind = match fault {
            Fault::Crash(_) => "crashes",
            Fault::PowerCut(_) => "power cuts",
            Fault::Cut(..) => "cut links",
            Fault::Isolation(..) => "isolations",
            Fault::Failover(_) => "failovers",
            Fault::Storm { .. } => "storms",
            Fault::Leap(..) => "clock leaps",
            Fault::Leave(_) => "farewells",
        };
        *self.counts.0.entry(kind).or_default() += 1;
        self.active.push(fault.clone());
        match fault {
            Fault::PowerCut(host) => {
                // First the cable, so that nobody hears it die.
                self.cut_links();
                self.kill(host);
            }
            Fault::Crash(host) => self.kill(host),
            Fault::Cut(..) | Fault::Isolation(..) => self.cut_links(),
            Fault::Failover(first) => {
                let next = self.other();
                *lock(&self.shared.current) = next;
                first.iter().for_each(|worker| self.route(worker, next));
                self.kill(next);
                self.start(next);
            }
            Fault::Storm { errors, slow } => {
                let mut weather = lock(&self.shared.weather);
                (weather.errors, weather.slow) = (*errors, *slow);
            }
            Fault::Leap(host, by) => {
                let by = by.as_millis() as u64;
                self.shared.leaps[host].fetch_add(by, Ordering::Relaxed);
            }
            Fault::Leave(worker) => {
                if let Some(stop) = lock(&self.shared.stops).get(worker) {
                    stop.tell("told to stop");
                }
            }
        }
    }

    fn end(&mut self, fault: &Fault) {
        self.shared.witness().note("fate", format!("no more {fault}"));
        let same = |active: &Fault| active.to_string() == fault.to_string();
        if let Some(index) = self.active.iter().position(same) {
            self.active.remove(index);
        }
        match fault {
            Fault::PowerCut(host) => {
                self.cut_links();
                self.start(host);
            }
            Fault::Crash(host) => self.start(host),
            Fault::Cut(..) | Fault::Isolation(..) => self.cut_links(),
            Fault::Failover(_) => {
                let current = *lock(&self.shared.current);
                WORKERS.iter().for_each(|worker| self.route(worker, current));
            }
            Fault::Storm { .. } => lock(&self.shared.weather).clear_up(),
            Fault::Leap(..) | Fault::Leave(_) => {}
        }
    }

    /// The coordinator's host that is not the current one.
    fn other(&self) -> &'static str {
        let current = *lock(&self.shared.current);
        if current == COORDINATORS[0] { COORDINATORS[1] } else { COORDINATORS[0] }
    }

    fn route(&self, worker: &'static str, to: &'static str) {
        lock(&self.shared.routes).insert(worker, to);
    }

    /// Makes the network what the active faults want it to be; the worst of several counts.
    fn cut_links(&mut self) {
        let mut wanted: BTreeMap<(&'static str, &'static str), Cut> = BTreeMap::new();
        let hosts: Vec<&'static str> = COORDINATORS.into_iter().chain(WORKERS).collect();
        for fault in &self.active {
            let mut want = |a: &'static str, b: &'static str, cut: Cut| {
                let there = wanted.get(&(a.min(b), a.max(b))).copied();
                match (there, cut) {
                    (Some(Cut::Drop), _) | (Some(Cut::DropOneWay), Cut::Hold) => {}
                    // From the first to the second, in the order of their names.
                    (_, cut) => drop(wanted.insert((a.min(b), a.max(b)), cut)),
                }
            };
            match fault {
                Fault::Cut(a, b, cut) => want(a, b, *cut),
                Fault::Isolation(host, cut) => hosts
                    .iter()
                    .filter(|other| *other != host)
                    .for_each(|other| want(host, other, *cut)),
                Fault::PowerCut(host) => hosts
                    .iter()
                    .filter(|other| *other != host)
                    .for_each(|other| want(host, other, Cut::Drop)),
                _ => {}
            }
        }
        // A link that changes its way of being cut is whole for a moment.
        for (pair, cut) in &self.cuts {
            if wanted.get(pair) != Some(cut) {
                match cut {
                    Cut::Hold => self.sim.release(pair.0, pair.1),
                    Cut::Drop | Cut::DropOneWay => self.sim.repair(pair.0, pair.1),
                }
            }
        }
        for (pair, cut) in &wanted {
            if self.cuts.get(pair) != Some(cut) {
                match cut {
                    Cut::Hold => self.sim.hold(pair.0, pair.1),
                    Cut::Drop => self.sim.partition(pair.0, pair.1),
                    Cut::DropOneWay => self.sim.partition_oneway(pair.0, pair.1),
                }
            }
        }
        self.cuts = wanted;
    }

    /// The faults are over: whoever is meant to run runs, and is found.
    fn calm_down(&mut self) {
        self.shared.witness().note("fate", "calm");
        let current = *lock(&self.shared.current);
        WORKERS.iter().for_each(|worker| self.route(worker, current));
        WORKERS.iter().for_each(|worker| self.start(worker));
        let other = self.other();
        self.kill(other);
        self.keep_up();
    }

    /// An operator starts the coordinator again when it is down.
    fn keep_up(&mut self) {
        let current = *lock(&self.shared.current);
        if lock(&self.shared.outcome).is_none() {
            self.start(current);
        }
    }

    /// Is it the right end, and does the store say the same?
    fn judge(&self, outcome: &Outcome) -> Result<Digest, String> {
        let witness = self.shared.witness();
        let total = self.shared.spec.total_steps();
        let right = witness.truth().weights(total).map(arithmetic::vouch);
        if outcome.step != total || outcome.stopped || outcome.weights_digest != right {
            return Err(format!("a wrong end: {outcome:?}, the weights should be {right:?}"));
        }
        let (steps, _) = witness.decided();
        if steps as u64 != total.0 {
            return Err(format!("only {steps} of {total} steps were ever decided"));
        }
        let objects: Arc<dyn object_store::ObjectStore> = Arc::clone(&self.shared.objects) as _;
        let store = Store::simulated(objects, STORE_URL);
        let run = &self.shared.spec.run.name;
        let (record, lines) = futures::executor::block_on(async {
            (read_record(&store, run).await, read_metrics(&store, run).await)
        });
        let record = record.map_err(|error| error.to_string())?;
        let finished = record.and_then(|record| record.finished);
        if finished.map(|finished| Some(finished.weights_digest)) != Some(right) {
            return Err("the run's record does not say how it ended".into());
        }
        let mut logged = Vec::new();
        for line in lines.map_err(|error| error.to_string())? {
            let line: StepRecord = serde_json::from_value(line).map_err(|e| e.to_string())?;
            if witness.truth().gradient(line.step) != Some(line.digest) {
                return Err(format!("the log has a wrong gradient of step {}", line.step));
            }
            logged.push(line.step);
        }
        // Whoever holds a state knows what was voted on the way there, so no line dies with a coordinator.
        if !logged.iter().copied().eq((1..=total.0).map(Step)) {
            return Err(format!("the log has not each step once and in order: {logged:?}"));
        }
        right.ok_or_else(|| "there is no truth".to_owned())
    }
}
