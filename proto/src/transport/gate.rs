//! Where connections come in.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
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
    /// It does not speak what is spoken here.
    Stranger(String),
    /// It said nothing in time.
    Silent,
    /// There were newer ones.
    Crowded,
    /// It hung up before it was through: a health check, most often. Nobody was turned away.
    HungUp,
}

impl Refusal {
    /// What is wrong with a connection that was to show a certificate.
    #[must_use]
    pub fn in_tls(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => Self::HungUp,
            _ => Self::Certificate(error),
        }
    }

    /// As the metric's label has it.
    fn label(&self) -> &'static str {
        match self {
            Self::Certificate(_) => "certificate",
            Self::Role(_) => "role",
            Self::Stranger(_) => "stranger",
            Self::Silent => "silent",
            Self::Crowded => "crowded",
            Self::HungUp => "hung up",
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Certificate(error) => error.to_string(),
            Self::Role(reason) | Self::Stranger(reason) => reason.clone(),
            Self::Silent => "it did not introduce itself in time".to_owned(),
            Self::Crowded => "it said nothing, and gave way to newer ones".to_owned(),
            Self::HungUp => "it hung up".to_owned(),
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
        // By age.
        let mut crowd: BTreeMap<u64, (AbortHandle, SocketAddr)> = BTreeMap::new();
        let mut complaints = Complaints::new(self.port);
        for number in 0.. {
            let accepted = loop {
                tokio::select! {
                    accepted = listener.accept() => break accepted,
                    Some(greeted) = greetings.join_next() => {
                        // One that is aborted is off the list already.
                        let Ok((number, result)) = greeted else { continue };
                        if let (Some((_, from)), Err(refusal)) = (crowd.remove(&number), result) {
                            complaints.note(from, &refusal);
                        }
                    }
                    () = complaints.due() => complaints.tell(),
                }
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(port = self.port.name(), %error, "cannot accept a connection");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            if crowd.len() >= self.crowd
                && let Some((_, (oldest, from))) = crowd.pop_first()
            {
                oldest.abort();
                complaints.note(from, &Refusal::Crowded);
            }
            // A stream that cannot be told so is as good, a little later.
            let _ = stream.set_nodelay(true);
            let greeting = timeout(self.patience, greet(stream, from));
            let task = greetings
                .spawn(async move { (number, greeting.await.unwrap_or(Err(Refusal::Silent))) });
            crowd.insert(number, (task, from));
        }
    }
}

/// Tells of refused connections: counts each, and writes a line now and then.
pub(super) struct Complaints {
    port: Port,
    refused: Counter<u64>,
    last: Option<Instant>,
    /// Since the last line, and what to say of the newest of them.
    untold: Option<(u64, SocketAddr, String)>,
}

impl Complaints {
    fn new(port: Port) -> Self {
        let refused = metrics::CONNECTIONS_REFUSED.counter();
        Self { port, refused, last: None, untold: None }
    }

    fn note(&mut self, from: SocketAddr, refusal: &Refusal) {
        if matches!(refusal, Refusal::HungUp) {
            return;
        }
        let port = KeyValue::new("port", self.port.name());
        self.refused.add(1, &[port, KeyValue::new("reason", refusal.label())]);
        if self.port == Port::Page && matches!(refusal, Refusal::Silent | Refusal::Crowded) {
            // Browsers open connections that they may come to need.
            return;
        }
        let before = self.untold.take().map_or(0, |(count, ..)| count);
        self.untold = Some((before + 1, from, refusal.text()));
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
