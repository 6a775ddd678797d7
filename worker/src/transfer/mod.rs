//! Training state from peer to peer: how a worker that joins a running job comes to hold what the
//! members hold, while they go on training.
//!
//! Told to offer a step, every member copies its committed state onto its [`Shelf`], and from then
//! on adds the reduced gradient of each commit. A joiner [`fetch`]es the state from all of them at
//! once, chunk by chunk, and then the gradients, which it applies itself: an update is a pure
//! function of state and gradient, so that it arrives at the members' bits without their waiting.
//! When the coordinator lets it in, it lacks a step or two.
//!
//! Nothing counts before it is verified: each source says the digests of its chunks, sources that
//! contradict the others are left out, and every chunk is hashed when it is here. A source that
//! dies leaves its chunks to the others.
//!
//! With a state or an update come the votes on the steps that led to it, so that whoever holds a state can
//! tell a later coordinator how it came to be, whether it was there or not.

mod fetch;
mod serve;
mod shelf;
mod wire;

#[cfg(test)]
mod tests;

pub(crate) use fetch::{FetchError, Fetched, fetch};
pub(crate) use serve::serve;
pub(crate) use shelf::Shelf;
pub(crate) use wire::Item;

/// Elements per chunk, 4 MiB: what is asked for, hashed and, when it arrives damaged, asked for
/// again at a time.
const CHUNK: usize = 1 << 20;
