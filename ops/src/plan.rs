//! What a spec asks for, before anything of it is done: `looptrain train --dry-run`.

use anyhow::{Context, Result};
use indicatif::{BinaryBytes, HumanCount};
use looptrain_model::{Device, Gpu};
use looptrain_proto::Spec;
use looptrain_proto::spec::{Decay, operations_per_token};
use looptrain_worker::worker_bytes;
use serde_json::{Value, json};

use crate::cli::DryRun;

/// Bytes of a parameter in a checkpoint: weight and two moments.
pub(crate) const CHECKPOINT_BYTES: u64 = 12;

/// The plan as JSON: what the table shows, and more exactly.
pub(crate) fn plan(spec: &Spec, options: &DryRun, threads: u32) -> Result<Value> {
    let per_hour = options.mfu * options.peak_tflops * 1e12 * 3600.0;
    let mut stages = Vec::new();
    let (mut steps, mut tokens, mut operations) = (0, 0, 0.0);
    for (index, stage) in spec.stages.iter().enumerate() {
        let of_stage = stage.tokens_in(stage.steps);
        let flops = of_stage as f64 * operations_per_token(&spec.model, stage);
        let memory = |device| -> Result<Value> {
            let [none, by_loop, by_layer] = worker_bytes(spec, stage, device, threads as usize)
                .with_context(|| format!("the memory of stages.{index}"))?;
            Ok(json!({ "none": none, "loop": by_loop, "layer": by_layer }))
        };
        let rate = &stage.learning_rate;
        let batch = |step| {
            let slots = u64::from(stage.slots_at(step));
            slots * (stage.slot_sequences * stage.sequence_length) as u64
        };
        let mixture: Vec<Value> = (spec.mixture(index).into_iter())
            .map(|(dataset, weight)| json!({ "dataset": spec.datasets[dataset].name, "weight": weight }))
            .collect();
        stages.push(json!({
            "name": stage.name,
            "steps": stage.steps,
            "tokens": of_stage,
            "sequence_length": stage.sequence_length,
            "batch_tokens": [batch(0), batch(stage.steps - 1)],
            "loops": stage.loops,
            "entropy_weight": stage.entropy_weight,
            "rope_base": stage.rope_base,
            "learning_rate": {
                "peak": rate.peak,
                "warmup_steps": rate.warmup_steps,
                "decay_steps": rate.decay_steps,
                "decay": match rate.decay { Decay::Linear => "linear", Decay::Cosine => "cosine" },
                "last": rate.at(stage.steps.saturating_sub(1), stage.steps),
            },
            "mixture": mixture,
            "flops": flops,
            "gpu_hours": flops / per_hour,
            // Kernels for a GPU do not exist for every shape.
            "gpu_bytes": memory(Device::Cuda(Gpu::Number(0))).unwrap_or(Value::Null),
            "cpu_bytes": memory(Device::Cpu)?,
        }));
        steps += stage.steps;
        tokens += of_stage;
        operations += flops;
    }
    let parameters = spec.model.parameters();
    Ok(json!({
        "run": spec.run.name,
        "parameters": parameters,
        "steps": steps,
        "tokens": tokens,
        "flops": operations,
        "mfu": options.mfu,
        "peak_tflops": options.peak_tflops,
        "gpu_hours": operations / per_hour,
        "threads": threads,
        "checkpoint_bytes": CHECKPOINT_BYTES * parameters,
        "checkpoints": steps.div_ceil(spec.checkpoint.every_steps),
        "export_bytes": { "bf16": 2 * parameters, "f32": 4 * parameters },
        "stages": stages,
    }))
}

/// The plan for people.
pub(crate) fn print(plan: &Value) {
    let whole = |value: &Value| value.as_u64().unwrap_or(0);
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let count = |value: &Value| HumanCount(whole(value));
    let bytes = |value: &Value| BinaryBytes(whole(value));
    outln!(
        "run {}: {} parameters, {} steps, {} tokens",
        plan["run"].as_str().unwrap_or_default(),
        count(&plan["parameters"]),
        count(&plan["steps"]),
        count(&plan["tokens"]),
    );
    for stage in plan["stages"].as_array().into_iter().flatten() {
        let [first, last] = [0, 1].map(|at| whole(&stage["batch_tokens"][at]));
        let batch = match first == last {
            true => format!("{}", HumanCount(last)),
            false => format!("{} to {}", HumanCount(first), HumanCount(last)),
        };
        let rate = &stage["learning_rate"];
        let mut schedule = format!("{:e}", number(&rate["peak"]));
        if whole(&rate["warmup_steps"]) > 0 {
            schedule = format!("warm-up of {} steps to {schedule}", count(&rate["warmup_steps"]));
        }
        if whole(&rate["decay_steps"]) > 0 {
            let (steps, shape) = (count(&rate["decay_steps"]), rate["decay"].as_str());
            let shape = shape.unwrap_or_default();
            schedule = format!(
                "{schedule}, {shape} decay over {steps} steps to {:e}",
                number(&rate["last"])
            );
        }
        outln!("\nstage {}", stage["name"].as_str().unwrap_or_default());
        outln!(
            "  {} steps of {batch} tokens, {} in all",
            count(&stage["steps"]),
            count(&stage["tokens"])
        );
        outln!(
            "  sequences of {}, {} loops, beta {}, RoPE base {}",
            count(&stage["sequence_length"]),
            stage["loops"],
            stage["entropy_weight"],
            number(&stage["rope_base"]),
        );
        outln!("  learning rate: {schedule}");
        let mixture: Vec<String> = (stage["mixture"].as_array().into_iter().flatten())
            .map(|part| {
                format!("{} {}", part["dataset"].as_str().unwrap_or_default(), part["weight"])
            })
            .collect();
        outln!("  data: {}", mixture.join(", "));
        outln!(
            "  {:.3e} FLOPs, {:.0} GPU-hours",
            number(&stage["flops"]),
            number(&stage["gpu_hours"])
        );
        for (name, what) in [
            ("gpu_bytes", "a GPU".to_owned()),
            ("cpu_bytes", format!("{} CPU threads", plan["threads"])),
        ] {
            let memory = &stage[name];
            if memory.is_null() {
                outln!("  memory of {what}: there are no kernels for this");
                continue;
            }
            outln!(
                "  memory of {what}: {}, or {} with a loop at a time computed again, {} with a layer",
                bytes(&memory["none"]),
                bytes(&memory["loop"]),
                bytes(&memory["layer"]),
            );
        }
    }
    outln!(
        "\nin all {:.3e} FLOPs: {:.0} GPU-hours at {:.0}% of {} TFLOP/s",
        number(&plan["flops"]),
        number(&plan["gpu_hours"]),
        100.0 * number(&plan["mfu"]),
        number(&plan["peak_tflops"]),
    );
    outln!(
        "{} checkpoints of {} (weights and moments); exported {} in bf16, {} in f32",
        count(&plan["checkpoints"]),
        bytes(&plan["checkpoint_bytes"]),
        bytes(&plan["export_bytes"]["bf16"]),
        bytes(&plan["export_bytes"]["f32"]),
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn plan_of(name: &str) -> Value {
        let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let spec = Spec::load(&examples.join(name), &[]).unwrap();
        plan(&spec, &DryRun { mfu: 0.4, peak_tflops: 989.0 }, 2).unwrap()
    }

    #[test]
    fn the_published_recipes_have_the_published_tokens_and_sizes() {
        let one = plan_of("ouro-1.4b.toml");
        assert_eq!(one["parameters"], 1_434_652_673_u64);
        let trillions = one["tokens"].as_f64().unwrap() / 1e12;
        assert!((trillions - 7.72).abs() < 1e-3, "{trillions}");
        let stages = one["stages"].as_array().unwrap();
        let loops: Vec<_> = stages.iter().map(|stage| stage["loops"].as_u64().unwrap()).collect();
        assert_eq!(loops, [8, 4, 4, 4, 4]);
        assert_eq!(stages[0]["batch_tokens"], json!([1 << 22, 1 << 23]));
        assert!(
            stages.iter().skip(1).all(|stage| stage["batch_tokens"] == json!([1 << 23, 1 << 23]))
        );
        // Cosines go from a stage's first step to its last.
        for (stage, last) in [(2, 3e-5), (4, 1e-5)] {
            let rate = &stages[stage]["learning_rate"];
            assert_eq!(
                (&rate["decay_steps"], &rate["last"]),
                (&stages[stage]["steps"], &json!(last))
            );
        }
        // Of one slot with nothing computed again, 80 GB are enough.
        let bytes = stages[1]["gpu_bytes"]["none"].as_u64().unwrap();
        assert!((40 << 30..74 << 30).contains(&bytes), "{bytes}");

        let two = plan_of("ouro-2.6b.toml");
        assert_eq!(two["parameters"], 2_667_974_657_u64);
        assert_eq!(two["stages"].as_array().unwrap().len(), 4);
        let longer =
            two["stages"][0]["flops"].as_f64().unwrap() / stages[1]["flops"].as_f64().unwrap();
        assert!((1.8..2.0).contains(&longer), "all but the head is there twice: {longer}");
    }

    #[test]
    fn a_ramp_that_takes_the_whole_stage_does_not_come_to_its_end() {
        let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let given = ["stages.0.steps=40".to_owned()];
        let spec = Spec::load(&examples.join("recipe.toml"), &given).unwrap();
        let plan = plan(&spec, &DryRun { mfu: 0.4, peak_tflops: 989.0 }, 2).unwrap();
        // 4 slots of 32 tokens, and 7 of the 8 in the last step.
        assert_eq!(plan["stages"][0]["batch_tokens"], json!([128, 224]));
    }

    #[test]
    fn a_stage_that_trains_the_gate_has_its_memory_and_keeps_nothing_to_compute_again() {
        let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let given = ["stages.2.objective=exit-gate".to_owned()];
        let spec = Spec::load(&examples.join("ouro-1.4b.toml"), &given).unwrap();
        let plan = plan(&spec, &DryRun { mfu: 0.4, peak_tflops: 989.0 }, 2).unwrap();
        for device in ["gpu_bytes", "cpu_bytes"] {
            let bytes = |mode: &str| plan["stages"][2][device][mode].as_u64().unwrap();
            assert_eq!(bytes("none"), bytes("layer"), "{device}");
            let language = plan["stages"][3][device]["none"].as_u64().unwrap();
            assert!(bytes("none") < language, "{device}");
        }
    }

    #[test]
    fn a_token_takes_six_operations_for_each_use_of_a_parameter() {
        let one = plan_of("ouro-1.4b.toml");
        let stage = &one["stages"][1];
        let per_token = stage["flops"].as_f64().unwrap() / stage["tokens"].as_f64().unwrap();
        let uses =
            4.0 * (24.0 * (4.0 * 2048.0 * 2048.0 + 3.0 * 2048.0 * 5632.0) + 49_152.0 * 2048.0);
        let attention = 6.0 * 4.0 * 24.0 * 2048.0 * 4097.0;
        assert!((per_token / (6.0 * uses + attention) - 1.0).abs() < 1e-9);
    }
}
