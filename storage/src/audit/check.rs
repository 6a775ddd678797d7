//! Does what was used follow the order? The order is a bijection of every data epoch, so what
//! follows it uses every sequence of an epoch once.

use std::collections::BTreeMap;

use looptrain_proto::{Digest, Spec};

use super::{SlotUse, StepUse};
use crate::{Dataset, Error, Order, Result, Split};

/// What an audit that holds says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AuditSummary {
    /// Steps that were compared.
    pub steps: u64,
    /// Sequences that they used.
    pub sequences: u64,
    /// Sequences drawn from each dataset.
    pub drawn: BTreeMap<String, u64>,
    /// Slots whose tokens were read again and compared.
    pub read: u64,
}

/// Compares what a run has used, from its own first step on, with the order that its spec draws; with
/// `read`, also the tokens with those of the datasets, which are those of the spec.
///
/// # Errors
/// [`Error::OutOfOrder`] with the first place that differs, or when a dataset cannot be read.
pub async fn check_audit(
    spec: &Spec,
    datasets: &[Dataset],
    steps: &[StepUse],
    read: bool,
) -> Result<AuditSummary> {
    let stages = 0..spec.stages.len();
    let orders: Vec<Order> = stages.map(|stage| Order::of_stage(spec, stage, datasets)).collect();
    let mut summary = AuditSummary::default();
    let before = spec.branch.as_ref().map_or(0, |branch| branch.step);
    for (expected, used) in (before + 1..).zip(steps) {
        let wrong = |reason: String| Error::OutOfOrder { step: used.step, reason };
        if used.step.0 != expected {
            return Err(wrong(format!("it stands where step {expected} is expected")));
        }
        let at = spec.position(used.step).ok_or_else(|| wrong("the spec has none".to_owned()))?;
        let stage = &spec.stages[at.stage];
        if used.slots.len() != at.slots as usize {
            return Err(wrong(format!("it has {} of {} slots", used.slots.len(), at.slots)));
        }
        let mixture = spec.mixture(at.stage);
        let mut next = at.first_sequence;
        for slot in &used.slots {
            let drawn = (next..next + stage.slot_sequences as u64).map(|index| {
                let place = orders[at.stage].at(index);
                (mixture[place.part].0, place.sequence)
            });
            let drawn: Vec<(usize, u64)> = drawn.collect();
            let named = |&(dataset, sequence): &(usize, u64)| {
                (spec.datasets[dataset].name.clone(), sequence)
            };
            let ordered: Vec<(String, u64)> = drawn.iter().map(named).collect();
            if ordered != slot.sequences {
                let (number, used) = (slot.slot, &slot.sequences);
                return Err(wrong(format!("slot {number} used {used:?}, not {ordered:?}")));
            }
            if read {
                let tokens = read_slot(datasets, &drawn, stage.sequence_length).await?;
                compare(slot, tokens).map_err(wrong)?;
                summary.read += 1;
            }
            for (dataset, _) in ordered {
                *summary.drawn.entry(dataset).or_default() += 1;
            }
            next += stage.slot_sequences as u64;
        }
        summary.steps += 1;
        summary.sequences += next - at.first_sequence;
    }
    Ok(summary)
}

/// Digest of the tokens of some sequences.
async fn read_slot(
    datasets: &[Dataset],
    drawn: &[(usize, u64)],
    sequence_length: usize,
) -> Result<Digest> {
    let mut bytes = Vec::new();
    for &(dataset, sequence) in drawn {
        let tokens =
            datasets[dataset].read_sequence(Split::Train, sequence_length, sequence).await?;
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    }
    Ok(Digest::of(&bytes))
}

fn compare(slot: &SlotUse, tokens: Digest) -> std::result::Result<(), String> {
    let SlotUse { slot: number, tokens: used, .. } = slot;
    let differs = || format!("slot {number} used tokens {used}, its sequences have {tokens}");
    if *used == tokens { Ok(()) } else { Err(differs()) }
}
