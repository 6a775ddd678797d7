//! How fast each member is, from its votes: shares of a step follow it, and who is far behind the
//! others in a section of the step is reported by name.
//!
//! Everything rests on medians over the latest steps, which a single slow step does not move.

use std::collections::VecDeque;
use std::ops::Range;

use looptrain_proto::{Step, WorkerId};

use super::Core;
use super::shares::{by_speed, makespan, ranges};
use super::step::Vote;
use crate::records::{RunEvent, Section};

/// Steps that the medians are taken over.
const WINDOW: usize = 7;

/// Steps after which a worker is judged.
const ENOUGH: usize = 4;

/// Slots are moved when that shortens the step at least by this share: a moved slot was not read
/// ahead by its new rank.
const WORTH_MOVING: f64 = 0.1;

/// Who costs a step less than this share of its time is no straggler, and neither is who costs less
/// than [`NEGLIGIBLE`] seconds.
const SHARE_OF_STEP: f64 = 0.05;
const NEGLIGIBLE: f64 = 0.01;

/// What one member took in one step, seconds.
#[derive(Clone, Copy, Debug)]
struct Observation {
    data: f64,
    /// Of one slot; unknown when all its slots were kept from an earlier try.
    slot: Option<f64>,
    reduce: f64,
    commit: f64,
}

/// A member's latest steps, and what they say.
#[derive(Debug, Default)]
pub(crate) struct History {
    latest: VecDeque<Observation>,
    straggles: Option<Section>,
    /// Has been told to leave.
    drained: bool,
}

impl History {
    fn push(&mut self, observation: Observation) {
        self.latest.push_back(observation);
        if self.latest.len() > WINDOW {
            self.latest.pop_front();
        }
    }

    fn median(&self, of: impl Fn(&Observation) -> Option<f64>) -> Option<f64> {
        median(self.latest.iter().filter_map(of).collect())
    }

    /// Seconds per slot; also of a worker that is too new to be judged.
    fn slot_seconds(&self) -> Option<f64> {
        self.median(|seen| seen.slot).filter(|seconds| *seconds > 0.0)
    }

    /// Slots per second.
    pub(crate) fn speed(&self) -> Option<f64> {
        self.slot_seconds().map(f64::recip)
    }

    /// The section in which it is slower than the others.
    pub(crate) fn straggles_in(&self) -> Option<Section> {
        self.straggles
    }

    /// Whether it has been told to leave.
    pub(super) fn drained(&self) -> bool {
        self.drained
    }

    pub(super) fn note_drained(&mut self) {
        self.drained = true;
    }

    /// Seconds in a section, for a comparison with the others.
    fn typical(&self, section: Section) -> Option<f64> {
        if self.latest.len() < ENOUGH {
            return None;
        }
        match section {
            Section::Data => self.median(|seen| Some(seen.data)),
            Section::Compute => self.slot_seconds(),
            Section::Reduce => self.median(|seen| Some(seen.reduce)),
            Section::Commit => self.median(|seen| Some(seen.commit)),
        }
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    let middle = values.len() / 2;
    (!values.is_empty()).then(|| *values.select_nth_unstable_by(middle, f64::total_cmp).1)
}

/// What the time of each rank is compared with: that of the other one, or the median of all.
fn yardsticks(all: &[Option<f64>]) -> Vec<Option<f64>> {
    match all {
        [first, second] => vec![*second, *first],
        // Once for all: there may be thousands of ranks.
        all => vec![median(all.iter().flatten().copied().collect()); all.len()],
    }
}

impl Core {
    /// The slots of each rank in `step`.
    pub(super) fn share_out(&mut self, step: Step) -> Vec<Range<u32>> {
        let slots = self.spec.slots_of(step);
        let known: Vec<Option<f64>> = (self.members.iter())
            .map(|member| self.roster.get(*member).and_then(|worker| worker.history.speed()))
            .collect();
        let usual = median(known.iter().flatten().copied().collect()).unwrap_or(1.0);
        let speeds: Vec<f64> = known.into_iter().map(|speed| speed.unwrap_or(usual)).collect();
        let best = by_speed(slots, &speeds);
        let as_before = self.counts.len() == best.len() && self.counts.iter().sum::<u32>() == slots;
        let worth_it =
            makespan(&best, &speeds) < makespan(&self.counts, &speeds) * (1.0 - WORTH_MOVING);
        if !as_before || worth_it {
            self.counts = best;
        }
        ranges(&self.counts)
    }

    /// Takes in what the members of the generation took for a step, and says who straggles.
    pub(super) fn observe(&mut self, votes: &[Vote], step_seconds: f64) {
        let world = votes.len();
        let arrival = |rank: usize| votes[rank].sections.data_wait + votes[rank].sections.compute;
        for (rank, (member, vote)) in self.members.iter().zip(votes).enumerate() {
            let Some(worker) = self.roster.get_mut(*member) else { continue };
            let computed = f64::from(vote.computed_slots);
            // Whoever is next and not there yet takes nothing; that is not this rank's fault.
            let late = (arrival((rank + 1) % world) - arrival(rank)).max(0.0);
            worker.history.push(Observation {
                data: vote.sections.data_wait,
                slot: (computed > 0.0).then(|| vote.sections.compute / computed),
                reduce: (vote.sections.send - late).max(0.0),
                commit: vote.sections.optimizer,
            });
        }
        if world > 1 {
            self.judge(step_seconds);
        }
    }

    fn judge(&mut self, step_seconds: f64) {
        let floor = NEGLIGIBLE.max(SHARE_OF_STEP * step_seconds);
        let factor = self.spec.cluster.straggler_factor;
        let members = self.members.clone();
        let typical = |core: &Self, section| -> Vec<Option<f64>> {
            let history = |member| Some(&core.roster.get(member)?.history);
            members.iter().map(|member| history(*member)?.typical(section)).collect()
        };
        let mut slow: Vec<Option<(Section, f64)>> = vec![None; members.len()];
        for section in Section::ALL {
            let all = typical(self, section);
            for (rank, (own, others)) in all.iter().zip(yardsticks(&all)).enumerate() {
                let (Some(own), Some(others)) = (*own, others) else { continue };
                let slots = match section {
                    Section::Compute => f64::from(self.counts.get(rank).copied().unwrap_or(1)),
                    _ => 1.0,
                };
                let times = own / others.max(f64::MIN_POSITIVE);
                let before = self.history(members[rank]).and_then(History::straggles_in);
                // Who straggles already has to come half-way back.
                let bound =
                    if before == Some(section) { 1.0 + (factor - 1.0) / 2.0 } else { factor };
                let costs = (own - others) * slots;
                if times > bound && costs > floor && slow[rank].is_none_or(|(_, most)| costs > most)
                {
                    slow[rank] = Some((section, costs));
                }
                if section == Section::Compute && times * self.spec.cluster.drain_below > 1.0 {
                    self.drain_straggler(members[rank], times);
                }
            }
        }
        for (member, slow) in members.iter().zip(slow) {
            self.note_straggler(*member, slow);
        }
    }

    fn history(&self, worker: WorkerId) -> Option<&History> {
        self.roster.get(worker).map(|worker| &worker.history)
    }

    /// Publishes that a member has begun or ceased to straggle.
    fn note_straggler(&mut self, worker: WorkerId, slow: Option<(Section, f64)>) {
        let Some(known) = self.roster.get_mut(worker) else { return };
        let section = slow.map(|(section, _)| section);
        let before = std::mem::replace(&mut known.history.straggles, section);
        let name = known.join.name.clone();
        match (before, slow) {
            (before, Some((section, seconds))) if before != Some(section) => {
                self.publish(RunEvent::Straggles { worker, name, section, seconds });
            }
            (Some(section), None) => {
                self.publish(RunEvent::CaughtUp { worker, name, section });
            }
            _ => {}
        }
    }

    /// Has a member leave that is slower than the spec allows, unless few are left.
    fn drain_straggler(&mut self, worker: WorkerId, times: f64) {
        let leaving =
            |member: &&WorkerId| self.history(**member).is_some_and(|known| known.drained);
        let staying = self.members.len() - self.members.iter().filter(leaving).count();
        let sure = |known: &History| known.latest.len() == WINDOW && !known.drained;
        if staying > 1 && self.history(worker).is_some_and(sure) {
            let reason = format!("it takes {times:.1} times as long for a slot as the others");
            self.on_drain(worker, reason);
        }
    }
}
