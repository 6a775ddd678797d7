//! Training state from peer to peer on this machine.

use std::time::{Duration, Instant};

use looptrain_model::TrainState;
use looptrain_proto::{Digest, Rank, Step};
use tokio::task::JoinSet;

use crate::Moments;
use crate::memory::Memory;
use crate::reduce::tcp::{Peer, PeerError, PeerListener, Peers};
use crate::transfer::{self, FetchError, Item, Shelf};

/// The step whose state is offered.
const STEP: Step = Step(1);

/// All sources offer before they are asked.
const NO_WAIT: Duration = Duration::ZERO;

/// Why a state did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// No listener, though one on the loopback can always be had.
    #[error(transparent)]
    Listen(#[from] PeerError),
    /// Said by the code that workers run.
    #[error("{reason}")]
    Fetch {
        /// In its words.
        reason: String,
    },
    /// What arrived is not what was offered.
    #[error("the fetched state is not the one that was offered")]
    Different,
}

impl From<FetchError> for TransferError {
    fn from(error: FetchError) -> Self {
        Self::Fetch { reason: error.to_string() }
    }
}

/// Peers that offer a state on the loopback, and one that fetches it.
pub struct Transfers {
    parameters: usize,
    shelves: Vec<Shelf>,
    sources: Vec<Peer>,
    joiner: Peers,
    /// The sources' listeners and the tasks behind them, which end with this.
    _listening: Vec<Peers>,
    _serving: JoinSet<()>,
}

impl Transfers {
    /// `sources` peers with states of `parameters` parameters: three buffers of as many `f32`.
    ///
    /// # Errors
    /// When the system gives no port.
    pub async fn new(parameters: usize, sources: u32) -> Result<Self, TransferError> {
        let run = Digest::of(b"bench");
        let (mut shelves, mut peers, mut listening) = (Vec::new(), Vec::new(), Vec::new());
        let mut serving = JoinSet::new();
        for rank in (0..sources).map(Rank) {
            let listener = PeerListener::bind(([127, 0, 0, 1], 0).into()).await?;
            let address = listener.address().to_string();
            peers.push(Peer { rank, name: format!("source-{rank}"), address });
            let (served, joiners) = listener.serve(run);
            let shelf = Shelf::default();
            serving.spawn(transfer::serve(
                joiners,
                shelf.clone(),
                Memory::default(),
                Moments::default(),
            ));
            shelves.push(shelf);
            listening.push(served);
        }
        let (joiner, _) = PeerListener::bind(([127, 0, 0, 1], 0).into()).await?.serve(run);
        Ok(Self {
            parameters,
            shelves,
            sources: peers,
            joiner,
            _listening: listening,
            _serving: serving,
        })
    }

    /// Bytes of the state.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (3 * self.parameters * size_of::<f32>()) as u64
    }

    /// Fetches the state once and returns how long that took: from the first connection to the last
    /// verified chunk, the sources' hashing included.
    ///
    /// # Errors
    /// When it does not arrive, or not as it was.
    pub async fn fetch(&mut self) -> Result<Duration, TransferError> {
        let buffers = [3, 5, 7].map(|seed| buffer(self.parameters, seed));
        for shelf in &self.shelves {
            let [weights, first_moment, second_moment] = buffers.clone();
            // A state that was just put there has not been hashed yet.
            shelf.put(TrainState { step: STEP, weights, first_moment, second_moment });
        }
        let mut sources = self.sources.clone();
        let lengths = [self.parameters; 3];
        let start = Instant::now();
        let item = Item::State(STEP);
        let fetched = transfer::fetch(&self.joiner, &mut sources, item, &lengths, NO_WAIT).await?;
        let time = start.elapsed();
        match fetched {
            Some(fetched) if fetched.buffers == buffers => Ok(time),
            _ => Err(TransferError::Different),
        }
    }
}

/// Numbers that differ from place to place and from buffer to buffer.
fn buffer(length: usize, seed: u32) -> Vec<f32> {
    (0..length as u32).map(|index| (index.wrapping_mul(seed) % 65_521) as f32).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_state_arrives_whole_again_and_again() {
        let mut transfers = Transfers::new(100_000, 2).await.unwrap();
        assert_eq!(transfers.bytes(), 1_200_000);
        for _ in 0..2 {
            assert!(!transfers.fetch().await.unwrap().is_zero());
        }
    }
}
