//! From the wire to the core: checks the form of what workers say, so that the core only sees
//! well-formed reports.

use std::time::Duration;

use looptrain_proto::v1::{self, worker_message::Kind};
use looptrain_proto::{Digest, Generation, NoDigest, Step};

use crate::core::{Report, SavedPart};

/// A message that makes no sense, in words that follow "sent".
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("a message of a kind that this coordinator does not know")]
    Unknown,
    #[error("a second Join on one session")]
    SecondJoin,
    #[error("a Prepared without statistics")]
    NoStatistics,
    #[error("a {message} whose {field} is no digest ({error})")]
    NoDigest { message: &'static str, field: &'static str, error: NoDigest },
}

fn digest(message: &'static str, field: &'static str, bytes: &[u8]) -> Result<Digest, Malformed> {
    Digest::from_bytes(bytes).map_err(|error| Malformed::NoDigest { message, field, error })
}

/// Takes a message of a worker that has joined.
pub(crate) fn report(message: v1::WorkerMessage) -> Result<Report, Malformed> {
    Ok(match message.kind.ok_or(Malformed::Unknown)? {
        Kind::Join(_) => return Err(Malformed::SecondJoin),
        Kind::Heartbeat(_) => Report::Heartbeat,
        Kind::Ready(ready) => Report::Ready {
            generation: Generation(ready.generation),
            step: Step(ready.step),
            weights_digest: digest("Ready", "weights_digest", &ready.weights_digest)?,
        },
        Kind::Prepared(vote) => Report::Prepared {
            generation: Generation(vote.generation),
            step: Step(vote.step),
            digest: digest("Prepared", "digest", &vote.digest)?,
            statistics: Box::new(vote.statistics.ok_or(Malformed::NoStatistics)?),
            sections: vote.sections.unwrap_or_default(),
            computed_slots: vote.computed_slots,
            detail: vote.detail,
        },
        Kind::Evaluated(share) => Report::Evaluated {
            generation: Generation(share.generation),
            step: Step(share.step),
            sums: share.sums,
            tokens: share.tokens,
        },
        Kind::PartSaved(saved) => Report::PartSaved {
            step: Step(saved.step),
            part: saved.part as usize,
            parts: saved.parts as usize,
            result: if saved.error.is_empty() {
                Ok(SavedPart {
                    digest: digest("PartSaved", "digest", &saved.digest)?,
                    weights_digest: digest("PartSaved", "weights_digest", &saved.weights_digest)?,
                    file: saved.file,
                    bytes: saved.bytes,
                    tensors: saved.tensors,
                    stall: Duration::try_from_secs_f64(saved.stall_seconds).unwrap_or_default(),
                })
            } else {
                Err(saved.error)
            },
        },
        Kind::Failed(failed) => Report::Failed {
            cause: failed.cause(),
            generation: Generation(failed.generation),
            step: Step(failed.step),
            detail: failed.detail,
        },
        Kind::Fetched(fetched) => Report::Fetched {
            step: Step(fetched.step),
            result: if fetched.error.is_empty() { Ok(()) } else { Err(fetched.error) },
        },
        Kind::Waiting(waiting) => Report::Waiting {
            generation: Generation(waiting.generation),
            detail: waiting.detail,
            failed: waiting.failed,
        },
        Kind::Communicator(communicator) => Report::Communicator {
            generation: Generation(communicator.generation),
            id: communicator.id,
        },
        Kind::Leaving(leaving) => Report::Leaving { reason: leaving.reason },
        Kind::Leave(leave) => Report::Leave { reason: leave.reason },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_message_is_named_with_its_field() {
        let message = |kind| v1::WorkerMessage { kind: Some(kind) };
        let ready = v1::Ready { generation: 1, step: 2, weights_digest: vec![1, 2] };
        let error = report(message(Kind::Ready(ready))).map_err(|error| error.to_string());
        let said = error.err().unwrap_or_default();
        assert!(said.contains("Ready whose weights_digest"), "{said}");
        let vote = v1::Prepared { digest: vec![0; 32], ..v1::Prepared::default() };
        let error = report(message(Kind::Prepared(vote))).err();
        assert_eq!(error, Some(Malformed::NoStatistics));
        assert_eq!(report(v1::WorkerMessage { kind: None }).err(), Some(Malformed::Unknown));
        let join = v1::Join::default();
        assert_eq!(report(message(Kind::Join(join))).err(), Some(Malformed::SecondJoin));
    }

    #[test]
    fn a_part_that_could_not_be_saved_needs_no_digests() {
        let saved = v1::PartSaved { error: "denied".into(), ..v1::PartSaved::default() };
        let message = v1::WorkerMessage { kind: Some(Kind::PartSaved(saved)) };
        assert!(matches!(report(message), Ok(Report::PartSaved { result: Err(_), .. })));
    }
}
