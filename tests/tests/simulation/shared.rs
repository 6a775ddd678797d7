//! What the parts of a simulation share, beyond the network.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use looptrain_coordinator::Outcome;
use looptrain_proto::Spec;
use looptrain_storage::Store;
use looptrain_worker::Stop;
use object_store::memory::InMemory;
use tokio::time::sleep;

use crate::dice::Dice;
use crate::objects::{Objects, Weather};
use crate::plan::{COORDINATORS, Plan, Skew, WORKERS};
use crate::witness::{Life, Witness};

pub(crate) const STORE_URL: &str = "memory://simulation";

/// How long the messages of a connection are on their way.
#[derive(Debug)]
pub(crate) struct Latency {
    dice: Dice,
    /// In milliseconds.
    longest: u64,
}

impl Latency {
    /// Mostly short, now and then as long as may be.
    pub(crate) fn next(&mut self) -> Duration {
        let longest = if self.dice.chance(100) { self.longest } else { 1 + self.longest / 8 };
        self.dice.millis(1, longest)
    }
}

/// What the parts of a simulation share, beyond the network. It survives every host.
pub(crate) struct Shared {
    pub(crate) spec: Spec,
    pub(crate) witness: Arc<Mutex<Witness>>,
    pub(crate) objects: Arc<InMemory>,
    pub(crate) weather: Arc<Mutex<Weather>>,
    seed: u64,
    /// Of a slot, in milliseconds.
    slot: u64,
    /// That a message waits before it is sent, in milliseconds.
    longest: u64,
    /// Processes that have been started, by host.
    processes: Mutex<BTreeMap<&'static str, u64>>,
    skews: BTreeMap<&'static str, Skew>,
    /// Milliseconds that a host's clock is still to leap.
    pub(crate) leaps: BTreeMap<&'static str, AtomicU64>,
    /// Whom each worker finds at the coordinator's address.
    pub(crate) routes: Mutex<BTreeMap<&'static str, &'static str>>,
    /// The coordinator that is meant to be the one.
    pub(crate) current: Mutex<&'static str>,
    pub(crate) stops: Mutex<BTreeMap<&'static str, Stop>>,
    pub(crate) outcome: Mutex<Option<Outcome>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(plan: &Plan, mut spec: Spec, aloud: bool) -> Self {
        if plan.seed.is_multiple_of(3) {
            // One of the workers is a warm spare as long as all the others live.
            spec.cluster.max_workers = WORKERS.len() as u32 - 1;
        }
        let hosts = || COORDINATORS.into_iter().chain(WORKERS);
        Self {
            witness: Arc::new(Mutex::new(Witness::new(&spec, aloud))),
            spec,
            objects: Arc::default(),
            weather: Arc::new(Mutex::new(Weather::fair(plan.seed))),
            seed: plan.seed,
            slot: plan.slot,
            longest: plan.latency,
            processes: Mutex::default(),
            skews: plan.skews.iter().copied().collect(),
            leaps: hosts().map(|host| (host, AtomicU64::new(0))).collect(),
            routes: Mutex::new(WORKERS.map(|worker| (worker, COORDINATORS[0])).into()),
            current: Mutex::new(COORDINATORS[0]),
            stops: Mutex::default(),
            outcome: Mutex::default(),
        }
    }

    pub(crate) fn witness(&self) -> MutexGuard<'_, Witness> {
        lock(&self.witness)
    }

    /// The store as `owner` has it.
    pub(crate) fn store(&self, owner: &str) -> Store {
        let objects = Objects {
            inner: Arc::clone(&self.objects),
            weather: Arc::clone(&self.weather),
            witness: Arc::clone(&self.witness),
            owner: owner.to_owned(),
        };
        Store::simulated(Arc::new(objects), STORE_URL)
    }

    /// Who is at the coordinator's address, for a worker.
    pub(crate) fn route(&self, worker: &'static str) -> &'static str {
        lock(&self.routes).get(worker).copied().unwrap_or(COORDINATORS[0])
    }

    /// Of a connection that a host has with a peer from now on.
    pub(crate) fn latency(&self, host: &str, peer: &str) -> Latency {
        Latency { dice: self.dice(&format!("{host} to {peer}")), longest: self.longest }
    }

    pub(crate) fn slot_time(&self, life: &Life) -> Duration {
        self.dice(&format!("slot of {life}")).millis(1, self.slot)
    }

    /// For what happens now; not for the next in a row, whose order nobody can fix.
    fn dice(&self, purpose: &str) -> Dice {
        Dice::new(self.seed, &format!("{purpose} at {:?}", self.witness().now()))
    }

    pub(crate) fn begin(&self, host: &'static str) -> Life {
        let mut processes = lock(&self.processes);
        let number = processes.entry(host).or_default();
        *number += 1;
        Life { worker: host, number: *number }
    }

    /// Lets a host's clock run as the plan has it, for as long as the host is up.
    pub(crate) async fn run_clock(self: Arc<Self>, host: &'static str) {
        let skew = self.skews.get(host).copied();
        let every = skew.map_or(Duration::from_millis(500), |skew| skew.every);
        loop {
            sleep(every).await;
            let leap = Duration::from_millis(self.leaps[host].swap(0, Ordering::Relaxed));
            let ahead = leap + skew.map_or(Duration::ZERO, |skew| skew.by);
            if ahead > Duration::ZERO {
                tokio::time::advance(ahead).await;
            }
        }
    }
}

pub(crate) fn spec() -> Spec {
    let text = r#"
        [run]
        name = "simulated"
        store = "memory://simulation"
        seed = 11
        [cluster]
        workers = 3
        worker_timeout = 1.0
        [model]
        hidden_size = 8
        num_hidden_layers = 1
        num_attention_heads = 2
        intermediate_size = 16
        vocab_size = 512
        [optimizer.spikes]
        window = 8
        [[datasets]]
        name = "text"
        [[stages]]
        name = "first"
        steps = 50
        sequence_length = 16
        slots = 5
        slot_sequences = 2
        loops = 2
        entropy_weight = 0.05
        learning_rate = { peak = 1e-3 }
        [[stages]]
        name = "second"
        steps = 30
        sequence_length = 16
        slots = 7
        slot_sequences = 1
        loops = 2
        entropy_weight = 0.05
        learning_rate = { peak = 1e-3 }
        [checkpoint]
        every_steps = 9
        keep = 2
        [evaluation]
        every_steps = 17
        sequences = 5
    "#;
    Spec::parse("simulation", text, &[]).expect("the spec above is consistent")
}
