//! What a worker is told by whoever starts it, and what it finds out about its machine.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How to run a worker.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// URL of the coordinator, `http://HOST:PORT`.
    pub coordinator: String,
    /// Unique in the run.
    pub name: String,
    /// Threads that compute.
    pub threads: usize,
    /// Where peers are accepted; port 0 takes a free one. With an unspecified address (`0.0.0.0`,
    /// `[::]`) peers are told the address that this machine has towards the coordinator.
    pub peer_listen: SocketAddr,
    /// When cancelled, the worker leaves as soon as nobody waits for it: after the commit of the
    /// step it is computing, and when its saves are done.
    pub stop: CancellationToken,
    /// How long the coordinator is tried.
    pub connect_timeout: Duration,
}

impl WorkerSettings {
    /// A worker of one thread whose peers are on this machine.
    #[must_use]
    pub fn new(coordinator: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            coordinator: coordinator.into(),
            name: name.into(),
            threads: 1,
            peer_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            stop: CancellationToken::new(),
            connect_timeout: Duration::from_secs(30),
        }
    }
}

/// The machine's name, for people.
pub(crate) fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unknown".into())
}

/// The listener's address as peers are to dial it.
pub(crate) fn reachable(listening: SocketAddr, coordinator: &str) -> SocketAddr {
    if !listening.ip().is_unspecified() {
        return listening;
    }
    let facing = facing(coordinator).unwrap_or_else(|| {
        tracing::warn!(coordinator, "cannot tell this machine's address; peers get the loopback");
        IpAddr::from([127, 0, 0, 1])
    });
    SocketAddr::new(facing, listening.port())
}

/// The address from which this machine would talk to the coordinator. Connecting a datagram socket
/// sends nothing; it only asks the system for the route.
fn facing(coordinator: &str) -> Option<IpAddr> {
    let authority = coordinator.split("://").nth(1)?.split('/').next()?;
    let target = authority.to_socket_addrs().ok()?.next()?;
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
        assert_eq!(reachable(listening, "http://127.0.0.1:1"), listening);
    }

    #[test]
    fn an_address_that_says_anywhere_is_told_as_the_coordinator_would_see_it() {
        let listening: SocketAddr = "0.0.0.0:4000".parse().unwrap();
        let told = reachable(listening, "http://127.0.0.1:5000/");
        assert_eq!(told, "127.0.0.1:4000".parse().unwrap());
        assert_eq!(reachable(listening, "nonsense").port(), 4000);
    }
}
