//! Ports of the loopback for servers that are started by others than the test itself.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// SeaweedFS adds this to a port for its gRPC.
const GRPC: u16 = 10_000;

/// Ports that a process of tests has for itself, as far as a number of a process tells.
const OWN: u16 = 128;

/// A port that nobody listens on, nor on the one that is 10,000 higher, and that nobody gets by
/// chance while its server is not there: each is handed out once, and all are below those that the
/// system gives to connections and listeners.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let process = (std::process::id() % u32::from(GRPC / OWN)) as u16;
    loop {
        let port = GRPC + (process * OWN + NEXT.fetch_add(1, Ordering::Relaxed)) % GRPC;
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free(port) && free(port + GRPC) {
            return port;
        }
    }
}
