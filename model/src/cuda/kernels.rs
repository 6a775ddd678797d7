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

/// Rows of a block of attention: 64 to each group of four warps.
pub(super) const ATTENTION_ROWS: usize = 128;

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

    /// Threads that a row of logits lies over, four to a thread at a time.
    pub(super) fn vocab_threads(&self) -> u32 {
        (self.vocab / 4).next_multiple_of(32).min(512) as u32
    }

    /// Threads that a row of the residual stream lies over.
    pub(super) fn row_threads(&self) -> u32 {
        (self.hidden / 8).next_multiple_of(32).min(256) as u32
    }
}

/// What the kernels are compiled for: a model's sizes, and a kind of device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) sizes: Sizes,
    /// Whether groups of four warps multiply matrices that lie in shared memory, as Hopper's do, rather than
    /// each warp what it has loaded. Heads of less than 64 numbers are too short for that.
    pub(super) warp_groups: bool,
}

impl Target {
    /// For a device, with groups of warps where it has them.
    pub(super) fn new(sizes: Sizes, has_warp_groups: bool) -> Self {
        Self { sizes, warp_groups: has_warp_groups && sizes.head_dim >= 64 }
    }

    /// Keys of a tile of attention, and queries: as many as the registers have room for.
    fn columns(&self) -> [usize; 2] {
        match (self.warp_groups, self.sizes.head_dim) {
            (true, 128) => [128, 64],
            (true, _) => [64, 128],
            (false, _) => [64, 64],
        }
    }

    /// As definitions for the compiler.
    pub(super) fn definitions(&self) -> Vec<String> {
        let Sizes { hidden, inner, vocab, heads, head_dim } = self.sizes;
        let [keys, queries] = self.columns();
        let mut definitions = vec![
            format!("-DHIDDEN={hidden}"),
            format!("-DINNER={inner}"),
            format!("-DVOCAB={vocab}"),
            format!("-DHEADS={heads}"),
            format!("-DHEAD_DIM={head_dim}"),
            format!("-DKEYS={keys}"),
            format!("-DQUERIES={queries}"),
        ];
        definitions.extend(self.warp_groups.then(|| "-DWARP_GROUPS".to_owned()));
        definitions
    }

    /// Bytes of shared memory of a kernel's blocks, beside what it declares: attention's rows, which stay,
    /// and two tiles each of what it goes over, in turns.
    pub(super) fn shared(&self, kernel: &str) -> usize {
        let [keys, queries] = self.columns();
        let row = self.sizes.head_dim * size_of::<u16>();
        match kernel {
            "attention" => (ATTENTION_ROWS + 4 * keys) * row,
            "attention_backward_queries" => (2 * ATTENTION_ROWS + 4 * keys) * row,
            // With the log-sums and the means of each query.
            "attention_backward_keys" => {
                (2 * ATTENTION_ROWS + 4 * queries) * row + 4 * queries * size_of::<f32>()
            }
            _ => 0,
        }
    }
}
