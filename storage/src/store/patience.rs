//! How long a call over a network may take before it counts as failed.
//!
//! The clients' own limits do not tell a slow line from a server that has died: their limit on the
//! whole request ends a large part on a slow line, and so does their limit on silence, for it runs
//! while a body is still being sent. Here a read is given up when nothing comes for a while, and
//! a write when it goes on for longer than the slowest line that is worth having.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, TryStreamExt};
use object_store::{ClientOptions, Error, GetResult, GetResultPayload, Result};
use tokio::time::timeout;

/// A server that says nothing for so long is taken for dead.
const SILENCE: Duration = Duration::from_secs(30);

/// Bytes a second of the slowest line that is worth having: a part of 8 MiB may take two minutes.
const SLOWEST: u64 = 64 << 10;

/// What clients over a network begin with: no limit but the one on connecting. `AWS_TIMEOUT` and the
/// like set one all the same.
pub(super) fn client() -> ClientOptions {
    ClientOptions::new().with_timeout_disabled()
}

/// How long the calls of a store may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience(Option<Duration>);

impl Patience {
    /// For a server.
    pub(super) const LIMITED: Self = Self(Some(SILENCE));

    /// For what is on this machine: however slow a disk is, there is no other.
    pub(super) const ENDLESS: Self = Self(None);

    /// The answer to a call that sends `bytes`.
    pub(super) async fn answer<T>(
        self,
        bytes: usize,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let Some(silence) = self.0 else { return call.await };
        let limit = silence + Duration::from_secs(bytes as u64 / SLOWEST);
        timeout(limit, call).await.unwrap_or_else(|_| Err(late(limit)))
    }

    /// All that comes.
    pub(super) async fn all<T>(self, items: impl Stream<Item = Result<T>>) -> Result<Vec<T>> {
        let mut items = std::pin::pin!(items);
        let mut all = Vec::new();
        while let Some(item) = self.answer(0, items.try_next()).await? {
            all.push(item);
        }
        Ok(all)
    }

    /// The body of an answer.
    pub(super) async fn body(self, got: GetResult) -> Result<Bytes> {
        let length = usize::try_from(got.range.end - got.range.start).unwrap_or_default();
        let GetResultPayload::Stream(mut chunks) = got.payload else { return got.bytes().await };
        let Some(first) = self.answer(0, chunks.try_next()).await? else { return Ok(Bytes::new()) };
        if first.len() == length {
            return Ok(first);
        }
        let mut body = BytesMut::with_capacity(length);
        body.extend_from_slice(&first);
        while let Some(chunk) = self.answer(0, chunks.try_next()).await? {
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }
}

fn late(limit: Duration) -> Error {
    let source = format!("no answer within {} s", limit.as_secs()).into();
    Error::Generic { store: "time-out", source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures::{StreamExt, stream};
    use tokio::time::{Instant, sleep};

    use super::*;

    /// What comes in such intervals.
    fn slow(seconds: u64, items: usize) -> impl Stream<Item = Result<Bytes>> + Send {
        stream::iter(0..items).then(move |_| async move {
            sleep(Duration::from_secs(seconds)).await;
            Ok(Bytes::from_static(b"x"))
        })
    }

    fn got(payload: impl Stream<Item = Result<Bytes>> + Send + 'static, length: u64) -> GetResult {
        let meta = object_store::ObjectMeta {
            location: "key".into(),
            last_modified: Default::default(),
            size: length,
            e_tag: None,
            version: None,
        };
        let payload = GetResultPayload::Stream(payload.boxed());
        let (range, attributes) = (0..length, Default::default());
        GetResult { payload, meta, range, attributes, extensions: Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_may_take_long_as_long_as_something_comes() {
        let begin = Instant::now();
        let body = Patience::LIMITED.body(got(slow(25, 20), 20)).await.unwrap();
        assert_eq!((body.len(), begin.elapsed()), (20, Duration::from_secs(500)));
        assert_eq!(Patience::LIMITED.all(slow(25, 4)).await.unwrap().len(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_to_come_is_given_up() {
        let begin = Instant::now();
        let stops = slow(1, 3).chain(slow(3600, 1));
        let error = Patience::LIMITED.body(got(stops, 4)).await.unwrap_err();
        assert!(error.to_string().contains("no answer within 30 s"), "{error}");
        assert_eq!(begin.elapsed(), Duration::from_secs(33));
        assert!(super::super::retry::may_pass(&error), "another connection may do");
        assert_eq!(Patience::ENDLESS.all(slow(3600, 2)).await.unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_may_take_as_long_as_a_slow_line_needs_for_it() {
        let send = |seconds| async move {
            sleep(Duration::from_secs(seconds)).await;
            Ok(())
        };
        assert!(Patience::LIMITED.answer(8 << 20, send(150)).await.is_ok());
        assert!(Patience::LIMITED.answer(8 << 20, send(170)).await.is_err());
        assert!(Patience::LIMITED.answer(100, send(31)).await.is_err());
    }
}
