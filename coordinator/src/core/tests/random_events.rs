//! Random joins, deaths, delays, stale messages and store errors against workers that check every
//! directive they get. Afterwards all faults stop, and the run must come to its end.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const SLOTS: u32 = 5;
const TOTAL: Step = Step(10);

#[derive(Clone, Debug)]
enum Op {
    Join,
    Kill(usize),
    Leave(usize),
    Leaving(usize),
    Drain(usize),
    Pause,
    Resume,
    Answer(usize),
    SavePart(usize, bool),
    Store(bool),
    Peer(usize),
    StoreTrouble(usize),
    FetchTrouble(usize),
    Pass(u8),
    Crash,
    Stop,
}

fn op() -> impl Strategy<Value = Op> {
    let index = || 0usize..8;
    prop_oneof![
        3 => Just(Op::Join),
        2 => index().prop_map(Op::Kill),
        1 => index().prop_map(Op::Leave),
        1 => index().prop_map(Op::Leaving),
        1 => index().prop_map(Op::Drain),
        1 => prop::bool::weighted(0.3).prop_map(|hold| if hold { Op::Pause } else { Op::Resume }),
        60 => index().prop_map(Op::Answer),
        10 => (index(), prop::bool::weighted(0.85)).prop_map(|(at, ok)| Op::SavePart(at, ok)),
        6 => prop::bool::weighted(0.85).prop_map(Op::Store),
        1 => index().prop_map(Op::Peer),
        1 => index().prop_map(Op::StoreTrouble),
        1 => index().prop_map(Op::FetchTrouble),
        4 => (1u8..5).prop_map(Op::Pass),
        1 => Just(Op::Crash),
        // Rare, or most runs would end before anything else can happen.
        1 => prop::bool::weighted(0.1).prop_map(|stop| if stop { Op::Stop } else { Op::Join }),
    ]
}

/// A worker that believes nothing.
#[derive(Default)]
struct Fake {
    read: usize,
    generation: u64,
    /// The generation it is in the ring of.
    ready: u64,
    held: Option<u64>,
    prepared: Option<(u64, u64)>,
    /// The state it lets others fetch.
    offers: Option<u64>,
    /// The state it has come to, following the members from the one it fetched.
    fetched: Option<u64>,
    /// The reduced gradient it keeps, whatever generation it is of.
    kept: Option<u64>,
    answers: VecDeque<Report>,
    saves: VecDeque<v1::Save>,
    /// It was told to leave, and has said so.
    leaving: bool,
    /// It has been told that it may.
    released: bool,
}

struct World {
    rig: Rig,
    fakes: BTreeMap<WorkerId, Fake>,
    names: u64,
    published: usize,
    stored: usize,
    checkpoints: BTreeSet<u64>,
    committed: u64,
    /// Slots planned in (generation, step).
    planned: BTreeMap<(u64, u64), Vec<(u32, u32)>>,
}

impl World {
    fn new(workers: u32, spares: Option<u32>) -> Self {
        let most = spares.map_or(0, |spares| workers + spares);
        let given = [format!("cluster.workers={workers}"), format!("cluster.max_workers={most}")];
        Self {
            rig: Rig::new(&given.each_ref().map(String::as_str)),
            fakes: BTreeMap::new(),
            names: 0,
            published: 0,
            stored: 0,
            checkpoints: BTreeSet::from([0]),
            committed: 0,
            planned: BTreeMap::new(),
        }
    }

    fn pick(&self, index: usize) -> Option<WorkerId> {
        let ids: Vec<WorkerId> = self.fakes.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[index % ids.len()])
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Join if self.fakes.len() < 6 => {
                self.names += 1;
                let worker = self.rig.join(&format!("w{}", self.names));
                self.fakes.insert(worker, Fake::default());
            }
            Op::Join => {}
            Op::Kill(at) => {
                if let Some(worker) = self.pick(*at) {
                    self.fakes.remove(&worker);
                    self.rig.kill(worker);
                }
            }
            Op::Leave(at) => {
                if let Some(worker) = self.pick(*at) {
                    self.fakes.remove(&worker);
                    self.rig.say(worker, Report::Leave { reason: String::new() });
                }
            }
            Op::Leaving(at) => {
                if let Some(worker) = self.pick(*at) {
                    self.fakes.entry(worker).or_default().leaving = true;
                    self.rig.say(worker, Report::Leaving { reason: "SIGTERM".into() });
                }
            }
            Op::Drain(at) => {
                let name =
                    self.pick(*at).map(|worker| self.rig.core.roster.name(worker).to_owned());
                if let Some(Ok(worker)) = name.map(|name| self.rig.core.drainable(&name)) {
                    self.rig.feed(Event::DrainRequested { worker, reason: "a new disk".into() });
                }
            }
            Op::Pause => self.rig.feed(Event::PauseRequested { reason: "random".into() }),
            Op::Resume => self.rig.feed(Event::ResumeRequested),
            Op::Answer(at) => {
                if let Some(worker) = self.pick(*at) {
                    self.answer(worker);
                }
            }
            Op::SavePart(at, good) => {
                if let Some(worker) = self.pick(*at) {
                    self.save_part(worker, *good);
                }
            }
            Op::Store(good) => self.store(*good),
            Op::Peer(at) => {
                if let Some(worker) = self.pick(*at) {
                    self.rig.failed(worker, Cause::Peer, "reset");
                }
            }
            Op::StoreTrouble(at) => {
                // The last member's failure is the run's; not what is looked for here.
                if let Some(worker) = self.pick(*at)
                    && self.rig.members().len() > 1
                {
                    self.rig.failed(worker, Cause::Store, "cannot read");
                }
            }
            Op::FetchTrouble(at) => {
                let fake = self.pick(*at).and_then(|worker| self.fakes.get_mut(&worker));
                if let Some(Report::Fetched { result, .. }) =
                    fake.and_then(|fake| fake.answers.front_mut())
                {
                    *result = Err("no peer has it".into());
                }
            }
            Op::Pass(tenths) => self.rig.pass(f64::from(*tenths) * 0.3),
            Op::Crash => self.crash(),
            Op::Stop => self.rig.feed(Event::StopRequested { reason: "random".into() }),
        }
        self.check();
    }

    fn answer(&mut self, worker: WorkerId) {
        // Nobody waits for it any more.
        let goes = |fake: &Fake| {
            fake.released
                && fake.answers.is_empty()
                && fake.saves.is_empty()
                && fake.prepared.is_none()
        };
        if self.fakes.get(&worker).is_some_and(goes) {
            self.fakes.remove(&worker);
            return self.rig.say(worker, Report::Leave { reason: "told to".into() });
        }
        let answer = self.fakes.get_mut(&worker).and_then(|fake| fake.answers.pop_front());
        if let Some(answer) = answer {
            // What a worker has said of its generation is what it may be held to.
            if let Some(fake) = self.fakes.get_mut(&worker) {
                match &answer {
                    Report::Ready { generation, step, .. } => {
                        fake.ready = generation.0;
                        if fake.generation == generation.0 {
                            fake.held = Some(step.0);
                            fake.fetched = None;
                        }
                    }
                    Report::Prepared { generation, step, .. }
                        if generation.0 == fake.generation =>
                    {
                        fake.prepared = Some((generation.0, step.0));
                        fake.kept = Some(step.0);
                    }
                    Report::Fetched { step, result: Ok(()) } => {
                        (fake.held, fake.fetched) = (Some(step.0), Some(step.0));
                        fake.kept = None;
                    }
                    _ => {}
                }
            }
            self.rig.now += Duration::from_millis(10);
            self.rig.say(worker, answer);
        }
    }

    fn save_part(&mut self, worker: WorkerId, good: bool) {
        let save = self.fakes.get_mut(&worker).and_then(|fake| fake.saves.pop_front());
        let Some(save) = save else { return };
        let Report::PartSaved { step, part, parts, result } = Rig::part(save) else { return };
        let result = if good { result } else { Err("503".into()) };
        self.rig.say(worker, Report::PartSaved { step, part, parts, result });
    }

    /// The coordinator dies, and another one takes over; workers come back with what they hold.
    fn crash(&mut self) {
        let step = *self.checkpoints.iter().max().unwrap();
        let mark = Mark {
            step: Step(step),
            weights_digest: weights(Step(step)),
            record: None,
            trend: None,
        };
        let resume = Resume {
            incarnation: Incarnation(2),
            checkpoint: (step > 0).then_some(mark),
            numerics: Some("avx2".into()),
            ..Resume::default()
        };
        self.rig.core = Core::new(self.rig.core.spec.clone(), resume);
        self.rig.core.now = self.rig.now;
        self.rig.recount();
        self.rig.manifests.clear();
        self.stored = 0;
        self.committed = step;
        self.planned.clear();
        let world = self.fakes.len() as u32;
        for (_, mut fake) in std::mem::take(&mut self.fakes) {
            self.names += 1;
            let held = fake.held.map(|step| v1::Held {
                generation: fake.generation,
                world,
                step,
                prepared: fake.kept,
                recent: Vec::new(),
                lineage: Vec::new(),
            });
            let name = format!("w{}", self.names);
            let worker = self.rig.join_as(v1::Join { held, ..introduction(&name) });
            fake.answers.clear();
            fake.saves.clear();
            // Generations of another incarnation count anew.
            (fake.read, fake.prepared, fake.generation, fake.ready) = (0, None, 0, 0);
            // Another process under the name; what it was told went with its session.
            (fake.leaving, fake.released) = (false, false);
            self.fakes.insert(worker, fake);
        }
    }

    fn store(&mut self, good: bool) {
        let Some(draft) = self.rig.manifests.get(self.stored) else { return };
        let step = draft.step;
        self.stored += 1;
        if good {
            self.checkpoints.insert(step.0);
            self.rig.feed(Event::CheckpointWritten { step });
        } else {
            self.rig.feed(Event::CheckpointRefused { step, reason: "503".into() });
        }
    }

    /// Lets everybody read what was sent, and checks what was published.
    fn check(&mut self) {
        self.fakes.retain(|worker, _| !self.rig.closed.contains(worker));
        let offers: BTreeSet<u64> = self.fakes.values().filter_map(|fake| fake.offers).collect();
        for (worker, fake) in &mut self.fakes {
            let sent = self.rig.sent.get(worker).map_or(&[][..], Vec::as_slice);
            for message in &sent[fake.read..] {
                fake.obey(message, &self.checkpoints, &offers, &mut self.planned);
            }
            fake.read = sent.len();
        }
        self.follow();
        for event in &self.rig.published[self.published..] {
            match event {
                RunEvent::Committed(record) => {
                    assert_eq!(record.step.0, self.committed + 1, "steps commit in order, once");
                    self.committed = record.step.0;
                }
                RunEvent::Rewound { to, .. } => assert!(to.0 < self.committed),
                _ => {}
            }
        }
        self.published = self.rig.published.len();
        for (from, _) in std::mem::take(&mut self.rig.went_on) {
            let newest = self.checkpoints.iter().max().copied().unwrap_or_default();
            assert!(from >= newest, "further back than needed");
            let known = |fake: &Fake| fake.held == Some(from) || fake.kept == Some(from);
            let known = from == newest || self.fakes.values().any(known);
            assert!(known, "on from {from}, which nobody has");
            self.committed = from;
            self.planned.retain(|(_, step), _| *step <= from);
        }
        if self.rig.result.is_none() {
            assert_eq!(self.rig.core.committed.0, self.committed);
        }
    }

    /// Followers keep up with the members that offer, and say so when none is left.
    fn follow(&mut self) {
        let offering = |fake: &&Fake| fake.offers.is_some() && fake.fetched.is_none();
        let newest = self.fakes.values().filter(offering).filter_map(|fake| fake.held).max();
        let mut lost = Vec::new();
        for (worker, fake) in &mut self.fakes {
            match (fake.fetched, newest) {
                (Some(at), Some(newest)) => {
                    (fake.held, fake.fetched) = (Some(at.max(newest)), Some(at.max(newest)));
                }
                (Some(at), None) => lost.push((*worker, at)),
                _ => {}
            }
        }
        for (worker, at) in lost {
            if let Some(fake) = self.fakes.get_mut(&worker) {
                fake.fetched = None;
            }
            let result = Err("no peer has the update".to_owned());
            self.rig.say(worker, Report::Fetched { step: Step(at), result });
        }
    }

    /// Slots of a step whose generation was planned in full are covered once.
    fn check_plans(&self) {
        for ((generation, step), shares) in &self.planned {
            let mut shares = shares.clone();
            shares.sort_unstable();
            let mut next = 0;
            for (begin, end) in shares {
                assert!(begin >= next, "generation {generation} plans a slot of {step} twice");
                next = end;
            }
            assert!(next <= SLOTS);
        }
    }

    /// No more faults: whoever is leaving comes to go, also in a pause, and the run must come to its end.
    fn bring_to_its_end(&mut self, workers: u32) {
        self.apply(&Op::Pause);
        for _ in 0..300 {
            self.work();
        }
        let stays: Vec<_> = self.fakes.iter().filter(|(_, fake)| fake.leaving).collect();
        let over = self.rig.result.is_some();
        assert!(
            over || stays.is_empty(),
            "{} wait to leave: {}",
            stays.len(),
            self.rig.core.reason
        );
        self.apply(&Op::Resume);
        for _ in 0..5000 {
            if self.rig.result.is_some() {
                break;
            }
            if self.rig.core.roster.len() < workers as usize {
                self.apply(&Op::Join);
            }
            self.work();
        }
        let result = self.rig.result.as_ref().expect("the run ends once faults stop");
        let outcome = result.as_ref().expect("and it ends well");
        assert!(outcome.step == TOTAL || outcome.stopped);
        assert!(self.checkpoints.contains(&outcome.step.0));
    }
}

impl World {
    /// Everybody does what is to be done, and some time passes.
    fn work(&mut self) {
        for worker in self.fakes.keys().copied().collect::<Vec<_>>() {
            self.answer(worker);
            self.check();
            self.save_part(worker, true);
            self.check();
        }
        self.store(true);
        self.rig.pass(0.1);
        self.check();
    }
}

impl Fake {
    fn obey(
        &mut self,
        message: &Directive,
        checkpoints: &BTreeSet<u64>,
        offers: &BTreeSet<u64>,
        planned: &mut BTreeMap<(u64, u64), Vec<(u32, u32)>>,
    ) {
        match message {
            Directive::Welcome(_) | Directive::Finish(_) | Directive::Refused(_) => {}
            Directive::Rejected(_) | Directive::Communicator(_) => {}
            Directive::Drain(_) => self.released = true,
            Directive::Form(form) => {
                assert!(form.generation > self.generation, "generations only grow");
                self.generation = form.generation;
                self.prepared = None;
                // It is told again if it may leave.
                self.released = false;
                if self.kept == Some(form.step) {
                    self.held = self.kept.take();
                }
                if self.held != Some(form.step) {
                    let there = checkpoints.contains(&form.step);
                    // From a fetched state there is a way, as long as a member keeps the updates.
                    let follows = |fetched: u64| {
                        fetched <= form.step && offers.iter().any(|offered| *offered <= fetched)
                    };
                    let there = there || self.fetched.is_some_and(follows);
                    if let Some(at) = self.fetched.take_if(|_| !there) {
                        let result = Err("no peer has the update".to_owned());
                        return self.answers.push_back(Report::Fetched { step: Step(at), result });
                    }
                    assert!(there, "the state of step {} is nowhere", form.step);
                }
                let step = Step(form.step);
                let (generation, weights_digest) = (Generation(form.generation), weights(step));
                self.answers.push_back(Report::Ready { generation, step, weights_digest });
            }
            Directive::Plan(plan) => {
                assert_eq!(plan.generation, self.generation);
                assert_eq!(self.held, Some(plan.step - 1), "plans build on what is held");
                assert_eq!(plan.generation, self.ready, "only who is ready is given work");
                let shares = planned.entry((plan.generation, plan.step)).or_default();
                shares.push((plan.slot_begin, plan.slot_end));
                self.answers.push_back(Report::Prepared {
                    generation: Generation(plan.generation),
                    step: Step(plan.step),
                    digest: gradient(Step(plan.step)),
                    statistics: Box::default(),
                    sections: v1::Sections::default(),
                    computed_slots: plan.slot_end - plan.slot_begin,
                    detail: String::new(),
                });
            }
            Directive::Commit(commit) => {
                let what = (commit.generation, commit.step);
                assert_eq!(self.prepared.take(), Some(what), "only what is prepared is committed");
                let covered: u32 = planned[&what].iter().map(|(begin, end)| end - begin).sum();
                assert_eq!(covered, SLOTS, "a committed step has all its slots, once");
                self.held = Some(commit.step);
                self.kept = None;
            }
            Directive::Evaluate(share) => {
                assert_eq!((share.generation, Some(share.step)), (self.generation, self.held));
                self.answers.push_back(Report::Evaluated {
                    generation: Generation(share.generation),
                    step: Step(share.step),
                    sums: vec![1; 6],
                    tokens: (share.end - share.begin) * 16,
                });
            }
            Directive::Offer(offer) => {
                assert_eq!((offer.generation, Some(offer.step)), (self.generation, self.held));
                self.offers = Some(offer.step);
            }
            Directive::Withdraw(withdraw) if withdraw.keep_updates => {}
            Directive::Withdraw(_) => self.offers = None,
            Directive::Fetch(fetch) => {
                assert!(!fetch.sources.is_empty());
                self.fetched = None;
                self.answers.push_back(Report::Fetched { step: Step(fetch.step), result: Ok(()) });
            }
            Directive::Save(save) => {
                assert_eq!((save.generation, Some(save.step)), (self.generation, self.held));
                self.saves.push_back(*save);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_no_step_is_lost_or_done_twice_and_the_run_ends(
        workers in 1u32..4,
        spares in prop::option::of(0u32..2),
        ops in prop::collection::vec(op(), 0..400),
    ) {
        let mut world = World::new(workers, spares);
        for op in &ops {
            if world.rig.result.is_some() {
                break;
            }
            world.apply(op);
            world.check_plans();
        }
        world.bring_to_its_end(workers);
    }
}
