//! Generations: who forms one, when all its members hold the same state, and what happens when
//! they cannot.

use std::collections::BTreeMap;
use std::time::Duration;

use looptrain_proto::spec::Collective;
use looptrain_proto::v1::failed::Cause;
use looptrain_proto::v1::{self, Communicator, Form, Member};
use looptrain_proto::{Digest, Generation, Members, Step, WorkerId};

use super::agreement::{self, Verdict};
use super::waiting::Wait;
use super::{Core, Directive, Phase};
use crate::records::RunEvent;

/// How long a broken ring waits for the broken session that explains it.
const CULPRIT_PATIENCE: Duration = Duration::from_secs(1);

/// Rings that may break one after the other, with nobody lost and nothing committed, before the
/// run gives up: a network that lets nobody through does not heal by trying.
const MAX_FRUITLESS: u32 = 10;

/// Such rings after which workers that were not in the last ring that stood are sent away.
const NEWCOMER_TRIES: u32 = 2;

/// Such generations over NCCL after which the same members form a ring of TCP connections, where the spec
/// leaves the choice.
const NCCL_TRIES: u32 = 2;

/// A generation whose members are getting ready.
#[derive(Debug)]
pub(super) struct Forming {
    why: String,
    collective: v1::Collective,
    ready: BTreeMap<WorkerId, Digest>,
}

impl Forming {
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }

    pub(super) fn awaits(&self, worker: WorkerId) -> bool {
        !self.ready.contains_key(&worker)
    }
}

/// Members could not reach a neighbour, and nobody has been lost yet.
#[derive(Debug)]
pub(super) struct Trouble {
    since: Duration,
    detail: String,
}

impl Core {
    /// A member is gone or the ring is broken: survivors go on from the committed step, as long as
    /// one of them holds it.
    pub(super) fn reform(&mut self, reason: &str) {
        let mut next: Vec<WorkerId> = self.members.clone();
        next.retain(|member| self.roster.get(*member).is_some());
        self.trouble = None;
        if !self.state_is_in_reach() {
            // Who was still catching up goes on with that as long as there are sources.
            next.retain(|member| self.holds_the_state(*member) || self.is_guest(*member));
            if !next.iter().any(|member| self.holds_the_state(*member)) {
                return self.form_with_followers(reason);
            }
        }
        if next.is_empty() {
            return self.wait_for_workers();
        }
        let mut newcomers = self.spares();
        if !self.state_is_in_reach() {
            let fetched = self.guests_that_fetched();
            newcomers.retain(|spare| fetched.contains(spare));
        }
        newcomers.truncate(self.room_beside(next.len()));
        next.extend(newcomers);
        let has_it = |worker: &&WorkerId| {
            self.held(**worker).is_some_and(|held| held.step == self.committed.0)
        };
        let more: Vec<WorkerId> = next.iter().filter(has_it).copied().collect();
        self.anchors.extend(more);
        self.form(next, reason.to_owned());
    }

    /// Nobody is left that is sure to hold the committed state; those that followed may have come to
    /// it, and say how far they came if not.
    fn form_with_followers(&mut self, reason: &str) {
        let mut followers = self.roster.followers();
        followers.truncate(self.room_beside(0));
        if followers.is_empty() {
            return self.wait_for_workers();
        }
        self.form(followers, reason.to_owned());
    }

    fn wait_for_workers(&mut self) {
        self.set_members(Vec::new());
        self.end_admission();
        self.search = super::search::Search::default();
        self.phase = Phase::Waiting;
        self.settle();
    }

    /// Whether a member has the committed state, or comes to have it without help.
    pub(super) fn holds_the_state(&self, member: WorkerId) -> bool {
        self.anchors.contains(&member)
    }

    /// Whether warm spares could go on if all members were gone.
    fn others_hold_the_state(&self) -> bool {
        self.roster.followers().iter().any(|follower| self.rank_of(*follower).is_none())
    }

    /// Workers without a place in the generation.
    pub(super) fn spares(&self) -> Vec<WorkerId> {
        let mut spares = self.roster.ids();
        spares.retain(|worker| self.rank_of(*worker).is_none());
        spares
    }

    /// Whether a worker that holds nothing can get the committed state.
    pub(super) fn state_is_in_reach(&self) -> bool {
        self.committed.0 == 0
            || self.checkpoint.as_ref().is_some_and(|mark| mark.step == self.committed)
    }

    pub(super) fn form(&mut self, members: Vec<WorkerId>, why: String) {
        let changed = members != self.members;
        if changed {
            self.fruitless = 0;
        }
        // A ring that breaks while it forms is formed again at once; a member that is stuck must be
        // found all the same.
        if changed || !matches!(self.phase, Phase::Forming(_)) {
            self.roster.restart_patience();
        }
        self.waiting = Wait::default();
        self.counts.clear();
        self.generation = self.generation.next();
        self.set_members(members);
        self.trouble = None;
        let (collective, because) = self.collective();
        let ring = Members::from(self.addresses());
        for (rank, worker) in self.members.clone().into_iter().enumerate() {
            let form = Form {
                generation: self.generation.0,
                members: ring.clone(),
                rank: rank as u32,
                step: self.committed.0,
                collective: collective.into(),
            };
            if !self.anchors.contains(&worker) {
                self.note_catching_up(worker);
            }
            // Who was let go while others stayed may be needed now that they are gone.
            if let Some(known) = self.roster.get_mut(worker) {
                known.released = false;
            }
            self.send(worker, Directive::Form(form));
        }
        let why = because.map_or(why.clone(), |because| format!("{why}; {because}"));
        self.explain(format!("forming generation {}: {why}", self.generation));
        self.phase = Phase::Forming(Forming { why, collective, ready: BTreeMap::new() });
        self.let_go();
    }

    /// What the members reduce with, and what is said of it: NCCL, or why it is not that where it could be.
    fn collective(&mut self) -> (v1::Collective, Option<String>) {
        // Where it hangs, no step comes to its end.
        if self.fruitless >= NCCL_TRIES || self.stalls > 0 {
            self.without_nccl = self.members.iter().copied().collect();
        } else if self.without_nccl.iter().any(|member| self.roster.get(*member).is_none()) {
            // Whoever is gone may have been the reason.
            self.without_nccl.clear();
        }
        let joins = self.members.iter().filter_map(|id| Some(&self.roster.get(*id)?.join));
        let joins: Vec<&v1::Join> = joins.collect();
        let versions: Vec<(&str, u32)> =
            joins.iter().map(|join| (join.name.as_str(), join.nccl_version)).collect();
        let asked = self.spec.cluster.collective;
        let Some((first, version)) = versions.first().copied().filter(|_| versions.len() > 1)
        else {
            return (v1::Collective::Tcp, None);
        };
        let odd = versions.iter().find(|(_, other)| *other != version);
        match (asked, odd) {
            (Collective::Tcp, _) => (v1::Collective::Tcp, None),
            (Collective::Auto, None) if version == 0 => (v1::Collective::Tcp, None),
            (Collective::Auto, None) if joins.iter().any(|join| join.encrypted) => {
                let because = "over TCP, since NCCL does not encrypt (cluster.collective = \"nccl\" takes \
                               it all the same)";
                (v1::Collective::Tcp, Some(because.to_owned()))
            }
            (Collective::Auto, None) if !self.without_nccl.is_empty() => {
                let because = "over TCP, since NCCL did not connect them".to_owned();
                (v1::Collective::Tcp, Some(because))
            }
            (Collective::Auto, Some((name, other))) => {
                let because = format!(
                    "over TCP, since {first} has NCCL {} and {name} {}",
                    nccl(version),
                    nccl(*other)
                );
                (v1::Collective::Tcp, Some(because))
            }
            // Different versions may fail to connect, which then says so.
            (Collective::Auto | Collective::Nccl, _) => {
                (v1::Collective::Nccl, Some("over NCCL".to_owned()))
            }
        }
    }

    /// Rank 0 tells how the others find it.
    pub(super) fn on_communicator(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        id: Vec<u8>,
    ) {
        let forms_one = |phase: &Phase| match phase {
            Phase::Forming(forming) => forming.collective == v1::Collective::Nccl,
            _ => false,
        };
        match self.current_rank(worker, generation) {
            Err(reason) => self.ignore(worker, reason),
            Ok(0) if forms_one(&self.phase) => {
                let message = Communicator { generation: generation.0, id };
                for other in self.members.clone().into_iter().skip(1) {
                    self.send(other, Directive::Communicator(message.clone()));
                }
            }
            Ok(_) => self.ignore(worker, "nobody waits for a communicator of it"),
        }
    }

    /// The members, in rank order, as workers reach them.
    pub(super) fn addresses(&self) -> Vec<Member> {
        let joins = self.members.iter().filter_map(|id| Some(&self.roster.get(*id)?.join));
        joins
            .map(|join| Member { name: join.name.clone(), peer_address: join.peer_address.clone() })
            .collect()
    }

    pub(super) fn on_ready(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        digest: Digest,
    ) {
        if let Err(reason) = self.current_rank(worker, generation) {
            return self.ignore(worker, reason);
        }
        let Phase::Forming(forming) = &mut self.phase else {
            return self.ignore(worker, "the generation is formed already");
        };
        if step != self.committed {
            let reason = format!("it holds step {step} where step {} is needed", self.committed);
            return self.expel_and_reform(&[worker], &reason);
        }
        forming.ready.insert(worker, digest);
        self.anchors.insert(worker);
        if forming.ready.len() == self.members.len() {
            let digests: Vec<Digest> = forming.ready_in(&self.members);
            self.on_all_ready(&digests);
        }
    }

    fn on_all_ready(&mut self, digests: &[Digest]) {
        let step = self.committed;
        let trusted = self.known_weights(step).or_else(|| self.weights_of_anchors(digests));
        match agreement::compare(digests, trusted) {
            Verdict::Unanimous(digest) if trusted.is_some_and(|trusted| trusted != digest) => {
                let expected = trusted.unwrap_or(digest);
                self.fail(format!(
                    "all workers hold weights {digest} for step {step}, which was {expected} \
                     before; check the machines' memory and the checkpoint's store"
                ));
            }
            Verdict::Unanimous(digest) => {
                self.weights = Some((step, digest));
                self.on_formed();
            }
            Verdict::Odd { ranks, trusted } => {
                self.divergences += 1;
                let reason =
                    format!("its weights of step {step} are not {trusted}, as the others'");
                self.expel_ranks(&ranks, &reason);
            }
            Verdict::Split => {
                self.divergences += 1;
                self.fail_split(&format!("weights of step {step}"), digests);
            }
        }
    }

    /// The weights on which those agree that did not get them from others; newcomers must match.
    fn weights_of_anchors(&self, digests: &[Digest]) -> Option<Digest> {
        let known = self.members.iter().zip(digests);
        let own = |member| self.anchors.contains(member) && !self.is_guest(*member);
        let mut known = known.filter(|(member, _)| own(member));
        let (_, first) = known.next()?;
        known.all(|(_, digest)| digest == first).then_some(*first)
    }

    fn on_formed(&mut self) {
        let Phase::Forming(forming) = std::mem::replace(&mut self.phase, Phase::Holding) else {
            return;
        };
        self.formed = true;
        self.anchors = self.members.iter().copied().collect();
        self.tail = Vec::new();
        self.bequest = None;
        self.search = super::search::Search::default();
        self.holders_awaited = None;
        self.silent.clear();
        if !self.numerics_pinned {
            self.numerics_pinned = true;
            let numerics = self.numerics.clone().unwrap_or_default();
            self.out.push(super::Action::PinNumerics { numerics });
        }
        for member in self.members.clone() {
            self.forget_held(member);
        }
        self.end_admission_of_members();
        self.let_go();
        let (generation, world, step) = (self.generation, self.world(), self.committed);
        self.publish(RunEvent::Formed { generation, world, step, reason: forming.why });
        self.proceed();
    }

    /// Names both sides when nobody can say who is right, and ends the run: going on would be a
    /// guess.
    pub(super) fn fail_split(&mut self, what: &str, digests: &[Digest]) {
        let holders: Vec<String> = (self.members.iter().zip(digests))
            .map(|(member, digest)| format!("{} holds {digest}", self.roster.name(*member)))
            .collect();
        self.fail(format!(
            "the workers disagree on the {what} and there is no majority: {}; one of them \
             computes wrongly, so test their memory and processors, or add a third worker",
            holders.join(", ")
        ));
    }

    /// Sends ranks of this generation away and goes on without them.
    pub(super) fn expel_ranks(&mut self, ranks: &[usize], reason: &str) {
        let odd: Vec<WorkerId> = ranks.iter().map(|rank| self.members[*rank]).collect();
        self.expel_and_reform(&odd, reason);
    }

    pub(super) fn expel_and_reform(&mut self, workers: &[WorkerId], reason: &str) {
        let names = self.roster.names(workers.iter().copied());
        if workers.len() == self.members.len() && !self.others_hold_the_state() {
            return self.fail(format!("{names}: {reason}; no other worker is left"));
        }
        for worker in workers {
            self.expel(*worker, reason);
        }
        self.after_loss(&format!("{names} was sent away: {reason}"));
    }

    pub(super) fn on_failed(
        &mut self,
        worker: WorkerId,
        generation: Generation,
        step: Step,
        cause: Cause,
        detail: &str,
    ) {
        if let Err(reason) = self.current_rank(worker, generation) {
            return self.ignore(worker, format!("{reason}; it reported: {detail}"));
        }
        let name = self.roster.name(worker).to_owned();
        match cause {
            Cause::NonFinite => self.fail(format!("step {step} on {name}: {detail}")),
            Cause::Peer => {
                let detail = format!("{name} cannot reach its neighbour: {detail}");
                self.explain(detail.clone());
                let since = self.now;
                self.trouble.get_or_insert(Trouble { since, detail });
            }
            Cause::Store | Cause::Internal | Cause::Unspecified
                if self.members.len() == 1 && !self.others_hold_the_state() =>
            {
                self.fail(format!("{name}, the only worker: {detail}"));
            }
            Cause::Store | Cause::Internal | Cause::Unspecified => {
                self.expel_and_reform(&[worker], detail);
            }
        }
    }

    /// Members that no ring has stood with, and that still do not answer.
    fn newcomers_that_are_not_ready(&self) -> Vec<WorkerId> {
        if !matches!(self.phase, Phase::Forming(_)) {
            return Vec::new();
        }
        let strange = |member: &WorkerId| !self.holds_the_state(*member);
        self.members.iter().copied().filter(strange).collect()
    }

    /// A broken ring whose culprit did not show up is formed again by all.
    pub(super) fn on_tick_in_trouble(&mut self) {
        let due = |trouble: &mut Trouble| self.now >= trouble.since + CULPRIT_PATIENCE;
        let Some(Trouble { detail, .. }) = self.trouble.take_if(due) else {
            return;
        };
        self.fruitless += 1;
        let newcomers = self.newcomers_that_are_not_ready();
        if self.fruitless > NEWCOMER_TRIES && !newcomers.is_empty() {
            let reason = format!(
                "no ring forms with it ({detail}); check that the others can reach its peer \
                 address, and it theirs"
            );
            return self.expel_and_reform(&newcomers, &reason);
        }
        if self.fruitless > MAX_FRUITLESS && !self.is_forming_with_a_mute() {
            return self.fail(format!(
                "the ring broke {MAX_FRUITLESS} times in a row with all workers alive ({detail}); \
                 check that workers can reach each other's peer addresses"
            ));
        }
        self.reform(&detail);
    }
}

/// A version of NCCL as people write it.
fn nccl(version: u32) -> String {
    match version {
        0 => "none".to_owned(),
        code => format!("{}.{}.{}", code / 10_000, code / 100 % 100, code % 100),
    }
}

impl Forming {
    /// Digests in rank order, of those that are ready.
    fn ready_in(&self, members: &[WorkerId]) -> Vec<Digest> {
        members.iter().filter_map(|member| self.ready.get(member).copied()).collect()
    }
}
