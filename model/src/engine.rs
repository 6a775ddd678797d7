//! Slots in, gradients out: the model on the threads of one worker.
//!
//! Each thread takes a slot; where there are fewer slots than threads, or at the end of a step, threads
//! share the parts of one. A slot's bits depend neither on who computes its parts (the kernels see to
//! that) nor on the other slots or their order.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use looptrain_proto::spec::{self, Objective};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::batch::assert_starts;
use crate::cpu::{Cache, CacheSharing, Clock, Rotary, Section, Shape, Task, Weights, Workspace};
use crate::generate::Decoder;
use crate::{Layout, SlotBatch, SlotStatistics, TrainState, optimizer};

/// Gradients of slots that are kept as memory for the next ones, beyond one for each thread.
const SPARE_BYTES: usize = 512 << 20;

/// The settings of a stage that shape the computation of a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StageSettings {
    /// Times the stack is applied, R.
    pub loops: usize,
    /// Weight of the exit distribution's entropy, beta.
    pub entropy_weight: f64,
    /// Base of the rotary embedding, theta.
    pub rope_base: f64,
    /// What is trained, and by which loss.
    pub objective: Objective,
}

impl From<&spec::Stage> for StageSettings {
    fn from(stage: &spec::Stage) -> Self {
        Self {
            loops: stage.loops,
            entropy_weight: stage.entropy_weight,
            rope_base: stage.rope_base,
            objective: stage.objective,
        }
    }
}

/// What backward computes again instead of keeping it. The bits are the same for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: activations of all layers in all loops are kept.
    #[default]
    None,
    /// A loop at a time: the states between loops are kept, and the activations of one loop.
    Loop,
    /// A layer at a time, in a loop that is computed again for the inputs of its layers: the states
    /// between loops are kept, those inputs, and the activations of one layer.
    Layer,
}

/// What the computation of one slot gives.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotOutput {
    /// Gradient of the slot's mean loss by what is trained, flat, in [`Layout`] order.
    pub gradient: Vec<f32>,
    /// Means over the slot's tokens.
    pub statistics: SlotStatistics,
}

/// What the model makes of N tokens in each of R loops: `[R * N]`, loop after loop.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenMeasures {
    /// Cross-entropy of the target, in nats.
    pub losses: Vec<f32>,
    /// Gate logits.
    pub gates: Vec<f32>,
    /// Whether no token has a larger logit than the target.
    pub hits: Vec<bool>,
}

/// The model, its weights and the worker's threads.
pub struct Engine {
    model: spec::Model,
    layout: Layout,
    threads: usize,
    recompute: Recompute,
    pool: ThreadPool,
    weights: Option<Weights>,
    /// Memory of slots, for the next ones.
    workspaces: Mutex<Vec<Workspace>>,
    gradients: Mutex<Vec<Vec<f32>>>,
    clock: Clock,
}

impl Engine {
    /// An engine on `threads` threads of this machine; weights come with [`Engine::load`].
    ///
    /// # Panics
    /// If the system cannot start the threads.
    #[must_use]
    pub fn new(model: &spec::Model, threads: usize) -> Self {
        let threads = threads.max(1);
        Self {
            model: model.clone(),
            layout: Layout::new(model),
            threads,
            recompute: Recompute::None,
            pool: ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|thread| format!("engine-{thread}"))
                .build()
                .expect("the system can start the worker's threads"),
            weights: None,
            workspaces: Mutex::default(),
            gradients: Mutex::default(),
            clock: Clock::default(),
        }
    }

    /// Threads that it computes on.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// What backward computes again from now on.
    pub fn set_recompute(&mut self, recompute: Recompute) {
        self.recompute = recompute;
    }

    /// Bytes that a slot takes while it is under way: activations and its gradient.
    #[must_use]
    pub fn slot_bytes(
        model: &spec::Model,
        settings: &StageSettings,
        sequences: usize,
        sequence_length: usize,
        recompute: Recompute,
    ) -> u64 {
        let shape = shape_of(model, settings, sequences, sequence_length);
        Workspace::bytes(&shape, recompute, settings.objective)
            + (size_of::<f32>() * Layout::new(model).trained(settings.objective).len()) as u64
    }

    /// The table of the model's tensors.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Takes a copy of flat weights for the calls that follow.
    ///
    /// # Panics
    /// If the buffer is shorter than the layout.
    pub fn load(&mut self, weights: &[f32]) {
        let (layout, layers) = (&self.layout, self.model.num_hidden_layers);
        let into = self.weights.get_or_insert_with(|| Weights::new(layout, layers, true));
        let clock = &self.clock;
        self.pool.install(|| clock.time_pool(Section::Pack, || into.fill(layout, weights)));
    }

    /// Takes one tensor, by its index in [`Layout::tensors`], for evaluation and decoding: an engine
    /// whose weights come this way takes half the memory, and computes no gradients.
    ///
    /// # Panics
    /// If there is no such tensor, or it has another size.
    pub fn load_tensor(&mut self, index: usize, values: &[f32]) {
        let (layout, layers) = (&self.layout, self.model.num_hidden_layers);
        let into = self.weights.get_or_insert_with(|| Weights::new(layout, layers, false));
        self.pool.install(|| into.fill_one(index, values));
    }

    /// The time that went into each section since the last call, added up over threads.
    #[must_use]
    pub fn take_sections(&self) -> Vec<(&'static str, Duration)> {
        self.clock.take()
    }

    /// Computes the gradient of each slot and hands it to `on_slot` with the slot's index, from
    /// any thread and in any order. Blocks until all slots are done, or returns early, without the
    /// slots not yet begun, once `cancelled` is set.
    ///
    /// # Panics
    /// If no weights are loaded.
    pub fn gradients(
        &self,
        settings: &StageSettings,
        batches: &[SlotBatch],
        cancelled: &AtomicBool,
        on_slot: &(dyn Fn(usize, SlotOutput) + Sync),
    ) {
        self.gradients_as_final(settings, batches, cancelled, &|_, _, _| {}, on_slot);
    }

    /// The same; while a slot is under way, `on_final` is called with its index, its gradient and
    /// the first of the elements that are final, whenever there are more of them. They grow from the
    /// end of the gradient to its beginning; the last of them come with `on_slot`.
    ///
    /// # Panics
    /// If no weights are loaded.
    pub fn gradients_as_final(
        &self,
        settings: &StageSettings,
        batches: &[SlotBatch],
        cancelled: &AtomicBool,
        on_final: &(dyn Fn(usize, &[f32], usize) + Sync),
        on_slot: &(dyn Fn(usize, SlotOutput) + Sync),
    ) {
        self.for_each(batches.len(), cancelled, &|slot| {
            let on_final = |gradient: &[f32], from| on_final(slot, gradient, from);
            on_slot(slot, self.slot(settings, &batches[slot], &on_final));
        });
    }

    /// Computes the loss of each batch, without gradients; in the order of `batches`. Batches not
    /// begun when `cancelled` is set have default statistics.
    ///
    /// # Panics
    /// If no weights are loaded.
    #[must_use]
    pub fn evaluate(
        &self,
        settings: &StageSettings,
        batches: &[SlotBatch],
        cancelled: &AtomicBool,
    ) -> Vec<SlotStatistics> {
        let results = Mutex::new(vec![SlotStatistics::default(); batches.len()]);
        self.for_each(batches.len(), cancelled, &|index| {
            let batch = &batches[index];
            let [inputs, targets] = batch.ids();
            let size = [batch.sequences, batch.sequence_length];
            let statistics = self.with_task(settings, size, &batch.starts, |task, workspace| {
                task.statistics(settings, [&inputs, &targets], workspace)
            });
            results.lock().unwrap_or_else(PoisonError::into_inner)[index] = statistics;
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the model makes of each token of some sequences, on all threads. Ids `[N]` of inputs and
    /// targets, sequence after sequence; `starts` as in [`SlotBatch`].
    ///
    /// # Panics
    /// If no weights are loaded, an id is outside the vocabulary, or the sequences do not divide the
    /// tokens.
    #[must_use]
    pub fn measure_tokens(
        &self,
        settings: &StageSettings,
        inputs: &[u32],
        targets: &[u32],
        starts: &[u32],
        sequences: usize,
    ) -> TokenMeasures {
        assert_eq!(inputs.len(), targets.len(), "an input has a target");
        assert!(inputs.len().is_multiple_of(sequences), "sequences are equally long");
        let size = [sequences, inputs.len() / sequences];
        self.with_task(settings, size, starts, |task, workspace| {
            self.pool.install(|| task.measures([inputs, targets], workspace))
        })
    }

    /// Begins the decoding of a sequence of up to `capacity` tokens, with a cache of keys and values.
    ///
    /// # Panics
    /// If no weights are loaded.
    #[must_use]
    pub fn decoder(
        &self,
        settings: &StageSettings,
        capacity: usize,
        sharing: CacheSharing,
    ) -> Decoder<'_> {
        let shape = shape_of(&self.model, settings, 1, capacity);
        let cache = Cache::new(shape, capacity, settings.rope_base, sharing);
        Decoder { weights: self.loaded(), pool: &self.pool, cache }
    }

    /// Normed states of each token, loop after loop: `[R * N, d]`, from ids `[N]` of one sequence.
    ///
    /// # Panics
    /// If no weights are loaded, or an id is outside the vocabulary.
    #[must_use]
    pub fn states(&self, settings: &StageSettings, ids: &[u32]) -> Vec<f32> {
        self.with_task(settings, [1, ids.len()], &[], |task, workspace| {
            self.pool.install(|| task.states(ids, workspace).0.to_vec())
        })
    }

    /// Logits of rows of states: `[rows, d]` -> `[rows, vocab]`.
    ///
    /// # Panics
    /// If no weights are loaded.
    #[must_use]
    pub fn logits(&self, states: &[f32]) -> Vec<f32> {
        self.loaded().logits(states)
    }

    /// Clips the gradient and applies AdamW in place to what the objective trains, advancing the state
    /// by one step; returns the gradient's norm before clipping. To be followed by [`Engine::load`].
    pub fn update(
        &self,
        state: &mut TrainState,
        gradient: &[f32],
        settings: &spec::Optimizer,
        objective: Objective,
        learning_rate: f64,
    ) -> f64 {
        self.pool.install(|| {
            self.clock.time_pool(Section::Update, || {
                let layout = &self.layout;
                optimizer::update(layout, state, gradient, settings, objective, learning_rate)
            })
        })
    }

    /// Runs something else in the pool of all threads.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.pool.install(work)
    }

    /// Euclidean norm of a flat gradient, as [`Engine::update`] takes it.
    #[must_use]
    pub fn norm(&self, gradient: &[f32]) -> f64 {
        self.pool.install(|| optimizer::global_norm(gradient))
    }

    /// Takes back the gradient of a slot that nobody reads any more, as memory for the next ones.
    pub fn recycle(&self, gradient: Vec<f32>) {
        let mut spare = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = (spare.len() + 1) * gradient.capacity() * size_of::<f32>();
        if spare.len() < self.threads || bytes <= SPARE_BYTES {
            spare.push(gradient);
        }
    }

    fn loaded(&self) -> &Weights {
        self.weights.as_ref().expect("weights are loaded before anything is computed")
    }

    /// Calls `work` with what a slot of that size needs.
    fn with_task<R>(
        &self,
        settings: &StageSettings,
        [sequences, sequence_length]: [usize; 2],
        starts: &[u32],
        work: impl FnOnce(&Task<'_>, &mut Workspace) -> R,
    ) -> R {
        assert_starts(starts, sequences * sequence_length, sequence_length);
        let rotary = Rotary::new(sequence_length, self.model.head_dim(), settings.rope_base);
        let task = Task {
            weights: self.loaded(),
            layout: &self.layout,
            shape: shape_of(&self.model, settings, sequences, sequence_length),
            starts,
            rotary: &rotary,
            clock: &self.clock,
        };
        let spare = || self.workspaces.lock().unwrap_or_else(PoisonError::into_inner);
        let mut workspace = spare().pop().unwrap_or_default();
        let result = work(&task, &mut workspace);
        spare().push(workspace);
        result
    }

    fn slot(
        &self,
        settings: &StageSettings,
        batch: &SlotBatch,
        on_final: &dyn Fn(&[f32], usize),
    ) -> SlotOutput {
        let SlotBatch { sequences, sequence_length, .. } = *batch;
        let elements = self.layout.trained(settings.objective).len();
        let spare = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // That of a stage which trains more is of no use.
        let mut gradient = spare.filter(|it| it.capacity() <= 2 * elements).unwrap_or_default();
        gradient.clear();
        gradient.resize(elements, 0.0);
        let size = [sequences, sequence_length];
        let statistics = self.with_task(settings, size, &batch.starts, |task, workspace| {
            task.gradient(settings, batch, self.recompute, workspace, &mut gradient, on_final)
        });
        SlotOutput { gradient, statistics }
    }

    /// Runs `work(0..count)`, as many at a time as there are threads. Threads that find nothing left to
    /// begin help those that are under way.
    fn for_each(&self, count: usize, cancelled: &AtomicBool, work: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        // Not as tasks of the pool: a thread that waits for parts of its own piece takes parts of
        // others meanwhile, but must not begin another piece.
        self.pool.broadcast(|_| {
            while !cancelled.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                work(index);
            }
        });
    }
}

fn shape_of(
    model: &spec::Model,
    settings: &StageSettings,
    sequences: usize,
    sequence_length: usize,
) -> Shape {
    Shape {
        sequences,
        length: sequence_length,
        heads: model.num_attention_heads,
        hidden: model.hidden_size,
        inner: model.intermediate_size,
        vocab: model.vocab_size,
        layers: model.num_hidden_layers,
        loops: settings.loops,
        eps: model.rms_norm_eps as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> spec::Model {
        spec::Model {
            hidden_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            intermediate_size: 40,
            vocab_size: 53,
            rms_norm_eps: 1e-6,
            initializer_range: 0.05,
        }
    }

    fn batches(count: usize, sequences: usize, sequence_length: usize) -> Vec<SlotBatch> {
        let tokens = |slot: usize| {
            let count = sequences * (sequence_length + 1);
            (0..count).map(|i| ((slot * 31 + i * 7 + i * i) % 53) as u32).collect()
        };
        (0..count)
            .map(|slot| SlotBatch {
                tokens: tokens(slot),
                sequences,
                sequence_length,
                ..SlotBatch::default()
            })
            .collect()
    }

    const SETTINGS: StageSettings = StageSettings {
        loops: 3,
        entropy_weight: 0.05,
        rope_base: 1e4,
        objective: Objective::Language,
    };

    fn gradients(threads: usize, batches: &[SlotBatch]) -> Vec<SlotOutput> {
        gradients_of(&model(), threads, batches)
    }

    fn gradients_of(model: &spec::Model, threads: usize, batches: &[SlotBatch]) -> Vec<SlotOutput> {
        let mut engine = Engine::new(model, threads);
        engine.load(&TrainState::initial(model, 3).weights);
        let found = Mutex::new(vec![None; batches.len()]);
        engine.gradients(&SETTINGS, batches, &AtomicBool::new(false), &|slot, output| {
            found.lock().unwrap()[slot] = Some(output);
        });
        found.into_inner().unwrap().into_iter().map(|output| output.unwrap()).collect()
    }

    #[test]
    fn a_slot_has_the_same_bits_for_any_threads_and_neighbours() {
        // 140 tokens: more than one block and several tiles of attention; products that are longer
        // than one block of the inner dimension, weights of more than one strip.
        let slots = batches(3, 2, 70);
        let wide = spec::Model {
            hidden_size: 96,
            intermediate_size: 1100,
            vocab_size: 700,
            num_hidden_layers: 1,
            ..model()
        };
        let alone = gradients_of(&wide, 1, &slots[1..2]);
        for threads in [1, 2, 3, 4, 8] {
            let (among, by_itself) =
                (gradients_of(&wide, threads, &slots), gradients_of(&wide, threads, &slots[1..2]));
            assert!(among[1] == alone[0], "{threads} threads");
            assert!(by_itself[0] == alone[0], "{threads} threads, alone");
        }
    }

    #[test]
    fn what_is_said_to_be_final_is_what_the_gradient_has_in_the_end() {
        let slots = batches(3, 2, 9);
        for recompute in [Recompute::None, Recompute::Loop, Recompute::Layer] {
            let mut engine = Engine::new(&model(), 2);
            engine.set_recompute(recompute);
            engine.load(&TrainState::initial(&model(), 3).weights);
            let said = Mutex::new(vec![Vec::new(); 3]);
            let found = Mutex::new(vec![None; 3]);
            engine.gradients_as_final(
                &SETTINGS,
                &slots,
                &AtomicBool::new(false),
                &|slot, gradient, from| {
                    said.lock().unwrap()[slot].push((from, gradient[from..].to_vec()));
                },
                &|slot, output| found.lock().unwrap()[slot] = Some(output),
            );
            let layout = Layout::new(&model());
            let offset = |name: &str| {
                layout.tensors().iter().find(|tensor| tensor.name == name).unwrap().offset
            };
            let expected = [
                offset("model.early_exit_gate.weight"),
                offset("model.layers.1.input_layernorm.weight"),
                offset("model.layers.0.input_layernorm.weight"),
            ];
            for (said, found) in said.into_inner().unwrap().iter().zip(found.into_inner().unwrap())
            {
                let gradient = found.unwrap().gradient;
                let firsts: Vec<usize> = said.iter().map(|(from, _)| *from).collect();
                assert_eq!(firsts, expected, "{recompute:?}");
                assert!(said.iter().all(|(from, part)| gradient[*from..] == part[..]));
            }
        }
    }

    #[test]
    fn an_evaluation_has_the_loss_of_the_forward_pass() {
        let slots = batches(2, 2, 9);
        let mut engine = Engine::new(&model(), 2);
        engine.load(&TrainState::initial(&model(), 3).weights);
        let found = engine.evaluate(&SETTINGS, &slots, &AtomicBool::new(false));
        let without_gradient = |statistics: SlotStatistics| {
            assert!(statistics.gradient_norm_per_loop.iter().all(|norm| *norm > 0.0));
            SlotStatistics { gradient_norm_per_loop: vec![0.0; SETTINGS.loops], ..statistics }
        };
        let trained = gradients(1, &slots).into_iter().map(|o| without_gradient(o.statistics));
        assert_eq!(found, trained.collect::<Vec<_>>());
    }

    #[test]
    fn a_cancelled_engine_begins_no_slot() {
        let mut engine = Engine::new(&model(), 2);
        engine.load(&TrainState::initial(&model(), 3).weights);
        let slots = batches(4, 1, 5);
        engine.gradients(&SETTINGS, &slots, &AtomicBool::new(true), &|_, _| {
            panic!("a slot was computed");
        });
    }

    #[test]
    fn every_tensor_has_a_gradient() {
        let output = gradients(1, &batches(1, 2, 9)).remove(0);
        let layout = Layout::new(&model());
        for tensor in layout.tensors() {
            let values = &output.gradient[tensor.range()];
            assert!(values.iter().any(|&g| g != 0.0), "{} has no gradient", tensor.name);
        }
    }

    #[test]
    fn a_few_updates_on_one_batch_lower_its_loss() {
        let slots = batches(1, 2, 9);
        let mut engine = Engine::new(&model(), 1);
        let mut state = TrainState::initial(&model(), 3);
        let mut losses = Vec::new();
        for _ in 0..12 {
            engine.load(&state.weights);
            let found = Mutex::new(None);
            engine.gradients(&SETTINGS, &slots, &AtomicBool::new(false), &|_, output| {
                *found.lock().unwrap() = Some(output);
            });
            let output = found.into_inner().unwrap().unwrap();
            losses.push(output.statistics.loss);
            engine.update(
                &mut state,
                &output.gradient,
                &spec::Optimizer::default(),
                Objective::Language,
                1e-2,
            );
        }
        assert_eq!(state.step.0, 12);
        assert!(losses[11] < losses[0] - 1.0, "{losses:?}");
    }
}
