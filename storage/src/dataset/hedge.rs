//! Reads that are slow get company: a second read of the same bytes races the first, and whichever
//! is done first counts.
//!
//! What is slow is found by looking at reads before: twice what 19 of 20 took. And since a store that
//! is slow for all must not get twice the load, one read in ten can have company, no more, but for a
//! few at a time. (J. Dean, L. A. Barroso, "The tail at scale", Communications of the ACM 56, 2013.)

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{Either, select};
use tokio::time::{Instant, sleep};

use crate::Result;

/// Reads that are looked at.
const RECENT: usize = 64;

/// Before so many reads nobody knows what is slow: [`UNKNOWN`] is.
const FEW: usize = 16;
const UNKNOWN: Duration = Duration::from_millis(500);

/// However the reads before were, what takes less is not slow, and what takes more is.
const LEAST: Duration = Duration::from_millis(20);
const MOST: Duration = Duration::from_secs(2);

/// One second read for so many first ones, and so many in stock at most.
const ALLOWANCE: u32 = 10;
const STOCK: u32 = 8;

/// Which read of the same bytes was first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Winner {
    /// There was no other.
    Alone,
    /// The first of two.
    First,
    /// The second of two.
    Second,
}

/// When to read for the second time.
#[derive(Debug)]
pub(super) struct Hedge(Mutex<State>);

#[derive(Debug)]
struct State {
    recent: VecDeque<Duration>,
    /// Second reads that may begin, times [`ALLOWANCE`].
    credit: u32,
}

impl Default for Hedge {
    fn default() -> Self {
        Self(Mutex::new(State { recent: VecDeque::new(), credit: STOCK * ALLOWANCE }))
    }
}

impl Hedge {
    /// Reads once, or twice when that takes long; the first that succeeds, or the last error.
    pub(super) async fn read<T, F>(&self, read: impl Fn() -> F) -> (Result<T>, Winner)
    where
        F: Future<Output = Result<T>>,
    {
        let begin = Instant::now();
        let delay = self.delay();
        let mut first = pin!(read());
        let slow = match select(first.as_mut(), pin!(sleep(delay))).await {
            Either::Left((done, _)) => {
                self.learn(begin.elapsed());
                return (done, Winner::Alone);
            }
            Either::Right(_) => self.spend(),
        };
        if !slow {
            let done = first.await;
            self.learn(begin.elapsed());
            return (done, Winner::Alone);
        }
        let second = pin!(read());
        let (done, winner) = match select(first, second).await {
            Either::Left((Ok(done), _)) => (Ok(done), Winner::First),
            Either::Right((Ok(done), _)) => (Ok(done), Winner::Second),
            Either::Left((Err(_), second)) => (second.await, Winner::Second),
            Either::Right((Err(_), first)) => (first.await, Winner::First),
        };
        self.learn(begin.elapsed());
        (done, winner)
    }

    /// After what time a read is slow.
    fn delay(&self) -> Duration {
        let state = self.lock();
        if state.recent.len() < FEW {
            return UNKNOWN;
        }
        let mut sorted: Vec<_> = state.recent.iter().copied().collect();
        sorted.sort_unstable();
        (2 * sorted[sorted.len() * 19 / 20]).clamp(LEAST, MOST)
    }

    fn learn(&self, took: Duration) {
        let mut state = self.lock();
        state.recent.push_back(took);
        if state.recent.len() > RECENT {
            state.recent.pop_front();
        }
        state.credit = (state.credit + 1).min(STOCK * ALLOWANCE);
    }

    /// Whether a second read may begin.
    fn spend(&self) -> bool {
        let mut state = self.lock();
        let left = state.credit.checked_sub(ALLOWANCE);
        state.credit = left.unwrap_or(state.credit);
        left.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change above is a single step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::Error;

    const QUICK: Duration = Duration::from_millis(1);
    const STUCK: Duration = Duration::from_secs(600);

    /// One that knows reads of a millisecond.
    async fn experienced() -> Hedge {
        let hedge = Hedge::default();
        for _ in 0..FEW {
            assert_eq!(reads(&hedge, &[Ok(QUICK)]).await, (Ok(0), Winner::Alone));
        }
        hedge
    }

    /// Reads that take so long each and succeed or fail; which one counts.
    async fn reads(
        hedge: &Hedge,
        all: &[std::result::Result<Duration, Duration>],
    ) -> (std::result::Result<usize, String>, Winner) {
        let next = AtomicUsize::new(0);
        let (done, winner) = hedge
            .read(|| {
                let index = next.fetch_add(1, Ordering::Relaxed);
                async move {
                    sleep(all[index].unwrap_or_else(|failing| failing)).await;
                    all[index].map(|_| index).map_err(|_| Error::Interrupted)
                }
            })
            .await;
        (done.map_err(|error| error.to_string()), winner)
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_that_is_stuck_is_overtaken_by_a_second_one() {
        let hedge = experienced().await;
        let begin = Instant::now();
        assert_eq!(reads(&hedge, &[Ok(STUCK), Ok(QUICK)]).await, (Ok(1), Winner::Second));
        assert!(begin.elapsed() >= LEAST && begin.elapsed() < UNKNOWN, "{:?}", begin.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_still_counts_when_it_is_done_first() {
        let hedge = experienced().await;
        let slow = LEAST + Duration::from_millis(100);
        assert_eq!(reads(&hedge, &[Ok(slow), Ok(STUCK)]).await, (Ok(0), Winner::First));
    }

    #[tokio::test(start_paused = true)]
    async fn one_of_two_may_fail() {
        let slow = LEAST + Duration::from_millis(100);
        let read = async |all: &[_]| reads(&experienced().await, all).await;
        assert_eq!(read(&[Err(slow), Ok(2 * slow)]).await, (Ok(1), Winner::Second));
        assert_eq!(read(&[Ok(2 * slow), Err(QUICK)]).await, (Ok(0), Winner::First));
        assert!(read(&[Err(slow), Err(slow)]).await.0.is_err());
        let quick = read(&[Err(QUICK)]).await;
        assert!(quick.0.is_err() && quick.1 == Winner::Alone, "what fails soon has no company");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_is_slow_for_all_does_not_get_twice_the_load() {
        let hedge = experienced().await;
        // Slower than it has ever been; too few of them to be taken for usual.
        let slow = LEAST + Duration::from_millis(15);
        let mut second = 0;
        for _ in 0..STOCK + 4 {
            let (_, winner) = reads(&hedge, &[Ok(slow), Ok(STUCK)]).await;
            second += u32::from(winner != Winner::Alone);
        }
        assert!((1..=STOCK + 1).contains(&second), "{second}");
    }
}
