//! Letting workers into a run that is training.
//!
//! At a step boundary the members are told to offer their state and the guests to fetch it; the
//! steps go on. The next boundary after a guest has fetched forms a generation with it, and what it
//! lacks by then, a step or two, it gets from the members as the ring forms. A guest that
//! cannot fetch is let in at a checkpoint instead, which it can load.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use looptrain_proto::v1::{Fetch, Held, Offer, Withdraw};
use looptrain_proto::{Step, WorkerId};

use super::{Core, Directive, Phase};

/// Commits that members keep for guests that have not fetched yet; with a guest that is slower,
/// what they keep would grow without end.
const MAX_LAG: u64 = 64;

/// How long a run waits at a boundary for a checkpoint that would let a spare in.
const LONGEST_HOLD: Duration = Duration::from_secs(30);

/// Guests that fetch what the members offer.
#[derive(Debug)]
pub(super) struct Admission {
    /// The state that is offered.
    step: Step,
    /// Who offers it.
    sources: BTreeSet<WorkerId>,
    /// Whether they have fetched.
    guests: BTreeMap<WorkerId, bool>,
}

impl Core {
    /// Deals with the workers that wait for a place, at a step boundary; true when that is what
    /// happens next instead of a step.
    pub(super) fn let_spares_in(&mut self) -> bool {
        let spares = self.spares();
        if spares.is_empty() {
            return false;
        }
        let step = self.committed;
        if self.state_is_in_reach() {
            let names = self.roster.names(spares);
            self.reform(&format!("{names} can take part from step {step} on"));
            return true;
        }
        let fetched = self.guests_that_fetched();
        match &self.admission {
            Some(_) if !fetched.is_empty() => {
                let names = self.roster.names(fetched);
                self.reform(&format!("{names} fetched the state and can take part"));
                return true;
            }
            Some(admission) if step.0 - admission.step.0 > MAX_LAG => {
                let late = admission.guests.iter().filter(|(_, fetched)| !**fetched);
                let late: Vec<WorkerId> = late.map(|(guest, _)| *guest).collect();
                for guest in late {
                    let reason = format!("it has not fetched the state in {MAX_LAG} steps");
                    self.admit_by_checkpoint(guest, &reason);
                }
            }
            Some(_) => {}
            None => self.invite(&spares),
        }
        self.hold_for_a_checkpoint(&spares)
    }

    /// Has the spares fetch the members' state.
    fn invite(&mut self, spares: &[WorkerId]) {
        let guests: Vec<WorkerId> =
            spares.iter().copied().filter(|spare| !self.by_checkpoint.contains(spare)).collect();
        if guests.is_empty() {
            return;
        }
        let step = self.committed;
        let offer = Offer { generation: self.generation.0, step: step.0 };
        for member in self.members.clone() {
            self.send(member, Directive::Offer(offer));
        }
        let addresses = self.addresses();
        for guest in &guests {
            self.forget_held(*guest);
            let fetch = Fetch { step: step.0, sources: addresses.clone() };
            self.send(*guest, Directive::Fetch(fetch));
        }
        let sources = self.members.iter().copied().collect();
        let guests = guests.into_iter().map(|guest| (guest, false)).collect();
        self.admission = Some(Admission { step, sources, guests });
    }

    /// A checkpoint of this very step is being written, and somebody needs it: wait for it.
    fn hold_for_a_checkpoint(&mut self, spares: &[WorkerId]) -> bool {
        let saving = self.saving.as_ref().is_some_and(|saving| saving.step() == self.committed);
        let waiting = spares.iter().filter(|spare| self.by_checkpoint.contains(spare));
        let names = self.roster.names(waiting.copied());
        if !saving || names.is_empty() {
            self.held_up = None;
            return false;
        }
        let since = *self.held_up.get_or_insert(self.awake);
        if self.awake - since > LONGEST_HOLD {
            return false;
        }
        self.phase = Phase::Holding;
        self.explain(format!("waiting for the checkpoint that lets {names} take part"));
        true
    }

    pub(super) fn on_fetched(&mut self, worker: WorkerId, step: Step, result: Result<(), String>) {
        // An older answer may come after the members have been replaced, and the guest asked anew.
        let admission = self.admission.as_mut().filter(|admission| step >= admission.step);
        let Some(fetched) = admission.and_then(|admission| admission.guests.get_mut(&worker))
        else {
            return self.ignore(worker, format!("nobody waits for its fetch of step {step}"));
        };
        match result {
            Ok(()) => {
                *fetched = true;
                // Should all members be lost, this one still has what they had then.
                if let Some(worker) = self.roster.get_mut(worker) {
                    worker.join.held = Some(Held { step: step.0, ..Held::default() });
                }
            }
            Err(reason) => self.admit_by_checkpoint(worker, &reason),
        }
    }

    fn admit_by_checkpoint(&mut self, guest: WorkerId, reason: &str) {
        let name = self.roster.name(guest);
        self.explain(format!("{name} waits for a checkpoint to take part: {reason}"));
        self.by_checkpoint.insert(guest);
        self.uninvite(guest);
    }

    pub(super) fn is_guest(&self, worker: WorkerId) -> bool {
        self.admission.as_ref().is_some_and(|admission| admission.guests.contains_key(&worker))
    }

    /// Guests that hold a state from which they can catch up.
    pub(super) fn guests_that_fetched(&self) -> Vec<WorkerId> {
        let guests = self.admission.iter().flat_map(|admission| &admission.guests);
        guests.filter(|(_, fetched)| **fetched).map(|(guest, _)| *guest).collect()
    }

    /// A worker is gone that may have been a guest or a source.
    pub(super) fn leave_admission(&mut self, worker: WorkerId) {
        self.by_checkpoint.remove(&worker);
        self.uninvite(worker);
        if let Some(admission) = &mut self.admission {
            admission.sources.remove(&worker);
            if admission.sources.is_empty() {
                self.end_admission();
            }
        }
    }

    /// A guest has a place, or will not fetch any more.
    fn uninvite(&mut self, guest: WorkerId) {
        if let Some(admission) = &mut self.admission {
            admission.guests.remove(&guest);
            if admission.guests.is_empty() {
                self.end_admission();
            }
        }
    }

    /// Frees what the members offer.
    pub(super) fn end_admission(&mut self) {
        if self.admission.take().is_some() {
            let mut members = self.members.clone();
            members.retain(|member| self.roster.get(*member).is_some());
            for member in members {
                self.send(member, Directive::Withdraw(Withdraw {}));
            }
        }
    }

    /// A generation has formed: its members are guests no more.
    pub(super) fn end_admission_of_members(&mut self) {
        for member in self.members.clone() {
            self.by_checkpoint.remove(&member);
            self.uninvite(member);
        }
    }
}
