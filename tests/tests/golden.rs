//! Numerics against float64 vectors of an independent implementation (`golden/make.sh`): logits of
//! every loop, losses, exit distribution, every gradient, and the course of AdamW.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use burn::tensor::{Device, Int, Tensor, TensorData};
use looptrain_model::composite::{LoopLm, Rotary};
use looptrain_model::{
    Engine, Layout, SlotBatch, SlotOutput, StageSettings, TokenMeasures, TrainState, exit_shares,
    stage_one,
};
use looptrain_proto::Step;
use looptrain_proto::spec::{self, Objective};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const TOLERANCE: f64 = 1e-5;
const CASES: [&str; 4] = ["plain", "one-loop", "many-loops", "long"];

fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(path)
}

type Vectors = HashMap<String, Vec<f64>>;

fn vectors(path: &str) -> Vectors {
    let bytes = std::fs::read(golden(path)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let number = |dtype: Dtype, bytes: &[u8]| {
        let bytes = bytes.try_into().unwrap();
        match dtype {
            Dtype::F64 => f64::from_le_bytes(bytes),
            Dtype::I64 => i64::from_le_bytes(bytes) as f64,
            other => panic!("{other:?} in {path}"),
        }
    };
    file.iter()
        .map(|(name, view)| {
            let numbers = view.data().chunks(8).map(|bytes| number(view.dtype(), bytes));
            (name.to_owned(), numbers.collect())
        })
        .collect()
}

struct Case {
    model: spec::Model,
    settings: StageSettings,
    batch: usize,
    length: usize,
    learning_rate: f64,
}

impl Case {
    fn new(json: &Value) -> Self {
        let size = |key: &str| json[key].as_u64().unwrap() as usize;
        let number = |key: &str| json[key].as_f64().unwrap();
        Self {
            model: spec::Model {
                hidden_size: size("d"),
                num_hidden_layers: size("layers"),
                num_attention_heads: size("heads"),
                intermediate_size: size("ffn"),
                vocab_size: size("vocab"),
                rms_norm_eps: 1e-6,
                initializer_range: 0.02,
            },
            settings: StageSettings {
                loops: size("loops"),
                entropy_weight: number("beta"),
                rope_base: number("theta"),
                objective: Objective::Language,
            },
            batch: size("batch"),
            length: size("seq"),
            learning_rate: number("lr"),
        }
    }

    fn read(name: &str) -> (Self, Vectors, Vectors) {
        let json = std::fs::read_to_string(golden(&format!("{name}/case.json"))).unwrap();
        (
            Self::new(&serde_json::from_str(&json).unwrap()),
            vectors(&format!("{name}/weights.safetensors")),
            vectors(&format!("{name}/expected.safetensors")),
        )
    }

    fn slot(&self, tokens: &[f64], targets: &[f64]) -> SlotBatch {
        let rows = tokens.chunks(self.length).zip(targets.chunks(self.length));
        let tokens = rows
            .flat_map(|(inputs, targets)| inputs.iter().chain(targets.last()))
            .map(|&id| id as u32)
            .collect();
        SlotBatch {
            tokens,
            sequences: self.batch,
            sequence_length: self.length,
            ..SlotBatch::default()
        }
    }

    fn gradient(&self, engine: &Engine, slot: SlotBatch) -> SlotOutput {
        let found = Mutex::new(None);
        engine.gradients(&self.settings, &[slot], &AtomicBool::new(false), &|_, output| {
            *found.lock().unwrap() = Some(output);
        });
        found.into_inner().unwrap().unwrap()
    }
}

fn flat(layout: &Layout, vectors: &Vectors) -> Vec<f32> {
    assert_eq!(layout.tensors().len(), vectors.len(), "tensors of the reference");
    let tensors = layout.tensors().iter();
    let flat: Vec<f32> =
        tensors.flat_map(|tensor| vectors[&tensor.name].iter().map(|&x| x as f32)).collect();
    assert_eq!(flat.len(), layout.parameters());
    flat
}

#[track_caller]
fn close(what: &str, found: &[f32], exact: &[f64]) {
    assert_eq!(found.len(), exact.len(), "{what}");
    let square = |x: f64| x * x;
    let off: f64 = found.iter().zip(exact).map(|(&a, &b)| square(f64::from(a) - b)).sum();
    let size: f64 = exact.iter().copied().map(square).sum();
    let distance = off.sqrt() / size.sqrt().max(f64::MIN_POSITIVE);
    assert!(distance < TOLERANCE || off == 0.0, "{what}: ||a - b|| / ||b|| = {distance:e}");
}

#[track_caller]
fn near(what: &str, found: f64, exact: f64) {
    assert!((found - exact).abs() < TOLERANCE * exact.abs(), "{what}: {found} against {exact}");
}

/// Losses and gate logits, `[R * N]` each, against the case's.
fn losses_and_exits(name: &str, case: &Case, losses: &[f32], gates: &[f32], expected: &Vectors) {
    close(&format!("{name} per-token losses"), losses, &expected["ce"]);
    close(&format!("{name} gate logits"), gates, &expected["gate_logits"]);
    let (loops, beta) = (case.settings.loops, case.settings.entropy_weight);
    let stage = stage_one(losses, gates, loops, beta);
    near(&format!("{name} loss"), stage.statistics.loss, expected["loss"][0]);
    // The gradient with respect to a token's loss is p(t) / N.
    let tokens = (case.batch * case.length) as f32;
    let pdf: Vec<f32> = exit_shares(gates, loops).iter().map(|p| p * tokens).collect();
    close(&format!("{name} exit distribution"), &pdf, &expected["exit_pdf"]);
}

#[test]
fn the_gate_learns_from_the_second_stages_loss_and_nothing_else_does() {
    for name in CASES.iter().filter(|name| **name != "one-loop") {
        let (mut case, weights, expected) = Case::read(name);
        case.settings.objective = Objective::ExitGate;
        let mut engine = Engine::new(&case.model, 2);
        let layout = engine.layout().clone();
        let mut state = TrainState::initial(&case.model, 0);
        state.weights = flat(&layout, &weights);
        state.first_moment.fill(0.5);
        engine.load(&state.weights);
        let slot = case.slot(&expected["tokens"], &expected["targets"]);
        let SlotOutput { gradient, statistics } = case.gradient(&engine, slot);
        near(&format!("{name} loss"), statistics.loss, expected["stage2_loss"][0]);
        let trained = layout.trained(Objective::ExitGate);
        assert_eq!(gradient.len(), trained.len());
        for tensor in layout.tensors() {
            match expected.get(&format!("stage2_grad.{}", tensor.name)) {
                Some(exact) => {
                    let at = tensor.offset - trained.start;
                    close(
                        &format!("{name} {}", tensor.name),
                        &gradient[at..at + tensor.len],
                        exact,
                    );
                }
                None => assert!(!trained.contains(&tensor.offset), "{name} {}", tensor.name),
            }
        }
        let before = state.clone();
        let optimizer = spec::Optimizer::default();
        engine.update(&mut state, &gradient, &optimizer, Objective::ExitGate, 1e-2);
        for tensor in layout.tensors() {
            let (then, now) = (&before.weights[tensor.range()], &state.weights[tensor.range()]);
            assert_eq!(then != now, tensor.is_exit_gate(), "{name} {}", tensor.name);
            let first = &state.first_moment[tensor.range()];
            assert!(tensor.is_exit_gate() || first.iter().all(|it| *it == 0.5), "{}", tensor.name);
        }
    }
}

#[test]
fn logits_losses_and_exits_of_every_loop() {
    for name in CASES {
        let (case, weights, expected) = Case::read(name);
        let mut engine = Engine::new(&case.model, 2);
        engine.load(&flat(engine.layout(), &weights));
        let batch = case.slot(&expected["tokens"], &expected["targets"]);
        let [inputs, targets] = batch.ids();
        let measures = engine.measure_tokens(&case.settings, &inputs, &targets, &[], case.batch);
        let TokenMeasures { losses, gates, .. } = measures;
        losses_and_exits(name, &case, &losses, &gates, &expected);
        // Logits of the sequences one by one, as generation takes them.
        let (loops, vocab) = (case.settings.loops, case.model.vocab_size);
        let mut logits = vec![Vec::new(); loops];
        for ids in batch.ids()[0].chunks(case.length) {
            let found = engine.logits(&engine.states(&case.settings, ids));
            for (logits, found) in logits.iter_mut().zip(found.chunks(case.length * vocab)) {
                logits.extend_from_slice(found);
            }
        }
        for (t, logits) in logits.iter().enumerate() {
            let key = format!("logits.{t}");
            close(&format!("{name} {key}"), logits, &expected[&key]);
        }
    }
}

#[test]
fn the_composite_has_the_logits_losses_and_exits_of_every_loop() {
    for name in CASES {
        let (case, weights, expected) = Case::read(name);
        let device = Device::flex();
        let layout = Layout::new(&case.model);
        let lm = LoopLm::new(&case.model, &layout, &flat(&layout, &weights), &device);
        let ids = |key: &str| {
            let ids: Vec<i64> = expected[key].iter().map(|&id| id as i64).collect();
            let count = ids.len();
            Tensor::<1, Int>::from_data(TensorData::new(ids, [count]), &device)
        };
        let base = case.settings.rope_base;
        let rotary = Rotary::new(case.length, case.model.head_dim(), base, &device);
        let floats = |tensor: Tensor<1>| tensor.into_data().try_into_vec::<f32>().unwrap();
        let outputs = lm.forward(ids("tokens"), case.batch, case.settings.loops, &rotary, &[]);
        let (mut losses, mut gates) = (Vec::new(), Vec::new());
        for (t, output) in outputs.into_iter().enumerate() {
            let logits = lm.logits(output.hidden.clone()).flatten::<1>(0, 1);
            let key = format!("logits.{t}");
            close(&format!("composite {name} {key}"), &floats(logits), &expected[&key]);
            losses.extend(floats(lm.cross_entropy(output.hidden, ids("targets"))));
            gates.extend(floats(output.gate));
        }
        let name = format!("composite {name}");
        losses_and_exits(&name, &case, &losses, &gates, &expected);
    }
}

#[test]
fn every_gradient_of_the_stage_one_loss() {
    for name in CASES {
        let (case, weights, expected) = Case::read(name);
        let mut engine = Engine::new(&case.model, 2);
        engine.load(&flat(engine.layout(), &weights));
        let output = case.gradient(&engine, case.slot(&expected["tokens"], &expected["targets"]));
        near(&format!("{name} loss"), output.statistics.loss, expected["loss"][0]);
        for tensor in engine.layout().tensors() {
            let exact = &expected[&format!("grad.{}", tensor.name)];
            let found = &output.gradient[tensor.range()];
            close(&format!("{name} gradient of {}", tensor.name), found, exact);
        }
    }
}

#[test]
fn eight_steps_of_adamw_track_the_reference() {
    let json = std::fs::read_to_string(golden("steps/steps.json")).unwrap();
    let json: Value = serde_json::from_str(&json).unwrap();
    let case = Case::new(&json["config"]);
    let batches = vectors("steps/batches.safetensors");
    let mut engine = Engine::new(&case.model, 2);
    let weights = flat(engine.layout(), &vectors("steps/initial.safetensors"));
    let zeros = vec![0.0; weights.len()];
    let mut state =
        TrainState { step: Step(0), weights, first_moment: zeros.clone(), second_moment: zeros };
    for (step, row) in json["steps"].as_array().unwrap().iter().enumerate() {
        engine.load(&state.weights);
        let batch = |key: &str| &batches[&format!("{key}.{step}")];
        let output = case.gradient(&engine, case.slot(batch("tokens"), batch("targets")));
        near(&format!("loss of {step}"), output.statistics.loss, row["loss"].as_f64().unwrap());
        let optimizer = spec::Optimizer::default();
        let norm = {
            let objective = case.settings.objective;
            engine.update(&mut state, &output.gradient, &optimizer, objective, case.learning_rate)
        };
        near(&format!("norm of {step}"), norm, row["grad_norm"].as_f64().unwrap());
    }
    let last = vectors("steps/final.safetensors");
    for tensor in engine.layout().tensors() {
        let found = &state.weights[tensor.range()];
        // Where a gradient is nearly zero AdamW divides rounding by rounding, so single weights may
        // differ more than their losses; each tensor as a whole must not.
        let off: f64 =
            found.iter().zip(&last[&tensor.name]).map(|(&a, &b)| (f64::from(a) - b).powi(2)).sum();
        let size: f64 = last[&tensor.name].iter().map(|b| b * b).sum();
        assert!((off / size).sqrt() < 1e-3, "{}: {:e}", tensor.name, (off / size).sqrt());
    }
}
