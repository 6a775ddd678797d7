//! The kernels' source, and the sizes that it is compiled for.

use looptrain_proto::spec;

use super::driver::DeviceError;

/// CUDA C++ of all kernels, in one piece: there are no headers where it is compiled.
pub(super) const SOURCE: &str = concat!(
    include_str!("kernels/common.cuh"),
    include_str!("kernels/norm.cu"),
    include_str!("kernels/attention.cu"),
    include_str!("kernels/swiglu.cu"),
    include_str!("kernels/head.cu"),
    include_str!("kernels/optimizer.cu"),
    include_str!("kernels/sums.cu"),
);

/// All kernels' names.
pub(super) const NAMES: [&str; 33] = [
    "embed",
    "stream_norm",
    "residual_norm",
    "state_norm",
    "normed_again",
    "stream_norm_backward",
    "residual_norm_backward",
    "state_norm_backward",
    "add_parts",
    "embed_backward",
    "rotate",
    "attention",
    "attention_means",
    "attention_backward_keys",
    "attention_backward_queries",
    "swiglu",
    "swiglu_backward",
    "cross_entropy",
    "exit_shares",
    "stage_one",
    "stage_two",
    "loop_sums",
    "gate_weight_backward",
    "gate_bias_backward",
    "squares",
    "adamw",
    "as_bf16",
    "exact_add",
    "check_sums",
    "narrow_sums",
    "exact_settle",
    "fast_settle",
    "narrow_settle",
];

/// Rows of a tile of attention.
pub(super) const TILE: usize = 64;

/// Rows of a block of attention: two tiles, with four warps each.
pub(super) const ATTENTION_ROWS: usize = 2 * TILE;

/// Threads of a block of attention.
pub(super) const ATTENTION_THREADS: u32 = 256;

/// Loops that the kernels of the exit distribution have room for.
pub(super) const MOST_LOOPS: usize = 32;

/// The sizes that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Width of the residual stream, d.
    pub(super) hidden: usize,
    /// Inner width of the SwiGLU, f.
    pub(super) inner: usize,
    pub(super) vocab: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

impl Sizes {
    /// Those of a model.
    ///
    /// # Errors
    /// When the kernels cannot be made for them; names the field of the spec.
    pub(super) fn of(model: &spec::Model) -> Result<Self, DeviceError> {
        let sizes = Self {
            hidden: model.hidden_size,
            inner: model.intermediate_size,
            vocab: model.vocab_size,
            heads: model.num_attention_heads,
            head_dim: model.head_dim(),
        };
        for (field, size) in [
            ("model.hidden_size", sizes.hidden),
            ("model.intermediate_size", sizes.inner),
            ("model.vocab_size", sizes.vocab),
        ] {
            if !size.is_multiple_of(8) {
                let error = format!("{field} = {size} is no multiple of 8, as the GPU needs it");
                return Err(DeviceError(error));
            }
        }
        if ![16, 32, 64, 128].contains(&sizes.head_dim) {
            let error = format!(
                "heads of {} numbers (model.hidden_size / model.num_attention_heads): the GPU takes 16, 32, \
                 64 or 128",
                sizes.head_dim
            );
            return Err(DeviceError(error));
        }
        Ok(sizes)
    }

    /// As definitions for the compiler.
    pub(super) fn definitions(&self) -> [String; 5] {
        [
            format!("-DHIDDEN={}", self.hidden),
            format!("-DINNER={}", self.inner),
            format!("-DVOCAB={}", self.vocab),
            format!("-DHEADS={}", self.heads),
            format!("-DHEAD_DIM={}", self.head_dim),
        ]
    }

    /// Bytes of shared memory of attention's blocks: forward two tiles of queries, and two each of keys
    /// and values, in turns; backward two tiles more that stay.
    pub(super) fn attention_shared(&self) -> [u32; 2] {
        let tile = TILE * self.head_dim * size_of::<u16>();
        [6, 8].map(|tiles| (tiles * tile) as u32)
    }

    /// Threads that a row of the residual stream lies over.
    pub(super) fn row_threads(&self) -> u32 {
        (self.hidden / 8).next_multiple_of(32).min(256) as u32
    }
}
