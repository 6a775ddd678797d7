//! A formed ring: connections from the rank before, and as many to the rank after.
//!
//! A pair of them is a stream. Bucket `b` goes through stream `b` modulo their number on every rank,
//! so that no order has to be agreed upon; each stream is a task of its own, which reduces its
//! buckets one after the other. Where a step's order of additions matters, it is that within a
//! bucket: the number of streams changes no bit.

use std::future::poll_fn;
use std::sync::{Arc, Once};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::try_join_all;
use looptrain_proto::Rank;
use looptrain_proto::transport::Connection;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

use super::transfer::{self, Failure, Header, Transfer};
use super::{Peer, PeerError, Peers, RingId};
use crate::reduce::{Bucket, Collective, Reduced, Sums};

/// Words received at a time: 64 KiB, small enough to stay in a near cache between the read and the
/// addition.
const SCRATCH: usize = 1 << 13;

/// Bytes under way to a rank of the same machine, before the system doubles them. What is copied into
/// the system is then copied out again while it is still in a cache. The way to another machine
/// is as long as the system finds it to be, so there the system chooses.
const SEND_BUFFER_WITHIN_A_MACHINE: usize = 64 << 10;

/// This worker's place in a ring of two or more.
#[derive(Debug)]
pub struct Ring {
    place: Arc<Place>,
    /// By number; empty while an operation runs and when one has failed or was dropped, for that
    /// leaves bytes behind.
    streams: Vec<Stream>,
}

#[derive(Debug)]
struct Place {
    rank: usize,
    world: usize,
    previous: Peer,
    next: Peer,
    streams: usize,
}

/// One of the ways around the ring.
#[derive(Debug)]
struct Stream {
    number: u32,
    previous: Connection,
    next: Connection,
    scratch: Vec<i64>,
}

/// What a stream has done for an all-reduce.
struct Share {
    stream: Stream,
    buckets: Vec<Bucket>,
    blocked: Duration,
}

/// Why an all-reduce has no sums.
enum Stop {
    /// There are no more buckets to come, and the last one has not come.
    NoMoreBuckets,
    Peer(PeerError),
}

impl Ring {
    /// Forms the ring of one generation: connects to the rank after this one and waits for the
    /// rank before it, as often as there are `streams`, the same number on all ranks. Older rings
    /// are given up by this call.
    ///
    /// # Errors
    /// Names the neighbour that could not be reached, refused, or did not come within the time.
    pub async fn form(
        peers: &Peers,
        id: RingId,
        rank: Rank,
        members: &[Peer],
        streams: u32,
        within: Duration,
    ) -> Result<Collective, PeerError> {
        let (own, world) = (rank.0 as usize, members.len());
        if own >= world {
            return Err(PeerError::NoSuchRank { rank, world });
        }
        peers.advance(id);
        if world == 1 {
            return Ok(Collective::Alone);
        }
        let (previous, next) = (&members[(own + world - 1) % world], &members[(own + 1) % world]);
        let streams = try_join_all((0..streams.max(1)).map(|number| async move {
            let (incoming, outgoing) = tokio::try_join!(
                peers.accept(id, number, previous, within),
                peers.connect(id, number, rank, next, within),
            )?;
            if is_within_this_machine(outgoing.tcp()) {
                // Without it the sum is the same, and takes longer.
                let _ = SockRef::from(outgoing.tcp())
                    .set_send_buffer_size(SEND_BUFFER_WITHIN_A_MACHINE);
            }
            let scratch = vec![0; SCRATCH];
            Ok::<_, PeerError>(Stream { number, previous: incoming, next: outgoing, scratch })
        }));
        let streams = streams.await?;
        let place = Place {
            rank: own,
            world,
            previous: previous.clone(),
            next: next.clone(),
            streams: streams.len(),
        };
        Ok(Collective::Tcp(Box::new(Self { place: Arc::new(place), streams })))
    }

    pub(crate) fn world(&self) -> usize {
        self.place.world
    }

    /// See [`Collective::all_reduce_as_ready`].
    pub(crate) async fn all_reduce(
        &mut self,
        tag: u64,
        ready: UnboundedReceiver<Bucket>,
        under_way: impl Fn() + Send + Sync + 'static,
    ) -> Result<Option<Reduced>, PeerError> {
        let streams = std::mem::take(&mut self.streams);
        if streams.is_empty() {
            return Err(PeerError::Spent);
        }
        let first = Once::new();
        let under_way: Arc<dyn Fn() + Send + Sync> = Arc::new(move || first.call_once(&under_way));
        let (mut running, mut ways) = (JoinSet::new(), Vec::new());
        for stream in streams {
            let (way, buckets) = unbounded_channel();
            ways.push(way);
            let place = Arc::clone(&self.place);
            running.spawn(stream.reduce(place, tag, buckets, Arc::clone(&under_way)));
        }
        let handed_out = async { hand_out(ready, ways).await.ok_or(Stop::NoMoreBuckets) };
        let reduced = async {
            let mut shares = Vec::new();
            while let Some(share) = running.join_next().await {
                let share = share.unwrap_or_else(|error| {
                    // Nobody aborts it while it is waited for.
                    std::panic::resume_unwind(error.into_panic())
                });
                shares.push(share.map_err(Stop::Peer)?);
            }
            Ok(shares)
        };
        let shares = match tokio::try_join!(handed_out, reduced) {
            Ok(((), shares)) => shares,
            Err(Stop::NoMoreBuckets) => return Ok(None),
            Err(Stop::Peer(error)) => return Err(error),
        };
        let (mut buckets, mut blocked) = (Vec::new(), Duration::ZERO);
        for share in shares {
            buckets.extend(share.buckets);
            blocked = blocked.max(share.blocked);
            self.streams.push(share.stream);
        }
        self.streams.sort_unstable_by_key(|stream| stream.number);
        Ok(Sums::from_buckets(buckets).map(|sums| Reduced { sums, blocked }))
    }
}

/// Gives each stream its buckets, as soon as they are there; none when there are no more before the
/// last.
async fn hand_out(
    mut ready: UnboundedReceiver<Bucket>,
    mut ways: Vec<UnboundedSender<Bucket>>,
) -> Option<()> {
    let streams = ways.len();
    loop {
        let bucket = ready.recv().await?;
        let last = bucket.is_last_of(1);
        // Streams that have nothing to do end, before a neighbour that is done can go away.
        ways.truncate(bucket.cut.buckets);
        if let Some(way) = ways.get(bucket.number() % streams) {
            // A stream that has failed takes no more, and says why.
            let _ = way.send(bucket);
        }
        if last {
            return Some(());
        }
    }
}

impl Stream {
    /// Reduces the buckets of this stream, in the order in which all ranks have them.
    async fn reduce(
        mut self,
        place: Arc<Place>,
        tag: u64,
        mut ready: UnboundedReceiver<Bucket>,
        under_way: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Share, PeerError> {
        let (mut buckets, mut blocked, mut last) = (Vec::new(), Duration::ZERO, false);
        while !last {
            let next = poll_fn(|cx| self.poll_bucket(cx, &mut ready)).await;
            let Some(mut bucket) = next.map_err(|failure| place.error(failure))? else { break };
            let Self { previous, next, scratch, .. } = &mut self;
            let (seat, operation) = ((place.rank, place.world), (tag, bucket.number()));
            let mut transfer =
                Transfer::new(seat, operation, bucket.words_mut(), scratch).watched(&*under_way);
            let done = poll_fn(|cx| transfer.poll(cx, previous, next)).await;
            done.map_err(|failure| place.error(failure))?;
            blocked += transfer.blocked();
            last = bucket.is_last_of(place.streams);
            buckets.push(bucket);
        }
        Ok(Share { stream: self, buckets, blocked })
    }

    /// The next bucket to reduce; none when no more come. Meanwhile notices that a neighbour is gone,
    /// the previous one unless it has sent something already.
    fn poll_bucket(
        &mut self,
        cx: &mut Context<'_>,
        ready: &mut UnboundedReceiver<Bucket>,
    ) -> Poll<Result<Option<Bucket>, Failure>> {
        if let Poll::Ready(bucket) = ready.poll_recv(cx) {
            return Poll::Ready(Ok(bucket));
        }
        transfer::watch(cx, &mut self.next).map_err(Failure::Next)?;
        match self.previous.poll_peek(cx) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(Failure::Previous(transfer::closed()))),
            Poll::Ready(Err(error)) => Poll::Ready(Err(Failure::Previous(error))),
            Poll::Ready(Ok(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

impl Place {
    fn error(&self, failure: Failure) -> PeerError {
        match failure {
            Failure::Previous(error) => PeerError::Lost { peer: self.previous.clone(), error },
            Failure::Next(error) => PeerError::Lost { peer: self.next.clone(), error },
            Failure::Mismatch { theirs, ours } => {
                let other_bucket = theirs.is_some_and(|theirs| theirs.bucket != ours.bucket);
                PeerError::Mismatch {
                    peer: self.previous.clone(),
                    theirs: theirs.map_or_else(
                        || "something unknown".into(),
                        |theirs| describe(theirs, other_bucket),
                    ),
                    ours: describe(ours, other_bucket),
                }
            }
        }
    }
}

/// Both ends have one address: packets do not leave the machine, whatever the address is.
fn is_within_this_machine(stream: &TcpStream) -> bool {
    match (stream.local_addr(), stream.peer_addr()) {
        (Ok(own), Ok(theirs)) => own.ip() == theirs.ip(),
        _ => false,
    }
}

fn describe(header: Header, with_bucket: bool) -> String {
    let Header { tag, bucket, floats, bf16, integers } = header;
    let what = match (floats, bf16) {
        (0, 0) => format!("{integers} integers"),
        (_, 0) => format!("{floats} pairs of f32 and {integers} integers"),
        _ => format!("{bf16} fours of bf16 and {integers} integers"),
    };
    match with_bucket {
        true => format!("{what} in bucket {bucket} of step {tag}"),
        false => format!("{what} of step {tag}"),
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
