//! Causal attention on rotated queries and keys, one (sequence, head) pair per task.
//!
//! Queries are taken in tiles of [`TILE`] rows against all keys up to the tile's last row, so the
//! masked half is skipped and scores never take more than `TILE x T` floats per task. Where documents
//! do not see each other, the keys before the document of a tile's first row are skipped too. Backward
//! recomputes the probabilities from the saved log-sum-exp (Dao et al., arXiv 2205.14135).

use rayon::prelude::*;

use super::clock::{Clock, Section};
use super::product::{
    Left, PANEL, Right, Shape, gather_rows, pack_transposed, panels_len, product,
};
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

    /// The first position that each query of a task sees, by `starts [B * T]`, which grow along a
    /// sequence; of an empty one all see the sequence's beginning.
    fn begin<'s>(&self, starts: &'s [u32], task: usize) -> impl Fn(usize) -> usize + use<'s> {
        let first = task / self.heads * self.length;
        move |position| starts.get(first + position).map_or(0, |&start| start as usize)
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

/// From `qkv [B * T, 3 d]` and where attention begins for each token, `starts [B * T]` or empty: the
/// outputs of each head, `[B, H, T, head_dim]`, and the log-sum-exp of each query's scores, `[B, H, T]`.
pub(super) fn forward(
    clock: &Clock,
    qkv: &[f32],
    dims: &Dims,
    starts: &[u32],
    mixed: &mut [f32],
    log_sums: &mut [f32],
) {
    let (length, head_dim) = (dims.length, dims.head_dim);
    let tasks =
        mixed.par_chunks_mut(dims.head_len()).zip(log_sums.par_chunks_mut(length)).enumerate();
    tasks.for_each(|(task, (mixed, log_sums))| {
        clock.time(Section::Attention, || {
            let head = Head::new(qkv, dims, task);
            let begin = dims.begin(starts, task);
            let lengths = [panels_len(head_dim, length), dims.head_len(), TILE * length];
            with_scratch(lengths, |[keys, values, scores]| {
                pack_transposed(head.k, head.stride, head_dim, length, keys);
                gather_rows(head.v, head.stride, length, head_dim, values);
                for first in (0..length).step_by(TILE) {
                    let rows = TILE.min(length - first);
                    // Keys before this one are of no use to the tile.
                    let from = begin(first) / PANEL * PANEL;
                    let seen = first + rows - from;
                    let queries = Left::rows(&head.q[first * head.stride..], head.stride);
                    let shape = Shape { m: rows, n: seen, k: head_dim };
                    let panels = Right::Panels(&keys[from * head_dim..]);
                    product(shape, scores, seen, false, queries, panels);
                    let mut inverse = [0.0; TILE];
                    for row in 0..rows {
                        let own = begin(first + row) - from..first + row + 1 - from;
                        let line = &mut scores[row * seen..(row + 1) * seen];
                        let (max, sum) = simd::exp_and_sum(&mut line[own.clone()]);
                        line[..own.start].fill(0.0);
                        line[own.end..].fill(0.0);
                        log_sums[first + row] = max + sum.ln();
                        inverse[row] = 1.0 / sum;
                    }
                    let shape = Shape { m: rows, n: head_dim, k: seen };
                    let tile = &mut mixed[first * head_dim..(first + rows) * head_dim];
                    let weights = Left::rows(scores, seen);
                    let values = Right::Rows(&values[from * head_dim..], head_dim);
                    product(shape, tile, head_dim, false, weights, values);
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

/// From the gradient of the heads' outputs, `dmixed [B * T, d]`, with `starts` as forward: those of the
/// rotated queries and keys and of the values of each head, `[B, H, 3, T, head_dim]`.
pub(super) fn backward(
    clock: &Clock,
    saved: Saved<'_>,
    dims: &Dims,
    starts: &[u32],
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
            let begin = dims.begin(starts, task);
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
                    let from = begin(first) / PANEL * PANEL;
                    let seen = first + rows - from;
                    let of_from = from * head_dim;
                    let queries = &head.q[first * head.stride..];
                    let upstream = &upstream[first * width..];
                    let square = Shape { m: rows, n: seen, k: head_dim };
                    let left = Left::rows(queries, head.stride);
                    product(square, scores, seen, false, left, Right::Panels(&keys[of_from..]));
                    let left = Left::rows(upstream, width);
                    let panels = Right::Panels(&values[of_from..]);
                    product(square, dscores, seen, false, left, panels);
                    for row in 0..rows {
                        let at = (first + row) * head_dim;
                        let dout = &upstream[row * width..row * width + head_dim];
                        let delta = simd::dot(dout, &mixed[at..at + head_dim]);
                        let line = row * seen..(row + 1) * seen;
                        let (scores, dscores) = (&mut scores[line.clone()], &mut dscores[line]);
                        let own = begin(first + row) - from..first + row + 1 - from;
                        let (up, down) = (&mut scores[own.clone()], &mut dscores[own.clone()]);
                        simd::softmax_backward(up, down, log_sums[first + row], delta);
                        for line in [scores, dscores] {
                            line[..own.start].fill(0.0);
                            line[own.end..].fill(0.0);
                        }
                    }
                    let tall = Shape { m: seen, n: head_dim, k: rows };
                    let weights = Left::columns(scores, seen);
                    let upstream = Right::Rows(upstream, width);
                    product(tall, &mut dv[of_from..], head_dim, true, weights, upstream);
                    let weights = Left::columns(dscores, seen);
                    let queries = Right::Rows(queries, head.stride);
                    product(tall, &mut dk[of_from..], head_dim, true, weights, queries);
                    let wide = Shape { m: rows, n: head_dim, k: seen };
                    let tile = &mut dq[first * head_dim..(first + rows) * head_dim];
                    let weights = Left::rows(dscores, seen);
                    let keys = Right::Rows(&key_rows[of_from..], head_dim);
                    product(wide, tile, head_dim, false, weights, keys);
                }
            });
        });
    });
}
