//! LoopLM in plain Burn operations, for any Burn device, with gradients by Burn's autodiff: the model
//! as it reads in a paper. It is what the kernels of [`cpu`](crate::cpu) are compared with, in tests
//! and in `bench step --kernels composite`.
//!
//! One stack of Transformer layers, applied R times with shared weights:
//!
//! ```text
//! h = E[token]
//! repeat R times:
//!     for each layer:
//!         h = h + N(O attention(Q N(h), K N(h), V N(h)))      sandwich norms: before and after
//!         h = h + N(Down (silu(Gate N(h)) * (Up N(h))))
//!     h = N(h)                    the final norm stands inside the loop: its output feeds the
//!     logits = Head h             head, the gate and the next loop
//!     g = w h + b
//! ```
//!
//! (Ouro, arXiv 2510.25741, and the code published with its weights.) Tokens of all sequences of a
//! batch are rows `[B * T, d]`; only attention looks at `[B, T, d]`.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Int, Tensor, TensorData};
use looptrain_proto::spec;

use crate::exit::{exit_shares, stage_one};
use crate::{Layout, SlotBatch, SlotOutput, StageSettings};

pub(crate) mod ops;

/// One layer of the shared stack; fields are in the order of [`Layout`].
#[derive(Module, Debug)]
pub struct Layer {
    input_norm: Param<Tensor<1>>,
    query: Param<Tensor<2>>,
    key: Param<Tensor<2>>,
    value: Param<Tensor<2>>,
    output: Param<Tensor<2>>,
    attention_norm: Param<Tensor<1>>,
    mlp_norm: Param<Tensor<1>>,
    gate: Param<Tensor<2>>,
    up: Param<Tensor<2>>,
    down: Param<Tensor<2>>,
    output_norm: Param<Tensor<1>>,
}

/// The model; fields are in the order of [`Layout`].
#[derive(Module, Debug)]
pub struct LoopLm {
    embedding: Param<Tensor<2>>,
    layers: Vec<Layer>,
    norm: Param<Tensor<1>>,
    exit_weight: Param<Tensor<2>>,
    exit_bias: Param<Tensor<1>>,
    head: Param<Tensor<2>>,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    eps: f32,
}

/// What one loop gives.
#[derive(Clone, Debug)]
pub struct LoopOutput {
    /// Normed state, `[B * T, d]`: input of the head, the gate and the next loop.
    pub hidden: Tensor<2>,
    /// Gate logits, `[B * T]`.
    pub gate: Tensor<1>,
}

/// Cosines and sines of the rotary angles, `[T, head_dim / 2]`.
#[derive(Clone, Debug)]
pub struct Rotary {
    pub(crate) cos: Tensor<2>,
    pub(crate) sin: Tensor<2>,
}

impl Rotary {
    /// Angles `position * base^(-2 i / head_dim)`, taken in double precision.
    #[must_use]
    pub fn new(length: usize, head_dim: usize, base: f64, device: &Device) -> Self {
        let half = head_dim / 2;
        let table = |f: fn(f64) -> f64| {
            let mut values = Vec::with_capacity(length * half);
            for position in 0..length {
                for i in 0..half {
                    let frequency = base.powf(-2.0 * i as f64 / head_dim as f64);
                    values.push(f(position as f64 * frequency) as f32);
                }
            }
            Tensor::from_data(TensorData::new(values, [length, half]), device)
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }
}

/// Hands out the tensors of a flat buffer in layout order.
struct Reader<'a> {
    layout: &'a Layout,
    weights: &'a [f32],
    next: usize,
    device: &'a Device,
}

impl Reader<'_> {
    fn take<const D: usize>(&mut self) -> Param<Tensor<D>> {
        let entry = &self.layout.tensors()[self.next];
        self.next += 1;
        let shape: [usize; D] =
            entry.shape.clone().try_into().expect("fields have the ranks of the layout");
        let data = TensorData::new(self.weights[entry.range()].to_vec(), shape);
        Param::initialized(ParamId::new(), Tensor::from_data(data, self.device))
    }

    fn layer(&mut self) -> Layer {
        Layer {
            input_norm: self.take(),
            query: self.take(),
            key: self.take(),
            value: self.take(),
            output: self.take(),
            attention_norm: self.take(),
            mlp_norm: self.take(),
            gate: self.take(),
            up: self.take(),
            down: self.take(),
            output_norm: self.take(),
        }
    }
}

impl Layer {
    /// `h [B * T, d]` -> the same shape.
    fn forward(
        &self,
        h: Tensor<2>,
        batch: usize,
        heads: usize,
        rotary: &Rotary,
        starts: &[u32],
        eps: f32,
    ) -> Tensor<2> {
        let [rows, d] = h.dims();
        let normed = ops::rms_norm(h.clone(), self.input_norm.val(), eps);
        let project = |weight: &Param<Tensor<2>>| {
            ops::linear(normed.clone(), weight.val()).reshape([batch, rows / batch, d])
        };
        let (q, k, v) = (project(&self.query), project(&self.key), project(&self.value));
        let (cos, sin) = (rotary.cos.clone(), rotary.sin.clone());
        let mixed = ops::attention(q, k, v, cos, sin, starts, heads);
        let branch = ops::linear(mixed.reshape([rows, d]), self.output.val());
        let h = ops::rms_norm_add(branch, self.attention_norm.val(), h, eps);

        let normed = ops::rms_norm(h.clone(), self.mlp_norm.val(), eps);
        let gate = ops::linear(normed.clone(), self.gate.val());
        let up = ops::linear(normed, self.up.val());
        let branch = ops::linear(ops::swiglu(gate, up), self.down.val());
        ops::rms_norm_add(branch, self.output_norm.val(), h, eps)
    }
}

impl LoopLm {
    /// The model with the weights of a flat buffer in [`Layout`] order, on `device`.
    ///
    /// # Panics
    /// If the buffer is shorter than the layout says.
    #[must_use]
    pub fn new(model: &spec::Model, layout: &Layout, weights: &[f32], device: &Device) -> Self {
        let mut reader = Reader { layout, weights, next: 0, device };
        Self {
            embedding: reader.take(),
            layers: (0..model.num_hidden_layers).map(|_| reader.layer()).collect(),
            norm: reader.take(),
            exit_weight: reader.take(),
            exit_bias: reader.take(),
            head: reader.take(),
            heads: model.num_attention_heads,
            eps: model.rms_norm_eps as f32,
        }
    }

    /// A copy whose parameters are fresh leaves of a gradient graph; the values are shared.
    #[must_use]
    pub fn with_gradients(&self) -> Self {
        struct Leaves;
        impl ModuleMapper for Leaves {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let (id, tensor, mapper) = param.consume();
                Param::from_mapped_value(id, tensor.autodiff().require_grad(), mapper)
            }
        }
        self.clone().map(&mut Leaves)
    }

    /// All loops' states and gate logits for `ids [B * T]`, sequence after sequence; `starts` as in
    /// [`SlotBatch`].
    #[must_use]
    pub fn forward(
        &self,
        ids: Tensor<1, Int>,
        batch: usize,
        loops: usize,
        rotary: &Rotary,
        starts: &[u32],
    ) -> Vec<LoopOutput> {
        let mut h = ops::embedding(self.embedding.val(), ids);
        let mut outputs = Vec::with_capacity(loops);
        for _ in 0..loops {
            for layer in 0..self.layers.len() {
                h = self.layer(layer, h, batch, rotary, starts);
            }
            h = ops::rms_norm(h, self.norm.val(), self.eps);
            let gate = ops::linear(h.clone(), self.exit_weight.val()).squeeze_dim::<1>(1);
            outputs.push(LoopOutput { hidden: h.clone(), gate: gate + self.exit_bias.val() });
        }
        outputs
    }

    /// One layer of the stack: `h [B * T, d]` -> the same shape.
    #[must_use]
    pub fn layer(
        &self,
        layer: usize,
        h: Tensor<2>,
        batch: usize,
        rotary: &Rotary,
        starts: &[u32],
    ) -> Tensor<2> {
        self.layers[layer].forward(h, batch, self.heads, rotary, starts, self.eps)
    }

    /// Next-token cross-entropy of each row of a loop's state: `[B * T]`, in nats.
    #[must_use]
    pub fn cross_entropy(&self, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
        ops::cross_entropy(hidden, self.head.val(), targets)
    }

    /// Logits of rows of a loop's state, `[N, d]` -> `[N, vocab]`.
    #[must_use]
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        ops::linear(hidden, self.head.val())
    }

    /// The gradients of one backward pass as a flat buffer in [`Layout`] order; parameters that the
    /// loss does not reach have zeros.
    #[must_use]
    pub fn flat_gradients(&self, layout: &Layout, grads: &mut burn::tensor::Gradients) -> Vec<f32> {
        struct Writer<'a> {
            flat: Vec<f32>,
            layout: &'a Layout,
            next: usize,
            grads: &'a mut burn::tensor::Gradients,
        }
        impl ModuleVisitor for Writer<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let entry = &self.layout.tensors()[self.next];
                self.next += 1;
                if let Some(grad) = param.val().grad_remove(self.grads) {
                    self.flat[entry.range()].copy_from_slice(&floats(grad));
                }
            }
        }
        let flat = vec![0.0; layout.parameters()];
        let mut writer = Writer { flat, layout, next: 0, grads };
        self.visit(&mut writer);
        writer.flat
    }
}

/// Gradient and statistics of one slot, as [`Engine::gradients`](crate::Engine::gradients) gives them,
/// for the weights of a flat buffer in [`Layout`] order: forward with the graph, loss and its
/// gradients in closed form, then backward from those.
///
/// # Panics
/// If the buffer is shorter than the layout says.
#[must_use]
pub fn gradient(
    model: &spec::Model,
    weights: &[f32],
    settings: &StageSettings,
    batch: &SlotBatch,
    device: &Device,
) -> SlotOutput {
    let (layout, loops) = (Layout::new(model), settings.loops);
    let lm = LoopLm::new(model, &layout, weights, device).with_gradients();
    let (length, base) = (batch.sequence_length, settings.rope_base);
    let rotary = Rotary::new(length, model.head_dim(), base, device);
    let [inputs, targets] = batch.ids().map(|ids| {
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        let count = ids.len();
        Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), device)
    });
    let outputs = lm.forward(inputs, batch.sequences, loops, &rotary, &batch.starts);
    let cross_entropy =
        |output: &LoopOutput| lm.cross_entropy(output.hidden.clone(), targets.clone());
    let losses = Tensor::cat(outputs.iter().map(cross_entropy).collect(), 0);
    let gates = Tensor::cat(outputs.into_iter().map(|output| output.gate).collect(), 0);
    let gate_values = floats(gates.clone().inner());
    let shares = exit_shares(&gate_values, loops);
    let loss_values = floats(losses.clone().inner());
    let stage = stage_one(&loss_values, &gate_values, loops, settings.entropy_weight);

    // A scalar whose gradients with respect to losses and gates are the closed forms.
    let seeded = |tensor: Tensor<1>, gradient: Vec<f32>| {
        let count = gradient.len();
        (tensor * Tensor::from_data(TensorData::new(gradient, [count]), device)).sum()
    };
    let root = seeded(losses, shares) + seeded(gates, stage.dgates);
    let mut grads = root.backward();
    let gradient = lm.flat_gradients(&layout, &mut grads);
    SlotOutput { gradient, statistics: stage.statistics }
}

/// The values of a float tensor, in row-major order.
fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().expect("the model computes in f32")
}
