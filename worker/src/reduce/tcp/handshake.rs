//! The first bytes of a connection between peers.
//!
//! The connecting side sends a [`Hello`] of fixed size; the accepting side answers with one
//! [`Answer`]. Everything is little-endian, and so are the sums that follow.

use looptrain_proto::{Digest, Generation, Incarnation, PROTOCOL_VERSION, Rank};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::RingId;

// Sums travel as they lie in memory; all supported machines are little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

const MAGIC: [u8; 8] = *b"looptrng";
const HELLO_BYTES: usize = 8 + 4 + 4 + 32 + 8 + 8 + 4 + 4;

const PURPOSE_RING: u32 = 1;
const PURPOSE_STATE: u32 = 2;

/// Who connects to a worker of which run, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) run: Digest,
    pub(super) purpose: Purpose,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be one of the streams from the rank before.
    Ring { id: RingId, sender: Rank, stream: u32 },
    /// To fetch training state.
    State,
}

/// Why a connection is not wanted; or that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Accepted,
    OtherVersion,
    OtherRun,
    /// The listener is already at this, newer, ring.
    Stale(RingId),
    Busy,
}

/// What a stranger's first bytes were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    Peer(Hello),
    OtherVersion,
    /// Not one of ours at all: no answer is owed.
    Stranger,
}

impl Hello {
    fn to_bytes(self) -> [u8; HELLO_BYTES] {
        let (purpose, ring, sender, number) = match self.purpose {
            Purpose::Ring { id, sender, stream } => (PURPOSE_RING, id, sender, stream),
            Purpose::State => (PURPOSE_STATE, RingId::default(), Rank::default(), 0),
        };
        let mut bytes = [0; HELLO_BYTES];
        let mut rest = bytes.as_mut_slice();
        for field in [
            MAGIC.as_slice(),
            &PROTOCOL_VERSION.to_le_bytes(),
            &purpose.to_le_bytes(),
            &self.run.0,
            &ring.incarnation.0.to_le_bytes(),
            &ring.generation.0.to_le_bytes(),
            &sender.0.to_le_bytes(),
            &number.to_le_bytes(),
        ] {
            let (place, behind) = rest.split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = behind;
        }
        bytes
    }

    pub(super) async fn send(self, stream: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        stream.write_all(&self.to_bytes()).await?;
        // TLS may hold back what is not sent on.
        stream.flush().await
    }

    pub(super) async fn receive(
        stream: &mut (impl AsyncRead + Unpin),
    ) -> std::io::Result<Greeting> {
        let mut magic = [0; MAGIC.len()];
        stream.read_exact(&mut magic).await?;
        if magic != MAGIC {
            return Ok(Greeting::Stranger);
        }
        if stream.read_u32_le().await? != PROTOCOL_VERSION {
            return Ok(Greeting::OtherVersion);
        }
        let purpose = stream.read_u32_le().await?;
        let mut run = [0; 32];
        stream.read_exact(&mut run).await?;
        let incarnation = Incarnation(stream.read_u64_le().await?);
        let generation = Generation(stream.read_u64_le().await?);
        let sender = Rank(stream.read_u32_le().await?);
        let number = stream.read_u32_le().await?;
        let id = RingId { incarnation, generation };
        let purpose = match purpose {
            PURPOSE_RING => Purpose::Ring { id, sender, stream: number },
            PURPOSE_STATE => Purpose::State,
            _ => return Ok(Greeting::OtherVersion),
        };
        Ok(Greeting::Peer(Self { run: Digest(run), purpose }))
    }
}

impl Answer {
    pub(super) async fn send(self, stream: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        let (code, ring) = match self {
            Self::Accepted => (0, RingId::default()),
            Self::OtherVersion => (1, RingId::default()),
            Self::OtherRun => (2, RingId::default()),
            Self::Stale(ring) => (3, ring),
            Self::Busy => (4, RingId::default()),
        };
        let mut bytes = [code; 17];
        bytes[1..9].copy_from_slice(&ring.incarnation.0.to_le_bytes());
        bytes[9..].copy_from_slice(&ring.generation.0.to_le_bytes());
        stream.write_all(&bytes).await?;
        stream.flush().await
    }

    pub(super) async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Self> {
        let code = stream.read_u8().await?;
        let incarnation = Incarnation(stream.read_u64_le().await?);
        let generation = Generation(stream.read_u64_le().await?);
        match code {
            0 => Ok(Self::Accepted),
            1 => Ok(Self::OtherVersion),
            2 => Ok(Self::OtherRun),
            3 => Ok(Self::Stale(RingId { incarnation, generation })),
            4 => Ok(Self::Busy),
            _ => Err(std::io::Error::new(
                std::io::ErrorKind::InvalidData,
                "its answer is no peer's: another program listens there",
            )),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_hello_and_every_answer_survive_the_wire() {
        let ring = RingId { incarnation: Incarnation(3), generation: Generation(u64::MAX) };
        for purpose in [Purpose::Ring { id: ring, sender: Rank(7), stream: 3 }, Purpose::State] {
            let hello = Hello { run: Digest::of(b"run"), purpose };
            let bytes = hello.to_bytes();
            let received = Hello::receive(&mut bytes.as_slice()).await.unwrap();
            assert_eq!(received, Greeting::Peer(hello));
        }
        for answer in [
            Answer::Accepted,
            Answer::OtherVersion,
            Answer::OtherRun,
            Answer::Stale(ring),
            Answer::Busy,
        ] {
            let mut wire = Vec::new();
            answer.send(&mut wire).await.unwrap();
            assert_eq!(Answer::receive(&mut wire.as_slice()).await.unwrap(), answer);
        }
    }

    #[tokio::test]
    async fn strangers_and_other_versions_are_told_apart() {
        let http = b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n";
        assert_eq!(Hello::receive(&mut http.as_slice()).await.unwrap(), Greeting::Stranger);
        let hello = Hello { run: Digest::of(b"run"), purpose: Purpose::State };
        let mut other = hello.to_bytes();
        other[8] ^= 0xff;
        assert_eq!(Hello::receive(&mut other.as_slice()).await.unwrap(), Greeting::OtherVersion);
        assert!(Hello::receive(&mut &hello.to_bytes()[..40]).await.is_err());
        assert!(Answer::receive(&mut [9u8; 17].as_slice()).await.is_err());
    }
}
