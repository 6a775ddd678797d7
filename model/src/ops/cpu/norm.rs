//! RMSNorm and SwiGLU on slices.

use rayon::prelude::*;

use super::simd;

/// Rows per task, and per partial sum of a weight gradient: fixed, so that the sum's shape does not
/// follow the thread count.
const ROWS: usize = 64;
/// Elements per task of elementwise kernels.
const ELEMENTS: usize = 1 << 14;

/// `x [N, d]`, `weight [d]`, optional residual `[N, d]` -> (out `[N, d]`, inverse rms `[N]`).
pub(super) fn rms_norm(
    x: &[f32],
    weight: &[f32],
    residual: Option<&[f32]>,
    eps: f32,
) -> (Vec<f32>, Vec<f32>) {
    let d = weight.len();
    let mut out = vec![0.0; x.len()];
    let mut inverse = vec![0.0; x.len() / d];
    out.par_chunks_mut(ROWS * d).zip(inverse.par_chunks_mut(ROWS)).enumerate().for_each(
        |(task, (out, inverse))| {
            for (row, (out, inverse)) in out.chunks_mut(d).zip(inverse).enumerate() {
                let start = (task * ROWS + row) * d;
                let residual = residual.map(|residual| &residual[start..start + d]);
                *inverse = simd::rms_norm(&x[start..start + d], weight, residual, out, eps);
            }
        },
    );
    (out, inverse)
}

/// Gradients of [`rms_norm`] for `x` and `weight`.
pub(super) fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    inverse: &[f32],
    dout: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let d = weight.len();
    let mut dx = vec![0.0; x.len()];
    let partial: Vec<Vec<f32>> = dx
        .par_chunks_mut(ROWS * d)
        .enumerate()
        .map(|(task, dx)| {
            let mut dweight = vec![0.0; d];
            for (row, dx) in dx.chunks_mut(d).enumerate() {
                let row = task * ROWS + row;
                let at = row * d..(row + 1) * d;
                let (x, dout) = (&x[at.clone()], &dout[at]);
                simd::rms_norm_backward(x, weight, inverse[row], dout, dx, &mut dweight);
            }
            dweight
        })
        .collect();
    let mut dweight = vec![0.0; d];
    for part in &partial {
        simd::add(&mut dweight, part);
    }
    (dx, dweight)
}

/// `silu(gate) * up`, elementwise.
pub(super) fn swiglu(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(ELEMENTS)
        .zip(gate.par_chunks(ELEMENTS).zip(up.par_chunks(ELEMENTS)))
        .for_each(|(out, (gate, up))| simd::swiglu(gate, up, out));
    out
}

/// Gradients of [`swiglu`] for `gate` and `up`.
pub(super) fn swiglu_backward(gate: &[f32], up: &[f32], dout: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut dgate, mut dup) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
    dgate
        .par_chunks_mut(ELEMENTS)
        .zip(dup.par_chunks_mut(ELEMENTS))
        .zip(gate.par_chunks(ELEMENTS).zip(up.par_chunks(ELEMENTS)))
        .zip(dout.par_chunks(ELEMENTS))
        .for_each(|(((dgate, dup), (gate, up)), dout)| {
            simd::swiglu_backward(gate, up, dout, dgate, dup);
        });
    (dgate, dup)
}
