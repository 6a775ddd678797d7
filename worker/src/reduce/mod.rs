//! Sums over ranks.
//!
//! [`Sums`] holds a gradient as integers whose sum does not depend on any order ([`exact`]), or as
//! floats in half the bytes ([`fast`]); a [`Collective`] sums it over the ranks of one generation.
//! Either way every rank ends with the same bits: one of them adds up a segment, and the others
//! take over what it has. The session forms a collective per generation, uses it for every step and
//! drops it, with whatever it is doing, when a newer generation arrives.

pub mod exact;
pub mod fast;
mod range;
mod sums;
pub mod tcp;

use std::time::Duration;

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
}

impl Collective {
    /// Number of ranks that take part.
    #[must_use]
    pub fn world(&self) -> usize {
        match self {
            Self::Alone => 1,
            Self::Tcp(ring) => ring.world(),
        }
    }

    /// Replaces `sums` by its element-wise sum over all ranks. Gives the time in which the
    /// connection to the next rank took no more, which tells a slow connection from a late rank.
    ///
    /// Every rank calls this with the same `tag` (the step, so that ranks that have lost each other
    /// are told apart) and sums of the same shape and arithmetic. Dropping the future abandons the operation
    /// at once; the collective is then spent, and `sums` holds no meaning.
    ///
    /// # Errors
    /// Names the neighbour that is gone or does something else; the collective is then spent.
    pub async fn all_reduce(&mut self, tag: u64, sums: &mut Sums) -> Result<Duration, PeerError> {
        self.all_reduce_watched(tag, sums, &|| {}).await
    }

    /// The same; `under_way` is called once, when numbers have gone out and the sum is not complete:
    /// never in a world of one.
    ///
    /// # Errors
    /// As [`Collective::all_reduce`].
    pub async fn all_reduce_watched(
        &mut self,
        tag: u64,
        sums: &mut Sums,
        under_way: &(dyn Fn() + Sync),
    ) -> Result<Duration, PeerError> {
        match self {
            Self::Alone => Ok(Duration::ZERO),
            Self::Tcp(ring) => ring.all_reduce(tag, sums, under_way).await,
        }
    }
}
