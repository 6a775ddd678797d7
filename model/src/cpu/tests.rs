//! The kernels against the same formulas in plain Burn operations, values and gradients, on shapes
//! that fit neither blocks nor panels.

use burn::tensor::{Device, Int, Tensor, TensorData};
use looptrain_proto::spec::{self, Objective};

use super::gradients::Gradients;
use super::layer::{self, Call, Dims, Saved, Work};
use super::{Clock, Rotary, Section, Weights, attention, head};
use crate::composite::{self, ops};
use crate::{Engine, Layout, Recompute, SlotBatch, SlotOutput, StageSettings, TrainState};

/// Of a single operator, and of a whole layer with all its weights.
const OPERATOR: f64 = 2e-6;
const LAYER: f64 = 4e-6;

fn device() -> Device {
    Device::flex().autodiff()
}

/// Numbers that look random, within [-1, 1], the same for a salt.
fn filled(n: usize, salt: u32) -> Vec<f32> {
    let mixed = |i: u32| (i ^ salt.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761);
    (0..n as u32).map(|i| (mixed(mixed(i)) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

fn leaf<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &device()).require_grad()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec::<f32>().unwrap()
}

#[track_caller]
fn close_within(tolerance: f64, what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    let distance = off / norm(&mut expected.iter().map(|&b| f64::from(b)));
    assert!(distance < tolerance, "{what}: ||a - b|| / ||b|| = {distance:e}");
}

/// `[B, H, T, head_dim]` -> `[B * T, H * head_dim]`.
fn joined(heads: &[f32], dims: &attention::Dims) -> Vec<f32> {
    let (width, head_dim) = (dims.heads * dims.head_dim, dims.head_dim);
    let mut rows = vec![0.0; heads.len()];
    for (at, &value) in heads.iter().enumerate() {
        let (task, position) = (at / dims.head_len(), at % dims.head_len() / head_dim);
        let row = task / dims.heads * dims.length + position;
        rows[row * width + task % dims.heads * head_dim + at % head_dim] = value;
    }
    rows
}

#[test]
fn attention_sees_the_past_alone() {
    attention_is_that_of_the_composite(&[]);
}

#[test]
fn attention_sees_its_document_alone() {
    // Documents of one token, over tiles and panels, and to the end.
    let ends = [3, 4, 40, 47, 100, 145];
    let start =
        |at: usize| ends.iter().filter(|&&end| end < at % 150).max().map_or(0, |end| end + 1);
    let starts: Vec<u32> = (0..300).map(|at| if at < 150 { start(at) as u32 } else { 0 }).collect();
    attention_is_that_of_the_composite(&starts);
}

fn attention_is_that_of_the_composite(starts: &[u32]) {
    let dims = attention::Dims { sequences: 2, length: 150, heads: 3, head_dim: 10 };
    let (n, d) = (300, 30);
    let [q, k, v, upstream] = [1, 2, 3, 4].map(|salt| filled(n * d, salt));
    let rotary = Rotary::new(dims.length, dims.head_dim, 100.0);
    let mut qkv: Vec<f32> = (0..n)
        .flat_map(|row| [&q, &k, &v].map(|x| x[row * d..(row + 1) * d].to_vec()))
        .flatten()
        .collect();
    for (token, row) in qkv.chunks_mut(3 * d).enumerate() {
        rotary.turn(token, &mut row[..d], rotary.scale());
        rotary.turn(token, &mut row[d..2 * d], 1.0);
    }
    let (mut mixed, mut log_sums) = (vec![f32::NAN; n * d], vec![f32::NAN; n * dims.heads]);
    attention::forward(&Clock::default(), &qkv, &dims, starts, &mut mixed, &mut log_sums);
    let saved = attention::Saved { qkv: &qkv, mixed: &mixed, log_sums: &log_sums };
    let mut dheads = vec![f32::NAN; 3 * n * d];
    attention::backward(&Clock::default(), saved, &dims, starts, &upstream, &mut dheads);

    let shape = [dims.sequences, dims.length, d];
    let leaves = [&q, &k, &v].map(|x| leaf(x, shape));
    let [q, k, v] = leaves.clone();
    let table = composite::Rotary::new(dims.length, dims.head_dim, 100.0, &device());
    let out = ops::attention(q, k, v, table.cos, table.sin, starts, dims.heads);
    close_within(OPERATOR, "output", &joined(&mixed, &dims), &values(out.clone().inner()));
    let grads = (out * leaf(&upstream, shape).detach()).sum().backward();
    for (which, (leaf, name)) in leaves.iter().zip(["queries", "keys", "values"]).enumerate() {
        let parts = dheads
            .chunks(3 * dims.head_len())
            .flat_map(|head| head[which * dims.head_len()..(which + 1) * dims.head_len()].to_vec());
        let mut found = joined(&parts.collect::<Vec<_>>(), &dims);
        for (token, row) in found.chunks_mut(d).enumerate() {
            match which {
                0 => rotary.turn_back(token, row, rotary.scale()),
                1 => rotary.turn_back(token, row, 1.0),
                _ => {}
            }
        }
        close_within(OPERATOR, name, &found, &values(leaf.grad(&grads).unwrap()));
    }
}

fn model() -> spec::Model {
    spec::Model {
        hidden_size: 36,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        intermediate_size: 70,
        vocab_size: 131,
        rms_norm_eps: 1e-6,
        initializer_range: 0.3,
    }
}

/// Weights without the ones and zeros that hide mistakes.
fn weights(model: &spec::Model) -> Vec<f32> {
    let mut weights = TrainState::initial(model, 3).weights;
    for (weight, change) in weights.iter_mut().zip(filled(Layout::new(model).parameters(), 7)) {
        *weight += 0.3 * change;
    }
    weights
}

#[test]
fn a_layer_and_the_gradients_of_all_its_weights() {
    let (model, layout) = (model(), Layout::new(&model()));
    let (d, sequences, length) = (model.hidden_size, 2, 101);
    let flat = weights(&model);
    let mut packed = Weights::new(&layout, 2, true);
    packed.fill(&layout, &flat);
    let heads = attention::Dims { sequences, length, heads: 3, head_dim: 12 };
    let dims = Dims { attention: heads, hidden: d, inner: 70, eps: 1e-6 };
    let (x, upstream) = (filled(dims.tokens() * d, 1), filled(dims.tokens() * d, 2));
    let (rotary, clock) = (Rotary::new(length, 12, 1e4), Clock::default());
    let call = Call {
        dims: &dims,
        starts: &[],
        rotary: &rotary,
        clock: &clock,
        section: Section::Forward,
    };
    let (mut saved, mut work) = (Saved::default(), Work::default());
    saved.resize(&dims);
    work.resize(&dims);
    let mut y = vec![f32::NAN; x.len()];
    layer::forward(&packed.layers[1], &call, &x, &mut y, &mut saved);
    let (mut dx, mut gradient) = (upstream.clone(), vec![0.0; flat.len()]);
    let mut places = Gradients::new(&layout, 2, &mut gradient);
    let mut into = places.layer(1);
    layer::backward(&packed.layers[1], &call, &x, &mut dx, &mut saved, &mut work, &mut into);

    let lm = composite::LoopLm::new(&model, &layout, &flat, &device()).with_gradients();
    let input = leaf(&x, [dims.tokens(), d]);
    let table = composite::Rotary::new(length, 12, 1e4, &device());
    let out = lm.layer(1, input.clone(), sequences, &table, &[]);
    close_within(LAYER, "output", &y, &values(out.clone().inner()));
    let mut grads = (out * leaf(&upstream, [dims.tokens(), d]).detach()).sum().backward();
    close_within(LAYER, "input", &dx, &values(input.grad(&grads).unwrap()));
    let expected = lm.flat_gradients(&layout, &mut grads);
    for tensor in layout.tensors().iter().filter(|tensor| tensor.name.contains("layers.1.")) {
        close_within(LAYER, &tensor.name, &gradient[tensor.range()], &expected[tensor.range()]);
    }
}

#[test]
fn cross_entropy_of_all_loops_over_several_chunks() {
    let (tokens, loops, d, vocab) = (301, 2, 24, 20_011);
    let layout = Layout::new(&spec::Model {
        hidden_size: d,
        num_hidden_layers: 0,
        num_attention_heads: 1,
        vocab_size: vocab,
        ..model()
    });
    let mut packed = Weights::new(&layout, 0, true);
    let flat = filled(layout.parameters(), 5);
    packed.fill(&layout, &flat);
    let weight = &flat[layout.parameters() - vocab * d..];
    let states = filled(loops * tokens * d, 1);
    let targets: Vec<u32> = (0..tokens).map(|i| ((i * 7919 + 13) % vocab) as u32).collect();
    let shares = filled(loops * tokens, 2);
    let rows = head::Rows { states: &states, targets: &targets, hidden: d, vocab };
    let mut logits = vec![f32::NAN; head::logits_len(vocab, loops * tokens)];
    let mut alone = vec![f32::NAN; loops * tokens];
    let mut likeliest_alone = vec![u32::MAX; loops * tokens];
    let mut likeliest = likeliest_alone.clone();
    head::cross_entropy(
        &Clock::default(),
        &packed.head,
        &rows,
        &mut logits,
        &mut alone,
        &mut likeliest_alone,
        None,
    );
    let (mut losses, mut dstates) = (alone.clone(), vec![f32::NAN; states.len()]);
    let mut dhead = vec![0.0; vocab * d];
    let mut used = shares.clone();
    let into = head::Into { shares: &mut used, dstates: &mut dstates, dhead: &mut dhead };
    head::cross_entropy(
        &Clock::default(),
        &packed.head,
        &rows,
        &mut logits,
        &mut losses,
        &mut likeliest,
        Some(into),
    );
    assert_eq!(likeliest, likeliest_alone);

    let (x, w) = (leaf(&states, [loops * tokens, d]), leaf(weight, [vocab, d]));
    let ids: Vec<i64> = targets.iter().chain(&targets).map(|&id| i64::from(id)).collect();
    let ids = Tensor::from_data(TensorData::new(ids, [loops * tokens]), &device());
    let expected = ops::cross_entropy(x.clone(), w.clone(), ids);
    close_within(OPERATOR, "losses", &losses, &values(expected.clone().inner()));
    let all = values(ops::linear(x.clone(), w.clone()).inner());
    for (row, own) in all.chunks(vocab).zip(&likeliest) {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert!(most - row[*own as usize] < 1e-4, "{own}");
    }
    close_within(OPERATOR, "losses without gradients", &alone, &losses);
    let grads = (expected * leaf(&shares, [loops * tokens]).detach()).sum().backward();
    close_within(OPERATOR, "states", &dstates, &values(x.grad(&grads).unwrap()));
    close_within(OPERATOR, "head", &dhead, &values(w.grad(&grads).unwrap()));
}

fn slot_of(engine: &mut Engine, settings: &StageSettings, batch: &SlotBatch) -> SlotOutput {
    let found = std::sync::Mutex::new(None);
    let batches = std::slice::from_ref(batch);
    engine.gradients(settings, batches, &false.into(), &|_, output| {
        *found.lock().unwrap() = Some(output);
    });
    found.into_inner().unwrap().unwrap()
}

#[test]
fn a_slot_gives_the_gradients_of_the_composite_whatever_is_computed_again() {
    let model = model();
    let flat = weights(&model);
    for (loops, layers, sequences, sequence_length) in [(1, 1, 1, 1), (3, 2, 3, 37), (4, 1, 1, 130)]
    {
        let model = spec::Model { num_hidden_layers: layers, ..model.clone() };
        let flat = &flat[flat.len() - Layout::new(&model).parameters()..];
        let settings = StageSettings {
            loops,
            entropy_weight: 0.07,
            rope_base: 1e3,
            objective: Objective::Language,
        };
        let count = sequences * (sequence_length + 1);
        let tokens = (0..count).map(|i| ((i * 7919 + i * i) % 131) as u32).collect();
        let batch = SlotBatch { tokens, sequences, sequence_length, ..SlotBatch::default() };
        let expected = composite::gradient(&model, flat, &settings, &batch, &device());
        let mut engine = Engine::new(&model, 2);
        engine.load(flat);
        let found = slot_of(&mut engine, &settings, &batch);
        let off = (found.statistics.loss - expected.statistics.loss).abs();
        assert!(off < 1e-5 * expected.statistics.loss, "{off:e}");
        for tensor in engine.layout().tensors() {
            let (found, expected) =
                (&found.gradient[tensor.range()], &expected.gradient[tensor.range()]);
            if expected.iter().any(|&x| x != 0.0) {
                // Large weights, loop after loop: both sides are off by more than one operator is.
                close_within(2e-4, &tensor.name, found, expected);
            } else {
                // The scores of one token: their gradient is the difference of two equal sums.
                assert!(found.iter().all(|x| x.abs() < 1e-6), "{}", tensor.name);
            }
        }
        for recompute in [Recompute::Loop, Recompute::Layer] {
            engine.set_recompute(recompute);
            assert!(slot_of(&mut engine, &settings, &batch) == found, "{recompute:?}");
        }
    }
}

#[test]
fn what_the_loops_of_a_slot_are_like() {
    let model = model();
    let (flat, layout) = (weights(&model), Layout::new(&model));
    let settings = StageSettings {
        loops: 3,
        entropy_weight: 0.07,
        rope_base: 1e3,
        objective: Objective::Language,
    };
    let (sequences, sequence_length) = (2, 45);
    let tokens = (0..92).map(|i| ((i * 7919 + i * i) % 131) as u32).collect();
    let batch = SlotBatch { tokens, sequences, sequence_length, ..SlotBatch::default() };
    let mut engine = Engine::new(&model, 2);
    engine.load(&flat);
    let found = slot_of(&mut engine, &settings, &batch).statistics;

    let [ids, targets] = batch.ids().map(|ids| {
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        Tensor::<1, Int>::from_data(TensorData::new(ids, [90]), &device())
    });
    let lm = composite::LoopLm::new(&model, &layout, &flat, &device());
    let table = composite::Rotary::new(sequence_length, 12, 1e3, &device());
    let embedding = leaf(&flat[layout.tensors()[0].range()], [131, 36]).inner();
    let mut h = ops::embedding(embedding, ids.clone());
    let outputs = lm.forward(ids, sequences, 3, &table, &[]);
    let likeliest = |r: usize| {
        let logits = values(lm.logits(outputs[r].hidden.clone()));
        let of_row = |row: &[f32]| (0..131).rev().max_by(|a, b| row[*a].total_cmp(&row[*b]));
        logits.chunks(131).map(|row| of_row(row).unwrap()).collect::<Vec<_>>()
    };
    for (r, output) in outputs.iter().enumerate() {
        for layer in 0..2 {
            h = lm.layer(layer, h, sequences, &table, &[]);
        }
        let rms = values(h.clone().square().mean_dim(1).sqrt());
        let rms = rms.iter().map(|x| f64::from(*x)).sum::<f64>() / 90.0;
        assert!((found.hidden_rms_per_loop[r] - rms).abs() < 1e-4 * rms, "loop {r}: {rms}");
        h = output.hidden.clone();
        let same = likeliest(r).iter().zip(likeliest(2)).filter(|(a, b)| **a == *b).count();
        // Two tokens may be so near that either is the likeliest.
        assert!((found.agreement_per_loop[r] - same as f64 / 90.0).abs() < 0.012, "loop {r}");
    }
    assert!(found.agreement_per_loop[0] < 1.0);

    // What reaches the last state comes from its losses alone, each with its share.
    let shares = crate::exit_shares(
        &outputs.iter().flat_map(|output| values(output.gate.clone())).collect::<Vec<_>>(),
        3,
    );
    let state = leaf(&values(h), [90, 36]);
    let head = leaf(&flat[layout.tensors().last().unwrap().range()], [131, 36]).inner();
    let losses = ops::cross_entropy(state.clone(), Tensor::from_inner(head), targets);
    let share = leaf(&shares[180..], [90]).detach();
    let grads = (losses * share).sum().backward();
    let squares: f64 =
        values(state.grad(&grads).unwrap()).iter().map(|x| f64::from(*x).powi(2)).sum();
    let norm = (90.0 * squares).sqrt();
    assert!((found.gradient_norm_per_loop[2] - norm).abs() < 1e-4 * norm, "{norm}");
    assert!(found.gradient_norm_per_loop[0] > 0.0);
}

#[test]
fn documents_that_do_not_see_each_other_are_as_each_alone() {
    let model = model();
    let flat = weights(&model);
    let settings = StageSettings {
        loops: 3,
        entropy_weight: 0.07,
        rope_base: 1e3,
        objective: Objective::Language,
    };
    let mut engine = Engine::new(&model, 2);
    engine.load(&flat);
    // 0 ends a document.
    let mut tokens: Vec<u32> = (0..131).map(|i| (1 + (i * 7919 + i * i) % 130) as u32).collect();
    let lengths = [1, 50, 64, 15];
    let mut end = 0;
    for length in lengths {
        end += length;
        tokens[end - 1] = 0;
    }
    let batch = |tokens: &[u32], starts| SlotBatch {
        tokens: tokens.to_vec(),
        sequences: 1,
        sequence_length: tokens.len() - 1,
        starts,
    };
    let starts = crate::document_starts(&tokens[..130], 130, 0);
    let together = slot_of(&mut engine, &settings, &batch(&tokens, starts));
    let (mut gradient, mut loss, mut first) = (vec![0.0; flat.len()], 0.0, 0);
    for length in lengths {
        let alone = batch(&tokens[first..=first + length], Vec::new());
        let alone = slot_of(&mut engine, &settings, &alone);
        let share = length as f32 / 130.0;
        gradient.iter_mut().zip(&alone.gradient).for_each(|(sum, x)| *sum += share * x);
        loss += f64::from(share) * alone.statistics.loss;
        first += length;
    }
    assert!((together.statistics.loss - loss).abs() < 1e-5 * loss);
    for tensor in engine.layout().tensors() {
        let range = tensor.range();
        close_within(2e-4, &tensor.name, &together.gradient[range.clone()], &gradient[range]);
    }
    let apart = slot_of(&mut engine, &settings, &batch(&tokens, Vec::new()));
    let head = engine.layout().tensors().last().unwrap().range();
    let off = apart.gradient[head.clone()].iter().zip(&gradient[head]).map(|(a, b)| (a - b).abs());
    assert!(off.fold(0.0, f32::max) > 1e-3, "without starts they see each other");
}
