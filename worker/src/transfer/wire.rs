//! Requests and replies on a connection for state, little-endian like everything between peers.

use std::fmt;

use looptrain_proto::v1::{Prepared, Votes};
use looptrain_proto::{Digest, Step};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::shelf::Lack;

const DIGEST_BYTES: usize = size_of::<Digest>();

/// What a coordinator takes in one message, where all that a worker remembers has to fit.
const MOST_VOTE_BYTES: u64 = 16 << 20;

/// Something that can be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// Weights, first and second moment after a step.
    State(Step),
    /// The reduced gradient that led to a step.
    Update(Step),
}

impl Item {
    /// The step that it leads to.
    pub(super) fn step(self) -> Step {
        match self {
            Self::State(step) | Self::Update(step) => step,
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State(step) => write!(f, "state of step {step}"),
            Self::Update(step) => write!(f, "update to step {step}"),
        }
    }
}

/// What of the item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The digests of all its chunks.
    Digests,
    Chunk(u32),
    /// How the steps went that led to it, for whoever tells that to a later coordinator.
    Votes,
}

/// What a joiner asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) item: Item,
    pub(super) part: Part,
}

/// The beginning of an answer; as many bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Here { bytes: u64 },
    Lacking(Lack),
}

impl Request {
    pub(super) async fn send(self, stream: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        let (kind, step) = match self.item {
            Item::State(step) => (1, step),
            Item::Update(step) => (2, step),
        };
        let (part, index) = match self.part {
            Part::Digests => (1, 0),
            Part::Chunk(index) => (2, index),
            Part::Votes => (3, 0),
        };
        let mut bytes = [0; 14];
        (bytes[0], bytes[1]) = (kind, part);
        bytes[2..6].copy_from_slice(&index.to_le_bytes());
        bytes[6..].copy_from_slice(&step.0.to_le_bytes());
        stream.write_all(&bytes).await?;
        // TLS may hold back what is not sent on.
        stream.flush().await
    }

    pub(super) async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Self> {
        let (kind, part) = (stream.read_u8().await?, stream.read_u8().await?);
        let index = stream.read_u32_le().await?;
        let step = Step(stream.read_u64_le().await?);
        let item = match kind {
            1 => Item::State(step),
            2 => Item::Update(step),
            _ => return Err(invalid("a request for an unknown item")),
        };
        let part = match part {
            1 => Part::Digests,
            2 => Part::Chunk(index),
            3 => Part::Votes,
            _ => return Err(invalid("a request for an unknown part")),
        };
        Ok(Self { item, part })
    }
}

impl Reply {
    pub(super) async fn send(self, stream: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        let (code, length) = match self {
            Self::Here { bytes } => (0, bytes),
            Self::Lacking(Lack::NotYet) => (1, 0),
            Self::Lacking(Lack::Gone) => (2, 0),
        };
        let mut bytes = [code; 9];
        bytes[1..].copy_from_slice(&length.to_le_bytes());
        stream.write_all(&bytes).await
    }

    pub(super) async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Self> {
        let code = stream.read_u8().await?;
        let bytes = stream.read_u64_le().await?;
        match code {
            0 => Ok(Self::Here { bytes }),
            1 => Ok(Self::Lacking(Lack::NotYet)),
            2 => Ok(Self::Lacking(Lack::Gone)),
            _ => Err(invalid("a reply that makes no sense")),
        }
    }
}

pub(super) async fn send_digests(
    stream: &mut (impl AsyncWrite + Unpin),
    digests: &[Digest],
) -> std::io::Result<()> {
    let bytes: Vec<u8> = digests.iter().flat_map(|digest| digest.0).collect();
    Reply::Here { bytes: bytes.len() as u64 }.send(stream).await?;
    stream.write_all(&bytes).await
}

/// The digests of an item of `chunks` chunks, whose reply said that `bytes` bytes follow.
pub(super) async fn receive_digests(
    stream: &mut (impl AsyncRead + Unpin),
    chunks: usize,
    bytes: u64,
) -> std::io::Result<Vec<Digest>> {
    if bytes != (chunks * DIGEST_BYTES) as u64 {
        return Err(invalid("it offers an item of another size"));
    }
    let mut all = vec![0; chunks * DIGEST_BYTES];
    stream.read_exact(&mut all).await?;
    let (digests, _) = all.as_chunks::<DIGEST_BYTES>();
    Ok(digests.iter().map(|bytes| Digest(*bytes)).collect())
}

pub(super) async fn send_votes(
    stream: &mut (impl AsyncWrite + Unpin),
    votes: Vec<Prepared>,
) -> std::io::Result<()> {
    let bytes = Votes { votes }.to_bytes();
    Reply::Here { bytes: bytes.len() as u64 }.send(stream).await?;
    stream.write_all(&bytes).await
}

/// The votes whose reply said that `bytes` bytes follow.
pub(super) async fn receive_votes(
    stream: &mut (impl AsyncRead + Unpin),
    bytes: u64,
) -> std::io::Result<Vec<Prepared>> {
    if bytes > MOST_VOTE_BYTES {
        return Err(invalid("it sends more votes than a worker remembers"));
    }
    let mut all = vec![0; bytes as usize];
    stream.read_exact(&mut all).await?;
    let votes = Votes::from_bytes(&all).map_err(|_| invalid("its votes are damaged"))?;
    Ok(votes.votes)
}

pub(super) fn invalid(what: &'static str) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_and_replies_survive_the_wire() {
        for item in [Item::State(Step(u64::MAX)), Item::Update(Step(7))] {
            for part in [Part::Digests, Part::Chunk(u32::MAX), Part::Votes] {
                let (mut wire, request) = (Vec::new(), Request { item, part });
                request.send(&mut wire).await.unwrap();
                assert_eq!(Request::receive(&mut wire.as_slice()).await.unwrap(), request);
            }
        }
        for reply in [
            Reply::Here { bytes: 1 << 40 },
            Reply::Lacking(Lack::NotYet),
            Reply::Lacking(Lack::Gone),
        ] {
            let mut wire = Vec::new();
            reply.send(&mut wire).await.unwrap();
            assert_eq!(Reply::receive(&mut wire.as_slice()).await.unwrap(), reply);
        }
        assert!(Request::receive(&mut [9; 14].as_slice()).await.is_err());
        assert!(Reply::receive(&mut [9; 9].as_slice()).await.is_err());
    }

    #[tokio::test]
    async fn votes_survive_the_wire_and_too_many_are_not_read() {
        let votes = vec![Prepared { step: 7, detail: "slow".into(), ..Prepared::default() }; 2];
        let mut wire = Vec::new();
        send_votes(&mut wire, votes.clone()).await.unwrap();
        let mut wire = wire.as_slice();
        let Reply::Here { bytes } = Reply::receive(&mut wire).await.unwrap() else { panic!() };
        assert_eq!(receive_votes(&mut wire, bytes).await.unwrap(), votes);
        let error = receive_votes(&mut wire, MOST_VOTE_BYTES + 1).await.unwrap_err().to_string();
        assert!(error.contains("more votes than a worker remembers"), "{error}");
        let error = receive_votes(&mut [0xff; 3].as_slice(), 3).await.unwrap_err().to_string();
        assert!(error.contains("votes are damaged"), "{error}");
    }
}
