//! What a worker is told by whoever starts it, and what it finds out about its machine.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use looptrain_model::Device;
use looptrain_proto::transport::Credentials;
use looptrain_storage::{Reading, ReadingOptions, Store};
use tokio_util::sync::CancellationToken;

use crate::{Moments, WorkerError};

/// Tells a worker to leave, and why; clones tell the same worker.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    token: CancellationToken,
    reason: Arc<OnceLock<String>>,
}

impl Stop {
    /// Has the worker leave; of several reasons the first one counts.
    pub fn tell(&self, reason: impl Into<String>) {
        self.reason.get_or_init(|| reason.into());
        self.token.cancel();
    }

    /// Waits until the worker is told to leave; the reason.
    pub async fn told(&self) -> &str {
        self.token.cancelled().await;
        self.reason.get().map_or("told to stop", String::as_str)
    }
}

/// How to run a worker.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// URL of the coordinator, `http://HOST:PORT`.
    pub coordinator: String,
    /// Unique in the run.
    pub name: String,
    /// Where it computes.
    pub device: Device,
    /// Threads that compute; beside a GPU, those that add up what comes from it.
    pub threads: usize,
    /// Bytes of memory that this worker may use; without it, what the spec says, or the machine.
    pub memory: Option<u64>,
    /// Where peers are accepted; port 0 takes a free one. With an unspecified address (`0.0.0.0`,
    /// `[::]`) peers are told the address that this machine has towards the coordinator.
    pub peer_listen: SocketAddr,
    /// What this worker shows the coordinator and other workers, and asks of them; without it nothing is
    /// encrypted, and anybody is believed.
    pub credentials: Option<Arc<Credentials>>,
    /// Has the worker leave as soon as nobody waits for it: after the commit of the step it is
    /// computing, and when its saves are done.
    pub stop: Stop,
    /// How long the coordinator is tried.
    pub connect_timeout: Duration,
    /// How long a worker that has lost its coordinator keeps its state and looks for a new one at
    /// the same address; with zero it ends at once.
    pub reconnect_timeout: Duration,
    /// Where blocks of datasets are kept on the local disk, and shared with other workers.
    pub cache: Option<BlockCache>,
    /// For tests that hurt this worker at an exact moment.
    pub moments: Moments,
}

/// A cache of datasets on the local disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockCache {
    /// Where it is; made if need be.
    pub directory: PathBuf,
    /// How large it may be.
    pub bytes: u64,
    /// Also for a store that is on the local disk itself.
    pub always: bool,
}

impl WorkerSettings {
    /// A worker of one thread whose peers are on this machine.
    #[must_use]
    pub fn new(coordinator: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            coordinator: coordinator.into(),
            name: name.into(),
            device: Device::Cpu,
            threads: 1,
            memory: None,
            peer_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            credentials: None,
            stop: Stop::default(),
            connect_timeout: Duration::from_secs(30),
            reconnect_timeout: Duration::ZERO,
            cache: None,
            moments: Moments::default(),
        }
    }

    /// How this worker reads the datasets of a store.
    pub(crate) fn reading(&self, store: &Store) -> Reading {
        let cache = self.cache.iter().find(|cache| cache.always || store.is_remote());
        let disk = cache.map(|cache| (cache.directory.clone(), cache.bytes));
        Reading::new(ReadingOptions { disk, ..ReadingOptions::default() })
    }
}

/// The machine's name, for people; `unknown` when the machine does not tell it.
#[must_use]
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unknown".into())
}

/// The listener's address as peers are to dial it.
///
/// # Errors
/// When only this machine can reach it, though the coordinator is on another one.
pub(crate) fn reachable(
    listening: SocketAddr,
    coordinator: &str,
) -> Result<SocketAddr, WorkerError> {
    let elsewhere = |ip: IpAddr| !ip.is_loopback();
    if listening.ip().is_loopback() && facing(coordinator, |_| true).is_some_and(elsewhere) {
        return Err(WorkerError::PeerAddress { address: listening });
    }
    if !listening.ip().is_unspecified() {
        return Ok(listening);
    }
    // Who listens on all addresses of IPv6 is there for IPv4 as well.
    let heard = |target: &SocketAddr| target.is_ipv4() || listening.is_ipv6();
    let facing = facing(coordinator, heard).unwrap_or_else(|| {
        tracing::warn!(
            coordinator,
            "cannot tell this machine's address; peers get the loopback: say which with --peer-listen, where \
             [::]:0 is for IPv6 as well"
        );
        IpAddr::from([127, 0, 0, 1])
    });
    Ok(SocketAddr::new(facing, listening.port()))
}

/// The address from which this machine would talk to the first of the coordinator's addresses that is of
/// use. Connecting a datagram socket sends nothing; it only asks the system for the route.
fn facing(coordinator: &str, useful: impl Fn(&SocketAddr) -> bool) -> Option<IpAddr> {
    let authority = coordinator.split("://").nth(1)?.split('/').next()?;
    let mut targets = authority.to_socket_addrs().ok()?;
    let target = targets.find(useful)?;
    let any: IpAddr = match target {
        SocketAddr::V4(_) => IpAddr::from([0; 4]),
        SocketAddr::V6(_) => IpAddr::from([0u16; 8]),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(target).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_says_where_is_told_as_it_is() {
        let listening: SocketAddr = "10.1.2.3:4000".parse().unwrap();
        assert_eq!(reachable(listening, "http://127.0.0.1:1").unwrap(), listening);
    }

    #[test]
    fn an_address_that_says_anywhere_is_told_as_the_coordinator_would_see_it() {
        let listening: SocketAddr = "0.0.0.0:4000".parse().unwrap();
        let told = reachable(listening, "http://127.0.0.1:5000/").unwrap();
        assert_eq!(told, "127.0.0.1:4000".parse().unwrap());
        assert_eq!(reachable(listening, "nonsense").unwrap().port(), 4000);
        // Nobody listens where the coordinator is.
        let told = reachable(listening, "http://[::1]:5000").unwrap();
        assert_eq!(told, "127.0.0.1:4000".parse().unwrap());
    }

    #[test]
    fn an_address_that_only_this_machine_can_reach_is_no_use_to_a_coordinator_elsewhere() {
        let listening: SocketAddr = "127.0.0.1:4000".parse().unwrap();
        assert!(reachable(listening, "http://127.0.0.1:5000").is_ok());
        // Nothing is sent there: the system is asked for the route.
        if facing("http://192.0.2.1:5000", |_| true).is_some() {
            let error = reachable(listening, "http://192.0.2.1:5000").unwrap_err().to_string();
            assert!(error.contains("--peer-listen 0.0.0.0:0"), "{error}");
        }
    }
}
