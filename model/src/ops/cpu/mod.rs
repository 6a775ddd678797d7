//! The fused operators on the CPU: kernels on slices, and their Burn flex face.
//!
//! Bits depend on the shape and on the [`KernelLevel`] alone: work is cut into pieces by fixed
//! sizes, partial sums are added in the order of the pieces, and no two threads add to the same
//! float.

mod attention;
mod cross_entropy;
mod matmul;
mod norm;
mod simd;

use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, TensorData};
use burn_flex::FlexTensor;

pub use matmul::is_threaded;
pub use simd::KernelLevel;

use self::attention::{Dims, Rotary, Saved};
use self::cross_entropy::Head;
use self::matmul::{Matrix, Shape, Threads, matmul};
use super::backend::{AttentionInputs, AttentionOutputs, Kernels};

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

fn like(values: Vec<f32>, model: &FlexTensor) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, model.shape()))
}

/// Rows in order without gaps; gradients may arrive as transposed or expanded views.
fn packed(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

fn floats(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("packed f32 tensors are slices")
}

fn indices(tensor: &FlexTensor) -> Vec<usize> {
    let tensor = packed(tensor.clone());
    match tensor.dtype() {
        DType::I64 => {
            let ids = tensor.as_slice::<i64>().expect("packed i64 tensors are slices");
            ids.iter().map(|&id| id as usize).collect()
        }
        DType::I32 => {
            let ids = tensor.as_slice::<i32>().expect("packed i32 tensors are slices");
            ids.iter().map(|&id| id as usize).collect()
        }
        other => panic!("token ids are i64 or i32, not {other:?}"),
    }
}

fn two(tensor: &FlexTensor) -> (usize, usize) {
    let shape = tensor.shape();
    (shape[0], shape[1])
}

fn dims(x: &FlexTensor, heads: usize) -> Dims {
    let shape = x.shape();
    Dims { batch: shape[0], length: shape[1], heads, head_dim: shape[2] / heads }
}

impl Kernels for Flex {
    fn embedding_forward(weight: FlexTensor, ids: FlexTensor) -> FlexTensor {
        let (weight, ids) = (packed(weight), indices(&ids));
        let d = two(&weight).1;
        let rows = floats(&weight);
        let mut out = Vec::with_capacity(ids.len() * d);
        for &id in &ids {
            out.extend_from_slice(&rows[id * d..(id + 1) * d]);
        }
        tensor(out, [ids.len(), d])
    }

    fn embedding_backward_weight(rows: usize, ids: FlexTensor, dout: FlexTensor) -> FlexTensor {
        let (dout, ids) = (packed(dout), indices(&ids));
        let d = two(&dout).1;
        let mut dweight = vec![0.0; rows * d];
        // In token order: a row that occurs twice must always be summed in the same order.
        for (&id, dout) in ids.iter().zip(floats(&dout).chunks(d)) {
            simd::add(&mut dweight[id * d..(id + 1) * d], dout);
        }
        tensor(dweight, [rows, d])
    }

    fn linear_forward(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let (x, weight) = (packed(x), packed(weight));
        let ((n, k), (m, _)) = (two(&x), two(&weight));
        let mut out = vec![0.0; n * m];
        let (a, b) = (Matrix::rows(floats(&x), k), Matrix::rows(floats(&weight), k).t());
        matmul(Shape { m: n, n: m, k }, &mut out, m, false, a, b, Threads::Pool);
        tensor(out, [n, m])
    }

    fn linear_backward_input(dout: FlexTensor, weight: FlexTensor) -> FlexTensor {
        let (dout, weight) = (packed(dout), packed(weight));
        let ((n, m), (_, k)) = (two(&dout), two(&weight));
        let mut dx = vec![0.0; n * k];
        let (a, b) = (Matrix::rows(floats(&dout), m), Matrix::rows(floats(&weight), k));
        matmul(Shape { m: n, n: k, k: m }, &mut dx, k, false, a, b, Threads::Pool);
        tensor(dx, [n, k])
    }

    fn linear_backward_weight(dout: FlexTensor, x: FlexTensor) -> FlexTensor {
        let (dout, x) = (packed(dout), packed(x));
        let ((n, m), (_, k)) = (two(&dout), two(&x));
        let mut dweight = vec![0.0; m * k];
        let (a, b) = (Matrix::rows(floats(&dout), m).t(), Matrix::rows(floats(&x), k));
        matmul(Shape { m, n: k, k: n }, &mut dweight, k, false, a, b, Threads::Pool);
        tensor(dweight, [m, k])
    }

    fn rms_norm_forward(
        x: FlexTensor,
        weight: FlexTensor,
        residual: Option<FlexTensor>,
        eps: f32,
    ) -> (FlexTensor, FlexTensor) {
        let (x, weight, residual) = (packed(x), packed(weight), residual.map(packed));
        let residual = residual.as_ref().map(floats);
        let (out, inverse) = norm::rms_norm(floats(&x), floats(&weight), residual, eps);
        let rows = inverse.len();
        (like(out, &x), tensor(inverse, [rows]))
    }

    fn rms_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        inverse: FlexTensor,
        dout: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (x, weight, dout) = (packed(x), packed(weight), packed(dout));
        let (dx, dweight) =
            norm::rms_norm_backward(floats(&x), floats(&weight), floats(&inverse), floats(&dout));
        (like(dx, &x), like(dweight, &weight))
    }

    fn swiglu_forward(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        let (gate, up) = (packed(gate), packed(up));
        like(norm::swiglu(floats(&gate), floats(&up)), &gate)
    }

    fn swiglu_backward(
        gate: FlexTensor,
        up: FlexTensor,
        dout: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (gate, up, dout) = (packed(gate), packed(up), packed(dout));
        let (dgate, dup) = norm::swiglu_backward(floats(&gate), floats(&up), floats(&dout));
        (like(dgate, &gate), like(dup, &up))
    }

    fn attention_forward(inputs: AttentionInputs<Self>, heads: usize) -> AttentionOutputs<Self> {
        let AttentionInputs { q, k, v, cos, sin } = inputs;
        let (q, k, v) = (packed(q), packed(k), packed(v));
        let (cos, sin) = (packed(cos), packed(sin));
        let dims = dims(&q, heads);
        let rotary = Rotary { cos: floats(&cos), sin: floats(&sin) };
        let (out, log_sums) =
            attention::attention(floats(&q), floats(&k), floats(&v), rotary, &dims);
        let rows = log_sums.len();
        AttentionOutputs { out: like(out, &q), log_sums: tensor(log_sums, [rows]) }
    }

    fn attention_backward(
        inputs: AttentionInputs<Self>,
        outputs: AttentionOutputs<Self>,
        heads: usize,
        dout: FlexTensor,
    ) -> [FlexTensor; 3] {
        let AttentionInputs { q, k, v, cos, sin } = inputs;
        let (q, k, v, dout) = (packed(q), packed(k), packed(v), packed(dout));
        let (cos, sin) = (packed(cos), packed(sin));
        let dims = dims(&q, heads);
        let rotary = Rotary { cos: floats(&cos), sin: floats(&sin) };
        let saved = Saved {
            q: floats(&q),
            k: floats(&k),
            v: floats(&v),
            out: floats(&outputs.out),
            log_sums: floats(&outputs.log_sums),
        };
        attention::attention_backward(&saved, floats(&dout), rotary, &dims)
            .map(|grad| like(grad, &q))
    }

    fn cross_entropy_forward(
        x: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (x, weight) = (packed(x), packed(weight));
        let ((tokens, hidden), (vocab, _)) = (two(&x), two(&weight));
        let head = Head { tokens, hidden, vocab };
        let targets = indices(&targets);
        let (loss, log_sums) = cross_entropy::forward(head, floats(&x), floats(&weight), &targets);
        (tensor(loss, [tokens]), tensor(log_sums, [tokens]))
    }

    fn cross_entropy_backward(
        x: FlexTensor,
        weight: FlexTensor,
        targets: FlexTensor,
        log_sums: FlexTensor,
        dloss: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (x, weight, dloss) = (packed(x), packed(weight), packed(dloss));
        let ((tokens, hidden), (vocab, _)) = (two(&x), two(&weight));
        let head = Head { tokens, hidden, vocab };
        let (dx, dweight) = cross_entropy::backward(
            head,
            floats(&x),
            floats(&weight),
            &indices(&targets),
            floats(&log_sums),
            floats(&dloss),
        );
        (like(dx, &x), like(dweight, &weight))
    }
}
