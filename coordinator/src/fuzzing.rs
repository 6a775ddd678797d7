//! What workers say and what earlier coordinators left, for fuzzing; see `looptrain_proto::fuzzing`.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use looptrain_proto::fuzzing::{MEMORY, Target};
use looptrain_proto::v1::worker_message::Kind as Said;
use looptrain_proto::v1::{self, Held};
use looptrain_proto::{Digest, Incarnation, Spec, Step, WorkerId};
use looptrain_storage::Store;
use prost::Message;

use crate::board::{Board, Chronicle};
use crate::core::{Action, Books, Core, Directive, Event, Loss, Mark, Resume};
use crate::history::{History, read_history};
use crate::journal::{chronicle_key, read_chronicle};
use crate::ledger::{Category, Ledger};
use crate::reports;

/// The targets of this crate.
pub const TARGETS: [Target; 3] = [
    Target { name: "session", run: session, samples: sessions, memory: MEMORY },
    Target { name: "chronicle", run: chronicle, samples: chronicles, memory: MEMORY },
    Target { name: "history", run: history, samples: histories, memory: MEMORY },
];

/// Four steps of five slots, a checkpoint every two, an evaluation every two.
const SPEC: &str = r#"
    [run]
    name = "r"
    store = "memory://"
    [model]
    hidden_size = 8
    num_hidden_layers = 1
    num_attention_heads = 2
    intermediate_size = 16
    vocab_size = 512
    [[datasets]]
    name = "text"
    [[stages]]
    name = "only"
    steps = 4
    sequence_length = 16
    slots = 5
    slot_sequences = 2
    loops = 2
    entropy_weight = 0.05
    learning_rate = { peak = 1e-3 }
    [checkpoint]
    every_steps = 2
    [evaluation]
    every_steps = 2
    sequences = 7
"#;

const LINEAGE: [u8; 32] = [7; 32];

fn spec() -> Spec {
    Spec::parse("r", SPEC, &[]).expect("it is a spec")
}

fn now_unix_ms() -> u64 {
    1_800_000_000_000
}

/// Waits for what a store in memory does.
fn wait<T>(work: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime of one thread");
    }
    RUNTIME.with(|runtime| runtime.block_on(work))
}

// ---- sessions ----------------------------------------------------------------------------------

/// Whom a frame with this number is from: an operator, a store, the time.
const OTHERS: u8 = 0xf0;

/// Frames, one after the other: who (a byte), the length (two, little-endian), what.
fn frames(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let ([who, low, high], rest) = bytes.split_first_chunk()?;
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        let (said, behind) = rest.split_at(length.min(rest.len()));
        bytes = behind;
        Some((*who, said))
    })
}

fn frame(who: u8, said: &[u8]) -> Vec<u8> {
    let length = u16::try_from(said.len()).expect("samples are short");
    [&[who][..], &length.to_le_bytes(), said].concat()
}

/// A core and what the runtime keeps beside it.
struct Run {
    core: Core,
    board: Board,
    now: Duration,
    /// Those with a session, by the worker that the frames mean.
    open: BTreeMap<u8, WorkerId>,
    ids: u64,
    /// What each has been told since it was last asked.
    told: VecDeque<(WorkerId, Directive)>,
    ended: Option<bool>,
}

impl Run {
    fn new(resume: Resume, history: History, chronicle: Chronicle) -> Self {
        Self {
            core: Core::new(spec(), resume),
            board: Board::new(history, chronicle),
            now: Duration::ZERO,
            open: BTreeMap::new(),
            ids: 0,
            told: VecDeque::new(),
            ended: None,
        }
    }

    /// A frame, as the server takes it.
    fn hear(&mut self, who: u8, said: &[u8]) {
        self.now += Duration::from_millis(50);
        let event = match who.checked_sub(OTHERS) {
            None => return self.hear_worker(who, said),
            Some(0) => {
                self.now += Duration::from_millis(said.len() as u64 * 100);
                Event::Tick
            }
            Some(1) => Event::StopRequested { reason: "stop".into() },
            Some(2) => Event::PauseRequested { reason: "pause".into() },
            Some(3) => Event::ResumeRequested,
            Some(4) => {
                let name = String::from_utf8_lossy(said).into_owned();
                let Ok(worker) = self.core.drainable(&name) else { return };
                Event::DrainRequested { worker, reason: "drain".into() }
            }
            Some(5) => Event::SaveRequested,
            Some(6) => Event::StoreSeen(Err("away".into())),
            Some(_) => {
                let Some(worker) = self.open.remove(&said.first().copied().unwrap_or(0)) else {
                    return;
                };
                Event::Lost(vec![Loss::broken(worker, "cable")])
            }
        };
        self.feed(event);
    }

    fn hear_worker(&mut self, who: u8, said: &[u8]) {
        let message = v1::WorkerMessage::decode(said);
        let Some(&worker) = self.open.get(&who) else {
            // A session begins with a Join.
            let Ok(v1::WorkerMessage { kind: Some(Said::Join(join)) }) = message else { return };
            self.ids += 1;
            let worker = WorkerId(self.ids);
            self.open.insert(who, worker);
            return self.feed(Event::Joined { worker, join });
        };
        let event = match message.map(reports::report) {
            Ok(Ok(report)) => Event::Report { worker, report },
            wrong => {
                self.open.remove(&who);
                Event::Lost(vec![Loss::broken(worker, format!("it sent {wrong:?}"))])
            }
        };
        self.feed(event);
    }

    fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.core.handle(self.now, event) {
                match action {
                    Action::Send { worker, message } => self.told.push_back((worker, message)),
                    Action::Close { worker } => self.open.retain(|_, it| *it != worker),
                    Action::Publish(event) => self.board.record(&event),
                    Action::GoOn { from, lost } => self.board.go_on(from, &lost),
                    Action::WriteManifest(draft) => {
                        let (step, count) = (draft.step, draft.parts.len());
                        events.push_back(match draft.parts.iter().all(|part| part.bytes > 0) {
                            true => Event::CheckpointWritten { step },
                            false => Event::CheckpointRefused { step, reason: format!("{count}") },
                        });
                    }
                    Action::FindCheckpoint { .. } => {
                        events.push_back(Event::CheckpointFound(Ok(None)))
                    }
                    Action::End(result) => self.ended = Some(result.is_ok()),
                    Action::PinNumerics { .. }
                    | Action::KeepPause(_)
                    | Action::LookAtStore
                    | Action::SealMetrics
                    | Action::Explain(_)
                    | Action::Ignored { .. } => {}
                }
            }
        }
    }

    /// Shows it as the page and `looptrain status` do.
    fn look(&self) {
        let snapshot = self.core.snapshot(self.now);
        serde_json::to_vec(&snapshot).expect("a snapshot has a JSON form");
        self.board.see(snapshot, self.core.ledger().clone());
        let recent = serde_json::to_vec(&self.board.recent());
        recent.expect("what is shown has a JSON form");
        let (steps, losses) = (self.board.steps(Step(1), 10), self.board.losses());
        assert!(steps.len() <= 10 && losses.len() <= 120);
        let kept = serde_json::to_value(self.board.chronicle()).expect("it has a JSON form");
        let _ = Chronicle::from_json(&kept, now_unix_ms());
    }
}

fn fresh() -> Run {
    let (incarnation, lineage) = (Incarnation(2), LINEAGE.to_vec());
    let books = Books { ledger: Ledger::new(now_unix_ms()), ..Books::default() };
    let resume =
        Resume { incarnation, lineage, workers_may_return: true, books, ..Resume::default() };
    Run::new(resume, History::default(), Chronicle::default())
}

/// All sessions of a run, from its first worker on; whether it ends as it should.
fn session(bytes: &[u8]) -> bool {
    let mut run = fresh();
    for (who, said) in frames(bytes).take(2000) {
        run.hear(who, said);
        run.look();
    }
    run.ended == Some(true)
}

fn introduction(name: &str, held: Option<Held>) -> v1::Join {
    v1::Join {
        protocol_version: looptrain_proto::PROTOCOL_VERSION,
        name: name.to_owned(),
        host: "here".into(),
        process_id: 1,
        threads: 1,
        peer_address: format!("{name}:1"),
        numerics: "avx2".into(),
        held,
        nccl_version: 0,
        ailment: String::new(),
        encrypted: false,
    }
}

fn vote(generation: u64, step: u64) -> v1::Prepared {
    let statistics = v1::StepStatistics {
        loss: 3.5,
        loss_per_loop: vec![4.0, 3.0],
        exit_pdf: vec![0.5, 0.5],
        tokens: 160,
        hidden_rms_per_loop: vec![1.0, 1.5],
        ..v1::StepStatistics::default()
    };
    let sections = Some(v1::Sections { compute: 0.5, reduce: 0.25, ..v1::Sections::default() });
    let digest = Digest::of(&step.to_le_bytes()).to_vec();
    let (statistics, detail) = (Some(statistics), String::new());
    v1::Prepared { generation, step, digest, statistics, sections, computed_slots: 2, detail }
}

/// What a worker answers to a directive.
fn answer(directive: &Directive) -> Option<Said> {
    let weights_digest = |step: u64| Digest::of(format!("weights {step}").as_bytes()).to_vec();
    Some(match directive {
        Directive::Form(v1::Form { generation, step, .. }) => {
            let weights_digest = weights_digest(*step);
            Said::Ready(v1::Ready { generation: *generation, step: *step, weights_digest })
        }
        Directive::Plan(plan) => Said::Prepared(vote(plan.generation, plan.step)),
        Directive::Evaluate(v1::Evaluate { generation, step, begin, end }) => {
            Said::Evaluated(v1::Evaluated {
                generation: *generation,
                step: *step,
                sums: vec![1 << 33; 6],
                tokens: 16 * (end - begin),
            })
        }
        Directive::Save(save) => Said::PartSaved(v1::PartSaved {
            step: save.step,
            part: save.part,
            parts: save.parts,
            file: format!("state-{:04}-of-{:04}.safetensors", save.part, save.parts),
            bytes: 100,
            digest: vec![1; 32],
            weights_digest: weights_digest(save.step),
            tensors: 3,
            stall_seconds: 0.1,
            ..v1::PartSaved::default()
        }),
        Directive::Fetch(fetch) => {
            Said::Fetched(v1::Fetched { step: fetch.step, error: String::new() })
        }
        Directive::Drain(_) => Said::Leave(v1::Leave { reason: "told to".into() }),
        _ => return None,
    })
}

fn said(kind: Said) -> Vec<u8> {
    v1::WorkerMessage { kind: Some(kind) }.encode_to_vec()
}

/// What workers answer to all that they have been told.
fn answers(run: &mut Run, queue: &mut VecDeque<(u8, Vec<u8>)>) {
    for (worker, directive) in std::mem::take(&mut run.told) {
        let who = run.open.iter().find(|(_, it)| **it == worker).map(|(who, _)| *who);
        queue.extend(who.zip(answer(&directive)).map(|(who, kind)| (who, said(kind))));
    }
}

/// What workers say to a run until it ends, beside what `more` says at its frames.
fn played(
    mut run: Run,
    joins: Vec<(u8, v1::Join)>,
    more: &[(usize, u8, Vec<u8>)],
) -> (Vec<u8>, bool) {
    let mut queue: VecDeque<(u8, Vec<u8>)> =
        joins.into_iter().map(|(who, join)| (who, said(Said::Join(join)))).collect();
    answers(&mut run, &mut queue);
    let mut bytes = Vec::new();
    for number in 0..500 {
        if let Some((_, who, said)) = more.iter().find(|(at, ..)| *at == number) {
            queue.push_front((*who, said.clone()));
        }
        let Some((who, said)) = queue.pop_front() else { break };
        bytes.extend(frame(who, &said));
        run.hear(who, &said);
        answers(&mut run, &mut queue);
    }
    (bytes, run.ended == Some(true))
}

fn sessions() -> Vec<Vec<u8>> {
    let plain = |names: &[&str]| -> Vec<(u8, v1::Join)> {
        (0..).zip(names).map(|(who, name)| (who, introduction(name, None))).collect()
    };
    let failed = v1::Failed { generation: 1, step: 2, cause: 1, detail: "no ring".into() };
    let late = said(Said::Join(introduction("c", None)));
    let more = [
        (4, OTHERS, vec![0; 5]),
        (6, 1, said(Said::Failed(failed))),
        (9, 2, late),
        (16, OTHERS + 2, Vec::new()),
        (17, OTHERS + 3, Vec::new()),
        (20, OTHERS + 4, b"b".to_vec()),
    ];
    let held = |step, prepared| {
        let (recent, lineage) = (vec![vote(3, step)], LINEAGE.to_vec());
        Some(Held { generation: 3, world: 2, step, prepared, recent, lineage })
    };
    let back =
        vec![(0, introduction("a", held(2, None))), (1, introduction("b", held(1, Some(2))))];
    [
        played(fresh(), plain(&["a", "b"]), &[]),
        played(fresh(), plain(&["a", "b"]), &more),
        played(fresh(), back, &[]),
    ]
    .map(|(bytes, ended)| {
        assert!(ended, "a sample is a run that ends");
        bytes
    })
    .into()
}

// ---- what is in the store ----------------------------------------------------------------------

fn of_store(objects: &[(&str, &[u8])]) -> Store {
    let store = Store::open("memory://").expect("a store in memory");
    for (key, bytes) in objects {
        wait(store.put(key, bytes.to_vec())).expect("a store in memory takes everything");
    }
    store
}

/// The chronicle of a run, with which a page and a ledger go on.
fn chronicle(bytes: &[u8]) -> bool {
    let store = of_store(&[(&chronicle_key("r"), bytes)]);
    let now = now_unix_ms();
    let read = wait(read_chronicle(&store, "r", now)).expect("what is damaged is begun anew");
    let _ = wait(crate::read_chronicle_json(&store, "r"));
    let known = !read.events.is_empty() && read.ledger.is_some();
    if let Some(ledger) = &read.ledger {
        let mut ledger = ledger.clone();
        for (begin, end) in [(0, 10), (100_000, 100_001), (10, 1 << 32), (1 << 32, 1 << 33)] {
            let [begin, end] = [begin, end].map(Duration::from_secs);
            ledger.book(Category::Waiting, begin, end);
        }
        serde_json::to_vec(&ledger.view()).expect("a ledger has a JSON form");
        assert!(ledger.total() >= 0.0);
    }
    let board = Board::new(History::default(), read);
    board.checkpoints_are(&[Step(2), Step(u64::MAX)], Some(Step(2)), [Step(u64::MAX)]);
    let _ = (board.checkpoint_age(), board.checkpoint_size(), board.events(3));
    serde_json::to_vec(&board.recent()).expect("what is shown has a JSON form");
    known
}

fn chronicles() -> Vec<Vec<u8>> {
    let mut run = fresh();
    for (who, said) in frames(&sessions()[1]) {
        run.hear(who, said);
    }
    run.look();
    vec![serde_json::to_vec(&run.board.chronicle()).expect("it has a JSON form")]
}

/// Stands between the parts of a history; it is in no line of JSON.
const BETWEEN: u8 = 0x1e;

/// The step log of a run, an evaluation, and what a worker left that had no coordinator: a run that
/// goes on with them.
fn history(bytes: &[u8]) -> bool {
    let mut parts = bytes.splitn(3, |&byte| byte == BETWEEN);
    let mut part = || parts.next().unwrap_or_default();
    let store = of_store(&[
        ("runs/r/metrics/steps-0000000001.jsonl", part()),
        ("runs/r/evaluations/step-0000000002.json", part()),
    ]);
    let bequest = Held::from_bytes(part()).ok();
    let history = wait(read_history(&store, "r", Step(2))).expect("bad lines are left out");
    let known = !history.steps.is_empty() && !history.evaluations.is_empty() && bequest.is_some();
    // As a start has it.
    let logged = history.steps.last().map(|record| record.step).unwrap_or_default();
    let mut books = Books { ledger: Ledger::new(now_unix_ms()), ..Books::default() };
    books.ledger.highest = logged;
    let mark = Mark {
        step: Step(2),
        weights_digest: Digest::of(b"weights 2"),
        record: history.steps.iter().rfind(|record| record.step == Step(2)).cloned(),
        trend: None,
    };
    let resume = Resume {
        incarnation: Incarnation(2),
        checkpoint: Some(mark),
        numerics: None,
        paused: None,
        generation: history.steps.last().map(|record| record.generation).unwrap_or_default(),
        evaluations: history.evaluations.clone(),
        tail: history.steps.iter().filter(|record| record.step > Step(2)).cloned().collect(),
        logged,
        bequest,
        lineage: LINEAGE.to_vec(),
        workers_may_return: true,
        books,
    };
    let mut run = Run::new(resume, history, Chronicle::default());
    run.look();
    // Workers that were there, or new ones.
    let lineage = LINEAGE.to_vec();
    let held = Held {
        generation: 3,
        world: 2,
        step: 2,
        recent: vec![vote(1, 2)],
        lineage,
        prepared: None,
    };
    let held = bytes.len().is_multiple_of(2).then_some(held);
    let joins = ["a", "b"].map(|name| introduction(name, held.clone()));
    for (who, join) in (0..).zip(joins) {
        run.hear(who, &said(Said::Join(join)));
    }
    // Long enough for others to come that might.
    let mut ticks = 0;
    while run.told.iter().all(|(_, it)| !matches!(it, Directive::Form(_))) && ticks < 100 {
        run.hear(OTHERS, &[0; 9]);
        for who in 0..2 {
            run.hear(who, &said(Said::Heartbeat(v1::Heartbeat {})));
        }
        ticks += 1;
    }
    let (_, ended) = played(run, Vec::new(), &[]);
    known && ended
}

fn histories() -> Vec<Vec<u8>> {
    let mut run = fresh();
    for (who, said) in frames(&sessions()[0]) {
        run.hear(who, said);
    }
    let steps = run.board.steps(Step(0), 4);
    let steps: Result<Vec<Vec<u8>>, _> = steps.iter().map(serde_json::to_vec).collect();
    let steps = steps.expect("records have a JSON form");
    let evaluations = run.board.recent().evaluations;
    let evaluation = evaluations.first().expect("there is one every two steps");
    let evaluation = serde_json::to_vec(evaluation).expect("records have a JSON form");
    let lineage = LINEAGE.to_vec();
    let held = Held {
        generation: 3,
        world: 2,
        step: 2,
        recent: vec![vote(1, 2)],
        lineage,
        prepared: None,
    };
    let all = |steps: &[Vec<u8>]| {
        [steps.join(&b'\n'), evaluation.clone(), held.to_bytes()].join(&BETWEEN)
    };
    vec![all(&steps[..2]), all(&steps)]
}
