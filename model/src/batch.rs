//! The tokens that a model computes together.

/// The tokens of one slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotBatch {
    /// `[sequences, sequence_length + 1]`, row after row: inputs and, shifted by one, targets. All
    /// ids are below the model's vocabulary.
    pub tokens: Vec<u32>,
    /// Number of sequences.
    pub sequences: usize,
    /// Input tokens per sequence.
    pub sequence_length: usize,
    /// Where attention begins for each input, `[sequences * sequence_length]`: see
    /// [`document_starts`]. Empty when each sees all of its sequence up to itself.
    pub starts: Vec<u32>,
}

impl SlotBatch {
    /// Input ids and target ids, `[sequences * sequence_length]` each.
    #[must_use]
    pub fn ids(&self) -> [Vec<u32>; 2] {
        [0, 1].map(|shift| {
            let rows = self.tokens.chunks_exact(self.sequence_length + 1);
            rows.flat_map(|row| &row[shift..shift + self.sequence_length]).copied().collect()
        })
    }
}

/// Panics unless `starts` are empty, or positions up to each of `tokens` tokens that grow along sequences
/// of `length`.
pub(crate) fn assert_starts(starts: &[u32], tokens: usize, length: usize) {
    let of_sequence = |starts: &[u32]| {
        starts.is_sorted() && starts.iter().enumerate().all(|(at, start)| *start as usize <= at)
    };
    assert!(
        starts.is_empty() || starts.len() == tokens && starts.chunks(length).all(of_sequence),
        "a token's document begins with it or before, and not before that of the token before"
    );
}

/// The position in its sequence of the first token of each token's document: of ids `[N]`, sequences
/// of `length` one after the other, in which `end` is the last token of a document. What a sequence
/// begins with is the rest of a document and counts as one.
#[must_use]
pub fn document_starts(ids: &[u32], length: usize, end: u32) -> Vec<u32> {
    let of_sequence = |ids: &[u32]| {
        let mut start = 0;
        let next = |(at, id): (usize, &u32)| {
            let own = start;
            if *id == end {
                start = at as u32 + 1;
            }
            own
        };
        ids.iter().enumerate().map(next).collect::<Vec<u32>>()
    };
    ids.chunks(length).flat_map(of_sequence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_begins_after_the_end_of_another_and_with_its_sequence() {
        let ids = [5, 9, 6, 7, 9, 9, /* next */ 8, 8, 8, 9, 1, 2];
        assert_eq!(document_starts(&ids, 6, 9), [0, 0, 2, 2, 2, 5, 0, 0, 0, 0, 4, 4]);
        assert_eq!(document_starts(&ids, 6, 4), [0; 12]);
        assert_starts(&document_starts(&ids, 6, 9), 12, 6);
    }
}
