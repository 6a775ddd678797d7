//! Exact moments in the life of a worker, for tests that hurt it there. Costs nothing when nobody
//! watches.

use std::fmt;
use std::sync::Arc;

use looptrain_proto::Step;

/// What a worker is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A slot of the step is computed, and not all of it is handed on yet.
    Compute(Step),
    /// In the all-reduce of the step: numbers have gone out, and the sum is not complete.
    Reduce(Step),
    /// The vote on the step is queued for the coordinator, and nothing has been heard since.
    Prepared(Step),
    /// The coordinator says to commit the step, and this worker has not begun to.
    Commit(Step),
    /// A joiner has been sent a chunk of the state of the step.
    Serving(Step),
    /// This worker has fetched the state of the step from others, and has no place yet.
    Fetched(Step),
    /// It has come to the step with the others' update since, and still has no place.
    Followed(Step),
}

impl Moment {
    /// All names.
    pub const NAMES: [&str; 7] =
        ["compute", "reduce", "prepared", "commit", "serving", "fetched", "followed"];

    /// The name without the step.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute(_) => "compute",
            Self::Reduce(_) => "reduce",
            Self::Prepared(_) => "prepared",
            Self::Commit(_) => "commit",
            Self::Serving(_) => "serving",
            Self::Fetched(_) => "fetched",
            Self::Followed(_) => "followed",
        }
    }

    /// The step.
    #[must_use]
    pub fn step(self) -> Step {
        match self {
            Self::Compute(step)
            | Self::Reduce(step)
            | Self::Prepared(step)
            | Self::Commit(step)
            | Self::Serving(step)
            | Self::Fetched(step)
            | Self::Followed(step) => step,
        }
    }
}

/// Who is called at each moment, on the thread that would go on otherwise; by default nobody.
#[derive(Clone, Default)]
pub struct Moments(Option<Arc<dyn Fn(Moment) + Send + Sync>>);

impl Moments {
    /// Calls `watcher` at each moment.
    #[must_use]
    pub fn watched_by(watcher: impl Fn(Moment) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(watcher)))
    }

    pub(crate) fn at(&self, moment: Moment) {
        if let Some(watcher) = &self.0 {
            watcher(moment);
        }
    }
}

impl fmt::Debug for Moments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "watched" } else { "not watched" })
    }
}
