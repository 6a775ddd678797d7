//! Head and cross-entropy of all loops in one, over chunks of rows: the logits of one chunk are all
//! that ever exists. What the loss gives each row is known before its logits are (the exit
//! distribution needs the gates alone), so the gradients are taken while the logits are there, and
//! nothing is computed twice.

use rayon::prelude::*;

use super::clock::{Clock, Section};
use super::gradients::{Part, accumulate};
use super::simd;
use super::weights::Matrix;

/// Rows per task.
const BLOCK: usize = 192;

/// Bytes of logits per chunk, unless that were too few rows to make a sum over them worth its while.
const CHUNK_BYTES: usize = 6 << 20;
const CHUNK_BLOCKS: std::ops::RangeInclusive<usize> = 2..=8;

/// From row to row of the logits: rows of a power of two would all meet in the same few lines of a
/// cache.
fn stride(vocab: usize) -> usize {
    vocab.next_multiple_of(16) + 16
}

fn chunk_rows(vocab: usize) -> usize {
    let blocks = CHUNK_BYTES / (size_of::<f32>() * vocab * BLOCK);
    BLOCK * blocks.clamp(*CHUNK_BLOCKS.start(), *CHUNK_BLOCKS.end())
}

/// Floats of the logits of a chunk.
pub(super) fn logits_len(vocab: usize, rows: usize) -> usize {
    chunk_rows(vocab).min(rows) * stride(vocab)
}

/// The rows that the head reads, and where their gradients go.
pub(super) struct Rows<'a> {
    /// States of all loops, `[R * N, d]`.
    pub(super) states: &'a [f32],
    /// Ids of the next tokens, `[N]`, the same for every loop.
    pub(super) targets: &'a [u32],
    pub(super) hidden: usize,
    pub(super) vocab: usize,
}

/// Gradients that come with the losses.
pub(super) struct Into<'a> {
    /// Gradient of the whole loss with respect to each row's cross-entropy, `[R * N]`: used up.
    pub(super) shares: &'a mut [f32],
    /// Gradient of the states, `[R * N, d]`: written.
    pub(super) dstates: &'a mut [f32],
    /// Gradient of the head, `[V, d]`: added to.
    pub(super) dhead: &'a mut [f32],
}

/// Cross-entropy of each row, `[R * N]`, in nats, and the likeliest next token, of several the one with
/// the lowest id; with `into`, the gradients too. `logits` has [`logits_len`] elements.
pub(super) fn cross_entropy(
    clock: &Clock,
    head: &Matrix,
    rows: &Rows<'_>,
    logits: &mut [f32],
    losses: &mut [f32],
    likeliest: &mut [u32],
    mut into: Option<Into<'_>>,
) {
    let Rows { states, targets, hidden: d, vocab } = *rows;
    let (chunk, stride) = (chunk_rows(vocab), stride(vocab));
    for first in (0..losses.len()).step_by(chunk) {
        let count = chunk.min(losses.len() - first);
        let states = &states[first * d..(first + count) * d];
        let logits = &mut logits[..count * stride];
        let losses = &mut losses[first..first + count];
        let likeliest = &mut likeliest[first..first + count];
        let blocks = (
            states.par_chunks(BLOCK * d),
            logits.par_chunks_mut(BLOCK * stride),
            losses.par_chunks_mut(BLOCK),
            likeliest.par_chunks_mut(BLOCK),
        );
        let target = |block: usize, row: usize| {
            targets[(first + block * BLOCK + row) % targets.len()] as usize
        };
        match &mut into {
            None => {
                blocks.into_par_iter().enumerate().for_each(
                    |(block, (x, logits, losses, likeliest))| {
                        clock.time(Section::Head, || {
                            head.apply(losses.len(), x, logits, stride);
                            let rows = losses.iter_mut().zip(likeliest).enumerate();
                            for (row, (loss, likeliest)) in rows {
                                let logits = &logits[row * stride..row * stride + vocab];
                                *loss = simd::log_sum_exp(logits) - logits[target(block, row)];
                                *likeliest = simd::index_of_max(logits) as u32;
                            }
                        });
                    },
                );
            }
            Some(Into { shares, dstates, dhead }) => {
                let (x, logits_of, losses_of, likeliest) = blocks;
                let factors = &mut shares[first..first + count];
                let shares = factors.par_chunks_mut(BLOCK);
                let dstates = dstates[first * d..(first + count) * d].par_chunks_mut(BLOCK * d);
                (x, logits_of, losses_of, likeliest, shares, dstates)
                    .into_par_iter()
                    .enumerate()
                    .for_each(|(block, (x, logits, losses, likeliest, shares, dx))| {
                        clock.time(Section::Head, || {
                            head.apply(losses.len(), x, logits, stride);
                            // The softmax is divided by its sum where that takes fewest divisions: in the
                            // states' gradient, and in the rows that the weight's is made from.
                            let rows = losses.iter_mut().zip(likeliest).zip(&mut *shares);
                            for (row, ((loss, likeliest), share)) in rows.enumerate() {
                                let logits = &mut logits[row * stride..row * stride + vocab];
                                let target = target(block, row);
                                *likeliest = simd::index_of_max(logits) as u32;
                                let own = logits[target];
                                let (max, sum) = simd::exp_and_sum(logits);
                                *loss = max + sum.ln() - own;
                                logits[target] -= sum;
                                *share /= sum;
                            }
                            head.apply_backward(losses.len(), logits, stride, dx, false);
                            for (dx, &factor) in dx.chunks_exact_mut(d).zip(&*shares) {
                                simd::scale(dx, factor);
                            }
                        });
                    });
                accumulate(
                    (clock, Section::Head),
                    count,
                    vec![Part {
                        into: dhead,
                        dy: logits,
                        stride,
                        x: states,
                        inputs: d,
                        factors: Some(factors),
                    }],
                );
            }
        }
    }
}
