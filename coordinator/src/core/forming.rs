//! Generations: who forms one, when all its members hold the same state, and what happens when
//! they cannot.

use std::collections::BTreeMap;
use std::time::Duration;

use looptrain_proto::v1::failed::Cause;
use looptrain_proto::v1::{Form, Member};
use looptrain_proto::{Digest, Generation, Step, WorkerId};

use super::agreement::{self, Verdict};
use super::{Core, Directive, Phase, plural};
use crate::records::RunEvent;

/// How long a broken ring waits for the broken session that explains it.
const CULPRIT_PATIENCE: Duration = Duration::from_secs(1);

/// Rings that may break one after the other, with nobody lost and nothing committed, before the
/// run gives up: a network that lets nobody through does not heal by trying.
const MAX_FRUITLESS: u32 = 10;

/// A generation whose members are getting ready.
#[derive(Debug)]
pub(super) struct Forming {
    why: String,
    ready: BTreeMap<WorkerId, Digest>,
}

impl Forming {
    pub(super) fn ready(&self) -> usize {
        self.ready.len()
    }
}

/// Members could not reach a neighbour, and nobody has been lost yet.
#[derive(Debug)]
pub(super) struct Trouble {
    since: Duration,
    detail: String,
}

impl Core {
    /// Waiting: forms a generation as soon as enough workers are here.
    pub(super) fn settle(&mut self) {
        if let Some(saving) = &self.saving {
            // All parts are in and the manifest is on its way: it decides how far back to go.
            let step = saving.step();
            return self.explain(format!("waiting for the checkpoint of step {step}"));
        }
        self.fall_back();
        if self.stop.is_some() {
            return self.finish();
        }
        let (wanted, here) = (self.spec.cluster.workers as usize, self.roster.len());
        if here < wanted {
            return self.explain_waiting();
        }
        let from = match self.committed.0 {
            0 => "from the initial weights".into(),
            step => format!("from the checkpoint of step {step}"),
        };
        let why = format!("{here} worker{} joined; starting {from}", plural(here));
        self.form(self.roster.ids(), why);
    }

    /// Nobody holds the committed state: the newest checkpoint, or the initial state, is what is
    /// left of the run.
    fn fall_back(&mut self) {
        let mark = self.checkpoint.clone();
        let to = mark.as_ref().map_or(Step(0), |mark| mark.step);
        if to == self.committed {
            return;
        }
        let reason =
            format!("no worker is left that holds step {}; it is done again", self.committed);
        self.committed = to;
        self.weights = mark.as_ref().map(|mark| (mark.step, mark.weights_digest));
        self.last = mark.and_then(|mark| mark.record);
        self.evaluation.take_if(|evaluation| evaluation.step > to);
        self.publish(RunEvent::Rewound { to, reason });
    }

    /// A member is gone or the ring is broken: survivors go on from the committed step, which
    /// they hold.
    pub(super) fn reform(&mut self, reason: &str) {
        let mut next: Vec<WorkerId> = self.members.clone();
        next.retain(|member| self.roster.get(*member).is_some());
        self.trouble = None;
        if next.is_empty() {
            self.members.clear();
            self.phase = Phase::Waiting;
            return self.settle();
        }
        let spares = self.spares();
        if !spares.is_empty() && self.state_is_in_reach() {
            next.extend(spares);
        }
        self.form(next, reason.to_owned());
    }

    /// Workers without a place in the generation.
    pub(super) fn spares(&self) -> Vec<WorkerId> {
        let mut spares = self.roster.ids();
        spares.retain(|worker| !self.members.contains(worker));
        spares
    }

    /// Whether a worker that holds nothing can get the committed state.
    pub(super) fn state_is_in_reach(&self) -> bool {
        self.committed.0 == 0
            || self.checkpoint.as_ref().is_some_and(|mark| mark.step == self.committed)
    }

    fn form(&mut self, members: Vec<WorkerId>, why: String) {
        self.generation = self.generation.next();
        self.members = members;
        self.trouble = None;
        let ring: Vec<Member> = (self.members.iter())
            .filter_map(|id| {
                let join = &self.roster.get(*id)?.join;
                Some(Member {
                    worker_id: id.0,
                    name: join.name.clone(),
                    peer_address: join.peer_address.clone(),
                })
            })
            .collect();
        for (rank, worker) in self.members.clone().into_iter().enumerate() {
            let form = Form {
                generation: self.generation.0,
                members: ring.clone(),
                rank: rank as u32,
                step: self.committed.0,
                from_checkpoint: self.committed.0 > 0,
            };
            self.send(worker, Directive::Form(form));
        }
        self.explain(format!("forming generation {}: {why}", self.generation));
        self.phase = Phase::Forming(Forming { why, ready: BTreeMap::new() });
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
        if forming.ready.len() == self.members.len() {
            let digests: Vec<Digest> = forming.ready_in(&self.members);
            self.on_all_ready(&digests);
        }
    }

    fn on_all_ready(&mut self, digests: &[Digest]) {
        let step = self.committed;
        let trusted = self.known_weights(step);
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
                let reason =
                    format!("its weights of step {step} are not {trusted}, as the others'");
                self.expel_ranks(&ranks, &reason);
            }
            Verdict::Split => self.fail_split(&format!("weights of step {step}"), digests),
        }
    }

    fn on_formed(&mut self) {
        let Phase::Forming(forming) = std::mem::replace(&mut self.phase, Phase::Holding) else {
            return;
        };
        if !self.numerics_pinned {
            self.numerics_pinned = true;
            let numerics = self.numerics.clone().unwrap_or_default();
            self.out.push(super::Action::PinNumerics { numerics });
        }
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
        if workers.len() == self.members.len() {
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
            Cause::Store | Cause::Internal | Cause::Unspecified if self.members.len() == 1 => {
                self.fail(format!("{name}, the only worker: {detail}"));
            }
            Cause::Store | Cause::Internal | Cause::Unspecified => {
                self.expel_and_reform(&[worker], detail);
            }
        }
    }

    /// A broken ring whose culprit did not show up is formed again by all.
    pub(super) fn on_tick_in_trouble(&mut self) {
        let due = |trouble: &mut Trouble| self.now >= trouble.since + CULPRIT_PATIENCE;
        let Some(Trouble { detail, .. }) = self.trouble.take_if(due) else {
            return;
        };
        self.fruitless += 1;
        if self.fruitless > MAX_FRUITLESS {
            return self.fail(format!(
                "the ring broke {MAX_FRUITLESS} times in a row with all workers alive ({detail}); \
                 check that workers can reach each other's peer addresses"
            ));
        }
        self.reform(&detail);
    }
}

impl Forming {
    /// Digests in rank order, of those that are ready.
    fn ready_in(&self, members: &[WorkerId]) -> Vec<Digest> {
        members.iter().filter_map(|member| self.ready.get(member).copied()).collect()
    }
}
