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
        let others_stay = self.somebody_stays();
        let holds = |core: &Self, worker: WorkerId| match core.phase {
            // It may be the only one that comes back.
            Phase::Waiting => core.held(worker).is_some(),
            _ => core.rank_of(worker).is_some(),
        };
        for worker in self.roster.ids() {
            if others_stay || !holds(self, worker) {
                self.release(worker);
            }
        }
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

    /// Whether somebody holds the committed state and has not been told to leave.
    fn somebody_stays(&self) -> bool {
        let stays = |worker: &WorkerId| {
            self.roster.get(*worker).is_some_and(|known| known.leaving.is_none())
        };
        let mut holders = self.members.iter().filter(|member| self.holds_the_state(**member));
        holders.any(stays) || self.roster.followers().iter().any(stays)
    }

    /// Whether all that hold the committed state are about to leave, so that it is to be saved first.
    pub(super) fn all_leave(&self) -> bool {
        !self.members.is_empty() && !self.somebody_stays()
    }

    /// Whether somebody waits for a place who stays, and there is one.
    pub(super) fn somebody_can_take_over(&self) -> bool {
        let stays =
            |spare: &WorkerId| self.roster.get(*spare).is_some_and(|known| known.leaving.is_none());
        self.room_beside(self.members.len()) > 0 && self.spares().iter().any(stays)
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
