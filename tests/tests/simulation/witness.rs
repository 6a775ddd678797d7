//! Sees all that coordinators decide, workers do and the store takes, and says what may not be.
//!
//! Its invariants:
//! - every slot of a reduced step is counted exactly once, and weights are those of the truth
//!   ([`crate::arithmetic::Truth`]) wherever they appear: on a worker, in a vote, in a log line, in a
//!   checkpoint;
//! - a coordinator decides steps one by one; it goes back only with a fall-back that it has announced,
//!   and never behind a checkpoint that there was when it began;
//! - the first generation of a coordinator starts no lower than what its members have brought, and
//!   no member is taken back behind a commit of its session;
//! - a step is judged by the trend of the steps before it, whatever became of who has known that;
//! - a worker takes part in no ring that is older than one it knows, and a coordinator that has been
//!   replaced begins no write, but for the ones that it was about to make.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use looptrain_coordinator::{RunEvent, StepRecord};
use looptrain_proto::v1::Trend;
use looptrain_proto::{Digest, Generation, Incarnation, Spec, Step};
use looptrain_storage::{CheckpointManifest, RunRecord};
use looptrain_worker::reduce::tcp::RingId;

use crate::arithmetic::{self, Truth};

/// A write of a coordinator that was replaced may be begun so much later: it looked just before, and
/// what lies between are a few calls to a store that takes half a second for each.
const ABOUT_TO: Duration = Duration::from_secs(4);

/// One process of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life {
    pub(crate) worker: &'static str,
    pub(crate) number: u64,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.worker, self.number)
    }
}

/// What is known of a worker's process.
#[derive(Debug, Default)]
struct Past {
    ring: RingId,
    /// The state it brought to its session.
    brought: Option<Step>,
    /// The newest commit of its session.
    obeyed: Option<Step>,
}

/// Where a coordinator is with its run.
#[derive(Debug, Default)]
struct Standing {
    claimed: Duration,
    /// The newest checkpoint there was then.
    durable: Step,
    at: Option<Step>,
    announced: Option<Step>,
    first: Option<Generation>,
}

#[derive(Debug)]
pub(crate) struct Witness {
    spec: Spec,
    truth: Truth,
    now: Duration,
    /// Print as it happens.
    aloud: bool,
    trace: Vec<String>,
    violations: Vec<String>,
    /// Which incarnation a coordinator's process is.
    processes: BTreeMap<String, Incarnation>,
    incarnations: BTreeMap<Incarnation, Standing>,
    lives: BTreeMap<Life, Past>,
    durable: Step,
    /// Steps that somebody decided, and when that was last.
    decided: BTreeMap<Step, Duration>,
    // What the faults have brought about, so that tests can see that they bite.
    pub(crate) storms: u64,
    pub(crate) loads: u64,
    pub(crate) fetches: u64,
    pub(crate) caught_up: u64,
    pub(crate) rewinds: u64,
    pub(crate) repeated: u64,
    pub(crate) generations: u64,
    pub(crate) lost: u64,
    pub(crate) fenced: u64,
    pub(crate) failed_saves: u64,
}

impl Witness {
    pub(crate) fn new(spec: &Spec, aloud: bool) -> Self {
        Self {
            spec: spec.clone(),
            truth: Truth::of(spec),
            now: Duration::ZERO,
            aloud,
            trace: Vec::new(),
            violations: Vec::new(),
            processes: BTreeMap::new(),
            incarnations: BTreeMap::new(),
            lives: BTreeMap::new(),
            durable: Step(0),
            decided: BTreeMap::new(),
            storms: 0,
            loads: 0,
            fetches: 0,
            caught_up: 0,
            rewinds: 0,
            repeated: 0,
            generations: 0,
            lost: 0,
            fenced: 0,
            failed_saves: 0,
        }
    }

    pub(crate) fn set_now(&mut self, now: Duration) {
        self.now = now;
    }

    pub(crate) fn now(&self) -> Duration {
        self.now
    }

    /// Adds a line to the trace.
    pub(crate) fn note(&mut self, who: impl fmt::Display, what: impl fmt::Display) {
        let line = format!("{:9.3} {who}: {what}", self.now.as_secs_f64());
        if self.aloud {
            eprintln!("{line}");
        }
        self.trace.push(line);
    }

    fn violation(&mut self, who: impl fmt::Display, what: impl fmt::Display) {
        let seconds = self.now.as_secs_f64();
        self.violations.push(format!("at {seconds:.3} s, {who}: {what}"));
        self.note(who, format!("VIOLATION: {what}"));
    }

    pub(crate) fn violations(&self) -> &[String] {
        &self.violations
    }

    /// All that happened, line by line.
    pub(crate) fn take_trace(&mut self) -> Vec<String> {
        std::mem::take(&mut self.trace)
    }

    /// Steps that were decided at least once, and when the last decision was.
    pub(crate) fn decided(&self) -> (usize, Duration) {
        let last = self.decided.values().copied().max();
        (self.decided.len(), last.unwrap_or_default())
    }

    pub(crate) fn truth(&self) -> &Truth {
        &self.truth
    }

    // ---- the store ---------------------------------------------------------------------------

    pub(crate) fn written(&mut self, owner: &str, begun: Duration, key: &str, bytes: &[u8]) {
        if key.contains("/record/") {
            return self.record_written(owner, bytes);
        }
        let Some(incarnation) = self.processes.get(owner).copied() else { return };
        let newer = self.incarnations.range(incarnation.next()..).map(|(_, it)| it.claimed).min();
        if newer.is_some_and(|claimed| begun > claimed + ABOUT_TO) {
            self.violation(owner, format!("wrote {key} though it has been replaced"));
        }
        if key.ends_with("/manifest.json") {
            match serde_json::from_slice::<CheckpointManifest>(bytes) {
                Ok(manifest) => self.manifest_written(owner, &manifest),
                Err(error) => self.violation(owner, format!("wrote a broken manifest: {error}")),
            }
        }
    }

    fn record_written(&mut self, owner: &str, bytes: &[u8]) {
        let incarnation = match serde_json::from_slice::<RunRecord>(bytes) {
            Ok(record) => record.incarnation,
            Err(error) => return self.violation(owner, format!("wrote a broken record: {error}")),
        };
        if self.processes.get(owner) == Some(&incarnation) {
            return;
        }
        self.note(owner, format!("is incarnation {incarnation} from here on"));
        let newest = self.incarnations.keys().next_back().copied().unwrap_or_default();
        if incarnation <= newest {
            self.violation(owner, format!("claims {incarnation} where there was {newest} already"));
        }
        self.processes.insert(owner.to_owned(), incarnation);
        let (claimed, durable) = (self.now, self.durable);
        let standing = Standing { claimed, durable, ..Standing::default() };
        self.incarnations.insert(incarnation, standing);
    }

    fn manifest_written(&mut self, owner: &str, manifest: &CheckpointManifest) {
        let step = manifest.step;
        self.note(owner, format!("checkpoint {step}"));
        let right = self.truth.weights(step).map(arithmetic::vouch);
        if right != Some(manifest.weights_digest) {
            self.violation(owner, format!("checkpoint {step} has wrong weights"));
        }
        if manifest.cursor != self.spec.cursor_after(step) {
            self.violation(owner, format!("checkpoint {step} is at {:?}", manifest.cursor));
        }
        self.durable = self.durable.max(step);
    }

    // ---- coordinators ------------------------------------------------------------------------

    /// A coordinator passes over checkpoints that it cannot read.
    pub(crate) fn passes_over(&mut self, owner: &str, newest_left: Step) {
        if let Some(incarnation) = self.processes.get(owner)
            && let Some(standing) = self.incarnations.get_mut(incarnation)
        {
            standing.durable = standing.durable.min(newest_left);
        }
        self.note(owner, format!("passes over checkpoints newer than {newest_left}"));
    }

    pub(crate) fn event(&mut self, owner: &str, event: &RunEvent) {
        self.note(owner, event_text(event));
        let Some(incarnation) = self.processes.get(owner).copied() else {
            return self.violation(owner, "speaks without a claim");
        };
        match event {
            RunEvent::Formed { generation, step, .. } => {
                self.generations += 1;
                self.formed(owner, incarnation, *generation, *step);
            }
            RunEvent::Committed(record) => self.commits(owner, incarnation, record),
            RunEvent::Rewound { to, .. } => {
                self.rewinds += 1;
                self.standing(incarnation).announced = Some(*to);
            }
            RunEvent::WorkerLost { .. } => self.lost += 1,
            RunEvent::CheckpointFailed { .. } => self.failed_saves += 1,
            _ => {}
        }
    }

    fn standing(&mut self, incarnation: Incarnation) -> &mut Standing {
        self.incarnations.entry(incarnation).or_default()
    }

    fn formed(&mut self, owner: &str, incarnation: Incarnation, _: Generation, step: Step) {
        let standing = self.standing(incarnation);
        let (before, announced, durable) = (standing.at, standing.announced, standing.durable);
        standing.at = Some(step);
        standing.announced = None;
        match before {
            None if step < durable => {
                let what = format!("begins at {step} though there is a checkpoint of {durable}");
                self.violation(owner, what);
            }
            Some(before) if step < before && announced.is_none_or(|to| to > step) => {
                self.violation(owner, format!("goes back from {before} to {step} silently"));
            }
            _ => {}
        }
    }

    fn commits(&mut self, owner: &str, incarnation: Incarnation, record: &StepRecord) {
        let step = record.step;
        let standing = self.standing(incarnation);
        let before = standing.at.replace(step);
        if before.map(Step::next) != Some(step) {
            self.violation(owner, format!("decides {step} after {before:?}"));
        }
        if self.truth.gradient(step) != Some(record.digest) {
            self.violation(owner, format!("decides {step} with a wrong gradient"));
        }
        if record.cursor != self.spec.cursor_after(step) {
            self.violation(owner, format!("is at {:?} after {step}", record.cursor));
        }
        if record.skipped.is_some() != arithmetic::SPIKES.contains(&step.0) {
            self.violation(owner, format!("skips {step}, or does not: {:?}", record.skipped));
        }
        let again = self.decided.insert(step, self.now).is_some();
        self.repeated += u64::from(again);
    }

    // ---- workers -----------------------------------------------------------------------------

    /// A worker joins another coordinator with what it has.
    pub(crate) fn brings(&mut self, life: &Life, held: Option<Step>, prepared: Option<Step>) {
        let past = self.lives.entry(*life).or_default();
        (past.brought, past.obeyed) = (held, None);
        let show = |step: Option<Step>| step.map_or_else(|| "-".into(), |step| step.to_string());
        self.note(life, format!("brings {} and {}", show(held), show(prepared)));
    }

    pub(crate) fn forms(&mut self, life: &Life, ring: RingId, step: Step, held: Option<Step>) {
        let standing = self.standing(ring.incarnation);
        let first = *standing.first.get_or_insert(ring.generation) == ring.generation;
        let past = self.lives.entry(*life).or_default();
        let (before, brought, obeyed) = (past.ring, past.brought, past.obeyed);
        past.ring = before.max(ring);
        let at = held.map_or_else(|| "nothing".into(), |held| format!("step {held}"));
        self.note(life, format!("forms {ring} at step {step}, holding {at}"));
        if ring <= before {
            self.violation(life, format!("goes into {ring} after {before}"));
        }
        if first && brought > Some(step) {
            let what = format!("brought {brought:?}, and {ring} starts at {step} with it");
            self.violation(life, what);
        }
        if obeyed > Some(step) {
            self.violation(life, format!("has committed {obeyed:?}, and {ring} is at {step}"));
        }
    }

    /// A step is to be judged by what the steps before it were.
    pub(crate) fn planned(&mut self, life: &Life, step: Step, trend: Option<Trend>) {
        let right = self.truth.trend(Step(step.0 - 1));
        if trend != right {
            let what = format!("is to judge step {step} by {trend:?} instead of {right:?}");
            self.violation(life, what);
        }
    }

    pub(crate) fn prepares(&mut self, life: &Life, step: Step, slots: &[u64], gradient: Digest) {
        let mut sorted = slots.to_vec();
        sorted.sort_unstable();
        self.note(life, format!("prepares {step}"));
        if sorted != (0..arithmetic::slots_of(&self.spec, step)).collect::<Vec<_>>() {
            self.violation(life, format!("counted slots {sorted:?} in step {step}"));
        }
        if self.truth.gradient(step) != Some(gradient) {
            self.violation(life, format!("has a wrong gradient of step {step}"));
        }
    }

    pub(crate) fn obeys(&mut self, life: &Life, step: Step) {
        self.lives.entry(*life).or_default().obeyed = Some(step);
        self.note(life, format!("commits {step}"));
    }

    pub(crate) fn holds(&mut self, life: &Life, step: Step, weights: Digest) {
        self.note(life, format!("holds {step}"));
        if self.truth.weights(step) != Some(weights) {
            self.violation(life, format!("holds wrong weights of step {step}"));
        }
    }
}

/// An event without what the wall clock says.
fn event_text(event: &RunEvent) -> String {
    match event {
        RunEvent::Committed(record) => {
            format!("commit {} by {}", record.step, record.world)
        }
        event => event.to_string(),
    }
}

#[test]
fn a_slot_that_is_left_out_or_counted_twice_is_seen() {
    let spec = crate::shared::spec();
    let life = Life { worker: "w0", number: 1 };
    let right = Truth::of(&spec).gradient(Step(1)).unwrap();
    for (slots, seen) in [(vec![3, 4, 0, 1, 2], 0), (vec![0, 1, 2, 3], 1), (vec![0, 0, 1, 2, 3], 1)]
    {
        let mut witness = Witness::new(&spec, false);
        witness.prepares(&life, Step(1), &slots, right);
        assert_eq!(witness.violations().len(), seen, "{:?}", witness.violations());
        let gradient = arithmetic::gradient(arithmetic::initial(&spec), Step(1), &slots);
        assert_eq!(gradient == right, seen == 0);
    }
}

#[test]
fn a_worker_that_goes_back_to_an_older_coordinator_or_behind_its_commit_is_seen() {
    let ring = |incarnation, generation| RingId {
        incarnation: Incarnation(incarnation),
        generation: Generation(generation),
    };
    let life = Life { worker: "w0", number: 1 };
    let mut witness = Witness::new(&crate::shared::spec(), false);
    witness.forms(&life, ring(2, 3), Step(4), None);
    witness.obeys(&life, Step(5));
    witness.forms(&life, ring(2, 4), Step(5), Some(Step(5)));
    assert!(witness.violations().is_empty());
    witness.forms(&life, ring(1, 9), Step(5), Some(Step(5)));
    assert!(witness.violations()[0].contains("after generation 4 (incarnation 2)"));
    witness.forms(&life, ring(2, 5), Step(4), Some(Step(5)));
    assert!(witness.violations()[1].contains("has committed"));
    witness.brings(&life, Some(Step(5)), None);
    witness.forms(&life, ring(3, 1), Step(4), Some(Step(5)));
    assert!(witness.violations()[2].contains("brought"), "{:?}", witness.violations());
}

#[test]
fn what_a_coordinator_may_not_do_is_seen() {
    let record = |incarnation| {
        let fresh = RunRecord::new(Digest::of(b"spec"), String::new(), &[]);
        let record = RunRecord { incarnation: Incarnation(incarnation), ..fresh };
        serde_json::to_vec(&record).unwrap()
    };
    let formed = |step| RunEvent::Formed {
        generation: Generation(1),
        world: 1,
        step: Step(step),
        reason: String::new(),
    };
    let mut witness = Witness::new(&crate::shared::spec(), false);
    witness.written("c0.1", Duration::ZERO, "runs/r/record/1.json", &record(1));
    witness.event("c0.1", &formed(5));
    witness.event("c0.1", &formed(4));
    assert!(witness.violations()[0].contains("silently"));
    witness.event("c0.1", &RunEvent::Rewound { to: Step(2), reason: String::new() });
    witness.event("c0.1", &formed(2));
    assert_eq!(witness.violations().len(), 1, "it has been announced");
    witness.written("c1.1", Duration::ZERO, "runs/r/record/2.json", &record(2));
    witness.written("c0.1", ABOUT_TO, "runs/r/metrics/steps-1.jsonl", b"");
    assert_eq!(witness.violations().len(), 1, "it was about to");
    witness.written("c0.1", 2 * ABOUT_TO, "runs/r/metrics/steps-1.jsonl", b"");
    assert!(witness.violations()[1].contains("replaced"));
    witness.durable = Step(9);
    witness.written("c0.2", ABOUT_TO, "runs/r/record/3.json", &record(3));
    witness.event("c0.2", &formed(8));
    assert!(witness.violations()[2].contains("checkpoint of 9"));
}
