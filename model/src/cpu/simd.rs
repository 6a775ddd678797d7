//! Row kernels in plain loops, compiled once per instruction set and chosen at run time.
//!
//! Every sum has a fixed shape: [`LANES`] partial sums over the row, added up in lane order. So a
//! row's result depends on the row and on the kernel level alone, never on the thread count, on
//! neighbouring rows or on the place of the row in memory. With and without fused multiply-add the last
//! bits differ, and so may the C library's logarithm between platforms: a run pins its level, and a probe.

use super::level::KernelLevel;

/// Defines functions whose bodies are compiled for each level. Inside, `FMA` says whether fused
/// multiply-add is an instruction.
macro_rules! kernels {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {$(
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FMA: bool>($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $type),*) $(-> $result)? { body::<true>($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $type),*) $(-> $result)? { body::<true>($($arg),*) }

            match KernelLevel::detect() {
                // SAFETY: `detect` has seen every feature that the function enables.
                #[cfg(target_arch = "x86_64")]
                KernelLevel::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                KernelLevel::Avx2 => unsafe { avx2($($arg),*) },
                KernelLevel::Neon => body::<true>($($arg),*),
                _ => body::<false>($($arg),*),
            }
        }
    )*};
}

/// Partial sums per row: two registers of the widest level.
const LANES: usize = 32;

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` by range reduction to `[-ln 2 / 2, ln 2 / 2]` and a polynomial (coefficients of Cephes'
/// `expf`): relative error below 2e-7 on [-87, 88]; inputs outside are clamped to it.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Written so that what is no number stays none.
    let x = if x < -87.3 { -87.3 } else { x };
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, x));
    let p = fma::<FMA>(1.987_569_1e-4, r, 1.398_2e-3);
    let p = fma::<FMA>(p, r, 8.333_452e-3);
    let p = fma::<FMA>(p, r, 4.166_579_6e-2);
    let p = fma::<FMA>(p, r, 1.666_666_5e-1);
    let p = fma::<FMA>(p, r, 0.5);
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000))
}

#[inline(always)]
fn lane_sum(lanes: &[f32; LANES]) -> f32 {
    lanes.iter().sum()
}

/// Sum of `term(0..n)` in the fixed shape.
#[inline(always)]
fn sum_of(n: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    let mut start = 0;
    while start < whole {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
        start += LANES;
    }
    let mut sum = lane_sum(&lanes);
    for i in whole..n {
        sum += term(i);
    }
    sum
}

#[inline(always)]
fn max_of(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (max, &x) in lanes.iter_mut().zip(chunk) {
            *max = if x > *max { x } else { *max };
        }
    }
    let rest = chunks.remainder().iter();
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

kernels! {
    /// `ln sum exp(row)`.
    fn log_sum_exp(row: &[f32]) -> f32 {
        let max = max_of(row);
        max + sum_of(row.len(), |i| exp::<FMA>(row[i] - max)).ln()
    }

    /// Where the largest element is; of several that are, the first. 0 where none is a number.
    fn index_of_max(row: &[f32]) -> usize {
        let max = max_of(row);
        row.iter().position(|&x| x == max).unwrap_or(0)
    }

    /// In place: `row = exp(row - max row)`; returns the maximum and the sum of the new row.
    fn exp_and_sum(row: &mut [f32]) -> (f32, f32) {
        let max = max_of(row);
        let mut lanes = [0f32; LANES];
        let mut chunks = row.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (sum, x) in lanes.iter_mut().zip(chunk) {
                *x = exp::<FMA>(*x - max);
                *sum += *x;
            }
        }
        let mut sum = lane_sum(&lanes);
        for x in chunks.into_remainder() {
            *x = exp::<FMA>(*x - max);
            sum += *x;
        }
        (max, sum)
    }

    /// `sum a * b`.
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let b = &b[..a.len()];
        sum_of(a.len(), |i| a[i] * b[i])
    }

    /// In place: `row *= factor`.
    fn scale(row: &mut [f32], factor: f32) {
        for x in row {
            *x *= factor;
        }
    }

    /// Softmax backward of one row of scores, in place: they become probabilities
    /// `p = exp(score - log_sum)`, and `grad` becomes `p * (grad - delta)`.
    fn softmax_backward(scores: &mut [f32], grad: &mut [f32], log_sum: f32, delta: f32) {
        for (g, s) in grad.iter_mut().zip(scores) {
            *s = exp::<FMA>(*s - log_sum);
            *g = *s * (*g - delta);
        }
    }

    /// In place: `sum += x`.
    fn add(sum: &mut [f32], x: &[f32]) {
        for (s, &x) in sum.iter_mut().zip(x) {
            *s += x;
        }
    }

    /// In place: `sum += factor * x`.
    fn add_scaled(sum: &mut [f32], x: &[f32], factor: f32) {
        for (s, &x) in sum.iter_mut().zip(x) {
            *s = fma::<FMA>(factor, x, *s);
        }
    }

    /// RMSNorm of one row, added to `residual` when there is one; returns `1 / rms`.
    fn rms_norm(x: &[f32], weight: &[f32], residual: Option<&[f32]>, out: &mut [f32], eps: f32) -> f32 {
        let d = weight.len();
        let (x, out) = (&x[..d], &mut out[..d]);
        let inverse = 1.0 / (sum_of(d, |i| x[i] * x[i]) / d as f32 + eps).sqrt();
        match residual {
            None => {
                for i in 0..d {
                    out[i] = x[i] * inverse * weight[i];
                }
            }
            Some(residual) => {
                let residual = &residual[..d];
                for i in 0..d {
                    out[i] = fma::<FMA>(x[i] * inverse, weight[i], residual[i]);
                }
            }
        }
        inverse
    }

    /// RMSNorm backward of one row: puts the row's gradient in its place, adds to `dweight`.
    fn rms_norm_backward(x: &mut [f32], weight: &[f32], inverse: f32, dy: &[f32], dweight: &mut [f32]) {
        let d = weight.len();
        let (x, dy, dweight) = (&mut x[..d], &dy[..d], &mut dweight[..d]);
        let along = sum_of(d, |i| x[i] * dy[i] * weight[i]);
        let pull = -along * inverse * inverse * inverse / d as f32;
        for i in 0..d {
            dweight[i] = fma::<FMA>(dy[i], x[i] * inverse, dweight[i]);
            x[i] = fma::<FMA>(dy[i] * weight[i], inverse, pull * x[i]);
        }
    }

    /// RMSNorm backward of one row: puts the normed row again in the row's place, adds the row's
    /// gradient to `sum` and the weight's to `dweight`.
    fn rms_norm_backward_add(x: &mut [f32], weight: &[f32], inverse: f32, dy: &[f32], sum: &mut [f32], dweight: &mut [f32]) {
        let d = weight.len();
        let (x, dy, sum, dweight) = (&mut x[..d], &dy[..d], &mut sum[..d], &mut dweight[..d]);
        let along = sum_of(d, |i| x[i] * dy[i] * weight[i]);
        let pull = -along * inverse * inverse * inverse / d as f32;
        for i in 0..d {
            let scaled = x[i] * inverse;
            dweight[i] = fma::<FMA>(dy[i], scaled, dweight[i]);
            sum[i] += fma::<FMA>(dy[i] * weight[i], inverse, pull * x[i]);
            x[i] = scaled * weight[i];
        }
    }

    /// `out = silu(gate) * up`.
    fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
        let n = out.len();
        let (gate, up) = (&gate[..n], &up[..n]);
        for i in 0..n {
            out[i] = gate[i] / (1.0 + exp::<FMA>(-gate[i])) * up[i];
        }
    }

    /// Backward of [`swiglu`]: gradients take the places of `gate` and `up`, and the product that of
    /// its gradient.
    fn swiglu_backward(gate: &mut [f32], up: &mut [f32], out: &mut [f32]) {
        let n = out.len();
        let (gate, up) = (&mut gate[..n], &mut up[..n]);
        for i in 0..n {
            let (dout, g) = (out[i], gate[i]);
            let sigmoid = 1.0 / (1.0 + exp::<FMA>(-g));
            let silu = g * sigmoid;
            out[i] = silu * up[i];
            gate[i] = dout * up[i] * fma::<FMA>(silu, 1.0 - sigmoid, sigmoid);
            up[i] = dout * silu;
        }
    }

    /// Rotary embedding of one head's row in place, halves split: `scale * (a cos - b sin, b cos + a sin)`.
    /// `sin_sign` -1 turns back.
    fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32], sin_sign: f32, scale: f32) {
        let half = cos.len();
        let (a, b) = x[..2 * half].split_at_mut(half);
        let sin = &sin[..half];
        for i in 0..half {
            let (c, s) = (cos[i] * scale, sin[i] * scale * sin_sign);
            (a[i], b[i]) = (a[i] * c - b[i] * s, b[i] * c + a[i] * s);
        }
    }

    /// One update of AdamW on a run of elements.
    fn adamw(update: &AdamW, weights: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let n = weights.len();
        let (gradient, first, second) = (&gradient[..n], &mut first[..n], &mut second[..n]);
        for i in 0..n {
            let g = gradient[i] * update.clip;
            first[i] = update.beta1 * first[i] + (1.0 - update.beta1) * g;
            second[i] = update.beta2 * second[i] + (1.0 - update.beta2) * (g * g);
            let root = second[i].sqrt() * update.inverse_root + update.epsilon;
            weights[i] = weights[i] * update.keep - update.step_size * first[i] / root;
        }
    }

    /// Sum of squares in double precision.
    fn sum_of_squares(values: &[f32]) -> f64 {
        let mut lanes = [0f64; LANES];
        let mut chunks = values.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (sum, &x) in lanes.iter_mut().zip(chunk) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        let rest: f64 = chunks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        lanes.iter().sum::<f64>() + rest
    }
}

/// The numbers of one update of AdamW.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamW {
    /// What the gradient is multiplied by, at most 1.
    pub(crate) clip: f32,
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) epsilon: f32,
    /// Learning rate with the first moment's bias correction.
    pub(crate) step_size: f32,
    /// The second moment's bias correction, for its root.
    pub(crate) inverse_root: f32,
    /// What decay leaves of a weight.
    pub(crate) keep: f32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_stays_within_its_stated_error_with_and_without_fused_multiply_add() {
        for exp in [exp::<true>, exp::<false>] {
            let mut worst = 0f64;
            for i in -870..=880 {
                for offset in 0..7 {
                    let x = (i as f32 * 0.1 + offset as f32 * 0.013).clamp(-87.0, 88.0);
                    let exact = f64::from(x).exp();
                    worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
                }
            }
            assert!(worst < 2e-7, "relative error {worst:e}");
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut row = [1.0, f32::NAN, 2.0];
        assert!(log_sum_exp(&row).is_nan());
        assert!(exp_and_sum(&mut row).1.is_nan());
        let mut out = [0.0];
        swiglu(&[f32::NAN], &[1.0], &mut out);
        assert!(out[0].is_nan());
    }

    #[test]
    fn a_row_of_equal_logits_has_the_log_sum_exp_of_its_length() {
        for n in [1usize, 31, 32, 33, 4096] {
            let exact = 3.0 + (n as f64).ln();
            let found = f64::from(log_sum_exp(&vec![3.0; n]));
            assert!((found - exact).abs() < 2e-6, "{n}: {found} against {exact}");
        }
    }

    #[test]
    fn turning_there_and_back_gives_the_row_again() {
        let x: Vec<f32> = (0..8).map(|i| i as f32 - 3.0).collect();
        let angles: Vec<f32> = (0..4).map(|i| 0.3 + i as f32).collect();
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let mut there = x.clone();
        rotate(&mut there, &cos, &sin, 1.0, 1.0);
        let mut back = there.clone();
        rotate(&mut back, &cos, &sin, -1.0, 1.0);
        assert!(x.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-5), "{back:?}");
        assert!(x.iter().zip(&there).any(|(a, b)| (a - b).abs() > 0.1));
    }
}
