//! Letting workers into a run that is training.
//!
//! At a step boundary the members are told to offer their state and the guests to fetch it; the
//! steps go on. The next boundary after a guest has fetched forms a generation with it, and what it
//! lacks by then, a step or two, it gets from the members as the ring forms. A guest that
//! cannot fetch is let in at a checkpoint instead, which it can load.
//!
//! When the generation is as large as it may be, a guest that has fetched stays one: it goes on
//! following the members' updates, a warm spare. The generation that forms when a member is lost
//! takes it in at once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use looptrain_proto::v1::{Fetch, Held, Offer, Withdraw};
use looptrain_proto::{Step, WorkerId};

use super::{Core, Directive, Phase};

/// Commits that members keep for guests that have not fetched yet; with a guest that is slower,
/// what they keep would grow without end.
const MAX_LAG: u64 = 64;

/// The least time that a guest has to fetch, however short the steps are. Members that have no room
/// for so many commits refuse the guest earlier.
const LEAST_TIME: Duration = Duration::from_secs(30);

/// How long a run waits at a boundary for a checkpoint that would let a spare in.
const LONGEST_HOLD: Duration = Duration::from_secs(30);

/// Guests that fetch what the members offer.
#[derive(Debug)]
pub(super) struct Admission {
    /// The newest state that is offered.
    step: Step,
    /// Who offers it.
    sources: BTreeSet<WorkerId>,
    guests: BTreeMap<WorkerId, Guest>,
    /// All guests are warm, and the members have been told so.
    updates_only: bool,
}

#[derive(Clone, Copy, Debug)]
struct Guest {
    /// The state it was told to fetch.
    asked: Step,
    /// When, in the core's waking time.
    since: Duration,
    /// It has fetched it, and follows the updates.
    warm: bool,
}

impl Core {
    /// How many more members a generation of `members` may have.
    pub(super) fn room_beside(&self, members: usize) -> usize {
        match self.spec.cluster.max_workers as usize {
            0 => usize::MAX,
            most => most.saturating_sub(members),
        }
    }

    /// Deals with the workers that wait for a place, at a step boundary; true when that is what
    /// happens next instead of a step.
    pub(super) fn let_spares_in(&mut self) -> bool {
        let spares = self.spares();
        if spares.is_empty() {
            return false;
        }
        let step = self.committed;
        let room = self.room_beside(self.members.len());
        if room > 0 && self.state_is_in_reach() {
            let names = self.roster.names(spares.into_iter().take(room));
            self.reform(&format!("{names} can take part from step {step} on"));
            return true;
        }
        let fetched = self.guests_that_fetched();
        if room > 0 && !fetched.is_empty() {
            let names = self.roster.names(fetched.into_iter().take(room));
            self.reform(&format!("{names} fetched the state and can take part"));
            return true;
        }
        self.let_spares_fetch();
        room > 0 && self.hold_for_a_checkpoint(&spares)
    }

    /// Has the workers that wait for a place get the state meanwhile, also while the run is paused.
    pub(super) fn let_spares_fetch(&mut self) {
        self.give_up_late_guests();
        self.invite(&self.spares());
        self.keep_updates_only();
    }

    fn guests_that_fetch(&self) -> Vec<WorkerId> {
        self.guests(|guest| !guest.warm)
    }

    fn guests(&self, such: impl Fn(&Guest) -> bool) -> Vec<WorkerId> {
        let guests = self.admission.iter().flat_map(|admission| &admission.guests);
        guests.filter(|(_, guest)| such(guest)).map(|(guest, _)| *guest).collect()
    }

    fn give_up_late_guests(&mut self) {
        let offered = self.admission.as_ref().map(|admission| admission.step);
        if offered.is_some_and(|offered| self.committed.0 - offered.0 > MAX_LAG) {
            let slow = |guest: &Guest| !guest.warm && self.awake - guest.since > LEAST_TIME;
            for guest in self.guests(slow) {
                let reason = format!("it has not fetched the state in {MAX_LAG} steps");
                self.admit_by_checkpoint(guest, &reason);
            }
        }
    }

    /// Has the spares fetch the members' state that do not do so yet. While some fetch an earlier
    /// state, later ones wait.
    fn invite(&mut self, spares: &[WorkerId]) {
        let uninvited =
            |spare: &WorkerId| !self.by_checkpoint.contains(spare) && !self.is_guest(*spare);
        let invited: Vec<WorkerId> = spares.iter().copied().filter(uninvited).collect();
        if invited.is_empty() || !self.guests_that_fetch().is_empty() {
            return;
        }
        let step = self.committed;
        let offer = Offer { generation: self.generation.0, step: step.0 };
        for member in self.members.clone() {
            self.send(member, Directive::Offer(offer));
        }
        let addresses = self.addresses();
        for guest in &invited {
            self.forget_held(*guest);
            let fetch = Fetch { step: step.0, sources: addresses.clone() };
            self.send(*guest, Directive::Fetch(fetch));
        }
        let sources: BTreeSet<WorkerId> = self.members.iter().copied().collect();
        let mut guests = self.admission.take().map(|open| open.guests).unwrap_or_default();
        let guest = Guest { asked: step, since: self.awake, warm: false };
        guests.extend(invited.into_iter().map(|id| (id, guest)));
        self.admission = Some(Admission { step, sources, guests, updates_only: false });
    }

    /// Once all guests are warm, nobody needs the state itself any more.
    fn keep_updates_only(&mut self) {
        let all_warm = self.guests_that_fetch().is_empty();
        let open = self.admission.as_mut().filter(|open| all_warm && !open.updates_only);
        let Some(open) = open else { return };
        open.updates_only = true;
        self.withdraw(true);
    }

    fn withdraw(&mut self, keep_updates: bool) {
        let mut members = self.members.clone();
        members.retain(|member| self.roster.get(*member).is_some());
        for member in members {
            self.send(member, Directive::Withdraw(Withdraw { keep_updates }));
        }
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
        let Some(known) = self.roster.get_mut(worker) else { return };
        if step > self.total {
            return self.ignore(worker, format!("the run has no step {step}"));
        }
        // An older answer may come after the members have been replaced, and the guest asked anew.
        let guest = self.admission.as_mut().and_then(|open| open.guests.get_mut(&worker));
        let guest = guest.filter(|guest| step >= guest.asked);
        let followed = std::mem::take(&mut known.follows);
        match (result, guest) {
            (Ok(()), Some(guest)) => {
                guest.warm = true;
                known.follows = true;
                // Should all members be lost, this one still has what they had then.
                known.join.held = Some(Held { step: step.0, ..Held::default() });
            }
            (Err(reason), Some(guest)) if !guest.warm => self.admit_by_checkpoint(worker, &reason),
            (Err(reason), _) if followed => {
                known.join.held = Some(Held { step: step.0, ..Held::default() });
                self.on_lost_its_way(worker, &reason);
            }
            _ => self.ignore(worker, format!("nobody waits for its fetch of step {step}")),
        }
    }

    /// A follower holds a state, and has no way from there to that of the members.
    fn on_lost_its_way(&mut self, worker: WorkerId, reason: &str) {
        self.uninvite(worker);
        let name = self.roster.name(worker);
        let what = format!("{name} cannot catch up: {reason}");
        if self.rank_of(worker).is_some() {
            let mut others = self.members.clone();
            others.retain(|member| *member != worker);
            self.set_members(others);
            return self.reform(&what);
        }
        self.explain(what);
        if matches!(self.phase, Phase::Waiting) {
            self.settle();
        }
    }

    /// A worker is to catch up with the committed step. What a follower is known to hold is the
    /// least that it holds from now on; of any other it is not known.
    pub(super) fn note_catching_up(&mut self, worker: WorkerId) {
        let follows = self.roster.get(worker).is_some_and(|known| known.follows);
        if !follows {
            self.forget_held(worker);
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
        self.guests(|guest| guest.warm)
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
            self.withdraw(false);
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
