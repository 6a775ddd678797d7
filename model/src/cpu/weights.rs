//! The weights in the form that the products read, made once per step and used by every slot, loop
//! and direction of it.

use rayon::prelude::*;

use super::product::{Left, PANEL, Right, Shape, pack_rows, pack_transposed, panels_len, product};
use crate::{Layout, TensorEntry};

/// A weight `[out, in]` in panels for both directions.
pub(super) struct Matrix {
    outputs: usize,
    inputs: usize,
    /// Panels of the transpose, `[in, out]`: what forward multiplies with.
    forward: Vec<f32>,
    /// Panels of the weight itself, `[out, in]`: what the input's gradient comes from; none where
    /// nothing goes backward.
    backward: Vec<f32>,
}

/// Columns per task.
const COLUMNS: usize = 8 * PANEL;

impl Matrix {
    fn new(outputs: usize, inputs: usize, backward: bool) -> Self {
        let backward = if backward { panels_len(outputs, inputs) } else { 0 };
        Self {
            outputs,
            inputs,
            forward: vec![0.0; panels_len(inputs, outputs)],
            backward: vec![0.0; backward],
        }
    }

    fn fill(&mut self, weight: &[f32]) {
        let (m, k) = (self.outputs, self.inputs);
        assert_eq!(weight.len(), m * k, "a weight has the size of its matrix");
        let forward = self.forward.par_chunks_mut(panels_len(k, COLUMNS));
        forward.enumerate().for_each(|(task, panels)| {
            let first = task * COLUMNS;
            pack_transposed(&weight[first * k..], k, k, COLUMNS.min(m - first), panels);
        });
        let backward = self.backward.par_chunks_mut(panels_len(m, COLUMNS));
        backward.enumerate().for_each(|(task, panels)| {
            let first = task * COLUMNS;
            pack_rows(&weight[first..], k, m, COLUMNS.min(k - first), panels);
        });
    }

    /// `out [rows, outputs] = x [rows, inputs] weight^T`; rows of `out` are `stride` elements apart.
    pub(super) fn apply(&self, rows: usize, x: &[f32], out: &mut [f32], stride: usize) {
        let shape = Shape { m: rows, n: self.outputs, k: self.inputs };
        let x = Left::rows(x, self.inputs);
        product(shape, out, stride, false, x, Right::Panels(&self.forward));
    }

    /// As [`Matrix::apply`], and the same bits; the columns of a single row are shared out over the
    /// threads.
    pub(super) fn apply_shared(&self, rows: usize, x: &[f32], out: &mut [f32], stride: usize) {
        if rows != 1 {
            return self.apply(rows, x, out, stride);
        }
        let panels = self.forward.par_chunks(panels_len(self.inputs, COLUMNS));
        let columns = out[..self.outputs].par_chunks_mut(COLUMNS);
        columns.zip(panels).for_each(|(out, panels)| {
            let shape = Shape { m: 1, n: out.len(), k: self.inputs };
            let x = Left::rows(x, self.inputs);
            product(shape, out, out.len(), false, x, Right::Panels(panels));
        });
    }

    /// `dx [rows, inputs] = dy [rows, outputs] weight`, or added to it; rows of `dy` are `stride`
    /// elements apart.
    pub(super) fn apply_backward(
        &self,
        rows: usize,
        dy: &[f32],
        stride: usize,
        dx: &mut [f32],
        add: bool,
    ) {
        let shape = Shape { m: rows, n: self.inputs, k: self.outputs };
        let dy = Left::rows(dy, stride);
        product(shape, dx, self.inputs, add, dy, Right::Panels(&self.backward));
    }
}

/// The weights of one layer.
pub(super) struct Layer {
    pub(super) input_norm: Vec<f32>,
    pub(super) query: Matrix,
    pub(super) key: Matrix,
    pub(super) value: Matrix,
    pub(super) output: Matrix,
    pub(super) attention_norm: Vec<f32>,
    pub(super) mlp_norm: Vec<f32>,
    pub(super) gate: Matrix,
    pub(super) up: Matrix,
    pub(super) down: Matrix,
    pub(super) output_norm: Vec<f32>,
}

/// All weights of a model.
pub(crate) struct Weights {
    pub(super) embedding: Vec<f32>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    pub(super) exit_weight: Vec<f32>,
    pub(super) exit_bias: f32,
    pub(super) head: Matrix,
}

/// Makes room for the tensors of a layout, one after the other.
struct Room<'a> {
    tensors: std::slice::Iter<'a, TensorEntry>,
    /// Whether anything goes backward.
    backward: bool,
}

impl Room<'_> {
    fn next(&mut self) -> &TensorEntry {
        self.tensors.next().expect("the layout has all tensors of the model")
    }

    fn vector(&mut self) -> Vec<f32> {
        vec![0.0; self.next().len]
    }

    fn matrix(&mut self) -> Matrix {
        let backward = self.backward;
        let entry = self.next();
        Matrix::new(entry.shape[0], entry.shape[1], backward)
    }

    fn layer(&mut self) -> Layer {
        Layer {
            input_norm: self.vector(),
            query: self.matrix(),
            key: self.matrix(),
            value: self.matrix(),
            output: self.matrix(),
            attention_norm: self.vector(),
            mlp_norm: self.vector(),
            gate: self.matrix(),
            up: self.matrix(),
            down: self.matrix(),
            output_norm: self.vector(),
        }
    }
}

/// Where a tensor of a flat buffer goes.
enum Place<'a> {
    Copy(&'a mut [f32]),
    Pack(&'a mut Matrix),
}

impl Place<'_> {
    fn fill(self, values: &[f32]) {
        match self {
            Self::Copy(to) => to.copy_from_slice(values),
            Self::Pack(to) => to.fill(values),
        }
    }
}

impl Weights {
    /// Room for the weights of a model, still all zeros; without `backward`, half as much, for what
    /// only goes forward.
    pub(crate) fn new(layout: &Layout, layers: usize, backward: bool) -> Self {
        let mut room = Room { tensors: layout.tensors().iter(), backward };
        Self {
            embedding: room.vector(),
            layers: (0..layers).map(|_| room.layer()).collect(),
            norm: room.vector(),
            exit_weight: room.vector(),
            exit_bias: room.vector()[0],
            head: room.matrix(),
        }
    }

    /// Logits of rows of states, `[rows, d]` -> `[rows, vocab]`.
    pub(crate) fn logits(&self, states: &[f32]) -> Vec<f32> {
        let (rows, vocab) = (states.len() / self.norm.len(), self.head.outputs);
        let mut logits = vec![0.0; rows * vocab];
        self.head.apply(rows, states, &mut logits, vocab);
        logits
    }

    /// Takes the weights of a flat buffer in layout order, on the threads of the current pool.
    ///
    /// # Panics
    /// If the buffer is shorter than the layout.
    pub(crate) fn fill(&mut self, layout: &Layout, flat: &[f32]) {
        let places = self.places();
        assert_eq!(places.len(), layout.tensors().len(), "the layout is that of the model");
        let tensors = places.into_par_iter().zip(layout.tensors());
        tensors.for_each(|(place, entry)| place.fill(&flat[entry.range()]));
    }

    /// Takes one tensor, by its index in the layout.
    ///
    /// # Panics
    /// If there is no such tensor, or it has another size.
    pub(crate) fn fill_one(&mut self, index: usize, values: &[f32]) {
        self.places().swap_remove(index).fill(values);
    }

    /// Where the tensors go, in layout order.
    fn places(&mut self) -> Vec<Place<'_>> {
        let mut places = vec![Place::Copy(&mut self.embedding)];
        for layer in &mut self.layers {
            places.extend([
                Place::Copy(&mut layer.input_norm),
                Place::Pack(&mut layer.query),
                Place::Pack(&mut layer.key),
                Place::Pack(&mut layer.value),
                Place::Pack(&mut layer.output),
                Place::Copy(&mut layer.attention_norm),
                Place::Copy(&mut layer.mlp_norm),
                Place::Pack(&mut layer.gate),
                Place::Pack(&mut layer.up),
                Place::Pack(&mut layer.down),
                Place::Copy(&mut layer.output_norm),
            ]);
        }
        places.extend([
            Place::Copy(&mut self.norm),
            Place::Copy(&mut self.exit_weight),
            Place::Copy(std::slice::from_mut(&mut self.exit_bias)),
            Place::Pack(&mut self.head),
        ]);
        places
    }
}
