//! Things in memory, bounded; each is fetched once however many readers want it.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

use crate::Result;

/// Keeps what was used lately, up to a budget of bytes.
///
/// What is to go is found by a clock's hand: it passes over what was used since it came by, and
/// takes the first that was not. So a hit costs a mark and no order is kept.
pub(super) struct Cache<K, V> {
    budget: usize,
    weigh: fn(&V) -> usize,
    state: Mutex<State<K, V>>,
}

struct State<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// All keys, the hand before the first.
    clock: VecDeque<K>,
    bytes: usize,
}

struct Entry<V> {
    /// Readers that come while it is on its way wait here for the one that fetches it. A failed
    /// fetch leaves the cell empty, so the next reader tries again.
    cell: Arc<OnceCell<V>>,
    bytes: usize,
    used: bool,
}

impl<K: Clone + Eq + Hash, V: Clone> Cache<K, V> {
    pub(super) fn new(budget: usize, weigh: fn(&V) -> usize) -> Self {
        let state = State { entries: HashMap::new(), clock: VecDeque::new(), bytes: 0 };
        Self { budget, weigh, state: Mutex::new(state) }
    }

    /// What is in memory under this key.
    pub(super) fn peek(&self, key: &K) -> Option<V> {
        let mut state = self.lock();
        let entry = state.entries.get_mut(key)?;
        entry.used = true;
        entry.cell.get().cloned()
    }

    /// What belongs to the key, by way of `fetch` when it is not in memory.
    pub(super) async fn get<F>(&self, key: &K, fetch: F) -> Result<V>
    where
        F: Future<Output = Result<V>>,
    {
        let cell = {
            let mut state = self.lock();
            let State { entries, clock, .. } = &mut *state;
            let entry = entries.entry(key.clone()).or_insert_with(|| {
                clock.push_back(key.clone());
                Entry { cell: Arc::default(), bytes: 0, used: false }
            });
            entry.used = true;
            Arc::clone(&entry.cell)
        };
        if let Some(value) = cell.get() {
            return Ok(value.clone());
        }
        let value = cell.get_or_try_init(|| fetch).await?.clone();
        self.keep(key, &value);
        Ok(value)
    }

    /// Counts what was fetched, and makes room for it.
    fn keep(&self, key: &K, value: &V) {
        let mut state = self.lock();
        let State { entries, clock, bytes } = &mut *state;
        // Others that waited for the same fetch come here, too; and it may be gone again.
        let Some(entry) = entries.get_mut(key).filter(|entry| entry.bytes == 0) else { return };
        entry.bytes = (self.weigh)(value).max(1);
        *bytes += entry.bytes;
        // Twice round takes whatever can go.
        for _ in 0..2 * clock.len() {
            if *bytes <= self.budget {
                break;
            }
            let Some(next) = clock.pop_front() else { break };
            let Some(entry) = entries.get_mut(&next) else { continue };
            // What is on its way stays, and what was asked for just now.
            let on_its_way = entry.bytes == 0 && Arc::strong_count(&entry.cell) > 1;
            if std::mem::take(&mut entry.used) || on_its_way || next == *key {
                clock.push_back(next);
            } else {
                *bytes -= entry.bytes;
                entries.remove(&next);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<K, V>> {
        // A panic elsewhere leaves the map whole: nothing above panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, V> std::fmt::Debug for Cache<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("budget", &self.budget).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::Error;

    fn cache(budget: usize) -> Cache<u32, Vec<u8>> {
        Cache::new(budget, Vec::len)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn readers_that_come_together_share_one_fetch() {
        let cache = Arc::new(cache(1000));
        let fetches = Arc::new(AtomicUsize::new(0));
        let readers = (0..16).map(|_| {
            let (cache, fetches) = (Arc::clone(&cache), Arc::clone(&fetches));
            tokio::spawn(async move {
                let fetch = async {
                    fetches.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    Ok(vec![7; 10])
                };
                cache.get(&0, fetch).await.unwrap().len()
            })
        });
        for length in futures::future::join_all(readers).await {
            assert_eq!(length.unwrap(), 10);
        }
        assert_eq!(fetches.load(Ordering::Relaxed), 1);
        assert_eq!(cache.lock().bytes, 10, "it is counted once");
    }

    #[tokio::test]
    async fn what_was_not_used_goes_before_what_was() {
        let cache = cache(50);
        let twenty = || async { Ok(vec![0; 20]) };
        for key in 0..3 {
            // The third makes the hand go round once: all have been used, the first goes.
            cache.get(&key, twenty()).await.unwrap();
        }
        assert!(cache.peek(&0).is_none());
        assert!(cache.peek(&2).is_some());
        cache.get(&3, twenty()).await.unwrap();
        assert!(cache.peek(&1).is_none(), "it was not used since the hand came by");
        assert!(cache.peek(&2).is_some() && cache.peek(&3).is_some());
    }

    #[tokio::test]
    async fn the_budget_holds_whatever_comes() {
        let cache = cache(100);
        for key in 0..500_u32 {
            let bytes = 1 + key as usize * 7 % 40;
            cache.get(&(key % 90), async { Ok(vec![0; bytes]) }).await.unwrap();
            let state = cache.lock();
            let sum: usize = state.entries.values().map(|entry| entry.bytes).sum();
            assert!(sum == state.bytes && sum <= 100, "{sum}");
            assert_eq!(state.clock.len(), state.entries.len());
        }
        cache.get(&1000, async { Ok(vec![0; 200]) }).await.unwrap();
        assert_eq!(cache.lock().entries.len(), 1, "too much alone stays until the next comes");
    }

    #[tokio::test]
    async fn a_failed_fetch_is_tried_again() {
        let cache = cache(50);
        assert!(cache.get(&0, async { Err(Error::Interrupted) }).await.is_err());
        assert!(cache.peek(&0).is_none());
        assert_eq!(cache.get(&0, async { Ok(vec![1]) }).await.unwrap(), [1]);
    }
}
