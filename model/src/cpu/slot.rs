//! One slot: all loops forward, the loss and its gradients in closed form, all loops backward.
//!
//! What backward needs of forward is kept, or only the states between loops are, and the rest is
//! computed again one segment at a time, a loop or a layer: then memory grows with one segment and
//! not with loops times layers. Computed again, every float is the same, so the choice never changes a
//! bit.

use looptrain_proto::spec::Objective;
use rayon::prelude::*;

use super::clock::{Clock, Section};
use super::gradients::Gradients;
use super::layer::{self, Dims, Saved, Work};
use super::rotary::Rotary;
use super::weights::Weights;
use super::{attention, head, simd};
use crate::exit::{self, SlotStatistics};
use crate::{Layout, Recompute, SlotBatch, StageSettings, TokenMeasures};

/// What stays of the forward pass.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// All that backward needs.
    All,
    /// Of the current loop, all that backward needs; of the others their states.
    Loop,
    /// Of the current loop, the input of each layer; of the others their states.
    Inputs,
    /// Nothing but the states: there is no backward.
    States,
}

impl Keep {
    fn of(recompute: Recompute, objective: Objective) -> Self {
        match (objective, recompute) {
            (Objective::ExitGate, _) => Self::States,
            (Objective::Language, Recompute::None) => Self::All,
            (Objective::Language, Recompute::Loop) => Self::Loop,
            (Objective::Language, Recompute::Layer) => Self::Inputs,
        }
    }
}

/// Places of activations: the output of layer `l` of loop `r`, and what its forward saved.
#[derive(Clone, Copy)]
struct Places {
    keep: Keep,
    loops: usize,
    layers: usize,
}

impl Places {
    fn streams(&self) -> usize {
        match self.keep {
            Keep::All => self.loops * self.layers,
            Keep::Loop | Keep::Inputs => self.layers,
            Keep::States => 2.min(self.layers),
        }
    }

    fn stream(&self, r: usize, l: usize) -> usize {
        match self.keep {
            Keep::All => r * self.layers + l,
            Keep::Loop | Keep::Inputs => l,
            Keep::States => l % 2,
        }
    }

    fn saves(&self) -> usize {
        match self.keep {
            Keep::All => self.loops * self.layers,
            Keep::Loop => self.layers,
            Keep::Inputs | Keep::States => 1,
        }
    }

    fn save(&self, r: usize, l: usize) -> usize {
        match self.keep {
            Keep::All => r * self.layers + l,
            Keep::Loop => l,
            Keep::Inputs | Keep::States => 0,
        }
    }
}

/// The memory of a slot under way, kept from slot to slot.
#[derive(Default)]
pub(crate) struct Workspace {
    /// Embedded tokens, `[N, d]`.
    embedded: Vec<f32>,
    /// Outputs of layers, `[N, d]` each.
    streams: Vec<Vec<f32>>,
    saved: Vec<Saved>,
    work: Work,
    /// Normed states of all loops, `[R * N, d]`.
    states: Vec<f32>,
    /// Inverse rms of the final norm, `[R * N]`.
    inverses: Vec<f32>,
    /// Gate logits, `[R * N]`.
    gates: Vec<f32>,
    /// Cross-entropies, `[R * N]`.
    losses: Vec<f32>,
    /// Likeliest next tokens, `[R * N]`.
    likeliest: Vec<u32>,
    /// Gradient of the states, `[R * N, d]`.
    dstates: Vec<f32>,
    /// Gradient of the residual stream, `[N, d]`.
    stream_gradient: Vec<f32>,
    /// An output that nobody reads, `[N, d]`.
    unread: Vec<f32>,
    /// Logits of one chunk.
    logits: Vec<f32>,
}

impl Workspace {
    /// Bytes of the workspace of a slot, with the backward pass of its objective. What threads keep for
    /// themselves (some hundred kilobytes each) is not in it.
    pub(crate) fn bytes(slot: &Shape, recompute: Recompute, objective: Objective) -> u64 {
        let dims = slot.dims();
        let keep = Keep::of(recompute, objective);
        let places = Places { keep, loops: slot.loops, layers: slot.layers };
        let (n, d) = (dims.tokens(), dims.hidden);
        let saved = places.saves() * n * Saved::width(&dims);
        let logits = head::logits_len(slot.vocab, slot.loops * n);
        let forward = slot.loops * n * (d + 4) + (places.streams() + 1) * n * d + saved + logits;
        let backward = match objective {
            Objective::Language => (slot.loops + 2) * n * d + Work::len(&dims),
            Objective::ExitGate => 0,
        };
        let floats = forward + backward;
        (floats * size_of::<f32>()) as u64
    }

    /// Statistics with what the loops of the slot that is in it were like.
    fn of_loops(&self, statistics: SlotStatistics, gradient_squares: &[f64]) -> SlotStatistics {
        let hidden_rms = self.inverses.iter().map(|inverse| 1.0 / f64::from(*inverse));
        statistics.with_loops(hidden_rms, &self.likeliest, gradient_squares)
    }

    fn resize(&mut self, slot: &Shape, places: &Places, backward: bool) {
        let dims = slot.dims();
        let (n, d, loops) = (dims.tokens(), dims.hidden, slot.loops);
        self.embedded.resize(n * d, 0.0);
        // An evaluation between two steps takes fewer, and leaves the others where they are.
        if backward || self.streams.len() < places.streams() {
            self.streams.resize_with(places.streams(), Vec::new);
            self.saved.resize_with(places.saves(), Saved::default);
        }
        let streams = self.streams.iter_mut().take(places.streams());
        streams.for_each(|stream| stream.resize(n * d, 0.0));
        self.saved.iter_mut().take(places.saves()).for_each(|saved| saved.resize(&dims));
        self.states.resize(loops * n * d, 0.0);
        self.inverses.resize(loops * n, 0.0);
        self.gates.resize(loops * n, 0.0);
        self.losses.resize(loops * n, 0.0);
        self.likeliest.resize(loops * n, 0);
        self.logits.resize(head::logits_len(slot.vocab, loops * n), 0.0);
        if backward {
            self.work.resize(&dims);
            self.dstates.resize(loops * n * d, 0.0);
            self.stream_gradient.resize(n * d, 0.0);
            self.unread.resize(n * d, 0.0);
        }
    }
}

/// Sizes of a slot's work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) sequences: usize,
    pub(crate) length: usize,
    pub(crate) heads: usize,
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) vocab: usize,
    pub(crate) layers: usize,
    pub(crate) loops: usize,
    pub(crate) eps: f32,
}

impl Shape {
    fn dims(&self) -> Dims {
        Dims {
            attention: attention::Dims {
                sequences: self.sequences,
                length: self.length,
                heads: self.heads,
                head_dim: self.hidden / self.heads,
            },
            hidden: self.hidden,
            inner: self.inner,
            eps: self.eps,
        }
    }
}

/// What all parts of a slot's work need.
#[derive(Clone, Copy)]
pub(crate) struct Task<'a> {
    pub(crate) weights: &'a Weights,
    pub(crate) layout: &'a Layout,
    pub(crate) shape: Shape,
    /// Where attention begins for each token; empty: with its sequence.
    pub(crate) starts: &'a [u32],
    pub(crate) rotary: &'a Rotary,
    pub(crate) clock: &'a Clock,
}

impl Task<'_> {
    /// The gradient of the slot's mean loss by what is trained, added to `gradient` (flat, in layout
    /// order), and means over the slot's tokens. Calls `on_final` with the gradient whenever more of it is final:
    /// its elements from that one on. Weights of the layers have theirs from all loops, so all but
    /// the head become final in the backward pass of the first loop.
    pub(crate) fn gradient(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
        recompute: Recompute,
        workspace: &mut Workspace,
        gradient: &mut [f32],
        on_final: &dyn Fn(&[f32], usize),
    ) -> SlotStatistics {
        let Shape { hidden: d, vocab, layers, loops, .. } = self.shape;
        let dims = self.shape.dims();
        let places = Places { keep: Keep::of(recompute, settings.objective), loops, layers };
        workspace.resize(&self.shape, &places, settings.objective == Objective::Language);
        let [inputs, targets] = batch.ids();
        self.forward(&places, &inputs, workspace);

        let clock = self.clock;
        if settings.objective == Objective::ExitGate {
            let (weight, bias) = gradient.split_at_mut(d);
            return self.gate_gradient(&targets, workspace, [weight, bias]);
        }
        let mut gradients = Gradients::new(self.layout, layers, gradient);
        let mut shares = clock.time(Section::Head, || exit::exit_shares(&workspace.gates, loops));
        let Workspace { states, dstates, gates, logits, losses, likeliest, .. } = &mut *workspace;
        let rows = head::Rows { states, targets: &targets, hidden: d, vocab };
        let into = head::Into { shares: &mut shares, dstates, dhead: gradients.head() };
        head::cross_entropy(
            clock,
            &self.weights.head,
            &rows,
            logits,
            losses,
            likeliest,
            Some(into),
        );
        let loss = clock
            .time(Section::Head, || exit::stage_one(losses, gates, loops, settings.entropy_weight));
        let Workspace { states, dstates, .. } = &mut *workspace;
        self.exit_gate_backward(&loss.dgates, states, gradients.exit_gate());
        self.exit_gate_input_backward(&loss.dgates, dstates);
        on_final(gradients.flat(), gradients.start_of_exit_gate());

        workspace.stream_gradient.fill(0.0);
        let mut squares = vec![0.0; loops];
        for r in (0..loops).rev() {
            let is_last = r + 1 == loops;
            // What is kept of one loop is still that of the last one.
            if places.keep != Keep::All && !is_last {
                self.loop_forward(&places, r, workspace, Section::Recompute);
            }
            squares[r] = self.final_norm_backward(&places, r, workspace, gradients.norm());
            for l in (0..layers).rev() {
                let Workspace {
                    embedded,
                    streams,
                    saved,
                    work,
                    states,
                    unread,
                    stream_gradient: dy,
                    ..
                } = &mut *workspace;
                let x = input_of(&places, self.loop_len(), r, l, embedded, states, streams);
                let layer = &self.weights.layers[l];
                let saved = &mut saved[places.save(r, l)];
                // What is saved is still that of the loop's last layer.
                if places.keep == Keep::Inputs && l + 1 < layers {
                    let call = self.call(&dims, Section::Recompute);
                    layer::forward(layer, &call, x, unread, saved);
                }
                let call = self.call(&dims, Section::Backward);
                layer::backward(layer, &call, x, dy, saved, work, &mut gradients.layer(l));
                if r == 0 {
                    on_final(gradients.flat(), gradients.start_of_layer(l));
                }
            }
        }
        clock.time(Section::Backward, || {
            let embedding = gradients.embedding();
            // In token order: a row that occurs twice must always be summed in the same order.
            for (&id, dx) in inputs.iter().zip(workspace.stream_gradient.chunks_exact(d)) {
                let at = id as usize * d;
                simd::add(&mut embedding[at..at + d], dx);
            }
        });
        workspace.of_loops(loss.statistics, &squares)
    }

    /// The rest of a slot that trains the exit gate: there is no backward pass, for nothing before the
    /// gate is trained.
    fn gate_gradient(
        &self,
        targets: &[u32],
        workspace: &mut Workspace,
        gate: [&mut [f32]; 2],
    ) -> SlotStatistics {
        let Shape { hidden, vocab, loops, .. } = self.shape;
        let (clock, head) = (self.clock, &self.weights.head);
        let Workspace { states, gates, losses, likeliest, logits, .. } = &mut *workspace;
        let rows = head::Rows { states, targets, hidden, vocab };
        head::cross_entropy(clock, head, &rows, logits, losses, likeliest, None);
        let loss = clock.time(Section::Head, || exit::stage_two(losses, gates, loops));
        self.exit_gate_backward(&loss.dgates, states, gate);
        workspace.of_loops(loss.statistics, &[])
    }

    /// What the model makes of each token, from ids `[N]`.
    pub(crate) fn measures(
        &self,
        [inputs, targets]: [&[u32]; 2],
        workspace: &mut Workspace,
    ) -> TokenMeasures {
        self.cross_entropies([inputs, targets], workspace);
        let Workspace { gates, losses, likeliest, .. } = workspace;
        let hits = likeliest.iter().zip(targets.iter().cycle()).map(|(own, target)| own == target);
        TokenMeasures { losses: losses.clone(), gates: gates.clone(), hits: hits.collect() }
    }

    /// The Stage I loss, without gradients.
    pub(crate) fn statistics(
        &self,
        settings: &StageSettings,
        [inputs, targets]: [&[u32]; 2],
        workspace: &mut Workspace,
    ) -> SlotStatistics {
        self.cross_entropies([inputs, targets], workspace);
        let Workspace { gates, losses, .. } = &*workspace;
        let beta = settings.entropy_weight;
        let loss = exit::stage_one(losses, gates, settings.loops, beta);
        workspace.of_loops(loss.statistics, &[])
    }

    /// Gate logits, cross-entropies and likeliest next tokens of all loops.
    fn cross_entropies(&self, [inputs, targets]: [&[u32]; 2], workspace: &mut Workspace) {
        self.states(inputs, workspace);
        let Workspace { states, losses, likeliest, logits, .. } = workspace;
        let Shape { hidden, vocab, .. } = self.shape;
        let rows = head::Rows { states, targets, hidden, vocab };
        let head = &self.weights.head;
        head::cross_entropy(self.clock, head, &rows, logits, losses, likeliest, None);
    }

    /// Normed states `[R * N, d]` and gate logits `[R * N]` of all loops, without what backward
    /// needs.
    pub(crate) fn states<'w>(
        &self,
        inputs: &[u32],
        workspace: &'w mut Workspace,
    ) -> (&'w [f32], &'w [f32]) {
        let Shape { layers, loops, .. } = self.shape;
        let places = Places { keep: Keep::States, loops, layers };
        workspace.resize(&self.shape, &places, false);
        self.forward(&places, inputs, workspace);
        (&workspace.states, &workspace.gates)
    }

    /// Floats of one loop's states.
    fn loop_len(&self) -> usize {
        self.shape.dims().tokens() * self.shape.hidden
    }

    fn call<'b>(&'b self, dims: &'b Dims, section: Section) -> layer::Call<'b> {
        layer::Call { dims, starts: self.starts, rotary: self.rotary, clock: self.clock, section }
    }

    /// States and gate logits of all loops.
    fn forward(&self, places: &Places, inputs: &[u32], workspace: &mut Workspace) {
        let d = self.shape.hidden;
        let rows = inputs.iter().zip(workspace.embedded.chunks_exact_mut(d));
        rows.for_each(|(&id, row)| {
            let at = id as usize * d;
            row.copy_from_slice(&self.weights.embedding[at..at + d]);
        });
        for r in 0..self.shape.loops {
            self.loop_forward(places, r, workspace, Section::Forward);
        }
    }

    /// One loop, with its final norm and gate.
    fn loop_forward(&self, places: &Places, r: usize, workspace: &mut Workspace, section: Section) {
        let (d, dims, len) = (self.shape.hidden, self.shape.dims(), self.loop_len());
        let size = dims.block();
        let Workspace { embedded, streams, saved, states, inverses, gates, .. } = workspace;
        let call = self.call(&dims, section);
        for (l, layer) in self.weights.layers.iter().enumerate() {
            let (saved, to) = (&mut saved[places.save(r, l)], places.stream(r, l));
            let mut y = std::mem::take(&mut streams[to]);
            let x = input_of(places, len, r, l, embedded, states, streams);
            layer::forward(layer, &call, x, &mut y, saved);
            streams[to] = y;
        }
        let last = &streams[places.stream(r, self.shape.layers - 1)];
        let tokens = dims.tokens();
        let of_loop = r * tokens..(r + 1) * tokens;
        let blocks = (
            last.par_chunks(size * d),
            states[r * len..(r + 1) * len].par_chunks_mut(size * d),
            inverses[of_loop.clone()].par_chunks_mut(size),
            gates[of_loop].par_chunks_mut(size),
        );
        blocks.into_par_iter().for_each(|(x, states, inverses, gates)| {
            self.clock.time(section, || {
                let rows = x.chunks_exact(d).zip(states.chunks_exact_mut(d));
                for ((x, state), (inverse, gate)) in rows.zip(inverses.iter_mut().zip(gates)) {
                    *inverse = simd::rms_norm(x, &self.weights.norm, None, state, dims.eps);
                    *gate = simd::dot(state, &self.weights.exit_weight) + self.weights.exit_bias;
                }
            });
        });
    }

    /// Gradients of the exit gate's weight and bias.
    fn exit_gate_backward(
        &self,
        dgates: &[f32],
        states: &[f32],
        [exit_weight, exit_bias]: [&mut [f32]; 2],
    ) {
        let (d, size) = (self.shape.hidden, self.shape.dims().block());
        let blocks = states.par_chunks(size * d).zip(dgates.par_chunks(size));
        let partial: Vec<(Vec<f32>, f32)> = blocks
            .map(|(states, dgates)| {
                self.clock.time(Section::Head, || {
                    let (mut dweight, mut dbias) = (vec![0.0; d], 0.0);
                    for (state, &dgate) in states.chunks_exact(d).zip(dgates) {
                        simd::add_scaled(&mut dweight, state, dgate);
                        dbias += dgate;
                    }
                    (dweight, dbias)
                })
            })
            .collect();
        for (dweight, dbias) in &partial {
            simd::add(exit_weight, dweight);
            exit_bias[0] += dbias;
        }
    }

    /// Adds the exit gate's part to the gradient of the states.
    fn exit_gate_input_backward(&self, dgates: &[f32], dstates: &mut [f32]) {
        let (d, size) = (self.shape.hidden, self.shape.dims().block());
        let blocks = dstates.par_chunks_mut(size * d).zip(dgates.par_chunks(size));
        blocks.for_each(|(dstates, dgates)| {
            self.clock.time(Section::Head, || {
                for (dstate, &dgate) in dstates.chunks_exact_mut(d).zip(dgates) {
                    simd::add_scaled(dstate, &self.weights.exit_weight, dgate);
                }
            });
        });
    }

    /// Takes the gradient of the stream from loop `r`'s state to before its final norm; the sum of the
    /// squares of that of the state.
    fn final_norm_backward(
        &self,
        places: &Places,
        r: usize,
        workspace: &mut Workspace,
        dnorm: &mut [f32],
    ) -> f64 {
        let (d, len) = (self.shape.hidden, self.loop_len());
        let size = self.shape.dims().block();
        let Workspace { streams, dstates, stream_gradient, inverses, .. } = workspace;
        let tokens = len / d;
        let x = &mut streams[places.stream(r, self.shape.layers - 1)];
        let partial: Vec<(Vec<f32>, f64)> = (
            x.par_chunks_mut(size * d),
            stream_gradient.par_chunks_mut(size * d),
            dstates[r * len..(r + 1) * len].par_chunks(size * d),
            inverses[r * tokens..(r + 1) * tokens].par_chunks(size),
        )
            .into_par_iter()
            .map(|(x, gradient, dstate, inverses)| {
                self.clock.time(Section::Backward, || {
                    let (mut dnorm, mut squares) = (vec![0.0; d], 0.0);
                    simd::add(gradient, dstate);
                    let rows = x.chunks_exact_mut(d).zip(gradient.chunks_exact_mut(d));
                    for ((x, gradient), &inverse) in rows.zip(inverses) {
                        let weight = &self.weights.norm;
                        squares += f64::from(simd::dot(gradient, gradient));
                        simd::rms_norm_backward(x, weight, inverse, gradient, &mut dnorm);
                        gradient.copy_from_slice(x);
                    }
                    (dnorm, squares)
                })
            })
            .collect();
        partial.iter().for_each(|(part, _)| simd::add(dnorm, part));
        partial.iter().map(|(_, squares)| squares).sum()
    }
}

/// The input of layer `l` of loop `r`.
fn input_of<'a>(
    places: &Places,
    len: usize,
    r: usize,
    l: usize,
    embedded: &'a [f32],
    states: &'a [f32],
    streams: &'a [Vec<f32>],
) -> &'a [f32] {
    match (r, l) {
        (0, 0) => embedded,
        (_, 0) => &states[(r - 1) * len..r * len],
        _ => &streams[places.stream(r, l - 1)],
    }
}
