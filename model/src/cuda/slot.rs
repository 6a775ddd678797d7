//! One slot: all loops forward, the loss and its gradients in closed form, all loops backward, as
//! kernels and products in a queue.
//!
//! The residual stream and its gradient are f32; what is multiplied is bf16, and summed in f32. The
//! gradients of the weights are added to f32 sums by the products themselves, loop after loop and slot
//! after slot. What backward needs of forward is kept, or computed again from the stream at the
//! beginning of a loop or a layer: every number is the same then.

use std::collections::BTreeMap;

use looptrain_proto::spec::Objective;

use super::driver::{Address, Argument, DeviceError, Driver, Launch, Mark, Product, ProductKind};
use super::kernels::{ATTENTION_ROWS, ATTENTION_THREADS, Sizes};
use super::memory::{Kept, NORM_BLOCKS, Places, SlotSizes, Workspace};
use crate::batch::assert_starts;
use crate::exit::{LABEL_MARGIN, LABEL_SLOPE};
use crate::{Recompute, SlotBatch, StageSettings};

/// Flat buffers on the device, each of [`Places::len`] elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffers {
    /// Weights, f32: what norms, gate and embedding read.
    pub(super) weights: Address,
    /// Weights, bf16: what products read.
    pub(super) narrow: Address,
    /// The sum of gradients, f32.
    pub(super) gradient: Address,
}

/// A kernel over so many blocks.
fn over(kernel: &'static str, blocks: usize, threads: u32) -> Launch {
    Launch { kernel, grid: [blocks as u32, 1, 1], threads }
}

macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { &[$(Argument::from($argument)),*] };
}

/// Where attention begins for each of `tokens` in its sequence, and one past the last token of the
/// sequence that sees it: by `starts`, which grow along a sequence, or without them.
fn seen(starts: &[u32], tokens: usize, length: usize) -> (Vec<u32>, Vec<u32>) {
    if starts.is_empty() {
        return (vec![0; tokens], vec![length as u32; tokens]);
    }
    let of_sequence = |starts: &[u32]| {
        let until = |at| starts.partition_point(|&start| start <= at) as u32;
        (0..length as u32).map(until).collect::<Vec<u32>>()
    };
    (starts.to_vec(), starts.chunks(length).flat_map(of_sequence).collect())
}

/// What all parts of a slot's work need.
pub(super) struct Task<'a> {
    pub(super) driver: &'a dyn Driver,
    pub(super) model: &'a Sizes,
    pub(super) places: &'a Places,
    pub(super) buffers: Buffers,
    pub(super) work: &'a Workspace,
    pub(super) eps: f32,
}

/// From the first element on, in layout order, the gradient is final at that moment.
pub(crate) type Final = (usize, Mark);

impl Task<'_> {
    /// Brings a slot's tokens and angles to the device.
    pub(super) fn prepare(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
    ) -> Result<(), DeviceError> {
        let [inputs, targets] = batch.ids();
        let SlotSizes { length, loops, .. } = self.work.sizes;
        let half = self.model.head_dim / 2;
        let frequency = |i: usize| settings.rope_base.powf(-(i as f64) / half as f64);
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let table = |of: fn(f64) -> f64| -> Vec<f32> {
            let angle = |at: usize| (at / half) as f64 * frequencies[at % half];
            (0..length * half).map(|at| of(angle(at)) as f32).collect()
        };
        self.driver.upload(self.work.ids, bytemuck::cast_slice(&inputs))?;
        self.driver.upload(self.work.targets, bytemuck::cast_slice(&targets.repeat(loops)))?;
        assert_starts(&batch.starts, inputs.len(), length);
        let (first_seen, seen_until) = seen(&batch.starts, inputs.len(), length);
        self.driver.upload(self.work.first_seen, bytemuck::cast_slice(&first_seen))?;
        self.driver.upload(self.work.seen_until, bytemuck::cast_slice(&seen_until))?;
        self.driver.upload(self.work.cosines, bytemuck::cast_slice(&table(f64::cos)))?;
        self.driver.upload(self.work.sines, bytemuck::cast_slice(&table(f64::sin)))?;
        if self.work.sizes.goes_back() {
            // Each id's positions in their order, so that rows are always summed in the same order.
            let mut positions = BTreeMap::<u32, Vec<u32>>::new();
            for (position, id) in inputs.iter().enumerate() {
                positions.entry(*id).or_default().push(position as u32);
            }
            let ids: Vec<u32> = positions.keys().copied().collect();
            let mut starts = vec![0u32];
            starts.extend(positions.values().scan(0, |end, of_id| {
                *end += of_id.len() as u32;
                Some(*end)
            }));
            let all: Vec<u32> = positions.into_values().flatten().collect();
            self.driver.upload(self.work.occurring, bytemuck::cast_slice(&ids))?;
            self.driver.upload(self.work.position_starts, bytemuck::cast_slice(&starts))?;
            self.driver.upload(self.work.positions, bytemuck::cast_slice(&all))?;
        }
        Ok(())
    }

    /// Distinct ids of a slot: those that have a row in the embedding's gradient.
    fn distinct(batch: &SlotBatch) -> usize {
        let [mut inputs, _] = batch.ids();
        inputs.sort_unstable();
        inputs.dedup();
        inputs.len()
    }

    /// Queues the gradient of the slot's mean loss by what is trained, added to the sum of gradients; calls
    /// `on_final` as its parts become final.
    pub(super) fn gradient(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
        on_final: &mut dyn FnMut(Final),
    ) -> Result<(), DeviceError> {
        self.prepare(settings, batch)?;
        self.forward()?;
        match settings.objective {
            Objective::Language => self.language_gradient(settings, batch, on_final),
            Objective::ExitGate => self.gate_gradient(on_final),
        }
    }

    /// The rest of a slot that trains the exit gate: there is no backward pass, for nothing before the gate
    /// is trained.
    fn gate_gradient(&self, on_final: &mut dyn FnMut(Final)) -> Result<(), DeviceError> {
        self.head(false)?;
        self.gate_backward()?;
        on_final((self.places.exit_weight, self.driver.mark()?));
        self.loop_sums(Address::NONE)
    }

    /// From the losses and states of all loops to the gradient of the gate.
    pub(super) fn gate_backward(&self) -> Result<(), DeviceError> {
        let work = self.work;
        let (tokens, loops) = (work.sizes.tokens(), work.sizes.loops);
        self.driver.launch(
            over("stage_two", self.exit_blocks(), Workspace::EXIT_THREADS as u32),
            arguments![
                work.losses,
                work.gate_logits,
                tokens,
                loops,
                LABEL_SLOPE,
                LABEL_MARGIN,
                work.dgate_logits,
                work.sums,
            ],
        )?;
        self.driver.launch(
            self.norm_launch("gate_weight_backward"),
            arguments![loops * tokens, work.states, work.dgate_logits, work.parts],
        )?;
        self.add_parts(&[self.places.exit_weight])?;
        self.gate_bias_backward()
    }

    fn gate_bias_backward(&self) -> Result<(), DeviceError> {
        let work = self.work;
        self.driver.launch(
            over("gate_bias_backward", 1, 1),
            arguments![
                work.sums,
                self.exit_blocks(),
                3 + 2 * work.sizes.loops,
                self.gradient_at(self.places.exit_bias),
            ],
        )
    }

    fn language_gradient(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
        on_final: &mut dyn FnMut(Final),
    ) -> Result<(), DeviceError> {
        let SlotSizes { loops, layers, .. } = self.work.sizes;
        let (work, d) = (self.work, self.model.hidden);
        self.head(true)?;
        on_final((self.places.head_in_layout, self.driver.mark()?));
        self.stage_one(settings)?;
        self.gate_bias_backward()?;

        self.driver.zero(work.dstream, work.sizes.tokens() * d * size_of::<f32>())?;
        let again = work.sizes.recompute != Recompute::None;
        // The last loop and its last layers are still there.
        let mut held = vec![usize::MAX; layers];
        let sets = layers.min(2);
        held[layers - sets..].fill(loops - 1);
        for r in (0..loops).rev() {
            if again && r + 1 < loops {
                self.driver.copy(work.stream, work.starts[r], self.stream_bytes())?;
                self.one_loop(r)?;
                held.fill(usize::MAX);
                held[layers - sets..].fill(r);
            }
            let mut ensure = |l: usize| -> Result<(), DeviceError> {
                if work.sizes.recompute == Recompute::Layer && held[l] != r {
                    self.layer_again(r, l)?;
                    held[l] = r;
                }
                Ok(())
            };
            self.state_norm_backward(r)?;
            if r == 0 {
                on_final((self.places.norm, self.driver.mark()?));
            }
            for l in (0..layers).rev() {
                if l > 0 {
                    ensure(l - 1)?;
                }
                self.layer_backward(r, l)?;
                if r == 0 {
                    on_final((self.final_before(l), self.driver.mark()?));
                }
            }
        }
        self.driver.launch(
            over("embed_backward", Self::distinct(batch), self.model.row_threads()),
            arguments![
                work.occurring,
                work.position_starts,
                work.positions,
                work.dstream,
                self.gradient_at(self.places.embedding),
            ],
        )?;
        on_final((0, self.driver.mark()?));
        self.loop_sums(work.gradient_squares)
    }

    /// The first element that is final when a layer of the first loop has been taken back: its first
    /// norm is then; the norm at the end of the layer before it as well.
    fn final_before(&self, l: usize) -> usize {
        match l.checked_sub(1) {
            Some(before) => self.places.layers[before].output_norm,
            None => self.places.layers[0].input_norm,
        }
    }

    /// Queues losses and statistics, without gradients.
    pub(super) fn losses(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
    ) -> Result<(), DeviceError> {
        self.prepare(settings, batch)?;
        self.forward()?;
        self.head(false)?;
        self.stage_one(settings)?;
        self.loop_sums(Address::NONE)
    }

    fn stream_bytes(&self) -> usize {
        self.work.sizes.tokens() * self.model.hidden * size_of::<f32>()
    }

    fn weight(&self, place: usize) -> Address {
        self.buffers.weights.plus(place * size_of::<f32>())
    }

    fn narrow_weight(&self, place: usize) -> Address {
        self.buffers.narrow.plus(place * size_of::<u16>())
    }

    fn gradient_at(&self, place: usize) -> Address {
        self.buffers.gradient.plus(place * size_of::<f32>())
    }

    fn product(
        &self,
        kind: ProductKind,
        [outputs, inputs]: [usize; 2],
        left: Address,
        right: Address,
        out: Address,
    ) -> Result<(), DeviceError> {
        let single = kind == ProductKind::Weight;
        let rows = self.work.sizes.tokens();
        self.driver.product(Product { kind, rows, outputs, inputs, single }, left, right, out)
    }

    /// Shapes `[outputs, inputs]` of a layer's products: queries, keys and values; output; gate and
    /// up; down.
    fn shapes(&self) -> [[usize; 2]; 4] {
        let Sizes { hidden: d, inner: f, .. } = *self.model;
        [[3 * d, d], [d, d], [2 * f, d], [d, f]]
    }

    fn forward(&self) -> Result<(), DeviceError> {
        let work = self.work;
        self.driver.launch(
            over("embed", work.sizes.tokens(), self.model.row_threads()),
            arguments![work.ids, self.weight(self.places.embedding), work.stream],
        )?;
        for r in 0..work.sizes.loops {
            if let Some(start) = work.starts.get(r) {
                self.driver.copy(*start, work.stream, self.stream_bytes())?;
            }
            self.one_loop(r)?;
        }
        Ok(())
    }

    /// One loop, from the stream at its beginning to its state, which is the next one's stream.
    fn one_loop(&self, r: usize) -> Result<(), DeviceError> {
        self.input_norm(r, 0)?;
        for l in 0..self.work.sizes.layers {
            self.layer(r, l)?;
        }
        Ok(())
    }

    /// The norm before a layer, where it does not come with the end of the layer before it.
    fn input_norm(&self, r: usize, l: usize) -> Result<(), DeviceError> {
        let (work, kept) = (self.work, self.work.of_layer(r, l));
        self.driver.launch(
            over("stream_norm", work.sizes.tokens(), self.model.row_threads()),
            arguments![
                work.stream,
                self.weight(self.places.layers[l].input_norm),
                self.eps,
                kept.input,
                kept.input_inverses,
                work.normed,
            ],
        )
    }

    /// What a layer leaves, once more. What it overwrites of the layer after it is the same.
    fn layer_again(&self, r: usize, l: usize) -> Result<(), DeviceError> {
        self.driver.copy(self.work.stream, self.work.inputs[l], self.stream_bytes())?;
        self.input_norm(r, l)?;
        self.branches(r, l)?;
        self.end_of_layer(r, l)
    }

    /// One layer, from the normed stream to the next layer's.
    fn layer(&self, r: usize, l: usize) -> Result<(), DeviceError> {
        if let Some(input) = self.work.inputs.get(l) {
            self.driver.copy(*input, self.work.stream, self.stream_bytes())?;
        }
        self.branches(r, l)?;
        self.end_of_layer(r, l)
    }

    /// Both branches of a layer, up to the last product.
    fn branches(&self, r: usize, l: usize) -> Result<(), DeviceError> {
        let (work, kept, at) = (self.work, self.work.of_layer(r, l), &self.places.layers[l]);
        let [qkv, output, gate_up, down] = self.shapes();
        let forward = |shape, x, place, y| {
            self.product(ProductKind::Forward, shape, x, self.narrow_weight(place), y)
        };
        forward(qkv, work.normed, at.qkv, kept.qkv)?;
        self.rotate(kept.qkv, 1.0)?;
        self.attention(kept)?;
        forward(output, kept.mixed, at.output, kept.branch)?;
        self.driver.launch(
            over("residual_norm", work.sizes.tokens(), self.model.row_threads()),
            arguments![
                work.stream,
                kept.branch,
                self.weight(at.attention_norm),
                self.weight(at.mlp_norm),
                self.eps,
                kept.branch_inverses,
                kept.middle,
                kept.middle_inverses,
                work.normed,
            ],
        )?;
        forward(gate_up, work.normed, at.gate_up, kept.gates)?;
        self.driver.launch(self.swiglu("swiglu"), arguments![kept.gates, work.inner])?;
        forward(down, work.inner, at.down, kept.mlp)
    }

    /// The end of a layer and the norm that follows it.
    fn end_of_layer(&self, r: usize, l: usize) -> Result<(), DeviceError> {
        let SlotSizes { layers, .. } = self.work.sizes;
        let (work, kept, at) = (self.work, self.work.of_layer(r, l), &self.places.layers[l]);
        let (rows, threads) = (work.sizes.tokens(), self.model.row_threads());
        if l + 1 < layers {
            let next = work.of_layer(r, l + 1);
            return self.driver.launch(
                over("residual_norm", rows, threads),
                arguments![
                    work.stream,
                    kept.mlp,
                    self.weight(at.output_norm),
                    self.weight(self.places.layers[l + 1].input_norm),
                    self.eps,
                    kept.mlp_inverses,
                    next.input,
                    next.input_inverses,
                    work.normed,
                ],
            );
        }
        let (end, inverses) = work.end(r);
        self.driver.launch(
            over("state_norm", rows, threads),
            arguments![
                work.stream,
                kept.mlp,
                self.weight(at.output_norm),
                self.weight(self.places.norm),
                self.eps,
                kept.mlp_inverses,
                end,
                inverses,
                self.state(r),
                self.weight(self.places.exit_weight),
                self.weight(self.places.exit_bias),
                work.gate_logits.plus(r * rows * size_of::<f32>()),
                work.hidden_rms.plus(r * rows * size_of::<f32>()),
            ],
        )
    }

    /// The normed states of a loop.
    fn state(&self, r: usize) -> Address {
        let len = self.work.sizes.tokens() * self.model.hidden;
        self.work.states.plus(r * len * size_of::<u16>())
    }

    fn rotate(&self, qkv: Address, sign: f32) -> Result<(), DeviceError> {
        let SlotSizes { length, .. } = self.work.sizes;
        let threads = (self.model.hidden / 2).next_multiple_of(32).min(256) as u32;
        self.driver.launch(
            over("rotate", self.work.sizes.tokens(), threads),
            arguments![qkv, self.work.cosines, self.work.sines, length, sign],
        )
    }

    /// Attention's blocks.
    fn attention_launch(&self, kernel: &'static str) -> Launch {
        let SlotSizes { sequences, length, .. } = self.work.sizes;
        let grid = [length.div_ceil(ATTENTION_ROWS), self.model.heads, sequences].map(|n| n as u32);
        Launch { kernel, grid, threads: ATTENTION_THREADS }
    }

    /// The softmax scale, `head_dim^-0.5`, and the same for scores in units of log2 e.
    fn scales(&self) -> [f32; 2] {
        let scale = 1.0 / (self.model.head_dim as f64).sqrt();
        [scale as f32, (scale * std::f64::consts::LOG2_E) as f32]
    }

    fn attention(&self, kept: &Kept) -> Result<(), DeviceError> {
        let [_, score_scale] = self.scales();
        let SlotSizes { length, .. } = self.work.sizes;
        self.driver.launch(
            self.attention_launch("attention"),
            arguments![
                kept.qkv,
                self.work.first_seen,
                length,
                score_scale,
                kept.mixed,
                kept.log_sums
            ],
        )
    }

    fn attention_backward(&self, kept: &Kept) -> Result<(), DeviceError> {
        let work = self.work;
        let [scale, score_scale] = self.scales();
        let SlotSizes { length, .. } = work.sizes;
        let tokens = work.sizes.tokens();
        // Four warps to a block.
        let blocks = (tokens * self.model.heads).div_ceil(4);
        self.driver.launch(
            over("attention_means", blocks, 128),
            arguments![kept.mixed, work.dmixed, tokens, length, work.means],
        )?;
        for (kernel, seen) in [
            ("attention_backward_keys", work.seen_until),
            ("attention_backward_queries", work.first_seen),
        ] {
            self.driver.launch(
                self.attention_launch(kernel),
                arguments![
                    kept.qkv,
                    work.dmixed,
                    kept.log_sums,
                    work.means,
                    seen,
                    length,
                    scale,
                    score_scale,
                    work.dqkv,
                ],
            )?;
        }
        Ok(())
    }

    fn swiglu(&self, kernel: &'static str) -> Launch {
        const THREADS: usize = 128;
        let blocks = (self.model.inner / 8).div_ceil(THREADS);
        let grid = [self.work.sizes.tokens() as u32, blocks as u32, 1];
        Launch { kernel, grid, threads: THREADS as u32 }
    }

    fn exit_blocks(&self) -> usize {
        self.work.sizes.tokens().div_ceil(Workspace::EXIT_THREADS)
    }

    /// Cross-entropies of all loops, and, backward, the gradients of head and states. Logits are in
    /// memory some rows at a time.
    fn head(&self, backward: bool) -> Result<(), DeviceError> {
        let (work, Sizes { hidden, vocab, .. }) = (self.work, *self.model);
        let (tokens, loops) = (work.sizes.tokens(), work.sizes.loops);
        if backward {
            self.driver.launch(
                over("exit_shares", self.exit_blocks(), Workspace::EXIT_THREADS as u32),
                arguments![work.gate_logits, tokens, loops, work.shares],
            )?;
        }
        let weight = self.narrow_weight(self.places.head);
        let mut first = 0;
        while first < loops * tokens {
            let rows = work.logit_rows.min(loops * tokens - first);
            let states = work.states.plus(first * hidden * size_of::<u16>());
            let of_row = |all: Address| all.plus(first * size_of::<f32>());
            let product = |kind, left, right, out| {
                let product = Product { kind, rows, outputs: vocab, inputs: hidden, single: true };
                self.driver.product(product, left, right, out)
            };
            product(ProductKind::Forward, states, weight, work.logits)?;
            let dlogits = if backward { work.dlogits } else { Address::NONE };
            self.driver.launch(
                over("cross_entropy", rows, self.model.vocab_threads()),
                arguments![
                    work.logits,
                    of_row(work.targets),
                    of_row(work.shares),
                    of_row(work.losses),
                    of_row(work.likeliest),
                    dlogits,
                ],
            )?;
            if backward {
                let dstates = work.dstates.plus(first * hidden * size_of::<f32>());
                product(ProductKind::Input, work.dlogits, weight, dstates)?;
                let dweight = self.gradient_at(self.places.head);
                product(ProductKind::Weight, work.dlogits, states, dweight)?;
            }
            first += rows;
        }
        Ok(())
    }

    /// The loss of each block of tokens, and the gradients of the gate logits.
    fn stage_one(&self, settings: &StageSettings) -> Result<(), DeviceError> {
        let work = self.work;
        self.driver.launch(
            over("stage_one", self.exit_blocks(), Workspace::EXIT_THREADS as u32),
            arguments![
                work.losses,
                work.gate_logits,
                work.sizes.tokens(),
                work.sizes.loops,
                settings.entropy_weight,
                work.dgate_logits,
                work.sums,
            ],
        )
    }

    /// What loops are like, summed over tokens.
    fn loop_sums(&self, gradient_squares: Address) -> Result<(), DeviceError> {
        let (work, SlotSizes { loops, .. }) = (self.work, self.work.sizes);
        self.driver.launch(
            over("loop_sums", loops, 256),
            arguments![
                work.hidden_rms,
                work.likeliest,
                gradient_squares,
                work.sizes.tokens(),
                loops,
                work.loop_sums,
            ],
        )
    }

    fn norm_launch(&self, kernel: &'static str) -> Launch {
        over(kernel, NORM_BLOCKS.min(self.work.sizes.tokens()), self.model.row_threads())
    }

    /// Adds up what the blocks of a norm's backward left: for each sum the place of its weight.
    fn add_parts(&self, places: &[usize]) -> Result<(), DeviceError> {
        let count = NORM_BLOCKS.min(self.work.sizes.tokens());
        let to = |sum: usize| places.get(sum).map_or(Address::NONE, |at| self.gradient_at(*at));
        self.driver.launch(
            Launch {
                kernel: "add_parts",
                grid: [self.model.hidden.div_ceil(32) as u32, places.len() as u32, 1],
                threads: 256,
            },
            arguments![count, self.work.parts, to(0), to(1), to(2)],
        )
    }

    /// From a loop's state to the last layer's branch.
    fn state_norm_backward(&self, r: usize) -> Result<(), DeviceError> {
        let SlotSizes { layers, .. } = self.work.sizes;
        let (work, rows) = (self.work, self.work.sizes.tokens());
        let kept = work.of_layer(r, layers - 1);
        let (end, inverses) = work.end(r);
        let dstates = work.dstates.plus(r * rows * self.model.hidden * size_of::<f32>());
        let output_norm = self.places.layers[layers - 1].output_norm;
        self.driver.launch(
            self.norm_launch("state_norm_backward"),
            arguments![
                rows,
                dstates,
                work.dgate_logits.plus(r * rows * size_of::<f32>()),
                self.weight(self.places.exit_weight),
                end,
                inverses,
                self.weight(self.places.norm),
                work.dstream,
                kept.mlp,
                kept.mlp_inverses,
                self.weight(output_norm),
                work.dbranch,
                work.parts,
                work.gradient_squares.plus(r * rows * size_of::<f32>()),
            ],
        )?;
        self.add_parts(&[self.places.norm, output_norm, self.places.exit_weight])
    }

    /// One layer backward: from the gradients of the stream after it and of its MLP branch to those of
    /// the stream before it and of the branch of the layer before it.
    fn layer_backward(&self, r: usize, l: usize) -> Result<(), DeviceError> {
        let (work, kept, at) = (self.work, self.work.of_layer(r, l), &self.places.layers[l]);
        let (rows, threads) = (work.sizes.tokens(), self.model.row_threads());
        let [qkv, output, gate_up, down] = self.shapes();
        let input = |shape, dy, place, dx| {
            self.product(ProductKind::Input, shape, dy, self.narrow_weight(place), dx)
        };
        let weight = |shape, dy, x, place| {
            self.product(ProductKind::Weight, shape, dy, x, self.gradient_at(place))
        };
        let normed_again = |kept, inverses, place| {
            self.driver.launch(
                over("normed_again", rows, threads),
                arguments![kept, inverses, self.weight(place), work.normed],
            )
        };
        input(down, work.dbranch, at.down, work.dinner)?;
        self.driver.launch(
            self.swiglu("swiglu_backward"),
            arguments![kept.gates, work.dinner, work.dgates, work.inner],
        )?;
        weight(down, work.dbranch, work.inner, at.down)?;
        normed_again(kept.middle, kept.middle_inverses, at.mlp_norm)?;
        weight(gate_up, work.dgates, work.normed, at.gate_up)?;
        input(gate_up, work.dgates, at.gate_up, work.dnormed)?;
        self.driver.launch(
            self.norm_launch("residual_norm_backward"),
            arguments![
                rows,
                work.dnormed,
                kept.middle,
                kept.middle_inverses,
                self.weight(at.mlp_norm),
                work.dstream,
                kept.branch,
                kept.branch_inverses,
                self.weight(at.attention_norm),
                work.dbranch,
                work.parts,
            ],
        )?;
        self.add_parts(&[at.mlp_norm, at.attention_norm])?;

        weight(output, work.dbranch, kept.mixed, at.output)?;
        input(output, work.dbranch, at.output, work.dmixed)?;
        self.attention_backward(kept)?;
        self.rotate(work.dqkv, -1.0)?;
        normed_again(kept.input, kept.input_inverses, at.input_norm)?;
        weight(qkv, work.dqkv, work.normed, at.qkv)?;
        input(qkv, work.dqkv, at.qkv, work.dnormed)?;
        let Some(before) = l.checked_sub(1) else {
            self.driver.launch(
                self.norm_launch("stream_norm_backward"),
                arguments![
                    rows,
                    work.dnormed,
                    kept.input,
                    kept.input_inverses,
                    self.weight(at.input_norm),
                    work.dstream,
                    work.parts,
                ],
            )?;
            return self.add_parts(&[at.input_norm]);
        };
        let branch = work.of_layer(r, before);
        let output_norm = self.places.layers[before].output_norm;
        self.driver.launch(
            self.norm_launch("residual_norm_backward"),
            arguments![
                rows,
                work.dnormed,
                kept.input,
                kept.input_inverses,
                self.weight(at.input_norm),
                work.dstream,
                branch.mlp,
                branch.mlp_inverses,
                self.weight(output_norm),
                work.dbranch,
                work.parts,
            ],
        )?;
        self.add_parts(&[at.input_norm, output_norm])
    }
}
