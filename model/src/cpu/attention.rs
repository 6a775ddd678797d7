//! Causal attention on rotated queries and keys, one (sequence, head) pair per task.
//!
//! Queries are taken in tiles of [`TILE`] rows against all keys up to the tile's last row, so the
//! masked half is skipped and scores never take more than `TILE x T` floats per task. Backward
//! recomputes the probabilities from the saved log-sum-exp (Dao et al., arXiv 2205.14135).

use rayon::prelude::*;

use super::clock::{Clock, Section};
use super::product::{Left, Right, Shape, gather_rows, pack_transposed, panels_len, product};
use super::scratch::with_scratch;
use super::simd;

/// Query rows per tile.
const TILE: usize = 48;

/// Shape of the attention of some sequences.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dims {
    /// Sequences, B.
    pub(super) sequences: usize,
    /// Positions per sequence, T.
    pub(super) length: usize,
    /// Heads, H.
    pub(super) heads: usize,
    /// Width of a head.
    pub(super) head_dim: usize,
}

impl Dims {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Floats of one head's rows in one sequence.
    pub(super) fn head_len(&self) -> usize {
        self.length * self.head_dim
    }

    /// Where the columns of task `task` begin in rows of `stride` elements.
    fn start(&self, task: usize, stride: usize) -> usize {
        (task / self.heads) * self.length * stride + (task % self.heads) * self.head_dim
    }
}

/// Queries, keys and values of all tokens, beside each other in rows `[B * T, 3 d]`. Queries carry
/// the softmax scale.
#[derive(Clone, Copy)]
struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    stride: usize,
}

impl<'a> Head<'a> {
    fn new(qkv: &'a [f32], dims: &Dims, task: usize) -> Self {
        let (d, stride) = (dims.width(), 3 * dims.width());
        let q = &qkv[dims.start(task, stride)..];
        Self { q, k: &q[d..], v: &q[2 * d..], stride }
    }
}

/// From `qkv [B * T, 3 d]`: the outputs of each head, `[B, H, T, head_dim]`, and the log-sum-exp of
/// each query's scores, `[B, H, T]`.
pub(super) fn forward(
    clock: &Clock,
    qkv: &[f32],
    dims: &Dims,
    mixed: &mut [f32],
    log_sums: &mut [f32],
) {
    let (length, head_dim) = (dims.length, dims.head_dim);
    let tasks =
        mixed.par_chunks_mut(dims.head_len()).zip(log_sums.par_chunks_mut(length)).enumerate();
    tasks.for_each(|(task, (mixed, log_sums))| {
        clock.time(Section::Attention, || {
            let head = Head::new(qkv, dims, task);
            let lengths = [panels_len(head_dim, length), dims.head_len(), TILE * length];
            with_scratch(lengths, |[keys, values, scores]| {
                pack_transposed(head.k, head.stride, head_dim, length, keys);
                gather_rows(head.v, head.stride, length, head_dim, values);
                for first in (0..length).step_by(TILE) {
                    let rows = TILE.min(length - first);
                    let seen = first + rows;
                    let queries = Left::rows(&head.q[first * head.stride..], head.stride);
                    let shape = Shape { m: rows, n: seen, k: head_dim };
                    product(shape, scores, seen, false, queries, Right::Panels(keys));
                    let mut inverse = [0.0; TILE];
                    for row in 0..rows {
                        let line = &mut scores[row * seen..(row + 1) * seen];
                        let (own, masked) = line.split_at_mut(first + row + 1);
                        let (max, sum) = simd::exp_and_sum(own);
                        masked.fill(0.0);
                        log_sums[first + row] = max + sum.ln();
                        inverse[row] = 1.0 / sum;
                    }
                    let shape = Shape { m: rows, n: head_dim, k: seen };
                    let tile = &mut mixed[first * head_dim..seen * head_dim];
                    let weights = Left::rows(scores, seen);
                    product(shape, tile, head_dim, false, weights, Right::Rows(values, head_dim));
                    for (row, inverse) in tile.chunks_mut(head_dim).zip(inverse) {
                        simd::scale(row, inverse);
                    }
                }
            });
        });
    });
}

/// What backward needs from forward.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub(super) qkv: &'a [f32],
    pub(super) mixed: &'a [f32],
    pub(super) log_sums: &'a [f32],
}

/// From the gradient of the heads' outputs, `dmixed [B * T, d]`: those of the rotated queries and
/// keys and of the values of each head, `[B, H, 3, T, head_dim]`.
pub(super) fn backward(
    clock: &Clock,
    saved: Saved<'_>,
    dims: &Dims,
    dmixed: &[f32],
    dqkv: &mut [f32],
) {
    let (length, head_dim, width) = (dims.length, dims.head_dim, dims.width());
    let head_len = dims.head_len();
    let tasks = dqkv
        .par_chunks_mut(3 * head_len)
        .zip(saved.mixed.par_chunks(head_len).zip(saved.log_sums.par_chunks(length)))
        .enumerate();
    tasks.for_each(|(task, (dqkv, (mixed, log_sums)))| {
        clock.time(Section::Attention, || {
            let head = Head::new(saved.qkv, dims, task);
            let upstream = &dmixed[dims.start(task, width)..];
            let packed = panels_len(head_dim, length);
            let lengths = [packed, packed, head_len, TILE * length, TILE * length];
            with_scratch(lengths, |[keys, values, key_rows, scores, dscores]| {
                pack_transposed(head.k, head.stride, head_dim, length, keys);
                pack_transposed(head.v, head.stride, head_dim, length, values);
                gather_rows(head.k, head.stride, length, head_dim, key_rows);
                dqkv[head_len..].fill(0.0);
                let (dq, rest) = dqkv.split_at_mut(head_len);
                let (dk, dv) = rest.split_at_mut(head_len);
                for first in (0..length).step_by(TILE) {
                    let rows = TILE.min(length - first);
                    let seen = first + rows;
                    let queries = &head.q[first * head.stride..];
                    let upstream = &upstream[first * width..];
                    let square = Shape { m: rows, n: seen, k: head_dim };
                    let left = Left::rows(queries, head.stride);
                    product(square, scores, seen, false, left, Right::Panels(keys));
                    let left = Left::rows(upstream, width);
                    product(square, dscores, seen, false, left, Right::Panels(values));
                    for row in 0..rows {
                        let at = (first + row) * head_dim;
                        let dout = &upstream[row * width..row * width + head_dim];
                        let delta = simd::dot(dout, &mixed[at..at + head_dim]);
                        let line = row * seen..(row + 1) * seen;
                        let (own, masked) = scores[line.clone()].split_at_mut(first + row + 1);
                        let (down, dmasked) = dscores[line].split_at_mut(first + row + 1);
                        simd::softmax_backward(own, down, log_sums[first + row], delta);
                        masked.fill(0.0);
                        dmasked.fill(0.0);
                    }
                    let tall = Shape { m: seen, n: head_dim, k: rows };
                    let weights = Left::columns(scores, seen);
                    product(tall, dv, head_dim, true, weights, Right::Rows(upstream, width));
                    let weights = Left::columns(dscores, seen);
                    product(tall, dk, head_dim, true, weights, Right::Rows(queries, head.stride));
                    let wide = Shape { m: rows, n: head_dim, k: seen };
                    let tile = &mut dq[first * head_dim..seen * head_dim];
                    let weights = Left::rows(dscores, seen);
                    product(wide, tile, head_dim, false, weights, Right::Rows(key_rows, head_dim));
                }
            });
        });
    });
}
