//! The coordinator's decisions: a pure state machine. Events and a clock reading go in, actions
//! come out; there is no task, no channel, no store and no time call in this folder.
//!
//! A run alternates between these phases:
//!
//! ```text
//! waiting -> forming -> training <-> evaluating
//!    ^          ^           |
//!    |          +-----------+---- a member is lost: survivors form the next generation
//!    +--------------------------- nobody is left: back to the newest checkpoint
//!                           +---> holding (for a checkpoint) -> ended
//! ```
//!
//! Invariants, which `tests::random_events` checks:
//! - a commit decision is one event: all votes of the generation are in and equal, every member
//!   is sent the Commit before anything else, and no step is decided twice unless a fall back to
//!   a checkpoint undid it;
//! - the slots of a planned step are shared out exactly once over the ranks;
//! - nothing of an older generation is acted on, except the parts of a checkpoint, whose content
//!   does not depend on the generation that writes it;
//! - the committed step only goes back when nobody is left that holds it, and then to the newest
//!   one that somebody holds or a checkpoint has.
//!
//! One file a concern: [`membership`] (joins, losses, silence), [`waiting`] (who has to be here),
//! [`returning`] (what they bring back), [`admission`] (who joins later), [`forming`]
//! (generations), [`goodput`] (what became of the workers' time), [`step`] (plan, votes, commit),
//! [`evaluation`], [`saving`] (checkpoints), [`search`] (those that nobody has told of), [`speed`] (shares
//! and stragglers), [`patience`] (answers that do not come), [`finishing`] (stops and ends), [`parting`]
//! (workers that are told to leave), [`orders`] (what operators ask for). [`boundary`] is where they meet:
//! what to do between two steps.

mod action;
mod admission;
mod agreement;
mod away;
mod boundary;
mod depth;
mod evaluation;
mod event;
mod finishing;
mod forming;
mod goodput;
mod membership;
mod orders;
mod parting;
mod patience;
mod returning;
mod saving;
mod search;
mod shares;
mod speed;
mod status;
mod step;
#[cfg(test)]
mod tests;
mod waiting;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use looptrain_proto::v1::{Held, Rejected, Trend};
use looptrain_proto::{Digest, Generation, Incarnation, Spec, Step, WorkerId};

pub(crate) use action::{Action, Directive, ManifestDraft};
pub(crate) use event::{Event, Loss, Report, SavedPart};
pub(crate) use goodput::Books;
pub(crate) use returning::HIGHEST_GENERATION;
pub(crate) use search::Left;
pub(crate) use status::{Snapshot, WorkerView};

use crate::records::{EvaluationRecord, RunEvent, StepRecord};

/// Where a run starts: what earlier coordinators left behind.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resume {
    /// This process; workers are told.
    pub(crate) incarnation: Incarnation,
    /// The newest verified checkpoint.
    pub(crate) checkpoint: Option<Mark>,
    /// How the run's workers compute, when that has been settled.
    pub(crate) numerics: Option<String>,
    /// Why an operator has the run hold at step boundaries.
    pub(crate) paused: Option<String>,
    /// The highest generation in the run's metrics; the next one is above it.
    pub(crate) generation: Generation,
    /// Evaluations in order, some of those of long ago.
    pub(crate) evaluations: Vec<EvaluationRecord>,
    /// The newest steps of the run's log, at least those behind the checkpoint.
    pub(crate) tail: Vec<StepRecord>,
    /// The newest step of the log where there is nothing in it behind the checkpoint.
    pub(crate) logged: Step,
    /// What the worker remembered that left the checkpoint without a coordinator.
    pub(crate) bequest: Option<Held>,
    /// Told to workers, and compared with what those bring that come back.
    pub(crate) lineage: Vec<u8>,
    /// Workers of the coordinator before may come back.
    pub(crate) workers_may_return: bool,
    /// What became of the workers' time so far.
    pub(crate) books: Books,
}

/// A committed step that a checkpoint holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mark {
    pub(crate) step: Step,
    pub(crate) weights_digest: Digest,
    /// The step's record; `None` when the metrics were lost.
    pub(crate) record: Option<StepRecord>,
    /// What the next step is judged by, under a spec with a guard against spikes.
    pub(crate) trend: Option<Trend>,
}

/// The state of a run in the eyes of its coordinator.
#[derive(Debug)]
pub(crate) struct Core {
    spec: Spec,
    spec_toml: String,
    total: Step,
    incarnation: Incarnation,

    now: Duration,
    ticked: Duration,
    /// Time that passed with ticks coming in time and the store not away: deadlines count in it, so that
    /// nobody is blamed for a coordinator that was frozen, or asleep with its machine, or for the store.
    awake: Duration,
    out: Vec<Action>,

    roster: membership::Roster,
    numerics: Option<String>,
    numerics_pinned: bool,

    generation: Generation,
    /// Rank order; empty while waiting.
    members: Vec<WorkerId>,
    /// Where each of them stands in that order.
    ranks: HashMap<WorkerId, usize>,
    /// Members that come to hold the committed state without anybody's help.
    anchors: BTreeSet<WorkerId>,
    phase: Phase,
    reason: String,
    waiting: waiting::Wait,
    /// Slots of each rank in the newest plan of this generation.
    counts: Vec<u32>,
    /// A generation of this coordinator has formed.
    formed: bool,
    trouble: Option<forming::Trouble>,
    /// Generations of the same members since the last commit, formed because their ring broke.
    fruitless: u32,
    /// Members that NCCL did not connect: over TCP as long as all of them are here.
    without_nccl: BTreeSet<WorkerId>,
    /// Times since the last commit that the members were stuck, and it was not known who is at
    /// fault.
    stalls: u32,

    committed: Step,
    /// The record of `committed`.
    last: Option<StepRecord>,
    /// Digest of the weights of the step, once ranks agreed on it.
    weights: Option<(Step, Digest)>,
    /// In order.
    evaluations: Vec<EvaluationRecord>,
    /// What an earlier coordinator logged, until a generation has formed.
    tail: Vec<StepRecord>,
    /// From the worker that left the checkpoint, until a generation has formed.
    bequest: Option<Held>,
    lineage: Vec<u8>,
    workers_may_return: bool,
    /// Steps in a row that were committed without an update.
    skipped: u32,
    /// The newest step in the log.
    logged: Step,
    pace: step::Pace,
    depth: depth::Depth,

    checkpoint: Option<Mark>,
    saving: Option<saving::Saving>,
    save_overdue: bool,
    /// When the last save was begun; of what happened before there is no knowledge.
    saved_at: Duration,
    save_errors: u32,
    /// Those of them at the run's end.
    final_errors: u32,
    save_retry_at: Duration,

    admission: Option<admission::Admission>,
    /// Spares that cannot fetch from the members.
    by_checkpoint: BTreeSet<WorkerId>,
    /// Since when the run holds for a checkpoint that lets such spares in.
    held_up: Option<Duration>,

    books: Books,
    stance: goodput::Stance,
    /// When the sessions of those were lost that may come back with their state.
    gone: HashMap<String, Duration>,
    /// Steps that were planned and not committed, for their generation ended.
    retried_steps: u64,
    /// Times that workers disagreed.
    divergences: u64,

    /// Where loss and gradient norm stood after steps that are known, for a run that goes back to one of
    /// them.
    trends: BTreeMap<Step, Trend>,
    /// Names of workers that fell silent since a generation last formed: they may come back.
    silent: BTreeSet<String>,
    /// The newest step at hand while workers are waited for that may hold more, and since when.
    holders_awaited: Option<(Step, Duration)>,
    search: search::Search,
    /// Who waits for the store.
    away: away::Away,
    stop: Option<String>,
    /// The run ends before the step that is a spike, with this error.
    spike: Option<String>,
    /// Why the run holds at step boundaries.
    paused: Option<String>,
    /// The run ends here, to go on some other time.
    until: Option<Step>,
}

/// What the members are doing.
#[derive(Debug)]
enum Phase {
    /// There is no generation.
    Waiting,
    /// Members build their ring and take the committed state.
    Forming(forming::Forming),
    /// A step is planned; votes come in.
    Training(step::Round),
    /// Shares of the validation split are being computed.
    Evaluating(evaluation::Exam),
    /// At a step boundary, waiting for a checkpoint.
    Holding,
    /// Finished or failed.
    Ended { failed: bool },
}

impl Core {
    /// A run before its first worker.
    pub(crate) fn new(spec: Spec, resume: Resume) -> Self {
        let Resume {
            incarnation,
            checkpoint,
            numerics,
            paused,
            generation,
            evaluations,
            tail,
            logged,
            bequest,
            lineage,
            workers_may_return,
            books,
        } = resume;
        let at = checkpoint.as_ref().map_or(Step(0), |mark| mark.step);
        let mut core = Self {
            spec_toml: spec.to_toml(),
            total: spec.total_steps(),
            spec,
            incarnation,
            now: Duration::ZERO,
            ticked: Duration::ZERO,
            awake: Duration::ZERO,
            out: Vec::new(),
            roster: membership::Roster::default(),
            numerics_pinned: numerics.is_some(),
            numerics,
            generation,
            members: Vec::new(),
            ranks: HashMap::new(),
            anchors: BTreeSet::new(),
            phase: Phase::Waiting,
            reason: "no worker has joined yet".into(),
            waiting: waiting::Wait::for_the_first(),
            counts: Vec::new(),
            formed: false,
            trouble: None,
            fruitless: 0,
            without_nccl: BTreeSet::new(),
            stalls: 0,
            committed: at,
            last: checkpoint.as_ref().and_then(|mark| mark.record.clone()),
            weights: checkpoint.as_ref().map(|mark| (mark.step, mark.weights_digest)),
            evaluations,
            skipped: 0,
            logged: tail.last().map_or(logged, |record| record.step),
            tail,
            bequest,
            lineage,
            workers_may_return,
            pace: step::Pace::default(),
            depth: depth::Depth::default(),
            checkpoint,
            saving: None,
            save_overdue: false,
            saved_at: Duration::ZERO,
            save_errors: 0,
            final_errors: 0,
            save_retry_at: Duration::ZERO,
            admission: None,
            by_checkpoint: BTreeSet::new(),
            held_up: None,
            books,
            stance: goodput::Stance::default(),
            gone: HashMap::new(),
            retried_steps: 0,
            divergences: 0,
            trends: BTreeMap::new(),
            silent: BTreeSet::new(),
            holders_awaited: None,
            search: search::Search::default(),
            away: away::Away::default(),
            stop: None,
            spike: None,
            paused,
            until: None,
        };
        core.note_trends();
        core
    }

    /// The same, to be stopped at the boundary after step `until`.
    pub(crate) fn stopping_at(self, until: Option<Step>) -> Self {
        Self { until, ..self }
    }

    /// Takes one event at `now` (time since the start, never less than before) and returns what
    /// to do about it, in order.
    pub(crate) fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.now = now.max(self.now);
        match event {
            Event::Joined { worker, join } => self.on_joined(worker, join),
            Event::Report { worker, report } => self.on_report(worker, report),
            Event::Lost(losses) => self.on_lost(&losses),
            _ if self.ended() => {}
            Event::Tick => self.on_tick(),
            Event::StopRequested { reason } => self.on_stop(reason),
            Event::DrainRequested { worker, reason } => self.on_drain(worker, reason),
            Event::PauseRequested { reason } => self.on_pause(reason),
            Event::ResumeRequested => self.on_resume(),
            Event::SaveRequested => self.on_save(),
            Event::CheckpointFound(found) => self.on_checkpoint_found(found),
            Event::CheckpointWritten { step } => self.on_checkpoint_written(step),
            Event::CheckpointRefused { step, reason } => self.on_checkpoint_refused(step, reason),
            Event::StoreSeen(seen) => self.on_store_seen(seen),
        }
        self.keep_ledger();
        std::mem::take(&mut self.out)
    }

    fn on_report(&mut self, worker: WorkerId, report: Report) {
        if !self.roster.hear(worker, self.now) {
            return self.ignore(worker, "it is not on the roster (any more)");
        }
        if self.ended() {
            return;
        }
        if report.is_an_answer() {
            self.roster.answered(worker);
            self.away.is_over_for(worker);
        }
        match report {
            Report::Heartbeat => {}
            Report::Ready { generation, step, weights_digest } => {
                self.on_ready(worker, generation, step, weights_digest);
            }
            Report::Prepared {
                generation,
                step,
                digest,
                statistics,
                sections,
                computed_slots,
                detail,
            } => {
                let vote = step::Vote {
                    digest,
                    statistics: *statistics,
                    sections: sections.into(),
                    computed_slots,
                    detail,
                };
                self.on_prepared(worker, generation, step, vote);
            }
            Report::Evaluated { generation, step, sums, tokens } => {
                self.on_evaluated(worker, generation, step, evaluation::Share { sums, tokens });
            }
            Report::PartSaved { step, part, parts, result } => {
                self.on_part_saved(worker, step, part, parts, result);
            }
            Report::Failed { generation, step, cause, detail } => {
                self.on_failed(worker, generation, step, cause, &detail);
            }
            Report::Communicator { generation, id } => {
                self.on_communicator(worker, generation, id);
            }
            Report::Waiting { generation, detail, failed } => {
                self.on_waiting(worker, generation, away::Wait { told: self.now, detail, failed });
                self.let_go();
            }
            Report::Fetched { step, result } => self.on_fetched(worker, step, result),
            Report::Leaving { reason } => self.on_leaving(worker, reason),
            Report::Leave { reason } => self.on_lost(&[Loss::left(worker, &reason)]),
        }
    }

    // ---- small helpers of all concerns ------------------------------------------------------

    fn send(&mut self, worker: WorkerId, message: Directive) {
        self.out.push(Action::Send { worker, message });
    }

    fn publish(&mut self, event: RunEvent) {
        self.out.push(Action::Publish(event));
    }

    /// Notes why the run is where it is; repeated reasons are said once.
    fn explain(&mut self, reason: impl Into<String>) {
        let reason = reason.into();
        if self.reason != reason {
            self.reason.clone_from(&reason);
            self.out.push(Action::Explain(reason));
        }
    }

    /// A message is not acted on; its sender is told why.
    fn ignore(&mut self, worker: WorkerId, reason: impl Into<String>) {
        let reason = reason.into();
        if self.roster.get(worker).is_some() && !self.ended() {
            self.send(worker, Directive::Rejected(Rejected { reason: reason.clone() }));
        }
        self.out.push(Action::Ignored { worker, reason });
    }

    fn ended(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. })
    }

    fn rank_of(&self, worker: WorkerId) -> Option<usize> {
        self.ranks.get(&worker).copied()
    }

    /// The members of another generation, in rank order.
    fn set_members(&mut self, members: Vec<WorkerId>) {
        self.ranks = members.iter().copied().zip(0..).collect();
        self.members = members;
        self.away.is_over();
    }

    fn world(&self) -> u32 {
        self.members.len() as u32
    }

    /// The member of `generation` that may speak now, or why not.
    fn current_rank(&self, worker: WorkerId, generation: Generation) -> Result<usize, String> {
        if generation != self.generation {
            let current = self.generation;
            return Err(format!("it speaks of generation {generation}, now is {current}"));
        }
        self.rank_of(worker).ok_or_else(|| format!("it is no member of generation {generation}"))
    }

    /// What the weights of `step` are known to be.
    fn known_weights(&self, step: Step) -> Option<Digest> {
        self.weights.filter(|(at, _)| *at == step).map(|(_, digest)| digest)
    }
}

/// `"s"` unless there is exactly one.
fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}
