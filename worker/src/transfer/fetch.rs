//! Getting an item from several sources at once.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use looptrain_proto::Digest;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::CHUNK;
use super::shelf::Lack;
use super::wire::{Item, Part, Reply, Request, invalid, receive_digests};
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

/// A source that has the item.
struct Source {
    peer: Peer,
    stream: TcpStream,
    digests: Vec<Digest>,
}

/// A piece of the wanted buffers, and what it must hash to.
struct Piece<'a> {
    index: u32,
    bytes: &'a mut [u8],
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
) -> Result<Option<Vec<Vec<f32>>>, FetchError> {
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

    let mut buffers: Vec<Vec<f32>> = lengths.iter().map(|&length| vec![0.0; length]).collect();
    let pieces = buffers.iter_mut().flat_map(|buffer| buffer.chunks_mut(CHUNK));
    let pieces: VecDeque<Piece<'_>> = (0..)
        .zip(pieces)
        .map(|(index, chunk)| Piece { index, bytes: bytemuck::cast_slice_mut(chunk) })
        .collect();
    let queue = Mutex::new(pieces);
    let left = || queue.lock().unwrap_or_else(PoisonError::into_inner).len();
    // Again while a source is left: one that fails late puts back what others have run out of.
    while left() > 0 && !holding.is_empty() {
        let worked =
            join_all(holding.into_iter().map(|source| drain(source, item, &digests, &queue)));
        holding = Vec::new();
        for result in worked.await {
            match result {
                Ok(source) => holding.push(source),
                Err(reason) => {
                    tracing::warn!("a source of the {name} is given up: {reason}");
                    reasons.push(reason);
                }
            }
        }
    }
    match left() {
        0 => Ok(Some(buffers)),
        left => {
            let reasons = reasons.join("; ");
            Err(FetchError::Incomplete { item: name, left, reasons })
        }
    }
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

async fn call(stream: &mut TcpStream, request: Request) -> io::Result<Reply> {
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

/// Works on the queue until it is empty; a source that fails puts its piece back and is not heard
/// of again.
async fn drain(
    mut source: Source,
    item: Item,
    digests: &[Digest],
    queue: &Mutex<VecDeque<Piece<'_>>>,
) -> Result<Source, String> {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(mut piece) = next else { return Ok(source) };
        let received = receive(&mut source.stream, item, &mut piece, digests);
        let fault = match timeout(ANSWER_TIME, received).await {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not answer".to_owned(),
        };
        queue.lock().unwrap_or_else(PoisonError::into_inner).push_front(piece);
        return Err(format!("{}: {fault}", source.peer));
    }
}

async fn receive(
    stream: &mut TcpStream,
    item: Item,
    piece: &mut Piece<'_>,
    digests: &[Digest],
) -> io::Result<()> {
    let request = Request { item, part: Part::Chunk(piece.index) };
    match call(stream, request).await? {
        Reply::Here { bytes } if bytes == piece.bytes.len() as u64 => {}
        Reply::Here { .. } => return Err(invalid("it sends a chunk of another size")),
        Reply::Lacking(_) => return Err(invalid("it does not have it any more")),
    }
    stream.read_exact(piece.bytes).await?;
    if Digest::of(piece.bytes) != digests[piece.index as usize] {
        return Err(invalid("a chunk is damaged"));
    }
    Ok(())
}
