//! How fast this machine multiplies matrices.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use gemm::Parallelism;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Rows and columns of the matrices: large enough for threads, small enough to stay in the caches.
const SIZE: usize = 1024;

/// How long either way of sharing the work is tried.
const TIME: Duration = Duration::from_millis(400);

/// Two matrices, row after row.
struct Operands {
    left: Vec<f32>,
    right: Vec<f32>,
}

impl Operands {
    fn new() -> Self {
        let values = |modulus: usize| -> Vec<f32> {
            (0..SIZE * SIZE).map(|index| (index % modulus) as f32 / modulus as f32).collect()
        };
        Self { left: values(61), right: values(53) }
    }

    fn multiply(&self, result: &mut Vec<f32>, parallelism: Parallelism) {
        result.resize(SIZE * SIZE, 0.0);
        let (left, right) = (self.left.as_ptr(), self.right.as_ptr());
        let result = result.as_mut_ptr();
        let stride = SIZE as isize;
        // SAFETY: all three are row-major matrices of SIZE x SIZE elements in vectors of that length,
        // and the result, borrowed mutably, is none of the operands.
        unsafe {
            gemm::gemm(
                SIZE,
                SIZE,
                SIZE,
                result,
                1,
                stride,
                false,
                left,
                1,
                stride,
                right,
                1,
                stride,
                0.0f32,
                1.0f32,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// The largest rate, in GFLOP/s, that `threads` threads reach on products of 1,024-cubes in single
/// precision: all on one product, or each on one of its own.
pub(super) fn rate(threads: usize) -> Result<f64> {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.context("cannot start threads for the matrix products; use fewer --threads")?;
    let (operands, mut result) = (Operands::new(), Vec::new());
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let together = pool.install(|| fastest(|| operands.multiply(&mut result, parallelism)));
    drop(result);
    let apart =
        if threads > 1 { fastest_apart(&pool, &operands) / threads as f64 } else { together };
    Ok(2.0 * (SIZE as f64).powi(3) / together.min(apart) / 1e9)
}

/// Seconds of the fastest round in which each thread of the pool computes a product of its own.
fn fastest_apart(pool: &ThreadPool, operands: &Operands) -> f64 {
    let results: Vec<_> = (0..pool.current_num_threads()).map(|_| Mutex::new(Vec::new())).collect();
    fastest(|| {
        pool.broadcast(|thread| {
            // Nobody else has this thread's number.
            let mut result = results[thread.index()].lock().unwrap_or_else(PoisonError::into_inner);
            operands.multiply(&mut result, Parallelism::None);
        });
    })
}

/// Seconds of the fastest of several calls, the first of which does not count.
fn fastest(mut work: impl FnMut()) -> f64 {
    work();
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed() < TIME || best.is_infinite() {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_products_are_products() {
        let (operands, mut result) = (Operands::new(), Vec::new());
        operands.multiply(&mut result, Parallelism::None);
        for (row, column) in [(0, 0), (3, 1023), (1023, 7)] {
            let expected: f64 = (0..SIZE)
                .map(|inner| {
                    f64::from(operands.left[row * SIZE + inner])
                        * f64::from(operands.right[inner * SIZE + column])
                })
                .sum();
            let found = f64::from(result[row * SIZE + column]);
            assert!(
                (found / expected - 1.0).abs() < 1e-4,
                "{found} at {row}, {column}: {expected}"
            );
        }
    }
}
