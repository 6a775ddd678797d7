//! Matrix products on slices, with bits that depend on the shape and on fused multiply-add alone.
//!
//! An element of the result is one chain of multiply-adds along the inner dimension, from its first
//! index to its last, cut into blocks of [`DEPTH`] that are added up in their order. Neither the
//! width of a register nor the tile that an element falls into changes that chain, so levels, row
//! and column cuts and threads cannot change a bit.
//!
//! The right operand is read in panels of [`PANEL`] columns. Weights are brought into that form
//! once per step ([`Panels`]); everything else is read where it stands. The left operand is read
//! element by element and needs no form at all.

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::OnceLock;

use super::level::KernelLevel;

/// Columns of a panel of the right operand: two registers of the widest level.
pub(super) const PANEL: usize = 32;

/// Length of a block of the inner dimension: most of a panel of that length stays in the first-level
/// cache, or all of it.
const DEPTH: usize = 256;

/// Rows of the largest tile.
const MAX_ROWS: usize = 12;

/// Floats of a cache line.
const LINE: usize = 16;

// Tiles of whole rows fill the memory for the left operand's columns, at every level.
const _: () = assert!(ROWS.is_multiple_of(12) && ROWS.is_multiple_of(6) && ROWS.is_multiple_of(4));

/// Columns of a result from which on it pays to bring columns of the left operand into tiles.
const TURN: usize = 128;

/// Rows that are taken through all panels before the next ones.
const ROWS: usize = 288;

/// A left operand: element (row, column) stands at `row * strides.0 + column * strides.1`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    data: &'a [f32],
    strides: (usize, usize),
    /// What each column is multiplied by.
    factors: Option<&'a [f32]>,
}

impl<'a> Left<'a> {
    /// Rows of `stride` elements.
    pub(super) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, strides: (stride, 1), factors: None }
    }

    /// The transpose of rows of `stride` elements.
    pub(super) fn columns(data: &'a [f32], stride: usize) -> Self {
        Self { data, strides: (1, stride), factors: None }
    }

    /// The transpose of rows of `stride` elements, each row multiplied by its factor.
    pub(super) fn scaled_columns(data: &'a [f32], stride: usize, factors: &'a [f32]) -> Self {
        Self { data, strides: (1, stride), factors: Some(factors) }
    }
}

/// A right operand.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// In panels.
    Panels(&'a [f32]),
    /// Rows of so many elements.
    Rows(&'a [f32], usize),
}

/// Shape of a product `[m, k] x [k, n]`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// Elements of a `[k, n]` matrix in panels: columns are filled up with zeros.
pub(super) fn panels_len(k: usize, n: usize) -> usize {
    n.next_multiple_of(PANEL) * k
}

/// Brings rows `[k, n]`, each `stride` elements after the other, into panels.
pub(super) fn pack_rows(rows: &[f32], stride: usize, k: usize, n: usize, panels: &mut [f32]) {
    for (panel, out) in panels[..panels_len(k, n)].chunks_exact_mut(PANEL * k).enumerate() {
        let first = panel * PANEL;
        let width = PANEL.min(n - first);
        for (row, out) in out.chunks_exact_mut(PANEL).enumerate() {
            let at = row * stride + first;
            if width == PANEL {
                out.copy_from_slice(&rows[at..at + PANEL]);
            } else {
                out[..width].copy_from_slice(&rows[at..at + width]);
                out[width..].fill(0.0);
            }
        }
    }
}

/// Copies rows `[k, n]`, each `stride` elements after the other, to where they have no gaps.
pub(super) fn gather_rows(rows: &[f32], stride: usize, k: usize, n: usize, out: &mut [f32]) {
    for (row, out) in out[..k * n].chunks_exact_mut(n).enumerate() {
        out.copy_from_slice(&rows[row * stride..row * stride + n]);
    }
}

/// Brings the transpose of rows `[n, k]`, each `stride` elements after the other, into the panels
/// of a `[k, n]` matrix.
pub(super) fn pack_transposed(rows: &[f32], stride: usize, k: usize, n: usize, panels: &mut [f32]) {
    /// Rows and columns that are turned at a time, in registers.
    const SQUARE: usize = 4;
    for (panel, out) in panels[..panels_len(k, n)].chunks_exact_mut(PANEL * k).enumerate() {
        let first = panel * PANEL;
        let width = PANEL.min(n - first);
        let squares = width / SQUARE * SQUARE;
        for (band, out) in out.chunks_mut(PANEL * SQUARE).enumerate() {
            let depth = out.len() / PANEL;
            let from = |column: usize| &rows[(first + column) * stride + band * SQUARE..][..depth];
            for column in (0..PANEL).step_by(SQUARE) {
                if column < squares && depth == SQUARE {
                    let square: [[f32; SQUARE]; SQUARE] = std::array::from_fn(|row| {
                        *from(column + row).first_chunk().expect("a row of a whole square")
                    });
                    for (row, out) in out.chunks_exact_mut(PANEL).enumerate() {
                        let turned: [f32; SQUARE] = std::array::from_fn(|at| square[at][row]);
                        out[column..column + SQUARE].copy_from_slice(&turned);
                    }
                    continue;
                }
                for (row, out) in out.chunks_exact_mut(PANEL).enumerate() {
                    for (at, out) in out[column..column + SQUARE].iter_mut().enumerate() {
                        *out = if column + at < width { from(column + at)[row] } else { 0.0 };
                    }
                }
            }
        }
    }
}

/// Brings columns `[m, k]`, each `stride` elements after the other and multiplied by its factor, into
/// tiles of `rows` rows.
fn pack_tiles(
    columns: &[f32],
    stride: usize,
    factors: Option<&[f32]>,
    (m, k): (usize, usize),
    rows: usize,
    tiles: &mut [f32],
) {
    /// How far ahead columns are asked for: each is in other pages than the one before.
    const AHEAD: usize = 6;
    for column in 0..k {
        let ahead = columns.as_ptr().wrapping_add((column + AHEAD) * stride);
        for line in (0..m).step_by(LINE) {
            prefetch::<true>(ahead.wrapping_add(line));
        }
        let from = &columns[column * stride..column * stride + m];
        for (tile, from) in from.chunks(rows).enumerate() {
            let to = &mut tiles[tile * rows * DEPTH + column * rows..];
            let factor = factors.map_or(1.0, |factors| factors[column]);
            match (from.first_chunk::<MAX_ROWS>(), to.first_chunk_mut()) {
                (Some(from), Some(to)) if rows == MAX_ROWS => *to = from.map(|x| x * factor),
                _ => to.iter_mut().zip(from).for_each(|(to, x)| *to = x * factor),
            }
        }
    }
}

/// `out = a b`, or `out += a b` with `add`; `out` has rows of `stride` elements.
///
/// # Panics
/// When an operand or the result is too short for the shape.
pub(super) fn product(
    shape: Shape,
    out: &mut [f32],
    stride: usize,
    add: bool,
    a: Left<'_>,
    b: Right<'_>,
) {
    product_at(Tile::detect(), shape, out, stride, add, a, b);
}

fn product_at(
    tile: &Tile,
    shape: Shape,
    out: &mut [f32],
    stride: usize,
    add: bool,
    a: Left<'_>,
    b: Right<'_>,
) {
    let Shape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && (m - 1) * stride + n <= out.len(), "a product writes past its result");
    if k == 0 {
        if !add {
            out.chunks_mut(stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let last = (m - 1) * a.strides.0 + (k - 1) * a.strides.1;
    assert!(last < a.data.len(), "a product reads past its left operand");
    match b {
        Right::Panels(panels) => {
            assert!(panels_len(k, n) <= panels.len(), "a product reads past its right operand");
        }
        Right::Rows(rows, stride) => {
            let last = (k - 1) * stride + n - 1;
            assert!(n <= stride && last < rows.len(), "a product reads past its right operand");
        }
    }

    PACKED.with_borrow_mut(|Packed { edge, tiles }| {
        for start in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - start);
            let add = add || start > 0;
            if let (Right::Rows(rows, stride), true) = (b, !n.is_multiple_of(PANEL)) {
                let first = n / PANEL * PANEL;
                let rows = &rows[start * stride + first..];
                edge.resize(PANEL * DEPTH, 0.0);
                pack_rows(rows, stride, depth, n - first, edge);
            }
            for top in (0..m).step_by(ROWS) {
                let bottom = m.min(top + ROWS);
                let turned = a.factors.is_some() || (a.strides.1 > 1 && n >= TURN);
                if turned {
                    let left = &a.data[start * a.strides.1 + top * a.strides.0..];
                    tiles.resize(ROWS * DEPTH, 0.0);
                    let factors = a.factors.map(|factors| &factors[start..]);
                    let size = (bottom - top, depth);
                    pack_tiles(left, a.strides.1, factors, size, tile.rows, tiles);
                }
                for first in (0..n).step_by(PANEL) {
                    let width = PANEL.min(n - first);
                    let (panel, row_stride) = match b {
                        Right::Panels(panels) => (&panels[first * k + start * PANEL..], PANEL),
                        Right::Rows(..) if width < PANEL => (&edge[..], PANEL),
                        Right::Rows(rows, stride) => (&rows[start * stride + first..], stride),
                    };
                    let next = match b {
                        Right::Panels(_) => PANEL * k,
                        Right::Rows(..) => PANEL,
                    };
                    // Each tile asks for its share of the next panel, so that it comes evenly.
                    let tiles_of_panel = (bottom - top).div_ceil(tile.rows);
                    let share = depth.div_ceil(tiles_of_panel);
                    let left = &a.data[start * a.strides.1..];
                    for (number, row) in (top..bottom).step_by(tile.rows).enumerate() {
                        let rows = tile.rows.min(bottom - row);
                        let ahead = next + number * share * row_stride;
                        let every = tiles_of_panel;
                        let block = Block { depth, add, width, panel, row_stride, ahead, every };
                        let a = if turned {
                            Left::columns(&tiles[(row - top) * DEPTH..], tile.rows)
                        } else {
                            Left { data: &left[row * a.strides.0..], ..a }
                        };
                        // SAFETY: the assertions above bound all that is read and written: `rows` rows
                        // from `row` < m, `width` columns from `first` < n, `depth` from `start` < k. A
                        // tile of `tiles` has up to `DEPTH` columns of `tile.rows` rows. The level is
                        // one of this machine's: `detect` and the tests take no other.
                        unsafe {
                            tile.apply(rows, &block, a, &mut out[row * stride + first..], stride)
                        };
                    }
                }
            }
        }
    });
}

/// Parts of operands in the form that kernels read, for one block.
#[derive(Default)]
struct Packed {
    /// The last panel of rows that stand as they are, which may reach past them.
    edge: Vec<f32>,
    /// Rows of a left operand in columns.
    tiles: Vec<f32>,
}

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::default();
}

/// One panel's block, and what becomes of the product with it.
struct Block<'a> {
    depth: usize,
    add: bool,
    width: usize,
    panel: &'a [f32],
    row_stride: usize,
    /// From the panel to the first of the rows that are asked for meanwhile.
    ahead: usize,
    /// Rows of the panel to each of those.
    every: usize,
}

/// What a kernel reads and writes: `c = a b`, or `c += a b` with `add`.
struct Operands {
    depth: usize,
    a: *const f32,
    /// From row to row and from column to column.
    a_strides: (usize, usize),
    b: *const f32,
    /// From row to row.
    b_stride: usize,
    /// From `b` to the first of the rows that are asked for meanwhile.
    ahead: usize,
    /// Rows of `b` to each of those.
    every: usize,
    c: *mut f32,
    c_stride: usize,
    add: bool,
}

type Kernel = unsafe fn(&Operands);

/// The kernels of a level.
struct Tile {
    rows: usize,
    columns: usize,
    /// For 1, 2, ... rows.
    kernels: &'static [Kernel],
    /// The same for half the columns.
    narrow: &'static [Kernel],
}

impl Tile {
    fn detect() -> &'static Self {
        static TILE: OnceLock<&'static Tile> = OnceLock::new();
        TILE.get_or_init(|| Self::of(KernelLevel::detect()))
    }

    fn of(level: KernelLevel) -> &'static Self {
        match level {
            #[cfg(target_arch = "x86_64")]
            KernelLevel::Avx512 => &x86::AVX512,
            #[cfg(target_arch = "x86_64")]
            KernelLevel::Avx2 => &x86::AVX2,
            _ => &portable::TILE,
        }
    }

    /// # Safety
    /// `a`, `out` and the block's panel must reach as far as the tile does, and this machine must have
    /// the tile's level.
    unsafe fn apply(
        &self,
        rows: usize,
        block: &Block<'_>,
        a: Left<'_>,
        out: &mut [f32],
        stride: usize,
    ) {
        let Block { depth, add, width, panel, row_stride, ahead, every } = *block;
        let mut column = 0;
        while column < width {
            let left = width - column;
            let (kernels, columns) = match left <= self.columns / 2 {
                true => (self.narrow, self.columns / 2),
                false => (self.kernels, self.columns),
            };
            let kernel = kernels[rows - 1];
            let operands = Operands {
                depth,
                a: a.data.as_ptr(),
                a_strides: a.strides,
                b: panel[column..].as_ptr(),
                b_stride: row_stride,
                ahead,
                every,
                c: out[column..].as_mut_ptr(),
                c_stride: stride,
                add,
            };
            if columns <= left {
                // SAFETY: the caller's.
                unsafe { kernel(&operands) };
            } else {
                let mut whole = [0.0; MAX_ROWS * PANEL];
                let c = whole.as_mut_ptr();
                // SAFETY: a panel has all its columns, and `whole` has room for any tile.
                unsafe { kernel(&Operands { c, c_stride: PANEL, add: false, ..operands }) };
                for (row, whole) in whole.chunks_exact(PANEL).take(rows).enumerate() {
                    let out = &mut out[row * stride + column..row * stride + width];
                    for (out, &value) in out.iter_mut().zip(whole) {
                        *out = if add { *out + value } else { value };
                    }
                }
            }
            column += columns;
        }
    }
}

/// A register of floats.
trait Register: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(at: *const f32) -> Self;
    unsafe fn store(self, at: *mut f32);
    /// `a * b + self`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
}

/// The kernel for `R` rows and `C` registers of columns.
///
/// # Safety
/// All pointers reach as far as the strides and the depth say, and the machine has the register's
/// instructions.
#[inline(always)]
unsafe fn tile<V: Register, const R: usize, const C: usize>(operands: &Operands) {
    let Operands { depth, a, a_strides, mut b, b_stride, ahead, every, c, c_stride, add } =
        *operands;
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[V::splat(0.0); C]; R];
        // A pointer for every third row, hidden from an optimizer that would make one chain of
        // additions of all rows' addresses, longer than the multiply-adds take.
        let third = |number: usize| black_box(a.wrapping_add(3 * number * a_strides.0));
        let (mut a0, mut a1, mut a2, mut a3) = (third(0), third(1), third(2), third(3));
        let mut ahead = b.wrapping_add(ahead);
        let (mut result, end) = (c, c.wrapping_add(R * c_stride));
        let mut left = depth;
        while left > 0 {
            // Both lines of a row of the next panel, and two rows of the result: a few at a time,
            // because a core can wait for few lines at once.
            prefetch::<false>(ahead);
            prefetch::<false>(ahead.wrapping_add(LINE));
            ahead = ahead.wrapping_add(b_stride);
            for _ in 0..2 {
                if result < end {
                    for register in 0..C {
                        prefetch::<true>(result.wrapping_add(register * V::LANES));
                    }
                    result = result.wrapping_add(c_stride);
                }
            }
            let run = every.min(left);
            left -= run;
            for _ in 0..run {
                let mut right = [V::splat(0.0); C];
                for (register, right) in right.iter_mut().enumerate() {
                    *right = V::load(b.add(register * V::LANES));
                }
                // Written out: a loop over the rows would not be unrolled.
                macro_rules! rows {
                    ($($row:literal: $third:ident $step:literal),*) => {$(
                        if R > $row {
                            let left = V::splat(*$third.add($step * a_strides.0));
                            for (sum, right) in sums[$row % R].iter_mut().zip(right) {
                                *sum = sum.add_product(left, right);
                            }
                        }
                    )*};
                }
                rows!(0: a0 0, 1: a0 1, 2: a0 2, 3: a1 0, 4: a1 1, 5: a1 2);
                rows!(6: a2 0, 7: a2 1, 8: a2 2, 9: a3 0, 10: a3 1, 11: a3 2);
                for third in [&mut a0, &mut a1, &mut a2, &mut a3] {
                    *third = third.wrapping_add(a_strides.1);
                }
                b = b.wrapping_add(b_stride);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (register, sum) in sums.iter().enumerate() {
                let at = c.add(row * c_stride + register * V::LANES);
                if add { V::load(at).add(*sum).store(at) } else { sum.store(at) }
            }
        }
    }
}

/// Asks for a cache line: into the first level for what is written soon, else into the second.
#[inline(always)]
fn prefetch<const SOON: bool>(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if SOON {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// A table of kernels for 1, 2, ... rows, each with the given attribute.
macro_rules! table {
    (#[$attribute:meta] $name:ident, $register:ty, $columns:literal, [$($rows:literal),*]) => {
        static $name: &[Kernel] = &[$({
            #[$attribute]
            unsafe fn kernel(operands: &Operands) {
                // SAFETY: the caller's.
                unsafe { tile::<$register, $rows, $columns>(operands) }
            }
            kernel
        }),*];
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
        _mm256_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_storeu_ps,
    };

    use super::{Kernel, Operands, Register, Tile, tile};

    macro_rules! register {
        ($type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $fma:ident, $add:ident) => {
            // SAFETY (of all bodies): kernels that use them are called on machines with them alone.
            impl Register for $type {
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(at: *const f32) -> Self {
                    unsafe { $load(at) }
                }
                #[inline(always)]
                unsafe fn store(self, at: *mut f32) {
                    unsafe { $store(at, self) }
                }
                #[inline(always)]
                unsafe fn add_product(self, a: Self, b: Self) -> Self {
                    unsafe { $fma(a, b, self) }
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    unsafe { $add(self, other) }
                }
            }
        };
    }
    register!(
        __m512,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps
    );
    register!(
        __m256,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps
    );

    // 24 of 32 registers hold sums, or 12 of 16: the others are for the operands.
    table!(
        #[target_feature(enable = "avx512f,avx2,fma")]
        WIDE,
        __m512,
        2,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    );
    table!(
        #[target_feature(enable = "avx512f,avx2,fma")]
        WIDE_NARROW,
        __m512,
        1,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    );
    table!(
        #[target_feature(enable = "avx2,fma")]
        HALF,
        __m256,
        2,
        [1, 2, 3, 4, 5, 6]
    );
    table!(
        #[target_feature(enable = "avx2,fma")]
        HALF_NARROW,
        __m256,
        1,
        [1, 2, 3, 4, 5, 6]
    );
    pub(super) static AVX512: Tile =
        Tile { rows: 12, columns: 32, kernels: WIDE, narrow: WIDE_NARROW };
    pub(super) static AVX2: Tile =
        Tile { rows: 6, columns: 16, kernels: HALF, narrow: HALF_NARROW };
}

mod portable {
    use super::{Kernel, Operands, Register, Tile, tile};

    /// Four floats, which compilers keep in one register of most machines.
    #[derive(Clone, Copy)]
    pub(super) struct Four([f32; 4]);

    impl Register for Four {
        const LANES: usize = 4;
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            Self([value; 4])
        }
        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: the caller's.
            Self(unsafe { at.cast::<[f32; 4]>().read_unaligned() })
        }
        #[inline(always)]
        unsafe fn store(self, at: *mut f32) {
            // SAFETY: the caller's.
            unsafe { at.cast::<[f32; 4]>().write_unaligned(self.0) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: Self, b: Self) -> Self {
            Self(std::array::from_fn(|lane| {
                if cfg!(target_arch = "aarch64") {
                    a.0[lane].mul_add(b.0[lane], self.0[lane])
                } else {
                    a.0[lane] * b.0[lane] + self.0[lane]
                }
            }))
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
        }
    }

    table!(
        #[inline(never)]
        FOURS,
        Four,
        2,
        [1, 2, 3, 4]
    );
    table!(
        #[inline(never)]
        FOURS_NARROW,
        Four,
        1,
        [1, 2, 3, 4]
    );
    pub(super) static TILE: Tile =
        Tile { rows: 4, columns: 8, kernels: FOURS, narrow: FOURS_NARROW };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(n: usize, salt: u32) -> Vec<f32> {
        let mixed = |i: u32| i.wrapping_mul(2_654_435_761).wrapping_add(salt);
        (0..n as u32).map(|i| (mixed(i) >> 8) as f32 / 8e6 - 1.0).collect()
    }

    /// All ways to hand over the operands of the product of `a [m, k]` and `b [k, n]`.
    fn ways(tile: &Tile, shape: Shape, a: &[f32], b: &[f32], add: bool) -> Vec<Vec<f32>> {
        let Shape { m, n, k } = shape;
        let turned = |rows: usize, columns: usize, data: &[f32]| -> Vec<f32> {
            (0..rows * columns).map(|i| data[i % rows * columns + i / rows]).collect()
        };
        let (a_turned, b_turned) = (turned(m, k, a), turned(k, n, b));
        if k == 0 {
            let mut out = if add { filled(m * n, 9) } else { vec![f32::NAN; m * n] };
            let (a, b) = (Left::rows(a, k), Right::Rows(b, n));
            product_at(tile, shape, &mut out, n, add, a, b);
            return vec![out];
        }
        let mut packed = vec![f32::NAN; panels_len(k, n)];
        pack_rows(b, n, k, n, &mut packed);
        let mut packed_again = vec![f32::NAN; panels_len(k, n)];
        pack_transposed(&b_turned, k, k, n, &mut packed_again);
        assert!(packed == packed_again, "{m} {n} {k}");
        let mut results = Vec::new();
        let (halves, twos) = (a_turned.iter().map(|x| x / 2.0).collect::<Vec<_>>(), vec![2.0; k]);
        let scaled = Left::scaled_columns(&halves, m, &twos);
        for left in [Left::rows(a, k), Left::columns(&a_turned, m), scaled] {
            for right in [Right::Panels(&packed), Right::Rows(b, n)] {
                // Rows with a gap between them, which stays as it is.
                let (stride, gap) = (n + 3, 77.0);
                let before = if add { filled(m * n, 9) } else { vec![f32::NAN; m * n] };
                let rows = before.chunks(n).flat_map(|row| [row, &[gap; 3]].concat());
                let mut out: Vec<f32> = rows.collect();
                product_at(tile, shape, &mut out, stride, add, left, right);
                assert!(out.chunks(stride).all(|row| row[n..] == [gap; 3]), "{m} {n} {k}");
                results.push(out.chunks(stride).flat_map(|row| row[..n].to_vec()).collect());
            }
        }
        results
    }

    /// Every sum in double precision, and that of its terms' magnitudes.
    fn exact(shape: Shape, a: &[f32], b: &[f32], c: Option<&[f32]>) -> Vec<(f64, f64)> {
        let Shape { m, n, k } = shape;
        let element = |at: usize| {
            let first = c.map_or(0.0, |c| f64::from(c[at]));
            (0..k).fold((first, first.abs()), |(sum, size), l| {
                let term = f64::from(a[at / n * k + l]) * f64::from(b[l * n + at % n]);
                (sum + term, size + term.abs())
            })
        };
        (0..m * n).map(element).collect()
    }

    #[test]
    fn products_equal_the_sum_in_double_precision_at_every_level() {
        // The last two are wide enough for the left operand's columns to be brought into tiles, and one
        // has more rows than are taken at a time.
        let shapes = [
            (1, 1, 1),
            (3, 5, 7),
            (13, 96, 700),
            (17, 2, 1030),
            (2, 33, 0),
            (100, 70, 257),
            (13, 160, 257),
            (300, 130, 300),
        ];
        for (m, n, k) in shapes {
            let (a, b, c) = (filled(m * k, 1), filled(n * k, 2), filled(m * n, 9));
            let shape = Shape { m, n, k };
            for add in [false, true] {
                let expected = exact(shape, &a, &b, add.then_some(&c[..]));
                for level in KernelLevel::available() {
                    for out in ways(Tile::of(level), shape, &a, &b, add) {
                        for (&found, (exact, size)) in out.iter().zip(&expected) {
                            let error = (f64::from(found) - exact).abs();
                            assert!(error <= 4e-6 * size, "{level:?} {m} {n} {k}: {found} {exact}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn neither_level_nor_form_nor_cut_changes_a_bit() {
        let shape = Shape { m: 310, n: 203, k: 600 };
        let (a, b) = (filled(shape.m * shape.k, 3), filled(shape.n * shape.k, 4));
        let all: Vec<_> = KernelLevel::available()
            .into_iter()
            .filter(|level| *level != KernelLevel::Portable)
            .flat_map(|level| ways(Tile::of(level), shape, &a, &b, false))
            .collect();
        let expected = ways(Tile::detect(), shape, &a, &b, false).remove(0);
        assert!(all.iter().all(|out| *out == expected));
        for rows in [1, 7, 12, 50] {
            let mut cut = vec![0.0; shape.m * shape.n];
            for (number, out) in cut.chunks_mut(rows * shape.n).enumerate() {
                let piece = Shape { m: out.len() / shape.n, ..shape };
                let a = Left::rows(&a[number * rows * shape.k..], shape.k);
                product(piece, out, shape.n, false, a, Right::Rows(&b, shape.n));
            }
            assert!(cut == expected, "{rows} rows at a time");
        }
    }

    #[test]
    #[should_panic(expected = "past its right operand")]
    fn a_short_operand_is_refused() {
        let (a, b) = (vec![0.0; 8], vec![0.0; 7]);
        let shape = Shape { m: 4, n: 4, k: 2 };
        product(shape, &mut [0.0; 16], 4, false, Left::rows(&a, 2), Right::Rows(&b, 4));
    }
}
