//! The all-reduce of a bucket as a pipeline: what may be sent, and what to do with what arrives.
//!
//! The bucket is cut into one segment per rank. In round `r` (of `2 * (world - 1)`) a rank sends
//! segment `rank - r` and receives segment `rank - r - 1`, all modulo the world: in the first half
//! what arrives is added (reduce-scatter), in the second half it replaces (all-gather). What is
//! received in one round is what is sent in the next, so bytes flow on as soon as they are final;
//! no round waits for the end of another. Sending and receiving go on at once within one poll
//! function, which owns the buffer: no lock, no copy beyond the sockets' own.
//!
//! A rank may overwrite a segment in the second half while bytes of other segments are still to be
//! sent, never bytes of the same place: those come back only after they have gone round the ring.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::reduce::bucket::Numbers;
use crate::reduce::fast;

const WORD: usize = size_of::<i64>();

/// Says what a rank is about to reduce; compared before any number is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) tag: u64,
    /// Number of the bucket.
    pub(super) bucket: u64,
    /// Words that are two f32; they come first.
    pub(super) floats: u64,
    /// Words that are four bf16; they come first.
    pub(super) bf16: u64,
    /// Words that are integers.
    pub(super) integers: u64,
}

const HEADER_BYTES: usize = 48;
const HEADER_MAGIC: [u8; 8] = *b"all sum\0";

impl Header {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&HEADER_MAGIC);
        bytes[8..16].copy_from_slice(&self.tag.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.bucket.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.floats.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.bf16.to_le_bytes());
        bytes[40..].copy_from_slice(&self.integers.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let number = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let header = || Self {
            tag: number(8),
            bucket: number(16),
            floats: number(24),
            bf16: number(32),
            integers: number(40),
        };
        (bytes[..8] == HEADER_MAGIC).then(header)
    }
}

/// How a transfer fails, by neighbour.
#[derive(Debug)]
pub(super) enum Failure {
    Previous(io::Error),
    Next(io::Error),
    /// The previous rank reduces something else; `None` when it speaks nonsense.
    Mismatch {
        theirs: Option<Header>,
        ours: Header,
    },
}

/// Progress of one direction: the round, and bytes of its segment done.
#[derive(Clone, Copy, Default)]
struct Place {
    round: usize,
    bytes: usize,
}

/// The running all-reduce of a bucket.
pub(super) struct Transfer<'a> {
    rank: usize,
    world: usize,
    /// Words, and what so many of them at the front are; the others are integers.
    sums: &'a mut [i64],
    front: (Numbers, usize),
    scratch: &'a mut [i64],
    header: Header,
    header_sent: usize,
    header_got: [u8; HEADER_BYTES],
    header_received: usize,
    sent: Place,
    /// `bytes` counts those that are final, that is added and whole words.
    received: Place,
    /// Bytes of a broken word at the start of the scratch buffer.
    carried: usize,
    /// Since when the socket to the next rank has been full, and for how long it was before.
    full_since: Option<Instant>,
    full: Duration,
    /// To be called when numbers have gone out.
    under_way: Option<&'a (dyn Fn() + Sync)>,
}

impl<'a> Transfer<'a> {
    /// `scratch` decides how much is read at a time; at least one element.
    pub(super) fn new(
        (rank, world): (usize, usize),
        (tag, bucket): (u64, usize),
        (sums, front): (&'a mut [i64], (Numbers, usize)),
        scratch: &'a mut [i64],
    ) -> Self {
        let words = |numbers| if front.0 == numbers { front.1 } else { 0 };
        let (floats, bf16) = (words(Numbers::Floats), words(Numbers::Bf16));
        let header = Header {
            tag,
            bucket: bucket as u64,
            floats: floats as u64,
            bf16: bf16 as u64,
            integers: (sums.len() - floats - bf16) as u64,
        };
        Self {
            rank,
            world,
            sums,
            front,
            scratch,
            header,
            header_sent: 0,
            header_got: [0; HEADER_BYTES],
            header_received: 0,
            sent: Place::default(),
            received: Place::default(),
            carried: 0,
            full_since: None,
            full: Duration::ZERO,
            under_way: None,
        }
    }

    /// How long there was something to send that the socket did not take.
    pub(super) fn blocked(&self) -> Duration {
        self.full
    }

    fn note_write(&mut self, count: usize) {
        match (count, self.full_since) {
            (0, None) => self.full_since = Some(Instant::now()),
            (0, Some(_)) => {}
            (_, since) => {
                self.full += since.map_or(Duration::ZERO, |since| since.elapsed());
                self.full_since = None;
            }
        }
    }

    /// Calls `under_way` once, when the first numbers have gone out. The sum is not complete then:
    /// a rank gets its own numbers back, added up, only after it has sent them.
    pub(super) fn watched(self, under_way: &'a (dyn Fn() + Sync)) -> Self {
        Self { under_way: Some(under_way), ..self }
    }

    fn rounds(&self) -> usize {
        2 * (self.world - 1)
    }

    /// Elements of the segment that is sent in `round`; received in `round - 1`.
    fn segment(&self, round: usize) -> Range<usize> {
        let index = (self.rank + 2 * self.world - round) % self.world;
        let edge = |index: usize| {
            // In 128 bits, since elements times ranks may be large.
            (self.sums.len() as u128 * index as u128 / self.world as u128) as usize
        };
        edge(index)..edge(index + 1)
    }

    /// Moves bytes until both directions wait or all is done.
    pub(super) fn poll<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        previous: &mut S,
        next: &mut S,
    ) -> Poll<Result<(), Failure>> {
        loop {
            let sent = self.send(cx, next).map_err(Failure::Next)?;
            let received = self.receive(cx, previous)?;
            if self.sent.round == self.rounds() && self.received.round == self.rounds() {
                return Pin::new(next).poll_flush(cx).map_err(Failure::Next);
            }
            if !sent && !received {
                // TLS may hold back what the other rank waits for.
                if let Poll::Ready(Err(error)) = Pin::new(&mut *next).poll_flush(cx) {
                    return Poll::Ready(Err(Failure::Next(error)));
                }
                if self.sent.round < self.rounds() {
                    watch(cx, next).map_err(Failure::Next)?;
                }
                return Poll::Pending;
            }
        }
    }

    /// One write; false when there is nothing to send or the socket is full.
    fn send<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        next: &mut S,
    ) -> io::Result<bool> {
        if self.header_sent < HEADER_BYTES {
            let bytes = self.header.to_bytes();
            let count = written(Pin::new(next).poll_write(cx, &bytes[self.header_sent..]))?;
            self.header_sent += count;
            return Ok(count > 0);
        }
        while self.sent.round < self.rounds() {
            let segment = self.segment(self.sent.round);
            let all = segment.len() * WORD;
            if self.sent.bytes == all {
                self.sent = Place { round: self.sent.round + 1, bytes: 0 };
                continue;
            }
            let ready = self.ready(all);
            if ready == self.sent.bytes {
                return Ok(false);
            }
            let bytes = &bytemuck::cast_slice::<i64, u8>(&self.sums[segment])[..ready];
            let count = written(Pin::new(next).poll_write(cx, &bytes[self.sent.bytes..]))?;
            self.note_write(count);
            self.sent.bytes += count;
            if let Some(under_way) = self.under_way.take_if(|_| count > 0) {
                under_way();
            }
            return Ok(count > 0);
        }
        Ok(false)
    }

    /// Bytes of the segment being sent that are final: all of the own one, of any other what the
    /// round before has received.
    fn ready(&self, all: usize) -> usize {
        match (self.received.round + 1).cmp(&self.sent.round) {
            _ if self.sent.round == 0 => all,
            std::cmp::Ordering::Greater => all,
            std::cmp::Ordering::Equal => self.received.bytes,
            std::cmp::Ordering::Less => 0,
        }
    }

    /// One read; false when all has been received or the socket is empty.
    fn receive<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        previous: &mut S,
    ) -> Result<bool, Failure> {
        if self.header_received < HEADER_BYTES {
            let place = &mut self.header_got[self.header_received..];
            let count = read(cx, previous, place).map_err(Failure::Previous)?;
            self.header_received += count;
            if self.header_received == HEADER_BYTES {
                let theirs = Header::from_bytes(&self.header_got);
                if theirs != Some(self.header) {
                    return Err(Failure::Mismatch { theirs, ours: self.header });
                }
            }
            return Ok(count > 0);
        }
        while self.received.round < self.rounds() {
            let segment = self.segment(self.received.round + 1);
            let all = segment.len() * WORD;
            if self.received.bytes == all {
                self.received = Place { round: self.received.round + 1, bytes: 0 };
                continue;
            }
            let adds = self.received.round < self.world - 1;
            let count = if adds {
                self.receive_and_add(cx, previous, segment)
            } else {
                let bytes = bytemuck::cast_slice_mut::<i64, u8>(&mut self.sums[segment]);
                let count = read(cx, previous, &mut bytes[self.received.bytes..]);
                count.inspect(|count| self.received.bytes += count)
            };
            return count.map(|count| count > 0).map_err(Failure::Previous);
        }
        Ok(false)
    }

    fn receive_and_add<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        previous: &mut S,
        segment: Range<usize>,
    ) -> io::Result<usize> {
        let missing = segment.len() * WORD - self.received.bytes;
        let bytes = bytemuck::cast_slice_mut::<i64, u8>(self.scratch);
        let room = bytes.len().min(missing);
        let count = read(cx, previous, &mut bytes[self.carried..room])?;
        let filled = self.carried + count;
        let words = filled / WORD;
        let start = segment.start + self.received.bytes / WORD;
        // Where the front ends, among what has arrived.
        let (numbers, front) = self.front;
        let front = front.saturating_sub(start).min(words);
        let (front_sums, sums) = self.sums[start..start + words].split_at_mut(front);
        let (in_front, integers) = self.scratch[..words].split_at(front);
        match numbers {
            Numbers::Integers => add_integers(front_sums, in_front),
            Numbers::Floats => {
                add_floats(bytemuck::cast_slice_mut(front_sums), bytemuck::cast_slice(in_front));
            }
            Numbers::Bf16 => fast::add_bf16(front_sums, in_front),
        }
        add_integers(sums, integers);
        self.received.bytes += words * WORD;
        self.carried = filled % WORD;
        let bytes = bytemuck::cast_slice_mut::<i64, u8>(self.scratch);
        bytes.copy_within(words * WORD..filled, 0);
        Ok(count)
    }
}

/// While something is still to be sent, notices that the next rank is gone even when this rank has
/// nothing to send to it at the moment. Nothing ever comes back on that connection.
pub(super) fn watch<S: AsyncRead + Unpin>(cx: &mut Context<'_>, next: &mut S) -> io::Result<()> {
    match read(cx, next, &mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "it sent bytes upstream")),
        Err(error) => Err(error),
    }
}

fn add_floats(sums: &mut [f32], values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// Cannot wrap with what the fixed-point encoder lets through; a peer that sends something else is
/// found by its digest, not by a panic here.
fn add_integers(sums: &mut [i64], values: &[i64]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum = sum.wrapping_add(*value));
}

fn written(result: Poll<io::Result<usize>>) -> io::Result<usize> {
    match result {
        Poll::Ready(Ok(0)) => Err(closed()),
        Poll::Ready(result) => result,
        Poll::Pending => Ok(0),
    }
}

/// Bytes read; 0 when there are none yet.
fn read<S: AsyncRead + Unpin>(
    cx: &mut Context<'_>,
    stream: &mut S,
    place: &mut [u8],
) -> io::Result<usize> {
    let mut buffer = ReadBuf::new(place);
    match Pin::new(stream).poll_read(cx, &mut buffer) {
        Poll::Pending => Ok(0),
        Poll::Ready(Err(error)) => Err(error),
        Poll::Ready(Ok(())) if buffer.filled().is_empty() => Err(closed()),
        Poll::Ready(Ok(())) => Ok(buffer.filled().len()),
    }
}

pub(super) fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection")
}
