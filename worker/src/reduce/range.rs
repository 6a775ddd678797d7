//! Values that have no place in a sum.

/// A value that is not finite, or so large that the sum of all slots might not be.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("element {index} is {value}, outside the range of the sum")]
pub struct OutOfRange {
    /// Which of the values.
    pub index: usize,
    /// What it was: NaN, infinite or too large.
    pub value: f32,
}

/// Elements checked and then added while they are in the first-level cache.
const CHUNK: usize = 1024;

/// Has `add` add each chunk of the values to the sums of the same indices, once all of the chunk is
/// known to be within `limit`.
///
/// # Errors
/// Names the first value that is not; chunks before it have been added.
///
/// # Panics
/// When the lengths differ.
pub(super) fn add_within<T>(
    limit: f32,
    sums: &mut [T],
    values: &[f32],
    add: impl Fn(&mut [T], &[f32]),
) -> Result<(), OutOfRange> {
    assert_eq!(sums.len(), values.len(), "a sum has one element per value");
    let chunks = sums.chunks_mut(CHUNK).zip(values.chunks(CHUNK));
    for (number, (sums, values)) in chunks.enumerate() {
        // A NaN compares false, so it counts as outside.
        let outside =
            values.iter().fold(0u32, |outside, value| outside | u32::from(!within(*value, limit)));
        if outside != 0 {
            return Err(first_outside(number * CHUNK, values, limit));
        }
        add(sums, values);
    }
    Ok(())
}

fn within(value: f32, limit: f32) -> bool {
    value.abs() <= limit
}

#[cold]
fn first_outside(offset: usize, values: &[f32], limit: f32) -> OutOfRange {
    let index = values.iter().position(|value| !within(*value, limit)).unwrap_or(0);
    OutOfRange { index: offset + index, value: values[index] }
}
