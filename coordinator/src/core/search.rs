//! Before steps are done again: whether the store has a newer checkpoint than this coordinator knows
//! of. Workers whose coordinator does not come back make one, and this coordinator may have read what there
//! was before they did.

use looptrain_proto::Step;
use looptrain_proto::v1::Held;

use super::{Action, Core, Mark};

/// What a look into the store has found.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    /// The newest checkpoint; its record is for the core to find.
    pub(crate) mark: Mark,
    /// What the worker that made it remembered.
    pub(crate) memory: Option<Held>,
}

/// A look into the store; each wait for workers has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Search {
    #[default]
    NotYet,
    UnderWay,
    Over,
}

impl Core {
    /// Whether there is nothing newer in the store than is known; has that looked up if need be.
    pub(super) fn has_looked_for_checkpoints(&mut self) -> bool {
        let saved = self.checkpoint.as_ref().map_or(Step(0), |mark| mark.step);
        let best = self.best_step_at_hand();
        let does_again = best < self.committed.max(self.logged);
        let takes_over = !self.formed && self.workers_may_return && saved > Step(0);
        let is_worth_it = does_again || (takes_over && best == saved);
        if !is_worth_it {
            return true;
        }
        if self.search == Search::NotYet {
            self.search = Search::UnderWay;
            self.out.push(Action::FindCheckpoint { behind: saved });
        }
        self.search == Search::Over
    }

    pub(super) fn on_checkpoint_found(&mut self, found: Result<Option<Box<Left>>, String>) {
        // Others may have come meanwhile that made it pointless.
        if self.search != Search::UnderWay || !matches!(self.phase, super::Phase::Waiting) {
            return;
        }
        self.search = Search::Over;
        let saved = self.checkpoint.as_ref().map_or(Step(0), |mark| mark.step);
        match found {
            Ok(Some(left)) if left.mark.step > saved => {
                let Left { mark, memory } = *left;
                let record = self.tail.iter().rfind(|record| record.step == mark.step).cloned();
                self.checkpoint = Some(Mark { record, ..mark });
                self.bequest = memory;
                self.note_trends();
            }
            // Without the store nobody could load the older one, either.
            Err(reason) if self.best_step_at_hand() == saved => {
                self.search = Search::NotYet;
                return self.explain(format!("the store does not say what was saved: {reason}"));
            }
            Ok(_) | Err(_) => {}
        }
        self.settle();
    }
}
