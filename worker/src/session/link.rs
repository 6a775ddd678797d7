//! The connection to the coordinator: dialling, the join, and the outgoing half of the stream.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use looptrain_proto::transport::{self, Credentials, innermost};
use looptrain_proto::v1::coordinator_client::CoordinatorClient;
use looptrain_proto::v1::worker_message::Kind;
use looptrain_proto::v1::{CoordinatorMessage, Heartbeat, Join, Refused, Welcome, WorkerMessage};
use looptrain_proto::v1::{Failed, coordinator_message};
use looptrain_proto::{Digest, Generation};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::rendezvous::Rendezvous;
use crate::WorkerError;

/// Messages that may wait for the coordinator to read them: more votes than a worker has to give
/// until a coordinator that does not read is taken for gone (below). Heartbeats that find no room
/// are left out.
const OUTGOING: usize = 512;

/// A coordinator whose process ends closes the connection, and the worker ends at once. One whose
/// machine is gone, or whose process is stopped, is found by HTTP/2 pings, one every
/// `KEEP_ALIVE_EVERY`: when an answer takes longer than `KEEP_ALIVE_TIMEOUT`, the session is
/// broken.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// An attempt to connect that takes longer is given up for another one: a machine that is gone answers
/// nothing for minutes, and by then the coordinator's name may stand for another one.
const ATTEMPT: Duration = Duration::from_secs(3);

/// The first and the longest pause between attempts to reach the coordinator: as long as a
/// coordinator that is back may wait for this worker.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// A network over which a coordinator is reached.
pub trait Dial: Send + Sync {
    /// Whether connections are within TLS, as the coordinator's URL must say.
    fn is_secured(&self) -> bool {
        false
    }

    /// Connects to an endpoint, once.
    ///
    /// # Errors
    /// What the network says.
    fn dial(
        &self,
        endpoint: &Endpoint,
    ) -> impl Future<Output = Result<Channel, tonic::transport::Error>> + Send;
}

/// The machine's own network.
#[derive(Clone, Debug)]
pub(crate) struct Tcp {
    pub(crate) credentials: Option<Arc<Credentials>>,
}

impl Dial for Tcp {
    fn is_secured(&self) -> bool {
        self.credentials.is_some()
    }

    async fn dial(&self, endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
        transport::dial(endpoint, self.credentials.as_ref()).await
    }
}

/// Both halves of a session that the coordinator has welcomed.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) url: String,
    pub(crate) incoming: Streaming<CoordinatorMessage>,
    outgoing: mpsc::Sender<WorkerMessage>,
    /// Beats; ends with the link.
    beats: JoinSet<()>,
}

/// Reaches the coordinator, trying again until the time is over.
async fn dial(
    network: &impl Dial,
    url: &str,
    name: &str,
    within: Duration,
) -> Result<Channel, WorkerError> {
    let endpoint = transport::endpoint(url, network.is_secured())
        .map_err(|reason| WorkerError::Url { url: url.to_owned(), reason })?
        .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let deadline = Instant::now() + within;
    let mut pause = FIRST_PAUSE;
    for attempt in 0.. {
        let until = deadline.min(Instant::now() + ATTEMPT);
        let reason = match timeout_at(until, network.dial(&endpoint)).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(error)) => innermost(&error),
            Err(_) => "it does not answer".into(),
        };
        let jittered = jittered(pause, name, attempt);
        if Instant::now() + jittered >= deadline {
            let seconds = within.as_secs_f64();
            return Err(WorkerError::Connect { url: url.to_owned(), seconds, reason });
        }
        sleep(jittered).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    unreachable!("the loop ends by returning")
}

/// Between half of a pause and all of it, so that workers that lost their coordinator at the same
/// time do not all come back at the same time. Not drawn but derived, so that what happens once
/// happens again.
fn jittered(pause: Duration, name: &str, attempt: u64) -> Duration {
    let Digest([a, b, c, d, ..]) = Digest::of(format!("{name} {attempt}").as_bytes());
    let share = f64::from(u32::from_le_bytes([a, b, c, d])) / f64::from(u32::MAX);
    pause / 2 + (pause / 2).mul_f64(share)
}

/// What the coordinator said, or what happened to the connection.
fn told(status: &tonic::Status) -> String {
    match status.source() {
        Some(_) => innermost(status),
        None => status.message().to_owned(),
    }
}

impl Link {
    /// Joins the run of the coordinator at `url`.
    pub(crate) async fn join(
        network: &impl Dial,
        url: &str,
        join: Join,
        within: Duration,
    ) -> Result<(Self, Welcome), WorkerError> {
        let broken = |reason| WorkerError::Broken { url: url.to_owned(), reason };
        let deadline = Instant::now() + within;
        let channel = dial(network, url, &join.name, within).await?;
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let mut link = {
            // The first message is there before the call, for the call may wait for it.
            let join = WorkerMessage { kind: Some(Kind::Join(join)) };
            let sent = outgoing.try_send(join);
            sent.map_err(|_| broken("the session's queue is closed".into()))?;
            let mut client = CoordinatorClient::new(channel);
            let call = client.session(ReceiverStream::new(messages));
            let response = timeout_at(deadline, call).await;
            let status = response.map_err(|_| broken("it does not answer the join".into()))?;
            let incoming = status.map_err(|status| broken(told(&status)))?;
            let (url, incoming) = (url.to_owned(), incoming.into_inner());
            Self { url, incoming, outgoing, beats: JoinSet::new() }
        };
        let first = timeout_at(deadline, link.receive()).await;
        match first.map_err(|_| broken("it does not answer the join".into()))??.kind {
            Some(coordinator_message::Kind::Welcome(welcome)) => Ok((link, welcome)),
            Some(coordinator_message::Kind::Refused(refused)) => {
                let Refused { reason, for_now } = refused;
                Err(WorkerError::Refused { reason, for_now })
            }
            _ => Err(link.protocol("answered the join with neither a welcome nor a refusal")),
        }
    }

    /// The next message; one of a kind that this build does not know has none.
    pub(crate) async fn receive(&mut self) -> Result<CoordinatorMessage, WorkerError> {
        let reason = match self.incoming.message().await {
            Ok(Some(message)) => return Ok(message),
            Ok(None) => "it closed the session".to_owned(),
            Err(status) => told(&status),
        };
        Err(WorkerError::Broken { url: self.url.clone(), reason })
    }

    /// Queues a message. The queue is long enough for any coordinator that reads at all.
    pub(crate) fn send(&self, kind: Kind) -> Result<(), WorkerError> {
        self.outgoing.try_send(WorkerMessage { kind: Some(kind) }).map_err(|error| {
            let reason = match error {
                mpsc::error::TrySendError::Full(_) => "it has not read for a long time",
                mpsc::error::TrySendError::Closed(_) => "the session is closed",
            };
            WorkerError::Broken { url: self.url.clone(), reason: reason.into() }
        })
    }

    /// What the ranks of a generation find each other by, once that comes in.
    pub(crate) fn rendezvous(
        &self,
        generation: Generation,
        heard: oneshot::Receiver<Vec<u8>>,
    ) -> Rendezvous {
        Rendezvous::new(generation, self.outgoing.clone(), heard)
    }

    /// Says why a directive could not be carried out.
    pub(crate) fn report(&self, failed: Failed) -> Result<(), WorkerError> {
        self.send(Kind::Failed(failed))
    }

    /// Beats from now on, also while the session is busy.
    pub(crate) fn beat_every(&mut self, period: Duration) {
        let outgoing = self.outgoing.clone();
        self.beats.spawn(async move {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let beat = WorkerMessage { kind: Some(Kind::Heartbeat(Heartbeat {})) };
                if let Err(mpsc::error::TrySendError::Closed(_)) = outgoing.try_send(beat) {
                    return;
                }
            }
        });
    }

    /// Ends the outgoing half and waits, for a moment, until the coordinator has read it all.
    pub(crate) async fn close(self, patience: Duration) {
        let Self { mut incoming, outgoing, beats, .. } = self;
        drop((outgoing, beats));
        let drained = async { while let Ok(Some(_)) = incoming.message().await {} };
        // The coordinator that does not end the session in time has at least had the time to read.
        let _ = tokio::time::timeout(patience, drained).await;
    }

    /// The error for a coordinator that does not keep to the protocol.
    pub(crate) fn protocol(&self, what: &str) -> WorkerError {
        WorkerError::Protocol { url: self.url.clone(), what: what.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_differ_and_are_never_longer_nor_much_shorter_than_told() {
        let attempts = (0..20).flat_map(|attempt| (0..10).map(move |worker| (worker, attempt)));
        let drawn: Vec<Duration> = attempts
            .map(|(worker, attempt)| jittered(LONGEST_PAUSE, &format!("w{worker}"), attempt))
            .collect();
        assert!(drawn.iter().all(|pause| (LONGEST_PAUSE / 2..=LONGEST_PAUSE).contains(pause)));
        let (first, last) = (drawn.iter().min(), drawn.iter().max());
        assert!(last > first.map(|first| *first + LONGEST_PAUSE / 4).as_ref(), "{drawn:?}");
    }
}
