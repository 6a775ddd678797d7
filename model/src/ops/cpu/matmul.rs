//! Matrix products on slices, with bits that depend on the shape and the instruction set alone.
//!
//! `gemm` sums along the inner dimension in one order per block; its block length follows the cache
//! sizes of the machine, but is never below [`BLOCK`] when the inner dimension is that long.
//! Cutting the inner dimension into blocks of that length here takes the caches out of the result.
//! Threads only share out rows and columns.

const BLOCK: usize = 512;

/// A matrix inside a slice: element (row, column) stands at `row * strides.0 + column * strides.1`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) strides: (usize, usize),
}

impl<'a> Matrix<'a> {
    /// Rows of `stride` elements, each as long as the product needs.
    pub(super) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, strides: (stride, 1) }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self { data: self.data, strides: (self.strides.1, self.strides.0) }
    }

    fn reaches(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (rows - 1) * self.strides.0 + (columns - 1) * self.strides.1 < self.data.len()
    }
}

/// Shape of a product `[m, k] x [k, n]`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Whether a product `[m, k] x [k, n]` is large enough for threads to share it; smaller ones run on
/// one thread of however many.
#[must_use]
pub fn is_threaded(m: usize, n: usize, k: usize) -> bool {
    m * n * k.min(BLOCK) >= gemm::get_threading_threshold()
}

/// Whether a product may use the threads of the current rayon pool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// One.
    One,
    /// All of the pool.
    Pool,
}

/// `out = a b`, or `out += a b` with `add`; `out` has rows of `out_stride` elements.
pub(super) fn matmul(
    shape: Shape,
    out: &mut [f32],
    out_stride: usize,
    add: bool,
    a: Matrix<'_>,
    b: Matrix<'_>,
    threads: Threads,
) {
    let Shape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.reaches(m, k) && b.reaches(k, n), "a product reads past its operands");
    assert!(
        n <= out_stride && (m - 1) * out_stride + n <= out.len(),
        "a product writes past its result"
    );
    let parallelism = match threads {
        Threads::Pool if rayon::current_num_threads() > 1 => gemm::Parallelism::Rayon(0),
        _ => gemm::Parallelism::None,
    };
    let mut start = 0;
    while start < k || (k == 0 && start == 0) {
        let depth = BLOCK.min(k - start);
        let (a_data, b_data) = if depth == 0 {
            (a.data, b.data)
        } else {
            (&a.data[start * a.strides.1..], &b.data[start * b.strides.0..])
        };
        // SAFETY: the assertions above bound every element that the product touches; `out` is
        // borrowed mutably, so it overlaps neither operand; strides fit isize because they index
        // slices.
        unsafe {
            gemm::gemm(
                m,
                n,
                depth,
                out.as_mut_ptr(),
                1,
                out_stride as isize,
                add || start > 0,
                a_data.as_ptr(),
                a.strides.1 as isize,
                a.strides.0 as isize,
                b_data.as_ptr(),
                b.strides.1 as isize,
                b.strides.0 as isize,
                1.0f32,
                1.0f32,
                false,
                false,
                false,
                parallelism,
            );
        }
        start += BLOCK;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(n: usize, salt: u32) -> Vec<f32> {
        (0..n as u32).map(|i| ((i * 2_654_435_761 + salt) >> 8) as f32 / 8e6 - 1.0).collect()
    }

    #[test]
    fn products_equal_the_sum_in_double_precision() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (64, 96, 700), (17, 2, 1030), (2, 3, 0)] {
            let (a, b) = (filled(m * k, 1), filled(n * k, 2));
            let mut out = vec![f32::NAN; m * n];
            let shape = Shape { m, n, k };
            matmul(
                shape,
                &mut out,
                n,
                false,
                Matrix::rows(&a, k),
                Matrix::rows(&b, k).t(),
                Threads::Pool,
            );
            for i in 0..m {
                for j in 0..n {
                    let terms =
                        || (0..k).map(|l| f64::from(a[i * k + l]) * f64::from(b[j * k + l]));
                    let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                    let found = f64::from(out[i * n + j]);
                    assert!((found - exact).abs() <= 2e-6 * size, "{m} {n} {k}: {found} {exact}");
                }
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let (m, n, k) = (190, 530, 1300);
        assert!(is_threaded(m, n, k));
        let (a, b) = (filled(m * k, 3), filled(n * k, 4));
        let run = |threads| {
            let pool =
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let mut out = vec![0.0; m * n];
            pool.install(|| {
                let shape = Shape { m, n, k };
                matmul(
                    shape,
                    &mut out,
                    n,
                    false,
                    Matrix::rows(&a, k),
                    Matrix::rows(&b, k).t(),
                    Threads::Pool,
                );
            });
            out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let one = run(1);
        for threads in [2, 3, 4, 7] {
            assert!(run(threads) == one, "{threads} threads give other bits");
        }
    }
}
