//! Rotary position embedding on rows.

use super::simd;

/// Cosines and sines of the rotary angles of a slot's positions.
pub(crate) struct Rotary {
    /// `[T, head_dim / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    length: usize,
    head_dim: usize,
}

impl Rotary {
    /// Angles `position * base^(-2 i / head_dim)` of `length` positions, taken in double precision.
    pub(crate) fn new(length: usize, head_dim: usize, base: f64) -> Self {
        let half = head_dim / 2;
        let frequency = |i: usize| base.powf(-2.0 * i as f64 / head_dim as f64);
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let table = |f: fn(f64) -> f64| {
            let angle = |at: usize| (at / half) as f64 * frequencies[at % half];
            (0..length * half).map(|at| f(angle(at)) as f32).collect()
        };
        Self { cos: table(f64::cos), sin: table(f64::sin), length, head_dim }
    }

    /// The softmax scale, `head_dim^-0.5`.
    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Turns all heads of a token's row, halves split, and multiplies them by `scale`.
    pub(super) fn turn(&self, token: usize, row: &mut [f32], scale: f32) {
        self.turn_by(token, row, 1.0, scale);
    }

    /// The gradient of [`Rotary::turn`].
    pub(super) fn turn_back(&self, token: usize, row: &mut [f32], scale: f32) {
        self.turn_by(token, row, -1.0, scale);
    }

    fn turn_by(&self, token: usize, row: &mut [f32], sin_sign: f32, scale: f32) {
        let half = self.head_dim / 2;
        let at = token % self.length * half;
        let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
        for head in row.chunks_exact_mut(self.head_dim) {
            simd::rotate(head, cos, sin, sin_sign, scale);
        }
    }
}
