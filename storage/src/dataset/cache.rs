//! Decoded shards in memory, bounded; each is fetched once however many readers want it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

use super::Split;
use super::shard::Tokens;
use crate::Result;

/// A shard within its dataset.
pub(super) type ShardId = (Split, usize);

/// Keeps the shards used last, up to a budget of bytes.
#[derive(Debug)]
pub(super) struct ShardCache {
    budget: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<ShardId, Entry>,
    /// Counts accesses; the entry with the lowest mark was used longest ago.
    clock: u64,
}

#[derive(Debug, Default)]
struct Entry {
    /// Readers that come while the shard is on its way wait here for the one that fetches it. A
    /// failed fetch leaves the cell empty, so the next reader tries again.
    tokens: Arc<OnceCell<Arc<Tokens>>>,
    used: u64,
}

impl ShardCache {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, state: Mutex::default() }
    }

    /// The shard, by way of `fetch` when it is not in memory.
    pub(super) async fn get<F>(&self, id: ShardId, fetch: F) -> Result<Arc<Tokens>>
    where
        F: Future<Output = Result<Tokens>>,
    {
        let cell = {
            let mut state = self.lock();
            state.clock += 1;
            let now = state.clock;
            let entry = state.entries.entry(id).or_default();
            entry.used = now;
            Arc::clone(&entry.tokens)
        };
        if let Some(tokens) = cell.get() {
            return Ok(Arc::clone(tokens));
        }
        let tokens = cell.get_or_try_init(|| async { fetch.await.map(Arc::new) }).await?;
        self.evict(id);
        Ok(Arc::clone(tokens))
    }

    /// Drops shards, longest unused first, until the budget holds; never `keep`, which is in use.
    fn evict(&self, keep: ShardId) {
        let mut state = self.lock();
        let size = |entry: &Entry| entry.tokens.get().map_or(0, |tokens| tokens.bytes());
        let mut total: usize = state.entries.values().map(size).sum();
        while total > self.budget {
            let oldest = state
                .entries
                .iter()
                .filter(|&(&id, entry)| id != keep && entry.tokens.initialized())
                .min_by_key(|(_, entry)| entry.used)
                .map(|(&id, _)| id);
            let Some(entry) = oldest.and_then(|id| state.entries.remove(&id)) else { break };
            total -= size(&entry);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the map whole: every change above is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::Error;

    fn shard(index: usize) -> ShardId {
        (Split::Train, index)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn readers_that_come_together_share_one_fetch() {
        let cache = Arc::new(ShardCache::new(1000));
        let fetches = Arc::new(AtomicUsize::new(0));
        let readers = (0..16).map(|_| {
            let (cache, fetches) = (Arc::clone(&cache), Arc::clone(&fetches));
            tokio::spawn(async move {
                let fetch = async {
                    fetches.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    Ok(Tokens::Narrow(vec![7; 10]))
                };
                cache.get(shard(0), fetch).await.unwrap().len()
            })
        });
        for length in futures::future::join_all(readers).await {
            assert_eq!(length.unwrap(), 10);
        }
        assert_eq!(fetches.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn the_shard_unused_for_longest_goes_first() {
        let cache = ShardCache::new(50);
        let ten = || async { Ok(Tokens::Narrow(vec![0; 10])) };
        let never = || async { panic!("it should be in memory") };
        cache.get(shard(0), ten()).await.unwrap();
        cache.get(shard(1), ten()).await.unwrap();
        cache.get(shard(0), never()).await.unwrap();
        cache.get(shard(2), ten()).await.unwrap();
        cache.get(shard(0), never()).await.unwrap();
        cache.get(shard(2), never()).await.unwrap();
        let gone = cache.get(shard(1), async { Err(Error::Interrupted) }).await;
        assert!(gone.is_err());
    }

    #[tokio::test]
    async fn a_failed_fetch_is_tried_again() {
        let cache = ShardCache::new(50);
        assert!(cache.get(shard(0), async { Err(Error::Interrupted) }).await.is_err());
        let tokens = cache.get(shard(0), async { Ok(Tokens::Wide(vec![1])) }).await.unwrap();
        assert_eq!(*tokens, Tokens::Wide(vec![1]));
    }
}
