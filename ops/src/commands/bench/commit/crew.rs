//! Workers that keep the protocol and compute nothing, and the clock that they share.
//!
//! An all-reduce has no result for anybody before everybody has taken part. So a worker votes when
//! all have been given the plan, and all votes come at once, as they do in a real step.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::{self, coordinator_message as down, worker_message as up};
use looptrain_proto::{Digest, EVALUATION_FRACTION_BITS, PROTOCOL_VERSION, Step};
use looptrain_storage::{Checkpoints, Store, Tensor};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

/// Workers that may be on their way in at once: fewer than a listener lets wait.
const JOINING: usize = 128;

/// Messages that may wait for a session to send them; a step has one.
const OUTGOING: usize = 16;

/// As often as workers beat whose time-out is the default of 3 s.
const HEARTBEAT: Duration = Duration::from_millis(750);

/// When the votes and commits of each step were, over all workers.
pub(super) struct Clock {
    start: Instant,
    /// In order; the first is step 1.
    steps: Vec<Marks>,
}

/// Nanoseconds since the clock's start.
struct Marks {
    first_vote: AtomicU64,
    last_vote: AtomicU64,
    last_commit: AtomicU64,
}

/// The moments of one step.
pub(super) struct StepTimes {
    commit_before: Duration,
    first_vote: Duration,
    last_vote: Duration,
    last_commit: Duration,
}

impl StepTimes {
    /// From the moment when the last worker sends its vote to that when the last one has received
    /// its commit.
    pub(super) fn vote_to_commit(&self) -> Duration {
        self.last_commit.saturating_sub(self.last_vote)
    }

    pub(super) fn first_to_last_vote(&self) -> Duration {
        self.last_vote.saturating_sub(self.first_vote)
    }

    /// The whole step, from the last commit of the one before.
    pub(super) fn commit_to_commit(&self) -> Duration {
        self.last_commit.saturating_sub(self.commit_before)
    }
}

impl Clock {
    pub(super) fn new(steps: u32) -> Self {
        let marks = || Marks {
            first_vote: AtomicU64::new(u64::MAX),
            last_vote: AtomicU64::new(0),
            last_commit: AtomicU64::new(0),
        };
        Self { start: Instant::now(), steps: (0..steps).map(|_| marks()).collect() }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn marks(&self, step: u64) -> Option<&Marks> {
        self.steps.get(usize::try_from(step.checked_sub(1)?).ok()?)
    }

    fn vote(&self, step: u64) {
        let now = self.now();
        if let Some(marks) = self.marks(step) {
            marks.first_vote.fetch_min(now, Ordering::Relaxed);
            marks.last_vote.fetch_max(now, Ordering::Relaxed);
        }
    }

    fn commit(&self, step: u64) {
        let now = self.now();
        if let Some(marks) = self.marks(step) {
            marks.last_commit.fetch_max(now, Ordering::Relaxed);
        }
    }

    /// The steps after the first `skipped`, of which there must be one at least.
    pub(super) fn steps(&self, skipped: u32) -> Vec<StepTimes> {
        let read = |mark: &AtomicU64| Duration::from_nanos(mark.load(Ordering::Relaxed));
        let pairs = self.steps.windows(2).skip(skipped.saturating_sub(1) as usize);
        pairs
            .map(|pair| StepTimes {
                commit_before: read(&pair[0].last_commit),
                first_vote: read(&pair[1].first_vote),
                last_vote: read(&pair[1].last_vote),
                last_commit: read(&pair[1].last_commit),
            })
            .collect()
    }
}

/// What all workers share.
struct Shared {
    workers: u32,
    /// Plans of the step in flight that have arrived.
    planned: AtomicU32,
    /// The newest step of which all have the plan.
    reduced: watch::Sender<u64>,
    clock: Arc<Clock>,
    checkpoints: Checkpoints,
}

/// Workers that have joined.
pub(super) struct Crew(JoinSet<Result<()>>);

impl Crew {
    /// Has `workers` workers join, and returns when all are welcome. They go on by themselves.
    pub(super) async fn join(
        address: SocketAddr,
        workers: u32,
        store: &Store,
        clock: &Arc<Clock>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            workers,
            planned: AtomicU32::new(0),
            reduced: watch::Sender::new(0),
            clock: Arc::clone(clock),
            checkpoints: Checkpoints::new(store, "bench-commit"),
        });
        let (welcomed, mut welcomes) = mpsc::unbounded_channel();
        let doors = Arc::new(Semaphore::new(JOINING));
        let mut crew = JoinSet::new();
        for index in 0..workers {
            let (shared, doors, welcomed) =
                (Arc::clone(&shared), Arc::clone(&doors), welcomed.clone());
            crew.spawn(async move {
                let door = doors.acquire_owned().await?;
                let worker = Worker::join(address, index, shared).await;
                let mut worker = worker.with_context(|| format!("worker {index} cannot join"))?;
                // Whoever counts is gone only when another worker could not join.
                let _ = welcomed.send(());
                drop((door, welcomed));
                worker.work().await.with_context(|| format!("worker {index}"))
            });
        }
        drop(welcomed);
        for _ in 0..workers {
            if welcomes.recv().await.is_none() {
                return Err(Self(crew).failure().await);
            }
        }
        Ok(Self(crew))
    }

    /// Waits until all have been told that the run is over.
    pub(super) async fn work(mut self) -> Result<()> {
        while let Some(ended) = self.0.join_next().await {
            ended??;
        }
        Ok(())
    }

    async fn failure(self) -> anyhow::Error {
        self.work().await.err().unwrap_or_else(|| anyhow!("a worker ended before the run"))
    }
}

/// One session, from the worker's side.
struct Worker {
    outgoing: mpsc::Sender<v1::WorkerMessage>,
    incoming: Streaming<v1::CoordinatorMessage>,
    shared: Arc<Shared>,
}

impl Worker {
    async fn join(address: SocketAddr, index: u32, shared: Arc<Shared>) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
        let mut client = CoordinatorClient::new(endpoint.connect().await?);
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let join = v1::Join {
            protocol_version: PROTOCOL_VERSION,
            name: format!("worker-{index:04}"),
            host: "loopback".into(),
            process_id: std::process::id(),
            threads: 1,
            peer_address: format!("127.0.0.1:{}", 10_000 + index),
            numerics: "none".into(),
            held: None,
            nccl_version: 0,
            ailment: String::new(),
            encrypted: false,
        };
        outgoing.send(v1::WorkerMessage { kind: Some(up::Kind::Join(join)) }).await?;
        let incoming = client.session(ReceiverStream::new(messages)).await?.into_inner();
        let mut worker = Self { outgoing, incoming, shared };
        match worker.hear().await? {
            down::Kind::Welcome(_) => Ok(worker),
            down::Kind::Refused(refused) => bail!("refused: {}", refused.reason),
            other => bail!("answered with {other:?}"),
        }
    }

    async fn hear(&mut self) -> Result<down::Kind> {
        let message = self.incoming.message().await?;
        message.and_then(|message| message.kind).context("the session ended")
    }

    async fn say(&self, kind: up::Kind) -> Result<()> {
        Ok(self.outgoing.send(v1::WorkerMessage { kind: Some(kind) }).await?)
    }

    /// Does what it is told until the run is over.
    async fn work(&mut self) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let mut reduced = shared.reduced.subscribe();
        let mut beats = interval(HEARTBEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut plan = None;
        loop {
            let kind = tokio::select! {
                kind = self.hear() => kind?,
                Ok(()) = reduced.changed() => {
                    let step = *reduced.borrow_and_update();
                    if let Some(plan) = plan.take_if(|plan: &mut v1::Plan| plan.step == step) {
                        self.shared.clock.vote(step);
                        self.say(vote(plan)).await?;
                    }
                    continue;
                }
                _ = beats.tick() => {
                    self.say(up::Kind::Heartbeat(v1::Heartbeat {})).await?;
                    continue;
                }
            };
            match kind {
                down::Kind::Rejected(rejected) => bail!("was rejected: {}", rejected.reason),
                down::Kind::Commit(commit) => self.shared.clock.commit(commit.step),
                down::Kind::Plan(given) => {
                    plan = Some(given);
                    let planned = shared.planned.fetch_add(1, Ordering::AcqRel) + 1;
                    if planned == shared.workers {
                        shared.planned.store(0, Ordering::Release);
                        shared.reduced.send_replace(given.step);
                    }
                }
                down::Kind::Form(form) if form.generation > 1 => {
                    bail!("a session was lost, and another generation formed");
                }
                down::Kind::Form(form) => {
                    let v1::Form { generation, step, .. } = form;
                    let weights_digest = weights();
                    self.say(up::Kind::Ready(v1::Ready { generation, step, weights_digest }))
                        .await?;
                }
                down::Kind::Evaluate(share) => self.say(evaluated(share)).await?,
                down::Kind::Save(save) => {
                    let saved = self.save(save).await?;
                    self.say(up::Kind::PartSaved(saved)).await?;
                }
                down::Kind::Finish(finish) if finish.expelled => bail!(finish.reason),
                down::Kind::Finish(_) => return Ok(()),
                other => bail!("was sent {other:?}, which has no place in this bench"),
            }
        }
    }

    /// One number, so that the run can end with a checkpoint as every run does.
    async fn save(&self, save: v1::Save) -> Result<v1::PartSaved> {
        let v1::Save { step, part, parts, .. } = save;
        let tensor = Tensor { name: format!("part-{part}"), shape: vec![1], data: vec![1.0] };
        let (index, all) = (part as usize, parts as usize);
        let checkpoints = &self.shared.checkpoints;
        let entry =
            checkpoints.save_part(Step(step), index, all, vec![tensor], BTreeMap::new()).await?;
        Ok(v1::PartSaved {
            stall_seconds: 0.0,
            step,
            part,
            parts,
            error: String::new(),
            file: entry.file,
            bytes: entry.bytes,
            digest: entry.digest.to_vec(),
            weights_digest: weights(),
            tensors: entry.tensors,
        })
    }
}

fn weights() -> Vec<u8> {
    Digest::of(b"the weights of any step").to_vec()
}

fn vote(plan: v1::Plan) -> up::Kind {
    let v1::Plan { generation, step, .. } = plan;
    up::Kind::Prepared(v1::Prepared {
        generation,
        step,
        digest: Digest::of(&step.to_le_bytes()).to_vec(),
        statistics: Some(v1::StepStatistics {
            loss: 7.0,
            loss_per_loop: vec![7.5, 7.25, 7.0, 6.75],
            exit_pdf: vec![0.25; 4],
            entropy: 0.5,
            grad_norm: 2.0,
            tokens: 16,
            bad_slots: 0,
            ..v1::StepStatistics::default()
        }),
        sections: Some(v1::Sections::default()),
        computed_slots: plan.slot_end - plan.slot_begin,
        detail: String::new(),
    })
}

fn evaluated(share: v1::Evaluate) -> up::Kind {
    let v1::Evaluate { generation, step, begin, end } = share;
    let tokens = (end - begin) * 16;
    let unit = (tokens as i64) << EVALUATION_FRACTION_BITS;
    // Loss, four loops, four exit probabilities, entropy.
    let sums = vec![unit; 10];
    up::Kind::Evaluated(v1::Evaluated { generation, step, sums, tokens })
}
