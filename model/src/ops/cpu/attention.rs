//! Causal attention with rotary position embedding, one (batch row, head) pair per task.
//!
//! Queries are taken in tiles of [`TILE`] rows against all keys up to the tile's last row, so the
//! masked half is skipped and scores never take more than `TILE x T` floats per task. Backward
//! recomputes the probabilities from the saved log-sum-exp.

use rayon::prelude::*;

use super::matmul::{Matrix, Shape, Threads, matmul};
use super::simd;

/// Query rows per tile.
const TILE: usize = 64;

/// Shape of queries, keys, values and output: `[batch, length, heads * head_dim]`.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub(super) batch: usize,
    pub(super) length: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

impl Dims {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Where the rows of task `task` begin; they are `width()` apart.
    fn start(&self, task: usize) -> usize {
        (task / self.heads) * self.length * self.width() + (task % self.heads) * self.head_dim
    }
}

/// Cosine and sine tables, `[length, head_dim / 2]` each.
#[derive(Clone, Copy)]
pub(super) struct Rotary<'a> {
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
}

/// Rotated, contiguous copy of one head's rows, times `scale`.
fn rotated(x: &[f32], dims: &Dims, rotary: Rotary<'_>, scale: f32) -> Vec<f32> {
    let (half, width) = (dims.head_dim / 2, dims.width());
    let mut out = vec![0.0; dims.length * dims.head_dim];
    for (row, out) in out.chunks_mut(dims.head_dim).enumerate() {
        let table = row * half..(row + 1) * half;
        let (cos, sin) = (&rotary.cos[table.clone()], &rotary.sin[table]);
        simd::rotate(&x[row * width..], cos, sin, 1.0, scale, out);
    }
    out
}

/// Undoes [`rotated`] for a gradient, in place.
fn turn_back(grad: &mut [f32], dims: &Dims, rotary: Rotary<'_>, scale: f32) {
    let half = dims.head_dim / 2;
    let mut turned = vec![0.0; dims.head_dim];
    for (row, grad) in grad.chunks_mut(dims.head_dim).enumerate() {
        let table = row * half..(row + 1) * half;
        let (cos, sin) = (&rotary.cos[table.clone()], &rotary.sin[table]);
        simd::rotate(grad, cos, sin, -1.0, scale, &mut turned);
        grad.copy_from_slice(&turned);
    }
}

/// Puts each task's contiguous rows `[length, head_dim]` into their columns of `[B, T, width]`.
fn interleave(heads: &[Vec<f32>], dims: &Dims) -> Vec<f32> {
    let (width, head_dim) = (dims.width(), dims.head_dim);
    let mut out = vec![0.0; dims.batch * dims.length * width];
    out.par_chunks_mut(width).enumerate().for_each(|(row, out)| {
        let (batch, position) = (row / dims.length, row % dims.length);
        for (head, columns) in out.chunks_mut(head_dim).enumerate() {
            let rows = &heads[batch * dims.heads + head];
            columns.copy_from_slice(&rows[position * head_dim..(position + 1) * head_dim]);
        }
    });
    out
}

/// Returns (output `[B, T, width]`, log-sum-exp of the scaled scores `[B, heads, T]`).
pub(super) fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    rotary: Rotary<'_>,
    dims: &Dims,
) -> (Vec<f32>, Vec<f32>) {
    let (length, head_dim, width) = (dims.length, dims.head_dim, dims.width());
    let mut log_sums = vec![0.0; dims.batch * dims.heads * length];
    let outputs: Vec<Vec<f32>> = log_sums
        .par_chunks_mut(length)
        .enumerate()
        .map(|(task, log_sums)| {
            let start = dims.start(task);
            let queries = rotated(&q[start..], dims, rotary, dims.scale());
            let keys = rotated(&k[start..], dims, rotary, 1.0);
            let values = Matrix::rows(&v[start..], width);
            let mut scores = vec![0.0; TILE.min(length) * length];
            let mut out = vec![0.0; length * head_dim];
            for first in (0..length).step_by(TILE) {
                let rows = TILE.min(length - first);
                let seen = first + rows;
                let query = Matrix::rows(&queries[first * head_dim..], head_dim);
                let shape = Shape { m: rows, n: seen, k: head_dim };
                let keys = Matrix::rows(&keys, head_dim).t();
                matmul(shape, &mut scores, seen, false, query, keys, Threads::One);
                let mut inverse = [0.0; TILE];
                for row in 0..rows {
                    let (own, masked) =
                        scores[row * seen..(row + 1) * seen].split_at_mut(first + row + 1);
                    let (max, sum) = simd::exp_and_sum(own);
                    masked.fill(0.0);
                    log_sums[first + row] = max + sum.ln();
                    inverse[row] = 1.0 / sum;
                }
                let shape = Shape { m: rows, n: head_dim, k: seen };
                let tile = &mut out[first * head_dim..seen * head_dim];
                let weights = Matrix::rows(&scores, seen);
                matmul(shape, tile, head_dim, false, weights, values, Threads::One);
                for (row, inverse) in tile.chunks_mut(head_dim).zip(inverse) {
                    simd::scale(row, inverse);
                }
            }
            out
        })
        .collect();
    (interleave(&outputs, dims), log_sums)
}

/// What backward needs from forward.
pub(super) struct Saved<'a> {
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    pub(super) v: &'a [f32],
    pub(super) out: &'a [f32],
    pub(super) log_sums: &'a [f32],
}

/// Gradients for queries, keys and values, each `[B, T, width]`.
pub(super) fn attention_backward(
    saved: &Saved<'_>,
    dout: &[f32],
    rotary: Rotary<'_>,
    dims: &Dims,
) -> [Vec<f32>; 3] {
    let (length, head_dim, width) = (dims.length, dims.head_dim, dims.width());
    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
    let grads: Vec<[Vec<f32>; 3]> = saved
        .log_sums
        .par_chunks(length)
        .enumerate()
        .map(|(task, log_sums)| {
            let start = dims.start(task);
            let queries = rotated(&saved.q[start..], dims, rotary, dims.scale());
            let keys = rotated(&saved.k[start..], dims, rotary, 1.0);
            let values = Matrix::rows(&saved.v[start..], width);
            let tile_size = TILE.min(length) * length;
            let (mut scores, mut dscores) = (vec![0.0; tile_size], vec![0.0; tile_size]);
            let mut grads = [0, 1, 2].map(|_| vec![0.0; length * head_dim]);
            let [dq, dk, dv] = &mut grads;
            for first in (0..length).step_by(TILE) {
                let rows = TILE.min(length - first);
                let seen = first + rows;
                let query = Matrix::rows(&queries[first * head_dim..], head_dim);
                let key = Matrix::rows(&keys, head_dim);
                let upstream = Matrix::rows(&dout[start + first * width..], width);
                let square = Shape { m: rows, n: seen, k: head_dim };
                matmul(square, &mut scores, seen, false, query, key.t(), Threads::One);
                matmul(square, &mut dscores, seen, false, upstream, values.t(), Threads::One);
                for row in 0..rows {
                    let at = start + (first + row) * width;
                    let delta = simd::dot(&dout[at..at + head_dim], &saved.out[at..at + head_dim]);
                    let line = row * seen..(row + 1) * seen;
                    let (own, masked) = scores[line.clone()].split_at_mut(first + row + 1);
                    let (down, dmasked) = dscores[line].split_at_mut(first + row + 1);
                    simd::scaled_exp(own, log_sums[first + row], 1.0);
                    simd::softmax_backward(own, down, delta);
                    masked.fill(0.0);
                    dmasked.fill(0.0);
                }
                let (p, ds) = (Matrix::rows(&scores, seen), Matrix::rows(&dscores, seen));
                let tall = Shape { m: seen, n: head_dim, k: rows };
                matmul(tall, dv, head_dim, true, p.t(), upstream, Threads::One);
                matmul(tall, dk, head_dim, true, ds.t(), query, Threads::One);
                let wide = Shape { m: rows, n: head_dim, k: seen };
                let tile = &mut dq[first * head_dim..seen * head_dim];
                matmul(wide, tile, head_dim, false, ds, key, Threads::One);
            }
            // The queries carry the softmax scale, so dk has it already and dq does not.
            turn_back(dq, dims, rotary, dims.scale());
            turn_back(dk, dims, rotary, 1.0);
            grads
        })
        .collect();
    for [dq, dk, dv] in grads {
        dqs.push(dq);
        dks.push(dk);
        dvs.push(dv);
    }
    [dqs, dks, dvs].map(|heads| interleave(&heads, dims))
}
