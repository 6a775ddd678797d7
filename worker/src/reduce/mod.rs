//! Sums over ranks.
//!
//! [`Sums`] holds a gradient as integers whose sum does not depend on any order ([`exact`]), or as
//! floats in half the bytes or a quarter ([`fast`]); a [`Collective`] sums it over the ranks of one generation,
//! a [`Bucket`] at a time, so that the first are on their way while backward computes the last.
//! Either way every rank ends with the same bits: one of them adds up a segment, and the others
//! take over what it has. The session forms a collective per generation, uses it for every step and
//! drops it, with whatever it is doing, when a newer generation arrives.

mod bucket;
#[cfg(test)]
mod conformance;
pub mod exact;
pub mod fast;
#[cfg(feature = "cuda")]
pub mod nccl;
mod range;
mod sums;
pub mod tcp;

use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

pub use bucket::Bucket;
#[cfg(feature = "cuda")]
pub use nccl::NcclError;
pub use range::OutOfRange;
pub use sums::{Arithmetic, Sums};
pub use tcp::PeerError;

/// The all-reduce of one generation; each transport is a variant.
#[derive(Debug)]
pub enum Collective {
    /// A world of one rank: its own sums are the result.
    Alone,
    /// A ring of TCP connections.
    Tcp(Box<tcp::Ring>),
    /// A communicator of NCCL.
    #[cfg(feature = "cuda")]
    Nccl(Box<nccl::Group>),
}

/// Where a collective wants a rank's sums to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// In this process's memory.
    Host,
    /// Where they are summed: nobody else has any.
    Stay,
    /// On the device that sums them, each bucket as it becomes final.
    Device,
}

impl Collective {
    /// Number of ranks that take part.
    #[must_use]
    pub fn world(&self) -> usize {
        match self {
            Self::Alone => 1,
            Self::Tcp(ring) => ring.world(),
            #[cfg(feature = "cuda")]
            Self::Nccl(group) => group.world(),
        }
    }

    /// Where it wants a rank's sums to be.
    #[must_use]
    pub fn route(&self) -> Route {
        match self {
            Self::Alone => Route::Stay,
            Self::Tcp(_) => Route::Host,
            #[cfg(feature = "cuda")]
            Self::Nccl(_) => Route::Device,
        }
    }

    /// The sums over all ranks of what each of them gives: buckets in ascending number, as they
    /// become ready. None when `ready` ends before the last bucket, because what computes them has
    /// failed.
    ///
    /// Every rank calls this with the same `tag` (the step, so that ranks that have lost each other
    /// are told apart) and buckets of the same shape and arithmetic. `under_way` is called once,
    /// when numbers have gone out and the sum is not complete: never in a world of one. Dropping the
    /// future abandons the operation at once. It leaves the collective spent, as does any end but
    /// that with the sums, unless the world is of one.
    ///
    /// # Errors
    /// Names the neighbour that is gone or does something else.
    pub async fn all_reduce_as_ready(
        &mut self,
        tag: u64,
        mut ready: UnboundedReceiver<Bucket>,
        under_way: impl Fn() + Send + Sync + 'static,
    ) -> Result<Option<Reduced>, PeerError> {
        match self {
            Self::Alone => {
                let mut buckets = Vec::new();
                while let Some(bucket) = ready.recv().await {
                    let last = bucket.is_last_of(1);
                    buckets.push(bucket);
                    if last {
                        break;
                    }
                }
                let alone = |sums| Reduced { sums, blocked: Duration::ZERO };
                Ok(Sums::from_buckets(buckets).map(alone))
            }
            Self::Tcp(ring) => ring.all_reduce(tag, ready, under_way).await,
            #[cfg(feature = "cuda")]
            Self::Nccl(group) => {
                let sums = group.all_reduce(tag, ready, under_way).await?;
                // NCCL does not tell who waits for whom.
                Ok(sums.map(|sums| Reduced { sums, blocked: Duration::ZERO }))
            }
        }
    }

    /// The same of sums that are complete.
    ///
    /// # Errors
    /// As [`Collective::all_reduce_as_ready`].
    ///
    /// # Panics
    /// Never: the buckets of sums are complete.
    pub async fn all_reduce(&mut self, tag: u64, sums: Sums) -> Result<Reduced, PeerError> {
        let reduced = self.all_reduce_as_ready(tag, sums.all_ready(), || {}).await?;
        Ok(reduced.expect("the buckets of sums are complete"))
    }
}

/// What an all-reduce gives.
#[derive(Debug)]
pub struct Reduced {
    /// The same bits on all ranks.
    pub sums: Sums,
    /// The time in which the connection to the next rank took no more, of the stream where it was
    /// the longest; it tells a slow connection from a late rank.
    pub blocked: Duration,
}
