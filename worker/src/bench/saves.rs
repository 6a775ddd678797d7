//! Saving a state that no training made, with the code that workers run.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use looptrain_model::{Layout, TrainState};
use looptrain_proto::{Step, spec};
use looptrain_storage::{Checkpoints, Error, Store, run_prefix};

use crate::state::Part;

/// The run that the saves are of.
const RUN: &str = ".bench-checkpoint";

/// The step that is saved, over and over.
const STEP: Step = Step(1);

/// A state and where it is saved.
pub struct Saves {
    store: Store,
    layout: Layout,
    state: TrainState,
    ranks: usize,
}

/// What one save took.
#[derive(Clone, Copy, Debug)]
pub struct Save {
    /// Of the slowest rank: how long it could not train.
    pub stall: Duration,
    /// From then until the last part was in the store, hashed and encoded.
    pub upload: Duration,
    /// Size of all parts.
    pub bytes: u64,
}

impl Saves {
    /// A state of about `bytes`, to be saved in `store` by `ranks` ranks.
    #[must_use]
    pub fn new(store: Store, bytes: u64, ranks: usize) -> Self {
        let hidden_size = if bytes < 256 << 20 { 128 } else { 1024 };
        let mut model = spec::Model {
            hidden_size,
            num_hidden_layers: 1,
            num_attention_heads: 8,
            intermediate_size: hidden_size * 11 / 4,
            vocab_size: 1024,
            rms_norm_eps: 1e-6,
            initializer_range: 0.02,
        };
        while state_bytes(&model) < bytes {
            model.num_hidden_layers += 1;
        }
        let layout = Layout::new(&model);
        let values = |seed: u32| -> Vec<f32> {
            let parameters = layout.parameters() as u32;
            (0..parameters).map(|index| (index.wrapping_mul(seed) % 65_521) as f32).collect()
        };
        let (weights, first_moment, second_moment) = (values(3), values(5), values(7));
        let state = TrainState { step: STEP, weights, first_moment, second_moment };
        Self { store, layout, state, ranks }
    }

    /// Ranks that save a part each.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// How long a plain copy of the state takes.
    #[must_use]
    pub fn copy(&self) -> Duration {
        let start = Instant::now();
        let copy = std::hint::black_box(self.state.clone());
        let time = start.elapsed();
        drop(copy);
        time
    }

    /// Saves the state as the ranks of a run do, all at the same time.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn save(&mut self) -> Result<Save, Error> {
        let mut stall = Duration::ZERO;
        let mut parts = Vec::new();
        for rank in 0..self.ranks {
            let start = Instant::now();
            parts.push(Part::copy(&self.layout, &self.state, rank, self.ranks));
            stall = stall.max(start.elapsed());
        }
        let checkpoints = Checkpoints::new(&self.store, RUN);
        let start = Instant::now();
        let saves = parts
            .into_iter()
            .enumerate()
            .map(|(rank, part)| part.save(&checkpoints, STEP, rank, self.ranks, BTreeMap::new()));
        let saved = try_join_all(saves).await?;
        let upload = start.elapsed();
        Ok(Save { stall, upload, bytes: saved.iter().map(|(entry, _)| entry.bytes).sum() })
    }

    /// How long the store's client takes to put the same bytes, in as many objects at the same time,
    /// with nothing else to do. The same ones, for a server may compress what it stores.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn bare(&self) -> Result<Duration, Error> {
        let TrainState { weights, first_moment, second_moment, .. } = &self.state;
        let all =
            [weights, first_moment, second_moment].map(|it| bytemuck::cast_slice::<_, u8>(it));
        let all = bytes::Bytes::from(all.concat());
        let each = all.len() / self.ranks;
        let bytes = (0..self.ranks).map(|rank| all.slice(rank * each..(rank + 1) * each));
        let start = Instant::now();
        let puts = bytes.enumerate().map(|(rank, bytes)| async move {
            self.store.put_bare(&format!("{}/bare-{rank}", run_prefix(RUN)), bytes).await
        });
        try_join_all(puts).await?;
        Ok(start.elapsed())
    }

    /// Removes what was written.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn clean_up(&self) -> Result<(), Error> {
        self.store.delete_prefix(&run_prefix(RUN)).await.map(drop)
    }
}

fn state_bytes(model: &spec::Model) -> u64 {
    model.parameters() * 3 * size_of::<f32>() as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_state_is_saved_in_as_many_parts_as_there_are_ranks_and_removed_again() {
        let store = Store::open("memory://").unwrap();
        let mut saves = Saves::new(store.clone(), 3 << 20, 2);
        let save = saves.save().await.unwrap();
        assert!((3 << 20..8 << 20).contains(&save.bytes), "{save:?}");
        saves.bare().await.unwrap();
        assert_eq!(store.list("runs/.bench-checkpoint").await.unwrap().len(), 4);
        saves.clean_up().await.unwrap();
        assert!(store.list("").await.unwrap().is_empty());
    }
}
