//! All-reduce over NCCL: sums stay in the memory of the devices, and go from one to the other without
//! their hosts.
//!
//! - [`library`]: NCCL's functions, found at run time;
//! - [`communicator`]: the owner of a raw communicator, which is aborted exactly once;
//! - [`group`]: a communicator at work, with a thread of its own.
//!
//! Each generation has a communicator of its own. Rank 0 makes a unique id and tells it through the
//! coordinator; with it all ranks begin to make the communicator, which goes on in the background.
//! Whoever drops it, in whatever state, has it aborted: by its own thread at the next look, or by another
//! one when that thread is stuck within a call. The next generation waits for that, since until then
//! the device may still write to the sums.

mod communicator;
mod group;
pub(crate) mod library;
#[cfg(any(test, feature = "emulator"))]
pub mod stand_in;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use looptrain_model::{DeviceError, Exchange};
use looptrain_proto::Rank;

use super::Collective;
use super::tcp::{Peer, PeerError, RingId};
use crate::session::Rendezvous;
pub use group::Group;
use group::Hold;
pub(crate) use group::ROOM;
pub(crate) use library::Library;
pub use library::NcclVersion;
#[cfg(test)]
pub(crate) use stand_in::StandIn;

/// Why there is no all-reduce over NCCL.
#[derive(Debug, thiserror::Error)]
pub enum NcclError {
    /// There is no such library.
    #[error("cannot load NCCL from {}: {error}", path.display())]
    Load {
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        error: String,
    },
    /// It is another one.
    #[error("{} is no NCCL that works here: it has no function {name}", path.display())]
    NoFunction {
        /// Where it is.
        path: PathBuf,
        /// What it lacks.
        name: &'static str,
    },
    /// It does not tell its version.
    #[error("NCCL of {} does not tell its version", path.display())]
    NoVersion {
        /// Where it is.
        path: PathBuf,
    },
    /// It is too old.
    #[error(
        "NCCL {found} is too old, {least} is the first that is let go of in time: install a newer one"
    )]
    TooOld {
        /// Its version.
        found: NcclVersion,
        /// The first that is new enough.
        least: NcclVersion,
    },
    /// It is known not to work.
    #[error(
        "NCCL {found} is one of {first} to {last}, with which a communicator cannot be relied on to form again: \
         install another one"
    )]
    Bad {
        /// Its version.
        found: NcclVersion,
        /// The first of those that are known to be bad.
        first: NcclVersion,
        /// The last of them.
        last: NcclVersion,
    },
    /// A function failed, or something in the background.
    #[error("NCCL {version}: {call} gives {result}{detail}")]
    Call {
        /// The library's version.
        version: NcclVersion,
        /// The function.
        call: &'static str,
        /// NCCL's name of what it gave.
        result: String,
        /// In NCCL's words, after a colon; empty when it has none.
        detail: String,
    },
    /// The communicator did not come to be in time.
    #[error("NCCL does not connect the {world} ranks within {seconds:.1} s")]
    Late {
        /// Ranks.
        world: usize,
        /// How long it was tried.
        seconds: f64,
    },
    /// The coordinator passes no id on any more.
    #[error("the coordinator passes rank 0's id of the communicator on no more")]
    Unheard,
    /// This worker's session takes no message.
    #[error(
        "cannot tell the other ranks the id of the communicator: the coordinator has not read for a long time"
    )]
    Untold,
    /// The sums of this rank are not where NCCL reaches them.
    #[error("the sums of this rank are not on its device")]
    Elsewhere,
    /// The coordinator passed no id on in time.
    #[error("rank 0's id of the communicator did not come within {seconds:.1} s")]
    NoId {
        /// How long it was awaited.
        seconds: f64,
    },
    /// It is of another kind.
    #[error("the id of the communicator has {bytes} bytes instead of {}", size_of::<library::UniqueId>())]
    NoSuchId {
        /// How many it has.
        bytes: usize,
    },
    /// Some rank reduces something else.
    #[error("not all ranks reduce {ours}, as this one does")]
    Mismatch {
        /// This worker's operation.
        ours: String,
    },
    /// A newer generation has taken its place.
    #[error("the communicator was abandoned")]
    Abandoned,
    /// The communicator before this one is still there.
    #[error(
        "NCCL has not let go of the communicator before this one within {seconds:.1} s, so the device may still \
         write to its memory; start this worker anew"
    )]
    Stuck {
        /// How long it was waited for.
        seconds: f64,
    },
    /// The device fails.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl NcclError {
    /// No other communicator of this process would help.
    pub(crate) fn is_fatal(&self) -> bool {
        matches!(self, Self::Stuck { .. } | Self::Device(_))
    }
}

/// What a worker needs to reduce over NCCL.
#[derive(Debug)]
pub(crate) struct Nccl {
    library: Arc<Library>,
    exchange: Arc<Exchange>,
    /// What the last communicator has on the device.
    last: Mutex<Option<Hold>>,
}

impl Nccl {
    pub(crate) fn new(library: Arc<Library>, exchange: Exchange) -> Self {
        Self { library, exchange: Arc::new(exchange), last: Mutex::default() }
    }

    /// Waits until the last communicator, which nobody wants any more, has let go of the device: until then
    /// it may write to the sums.
    pub(crate) async fn let_go(&self, within: Duration) -> Result<(), NcclError> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match last {
            Some(mut hold) => hold.end(within).await,
            None => Ok(()),
        }
    }

    /// Forms the communicator of one generation, of two ranks or more; the one before it has been let go of.
    pub(crate) async fn form(
        &self,
        id: RingId,
        rank: Rank,
        members: &[Peer],
        rendezvous: &mut Rendezvous,
        within: Duration,
    ) -> Result<Collective, NcclError> {
        let start = Instant::now();
        let left = || within.saturating_sub(start.elapsed());
        let unique = if rank == Rank(0) {
            let library = Arc::clone(&self.library);
            // It looks for network interfaces, which may take a moment.
            let made = tokio::task::spawn_blocking(move || library.unique_id()).await;
            let unique = made.map_err(|_| NcclError::Abandoned)??;
            if !rendezvous.tell(unique.to_vec()) {
                return Err(NcclError::Untold);
            }
            unique
        } else {
            let late = || NcclError::NoId { seconds: within.as_secs_f64() };
            let heard = tokio::time::timeout(left(), rendezvous.hear()).await;
            let heard = heard.map_err(|_| late())?.ok_or(NcclError::Unheard)?;
            let bytes = heard.len();
            heard.try_into().map_err(|_| NcclError::NoSuchId { bytes })?
        };
        let (group, formed) = Group::begin(
            Arc::clone(&self.library),
            Arc::clone(&self.exchange),
            (rank.0 as usize, members),
            unique,
            left(),
        );
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(group.hold());
        tracing::debug!(%id, %rank, version = %self.library.version(), "connecting over NCCL");
        formed.await.map_err(|_| NcclError::Abandoned)??;
        Ok(Collective::Nccl(Box::new(group)))
    }
}

/// The version of NCCL on this machine, if workers can reduce with it.
///
/// # Errors
/// When there is none, or one that does not work.
pub fn version() -> Result<NcclVersion, NcclError> {
    Ok(Library::open(&looptrain_model::nccl()?)?.version())
}

impl From<NcclError> for PeerError {
    fn from(error: NcclError) -> Self {
        Self::Nccl(Box::new(error))
    }
}

#[cfg(test)]
mod tests;
