//! Who is here: joins and refusals, farewells, broken sessions, silence.

use std::collections::BTreeMap;
use std::time::Duration;

use looptrain_proto::spec::Collective;
use looptrain_proto::v1::{self, Finish, Refused, Welcome};
use looptrain_proto::{Generation, PROTOCOL_VERSION, WorkerId};

use super::goodput::Account;
use super::speed::History;
use super::{Action, Core, Directive, Loss, Phase};
use crate::records::{LossCause, RunEvent, SectionSeconds};

/// A worker with a session.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) join: v1::Join,
    pub(crate) heard: Duration,
    /// Since when an answer is waited for, in the core's waking time.
    pub(super) asked: Option<Duration>,
    /// Sections of its last vote.
    pub(crate) sections: SectionSeconds,
    /// How fast it is.
    pub(crate) history: History,
    /// It follows the members' updates: it holds at least what it is known to hold.
    pub(super) follows: bool,
    /// Why it is about to leave.
    pub(super) leaving: Option<String>,
    /// It has been told that it may.
    pub(super) released: bool,
    /// What became of its time.
    pub(super) account: Account,
}

/// All workers with a session: members and those who wait for a place. Ids grow with the order
/// of joining.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    workers: BTreeMap<WorkerId, Worker>,
}

impl Roster {
    /// Notes that a worker is alive; false when it is unknown.
    pub(super) fn hear(&mut self, worker: WorkerId, now: Duration) -> bool {
        let known = self.workers.get_mut(&worker);
        known.map(|worker| worker.heard = now).is_some()
    }

    pub(super) fn hear_all(&mut self, now: Duration) {
        self.workers.values_mut().for_each(|worker| worker.heard = now);
    }

    /// Notes that a worker does what it is asked to do.
    pub(super) fn answered(&mut self, worker: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&worker) {
            worker.asked = None;
        }
    }

    /// Gives everybody the whole time for the next answer.
    pub(super) fn restart_patience(&mut self) {
        self.workers.values_mut().for_each(|worker| worker.asked = None);
    }

    /// How long the answer of a worker has been waited for at `awake`; the wait begins when this is
    /// first asked.
    pub(super) fn wait(&mut self, worker: WorkerId, awake: Duration) -> Duration {
        let begin = |worker: &mut Worker| *worker.asked.get_or_insert(awake);
        awake - self.workers.get_mut(&worker).map_or(awake, begin)
    }

    pub(super) fn get(&self, worker: WorkerId) -> Option<&Worker> {
        self.workers.get(&worker)
    }

    pub(super) fn get_mut(&mut self, worker: WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(&worker)
    }

    pub(super) fn ids(&self) -> Vec<WorkerId> {
        self.workers.keys().copied().collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (WorkerId, &Worker)> {
        self.workers.iter().map(|(id, worker)| (*id, worker))
    }

    /// Workers that follow the members.
    pub(super) fn followers(&self) -> Vec<WorkerId> {
        self.iter().filter(|(_, worker)| worker.follows).map(|(id, _)| id).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }

    /// A worker's name, for people.
    pub(super) fn name(&self, worker: WorkerId) -> &str {
        self.workers.get(&worker).map_or("?", |worker| &worker.join.name)
    }

    pub(super) fn names(&self, workers: impl IntoIterator<Item = WorkerId>) -> String {
        let names: Vec<&str> = workers.into_iter().map(|worker| self.name(worker)).collect();
        names.join(", ")
    }
}

impl Core {
    pub(super) fn on_joined(&mut self, worker: WorkerId, join: v1::Join) {
        if let Err(reason) = self.admissible(&join) {
            let for_now = self.roster.iter().any(|(_, there)| there.join.name == join.name);
            self.send(worker, Directive::Refused(Refused { reason: reason.clone(), for_now }));
            self.out.push(Action::Close { worker });
            return self.publish(RunEvent::WorkerRefused { name: join.name, reason });
        }
        self.numerics.get_or_insert_with(|| join.numerics.clone());
        if let (Some(held), Phase::Waiting) = (&join.held, &self.phase) {
            // The log of a coordinator that died may lack its last generation.
            self.generation = self.generation.max(Generation(held.generation));
        }
        let welcome = Welcome {
            worker_id: worker.0,
            incarnation: self.incarnation.0,
            spec: self.spec_toml.clone(),
            lineage: self.lineage.clone(),
            trajectory: self.spec.trajectory_digest().to_vec(),
        };
        self.send(worker, Directive::Welcome(welcome));
        let spare = !matches!(self.phase, Phase::Waiting);
        let (name, host) = (join.name.clone(), join.host.clone());
        let heard = self.now;
        let sections = SectionSeconds::default();
        let history = History::default();
        let returned = join.held.is_some();
        if returned {
            self.book_return(&join.name);
        }
        // Who begins anew does not come back.
        self.gone.remove(&join.name);
        self.silent.remove(&join.name);
        // What is in the log is known.
        let mut join = join;
        if let Some(held) = &mut join.held {
            self.note_trends_of(&held.recent);
            let known = self.logged.0.min(held.step);
            held.recent.retain(|vote| vote.step >= known);
        }
        let account = Account::of_joiner(self.now, returned);
        let asked = None;
        let joiner = Worker {
            join,
            heard,
            asked,
            sections,
            history,
            follows: false,
            leaving: None,
            released: false,
            account,
        };
        self.roster.workers.insert(worker, joiner);
        self.publish(RunEvent::WorkerJoined { worker, name, host, spare });
        match self.phase {
            Phase::Waiting => self.settle(),
            // Nothing else may happen in a pause from which it could get the state.
            Phase::Holding => self.proceed(),
            _ => {}
        }
    }

    /// Whether a worker would be let in.
    #[cfg(test)]
    pub(super) fn admits(&self, join: &v1::Join) -> bool {
        self.admissible(join).is_ok()
    }

    fn admissible(&self, join: &v1::Join) -> Result<(), String> {
        let name = &join.name;
        if self.ended() {
            return Err(format!("the run has ended: {}", self.reason));
        }
        if join.protocol_version != PROTOCOL_VERSION {
            return Err(format!(
                "worker {name} speaks protocol version {}, this coordinator {PROTOCOL_VERSION}; \
                 install the same release on both",
                join.protocol_version
            ));
        }
        if name.is_empty() || join.peer_address.is_empty() {
            return Err("a worker needs a name and a peer address".into());
        }
        self.held_is_ours(join)?;
        if let Some((_, there)) = self.roster.iter().find(|(_, there)| there.join.name == *name) {
            return Err(format!(
                "there is a worker {name} already (process {} on {}); choose another name, or \
                 wait until that one is gone",
                there.join.process_id, there.join.host
            ));
        }
        if !join.ailment.is_empty() {
            return Err(format!("worker {name} is not well: {}", join.ailment));
        }
        if self.spec.cluster.collective == Collective::Nccl && join.nccl_version == 0 {
            return Err(format!(
                "worker {name} cannot reduce over NCCL, as cluster.collective = \"nccl\" demands: its log \
                 tells why"
            ));
        }
        match &self.numerics {
            Some(pinned) if *pinned != join.numerics => Err(format!(
                "worker {name} computes with `{}`, this run with `{pinned}`, which gives other \
                 bits; start it on a machine of the same kind",
                join.numerics
            )),
            _ => Ok(()),
        }
    }

    /// Sessions are over: the others go on without all of these.
    pub(super) fn on_lost(&mut self, losses: &[Loss]) {
        let mut said = Vec::new();
        for Loss { worker, cause, reason } in losses {
            self.out.push(Action::Close { worker: *worker });
            if let Some(name) = self.remove(*worker, *cause, reason) {
                said.push(match cause {
                    LossCause::Left => format!("{name} left"),
                    _ => format!("{name} was lost ({reason})"),
                });
            }
        }
        if !said.is_empty() {
            self.after_loss(&said.join(", "));
        }
    }

    pub(super) fn on_tick(&mut self) {
        let timeout = Duration::from_secs_f64(self.spec.cluster.worker_timeout);
        // A coordinator that was frozen itself (a suspended machine, a debugger) has not heard
        // anybody and must not take that for their deaths. Half of the time-out is enough for that:
        // a worker that beats every quarter of it would be left with little time for the rest.
        let since = self.now.saturating_sub(self.ticked);
        if since > timeout / 2 {
            self.roster.hear_all(self.now);
        }
        if !self.is_held_up_by_the_store(since) {
            self.awake += since.min(timeout);
        }
        self.ticked = self.now;
        self.book_while_it_lasts();
        let silent: Vec<WorkerId> = (self.roster.iter())
            .filter(|(_, worker)| self.now.saturating_sub(worker.heard) > timeout)
            .map(|(id, _)| id)
            .collect();
        if !silent.is_empty() {
            let names = self.roster.names(silent.iter().copied());
            let reason = format!("silent for {:.1} s", timeout.as_secs_f64());
            for worker in silent {
                self.out.push(Action::Close { worker });
                self.remove(worker, LossCause::Silent, &reason);
            }
            return self.after_loss(&format!("{names} fell silent"));
        }
        self.on_tick_in_trouble();
        self.on_tick_in_patience();
        if !self.ended() {
            self.on_tick_in_saving();
        }
        match self.phase {
            Phase::Holding => self.proceed(),
            Phase::Waiting => self.settle(),
            _ => {}
        }
    }

    /// Sends a worker away for a fault of its own; the caller decides what the others do.
    pub(super) fn expel(&mut self, worker: WorkerId, reason: &str) {
        self.send(worker, Directive::Finish(Finish { reason: reason.to_owned(), expelled: true }));
        self.out.push(Action::Close { worker });
        self.remove(worker, LossCause::Expelled, reason);
    }

    /// Takes a worker off the roster and returns its name; `None` when it was not on it.
    fn remove(&mut self, worker: WorkerId, cause: LossCause, reason: &str) -> Option<String> {
        self.book_worker(worker);
        let name = self.roster.workers.remove(&worker)?.join.name;
        if matches!(cause, LossCause::Died | LossCause::Silent) {
            self.gone.insert(name.clone(), self.now);
        }
        if cause == LossCause::Silent {
            self.silent.insert(name.clone());
        }
        if self.ended() {
            return Some(name);
        }
        let reason = reason.to_owned();
        self.publish(RunEvent::WorkerLost { worker, name: name.clone(), cause, reason });
        self.away.forget(worker);
        self.save_lost_writer(worker);
        self.leave_admission(worker);
        if self.roster.len() == 0 && !self.numerics_pinned {
            self.numerics = None;
        }
        Some(name)
    }

    /// Goes on with whoever is left, when a member is among the gone.
    pub(super) fn after_loss(&mut self, reason: &str) {
        if self.ended() {
            return;
        }
        if self.members.iter().any(|member| self.roster.get(*member).is_none()) {
            self.reform(reason);
        } else if matches!(self.phase, Phase::Waiting) {
            self.settle();
        } else if matches!(self.phase, Phase::Holding) {
            self.proceed();
        }
    }
}
