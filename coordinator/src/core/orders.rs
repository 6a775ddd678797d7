//! What operators ask of a run beside its end: that a worker leave, that it pause, that it go on, that it
//! be saved.

use looptrain_proto::WorkerId;
use looptrain_proto::v1::Drain;

use super::{Action, Core, Directive, Phase};
use crate::records::RunEvent;

impl Core {
    /// The worker of this name, if it may be told to leave.
    ///
    /// # Errors
    /// Why not, in a sentence.
    pub(crate) fn drainable(&self, name: &str) -> Result<WorkerId, String> {
        if self.ended() {
            return Err(format!("the run has ended: {}", self.reason));
        }
        let Some((worker, _)) = self.roster.iter().find(|(_, there)| there.join.name == name)
        else {
            let there = match self.roster.len() {
                0 => "no worker is here".into(),
                _ => format!("there are {}", self.roster.names(self.roster.ids())),
            };
            return Err(format!("there is no worker {name}; {there}"));
        };
        let staying = |id: &WorkerId| {
            *id != worker && self.roster.get(*id).is_some_and(|there| !there.history.drained())
        };
        match self.rank_of(worker) {
            Some(_) if !self.members.iter().any(staying) => Err(format!(
                "{name} is the last worker that trains; stop the run, or start another worker first"
            )),
            _ => Ok(worker),
        }
    }

    pub(super) fn on_drain(&mut self, worker: WorkerId, reason: String) {
        let Some(known) = self.roster.get_mut(worker) else { return };
        known.history.note_drained();
        // Others are there that stay, or it may not be asked for.
        (known.leaving, known.released) = (Some(reason.clone()), true);
        let name = known.join.name.clone();
        self.send(worker, Directive::Drain(Drain { reason: reason.clone() }));
        self.publish(RunEvent::Draining { name, reason });
    }

    pub(super) fn on_pause(&mut self, reason: String) {
        if self.paused.is_none() {
            self.paused = Some(reason.clone());
            self.out.push(Action::KeepPause(Some(reason.clone())));
            self.publish(RunEvent::Pausing { reason });
        }
    }

    /// Has a checkpoint made at the next boundary, which may be this one.
    pub(super) fn on_save(&mut self) {
        let at_a_boundary = matches!(self.phase, Phase::Holding);
        let there = self.checkpoint.as_ref().is_some_and(|mark| mark.step == self.committed);
        if at_a_boundary && there {
            return;
        }
        self.save_overdue = true;
        self.save_retry_at = self.now;
        if at_a_boundary {
            self.proceed();
        }
    }

    pub(super) fn on_resume(&mut self) {
        if self.paused.take().is_some() {
            self.out.push(Action::KeepPause(None));
            self.publish(RunEvent::Resumed);
            if matches!(self.phase, Phase::Holding) {
                self.proceed();
            }
        }
    }
}
