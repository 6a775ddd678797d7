//! A communicator at work: a thread that queues all-reduces and looks whether they are done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use looptrain_model::{DeviceNumbers, DeviceSpan, Exchange};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{oneshot, watch};

use super::NcclError;
use super::communicator::Communicator;
use super::library::{Library, Numbers, UniqueId};
use crate::reduce::tcp::{Peer, PeerError};
use crate::reduce::{Bucket, Sums};

/// How often it is looked whether something is done, during a step.
const LOOK: Duration = Duration::from_micros(50);

/// How often it is looked whether something has gone wrong in the background.
const ASK: Duration = Duration::from_millis(1);

/// How long the communicator's own thread may take to end it: no call of NCCL should take nearly as long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Words that say what a rank reduces.
const HEADER: usize = 8;

/// Ranks among which the odd one is found.
const MOST_RANKS: usize = 4096;

/// Words that are needed on a device: the header and its complement, then one of each rank.
pub(crate) const ROOM: usize = 2 * HEADER + HEADER * MOST_RANKS;

/// Where the headers of all ranks go.
const OTHERS: usize = 2 * HEADER;

/// This rank's place in a communicator of two or more.
#[derive(Debug)]
pub struct Group {
    world: usize,
    communicator: Arc<Communicator>,
    exchange: Arc<Exchange>,
    orders: mpsc::Sender<Order>,
    released: watch::Receiver<bool>,
    /// An operation failed or was abandoned.
    spent: bool,
}

/// A step's all-reduce.
struct Order {
    tag: u64,
    ready: UnboundedReceiver<Bucket>,
    under_way: Box<dyn Fn() + Send>,
    done: oneshot::Sender<Result<Option<Vec<Bucket>>, PeerError>>,
}

impl Group {
    /// Begins to make a communicator; it is there when the receiver says so.
    pub(super) fn begin(
        library: Arc<Library>,
        exchange: Arc<Exchange>,
        (rank, members): (usize, &[Peer]),
        id: UniqueId,
        within: Duration,
    ) -> (Self, oneshot::Receiver<Result<(), NcclError>>) {
        let communicator = Arc::new(Communicator::new(library));
        let (orders, work) = mpsc::channel();
        let (formed_sender, formed) = oneshot::channel();
        let (release, released) = watch::channel(false);
        let thread = Thread {
            communicator: Arc::clone(&communicator),
            exchange: Arc::clone(&exchange),
            rank,
            members: members.to_vec(),
            asked: Instant::now(),
        };
        let (end, drained) = (Arc::clone(&communicator), Arc::clone(&thread.exchange));
        let done = release.clone();
        let run = move || {
            let life = AssertUnwindSafe(|| thread.run(id, within, formed_sender, work));
            // What it has panicked of is in the log; the end is the same.
            let _ = catch_unwind(life);
            end.abort();
            match drain(&drained) {
                Ok(()) => drop(done.send_replace(true)),
                Err(error) => tracing::error!(%error, "the device is not let go of"),
            }
        };
        if let Err(error) = std::thread::Builder::new().name("nccl".into()).spawn(run) {
            tracing::error!(%error, "cannot start a thread for NCCL");
            release.send_replace(true);
        }
        let world = members.len();
        let group = Self { world, communicator, exchange, orders, released, spent: false };
        (group, formed)
    }

    /// What tells when NCCL has let go of the device.
    pub(super) fn hold(&self) -> Hold {
        Hold { communicator: Arc::clone(&self.communicator), released: self.released.clone() }
    }

    pub(crate) fn world(&self) -> usize {
        self.world
    }

    /// See [`crate::reduce::Collective::all_reduce_as_ready`].
    pub(crate) async fn all_reduce(
        &mut self,
        tag: u64,
        ready: UnboundedReceiver<Bucket>,
        under_way: impl Fn() + Send + 'static,
    ) -> Result<Option<Sums>, PeerError> {
        if std::mem::replace(&mut self.spent, true) {
            return Err(PeerError::Spent);
        }
        let (done, reduced) = oneshot::channel();
        let order = Order { tag, ready, under_way: Box::new(under_way), done };
        let gone = |()| PeerError::from(NcclError::Abandoned);
        self.orders.send(order).map_err(|_| gone(()))?;
        let Some(buckets) = reduced.await.map_err(|_| gone(()))?? else { return Ok(None) };
        self.spent = false;
        Ok(Sums::from_buckets(buckets))
    }
}

/// The hold that NCCL has on the device, for one communicator.
#[derive(Clone, Debug)]
pub(super) struct Hold {
    communicator: Arc<Communicator>,
    released: watch::Receiver<bool>,
}

impl Hold {
    /// Waits until NCCL has let go of the device, since nobody wants the communicator any more.
    pub(super) async fn end(&mut self, within: Duration) -> Result<(), NcclError> {
        let left = within.saturating_sub(self.communicator.abandoned_for());
        let released = self.released.wait_for(|released| *released);
        match tokio::time::timeout(left, released).await {
            Ok(Ok(_)) => Ok(()),
            // Its thread has ended without having let go.
            Ok(Err(_)) | Err(_) => Err(NcclError::Stuck { seconds: within.as_secs_f64() }),
        }
    }
}

/// Waits until nothing that was queued for NCCL is left on the device.
fn drain(exchange: &Exchange) -> Result<(), NcclError> {
    exchange.enter()?;
    while !exchange.is_idle()? {
        std::thread::sleep(ASK);
    }
    Ok(())
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its own thread ends it at the next look; this one does if that thread is stuck within a call.
        self.communicator.abandon();
        let (communicator, exchange) = (Arc::clone(&self.communicator), Arc::clone(&self.exchange));
        let released = self.released.clone();
        let watch = move || {
            let start = Instant::now();
            let is_released = || *released.borrow();
            while !is_released() {
                std::thread::sleep(ASK);
                // NCCL asks for the thread's device, and finds one to take if there is none.
                let stuck = start.elapsed() > PATIENCE && exchange.enter().is_ok();
                if stuck && communicator.abort_from_outside() {
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("nccl-watchdog".into()).spawn(watch) {
            tracing::error!(%error, "cannot start a thread that ends a communicator");
        }
    }
}

/// What the communicator's own thread has.
struct Thread {
    communicator: Arc<Communicator>,
    exchange: Arc<Exchange>,
    rank: usize,
    members: Vec<Peer>,
    /// When it was last asked what goes on in the background.
    asked: Instant,
}

impl Thread {
    /// The whole life of a communicator.
    fn run(
        mut self,
        id: UniqueId,
        within: Duration,
        formed: oneshot::Sender<Result<(), NcclError>>,
        orders: mpsc::Receiver<Order>,
    ) {
        let made = self.make(id, within);
        let goes_on = made.is_ok();
        // Nobody listens to a generation that is abandoned.
        let heard = formed.send(made).is_ok();
        if goes_on && heard {
            // Ends with the handle, too.
            while let Ok(Order { tag, ready, under_way, done }) = orders.recv() {
                let reduced = self.all_reduce(tag, ready, &*under_way);
                let failed = !matches!(reduced, Ok(Some(_)));
                let _ = done.send(reduced);
                if failed {
                    break;
                }
            }
        }
    }

    fn make(&mut self, id: UniqueId, within: Duration) -> Result<(), NcclError> {
        let (start, world) = (Instant::now(), self.members.len());
        self.exchange.enter()?;
        self.communicator.begin(id, self.rank, world)?;
        while !self.communicator.is_settled()? {
            if start.elapsed() > within {
                return Err(NcclError::Late { world, seconds: within.as_secs_f64() });
            }
            std::thread::sleep(ASK);
        }
        Ok(())
    }

    /// None when there are no more buckets before the last.
    fn all_reduce(
        &mut self,
        tag: u64,
        mut ready: UnboundedReceiver<Bucket>,
        under_way: &dyn Fn(),
    ) -> Result<Option<Vec<Bucket>>, PeerError> {
        let mut buckets: Vec<Bucket> = Vec::new();
        loop {
            let bucket = match ready.try_recv() {
                Ok(bucket) => bucket,
                Err(TryRecvError::Empty) => {
                    self.look()?;
                    std::thread::sleep(LOOK);
                    continue;
                }
                Err(TryRecvError::Disconnected) => return Ok(None),
            };
            if bucket.spans().is_empty() {
                return Err(NcclError::Elsewhere.into());
            }
            if buckets.is_empty() {
                self.agree(tag, &bucket)?;
            }
            for span in bucket.spans() {
                self.reduce(span)?;
            }
            if buckets.is_empty() {
                under_way();
            }
            let last = bucket.is_last_of(1);
            buckets.push(bucket);
            if last {
                break;
            }
        }
        self.finish()?;
        if let Some(last) = buckets.last_mut() {
            self.fill(last)?;
        }
        Ok(Some(buckets))
    }

    /// Queues the sum of some numbers behind the moment when they are final.
    fn reduce(&mut self, span: &DeviceSpan) -> Result<(), NcclError> {
        let numbers = match span.numbers() {
            DeviceNumbers::Integers => Numbers::Integers,
            DeviceNumbers::Floats => Numbers::Floats,
            DeviceNumbers::Bf16 => Numbers::Bf16,
        };
        self.exchange.wait_for(span)?;
        self.queue(numbers, (span.address(), span.len()))
    }

    /// Queues an all-reduce, and has NCCL take it.
    fn queue(&mut self, numbers: Numbers, at: (u64, usize)) -> Result<(), NcclError> {
        let queue = self.exchange.queue();
        // SAFETY: a communicator that is not aborted, on this device; the numbers are the exchange's own
        // or a span of the sums, which nobody else touches before the step is reduced.
        self.communicator
            .call(|library, comm| unsafe { library.all_reduce(comm, numbers, at, queue) })?;
        self.settle()
    }

    fn settle(&mut self) -> Result<(), NcclError> {
        while !self.communicator.is_settled()? {
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Looks, now and then, whether something has gone wrong in the background.
    fn look(&mut self) -> Result<(), NcclError> {
        if self.communicator.is_abandoned() {
            return Err(NcclError::Abandoned);
        }
        if self.asked.elapsed() > ASK {
            self.asked = Instant::now();
            self.communicator.is_settled()?;
        }
        Ok(())
    }

    /// Waits until all that is queued is done.
    fn finish(&mut self) -> Result<(), NcclError> {
        while !self.exchange.is_idle()? {
            self.look()?;
            std::thread::sleep(LOOK);
        }
        // What was aborted, or has failed, is done as well.
        self.communicator.is_settled().map(drop)
    }

    /// Compares what all ranks are about to reduce. NCCL itself takes their word for it: ranks that give
    /// different numbers wait for ever, or get nonsense.
    fn agree(&mut self, tag: u64, bucket: &Bucket) -> Result<(), PeerError> {
        let own = header(tag, bucket);
        let complement = own.map(|word| !word);
        self.exchange.write(0, &own).map_err(NcclError::from)?;
        self.exchange.write(HEADER, &complement).map_err(NcclError::from)?;
        // The largest of numbers and the smallest are the same only if all are.
        self.queue(Numbers::Largest, (self.exchange.address(0), 2 * HEADER))?;
        self.finish()?;
        let mut largest = [0; 2 * HEADER];
        self.exchange.read(0, &mut largest).map_err(NcclError::from)?;
        if largest[..HEADER] == own && largest[HEADER..] == complement {
            return Ok(());
        }
        if self.members.len() > MOST_RANKS {
            return Err(NcclError::Mismatch { ours: described(&own) }.into());
        }
        // All ranks see that they disagree, and find out who is the odd one.
        self.exchange.write(0, &own).map_err(NcclError::from)?;
        let (from, to) = (self.exchange.address(0), self.exchange.address(OTHERS));
        let queue = self.exchange.queue();
        // SAFETY: as for the all-reduce; there is room for the words of all ranks.
        self.communicator
            .call(|library, comm| unsafe { library.all_gather(comm, (from, HEADER), to, queue) })?;
        self.settle()?;
        self.finish()?;
        let mut all = vec![0; HEADER * self.members.len()];
        self.exchange.read(OTHERS, &mut all).map_err(NcclError::from)?;
        let other = self.members.iter().zip(all.chunks(HEADER)).find(|(_, header)| *header != own);
        let (peer, theirs) = match other {
            Some((peer, header)) => (peer, described(header)),
            None => (&self.members[self.rank], "something else than it says".to_owned()),
        };
        Err(PeerError::Mismatch { peer: peer.clone(), theirs, ours: described(&own) })
    }

    /// Takes the integers over from the device.
    fn fill(&self, last: &mut Bucket) -> Result<(), NcclError> {
        let beside = last.spans().last().filter(|_| last.spans().len() > 1).cloned();
        if let Some(span) = beside {
            self.exchange.read_integers(&span, last.integers_mut())?;
        }
        Ok(())
    }
}

/// What this rank is about to reduce, in words that are equal on all ranks.
fn header(tag: u64, first: &Bucket) -> [u32; HEADER] {
    let (elements, buckets, integers, kind) = first.shape();
    let halves = |number: u64| [number as u32, (number >> 32) as u32];
    let ([tag, tag_high], [count, count_high]) = (halves(tag), halves(elements as u64));
    let words = first.spans().first().map_or(0, DeviceSpan::len) as u64;
    [tag, tag_high, count, count_high, buckets as u32, integers as u32, kind, halves(words)[0]]
}

fn described(header: &[u32]) -> String {
    let number = |at: usize| u64::from(header[at]) | u64::from(header[at + 1]) << 32;
    let (kind, buckets, integers) = (header[6], header[4], header[5]);
    let kind = match kind {
        0 => "in fixed point",
        1 => "of f32",
        _ => "of bf16",
    };
    format!(
        "{} elements {kind} in {buckets} buckets and {integers} integers of step {}",
        number(2),
        number(0)
    )
}
