//! What this worker waits for from the object store. A store that is away for a while costs its time
//! and nothing else: what is missing only because the store does not answer is asked for until it does.
//! The session tells the coordinator of a wait that lasts, which else would take it for a worker that is
//! stuck.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Pause before the store is asked again, which has been tried for a while by then.
const PAUSE: Duration = Duration::from_secs(1);

/// Nobody is told of shorter waits.
const LASTING: Duration = Duration::from_secs(5);

/// Waits of one worker.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waits(Arc<Mutex<Under>>);

#[derive(Debug, Default)]
struct Under {
    begun: u64,
    way: BTreeMap<u64, Wait>,
}

#[derive(Debug)]
struct Wait {
    what: String,
    since: Instant,
    /// What the store said last.
    said: Option<String>,
}

/// A wait that ends when this is dropped.
struct Waiting<'a> {
    waits: &'a Waits,
    number: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.waits.under().way.remove(&self.number);
    }
}

impl Waits {
    fn under(&self) -> MutexGuard<'_, Under> {
        // Every change is one call that cannot panic half-way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, what: String) -> Waiting<'_> {
        let mut under = self.under();
        under.begun += 1;
        let number = under.begun;
        under.way.insert(number, Wait { what, since: Instant::now(), said: None });
        Waiting { waits: self, number }
    }

    /// Asks for `what` until there is an answer, or an error that does not pass.
    ///
    /// # Errors
    /// The first one that does not pass.
    pub(crate) async fn until_answered<T, E: Display, F>(
        &self,
        what: String,
        passes: impl Fn(&E) -> bool,
        mut ask: impl FnMut() -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let waiting = self.begin(what);
        loop {
            let error = match ask().await {
                Err(error) if passes(&error) => error.to_string(),
                answer => return answer,
            };
            if let Some(wait) = self.under().way.get_mut(&waiting.number) {
                tracing::warn!(error, "waiting for the store: {}", wait.what);
                wait.said = Some(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What has been waited for the longest, if for long, and what the store said.
    pub(crate) fn lasting(&self) -> Option<Lasting> {
        let under = self.under();
        let oldest = under.way.values().min_by_key(|wait| wait.since)?;
        let waited = oldest.since.elapsed();
        if waited < LASTING {
            return None;
        }
        let (what, seconds) = (&oldest.what, waited.as_secs());
        let said = under.way.values().find_map(|wait| wait.said.as_deref());
        let detail = match said {
            Some(said) => format!("{what}: {said}"),
            None => format!("{what}, for {seconds} s"),
        };
        Some(Lasting { detail, failed: said.is_some() })
    }
}

/// A wait for the store that has lasted for some seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lasting {
    /// For what, and what the store says.
    pub detail: String,
    /// A call has been given up, retries included; else it is merely long.
    pub failed: bool,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_waited_for_and_told_of_when_it_lasts() {
        let (waits, asked) = (Waits::default(), AtomicU32::new(0));
        let ask = || async {
            tokio::time::sleep(Duration::from_secs(4)).await;
            match asked.fetch_add(1, Ordering::Relaxed) {
                2 => Ok(7),
                _ => Err("503".to_owned()),
            }
        };
        let answered = waits.until_answered("tokens".into(), |_: &String| true, ask);
        let watched = async {
            let mut told = Vec::new();
            for _ in 0..4 {
                tokio::time::sleep(Duration::from_secs(3)).await;
                told.push(waits.lasting());
            }
            told
        };
        let (answer, told) = tokio::join!(answered, watched);
        assert_eq!(answer, Ok(7));
        let after = Some(Lasting { detail: "tokens: 503".into(), failed: true });
        assert_eq!(told, [None, after.clone(), after.clone(), after], "after 3, 6, 9 and 12 s");
        assert_eq!(waits.lasting(), None, "it is over");
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_says_nothing_is_told_of_and_what_does_not_pass_is_not_asked_again() {
        let waits = Waits::default();
        let mute = waits.until_answered(
            "tokens".into(),
            |_: &String| true,
            || async { std::future::pending::<Result<(), String>>().await },
        );
        let watched = async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            waits.lasting()
        };
        let told = tokio::select! {
            _ = mute => None,
            told = watched => told,
        };
        assert_eq!(told, Some(Lasting { detail: "tokens, for 60 s".into(), failed: false }));
        assert_eq!(waits.lasting(), None, "nobody waits any more");
        let passes = |error: &String| error == "503";
        let asked = AtomicU32::new(0);
        let ask = || async {
            asked.fetch_add(1, Ordering::Relaxed);
            Err::<(), _>("404".to_owned())
        };
        assert_eq!(waits.until_answered("x".into(), passes, ask).await, Err("404".to_owned()));
        assert_eq!(asked.into_inner(), 1);
    }
}
