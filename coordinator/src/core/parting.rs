//! Workers that were told to leave: as long as others stay behind that hold the state, each may go at
//! once. The last ones go when a checkpoint holds what they do.

use looptrain_proto::WorkerId;
use looptrain_proto::v1::Drain;

use super::{Core, Directive, Phase};

impl Core {
    pub(super) fn on_leaving(&mut self, worker: WorkerId, reason: String) {
        let Some(known) = self.roster.get_mut(worker) else { return };
        known.leaving = Some(reason);
        known.history.note_drained();
        match self.phase {
            Phase::Holding => self.proceed(),
            _ => self.let_go(),
        }
    }

    /// Lets those go that need not stay.
    pub(super) fn let_go(&mut self) {
        let may_all = self.somebody_stays() || self.nothing_is_at_stake();
        for worker in self.roster.ids() {
            if may_all || !self.needs(worker) {
                self.release(worker);
            }
        }
    }

    /// Whether a worker holds what nobody may have but those that leave.
    fn needs(&self, worker: WorkerId) -> bool {
        match self.phase {
            // It may be the only one that comes back.
            Phase::Waiting => {
                let saved = self.checkpoint.as_ref().map_or(0, |mark| mark.step.0);
                self.held(worker)
                    .is_some_and(|held| held.step.max(held.prepared.unwrap_or_default()) > saved)
            }
            _ => self.rank_of(worker).is_some(),
        }
    }

    /// Whether those that leave hold no more than the checkpoint does, and do nothing but wait: for a
    /// generation, or for a store that fails them.
    fn nothing_is_at_stake(&self) -> bool {
        let forms = matches!(self.phase, Phase::Forming(_));
        let starves = || self.members.iter().any(|member| self.away.failed(*member).is_some());
        self.all_leave() && self.state_is_in_reach() && (forms || starves())
    }

    fn release(&mut self, worker: WorkerId) {
        let Some(known) = self.roster.get_mut(worker) else { return };
        // Told once: it is on its way then.
        let Some(reason) = known.leaving.as_ref().filter(|_| !known.released).cloned() else {
            return;
        };
        known.released = true;
        self.send(worker, Directive::Drain(Drain { reason }));
    }

    /// Whether a member holds the committed state that has not been told to leave. A warm spare may lack
    /// the last update, which goes with those that leave.
    fn somebody_stays(&self) -> bool {
        let mut holders = self.members.iter().filter(|member| self.holds_the_state(**member));
        holders.any(|member| self.stays(*member))
    }

    fn stays(&self, worker: WorkerId) -> bool {
        self.roster.get(worker).is_some_and(|known| known.leaving.is_none())
    }

    /// Whether all that hold the committed state are about to leave, so that it is to be saved first.
    pub(super) fn all_leave(&self) -> bool {
        !self.members.is_empty() && !self.somebody_stays()
    }

    /// Whether somebody who stays waits for a place, and gets one here.
    pub(super) fn is_taken_over(&self) -> bool {
        if self.room_beside(self.members.len()) == 0 {
            return false;
        }
        let able =
            if self.state_is_in_reach() { self.spares() } else { self.guests_that_fetched() };
        able.iter().any(|spare| self.stays(*spare))
    }

    /// At a boundary at which all are about to leave: they do when the state is in reach of whoever
    /// comes.
    pub(super) fn part(&mut self) {
        self.phase = Phase::Holding;
        if self.state_is_in_reach() {
            self.explain("all workers leave");
            return self.release_all();
        }
        let step = self.committed;
        self.explain(format!(
            "all workers are about to leave; waiting for the checkpoint of step {step}"
        ));
    }

    pub(super) fn release_all(&mut self) {
        for member in self.members.clone() {
            self.release(member);
        }
    }
}
