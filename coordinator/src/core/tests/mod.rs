//! One file a transition; the tests' names are the protocol's table of contents. [`Rig`] plays
//! the runtime and the workers.
#![allow(clippy::unwrap_used)]

mod away;
mod collective;
mod commit;
mod evaluate;
mod fail;
mod finish;
mod form;
mod goodput;
mod join;
mod lose;
mod orders;
mod parting;
mod patience;
mod random_events;
mod return_;
mod save;
mod search;
mod spare;
mod speed;
mod spike;
mod wait;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use looptrain_proto::v1::{self, failed::Cause};
use looptrain_proto::{Digest, Generation, Incarnation, Spec, Step, WorkerId};

use super::*;
use crate::records::Outcome;
pub(super) use crate::testing::spec;

pub(super) fn introduction(name: &str) -> v1::Join {
    v1::Join {
        protocol_version: looptrain_proto::PROTOCOL_VERSION,
        name: name.to_owned(),
        host: "here".into(),
        process_id: 1,
        threads: 1,
        peer_address: format!("{name}:1"),
        numerics: "avx2".into(),
        held: None,
        nccl_version: 0,
        ailment: String::new(),
        encrypted: false,
    }
}

/// What the fake workers hold at a step, if nothing went wrong.
pub(super) fn weights(step: Step) -> Digest {
    Digest::of(format!("weights {step}").as_bytes())
}

pub(super) fn gradient(step: Step) -> Digest {
    Digest::of(format!("gradient {step}").as_bytes())
}

/// A core with the world around it.
pub(super) struct Rig {
    pub(super) core: Core,
    pub(super) now: Duration,
    next: u64,
    /// Everything sent to each worker.
    pub(super) sent: BTreeMap<WorkerId, Vec<Directive>>,
    pub(super) closed: BTreeSet<WorkerId>,
    pub(super) published: Vec<RunEvent>,
    pub(super) manifests: Vec<ManifestDraft>,
    pub(super) pinned: Vec<String>,
    /// What was written down of pauses.
    pub(super) pauses: Vec<Option<String>>,
    /// Times that the store was to be looked at.
    pub(super) looks: u32,
    /// Times that newer checkpoints were looked for, and what the next look finds.
    pub(super) searches: u32,
    pub(super) left: Option<Left>,
    /// The store does not answer such a look.
    pub(super) mute: bool,
    /// Where the log was told to end, and the steps that it lacked.
    pub(super) went_on: Vec<(u64, Vec<u64>)>,
    pub(super) ignored: Vec<String>,
    pub(super) result: Option<Result<Outcome, String>>,
    /// Until when the workers' lives are counted, and their seconds until then.
    lived: (Duration, f64),
}

impl Rig {
    pub(super) fn new(overrides: &[&str]) -> Self {
        Self::resumed(overrides, Resume { incarnation: Incarnation(1), ..Resume::default() })
    }

    pub(super) fn resumed(overrides: &[&str], resume: Resume) -> Self {
        Self {
            core: Core::new(spec(overrides), resume),
            now: Duration::ZERO,
            next: 1,
            sent: BTreeMap::new(),
            closed: BTreeSet::new(),
            published: Vec::new(),
            manifests: Vec::new(),
            pinned: Vec::new(),
            pauses: Vec::new(),
            looks: 0,
            searches: 0,
            left: None,
            mute: false,
            went_on: Vec::new(),
            ignored: Vec::new(),
            result: None,
            lived: (Duration::ZERO, 0.0),
        }
    }

    /// A rig whose generation of `workers` has formed: step 1 is planned.
    pub(super) fn training(workers: usize, overrides: &[&str]) -> (Self, Vec<WorkerId>) {
        let wanted = format!("cluster.workers={workers}");
        let overrides: Vec<&str> = overrides.iter().copied().chain([wanted.as_str()]).collect();
        let mut rig = Self::new(&overrides);
        let ids = (0..workers).map(|index| rig.join(&format!("w{index}"))).collect();
        rig.ready_all();
        (rig, ids)
    }

    /// From now on another core keeps the ledger.
    pub(super) fn recount(&mut self) {
        self.lived = (self.now, self.core.accounted_for());
    }

    /// No second of a worker is lost or booked twice.
    #[track_caller]
    fn check_ledger(&self) {
        let (lived, accounted) = (self.lived.1, self.core.accounted_for());
        assert!((lived - accounted).abs() < 1e-6, "{accounted} s of {lived} s are accounted for");
    }

    pub(super) fn feed(&mut self, event: Event) {
        let (until, seconds) = self.lived;
        let workers = self.core.roster.len() as f64;
        let passed = self.now.saturating_sub(until).as_secs_f64();
        self.lived = (self.now, seconds + workers * passed);
        self.act(event);
        // What thousands cost is measured elsewhere, without this.
        if self.result.is_none() && self.core.roster.len() < 100 {
            self.check_ledger();
        }
    }

    fn act(&mut self, event: Event) {
        let mut found = None;
        for action in self.core.handle(self.now, event) {
            match action {
                Action::Send { worker, message } => {
                    self.sent.entry(worker).or_default().push(message);
                }
                Action::Close { worker } => {
                    self.closed.insert(worker);
                }
                Action::Publish(event) => self.published.push(event),
                Action::PinNumerics { numerics } => self.pinned.push(numerics),
                Action::LookAtStore => self.looks += 1,
                Action::FindCheckpoint { .. } => {
                    self.searches += 1;
                    found = Some(Event::CheckpointFound(match self.mute {
                        true => Err("503".to_owned()),
                        false => Ok(self.left.take().map(Box::new)),
                    }));
                }
                Action::KeepPause(reason) => self.pauses.push(reason),
                Action::WriteManifest(draft) => self.manifests.push(draft),
                Action::End(result) => {
                    assert!(self.result.is_none(), "a run ends once");
                    self.result = Some(result);
                }
                Action::Ignored { reason, .. } => self.ignored.push(reason),
                Action::GoOn { from, lost } => {
                    let lost = lost.iter().map(|record| record.step.0).collect();
                    self.went_on.push((from.0, lost));
                }
                Action::Explain(_) | Action::SealMetrics => {}
            }
        }
        if let Some(found) = found {
            self.act(found);
        }
    }

    pub(super) fn join(&mut self, name: &str) -> WorkerId {
        self.join_as(introduction(name))
    }

    pub(super) fn join_as(&mut self, join: v1::Join) -> WorkerId {
        let worker = WorkerId(self.next);
        self.next += 1;
        if join.held.is_some() && self.core.admits(&join) {
            // It has lived meanwhile.
            let now = self.core.books.zero + self.now;
            self.lived.1 += (now - self.core.absent_since(&join.name)).as_secs_f64();
        }
        self.feed(Event::Joined { worker, join });
        worker
    }

    pub(super) fn say(&mut self, worker: WorkerId, report: Report) {
        self.feed(Event::Report { worker, report });
    }

    pub(super) fn kill(&mut self, worker: WorkerId) {
        self.feed(Event::Lost(vec![Loss::broken(worker, "connection reset")]));
    }

    /// Time passes with everybody alive, in steps a heartbeat apart.
    pub(super) fn pass(&mut self, seconds: f64) {
        let end = self.now + Duration::from_secs_f64(seconds);
        while self.now < end {
            self.now = (self.now + Duration::from_millis(500)).min(end);
            for worker in self.core.roster.ids() {
                self.say(worker, Report::Heartbeat);
            }
            self.feed(Event::Tick);
        }
    }

    pub(super) fn members(&self) -> Vec<WorkerId> {
        self.core.members.clone()
    }

    pub(super) fn ready(&mut self, worker: WorkerId) {
        let (generation, step) = (self.core.generation, self.core.committed);
        self.say(worker, Report::Ready { generation, step, weights_digest: weights(step) });
    }

    pub(super) fn ready_all(&mut self) {
        self.members().into_iter().for_each(|worker| self.ready(worker));
    }

    pub(super) fn vote(&self, generation: Generation, step: Step) -> Report {
        Report::Prepared {
            generation,
            step,
            digest: gradient(step),
            statistics: Box::new(v1::StepStatistics {
                loss: 6.0 - step.0 as f64 * 0.1,
                loss_per_loop: vec![6.5, 6.25],
                exit_pdf: vec![0.25, 0.75],
                entropy: 0.5,
                grad_norm: 2.0,
                tokens: 160,
                bad_slots: 0,
                ..v1::StepStatistics::default()
            }),
            sections: v1::Sections { compute: 0.1, ..v1::Sections::default() },
            computed_slots: 0,
            detail: String::new(),
        }
    }

    pub(super) fn prepare(&mut self, worker: WorkerId) {
        let vote = self.vote(self.core.generation, self.core.committed.next());
        self.say(worker, vote);
    }

    pub(super) fn prepare_all(&mut self) {
        self.now += Duration::from_millis(100);
        self.members().into_iter().for_each(|worker| self.prepare(worker));
    }

    /// Answers the newest Evaluate of each member that got one.
    pub(super) fn evaluate_all(&mut self) {
        for worker in self.members() {
            let last = self.sent[&worker].last().cloned();
            if let Some(Directive::Evaluate(share)) = last {
                let tokens = (share.end - share.begin) * 16;
                let unit = tokens as i64 * (1 << 32);
                let sums = vec![unit * 5, unit * 6, unit * 4, unit / 4, unit / 4 * 3, unit / 2];
                let (generation, step) = (Generation(share.generation), Step(share.step));
                self.say(worker, Report::Evaluated { generation, step, sums, tokens });
            }
        }
    }

    pub(super) fn saves(&self, worker: WorkerId) -> Vec<v1::Save> {
        (self.sent[&worker].iter())
            .filter_map(|message| match message {
                Directive::Save(save) => Some(*save),
                _ => None,
            })
            .collect()
    }

    pub(super) fn part(save: v1::Save) -> Report {
        let v1::Save { step, part, parts, .. } = save;
        Report::PartSaved {
            step: Step(step),
            part: part as usize,
            parts: parts as usize,
            result: Ok(SavedPart {
                file: format!("state-{part}-of-{parts}"),
                bytes: 100,
                digest: Digest::of(&part.to_le_bytes()),
                tensors: 3,
                weights_digest: weights(Step(step)),
                stall: Duration::ZERO,
            }),
        }
    }

    /// Reports the newest Save of this worker as done.
    pub(super) fn saved(&mut self, worker: WorkerId) {
        let save = *self.saves(worker).last().unwrap();
        self.say(worker, Self::part(save));
    }

    pub(super) fn saved_all(&mut self) {
        self.members().into_iter().for_each(|worker| self.saved(worker));
    }

    /// The store takes the newest manifest.
    pub(super) fn manifest_written(&mut self) {
        let step = self.manifests.last().unwrap().step;
        self.feed(Event::CheckpointWritten { step });
    }

    /// Trains, evaluates and saves until `step` is committed and the next one planned (or the
    /// run has ended), with everybody well.
    pub(super) fn run_to(&mut self, step: u64) {
        let mut manifests = self.manifests.len();
        while self.core.committed.0 < step || !self.settled() {
            match self.core.phase {
                Phase::Forming(_) => self.ready_all(),
                Phase::Training(_) => self.prepare_all(),
                Phase::Evaluating(_) => self.evaluate_all(),
                Phase::Holding => {}
                Phase::Waiting | Phase::Ended { .. } => return,
            }
            if self.core.saving.as_ref().is_some_and(|saving| saving.sealed().is_none()) {
                self.saved_all();
            }
            if self.manifests.len() > manifests {
                manifests = self.manifests.len();
                self.manifest_written();
            }
        }
    }

    fn settled(&self) -> bool {
        matches!(self.core.phase, Phase::Training(_)) && self.core.saving.is_none()
    }

    pub(super) fn last_sent(&self, worker: WorkerId) -> &Directive {
        self.sent[&worker].last().unwrap()
    }

    pub(super) fn plan_of(&self, worker: WorkerId) -> v1::Plan {
        match self.last_sent(worker) {
            Directive::Plan(plan) => *plan,
            other => panic!("expected a plan, found {other:?}"),
        }
    }

    pub(super) fn form_of(&self, worker: WorkerId) -> v1::Form {
        match self.last_sent(worker) {
            Directive::Form(form) => form.clone(),
            other => panic!("expected a form, found {other:?}"),
        }
    }

    pub(super) fn commits(&self, worker: WorkerId) -> Vec<u64> {
        (self.sent[&worker].iter())
            .filter_map(|message| match message {
                Directive::Commit(commit) => Some(commit.step),
                _ => None,
            })
            .collect()
    }

    pub(super) fn failed(&mut self, worker: WorkerId, cause: Cause, detail: &str) {
        let (generation, step) = (self.core.generation, self.core.committed.next());
        let detail = detail.to_owned();
        self.say(worker, Report::Failed { generation, step, cause, detail });
    }

    pub(super) fn failure(&self) -> &str {
        self.result.as_ref().unwrap().as_ref().unwrap_err()
    }

    pub(super) fn outcome(&self) -> &Outcome {
        self.result.as_ref().unwrap().as_ref().unwrap()
    }

    pub(super) fn phase(&self) -> &'static str {
        self.core.snapshot(self.now).phase
    }
}
