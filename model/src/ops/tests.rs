//! Every fused operator against its composite formula, values and gradients, on shapes that do not
//! fit tiles and chunks.

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};

use super::composite;

const TOLERANCE: f64 = 2e-6;

fn device() -> Device {
    Device::flex().autodiff()
}

fn leaf<const D: usize>(shape: [usize; D], deviation: f64) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, deviation), &device()).require_grad()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec::<f32>().unwrap()
}

/// `||a - b|| / ||b||`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

/// Compares two results of the same leaves: values, and the gradient of each leaf under the same
/// random upstream gradient.
macro_rules! same {
    ($fused:expr, $composite:expr, $($leaf:expr),+) => {{
        let (fused, composite) = ($fused, $composite);
        let d = distance(&values(fused.clone().inner()), &values(composite.clone().inner()));
        assert!(d < TOLERANCE, "values differ by {d:e}");
        let shape = fused.dims();
        let upstream = Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device()).detach();
        let fused = (fused * upstream.clone()).sum().backward();
        let composite = (composite * upstream).sum().backward();
        $({
            let (a, b) = ($leaf.grad(&fused).unwrap(), $leaf.grad(&composite).unwrap());
            let d = distance(&values(a), &values(b));
            assert!(d < TOLERANCE, "gradients of {} differ by {d:e}", stringify!($leaf));
        })+
    }};
}

fn ids(n: usize, below: usize) -> Tensor<1, Int> {
    let ids: Vec<i64> = (0..n).map(|i| ((i * 7919 + 13) % below) as i64).collect();
    Tensor::from_data(TensorData::new(ids, [n]), &device())
}

#[test]
fn embedding_gathers_rows_and_adds_up_their_gradients() {
    let weight = leaf([11, 6], 1.0);
    let ids = ids(40, 11);
    let fused = super::embedding(weight.clone(), ids.clone());
    same!(fused, composite::embedding(weight.clone(), ids), weight);
}

#[test]
fn linear_is_a_product_with_the_transpose() {
    let (x, weight) = (leaf([70, 33], 1.0), leaf([45, 33], 1.0));
    let fused = super::linear(x.clone(), weight.clone());
    same!(fused, composite::linear(x.clone(), weight.clone()), x, weight);
}

#[test]
fn rms_norm_with_and_without_residual() {
    let (x, weight) = (leaf([150, 70], 2.0), leaf([70], 1.0));
    let residual = leaf([150, 70], 1.0);
    let fused = super::rms_norm(x.clone(), weight.clone(), 1e-6);
    same!(fused, composite::rms_norm(x.clone(), weight.clone(), 1e-6), x, weight);
    let fused = super::rms_norm_add(x.clone(), weight.clone(), residual.clone(), 1e-6);
    let plain = composite::rms_norm_add(x.clone(), weight.clone(), residual.clone(), 1e-6);
    same!(fused, plain, x, weight, residual);
}

#[test]
fn swiglu_gates_one_half_with_the_other() {
    let (gate, up) = (leaf([33, 100], 3.0), leaf([33, 100], 1.0));
    let fused = super::swiglu(gate.clone(), up.clone());
    same!(fused, composite::swiglu(gate.clone(), up.clone()), gate, up);
}

#[test]
fn attention_sees_the_past_alone() {
    let (heads, head_dim, length) = (3, 10, 150);
    let shape = [2, length, heads * head_dim];
    let (q, k, v) = (leaf(shape, 1.0), leaf(shape, 1.0), leaf(shape, 1.0));
    let angles: Vec<f32> = (0..length * head_dim / 2).map(|i| i as f32 * 0.37).collect();
    let table = |f: fn(f32) -> f32| {
        let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
        Tensor::<2>::from_data(TensorData::new(values, [length, head_dim / 2]), &device())
    };
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    let fused = super::attention(q.clone(), k.clone(), v.clone(), cos.clone(), sin.clone(), heads);
    let plain = composite::attention(q.clone(), k.clone(), v.clone(), cos, sin, heads);
    same!(fused, plain, q, k, v);
}

#[test]
fn cross_entropy_over_several_chunks_of_tokens() {
    let (tokens, hidden, vocab) = (300, 24, 20_000);
    let (x, weight) = (leaf([tokens, hidden], 1.0), leaf([vocab, hidden], 0.3));
    let targets = ids(tokens, vocab);
    let fused = super::cross_entropy(x.clone(), weight.clone(), targets.clone());
    same!(fused, composite::cross_entropy(x.clone(), weight.clone(), targets), x, weight);
}
