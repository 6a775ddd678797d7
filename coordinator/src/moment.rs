//! Exact moments in the life of a step, for tests that hurt a coordinator there. Costs nothing when
//! nobody watches.

use std::sync::Arc;

use looptrain_proto::Step;
use looptrain_proto::v1::coordinator_message::Kind as Directive;

use crate::core::{Action, Event, Report};

/// What a coordinator is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// All plans of the step are queued for the workers.
    Planned(Step),
    /// A vote on the step is in, and others are missing.
    Vote(Step),
    /// All votes are in; no worker has been told to commit.
    Decided(Step),
    /// A first worker has been told to commit, and the others have not.
    Committing(Step),
}

/// Called at each moment, on the task that would go on otherwise.
pub type OnMoment = Arc<dyn Fn(Moment) + Send + Sync>;

impl Moment {
    /// All names.
    pub const NAMES: [&str; 4] = ["planned", "vote", "decided", "committing"];

    /// The name without the step.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Planned(_) => "planned",
            Self::Vote(_) => "vote",
            Self::Decided(_) => "decided",
            Self::Committing(_) => "committing",
        }
    }

    /// The step.
    #[must_use]
    pub fn step(self) -> Step {
        match self {
            Self::Planned(step)
            | Self::Vote(step)
            | Self::Decided(step)
            | Self::Committing(step) => step,
        }
    }
}

/// Tells moments from what the core hears and wants done.
pub(crate) struct Watch {
    tell: OnMoment,
    /// The step of the vote that is being dealt with, as long as nothing was decided for it.
    vote: Option<Step>,
    planned: Option<Step>,
    /// How many workers have been told to commit because of the event that is being dealt with.
    commits: usize,
}

impl Watch {
    pub(crate) fn new(tell: OnMoment) -> Self {
        Self { tell, vote: None, planned: None, commits: 0 }
    }

    /// An event that the core is about to get.
    pub(crate) fn hear(&mut self, event: &Event) {
        if let Event::Report { report: Report::Prepared { step, .. }, .. } = event {
            self.vote = Some(*step);
        }
    }

    /// An action that is about to be executed; those before it have been.
    pub(crate) fn before(&mut self, action: &Action) {
        match action {
            Action::Send { message: Directive::Commit(commit), .. } => {
                self.vote = None;
                let step = Step(commit.step);
                self.commits += 1;
                match self.commits {
                    1 => (self.tell)(Moment::Decided(step)),
                    2 => (self.tell)(Moment::Committing(step)),
                    _ => {}
                }
            }
            Action::Send { message: Directive::Plan(plan), .. } => {
                self.planned = Some(Step(plan.step));
            }
            // A vote that led to anything but patience.
            Action::Ignored { .. } | Action::Send { .. } | Action::End(_) => self.vote = None,
            _ => {}
        }
    }

    /// Everything about the event has been done.
    pub(crate) fn done(&mut self) {
        self.commits = 0;
        if let Some(step) = self.vote.take() {
            (self.tell)(Moment::Vote(step));
        }
        if let Some(step) = self.planned.take() {
            (self.tell)(Moment::Planned(step));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;

    use looptrain_proto::v1::{Commit, Plan, Sections};
    use looptrain_proto::{Digest, Generation, WorkerId};

    use super::*;

    fn send(worker: u64, message: Directive) -> Action {
        Action::Send { worker: WorkerId(worker), message }
    }

    fn vote(worker: u64, step: u64) -> Event {
        let report = Report::Prepared {
            generation: Generation(1),
            step: Step(step),
            digest: Digest([0; 32]),
            statistics: Box::default(),
            sections: Sections::default(),
            computed_slots: 0,
            detail: String::new(),
        };
        Event::Report { worker: WorkerId(worker), report }
    }

    #[test]
    fn a_step_of_three_ranks_has_each_moment_in_order() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let note = Arc::clone(&told);
        let mut watch = Watch::new(Arc::new(move |moment| note.lock().unwrap().push(moment)));
        for worker in 1..=2 {
            watch.hear(&vote(worker, 7));
            watch.done();
        }
        watch.hear(&vote(3, 7));
        for worker in 1..=3 {
            let commit = Commit { generation: 1, step: 7 };
            watch.before(&send(worker, Directive::Commit(commit)));
        }
        for worker in 1..=3 {
            let plan = Plan { generation: 1, step: 8, ..Plan::default() };
            watch.before(&send(worker, Directive::Plan(plan)));
        }
        watch.done();
        // One that is too late is no vote.
        watch.hear(&vote(3, 7));
        watch.before(&Action::Ignored { worker: WorkerId(3), reason: "old".into() });
        watch.done();
        let expected = [
            Moment::Vote(Step(7)),
            Moment::Vote(Step(7)),
            Moment::Decided(Step(7)),
            Moment::Committing(Step(7)),
            Moment::Planned(Step(8)),
        ];
        assert_eq!(*told.lock().unwrap(), expected);
        assert!(expected.iter().all(|moment| Moment::NAMES.contains(&moment.name())));
    }
}
