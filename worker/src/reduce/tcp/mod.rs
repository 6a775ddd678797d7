//! Ring all-reduce over TCP.
//!
//! Each worker owns one [`PeerListener`]; on a new generation it connects to the rank after it and
//! accepts the rank before it ([`Ring::form`]), as often as a ring has streams; all ranks have the
//! number from the same spec. A connection says first whom it comes from, for which [`RingId`], and
//! which stream it is: a connection for an older ring than the wanted one is refused, one for a newer
//! ring waits until this worker hears of that ring too. Nothing here has a time-out of its own once
//! the ring stands: a dead neighbour breaks the connection, a silent one is the coordinator's
//! business, which sends a new generation, on which the session drops the ring in mid-flight. A
//! silent coordinator breaks the session, and that drops the ring, too.

mod handshake;
mod peers;
mod ring;
mod transfer;

use std::fmt;
use std::io;
use std::net::SocketAddr;

use looptrain_proto::{Generation, Incarnation, Rank};

pub use peers::{PeerListener, Peers};
pub use ring::Ring;

/// Which ring a connection belongs to; a newer one is greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RingId {
    /// The coordinator that formed it.
    pub incarnation: Incarnation,
    /// The membership.
    pub generation: Generation,
}

impl fmt::Display for RingId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {} (incarnation {})", self.generation, self.incarnation)
    }
}

/// A member of a ring, as the others reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Position in the ring.
    pub rank: Rank,
    /// Name of the worker, for messages.
    pub name: String,
    /// host:port of its listener.
    pub address: String,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} ({} at {})", self.rank, self.name, self.address)
    }
}

/// Why a ring does not form or does not go on; names the peer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The listener's address cannot be had.
    #[error("cannot listen for peers on {address}: {error}; choose another address or port")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// A neighbour could not be reached in time.
    #[error("cannot connect to {peer} within {seconds:.1} s: {error}")]
    Connect {
        /// The neighbour.
        peer: Peer,
        /// How long it was tried.
        seconds: f64,
        /// The last failure.
        error: io::Error,
    },
    /// A neighbour answered that it does not want this connection.
    #[error("{peer} refused the connection: {reason}")]
    Refused {
        /// The neighbour.
        peer: Peer,
        /// Its answer.
        reason: String,
    },
    /// A neighbour did not connect in time.
    #[error("{peer} did not connect within {seconds:.1} s")]
    Absent {
        /// The neighbour.
        peer: Peer,
        /// How long it was awaited.
        seconds: f64,
    },
    /// A connection of the ring broke.
    #[error("lost {peer}: {error}")]
    Lost {
        /// The neighbour.
        peer: Peer,
        /// What the system said.
        error: io::Error,
    },
    /// A neighbour reduces something else.
    #[error("{peer} reduces {theirs} while this worker reduces {ours}")]
    Mismatch {
        /// The neighbour.
        peer: Peer,
        /// Its operation.
        theirs: String,
        /// This worker's operation.
        ours: String,
    },
    /// NCCL failed; what it says names the rank where it knows it.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Nccl(Box<crate::reduce::NcclError>),
    /// An earlier operation of this collective failed or was abandoned.
    #[error(
        "the collective was abandoned in the middle of an operation; a new generation is needed"
    )]
    Spent,
    /// The membership makes no sense.
    #[error("no ring can be formed of {world} members with this worker as rank {rank}")]
    NoSuchRank {
        /// This worker's rank.
        rank: Rank,
        /// Number of members.
        world: usize,
    },
}
