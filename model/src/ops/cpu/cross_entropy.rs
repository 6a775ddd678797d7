//! Head and cross-entropy in one, over chunks of tokens: the logits of one chunk are all that ever
//! exists. Backward recomputes them, which costs one product more and saves `[N, vocab]` floats.

use rayon::prelude::*;

use super::matmul::{Matrix, Shape, Threads, matmul};
use super::simd;

/// Bytes of logits per chunk. Chunk borders follow the shape alone, so they never move a bit.
const CHUNK_BYTES: usize = 4 << 20;

fn chunk_rows(vocab: usize, rows: usize) -> usize {
    (CHUNK_BYTES / (4 * vocab)).clamp(64, 1024).min(rows.max(1))
}

/// Shape: tokens N, hidden d, vocabulary V.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub(super) tokens: usize,
    pub(super) hidden: usize,
    pub(super) vocab: usize,
}

impl Head {
    fn logits(&self, first: usize, rows: usize, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let (d, v) = (self.hidden, self.vocab);
        let x = Matrix::rows(&x[first * d..], d);
        let shape = Shape { m: rows, n: v, k: d };
        matmul(shape, out, v, false, x, Matrix::rows(weight, d).t(), Threads::Pool);
    }
}

/// `x [N, d]`, `weight [V, d]`, targets `[N]` -> (loss `[N]`, log-sum-exp of the logits `[N]`).
pub(super) fn forward(
    head: Head,
    x: &[f32],
    weight: &[f32],
    targets: &[usize],
) -> (Vec<f32>, Vec<f32>) {
    let (n, v) = (head.tokens, head.vocab);
    let chunk = chunk_rows(v, n);
    let mut logits = vec![0.0; chunk * v];
    let (mut loss, mut log_sums) = (vec![0.0; n], vec![0.0; n]);
    for first in (0..n).step_by(chunk) {
        let rows = chunk.min(n - first);
        head.logits(first, rows, x, weight, &mut logits);
        logits[..rows * v]
            .par_chunks(v)
            .zip(loss[first..].par_iter_mut().zip(log_sums[first..].par_iter_mut()))
            .zip(&targets[first..first + rows])
            .for_each(|((row, (loss, log_sum)), &target)| {
                *log_sum = simd::log_sum_exp(row);
                *loss = *log_sum - row[target];
            });
    }
    (loss, log_sums)
}

/// Gradients for `x` and `weight`, given the gradient `dloss [N]` of each token's loss:
/// `dlogits = dloss * (softmax - onehot)`.
pub(super) fn backward(
    head: Head,
    x: &[f32],
    weight: &[f32],
    targets: &[usize],
    log_sums: &[f32],
    dloss: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let Head { tokens: n, hidden: d, vocab: v } = head;
    let chunk = chunk_rows(v, n);
    let mut logits = vec![0.0; chunk * v];
    let (mut dx, mut dweight) = (vec![0.0; n * d], vec![0.0; v * d]);
    for first in (0..n).step_by(chunk) {
        let rows = chunk.min(n - first);
        head.logits(first, rows, x, weight, &mut logits);
        logits[..rows * v].par_chunks_mut(v).enumerate().for_each(|(row, logits)| {
            let token = first + row;
            simd::scaled_exp(logits, log_sums[token], dloss[token]);
            logits[targets[token]] -= dloss[token];
        });
        let dlogits = Matrix::rows(&logits, v);
        let back = Shape { m: rows, n: d, k: v };
        let rows_of_dx = &mut dx[first * d..(first + rows) * d];
        matmul(back, rows_of_dx, d, false, dlogits, Matrix::rows(weight, d), Threads::Pool);
        let shape = Shape { m: v, n: d, k: rows };
        let x = Matrix::rows(&x[first * d..], d);
        matmul(shape, &mut dweight, d, first > 0, dlogits.t(), x, Threads::Pool);
    }
    (dx, dweight)
}
