//! A worker whose coordinator does not come back: it makes a checkpoint of what it holds, so that
//! the run loses no committed step even if all workers end.
//!
//! Workers of one generation take turns in the order of their ranks, for one checkpoint is enough;
//! whoever finds it there has nothing to do. A checkpoint is a function of its step, so that it does
//! no harm should a coordinator be at work that this worker cannot reach.

use std::time::Duration;

use looptrain_proto::{Incarnation, Step};
use looptrain_storage::{CheckpointManifest, read_record};
use tokio::time::sleep;

use super::work::Work;

/// What a rank gets to write its checkpoint before the next one does.
const TURN: Duration = Duration::from_secs(10);

/// Nobody waits longer than this for its turn.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// How often a waiting rank looks whether there is a checkpoint.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Work {
    /// See [`super::Duties::save_without_coordinator`].
    pub(super) async fn save_orphaned(&self, known: Incarnation) -> String {
        match self.compute.submit(|bench| bench.held()).await {
            Ok(Some(step)) if step > Step(0) => match self.save_alone(step, known).await {
                Ok(end) => end,
                Err(error) => format!("the state of step {step} could not be saved: {error}"),
            },
            _ => "there was no state to save".into(),
        }
    }

    async fn save_alone(&self, step: Step, known: Incarnation) -> Result<String, String> {
        let said = |error: looptrain_storage::Error| error.to_string();
        let (generation, rank) = self.memory.place();
        let turn = (TURN * rank.0).min(LONGEST_WAIT);
        let begin = tokio::time::Instant::now();
        loop {
            let newest = self.checkpoints.list().await.map_err(said)?.last().copied();
            if let Some(newest) = newest.filter(|newest| *newest >= step) {
                return Ok(format!("the state of step {newest} is saved as a checkpoint"));
            }
            if begin.elapsed() >= turn {
                break;
            }
            sleep(LOOK_EVERY).await;
        }
        let trajectory = self.spec.trajectory_digest();
        let run = &self.spec.run.name;
        let record = read_record(&self.store, run).await.map_err(said)?;
        if record.is_none_or(|record| record.trajectory != trajectory || record.begun > known) {
            return Ok("the run has been begun anew, so that the state is of no use".into());
        }
        let copied = self.compute.submit(move |bench| bench.snapshot(step, 0, 1));
        let (part, weights_digest) = self.upload(step, 0, 1, copied).await?;
        let brought = super::brought(self).await.map_err(|error| error.to_string())?;
        if let Some(held) = brought {
            self.checkpoints.save_memory(step, held.to_bytes()).await.map_err(said)?;
        }
        let manifest = CheckpointManifest {
            version: CheckpointManifest::VERSION,
            run: run.clone(),
            step,
            cursor: self.spec.cursor_after(step),
            trajectory,
            generation,
            weights_digest,
            parts: vec![part],
            trend: self.memory.trend_after(step),
        };
        self.checkpoints.commit(&manifest).await.map_err(said)?;
        Ok(format!("saved the state of step {step} as a checkpoint"))
    }
}
