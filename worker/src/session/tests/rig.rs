//! A coordinator without a mind: the test says every word of it.

use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use looptrain_model::Device;
use looptrain_proto::v1::coordinator_message::Kind as Directive;
use looptrain_proto::v1::coordinator_server::{Coordinator, CoordinatorServer};
use looptrain_proto::v1::worker_message::Kind as Vote;
use looptrain_proto::v1::{self, CoordinatorMessage, WorkerMessage};
use looptrain_proto::{Incarnation, Spec};
use looptrain_storage::{Checkpoints, Register, RunRecord, Store};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::testing::tiny_store;
use crate::{Finished, Moment, Moments, Stop, WorkerError, WorkerSettings};

/// Nothing here takes nearly this long, however busy the machine is.
pub(super) const PATIENCE: Duration = Duration::from_secs(45);

type Line = mpsc::Sender<Result<CoordinatorMessage, Status>>;
type Worker = JoinHandle<Result<Finished, WorkerError>>;

struct Door(mpsc::Sender<(Streaming<WorkerMessage>, Line)>);

#[tonic::async_trait]
impl Coordinator for Door {
    type SessionStream = ReceiverStream<Result<CoordinatorMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (line, messages) = mpsc::channel(64);
        let guest = (request.into_inner(), line);
        self.0.send(guest).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn status(
        &self,
        _: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusReply>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn stop(&self, _: Request<v1::StopRequest>) -> Result<Response<v1::StopReply>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn drain(
        &self,
        _: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainReply>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn pause(
        &self,
        _: Request<v1::PauseRequest>,
    ) -> Result<Response<v1::PauseReply>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn resume(
        &self,
        _: Request<v1::ResumeRequest>,
    ) -> Result<Response<v1::ResumeReply>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn save(&self, _: Request<v1::SaveRequest>) -> Result<Response<v1::SaveReply>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

pub(super) struct Rig {
    pub(super) spec: Arc<Spec>,
    pub(super) stop: Stop,
    /// How long workers look for another coordinator.
    pub(super) reconnect: Duration,
    /// Of the workers to come.
    pub(super) moments: Moments,
    /// Where they compute, and what they are told to reduce with.
    pub(super) device: Device,
    pub(super) collective: v1::Collective,
    url: String,
    guests: mpsc::Receiver<(Streaming<WorkerMessage>, Line)>,
    server: JoinSet<()>,
}

impl Rig {
    pub(super) async fn start() -> Self {
        let (spec, _) = tiny_store().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (door, guests) = mpsc::channel(8);
        let mut server = JoinSet::new();
        server.spawn(async move {
            tonic::transport::Server::builder()
                .add_service(CoordinatorServer::new(Door(door)))
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        let (stop, reconnect) = (Stop::default(), Duration::ZERO);
        let moments = Moments::default();
        let (device, collective) = (Device::Cpu, v1::Collective::Tcp);
        Self { spec, stop, reconnect, moments, device, collective, url, guests, server }
    }

    /// Tells when a worker to come has been at this moment.
    pub(super) fn reaches(&mut self, wanted: Moment) -> Reached {
        let reached = Arc::new(Notify::new());
        let note = Arc::clone(&reached);
        self.moments = Moments::watched_by(move |moment| {
            if moment == wanted {
                note.notify_one();
            }
        });
        Reached(reached)
    }

    /// Nobody listens any more.
    pub(super) fn hang_up(&mut self) {
        self.server.abort_all();
    }

    /// Writes a record as a coordinator does that begins the run, or begins it anew.
    pub(super) async fn claim_run(&self) {
        let (store, run) = (Store::open(&self.spec.run.store).unwrap(), &self.spec.run.name);
        let trajectory = self.spec.trajectory_digest();
        let begin = |before: Option<&RunRecord>| {
            let begun = before.map_or(Incarnation(1), |record| record.incarnation.next());
            Ok(RunRecord { begun, ..RunRecord::new(trajectory, self.spec.to_toml(), &[]) })
        };
        Register::claim(&store, run, begin).await.unwrap();
    }

    pub(super) fn checkpoints(&self) -> Checkpoints {
        let store = Store::open(&self.spec.run.store).unwrap();
        Checkpoints::new(&store, &self.spec.run.name)
    }

    /// A worker on its way to this coordinator.
    pub(super) fn worker(&self, name: &str) -> Worker {
        let mut settings = WorkerSettings::new(&self.url, name);
        settings.stop = self.stop.clone();
        settings.reconnect_timeout = self.reconnect;
        settings.moments = self.moments.clone();
        settings.device = self.device;
        tokio::spawn(crate::run(settings))
    }

    /// The next worker's session, its join heard.
    pub(super) async fn guest(&mut self) -> Guest {
        let (votes, line) = self.guests.recv().await.unwrap();
        let (join, parts) = (v1::Join::default(), VecDeque::new());
        let mut guest = Guest { votes, line, join, collective: self.collective, parts };
        match guest.hear().await {
            Some(Vote::Join(join)) => guest.join = join,
            other => panic!("the first message is {other:?}"),
        }
        guest
    }

    pub(super) async fn welcome(&mut self) -> Guest {
        let guest = self.guest().await;
        guest.welcome(&self.spec);
        guest
    }

    /// Workers w0, w1, ... in a formed generation 1 at step 0, in the order of their ranks.
    pub(super) async fn cluster(&mut self, world: usize) -> (Vec<Worker>, Vec<Guest>) {
        let workers = (0..world).map(|rank| self.worker(&format!("w{rank}"))).collect();
        let mut guests = Vec::new();
        for _ in 0..world {
            guests.push(self.welcome().await);
        }
        guests.sort_by(|a, b| a.join.name.cmp(&b.join.name));
        reform(&mut guests, 1, 0).await;
        (workers, guests)
    }
}

/// Forms a generation of all guests; the digest on which they agree.
pub(super) async fn reform(guests: &mut [Guest], generation: u64, step: u64) -> Vec<u8> {
    let joins: Vec<v1::Join> = guests.iter().map(|guest| guest.join.clone()).collect();
    for (rank, guest) in guests.iter().enumerate() {
        guest.form(generation, rank as u32, &joins.iter().collect::<Vec<_>>(), step);
    }
    if guests.len() > 1 && guests[0].collective == v1::Collective::Nccl {
        let communicator = guests[0].communicator().await;
        assert_eq!(communicator.generation, generation);
        let others = guests.iter().skip(1);
        others.for_each(|guest| guest.say(Directive::Communicator(communicator.clone())));
    }
    let all = join_all(guests.iter_mut().map(Guest::ready)).await;
    assert!(all.iter().all(|ready| *ready == all[0] && ready.step == step), "{all:?}");
    all[0].weights_digest.clone()
}

/// Commits steps with the slots shared out; the digests of the reduced buffers.
pub(super) async fn steps(
    guests: &mut [Guest],
    generation: u64,
    range: RangeInclusive<u64>,
) -> Vec<Vec<u8>> {
    let world = guests.len() as u32;
    let mut digests = Vec::new();
    for step in range {
        for (rank, guest) in (0..).zip(guests.iter()) {
            guest.plan(generation, step, 4 * rank / world..4 * (rank + 1) / world);
        }
        let all = join_all(guests.iter_mut().map(Guest::prepared)).await;
        for (guest, prepared) in guests.iter().zip(&all) {
            assert_eq!(prepared.digest, all[0].digest);
            assert_eq!(prepared.statistics, all[0].statistics);
            guest.commit(generation, step);
        }
        digests.push(all[0].digest.clone());
    }
    digests
}

/// A moment that comes.
pub(super) struct Reached(Arc<Notify>);

impl Reached {
    pub(super) async fn wait(&self) {
        tokio::time::timeout(PATIENCE, self.0.notified()).await.expect("the moment comes");
    }
}

/// The coordinator's end of one session.
pub(super) struct Guest {
    votes: Streaming<WorkerMessage>,
    line: Line,
    pub(super) join: v1::Join,
    collective: v1::Collective,
    /// Parts that were saved while the test waited for something else.
    parts: VecDeque<v1::PartSaved>,
}

macro_rules! hears {
    ($($name:ident: $kind:ident),*) => {
        $(pub(super) async fn $name(&mut self) -> v1::$kind {
            match self.hear().await {
                Some(Vote::$kind(vote)) => vote,
                other => panic!("heard {other:?}"),
            }
        })*
    };
}

impl Guest {
    async fn next(&mut self) -> Option<Vote> {
        let message = tokio::time::timeout(PATIENCE, self.votes.message()).await;
        message.expect("the worker says something").ok().flatten().and_then(|m| m.kind)
    }

    async fn next_but_beats(&mut self) -> Option<Vote> {
        loop {
            match self.next().await {
                Some(Vote::Heartbeat(_)) => {}
                other => return other,
            }
        }
    }

    /// The next message that is neither a heartbeat nor a saved part, which comes at any time;
    /// `None` at the end of the stream.
    pub(super) async fn hear(&mut self) -> Option<Vote> {
        loop {
            match self.next_but_beats().await {
                Some(Vote::PartSaved(part)) => self.parts.push_back(part),
                other => return other,
            }
        }
    }

    /// Whether parts were saved of which nobody has asked yet.
    pub(super) fn has_parts(&self) -> bool {
        !self.parts.is_empty()
    }

    pub(super) async fn beat(&mut self) {
        while !matches!(self.next().await, Some(Vote::Heartbeat(_))) {}
    }

    hears!(
        ready: Ready, prepared: Prepared, evaluated: Evaluated, failed: Failed, fetched: Fetched,
        communicator: Communicator, is_leaving: Leaving
    );

    pub(super) async fn saved(&mut self) -> v1::PartSaved {
        match self.parts.pop_front() {
            Some(part) => part,
            None => match self.next_but_beats().await {
                Some(Vote::PartSaved(part)) => part,
                other => panic!("heard {other:?}"),
            },
        }
    }

    pub(super) fn say(&self, kind: Directive) {
        self.line
            .try_send(Ok(CoordinatorMessage { kind: Some(kind), ..CoordinatorMessage::default() }))
            .unwrap();
    }

    pub(super) fn say_nothing(&self) {
        self.line.try_send(Ok(CoordinatorMessage::default())).unwrap();
    }

    pub(super) fn welcome(&self, spec: &Spec) {
        self.welcome_as(1, spec);
    }

    pub(super) fn welcome_as(&self, incarnation: u64, spec: &Spec) {
        self.welcome_to(incarnation, b"one", spec);
    }

    pub(super) fn welcome_to(&self, incarnation: u64, lineage: &[u8], spec: &Spec) {
        self.say(Directive::Welcome(v1::Welcome {
            worker_id: 1,
            incarnation,
            spec: spec.to_toml(),
            lineage: lineage.to_vec(),
            trajectory: spec.trajectory_digest().to_vec(),
        }));
    }

    pub(super) fn form(&self, generation: u64, rank: u32, joins: &[&v1::Join], step: u64) {
        let members = members(joins).into();
        // A rank that is alone has nobody to reduce with.
        let collective = if joins.len() == 1 { v1::Collective::Tcp } else { self.collective };
        let collective = collective.into();
        self.say(Directive::Form(v1::Form { generation, members, rank, step, collective }));
    }

    pub(super) fn offer(&self, generation: u64, step: u64) {
        self.say(Directive::Offer(v1::Offer { generation, step }));
    }

    pub(super) fn withdraw(&self, keep_updates: bool) {
        self.say(Directive::Withdraw(v1::Withdraw { keep_updates }));
    }

    pub(super) fn drain(&self, reason: &str) {
        self.say(Directive::Drain(v1::Drain { reason: reason.into() }));
    }

    pub(super) fn fetch(&self, step: u64, sources: &[&v1::Join]) {
        self.say(Directive::Fetch(v1::Fetch { step, sources: members(sources) }));
    }

    pub(super) fn plan(&self, generation: u64, step: u64, slots: Range<u32>) {
        let (slot_begin, slot_end) = (slots.start, slots.end);
        self.say(Directive::Plan(v1::Plan { generation, step, slot_begin, slot_end, trend: None }));
    }

    pub(super) fn commit(&self, generation: u64, step: u64) {
        self.say(Directive::Commit(v1::Commit { generation, step }));
    }

    pub(super) fn evaluate(&self, generation: u64, step: u64, range: Range<u64>) {
        let (begin, end) = (range.start, range.end);
        self.say(Directive::Evaluate(v1::Evaluate { generation, step, begin, end }));
    }

    pub(super) fn save(&self, step: u64, part: u32, parts: u32) {
        self.say(Directive::Save(v1::Save { generation: 1, step, part, parts }));
    }

    pub(super) fn finish(&self, reason: &str) {
        self.say(Directive::Finish(v1::Finish { reason: reason.into(), expelled: false }));
    }
}

fn members(joins: &[&v1::Join]) -> Vec<v1::Member> {
    let member = |join: &&v1::Join| v1::Member {
        name: join.name.clone(),
        peer_address: join.peer_address.clone(),
    };
    joins.iter().map(member).collect()
}
