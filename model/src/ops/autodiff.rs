//! The backward half of the fused operators, once for every device that has the kernels.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, TensorMetadata};

use super::backend::{AttentionInputs, AttentionOutputs, FusedOps, Kernels};

#[derive(Debug)]
struct Embedding;

impl<B: Kernels> Backward<B, 1> for Embedding {
    type State = (usize, IntTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let (rows, ids) = ops.state;
        if let [Some(weight)] = ops.parents {
            grads.register::<B>(weight.id, B::embedding_backward_weight(rows, ids, dout));
        }
    }
}

#[derive(Debug)]
struct Linear;

impl<B: Kernels> Backward<B, 2> for Linear {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let (x, weight) = ops.state;
        let [x_node, weight_node] = ops.parents;
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, B::linear_backward_weight(dout.clone(), x));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::linear_backward_input(dout, weight));
        }
    }
}

/// `N` is 2 without and 3 with a residual; the residual's gradient is the upstream one.
#[derive(Debug)]
struct RmsNorm;

impl<B: Kernels, const N: usize> Backward<B, N> for RmsNorm {
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, N>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let (x, weight, inverse) = ops.state;
        let (dx, dweight) = B::rms_norm_backward(x, weight, inverse, dout.clone());
        for (node, grad) in ops.parents.into_iter().zip([dx, dweight, dout]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct Swiglu;

impl<B: Kernels> Backward<B, 2> for Swiglu {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let (gate, up) = ops.state;
        let (dgate, dup) = B::swiglu_backward(gate, up, dout);
        for (node, grad) in ops.parents.into_iter().zip([dgate, dup]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct Attention;

impl<B: Kernels> Backward<B, 3> for Attention {
    type State = (AttentionInputs<B>, AttentionOutputs<B>, usize);

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let (inputs, outputs, heads) = ops.state;
        let qkv = B::attention_backward(inputs, outputs, heads, dout);
        for (node, grad) in ops.parents.into_iter().zip(qkv) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct CrossEntropy;

impl<B: Kernels> Backward<B, 2> for CrossEntropy {
    type State = (FloatTensor<B>, FloatTensor<B>, IntTensor<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dloss = grads.consume::<B>(&ops.node);
        let (x, weight, targets, log_sums) = ops.state;
        let (dx, dweight) = B::cross_entropy_backward(x, weight, targets, log_sums, dloss);
        for (node, grad) in ops.parents.into_iter().zip([dx, dweight]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: Kernels, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn fused_embedding(weight: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        let (weight, node) = weight.into_parts();
        let rows = weight.shape()[0];
        let out = B::embedding_forward(weight, ids.clone());
        match Embedding.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((rows, ids), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let out = B::linear_forward(x.clone(), weight.clone());
        match Linear.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, weight), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let (out, inverse) = B::rms_norm_forward(x.clone(), weight.clone(), None, eps);
        let nodes = [x_node, weight_node];
        match Backward::<B, 2>::prepare::<C>(RmsNorm, nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, weight, inverse), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_rms_norm_add(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        residual: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let (residual, residual_node) = residual.into_parts();
        let (out, inverse) = B::rms_norm_forward(x.clone(), weight.clone(), Some(residual), eps);
        let nodes = [x_node, weight_node, residual_node];
        match Backward::<B, 3>::prepare::<C>(RmsNorm, nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, weight, inverse), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
        let out = B::swiglu_forward(gate.clone(), up.clone());
        match Swiglu.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gate, up), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        heads: usize,
    ) -> FloatTensor<Self> {
        let ((q, q_node), (k, k_node)) = (q.into_parts(), k.into_parts());
        let (v, v_node) = v.into_parts();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let inputs = AttentionInputs { q, k, v, cos, sin };
        let outputs = B::attention_forward(inputs.clone(), heads);
        let out = outputs.out.clone();
        match Attention.prepare::<C>([q_node, k_node, v_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((inputs, outputs, heads), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn fused_cross_entropy(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        let (loss, log_sums) = B::cross_entropy_forward(x.clone(), weight.clone(), targets.clone());
        match CrossEntropy.prepare::<C>([x_node, weight_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, weight, targets, log_sums), loss),
            OpsKind::UnTracked(prep) => prep.finish(loss),
        }
    }
}
