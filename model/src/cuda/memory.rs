//! What lies where in the device's memory.

use std::ops::Range;
use std::sync::Arc;

use looptrain_proto::spec::Objective;

use super::driver::{Address, DeviceError, Driver, Parts};
use super::kernels::Sizes;
use crate::{Layout, Recompute};

/// Elements that a flat buffer is shifted by from the head on, so that its rows are aligned.
pub(super) const ALIGNED: usize = 128;

/// Places of tensors in the device's flat buffers, in elements. They are those of [`Layout`], but for
/// the head, which begins a few elements later.
#[derive(Clone, Debug)]
pub(super) struct Places {
    pub(super) embedding: usize,
    pub(super) layers: Vec<LayerPlaces>,
    pub(super) norm: usize,
    pub(super) exit_weight: usize,
    pub(super) exit_bias: usize,
    pub(super) head: usize,
    /// The head's first element in the layout.
    pub(super) head_in_layout: usize,
    /// The head's elements.
    head_len: usize,
    /// Elements of a device's flat buffer.
    pub(super) len: usize,
}

/// Those of one layer. Queries', keys' and values' weights lie beside each other as one, as do those
/// of gate and up.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerPlaces {
    pub(super) input_norm: usize,
    pub(super) qkv: usize,
    pub(super) output: usize,
    pub(super) attention_norm: usize,
    pub(super) mlp_norm: usize,
    pub(super) gate_up: usize,
    pub(super) down: usize,
    pub(super) output_norm: usize,
}

impl Places {
    pub(super) fn new(layout: &Layout, layers: usize) -> Self {
        let tensors = layout.tensors();
        assert_eq!(tensors.len(), layers * 11 + 5, "the layout is that of the model");
        let layer = |number: usize| {
            let at = |tensor: usize| tensors[1 + number * 11 + tensor].offset;
            LayerPlaces {
                input_norm: at(0),
                qkv: at(1),
                output: at(4),
                attention_norm: at(5),
                mlp_norm: at(6),
                gate_up: at(7),
                down: at(9),
                output_norm: at(10),
            }
        };
        let after = |tensor: usize| tensors[1 + layers * 11 + tensor].offset;
        let head_in_layout = after(3);
        let head = head_in_layout.next_multiple_of(ALIGNED);
        Self {
            embedding: 0,
            layers: (0..layers).map(layer).collect(),
            norm: after(0),
            exit_weight: after(1),
            exit_bias: after(2),
            head,
            head_in_layout,
            head_len: layout.parameters() - head_in_layout,
            len: (layout.parameters() + head - head_in_layout).next_multiple_of(ALIGNED),
        }
    }

    /// The places of what an objective trains. They begin at a multiple of 8, as the model's sizes are, and
    /// end at one of [`ALIGNED`]: between the gate and the head there is nothing.
    pub(super) fn trained(&self, objective: Objective) -> Range<usize> {
        match objective {
            Objective::Language => 0..self.len,
            Objective::ExitGate => self.exit_weight..self.head,
        }
    }

    /// The parts of some elements of the layout that lie beside each other, and where each begins on the
    /// device: up to the head, and of the head.
    pub(super) fn runs_of(
        &self,
        elements: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize)> {
        let parameters = self.head_in_layout + self.head_len;
        let runs = [(0..self.head_in_layout, 0), (self.head_in_layout..parameters, self.head)];
        let elements = elements.clone();
        runs.into_iter().filter_map(move |(run, place)| {
            let part = run.start.max(elements.start)..run.end.min(elements.end);
            let place = place + part.start - run.start;
            (!part.is_empty()).then_some((part, place))
        })
    }
}

/// What a slot is computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Its losses alone.
    Losses,
    /// The gradient of an objective.
    Gradient(Objective),
}

impl Purpose {
    /// Whether what forward leaves is of use: there is no way back where the gate alone is trained.
    fn goes_back(self) -> bool {
        self == Self::Gradient(Objective::Language)
    }
}

/// Sizes of a slot's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotSizes {
    pub(super) sequences: usize,
    pub(super) length: usize,
    pub(super) loops: usize,
    pub(super) layers: usize,
    pub(super) recompute: Recompute,
    pub(super) purpose: Purpose,
}

impl SlotSizes {
    pub(super) fn tokens(&self) -> usize {
        self.sequences * self.length
    }

    /// Whether all that forward leaves is kept.
    pub(super) fn keeps_all(&self) -> bool {
        self.purpose.goes_back() && self.recompute == Recompute::None
    }

    /// Sets of what layers leave for backward.
    fn kept(&self) -> usize {
        match (self.purpose.goes_back(), self.recompute) {
            (true, Recompute::None) => self.loops * self.layers,
            (true, Recompute::Loop) => self.layers,
            // A layer's norms are taken back together with the branch of the one before it.
            _ => 2.min(self.layers),
        }
    }

    /// Whether there is a backward pass through the layers.
    pub(super) fn goes_back(&self) -> bool {
        self.purpose.goes_back()
    }

    /// The set of a layer of a loop.
    pub(super) fn set(&self, r: usize, l: usize) -> usize {
        if self.keeps_all() { r * self.layers + l } else { l % self.kept() }
    }
}

/// What a layer leaves for its backward pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    /// The stream before the layer, bf16 `[N, d]`, and its inverse rms, f32 `[N]`.
    pub(super) input: Address,
    pub(super) input_inverses: Address,
    /// Turned queries and keys, and values, bf16 `[N, 3 d]`.
    pub(super) qkv: Address,
    /// The heads' outputs, bf16 `[N, d]`, and the scores' log-sums, f32 `[B, H, T]`.
    pub(super) mixed: Address,
    pub(super) log_sums: Address,
    /// The attention branch before its norm, and its inverse rms.
    pub(super) branch: Address,
    pub(super) branch_inverses: Address,
    /// The stream between the branches.
    pub(super) middle: Address,
    pub(super) middle_inverses: Address,
    /// Gate and up, bf16 `[N, 2 f]`.
    pub(super) gates: Address,
    /// The MLP branch before its norm.
    pub(super) mlp: Address,
    pub(super) mlp_inverses: Address,
}

/// An allocation, given back when it is dropped.
pub(super) struct Memory {
    driver: Arc<dyn Driver>,
    pub(super) base: Address,
}

impl Memory {
    pub(super) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, DeviceError> {
        Ok(Self { driver: Arc::clone(driver), base: driver.allocate(bytes)? })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.driver.free(self.base);
    }
}

/// Blocks that take norms back, each with its part of the weights' gradients.
pub(super) const NORM_BLOCKS: usize = 512;

/// Most rows whose logits are in memory at a time.
const LOGIT_ROWS: usize = 2048;

/// The memory of a slot under way: one allocation, cut into parts.
pub(super) struct Workspace {
    /// Given back with it; none when it is only measured.
    _memory: Option<Memory>,
    pub(super) sizes: SlotSizes,
    pub(super) kept: Vec<Kept>,
    /// The stream after the last layer of each loop, before the final norm: bf16 `[N, d]`, f32 `[N]`.
    pub(super) ends: Vec<(Address, Address)>,
    /// Where a loop begins, f32 `[N, d]`, and where each layer of one loop does, for what is computed
    /// again.
    pub(super) starts: Vec<Address>,
    pub(super) inputs: Vec<Address>,
    /// The residual stream, f32 `[N, d]`.
    pub(super) stream: Address,
    pub(super) normed: Address,
    pub(super) inner: Address,
    /// Normed states of all loops, bf16 `[R, N, d]`.
    pub(super) states: Address,
    pub(super) gate_logits: Address,
    pub(super) losses: Address,
    pub(super) shares: Address,
    /// Likeliest next tokens, u32 `[R, N]`, root mean squares of the stream at the end of loops, f32
    /// `[R, N]`, and squares of their states' gradients.
    pub(super) likeliest: Address,
    pub(super) hidden_rms: Address,
    pub(super) gradient_squares: Address,
    /// Sums of the three over tokens, f64 `[R, 3]`.
    pub(super) loop_sums: Address,
    pub(super) ids: Address,
    pub(super) targets: Address,
    /// Where attention begins for each token in its sequence, u32 `[N]`, and one past the last token
    /// that sees it.
    pub(super) first_seen: Address,
    pub(super) seen_until: Address,
    /// Cosines and sines, f32 `[T, head_dim / 2]` each.
    pub(super) cosines: Address,
    pub(super) sines: Address,
    /// Rows of logits at a time.
    pub(super) logit_rows: usize,
    pub(super) logits: Address,
    pub(super) dlogits: Address,
    pub(super) sums: Address,
    pub(super) dgate_logits: Address,
    pub(super) dstates: Address,
    pub(super) dstream: Address,
    pub(super) dnormed: Address,
    pub(super) dqkv: Address,
    pub(super) dmixed: Address,
    pub(super) dbranch: Address,
    pub(super) dgates: Address,
    pub(super) dinner: Address,
    pub(super) means: Address,
    pub(super) parts: Address,
    /// Ids that occur, where their positions begin, and the positions.
    pub(super) occurring: Address,
    pub(super) position_starts: Address,
    pub(super) positions: Address,
}

impl Workspace {
    /// Tokens of a block of the exit distribution.
    pub(super) const EXIT_THREADS: usize = 128;

    /// Bytes that a slot of such sizes takes.
    pub(super) fn bytes(sizes: SlotSizes, model: &Sizes) -> usize {
        let mut parts = Parts::default();
        Self::cut(sizes, model, &mut |bytes| {
            parts.place(bytes);
            Address::NONE
        });
        parts.bytes()
    }

    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        sizes: SlotSizes,
        model: &Sizes,
    ) -> Result<Self, DeviceError> {
        let memory = Memory::new(driver, Self::bytes(sizes, model))?;
        let (base, mut parts) = (memory.base, Parts::default());
        let cut = Self::cut(sizes, model, &mut |bytes| base.plus(parts.place(bytes).start));
        Ok(Self { _memory: Some(memory), ..cut })
    }

    fn cut(sizes: SlotSizes, model: &Sizes, part: &mut dyn FnMut(usize) -> Address) -> Self {
        let (n, d, f) = (sizes.tokens(), model.hidden, model.inner);
        let (single, half) = (size_of::<f32>(), size_of::<u16>());
        let mut narrow = |len: usize| part(len * half);
        let set = |narrow: &mut dyn FnMut(usize) -> Address| Kept {
            input: narrow(n * d),
            qkv: narrow(n * 3 * d),
            mixed: narrow(n * d),
            branch: narrow(n * d),
            middle: narrow(n * d),
            gates: narrow(n * 2 * f),
            mlp: narrow(n * d),
            // f32
            input_inverses: narrow(2 * n),
            log_sums: narrow(2 * n * model.heads),
            branch_inverses: narrow(2 * n),
            middle_inverses: narrow(2 * n),
            mlp_inverses: narrow(2 * n),
        };
        let kept = (0..sizes.kept()).map(|_| set(&mut narrow)).collect();
        let ends = match sizes.keeps_all() {
            true => sizes.loops,
            false => 1,
        };
        let ends = (0..ends).map(|_| (narrow(n * d), narrow(2 * n))).collect();
        let (normed, inner) = (narrow(n * d), narrow(n * f));
        let states = narrow(sizes.loops * n * d);
        let again = sizes.goes_back() && sizes.recompute != Recompute::None;
        let by_layer = again && sizes.recompute == Recompute::Layer;
        let mut floats = |len: usize| part(len * single);
        let starts = (0..if again { sizes.loops } else { 0 }).map(|_| floats(n * d)).collect();
        let inputs = (0..if by_layer { sizes.layers } else { 0 }).map(|_| floats(n * d)).collect();
        let stream = floats(n * d);
        let of_loops = sizes.loops * n;
        let (gate_logits, losses, shares) = (floats(of_loops), floats(of_loops), floats(of_loops));
        let (likeliest, hidden_rms) = (floats(of_loops), floats(of_loops));
        let loop_sums = floats(2 * 3 * sizes.loops);
        let (ids, targets) = (floats(n), floats(of_loops));
        let (first_seen, seen_until) = (floats(n), floats(n));
        let half_head = model.head_dim / 2;
        let (cosines, sines) = (floats(sizes.length * half_head), floats(sizes.length * half_head));
        let logit_rows = of_loops.min(LOGIT_ROWS);
        let logits = floats(logit_rows * model.vocab);
        let width = 3 + 2 * sizes.loops;
        let sums = floats(2 * n.div_ceil(Self::EXIT_THREADS) * width);
        let backward = usize::from(sizes.goes_back());
        let dgate_logits = floats(of_loops);
        let gradient_squares = floats(backward * of_loops);
        let dstates = floats(backward * of_loops * d);
        let dstream = floats(backward * n * d);
        let means = floats(backward * n * model.heads);
        // Sums over rows: a norm's, a branch's and the gate's; or the gate's alone.
        let row_sums = match sizes.purpose {
            Purpose::Losses => 0,
            Purpose::Gradient(Objective::ExitGate) => 1,
            Purpose::Gradient(Objective::Language) => 3,
        };
        let parts = floats(row_sums * NORM_BLOCKS * d);
        let occurring = floats(backward * n);
        let (position_starts, positions) = (floats(backward * (n + 1)), floats(backward * n));
        let mut narrow = |len: usize| part(backward * len * half);
        let dlogits = narrow(logit_rows * model.vocab);
        let (dnormed, dqkv, dmixed, dbranch) =
            (narrow(n * d), narrow(n * 3 * d), narrow(n * d), narrow(n * d));
        let (dgates, dinner) = (narrow(n * 2 * f), narrow(n * f));
        Self {
            _memory: None,
            sizes,
            kept,
            ends,
            starts,
            inputs,
            stream,
            normed,
            inner,
            states,
            gate_logits,
            losses,
            shares,
            likeliest,
            hidden_rms,
            gradient_squares,
            loop_sums,
            ids,
            targets,
            first_seen,
            seen_until,
            cosines,
            sines,
            logit_rows,
            logits,
            dlogits,
            sums,
            dgate_logits,
            dstates,
            dstream,
            dnormed,
            dqkv,
            dmixed,
            dbranch,
            dgates,
            dinner,
            means,
            parts,
            occurring,
            position_starts,
            positions,
        }
    }

    /// What a layer of a loop leaves for backward.
    pub(super) fn of_layer(&self, r: usize, l: usize) -> &Kept {
        &self.kept[self.sizes.set(r, l)]
    }

    /// The stream at the end of a loop, and its inverse rms.
    pub(super) fn end(&self, r: usize) -> (Address, Address) {
        self.ends[r % self.ends.len()]
    }
}
