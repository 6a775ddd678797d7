//! Follows the commits: how long the run takes to go on after each event, and whether it goes on at
//! all. Times are since the first look at the clock.

use std::collections::VecDeque;
use std::time::Duration;

use looptrain_proto::{Generation, Step};

/// Commits that the usual time of a step is taken from.
const WINDOW: usize = 33;

/// Something that has happened, and what came of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) kind: &'static str,
    /// To whom, and at which moment.
    pub(crate) detail: String,
    pub(crate) at: Duration,
    /// The newest step that was known to be committed.
    pub(crate) step: Step,
    /// The usual time from one commit to the next before.
    pub(crate) step_time: Duration,
    /// From the event to the commit that shows that the run has gone on.
    pub(crate) recovery: Option<Duration>,
    /// The longest time without a commit from before the event until then.
    pub(crate) pause: Duration,
}

/// What ends the wait for the run to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// A commit of a newer generation: the old one cannot have been planned to commit it.
    NewGeneration,
    /// Any commit: members do not notice the event.
    AnyCommit,
}

#[derive(Debug)]
struct Open {
    /// In `events`.
    index: usize,
    /// Measured from here.
    from: Duration,
    generation: Generation,
    until: Until,
}

/// All that has happened to a run.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    pub(crate) events: Vec<Event>,
    open: Vec<Open>,
    recent: VecDeque<Duration>,
    /// The newest commit.
    step: Step,
    generation: Generation,
    at: Option<Duration>,
}

impl Watch {
    /// The newest committed step.
    pub(crate) fn step(&self) -> Step {
        self.step
    }

    /// Something happens now; how long it takes is measured from `now`.
    pub(crate) fn event(
        &mut self,
        now: Duration,
        kind: &'static str,
        detail: String,
        until: Until,
    ) {
        let index = self.events.len();
        let (step, step_time) = (self.step, self.step_time());
        self.events.push(Event {
            kind,
            detail,
            at: now,
            step,
            step_time,
            recovery: None,
            pause: Duration::ZERO,
        });
        self.open.push(Open { index, from: now, generation: self.generation, until });
    }

    /// The events so far are measured from `now`: what they wait for begins only now.
    pub(crate) fn measure_from(&mut self, now: Duration) {
        self.open.iter_mut().for_each(|open| open.from = now);
    }

    pub(crate) fn commit(&mut self, now: Duration, step: Step, generation: Generation) {
        let gap = self.silence(now);
        if self.at.is_some() && generation == self.generation {
            self.recent.push_back(gap);
            if self.recent.len() > WINDOW {
                self.recent.pop_front();
            }
        }
        (self.step, self.generation, self.at) = (step, generation, Some(now));
        let events = &mut self.events;
        self.open.retain(|open| {
            let over = match open.until {
                Until::NewGeneration => generation > open.generation,
                Until::AnyCommit => true,
            };
            let event = &mut events[open.index];
            event.pause = event.pause.max(gap);
            if over {
                event.recovery = Some(now.saturating_sub(open.from));
            }
            !over
        });
    }

    /// Whether the run has gone on after everything that happened.
    pub(crate) fn is_calm(&self) -> bool {
        self.open.is_empty()
    }

    /// How long nothing has been committed; zero before the first commit.
    pub(crate) fn silence(&self, now: Duration) -> Duration {
        self.at.map_or(Duration::ZERO, |at| now.saturating_sub(at))
    }

    /// The median of the latest times from one commit to the next in the same generation.
    pub(crate) fn step_time(&self) -> Duration {
        median(self.recent.iter().copied().collect()).unwrap_or_default()
    }
}

/// The middle one, or the earlier of the middle two.
pub(crate) fn median(mut times: Vec<Duration>) -> Option<Duration> {
    times.sort();
    times.get(times.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn training() -> Watch {
        let mut watch = Watch::default();
        for step in 1..=4 {
            watch.commit(MS(100 * step), Step(step), Generation(1));
        }
        watch
    }

    #[test]
    fn a_commit_that_was_on_its_way_is_no_recovery_and_one_of_a_newer_generation_is() {
        let mut watch = training();
        watch.event(MS(410), "kill-worker", "w1".into(), Until::NewGeneration);
        watch.commit(MS(500), Step(5), Generation(1));
        assert!(!watch.is_calm());
        watch.commit(MS(910), Step(6), Generation(2));
        assert!(watch.is_calm());
        let event = &watch.events[0];
        assert_eq!((event.recovery, event.pause), (Some(MS(500)), MS(410)));
        assert_eq!((event.step, event.step_time), (Step(4), MS(100)));
    }

    #[test]
    fn what_the_members_do_not_notice_is_over_with_the_next_commit() {
        let mut watch = training();
        watch.event(MS(410), "kill-joiner", "w2".into(), Until::AnyCommit);
        watch.commit(MS(500), Step(5), Generation(1));
        assert_eq!(watch.events[0].recovery, Some(MS(90)));
    }

    #[test]
    fn a_coordinator_is_measured_from_the_start_of_the_next_one() {
        let mut watch = training();
        watch.event(MS(410), "kill-coordinator", String::new(), Until::NewGeneration);
        watch.measure_from(MS(900));
        watch.commit(MS(1000), Step(5), Generation(2));
        assert_eq!(watch.events[0].recovery, Some(MS(100)));
        assert_eq!(watch.events[0].at, MS(410));
    }

    #[test]
    fn silence_grows_from_the_last_commit_on() {
        assert_eq!(Watch::default().silence(MS(5000)), Duration::ZERO);
        assert_eq!(training().silence(MS(5000)), MS(4600));
    }
}
