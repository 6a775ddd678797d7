//! Getting an item from several sources at once.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use looptrain_proto::transport::Connection;
use looptrain_proto::v1::Prepared;
use looptrain_proto::{Digest, Step};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::CHUNK;
use super::shelf::Lack;
use super::wire::{Item, Part, Reply, Request, invalid, receive_digests, receive_votes};
use crate::reduce::tcp::{Peer, Peers};

/// How long a source may take to accept a connection.
const CONNECT_TIME: Duration = Duration::from_secs(5);

/// How long a source may take to hash what it offers, or to send a chunk.
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// Pause before a source that does not have the item yet is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// Why an item could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("no peer offers the {item} in time")]
    NotOffered { item: Item },
    #[error("no peer has the {item}: {reasons}")]
    NoSource { item: String, reasons: String },
    #[error("the peers disagree on the {item}, and there is no majority: {names}")]
    Disagreement { item: String, names: String },
    #[error("{left} chunks of the {item} are missing, and no peer is left: {reasons}")]
    Incomplete { item: String, left: usize, reasons: String },
}

/// An item that is here.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) buffers: Vec<Vec<f32>>,
    /// What its sources remember of the steps that led to it, in order; no weight depends on that, but by
    /// it a coordinator that takes over knows what the next step is judged by.
    pub(crate) votes: Vec<Prepared>,
}

/// A source that has the item.
struct Source {
    peer: Peer,
    stream: Connection,
    digests: Vec<Digest>,
}

/// Chunks that a source is asked for before the first of them has come: while one is hashed, the next
/// is on its way.
const ASKED: usize = 2;

/// The item that is being fetched, for all its sources.
struct Job {
    item: Item,
    chunks: Vec<Place>,
    /// One a chunk.
    digests: Vec<Digest>,
    /// Chunks that nobody has been asked for yet.
    waiting: Mutex<VecDeque<usize>>,
}

/// Where the elements of a chunk belong.
struct Place {
    buffer: usize,
    elements: Range<usize>,
}

/// A chunk that is what it should be, on its way into its buffer.
struct Verified {
    chunk: usize,
    values: Vec<f32>,
    /// Takes the memory, for another one.
    back: mpsc::Sender<Vec<f32>>,
}

impl Job {
    fn new(item: Item, lengths: &[usize], digests: Vec<Digest>) -> Self {
        let chunks: Vec<Place> = (lengths.iter().enumerate())
            .flat_map(|(buffer, &length)| {
                let place =
                    move |start| Place { buffer, elements: start..length.min(start + CHUNK) };
                (0..length).step_by(CHUNK).map(place)
            })
            .collect();
        let waiting = Mutex::new((0..chunks.len()).collect());
        Self { item, chunks, digests, waiting }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<usize>> {
        // Every change is one call that cannot panic half-way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fetches buffers of `lengths` elements; `None` when after `wait` no source has the item yet,
/// though one may come to have it. Sources that cannot be asked are taken off the list, so that the
/// next item does not wait for them again.
///
/// # Errors
/// When all sources fail, or say different things of the item.
pub(crate) async fn fetch(
    peers: &Peers,
    sources: &mut Vec<Peer>,
    item: Item,
    lengths: &[usize],
    wait: Duration,
) -> Result<Option<Fetched>, FetchError> {
    let name = item.to_string();
    let chunks = lengths.iter().map(|length| length.div_ceil(CHUNK)).sum();
    let asked = join_all(sources.iter().map(|peer| ask(peers, peer, item, chunks, wait))).await;
    let (mut holding, mut reasons, mut patient) = (Vec::new(), Vec::new(), false);
    let mut mute = Vec::new();
    for (peer, answer) in sources.iter().zip(asked) {
        match answer {
            Ok(Some(source)) => holding.push(source),
            Ok(None) => patient = true,
            Err(error) => {
                reasons.push(format!("{peer}: {error}"));
                mute.push(peer.rank);
            }
        }
    }
    sources.retain(|peer| !mute.contains(&peer.rank));
    if holding.is_empty() {
        if patient {
            return Ok(None);
        }
        return Err(FetchError::NoSource { item: name, reasons: reasons.join("; ") });
    }
    let mut holding = majority(holding)
        .map_err(|names| FetchError::Disagreement { item: name.clone(), names })?;
    let digests = holding[0].digests.clone();
    let votes = votes(&mut holding, item).await;

    let job = Arc::new(Job::new(item, lengths, digests));
    let mut buffers: Vec<Vec<f32>> = lengths.iter().map(|&length| vec![0.0; length]).collect();
    let mut left = job.chunks.len();
    // Each source in a task of its own, since all of them hash; gone when this future is dropped.
    let mut draining = JoinSet::new();
    let (verified, mut arriving) = mpsc::channel::<Verified>(1);
    while left > 0 {
        // At first, and again when one that fails late has put back what others have run out of.
        if !job.waiting().is_empty() {
            // Each is asked for a chunk, however quick the others are: they are dealt before any of them
            // begins.
            let deal = |source| (source, job.waiting().pop_front());
            for (source, first) in holding.drain(..).map(deal).collect::<Vec<_>>() {
                draining.spawn(drain(source, first, Arc::clone(&job), verified.clone()));
            }
        }
        tokio::select! {
            // Before the end of a source that sent something comes what it sent.
            biased;
            Some(Verified { chunk, values, back }) = arriving.recv() => {
                let Place { buffer, elements } = &job.chunks[chunk];
                buffers[*buffer][elements.clone()].copy_from_slice(&values);
                left -= 1;
                // A source that needs no more chunks is gone.
                let _ = back.try_send(values);
            }
            drained = draining.join_next() => match drained {
                Some(Ok(Ok(source))) => holding.push(source),
                Some(Ok(Err(reason))) => {
                    tracing::warn!("a source of the {name} is given up: {reason}");
                    reasons.push(reason);
                }
                Some(Err(error)) => reasons.push(error.to_string()),
                None => {
                    let reasons = reasons.join("; ");
                    return Err(FetchError::Incomplete { item: name, left, reasons });
                }
            },
        }
    }
    Ok(Some(Fetched { buffers, votes }))
}

/// How the steps went that led to the item, as the first source that answers tells it. One that does not
/// will not have its chunks either, which is where it is given up.
async fn votes(sources: &mut [Source], item: Item) -> Vec<Prepared> {
    let step = item.step();
    for source in sources {
        let stream = &mut source.stream;
        let answer = in_time(async {
            match call(stream, Request { item, part: Part::Votes }).await? {
                Reply::Here { bytes } => receive_votes(stream, bytes).await,
                Reply::Lacking(_) => Err(invalid("it does not have it any more")),
            }
        });
        match answer.await {
            Ok(mut votes) => {
                votes.retain(|vote| Step(vote.step) <= step);
                return votes;
            }
            Err(error) => tracing::debug!("{} tells no votes on the {item}: {error}", source.peer),
        }
    }
    Vec::new()
}

/// Connects to a peer and asks for the item's digests until it has the item or the time is over.
async fn ask(
    peers: &Peers,
    peer: &Peer,
    item: Item,
    chunks: usize,
    wait: Duration,
) -> io::Result<Option<Source>> {
    let connected = peers.connect_for_state(peer, CONNECT_TIME).await;
    let mut stream = connected.map_err(io::Error::other)?;
    let deadline = Instant::now() + wait;
    loop {
        let reply = call(&mut stream, Request { item, part: Part::Digests });
        match timeout(ANSWER_TIME, reply).await?? {
            Reply::Here { bytes } => {
                let digests = receive_digests(&mut stream, chunks, bytes);
                let digests = timeout(ANSWER_TIME, digests).await??;
                return Ok(Some(Source { peer: peer.clone(), stream, digests }));
            }
            Reply::Lacking(Lack::NotYet) if Instant::now() < deadline => sleep(ASK_AGAIN).await,
            Reply::Lacking(Lack::NotYet) => return Ok(None),
            Reply::Lacking(Lack::Gone) => return Err(invalid("it does not have it any more")),
        }
    }
}

async fn call(stream: &mut Connection, request: Request) -> io::Result<Reply> {
    request.send(stream).await?;
    Reply::receive(stream).await
}

/// The sources that say the same as more than half of all; who they are when there is no such
/// majority.
fn majority(holding: Vec<Source>) -> Result<Vec<Source>, String> {
    let all = holding.len();
    let mut parties: HashMap<Vec<Digest>, Vec<Source>> = HashMap::new();
    for source in holding {
        parties.entry(source.digests.clone()).or_default().push(source);
    }
    let names = |party: &[Source]| {
        party.iter().map(|source| source.peer.to_string()).collect::<Vec<_>>().join(", ")
    };
    let mut parties: Vec<_> = parties.into_values().collect();
    parties.sort_by_key(Vec::len);
    match parties.pop() {
        Some(largest) if 2 * largest.len() > all => {
            for odd in &parties {
                tracing::warn!("{} offers another state than the others", names(odd));
            }
            Ok(largest)
        }
        largest => {
            parties.extend(largest);
            let sides: Vec<String> = parties.iter().map(|party| names(party)).collect();
            Err(sides.join(" against "))
        }
    }
}

/// Gets chunks until none is waiting; a source that fails puts back what it was asked for and is not
/// heard of again.
async fn drain(
    mut source: Source,
    first: Option<usize>,
    job: Arc<Job>,
    verified: mpsc::Sender<Verified>,
) -> Result<Source, String> {
    let mut asked = VecDeque::new();
    match get(&mut source.stream, first, &job, &mut asked, &verified).await {
        Ok(()) => Ok(source),
        Err(error) => {
            job.waiting().extend(asked);
            Err(format!("{}: {error}", source.peer))
        }
    }
}

async fn get(
    stream: &mut Connection,
    mut first: Option<usize>,
    job: &Job,
    asked: &mut VecDeque<usize>,
    verified: &mpsc::Sender<Verified>,
) -> io::Result<()> {
    // One is filled while the other is copied from; the sender stays here, so that both come back.
    let (back, mut spent) = mpsc::channel(2);
    while back.try_send(Vec::new()).is_ok() {}
    loop {
        while asked.len() < ASKED {
            let waiting = || job.waiting().pop_front();
            let Some(chunk) = first.take().or_else(waiting) else { break };
            asked.push_back(chunk);
            let part = Part::Chunk(u32::try_from(chunk).map_err(|_| invalid("too many chunks"))?);
            in_time(Request { item: job.item, part }.send(stream)).await?;
        }
        let Some(&chunk) = asked.front() else { return Ok(()) };
        let mut values = spent.recv().await.unwrap_or_default();
        values.resize(job.chunks[chunk].elements.len(), 0.0);
        in_time(receive(stream, bytemuck::cast_slice_mut(&mut values))).await?;
        if Digest::of(bytemuck::cast_slice(&values)) != job.digests[chunk] {
            return Err(invalid("a chunk is damaged"));
        }
        let arrived = Verified { chunk, values, back: back.clone() };
        verified.send(arrived).await.map_err(|_| invalid("nobody wants it any more"))?;
        asked.pop_front();
    }
}

async fn in_time<T>(answer: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer"));
    timeout(ANSWER_TIME, answer).await.unwrap_or_else(late)
}

/// The answer to the oldest request for a chunk.
async fn receive(stream: &mut Connection, chunk: &mut [u8]) -> io::Result<()> {
    match Reply::receive(stream).await? {
        Reply::Here { bytes } if bytes == chunk.len() as u64 => {}
        Reply::Here { .. } => return Err(invalid("it sends a chunk of another size")),
        Reply::Lacking(_) => return Err(invalid("it does not have it any more")),
    }
    stream.read_exact(chunk).await?;
    Ok(())
}
