//! A worker that keeps the protocol and computes nothing: its weights are a function of the step.

use std::sync::Arc;
use std::time::Duration;

use looptrain_coordinator::{Running, Settings, Started, start};
use looptrain_proto::transport::{self, Credentials};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{self, coordinator_message as down, worker_message as up};
use looptrain_proto::{Digest, PROTOCOL_VERSION, Spec, Step};
use looptrain_storage::{Checkpoints, Store, Tensor, weights_digest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// Nothing here takes nearly this long, however busy the machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) fn spec(run: &str, overrides: &[&str]) -> Spec {
    let text = r#"
        [run]
        name = "NAME"
        store = "memory://"
        [cluster]
        workers = 2
        worker_timeout = 4.0
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
        steps = 12
        sequence_length = 16
        slots = 5
        slot_sequences = 2
        loops = 2
        entropy_weight = 0.05
        learning_rate = { peak = 1e-3 }
        [checkpoint]
        every_steps = 5
        keep = 2
        [evaluation]
        every_steps = 6
        sequences = 7
    "#;
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    Spec::parse("fake", &text.replace("NAME", run), &overrides).unwrap()
}

pub(crate) fn settings(spec: &Spec, store: &Store, stop: &CancellationToken) -> Settings {
    Settings {
        spec: spec.clone(),
        store: store.clone(),
        datasets: vec![("text".into(), Digest::of(b"tokens"))],
        fresh: false,
        listen: "127.0.0.1:0".parse().unwrap(),
        credentials: None,
        dashboard: None,
        access: Default::default(),
        stop: stop.clone(),
        until: None,
        render_metrics: None,
        moments: None,
    }
}

pub(crate) async fn launch(spec: &Spec, store: &Store, stop: &CancellationToken) -> Running {
    match start(settings(spec, store, stop)).await.unwrap() {
        Started::Running(running) => running,
        Started::Finished(outcome) => panic!("the run is over already: {outcome:?}"),
    }
}

fn state(step: u64) -> Vec<Tensor> {
    let tensor = |name: &str, seed: u64| Tensor {
        name: name.to_owned(),
        shape: vec![3],
        data: [1.0, 2.0, 3.0].iter().map(|value| value * (seed + 1) as f32).collect(),
    };
    vec![tensor("a.weight", step), tensor("b.weight", 7 * step), tensor("c.weight", step + 9)]
}

/// Digest of the fake weights of a step.
pub(crate) fn weights(step: u64) -> Digest {
    weights_digest(state(step).iter().map(Tensor::view))
}

/// How a fake worker misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    Well,
    /// Drops its connection when it is given the plan of this step.
    DiesAt(u64),
    /// Says nothing more, heartbeats included, when it is given the plan of this step.
    FreezesAt(u64),
    /// Leaves politely when it is given the plan of this step.
    LeavesAt(u64),
    /// Reports a gradient of its own at this step.
    WrongAt(u64),
}

pub(crate) fn join(name: &str) -> up::Kind {
    up::Kind::Join(v1::Join {
        protocol_version: PROTOCOL_VERSION,
        name: name.to_owned(),
        host: "loopback".into(),
        process_id: std::process::id(),
        threads: 1,
        peer_address: format!("127.0.0.1:1/{name}"),
        numerics: "fake".into(),
        held: None,
        nccl_version: 0,
        ailment: String::new(),
        encrypted: false,
    })
}

pub(crate) struct Session {
    pub(crate) up: mpsc::Sender<v1::WorkerMessage>,
    pub(crate) down: tonic::Streaming<v1::CoordinatorMessage>,
}

impl Session {
    /// Opens a session whose first message is `first`.
    pub(crate) async fn open(address: std::net::SocketAddr, first: up::Kind) -> Self {
        let channel = reach(address, None).await;
        Self::over(channel, first).await.unwrap()
    }

    /// The same, over a connection that is there.
    pub(crate) async fn over(channel: Channel, first: up::Kind) -> Result<Self, tonic::Status> {
        let mut client = CoordinatorClient::new(channel);
        let (up, messages) = mpsc::channel(16);
        up.send(v1::WorkerMessage { kind: Some(first) }).await.unwrap();
        let down = client.session(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Self { up, down })
    }

    pub(crate) async fn say(&self, kind: up::Kind) {
        // A coordinator that has sent Finish may be gone.
        let _ = self.up.send(v1::WorkerMessage { kind: Some(kind) }).await;
    }

    pub(crate) async fn hear(&mut self) -> Option<down::Kind> {
        let message = tokio::time::timeout(PATIENCE, self.down.message()).await.unwrap();
        message.ok().flatten().and_then(|message| message.kind)
    }
}

/// A connection to a coordinator.
pub(crate) async fn reach(
    address: std::net::SocketAddr,
    credentials: Option<&Arc<Credentials>>,
) -> Channel {
    let scheme = if credentials.is_some() { "https" } else { "http" };
    let secured = credentials.is_some();
    let endpoint = transport::endpoint(&format!("{scheme}://{address}"), secured).unwrap();
    transport::dial(&endpoint, credentials).await.unwrap()
}

/// Runs a worker to its end; returns why it ended.
pub(crate) async fn work(
    address: std::net::SocketAddr,
    name: &str,
    store: Store,
    manner: Manner,
) -> String {
    let session = Session::open(address, join(name)).await;
    work_in(session, store, manner).await
}

/// The same, in a session whose first message has been a join.
pub(crate) async fn work_in(mut session: Session, store: Store, manner: Manner) -> String {
    let mut run = String::new();
    let mut beat = tokio::time::interval(Duration::from_millis(200));
    loop {
        let kind = tokio::select! {
            kind = session.hear() => kind,
            _ = beat.tick() => {
                session.say(up::Kind::Heartbeat(v1::Heartbeat {})).await;
                continue;
            }
        };
        match kind {
            None => return "the stream ended".into(),
            Some(down::Kind::Welcome(welcome)) => {
                run = Spec::parse("welcome", &welcome.spec, &[]).unwrap().run.name;
            }
            Some(down::Kind::Refused(refused)) => return refused.reason,
            Some(down::Kind::Finish(finish)) => return finish.reason,
            Some(down::Kind::Commit(_) | down::Kind::Offer(_) | down::Kind::Withdraw(_)) => {}
            Some(down::Kind::Rejected(_) | down::Kind::Communicator(_)) => {}
            Some(down::Kind::Drain(drain)) => {
                session.say(up::Kind::Leave(v1::Leave { reason: drain.reason })).await;
                while session.hear().await.is_some() {}
                return "left".into();
            }
            Some(down::Kind::Fetch(fetch)) => {
                let (step, error) = (fetch.step, String::new());
                session.say(up::Kind::Fetched(v1::Fetched { step, error })).await;
            }
            Some(down::Kind::Form(form)) => {
                let v1::Form { generation, step, .. } = form;
                let weights_digest = weights(step).to_vec();
                session.say(up::Kind::Ready(v1::Ready { generation, step, weights_digest })).await;
            }
            Some(down::Kind::Plan(plan)) => match manner {
                Manner::DiesAt(step) if step == plan.step => return "died".into(),
                Manner::FreezesAt(step) if step == plan.step => {
                    tokio::time::sleep(PATIENCE).await;
                    return "froze".into();
                }
                Manner::LeavesAt(step) if step == plan.step => {
                    session.say(up::Kind::Leave(v1::Leave { reason: "SIGTERM".into() })).await;
                    // Dropping the stream at once would reset it, and the farewell with it.
                    while session.hear().await.is_some() {}
                    return "left".into();
                }
                manner => {
                    let odd = manner == Manner::WrongAt(plan.step);
                    session.say(vote(plan, odd)).await;
                }
            },
            Some(down::Kind::Evaluate(share)) => session.say(evaluated(share)).await,
            Some(down::Kind::Save(save)) => {
                let saved = save_part(&store, &run, save).await;
                session.say(up::Kind::PartSaved(saved)).await;
            }
        }
    }
}

fn vote(plan: v1::Plan, odd: bool) -> up::Kind {
    let v1::Plan { generation, step, .. } = plan;
    up::Kind::Prepared(v1::Prepared {
        generation,
        step,
        digest: Digest::of(format!("gradient {step} {odd}").as_bytes()).to_vec(),
        statistics: Some(v1::StepStatistics {
            loss: 7.0 - step as f64 / 10.0,
            loss_per_loop: vec![7.5, 7.25],
            exit_pdf: vec![0.25, 0.75],
            entropy: 0.5,
            grad_norm: 2.0,
            tokens: 160,
            bad_slots: 0,
            ..v1::StepStatistics::default()
        }),
        sections: Some(v1::Sections { compute: 0.01, ..v1::Sections::default() }),
        computed_slots: plan.slot_end - plan.slot_begin,
        detail: String::new(),
    })
}

fn evaluated(share: v1::Evaluate) -> up::Kind {
    let v1::Evaluate { generation, step, begin, end } = share;
    let tokens = (end - begin) * 16;
    let unit = (tokens as i64) << looptrain_proto::EVALUATION_FRACTION_BITS;
    let sums = vec![unit * 5, unit * 6, unit * 4, unit / 4, unit / 4 * 3, unit / 2];
    up::Kind::Evaluated(v1::Evaluated { generation, step, sums, tokens })
}

async fn save_part(store: &Store, run: &str, save: v1::Save) -> v1::PartSaved {
    let v1::Save { step, part, parts, .. } = save;
    let mine: Vec<Tensor> = (state(step).into_iter().enumerate())
        .filter(|(index, _)| index % parts as usize == part as usize)
        .map(|(_, tensor)| tensor)
        .collect();
    let entry = Checkpoints::new(store, run)
        .save_part(Step(step), part as usize, parts as usize, mine, Default::default())
        .await
        .unwrap();
    v1::PartSaved {
        stall_seconds: 0.01,
        step,
        part,
        parts,
        error: String::new(),
        file: entry.file,
        bytes: entry.bytes,
        digest: entry.digest.to_vec(),
        weights_digest: weights(step).to_vec(),
        tensors: entry.tensors,
    }
}
