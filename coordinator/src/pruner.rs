//! Removes old checkpoints, in a task of its own: before anything goes, one that stays may have to be
//! read back, which takes as long as it takes, and manifests are not to wait for it.

use std::sync::Arc;
use std::time::SystemTime;

use looptrain_proto::Step;
use looptrain_storage::{Checkpoints, Error, Retention, Witness};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::board::Board;

/// The task's state.
pub(crate) struct Pruner {
    pub(crate) checkpoints: Checkpoints,
    /// Which to keep.
    pub(crate) retention: Retention,
    /// Whether this coordinator has been replaced.
    pub(crate) witness: Witness,
    /// The newest checkpoint; at first the one that the run went on from, for what a coordinator
    /// that died had not got round to, or was in the middle of.
    pub(crate) newest: watch::Receiver<Option<Step>>,
    /// The run is to be left as it is: nothing more is planned, and what is being removed goes whole.
    pub(crate) leave: CancellationToken,
    /// Shows what was found.
    pub(crate) board: Arc<Board>,
}

impl Pruner {
    /// Works until nobody can tell of a newer checkpoint any more, the run is to be left, or it is
    /// another coordinator's.
    pub(crate) async fn run(mut self) {
        self.newest.mark_changed();
        while self.newest.changed().await.is_ok() {
            let Some(newest) = *self.newest.borrow_and_update() else { continue };
            match self.prune(newest).await {
                Ok(()) => {}
                // The keeper sees it too, and ends the run here.
                Err(Error::Fenced { .. }) => return,
                Err(error) => tracing::warn!(%error, "could not remove old checkpoints"),
            }
        }
    }

    async fn prune(&mut self, newest: Step) -> Result<(), Error> {
        let plan = async {
            let now = SystemTime::now();
            let plan = self.checkpoints.plan(&self.retention, &[newest], now).await?;
            // It may have taken as long as reading a checkpoint back does.
            self.witness.still_mine().await?;
            Ok::<_, Error>(plan)
        };
        let Some(plan) = self.leave.run_until_cancelled(plan).await.transpose()? else {
            return Ok(());
        };
        let removed = self.checkpoints.remove(&plan).await?;
        let there = self.checkpoints.list().await?;
        self.board.checkpoints_are(&there, self.checkpoints.verified(), self.checkpoints.damaged());
        tracing::debug!(?removed, orphans = plan.orphans.len(), "removed old checkpoints");
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_storage::Store;

    use super::*;
    use crate::testing::{claim, pruner, saved};

    #[tokio::test]
    async fn what_is_old_goes_and_so_does_what_an_earlier_coordinator_left() {
        let store = Store::open("memory://").unwrap();
        let checkpoints = Checkpoints::new(&store, "r");
        let register = claim(&store).await;
        for step in [1, 2] {
            checkpoints.commit(&saved(&checkpoints, step).await).await.unwrap();
        }
        let (newest, newer) = watch::channel(Some(Step(2)));
        let pruning = tokio::spawn(pruner(&checkpoints, &register, newer).run());
        while checkpoints.list().await.unwrap() != [Step(2)] {
            tokio::task::yield_now().await;
        }
        checkpoints.commit(&saved(&checkpoints, 3).await).await.unwrap();
        newest.send_replace(Some(Step(3)));
        drop(newest);
        pruning.await.unwrap();
        assert_eq!(checkpoints.list().await.unwrap(), [Step(3)]);
    }

    #[tokio::test]
    async fn a_coordinator_that_has_been_replaced_removes_nothing() {
        let store = Store::open("memory://").unwrap();
        let checkpoints = Checkpoints::new(&store, "r");
        let register = claim(&store).await;
        for step in [1, 2] {
            checkpoints.commit(&saved(&checkpoints, step).await).await.unwrap();
        }
        claim(&store).await;
        let (_newest, newer) = watch::channel(Some(Step(2)));
        pruner(&checkpoints, &register, newer).run().await;
        assert_eq!(checkpoints.list().await.unwrap(), [Step(1), Step(2)]);
    }
}
