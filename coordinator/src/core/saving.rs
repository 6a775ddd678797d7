//! Checkpoints: when one is due, who writes which part, when it exists.
//!
//! Members copy their state when told to save and upload in the background, so training goes on
//! meanwhile; at most one checkpoint is in the making. A part does not depend on the generation
//! that wrote it, so parts count across generations as long as they belong to the same split. If
//! a writer is lost before its part is in, the checkpoint is given up, and another one is made at
//! the next step boundary.

use std::time::Duration;

use looptrain_proto::v1::{Save, Trend};
use looptrain_proto::{Cursor, Digest, Generation, Step, WorkerId};

use super::agreement::{self, Verdict};
use super::event::SavedPart;
use super::{Action, Core, Directive, ManifestDraft, Mark, Phase};
use crate::records::{RunEvent, StepRecord};

/// After this many failures in a row to write a checkpoint that the run cannot end without, it
/// fails. With the pauses between them that is some twenty minutes, in which somebody may make room.
const MAX_FINAL_ERRORS: u32 = 20;

/// How long a part may take to be written; twice as long after each failure.
const PART: Duration = Duration::from_secs(1800);

/// A checkpoint in the making.
#[derive(Debug)]
pub(super) struct Saving {
    step: Step,
    cursor: Cursor,
    generation: Generation,
    record: Option<StepRecord>,
    trend: Option<Trend>,
    started: Duration,
    /// The same in the core's waking time.
    begun: Duration,
    /// In part order.
    parts: Vec<Part>,
    /// All parts are in and the manifest is being written.
    sealed: Option<Digest>,
}

#[derive(Debug)]
struct Part {
    writer: WorkerId,
    saved: Option<SavedPart>,
}

impl Saving {
    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// The weights all parts belong to, once the manifest is being written.
    #[cfg(test)]
    pub(super) fn sealed(&self) -> Option<Digest> {
        self.sealed
    }
}

impl Core {
    /// Tells the members to save when a checkpoint of the committed step is due and none is in
    /// the making.
    pub(super) fn start_saving_if_due(&mut self) {
        let step = self.committed;
        let being_saved = self.saving.as_ref().is_some_and(|saving| saving.step == step);
        if self.state_is_in_reach() || being_saved {
            return;
        }
        let regular = step.0.is_multiple_of(self.spec.checkpoint.every_steps);
        let after = Duration::from_secs(self.spec.checkpoint.every_seconds);
        let old = !after.is_zero() && self.now.saturating_sub(self.saved_at) >= after;
        if !(regular || old || self.save_overdue || self.ending() || self.all_leave()) {
            return;
        }
        if let Some(saving) = &self.saving {
            let seconds = (self.now - saving.started).as_secs_f64();
            let delayed = RunEvent::CheckpointDelayed { step, saving: saving.step, seconds };
            // Once for each save: later steps at which one is due wait for the same one.
            if !std::mem::replace(&mut self.save_overdue, true) {
                self.publish(delayed);
            }
            return;
        }
        if self.now < self.save_retry_at {
            self.save_overdue = true;
            return;
        }
        self.save_overdue = false;
        self.saved_at = self.now;
        let parts = self.members.len();
        for (part, worker) in self.members.clone().into_iter().enumerate() {
            let save = Save {
                generation: self.generation.0,
                step: step.0,
                part: part as u32,
                parts: parts as u32,
            };
            self.send(worker, Directive::Save(save));
        }
        self.out.push(Action::SealMetrics);
        self.saving = Some(Saving {
            step,
            cursor: self.spec.cursor_after(step),
            generation: self.generation,
            record: self.last.clone(),
            trend: self.trend(),
            started: self.now,
            begun: self.awake,
            parts: self
                .members
                .iter()
                .map(|writer| Part { writer: *writer, saved: None })
                .collect(),
            sealed: None,
        });
    }

    pub(super) fn on_part_saved(
        &mut self,
        worker: WorkerId,
        step: Step,
        part: usize,
        parts: usize,
        result: Result<SavedPart, String>,
    ) {
        let Some(saving) = self.saving.as_mut().filter(|saving| {
            // An answer to a split that was given up may come after the one to its successor.
            let awaited = |place: &Part| place.writer == worker && place.saved.is_none();
            let assigned = saving.parts.get(part).is_some_and(awaited);
            saving.step == step && saving.parts.len() == parts && assigned
        }) else {
            let reason = format!("part {part} of {parts} of step {step} is not being saved by it");
            return self.ignore(worker, reason);
        };
        match result {
            Err(error) => {
                let name = self.roster.name(worker);
                let reason = format!("{name} cannot write part {part} of {parts}: {error}");
                self.save_failed(reason);
            }
            Ok(saved) => {
                let stall = saved.stall;
                saving.parts[part].saved = Some(saved);
                if saving.parts.iter().all(|part| part.saved.is_some()) {
                    let all = saving.parts.iter().filter_map(|part| part.saved.clone()).collect();
                    self.on_all_saved(all);
                }
                self.note_stall(worker, stall);
            }
        }
    }

    fn on_all_saved(&mut self, parts: Vec<SavedPart>) {
        let Some(saving) = &mut self.saving else { return };
        let step = saving.step;
        let digests: Vec<Digest> = parts.iter().map(|part| part.weights_digest).collect();
        let writers: Vec<WorkerId> = saving.parts.iter().map(|part| part.writer).collect();
        let known = self.weights.filter(|(at, _)| *at == step).map(|(_, digest)| digest);
        match agreement::compare(&digests, known) {
            Verdict::Unanimous(weights_digest) => {
                saving.sealed = Some(weights_digest);
                let draft = ManifestDraft {
                    step,
                    cursor: saving.cursor,
                    generation: saving.generation,
                    weights_digest,
                    parts,
                    trend: saving.trend,
                };
                self.out.push(Action::WriteManifest(draft));
            }
            Verdict::Odd { ranks, trusted } => {
                self.divergences += 1;
                let odd: Vec<WorkerId> = ranks.iter().map(|rank| writers[*rank]).collect();
                let names = self.roster.names(odd.iter().copied());
                self.give_up_saving(format!("the weights of {names} are not {trusted}"));
                let reason =
                    format!("its weights of step {step} are not {trusted}, as the others'");
                self.expel_writers(&odd, &reason);
            }
            Verdict::Split => {
                self.divergences += 1;
                let holders: Vec<String> = (writers.iter().zip(&digests))
                    .map(|(writer, digest)| format!("{} {digest}", self.roster.name(*writer)))
                    .collect();
                self.fail(format!(
                    "the workers saved different weights of step {step} and there is no \
                     majority: {}; test their memory and processors",
                    holders.join(", ")
                ));
            }
        }
    }

    fn expel_writers(&mut self, writers: &[WorkerId], reason: &str) {
        let mut here = writers.to_vec();
        here.retain(|writer| self.roster.get(*writer).is_some());
        if !here.is_empty() {
            self.expel_and_reform(&here, reason);
        }
    }

    pub(super) fn on_checkpoint_written(&mut self, step: Step) {
        let Some(saving) = self.saving.take_if(|saving| saving.step == step) else {
            return;
        };
        let Some(weights_digest) = saving.sealed else { return };
        let parts = || saving.parts.iter().filter_map(|part| part.saved.as_ref());
        let bytes = parts().fold(0, |sum: u64, part| sum.saturating_add(part.bytes));
        let stall = parts().map(|part| part.stall).max().unwrap_or_default().as_secs_f64();
        let seconds = (self.now - saving.started).as_secs_f64();
        (self.save_errors, self.final_errors) = (0, 0);
        let Saving { record, trend, .. } = saving;
        self.checkpoint = Some(Mark { step, weights_digest, record, trend });
        if step == self.committed {
            self.weights = Some((step, weights_digest));
        }
        self.publish(RunEvent::CheckpointSaved { step, seconds, bytes, stall });
        self.after_saving();
        if step < self.committed {
            // Whoever could not fetch before is asked again.
            self.by_checkpoint.clear();
            self.held_up = None;
        }
    }

    pub(super) fn on_checkpoint_refused(&mut self, step: Step, reason: String) {
        if self.saving.as_ref().is_some_and(|saving| saving.step == step) {
            self.save_failed(reason);
        }
    }

    /// The store refused a part or the manifest: tried again at a later boundary, with patience.
    fn save_failed(&mut self, reason: String) {
        self.save_errors += 1;
        self.save_retry_at = self.now + Duration::from_secs(1 << self.save_errors.min(6));
        self.give_up_saving(reason.clone());
        let waited_for = self.ending() || self.all_leave();
        if matches!(self.phase, Phase::Holding) && waited_for {
            self.final_errors += 1;
        }
        if self.final_errors >= MAX_FINAL_ERRORS {
            if !self.ending() {
                self.explain(format!("workers leave unsaved: {reason}"));
                self.final_errors = 0;
                return self.release_all();
            }
            let spike = self.spike.take().map_or(String::new(), |spike| format!("; {spike}"));
            return self.fail(format!("the last checkpoint cannot be written: {reason}{spike}"));
        }
        self.after_saving();
    }

    /// A worker is gone; a checkpoint that lacks its part will never be whole.
    pub(super) fn save_lost_writer(&mut self, worker: WorkerId) {
        let lacks = |part: &Part| part.writer == worker && part.saved.is_none();
        if self.saving.as_ref().is_some_and(|saving| saving.parts.iter().any(lacks)) {
            self.give_up_saving("a worker was lost before it had written its part".into());
        }
    }

    /// Looks after parts that are overdue. Who alone does not bring its part is sent away; when
    /// nobody does, it is the store.
    pub(super) fn on_tick_in_saving(&mut self) {
        let timeout = Duration::from_secs_f64(self.spec.cluster.worker_timeout);
        let patience = PART.max(timeout) * (1 << self.save_errors.min(6));
        let overdue =
            |saving: &&Saving| saving.sealed.is_none() && self.awake - saving.begun > patience;
        let Some(saving) = self.saving.as_ref().filter(overdue) else { return };
        let late = saving.parts.iter().filter(|part| part.saved.is_none());
        let late: Vec<WorkerId> = late.map(|part| part.writer).collect();
        let (step, seconds) = (saving.step, patience.as_secs());
        let what = format!("written its part of the checkpoint of step {step} within {seconds} s");
        let everybody = self.members.iter().all(|member| late.contains(member));
        if everybody || late.len() == saving.parts.len() {
            return self.save_failed(format!("no worker has {what}"));
        }
        self.expel_writers(&late, &format!("it has not {what}"));
    }

    fn give_up_saving(&mut self, reason: String) {
        if let Some(saving) = self.saving.take() {
            self.save_overdue = true;
            self.publish(RunEvent::CheckpointFailed { step: saving.step, reason });
        }
    }

    fn after_saving(&mut self) {
        match self.phase {
            Phase::Holding => self.proceed(),
            Phase::Waiting => self.settle(),
            _ => {}
        }
    }
}
