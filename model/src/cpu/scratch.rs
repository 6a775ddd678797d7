//! Short-lived buffers that a thread keeps between uses.

use std::cell::RefCell;

thread_local! {
    static KEPT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with buffers of the given lengths, whose contents are anything. Each starts on a
/// cache line of its own.
pub(super) fn with_scratch<const N: usize, R>(
    lengths: [usize; N],
    work: impl FnOnce([&mut [f32]; N]) -> R,
) -> R {
    /// Floats of a cache line.
    const LINE: usize = 16;
    // Taken out of the cell: should the work come here again on this thread, it gets a fresh one.
    let mut buffer = KEPT.with(RefCell::take);
    let needed = LINE + lengths.iter().map(|len| len.next_multiple_of(LINE)).sum::<usize>();
    if buffer.len() < needed {
        buffer.resize(needed, 0.0);
    }
    let start = buffer.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    let mut rest = &mut buffer[start..];
    let parts = lengths.map(|len| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(len.next_multiple_of(LINE));
        rest = after;
        &mut part[..len]
    });
    let result = work(parts);
    KEPT.with(|kept| {
        if kept.borrow().len() < buffer.len() {
            kept.replace(buffer);
        }
    });
    result
}
