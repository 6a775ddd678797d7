//! The audit of a run: which sequences every committed step was computed from, in the words of who
//! computed it.
//!
//! ```text
//! runs/<run>/audit/step-0000000017/incarnation-3-generation-5-rank-1.jsonl     one line a slot
//! ```
//!
//! A rank writes its lines *before* it votes for the step: so once a step is committed, which takes
//! the votes of all ranks, the lines of all are there, whoever dies then. They are also there for
//! tries that came to nothing. Which try was committed, the metrics log tells: the generation, and
//! how many ranks it had.

mod check;

use std::collections::{BTreeMap, BTreeSet};

use looptrain_proto::{Digest, Generation, Incarnation, Rank, Step};
use serde::{Deserialize, Serialize};

pub use self::check::{AuditSummary, check_audit};
use crate::{Error, Result, Store, read_metrics, run_prefix};

/// Which try at a step a rank took part in, and as which rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt {
    /// The step.
    pub step: Step,
    /// The coordinator that formed the generation.
    pub incarnation: Incarnation,
    /// The generation.
    pub generation: Generation,
    /// The rank in it.
    pub rank: Rank,
}

/// What a slot of a step was computed from: a line of the audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotUse {
    /// The slot.
    pub slot: u32,
    /// Dataset and index of each sequence, in their order.
    pub sequences: Vec<(String, u64)>,
    /// Digest of the tokens as they went into the model, four bytes each, lowest first.
    pub tokens: Digest,
}

/// What a committed step was computed from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepUse {
    /// The step.
    pub step: Step,
    /// The generation that committed it.
    pub generation: Generation,
    /// Ranks in that generation.
    pub world: u32,
    /// All slots, in their order.
    pub slots: Vec<SlotUse>,
}

fn prefix(run: &str) -> String {
    format!("{}/audit", run_prefix(run))
}

impl Attempt {
    pub(crate) fn key(&self, run: &str) -> String {
        let Self { step, incarnation, generation, rank } = self;
        let prefix = prefix(run);
        format!(
            "{prefix}/step-{:010}/incarnation-{incarnation}-generation-{generation}-rank-{rank}.jsonl",
            step.0
        )
    }

    /// The attempt whose key this is.
    fn of_key(run: &str, key: &str) -> Option<Self> {
        let (step, rest) =
            key.strip_prefix(&prefix(run))?.strip_prefix("/step-")?.split_once('/')?;
        let rest = rest.strip_prefix("incarnation-")?.strip_suffix(".jsonl")?;
        let (incarnation, rest) = rest.split_once("-generation-")?;
        let (generation, rank) = rest.split_once("-rank-")?;
        Some(Self {
            step: Step(step.parse().ok()?),
            incarnation: Incarnation(incarnation.parse().ok()?),
            generation: Generation(generation.parse().ok()?),
            rank: Rank(rank.parse().ok()?),
        })
    }
}

/// Writes what a rank has used in an attempt at a step.
///
/// # Errors
/// When the store fails.
pub async fn write_audit(
    store: &Store,
    run: &str,
    attempt: Attempt,
    slots: &[SlotUse],
) -> Result<()> {
    let key = attempt.key(run);
    let mut lines = Vec::new();
    for slot in slots {
        serde_json::to_writer(&mut lines, slot).map_err(|error| Error::Malformed {
            place: store.place(&key),
            reason: error.to_string(),
        })?;
        lines.push(b'\n');
    }
    store.put(&key, lines).await
}

/// What the committed steps of a run after step `after` were computed from, in their order, as far as the
/// metrics log goes.
///
/// # Errors
/// When the store fails, or the lines of a committed step are not there, not readable, or not those
/// of every slot once.
pub async fn read_audit(store: &Store, run: &str, after: Step) -> Result<Vec<StepUse>> {
    let mut attempts: BTreeMap<(Step, Generation), Vec<Attempt>> = BTreeMap::new();
    for object in store.list(&prefix(run)).await? {
        if let Some(attempt) = Attempt::of_key(run, &object.key) {
            attempts.entry((attempt.step, attempt.generation)).or_default().push(attempt);
        }
    }
    let mut steps = Vec::new();
    for line in read_metrics(store, run).await? {
        let number = |key: &str| line.get(key).and_then(serde_json::Value::as_u64);
        let (Some(step), Some(generation), Some(world)) =
            (number("step"), number("generation"), number("world"))
        else {
            continue;
        };
        let (step, generation) = (Step(step), Generation(generation));
        if step <= after {
            continue;
        }
        let tried = attempts.remove(&(step, generation)).unwrap_or_default();
        let ranks = complete(&tried, world).ok_or_else(|| Error::Malformed {
            place: store.place(&prefix(run)),
            reason: format!(
                "it has no lines of all {world} ranks that committed step {step} in generation {generation}; was the run started without --audit?"
            ),
        })?;
        let slots = read_step(store, run, &ranks).await?;
        steps.push(StepUse { step, generation, world: ranks.len() as u32, slots });
    }
    Ok(steps)
}

/// The ranks of the newest attempt that has all of them. A generation that an older coordinator had
/// formed under the same number came to nothing, or the newer one would have gone on counting.
fn complete(tried: &[Attempt], world: u64) -> Option<Vec<Attempt>> {
    let newest = tried.iter().map(|attempt| attempt.incarnation).collect::<BTreeSet<_>>();
    newest.into_iter().rev().find_map(|incarnation| {
        let mut ranks: Vec<Attempt> = tried
            .iter()
            .filter(|attempt| {
                attempt.incarnation == incarnation && u64::from(attempt.rank.0) < world
            })
            .copied()
            .collect();
        ranks.sort_unstable();
        (ranks.len() as u64 == world).then_some(ranks)
    })
}

async fn read_step(store: &Store, run: &str, ranks: &[Attempt]) -> Result<Vec<SlotUse>> {
    let mut slots = Vec::new();
    for attempt in ranks {
        let key = attempt.key(run);
        let malformed = |reason: String| Error::Malformed { place: store.place(&key), reason };
        let text = store.get(&key).await?;
        for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            let slot: SlotUse =
                serde_json::from_slice(line).map_err(|error| malformed(error.to_string()))?;
            if slot.slot as usize != slots.len() {
                let expected = slots.len();
                return Err(malformed(format!("it has slot {} instead of {expected}", slot.slot)));
            }
            slots.push(slot);
        }
    }
    Ok(slots)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::MetricsLog;

    fn attempt(step: u64, incarnation: u64, generation: u64, rank: u32) -> Attempt {
        Attempt {
            step: Step(step),
            incarnation: Incarnation(incarnation),
            generation: Generation(generation),
            rank: Rank(rank),
        }
    }

    fn slot(slot: u32, sequence: u64) -> SlotUse {
        let sequences = vec![("text".to_owned(), sequence), ("code".to_owned(), 7)];
        SlotUse { slot, sequences, tokens: Digest::of(b"tokens") }
    }

    /// A run whose log says that these steps were committed: (step, generation, world).
    async fn run(committed: &[(u64, u64, u32)]) -> Store {
        let store = Store::open("memory://").unwrap();
        let mut log = MetricsLog::open(&store, "r", Step(0)).await.unwrap();
        for (step, generation, world) in committed {
            let line = json!({ "step": step, "generation": generation, "world": world });
            log.append(&line).unwrap();
        }
        log.flush().await.unwrap();
        store
    }

    async fn write(store: &Store, attempt: Attempt, slots: &[SlotUse]) {
        write_audit(store, "r", attempt, slots).await.unwrap();
    }

    #[tokio::test]
    async fn the_lines_of_the_attempt_that_was_committed_are_read_and_no_others() {
        let store = run(&[(1, 1, 2), (2, 3, 1)]).await;
        write(&store, attempt(1, 1, 1, 1), &[slot(2, 12)]).await;
        write(&store, attempt(1, 1, 1, 0), &[slot(0, 10), slot(1, 11)]).await;
        // Step 2: by two, of whom one died; by one, twice under the same number.
        write(&store, attempt(2, 1, 2, 1), &[slot(1, 99)]).await;
        write(&store, attempt(2, 1, 3, 0), &[slot(0, 98)]).await;
        write(&store, attempt(2, 1, 3, 1), &[slot(1, 98)]).await;
        write(&store, attempt(2, 2, 3, 0), &[slot(0, 13), slot(1, 14)]).await;
        // Not committed.
        write(&store, attempt(3, 2, 3, 0), &[slot(0, 15)]).await;
        let steps = read_audit(&store, "r", Step(0)).await.unwrap();
        let drawn =
            |step: &StepUse| step.slots.iter().map(|slot| slot.sequences[0].1).collect::<Vec<_>>();
        assert_eq!(steps.iter().map(drawn).collect::<Vec<_>>(), [vec![10, 11, 12], vec![13, 14]]);
        assert_eq!((steps[0].world, steps[1].generation), (2, Generation(3)));
        let later = read_audit(&store, "r", Step(1)).await.unwrap();
        assert_eq!(later.iter().map(drawn).collect::<Vec<_>>(), [vec![13, 14]]);
    }

    #[tokio::test]
    async fn a_committed_step_without_the_lines_of_all_its_ranks_is_named() {
        let store = run(&[(1, 1, 2)]).await;
        write(&store, attempt(1, 1, 1, 0), &[slot(0, 10)]).await;
        let error = read_audit(&store, "r", Step(0)).await.unwrap_err().to_string();
        assert!(error.contains("all 2 ranks that committed step 1 in generation 1"), "{error}");
        write(&store, attempt(1, 1, 1, 1), &[slot(2, 10)]).await;
        let error = read_audit(&store, "r", Step(0)).await.unwrap_err().to_string();
        assert!(error.contains("slot 2 instead of 1"), "{error}");
    }

    #[test]
    fn a_key_tells_its_attempt() {
        let one = attempt(17, 3, 5, 12);
        let key = one.key("r");
        assert_eq!(key, "runs/r/audit/step-0000000017/incarnation-3-generation-5-rank-12.jsonl");
        assert_eq!(Attempt::of_key("r", &key), Some(one));
        assert_eq!(Attempt::of_key("other", &key), None);
        assert_eq!(Attempt::of_key("r", &key.replace("rank-12", "rank-x")), None);
    }
}
