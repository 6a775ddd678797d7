//! Before a generation: how many workers have to be here, and for how long others are waited for.
//!
//! A run that begins waits for all of its workers: whoever starts the coordinator starts them too.
//! A run that has worked before goes on with those that are left, for the others may never come
//! back; workers that outlived a coordinator are as many as their generation was.

use std::time::Duration;

use looptrain_proto::Step;

use super::search::Search;
use super::{Core, plural};
use crate::records::RunEvent;

/// How long the workers that are left wait for others, after the last one came or went.
const SETTLING: Duration = Duration::from_secs(5);

/// The same when some are back that outlived a coordinator. Whoever else did is back once it is
/// through with the slot that it computes, a step at most, which comes on top, and with its longest
/// pause between two attempts.
const OUTLIVED: Duration = Duration::from_secs(2);

/// How long it takes a worker at most to notice that its coordinator's machine is gone, and to be back, beside
/// the slot that it computes.
const NOTICED: Duration = Duration::from_millis(25_500);

/// The same for a run that a new coordinator goes on with: its workers are being started too.
const RETURNING: Duration = Duration::from_secs(60);

/// A wait that lasts is spoken of this often.
const REMIND_EVERY: Duration = Duration::from_secs(30);

/// A wait for workers; times are the core's waking time.
#[derive(Debug, Default)]
pub(super) struct Wait {
    /// How many are here; `None` before the first look.
    here: Option<usize>,
    /// The newest step that they have.
    best: Step,
    /// Since when there are that many.
    since: Duration,
    /// When it was last spoken of.
    said: Option<Duration>,
}

impl Wait {
    /// That no worker is here yet when a coordinator starts is no news.
    pub(super) fn for_the_first() -> Self {
        Self { here: Some(0), said: Some(Duration::ZERO), ..Self::default() }
    }
}

/// No step is waited for longer than this many seconds.
const LONGEST_STEP: f64 = 900.0;

impl Core {
    /// Waiting: forms a generation as soon as enough workers are here. To be called when one comes
    /// or goes, and as time passes.
    pub(super) fn settle(&mut self) {
        if let Some(saving) = &self.saving {
            // All parts are in and the manifest is on its way: it decides how far back to go.
            let step = saving.step();
            return self.explain(format!("waiting for the checkpoint of step {step}"));
        }
        if self.roster.len() == 0 {
            // What those find that come is looked up when they are here.
            self.search = Search::default();
        }
        let saved = self.checkpoint.as_ref().map_or(Step(0), |mark| mark.step);
        let spike_is_next = self.spike.is_some() && saved == self.committed;
        let ends = self.stop.is_some() || spike_is_next || self.is_far_enough(saved);
        if ends && self.best_step_at_hand() == saved {
            // The log is left as it is: workers that hold more may come back to the next
            // coordinator.
            self.stand_at(saved);
            return self.finish();
        }
        // Those that hold more than the checkpoint wait for the rest of their generation.
        let (here, wanted) = match self.best_step_at_hand() > saved {
            true => (self.holders_at_hand(), self.world_at_hand()),
            false => (self.roster.len(), self.spec.cluster.workers as usize),
        };
        if !self.have_waited_for_holders() {
            let step = self.logged.max(self.committed);
            return self
                .explain(format!("waiting a moment for workers that may still hold step {step}"));
        }
        // Their members are gone, which they notice at once, and then they say how far they got.
        let followers = self.roster.followers();
        if !followers.is_empty() && !self.have_waited(here.max(1)) {
            let names = self.roster.names(followers);
            return self.explain(format!("waiting to hear which step {names} holds"));
        }
        if here < wanted && !self.have_waited(here) {
            return self.say_waiting(here, wanted);
        }
        if !self.has_looked_for_checkpoints() {
            return self.explain("looking for a newer checkpoint");
        }
        let members = self.go_back_or_on();
        self.anchors = members.iter().copied().collect();
        let from = match self.committed {
            Step(0) => "from the initial weights".into(),
            step if self.state_is_in_reach() => format!("from the checkpoint of step {step}"),
            step => format!("from step {step}, which workers still hold"),
        };
        let joined = members.len();
        let why = format!("{joined} worker{} joined; starting {from}", plural(joined));
        self.form(members, why);
    }

    /// How long to wait for more workers; `None` for as long as it takes.
    fn settling_time(&self) -> Option<Duration> {
        match (self.formed, &self.checkpoint) {
            (true, _) => Some(SETTLING),
            (false, _) if self.world_at_hand() > 0 => {
                Some(OUTLIVED.saturating_add(self.latest_pace()))
            }
            (false, _) if self.roster.len() >= self.spec.cluster.workers as usize => Some(SETTLING),
            (false, Some(_)) => Some(RETURNING),
            (false, None) => None,
        }
    }

    /// Whether those that may hold more than whoever is here have had their time, from when somebody was
    /// here on; who comes and goes meanwhile, holding no more, does not begin it anew.
    fn have_waited_for_holders(&mut self) -> bool {
        let Some(time) = self.time_for_holders() else { return true };
        if self.roster.len() == 0 {
            self.holders_awaited = None;
            return false;
        }
        let best = self.best_step_at_hand();
        let (_, since) = match self.holders_awaited.filter(|(step, _)| *step == best) {
            Some(wait) => wait,
            None => *self.holders_awaited.insert((best, self.awake)),
        };
        self.awake - since >= time
    }

    /// How long workers are waited for that may hold more than those who are here: as long as they may
    /// take to come back, but no longer than it took to compute what they hold. `None` where nobody can.
    fn time_for_holders(&self) -> Option<Duration> {
        let (best, newest) = (self.best_step_at_hand(), self.logged.max(self.committed));
        let may_come = match self.formed {
            true => !self.silent.is_empty(),
            false => self.workers_may_return,
        };
        if best >= newest || !may_come {
            return None;
        }
        let pace = self.latest_pace();
        let logged: f64 = (self.tail.iter().filter(|record| record.step > best))
            .map(|record| record.seconds.min(LONGEST_STEP))
            .sum();
        let steps = u32::try_from(newest.0 - best.0).unwrap_or(u32::MAX);
        let computed = Duration::try_from_secs_f64(logged).unwrap_or_default();
        let computed = computed.max(pace.saturating_mul(steps));
        Some(SETTLING.max(NOTICED.saturating_add(pace).min(computed)))
    }

    /// How long a step took when the run was last at work; nothing where that is not known.
    fn latest_pace(&self) -> Duration {
        let latest = self.tail.last().or(self.last.as_ref());
        // One that waited for something is no measure.
        let seconds = latest.map(|record| record.seconds.min(LONGEST_STEP));
        seconds.and_then(|it| Duration::try_from_secs_f64(it).ok()).unwrap_or_default()
    }

    /// Notes how many workers are here; whether others have been waited for long enough.
    fn have_waited(&mut self, here: usize) -> bool {
        let best = self.best_step_at_hand();
        if self.waiting.here != Some(here) || (here > 0 && self.waiting.best != best) {
            self.waiting = Wait { here: Some(here), best, since: self.awake, said: None };
        }
        let waited = self.awake - self.waiting.since;
        here > 0 && self.settling_time().is_some_and(|time| waited >= time)
    }

    fn say_waiting(&mut self, here: usize, wanted: usize) {
        let names = self.roster.names(self.roster.ids());
        let who = match self.roster.len() {
            0 => "none is here".into(),
            1 => format!("only {names} is here"),
            all => format!("{all} are here: {names}"),
        };
        let then = match self.settling_time() {
            Some(time) if here > 0 => {
                format!("; going on without the others after {:.0} s", time.as_secs_f64().ceil())
            }
            _ => String::new(),
        };
        self.explain(format!("waiting for {wanted} worker{}; {who}{then}", plural(wanted)));
        if self.waiting.said.is_none_or(|said| self.awake - said >= REMIND_EVERY) {
            self.waiting.said = Some(self.awake);
            self.publish(RunEvent::Waiting { here: here as u32, wanted: wanted as u32 });
        }
    }
}
