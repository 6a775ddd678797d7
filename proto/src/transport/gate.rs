//! Where connections come in.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::Counter;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::Port;
use crate::metrics;

/// Pause after a connection that could not be taken: out of file descriptors, most likely.
const PAUSE: Duration = Duration::from_millis(50);

/// Lines about refused connections are at least this far apart.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

/// Takes connections in and has each introduce itself.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    port: Port,
    patience: Duration,
    crowd: usize,
}

/// Why a connection is not taken in.
#[derive(Debug)]
pub enum Refusal {
    /// It has no certificate, or one that is not good.
    Certificate(io::Error),
    /// Its certificate is good, and of a role that may not do this.
    Role(String),
    /// It showed a token that is none.
    Token,
    /// It does not speak what is spoken here.
    Stranger(String),
    /// It said nothing in time.
    Silent,
    /// There were newer ones.
    Crowded,
    /// It hung up without a word: a health check, most often. Nobody was turned away.
    HungUp,
}

impl Refusal {
    /// What is wrong with a connection that was to show a certificate.
    #[must_use]
    pub fn in_tls(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::PermissionDenied => Self::Role(error.to_string()),
            _ => Self::Certificate(error),
        }
    }

    /// Waits until a connection says something, and leaves that there.
    ///
    /// # Errors
    /// [`Refusal::HungUp`] when it closes instead.
    pub async fn unless_it_speaks(stream: &TcpStream) -> Result<(), Self> {
        match stream.peek(&mut [0]).await {
            Ok(1..) => Ok(()),
            Ok(0) | Err(_) => Err(Self::HungUp),
        }
    }

    /// As the metric's label has it, and in words; nothing of who turned away by himself.
    fn told(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Certificate(error) => Some(("certificate", error.to_string())),
            Self::Role(reason) => Some(("role", reason.clone())),
            Self::Token => Some(("token", "it showed a token that is not known".to_owned())),
            Self::Stranger(reason) => Some(("stranger", reason.clone())),
            Self::Silent => Some(("silent", "it did not introduce itself in time".to_owned())),
            Self::Crowded => {
                Some(("crowded", "it said nothing, and gave way to newer ones".to_owned()))
            }
            Self::HungUp => None,
        }
    }
}

impl Gate {
    /// A gate of a port.
    #[must_use]
    pub fn new(port: Port) -> Self {
        Self { port, patience: Duration::from_secs(5), crowd: 256 }
    }

    /// Takes connections in for as long as it is polled. `greet` is called for each and ends when the
    /// connection has introduced itself and is handed on, or says why not; who takes longer than some
    /// seconds is hung up on.
    pub async fn keep<F>(self, listener: TcpListener, greet: impl Fn(TcpStream, SocketAddr) -> F)
    where
        F: Future<Output = Result<(), Refusal>> + Send + 'static,
    {
        let mut greetings = JoinSet::new();
        let mut crowd = Crowd::default();
        let mut complaints = Complaints::new(self.port);
        let mut trouble: Option<Instant> = None;
        for number in 0.. {
            let accepted = loop {
                // Those that have not had a moment are left alone, whoever comes: new ones wait in the
                // system's backlog, and those who are in the midst of a handshake get through it.
                let room = crowd.len() < self.crowd;
                let full = (!room).then(|| crowd.may_lose_one_at()).flatten();
                tokio::select! {
                    accepted = listener.accept(), if room => break accepted,
                    () = sleep_until(full.unwrap_or_else(Instant::now)), if !room => {
                        if let Some((oldest, from)) = crowd.lose_one() {
                            oldest.abort();
                            complaints.note(from, &Refusal::Crowded);
                        }
                    }
                    Some(greeted) = greetings.join_next() => {
                        // One that is aborted is off the list already.
                        let Ok((number, result)) = greeted else { continue };
                        if let (Some(from), Err(refusal)) = (crowd.remove(number), result) {
                            complaints.note(from, &refusal);
                        }
                    }
                    () = complaints.due() => complaints.tell(),
                }
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    if trouble.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) {
                        trouble = Some(Instant::now());
                        tracing::warn!(port = self.port.name(), %error, "cannot accept a connection");
                    }
                    sleep(PAUSE).await;
                    continue;
                }
            };
            // A stream that cannot be told so is as good, a little later.
            let _ = stream.set_nodelay(true);
            let greeting = timeout(self.patience, greet(stream, from));
            let task = greetings
                .spawn(async move { (number, greeting.await.unwrap_or(Err(Refusal::Silent))) });
            crowd.add(number, task, from);
        }
    }
}

/// Nobody gives way before he has had this long.
const MOMENT: Duration = Duration::from_millis(250);

/// Connections that have not introduced themselves, by age.
#[derive(Default)]
struct Crowd {
    all: BTreeMap<u64, Newcomer>,
    /// How many of each address.
    addresses: HashMap<IpAddr, usize>,
}

struct Newcomer {
    task: AbortHandle,
    from: SocketAddr,
    since: Instant,
}

impl Crowd {
    fn len(&self) -> usize {
        self.all.len()
    }

    fn add(&mut self, number: u64, task: AbortHandle, from: SocketAddr) {
        self.all.insert(number, Newcomer { task, from, since: Instant::now() });
        *self.addresses.entry(from.ip()).or_default() += 1;
    }

    fn remove(&mut self, number: u64) -> Option<SocketAddr> {
        let Newcomer { from, .. } = self.all.remove(&number)?;
        self.forget(from);
        Some(from)
    }

    fn forget(&mut self, from: SocketAddr) {
        if let Some(count) = self.addresses.get_mut(&from.ip()) {
            *count -= 1;
            if *count == 0 {
                self.addresses.remove(&from.ip());
            }
        }
    }

    /// Who gives way: the oldest one of the address that most of them are from. A flood from one
    /// machine is hard on that machine alone.
    fn first_to_go(&self) -> Option<(u64, &Newcomer)> {
        let (busiest, _) = self.addresses.iter().max_by_key(|(_, count)| **count)?;
        let of_it = |(_, newcomer): &(&u64, &Newcomer)| newcomer.from.ip() == *busiest;
        self.all.iter().find(of_it).map(|(number, newcomer)| (*number, newcomer))
    }

    fn may_lose_one_at(&self) -> Option<Instant> {
        self.first_to_go().map(|(_, newcomer)| newcomer.since + MOMENT)
    }

    fn lose_one(&mut self) -> Option<(AbortHandle, SocketAddr)> {
        let (number, _) = self.first_to_go()?;
        let Newcomer { task, from, .. } = self.all.remove(&number)?;
        self.forget(from);
        Some((task, from))
    }
}

/// Tells of those who are refused: counts each, and writes a line a second at most.
#[derive(Debug)]
pub struct Complaints {
    port: Port,
    refused: Counter<u64>,
    last: Option<Instant>,
    /// Since the last line, and what to say of the newest of them.
    untold: Option<(u64, SocketAddr, String)>,
}

impl Complaints {
    /// None yet.
    #[must_use]
    pub fn new(port: Port) -> Self {
        let refused = metrics::CONNECTIONS_REFUSED.counter();
        Self { port, refused, last: None, untold: None }
    }

    /// Somebody was refused.
    pub fn note(&mut self, from: SocketAddr, refusal: &Refusal) {
        let Some((label, text)) = refusal.told() else { return };
        let port = KeyValue::new("port", self.port.name());
        self.refused.add(1, &[port, KeyValue::new("reason", label)]);
        if self.port == Port::Page && matches!(refusal, Refusal::Silent | Refusal::Crowded) {
            // Browsers open connections that they may come to need.
            return;
        }
        let before = self.untold.take().map_or(0, |(count, ..)| count);
        self.untold = Some((before + 1, from, text));
        if self.last.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) {
            self.tell();
        }
    }

    /// Waits until there is a line to write; for ever when there is nothing to tell.
    async fn due(&self) {
        match (&self.untold, self.last) {
            (Some(_), Some(last)) => sleep_until(last + BETWEEN_LINES).await,
            _ => std::future::pending().await,
        }
    }

    fn tell(&mut self) {
        let Some((count, from, reason)) = self.untold.take() else { return };
        self.last = Some(Instant::now());
        let port = self.port.name();
        match count {
            1 => tracing::warn!(port, %from, "refused a connection: {reason}"),
            _ => tracing::warn!(port, %from, count, "refused connections; the newest: {reason}"),
        }
    }
}
