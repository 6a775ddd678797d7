//! Finding one's neighbours: the listener of a worker, and connections to others.
//!
//! A [`PeerListener`] is bound before the worker joins, because its address is part of the join;
//! it starts to serve as [`Peers`] once the run is known. Connections made in between wait in the
//! system's backlog.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use looptrain_proto::transport::{Connection, Credentials, Gate, Port, Refusal};
use looptrain_proto::{Digest, Rank};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::handshake::{Answer, Greeting, Hello, Purpose};
use super::{Peer, PeerError, RingId};

/// Connections that may wait for their ring: four rings of the most streams. Who finds no room tries
/// again.
const MAX_CONNECTIONS: usize = 64;

/// Pause between two attempts to reach a peer.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A bound address that does not serve yet.
#[derive(Debug)]
pub struct PeerListener {
    listener: TcpListener,
    address: SocketAddr,
    credentials: Option<Arc<Credentials>>,
}

impl PeerListener {
    /// Binds the address; port 0 takes a free one.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(address: SocketAddr) -> Result<Self, PeerError> {
        let bind = |error| PeerError::Bind { address, error };
        let listener = TcpListener::bind(address).await.map_err(bind)?;
        let address = listener.local_addr().map_err(bind)?;
        Ok(Self { listener, address, credentials: None })
    }

    /// Peers show certificates, and this worker its own.
    #[must_use]
    pub fn secured(self, credentials: Option<Arc<Credentials>>) -> Self {
        Self { credentials, ..self }
    }

    /// The address with the port that was given.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts the peers of one run from now on. Those that come for training state, not for a
    /// ring, are handed on to the receiver.
    #[must_use]
    pub fn serve(self, run: Digest) -> (Peers, mpsc::Receiver<Connection>) {
        let (joiners, for_state) = mpsc::channel(MAX_CONNECTIONS);
        let lobby = Arc::new(Lobby {
            run,
            state: Mutex::new(State { wanted: RingId::default(), parked: BTreeMap::new() }),
            arrived: Notify::new(),
            joiners,
            credentials: self.credentials,
        });
        let mut serving = JoinSet::new();
        let greeter = Arc::clone(&lobby);
        let greet = move |stream, _| Arc::clone(&greeter).greet(stream);
        serving.spawn(Gate::new(Port::Peers).keep(self.listener, greet));
        (Peers { lobby, _serving: serving }, for_state)
    }
}

/// The accepted connections of a worker, and the way to others; serving ends when it is dropped.
#[derive(Debug)]
pub struct Peers {
    lobby: Arc<Lobby>,
    /// The accepting task; a set, because that ends its task when dropped.
    _serving: JoinSet<()>,
}

#[derive(Debug)]
struct Lobby {
    run: Digest,
    state: Mutex<State>,
    arrived: Notify,
    joiners: mpsc::Sender<Connection>,
    credentials: Option<Arc<Credentials>>,
}

#[derive(Debug)]
struct State {
    /// Connections of older rings are refused.
    wanted: RingId,
    /// Greeted and not yet taken, by ring, sender and number of the stream.
    parked: BTreeMap<(RingId, Rank, u32), Connection>,
}

impl Lobby {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is one call that cannot panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a connection may wait here.
    fn judge(&self, greeting: Greeting) -> Result<Hello, Option<Answer>> {
        let hello = match greeting {
            Greeting::Stranger => return Err(None),
            Greeting::OtherVersion => return Err(Some(Answer::OtherVersion)),
            Greeting::Peer(hello) => hello,
        };
        if hello.run != self.run {
            return Err(Some(Answer::OtherRun));
        }
        let Purpose::Ring { id, .. } = hello.purpose else { return Ok(hello) };
        let state = self.state();
        if id < state.wanted {
            Err(Some(Answer::Stale(state.wanted)))
        } else if state.parked.len() >= MAX_CONNECTIONS {
            Err(Some(Answer::Busy))
        } else {
            Ok(hello)
        }
    }

    /// Has a connection say what it is for, and puts it where it is waited for.
    async fn greet(self: Arc<Self>, stream: TcpStream) -> Result<(), Refusal> {
        Refusal::unless_it_speaks(&stream).await?;
        let mut stream = match &self.credentials {
            Some(credentials) => {
                let accepted = credentials.accept(stream, Port::Peers).await;
                accepted.map_err(Refusal::in_tls)?
            }
            None => Connection::plain(stream),
        };
        let broke = |error: io::Error| Refusal::Stranger(format!("a greeting broke off: {error}"));
        let greeting = Hello::receive(&mut stream).await.map_err(broke)?;
        match self.judge(greeting) {
            Err(None) => Err(Refusal::Stranger("it is no peer's".to_owned())),
            Err(Some(answer)) => {
                answer.send(&mut stream).await.map_err(broke)?;
                let reason = reason(answer);
                match answer {
                    // A peer that will come again.
                    Answer::Stale(_) | Answer::Busy | Answer::Accepted => {
                        tracing::debug!(%reason, "a peer's connection is not wanted");
                        Ok(())
                    }
                    Answer::OtherRun | Answer::OtherVersion => Err(Refusal::Stranger(format!(
                        "a peer's connection is not wanted: {reason}"
                    ))),
                }
            }
            Ok(Hello { purpose: Purpose::State, .. }) => {
                // There is a place before the joiner is told so.
                let Ok(place) = self.joiners.try_reserve() else {
                    return Answer::Busy.send(&mut stream).await.map_err(broke);
                };
                Answer::Accepted.send(&mut stream).await.map_err(broke)?;
                place.send(stream);
                Ok(())
            }
            Ok(Hello { purpose: Purpose::Ring { id, sender, stream: number }, .. }) => {
                Answer::Accepted.send(&mut stream).await.map_err(broke)?;
                let mut state = self.state();
                // The wanted ring may have moved on while the answer was sent.
                if id >= state.wanted {
                    state.parked.insert((id, sender, number), stream);
                    drop(state);
                    self.arrived.notify_waiters();
                }
                Ok(())
            }
        }
    }
}

impl Peers {
    /// From now on connections of rings older than `ring` are refused; those that waited are
    /// closed.
    pub fn advance(&self, ring: RingId) {
        let mut state = self.lobby.state();
        state.wanted = state.wanted.max(ring);
        let wanted = state.wanted;
        state.parked.retain(|(parked, ..), _| *parked >= wanted);
    }

    /// Waits until `peer` has connected for this stream of `ring`.
    pub(super) async fn accept(
        &self,
        ring: RingId,
        stream: u32,
        peer: &Peer,
        within: Duration,
    ) -> Result<Connection, PeerError> {
        let key = (ring, peer.rank, stream);
        let arrival = async {
            loop {
                let arrived = self.lobby.arrived.notified();
                tokio::pin!(arrived);
                // Enabled before the look, so that an arrival between look and wait is not missed.
                arrived.as_mut().enable();
                if let Some(connection) = self.lobby.state().parked.remove(&key) {
                    return connection;
                }
                arrived.await;
            }
        };
        timeout(within, arrival)
            .await
            .map_err(|_| PeerError::Absent { peer: peer.clone(), seconds: within.as_secs_f64() })
    }

    /// Connects to `peer` for this stream of `ring`, again and again until it answers or the time
    /// is over.
    pub(super) async fn connect(
        &self,
        ring: RingId,
        stream: u32,
        own_rank: Rank,
        peer: &Peer,
        within: Duration,
    ) -> Result<Connection, PeerError> {
        self.dial(Purpose::Ring { id: ring, sender: own_rank, stream }, peer, within).await
    }

    /// Connects to `peer` to fetch training state from it.
    pub(crate) async fn connect_for_state(
        &self,
        peer: &Peer,
        within: Duration,
    ) -> Result<Connection, PeerError> {
        self.dial(Purpose::State, peer, within).await
    }

    async fn dial(
        &self,
        purpose: Purpose,
        peer: &Peer,
        within: Duration,
    ) -> Result<Connection, PeerError> {
        let deadline = Instant::now() + within;
        let hello = Hello { run: self.lobby.run, purpose };
        loop {
            let calling = call(&peer.address, self.lobby.credentials.as_ref(), hello);
            let attempt = timeout_at(deadline, calling).await;
            let error = match attempt {
                Ok(Ok((stream, Answer::Accepted))) => return Ok(stream),
                Ok(Ok((_, Answer::Busy))) => {
                    io::Error::other("it has too many connections waiting")
                }
                Ok(Ok((_, answer))) => {
                    return Err(PeerError::Refused { peer: peer.clone(), reason: reason(answer) });
                }
                // A member that offers its state listens; a ring's neighbour may be on its way.
                Ok(Err(error)) if purpose == Purpose::State => {
                    return Err(PeerError::Lost { peer: peer.clone(), error });
                }
                Ok(Err(error)) => error,
                Err(_) => io::Error::new(io::ErrorKind::TimedOut, "it does not answer"),
            };
            if Instant::now() + RETRY_PAUSE >= deadline {
                let seconds = within.as_secs_f64();
                return Err(PeerError::Connect { peer: peer.clone(), seconds, error });
            }
            sleep(RETRY_PAUSE).await;
        }
    }
}

async fn call(
    address: &str,
    credentials: Option<&Arc<Credentials>>,
    hello: Hello,
) -> io::Result<(Connection, Answer)> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut stream = match credentials {
        Some(credentials) => credentials.connect(stream, Port::Peers).await?,
        None => Connection::plain(stream),
    };
    hello.send(&mut stream).await?;
    let answer = Answer::receive(&mut stream).await?;
    Ok((stream, answer))
}

fn reason(answer: Answer) -> String {
    match answer {
        Answer::Stale(ring) => format!("it is already in {ring}"),
        Answer::OtherRun => "it works for another run".into(),
        Answer::OtherVersion => "it speaks another protocol version; use one build".into(),
        Answer::Accepted | Answer::Busy => "it gave no reason".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::{Generation, Incarnation};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Nothing here takes nearly this long, however busy the machine is.
    const SOON: Duration = Duration::from_secs(45);

    /// What is waited for in vain.
    const SHORT: Duration = Duration::from_millis(100);

    fn ring(generation: u64) -> RingId {
        RingId { incarnation: Incarnation(1), generation: Generation(generation) }
    }

    async fn peers(run: &str) -> (Peers, SocketAddr) {
        let listener = PeerListener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.address();
        (listener.serve(Digest::of(run.as_bytes())).0, address)
    }

    fn peer(rank: u32, address: SocketAddr) -> Peer {
        Peer { rank: Rank(rank), name: format!("w{rank}"), address: address.to_string() }
    }

    #[tokio::test]
    async fn a_connection_of_an_older_generation_is_refused_and_told_why() {
        let (there, address) = peers("run").await;
        let (here, _) = peers("run").await;
        there.advance(ring(5));
        let error = here.connect(ring(4), 0, Rank(0), &peer(1, address), SOON).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, PeerError::Refused { .. }), "{text}");
        assert!(text.contains("rank 1 (w1 at") && text.contains("generation 5"), "{text}");
    }

    #[tokio::test]
    async fn a_connection_of_a_newer_generation_waits_until_it_is_wanted() {
        let (there, address) = peers("run").await;
        let (here, own) = peers("run").await;
        there.advance(ring(1));
        let mut out = here.connect(ring(3), 0, Rank(0), &peer(1, address), SOON).await.unwrap();
        let absent = there.accept(ring(2), 0, &peer(0, own), SHORT).await.unwrap_err();
        assert!(matches!(absent, PeerError::Absent { .. }), "{absent}");
        there.advance(ring(3));
        let mut taken = there.accept(ring(3), 0, &peer(0, own), SOON).await.unwrap();
        out.write_all(b"x").await.unwrap();
        assert_eq!(taken.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn the_streams_of_a_peer_are_told_apart() {
        let (there, address) = peers("run").await;
        let (here, own) = peers("run").await;
        let mut outs = Vec::new();
        for stream in [2, 0, 1] {
            let peer = peer(1, address);
            outs.push((stream, here.connect(ring(1), stream, Rank(0), &peer, SOON).await.unwrap()));
        }
        for (stream, out) in &mut outs {
            out.write_all(&[*stream as u8]).await.unwrap();
        }
        for stream in 0..3 {
            let mut taken = there.accept(ring(1), stream, &peer(0, own), SOON).await.unwrap();
            assert_eq!(u32::from(taken.read_u8().await.unwrap()), stream);
        }
        assert!(there.accept(ring(1), 3, &peer(0, own), SHORT).await.is_err());
    }

    #[tokio::test]
    async fn a_waiting_connection_is_closed_when_its_generation_is_passed_over() {
        let (there, address) = peers("run").await;
        let (here, _) = peers("run").await;
        let mut out = here.connect(ring(1), 0, Rank(0), &peer(1, address), SOON).await.unwrap();
        // The answer may arrive a moment before the connection is parked.
        while there.lobby.state().parked.is_empty() {
            tokio::task::yield_now().await;
        }
        there.advance(ring(2));
        assert_eq!(timeout(SOON, out.read(&mut [0])).await.unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn a_worker_of_another_run_is_refused() {
        let (_there, address) = peers("one").await;
        let (here, _) = peers("two").await;
        let error = here.connect(ring(1), 0, Rank(0), &peer(1, address), SOON).await.unwrap_err();
        assert!(error.to_string().contains("another run"), "{error}");
    }

    #[tokio::test]
    async fn a_peer_that_is_not_there_is_named_when_the_time_is_over() {
        // Nobody else gets a port that is bound, and nobody listens on it.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let (here, _) = peers("run").await;
        let error = here.connect(ring(1), 0, Rank(0), &peer(3, address), SHORT).await.unwrap_err();
        assert!(matches!(error, PeerError::Connect { .. }), "{error}");
        assert!(error.to_string().contains("rank 3 (w3"), "{error}");
    }

    #[tokio::test]
    async fn strangers_do_not_disturb_the_listener() {
        let (there, address) = peers("run").await;
        let (here, own) = peers("run").await;
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let _silent = TcpStream::connect(address).await.unwrap();
        let _out = here.connect(ring(1), 0, Rank(0), &peer(1, address), SOON).await.unwrap();
        assert!(there.accept(ring(1), 0, &peer(0, own), SOON).await.is_ok());
    }
}
