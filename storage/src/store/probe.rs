//! Whether a store is one that a run can rest on, found out before anything rests on it.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::future::join_all;

use super::{Retry, Store};
use crate::{Error, Result};

/// Writers that race for one object. A store that looks first and writes then, in two steps, lets more
/// than one of them win.
const RACING: usize = 16;

/// Questions that are asked to find out how long an answer takes.
const QUESTIONS: usize = 5;

/// What a small object took, there and back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// The shortest time of some questions for an object's size.
    pub round_trip: Duration,
    /// Bytes of the object.
    pub bytes: usize,
    /// Time to write it.
    pub write: Duration,
    /// Time to read it.
    pub read: Duration,
    /// How far the store's clock is ahead of this machine's, in seconds; behind when it is below 0. It
    /// is as exact as the store's times, which often are whole seconds, and the time to write.
    pub clock_ahead: f64,
}

impl Store {
    /// Asks once for an object that is not there: whether the store answers at all. Nothing is tried
    /// again, so a store that is not there is found out at once.
    ///
    /// # Errors
    /// What the store or the system said.
    pub async fn check_reachable(&self) -> Result<()> {
        let key = format!(".probe-{:016x}", crate::record::unique());
        Self { retry: Retry::NEVER, ..self.clone() }.info(&key).await.map(drop)
    }

    /// Writes an object of so many bytes, reads it, and deletes it again, whatever happens between.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn measure(&self, bytes: usize) -> Result<Measured> {
        let key = format!(".probe-{:016x}", crate::record::unique());
        let measured = self.measure_with(&key, bytes).await;
        let deleted = self.delete(&key).await;
        let measured = measured?;
        deleted.map(|()| measured)
    }

    async fn measure_with(&self, key: &str, bytes: usize) -> Result<Measured> {
        let content = Bytes::from(vec![b'.'; bytes]);
        let (begin, begun) = (Instant::now(), SystemTime::now());
        self.put(key, content).await?;
        let write = begin.elapsed();
        let ended = SystemTime::now();
        let mut round_trip = Duration::MAX;
        let mut modified = begun;
        for _ in 0..QUESTIONS {
            let begin = Instant::now();
            let info = self.info(key).await?;
            round_trip = round_trip.min(begin.elapsed());
            modified = info.ok_or_else(|| Error::NotFound { place: self.place(key) })?.modified;
        }
        let begin = Instant::now();
        self.get(key).await?;
        let read = begin.elapsed();
        // It was written at some time between the two.
        let seconds = |later: SystemTime, earlier| {
            later.duration_since(earlier).unwrap_or_default().as_secs_f64()
        };
        let clock_ahead = seconds(modified, ended) - seconds(begun, modified);
        Ok(Measured { round_trip, bytes, write, read, clock_ahead })
    }

    /// Makes sure that objects can be written and that put-if-absent has one winner, with probe
    /// objects that are deleted again.
    ///
    /// # Errors
    /// One line with what the store said and what to do.
    pub async fn check_writable(&self) -> Result<()> {
        let key = format!(".probe-{:016x}", crate::record::unique());
        let raced = self.race(&key).await;
        let deleted = match raced {
            // It is no use to wait for an answer again.
            Err(_) => Self { retry: Retry::NEVER, ..self.clone() }.delete(&key).await,
            Ok(_) => self.delete(&key).await,
        };
        match (raced, deleted) {
            (Err(Error::Unsupported { reason, .. }), _) => Err(self.unconditional(reason)),
            (Err(error), _) | (Ok(_), Err(error)) => Err(self.unwritable(error)),
            (Ok(0 | 1), Ok(())) => Ok(()),
            (Ok(_), Ok(())) => {
                Err(self.unconditional("it lets two writers create the same object".to_owned()))
            }
        }
    }

    /// How many of some writers believe that they have created the object. None may, of those whose
    /// answers got lost.
    async fn race(&self, key: &str) -> Result<usize> {
        // One is enough to find out that a store does not answer.
        let first = self.put_if_absent(key, "probe").await?;
        let second = self.put_if_absent(key, "probe").await?;
        if second {
            return Ok(1 + usize::from(first).max(1));
        }
        self.delete(key).await?;
        let writers = (0..RACING).map(|_| self.put_if_absent(key, "probe"));
        let won: Vec<bool> = join_all(writers).await.into_iter().collect::<Result<_>>()?;
        Ok(won.into_iter().filter(|won| *won).count())
    }

    fn unconditional(&self, reason: String) -> Error {
        Error::Unwritable {
            url: self.url.to_string(),
            reason,
            remedy: "use a store with conditional writes (If-None-Match)".to_owned(),
        }
    }

    fn unwritable(&self, error: Error) -> Error {
        let remedy = match self.url.split(':').next() {
            Some("s3") => "check the bucket, AWS_ENDPOINT_URL, AWS_REGION and the credentials",
            Some("gs") => "check the bucket and the credentials in GOOGLE_SERVICE_ACCOUNT",
            Some("az") => "check the container and the AZURE_STORAGE_ACCOUNT_* variables",
            _ => "change the permissions or choose another run.store",
        };
        let reason = match error {
            Error::Operation { reason, tries, .. } => format!("{reason}{tries}"),
            other => other.to_string(),
        };
        Error::Unwritable { url: self.url.to_string(), reason, remedy: remedy.to_owned() }
    }
}
