//! When a failed call is tried again: bounded, with jittered back-off, and only for what may pass.
//!
//! All backends are retried here and nowhere else (the clients underneath are told to try once), so
//! that one rule and one error hold for all of them, and faults can be injected below it.

use std::time::Duration;

use object_store::Error;

use crate::record::unique;

/// How often a call is tried, and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    /// At most, the first one included.
    pub(super) attempts: u32,
    /// After so much time no further attempt is begun.
    pub(super) budget: Duration,
    /// The longest pause after the first attempt; twice as long after each further one.
    pub(super) first_pause: Duration,
}

/// A call that failed for good.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) attempts: u32,
    pub(super) elapsed: Duration,
}

impl Retry {
    /// For a store that is far away: about half a minute of pauses in all.
    pub(super) const PATIENT: Self = Self {
        attempts: 10,
        budget: Duration::from_secs(120),
        first_pause: Duration::from_millis(100),
    };

    /// For a store whose every failure its callers are to see.
    pub(super) const NEVER: Self =
        Self { attempts: 1, budget: Duration::ZERO, first_pause: Duration::ZERO };

    /// The pause before the next attempt; `None` when there is to be none. `dice` is any number.
    pub(super) fn pause(&self, attempts: u32, elapsed: Duration, dice: u64) -> Option<Duration> {
        if attempts >= self.attempts || elapsed >= self.budget {
            return None;
        }
        let longest = self.first_pause.saturating_mul(1 << (attempts.max(1) - 1).min(7));
        // Between half of it and all: writers that failed together do not come back together.
        Some(longest / 2 + longest.mul_f64(0.5 * (dice >> 11) as f64 / (1_u64 << 53) as f64))
    }

    /// Tries `attempt` until it succeeds, cannot succeed, or has had its chances; `tell` hears of
    /// each failure that is not the last.
    pub(super) async fn run<T, F>(
        &self,
        mut attempt: impl FnMut() -> F,
        tell: impl Fn(u32, Duration, &Error),
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let begin = tokio::time::Instant::now();
        for attempts in 1.. {
            let error = match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let elapsed = begin.elapsed();
            let pause = self.pause(attempts, elapsed, unique()).filter(|_| may_pass(&error));
            let Some(pause) = pause else { return Err(Failure { error, attempts, elapsed }) };
            tell(attempts, pause, &error);
            tokio::time::sleep(pause).await;
        }
        unreachable!("the loop ends by returning")
    }
}

/// Whether the same call may succeed a little later.
pub(super) fn may_pass(error: &Error) -> bool {
    match error {
        // The system's errors (no space, no permission) do not go away by asking again.
        Error::Generic { store: "LocalFileSystem", .. } => false,
        Error::Generic { .. } => match status(error) {
            Some(status) => status >= 500 || matches!(status, 408 | 425 | 429),
            // No answer at all: connection, time-out, a body that broke off.
            None => true,
        },
        // Not that the object exists, for which Azure has the same status, but that another call on it is
        // under way.
        Error::AlreadyExists { .. } | Error::Precondition { .. } => {
            status(error) == Some(409) && !error.to_string().contains("BlobAlreadyExists")
        }
        _ => false,
    }
}

/// The status that the server answered with, which the client tells in words alone.
fn status(error: &Error) -> Option<u16> {
    let text = error.to_string();
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn answer(status: &str) -> Error {
        let source = format!("Server returned non-2xx status code: {status}: body").into();
        Error::Generic { store: "S3", source }
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for passing in ["500 Internal Server Error", "503 Slow Down", "429 Too Many", "408 x"] {
            assert!(may_pass(&answer(passing)), "{passing}");
        }
        for lasting in ["400 Bad Request", "301 Moved", "411 Length Required"] {
            assert!(!may_pass(&answer(lasting)), "{lasting}");
        }
        assert!(may_pass(&Error::Generic { store: "S3", source: "connection reset".into() }));
        let disk = Error::Generic { store: "LocalFileSystem", source: "no space left".into() };
        assert!(!may_pass(&disk));
        let (path, source) = (String::new(), || Box::new(answer("409 Conflict")));
        assert!(may_pass(&Error::AlreadyExists { path: path.clone(), source: source() }));
        let source = "412".into();
        assert!(!may_pass(&Error::AlreadyExists { path: path.clone(), source }));
        let azure = "409 Conflict: <Error><Code>BlobAlreadyExists</Code><Message>The blob exists.</Message></Error>";
        assert!(!may_pass(&Error::AlreadyExists { path, source: Box::new(answer(azure)) }));
    }

    #[test]
    fn pauses_grow_vary_and_end() {
        let retry = Retry::PATIENT;
        let (now, late) = (Duration::ZERO, retry.budget);
        for attempts in 1..retry.attempts {
            let [short, long] = [0, u64::MAX].map(|dice| retry.pause(attempts, now, dice).unwrap());
            let longest = retry.first_pause * (1 << (attempts - 1).min(7));
            assert!(short == longest / 2 && long > longest.mul_f64(0.99) && long <= longest);
            assert_eq!(retry.pause(attempts, late, 0), None);
        }
        assert_eq!(retry.pause(retry.attempts, now, 0), None);
        assert_eq!(Retry::NEVER.pause(1, now, 0), None);
    }

    #[tokio::test]
    async fn a_call_is_tried_so_many_times_and_the_failure_says_so() {
        let retry = Retry { first_pause: Duration::from_micros(10), ..Retry::PATIENT };
        let (tried, told) = (AtomicU32::new(0), AtomicU32::new(0));
        let tell = |_, _, _: &Error| {
            told.fetch_add(1, Ordering::Relaxed);
        };
        let attempt = || async {
            match tried.fetch_add(1, Ordering::Relaxed) {
                3 => Ok(7),
                _ => Err(answer("503 Service Unavailable")),
            }
        };
        assert_eq!(retry.run(attempt, tell).await.unwrap(), 7);
        assert_eq!((tried.into_inner(), told.load(Ordering::Relaxed)), (4, 3));

        let never = || async { Err::<(), _>(answer("503 Service Unavailable")) };
        assert_eq!(retry.run(never, tell).await.unwrap_err().attempts, retry.attempts);
        let wrong = || async { Err::<(), _>(answer("400 Bad Request")) };
        assert_eq!(retry.run(wrong, tell).await.unwrap_err().attempts, 1);
    }
}
