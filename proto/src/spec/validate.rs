//! What makes a spec consistent. Each rule gives (dotted key, what is wrong and what to do).

use std::collections::HashSet;

use super::{Branch, Dataset, Model, Objective, Source, Spec, Stage};
use crate::MAX_SLOTS;

type Complaint = (String, String);

/// Tokens of a shard at most: 128 MiB of them at 32 bits.
pub(super) const MAX_SHARD_TOKENS: u64 = 1 << 25;

/// No count in a spec is above this, so that products of three of them fit 64 bits.
pub(super) const MAX_COUNT: u64 = 1 << 40;
/// No dimension of a model is above this, so that products of two of them fit 64 bits.
pub(super) const MAX_DIMENSION: usize = 1 << 24;
/// Layers of a stack at most: far above any use, and few enough to be listed.
pub(super) const MAX_LAYERS: usize = 4096;
/// Loops at most, for the same reason.
pub(super) const MAX_LOOPS: u64 = 1024;
/// Tokens per step at most: far above any use, far below what wraps.
const MAX_STEP_TOKENS: u64 = 1 << 40;
/// Tokens of a stage at most, and of all of them: their count, and that of the sequences, fits 64 bits.
const MAX_STAGE_TOKENS: u64 = 1 << 61;
/// Far above the slots of any step that these could share.
pub(super) const MAX_WORKERS: u32 = 4096;
/// As many as there are buckets of a gradient at most, so that more would be idle.
pub(super) const MAX_STREAMS: u32 = 16;
/// A longer silence than a day is no time-out.
pub(super) const MAX_TIMEOUT: f64 = 86_400.0;
/// No machine has as much, and in bytes it fits 64 bits.
pub(super) const MAX_MEMORY_GIB: f64 = 1e6;
/// No batch grows for longer.
pub(super) const MAX_RAMP: u64 = 1 << 20;
/// Nobody's memory for spikes reaches further back.
pub(super) const MAX_WINDOW: u64 = 1 << 20;
/// Sum of a mixture's weights up to which its shares are exact.
pub(super) const MAX_WEIGHTS: u64 = 1 << 20;

macro_rules! require {
    ($condition:expr, $key:expr, $($message:tt)+) => {
        if !$condition {
            return Err(($key.to_string(), format!($($message)+)));
        }
    };
}

pub(super) fn validate(spec: &Spec) -> Result<(), Complaint> {
    run(spec)?;
    model(&spec.model)?;
    if let Some(initial) = &spec.initial {
        let name = &initial.model;
        require!(
            is_name(name),
            "initial.model",
            "`{name}` is no name; use letters, digits, `.`, `_` and `-`, not starting with `.`"
        );
    }
    if let Some(of) = &spec.branch {
        branch(spec, of)?;
    }
    optimizer(spec)?;
    datasets(&spec.datasets, &spec.model)?;
    require!(!spec.stages.is_empty(), "stages", "a run needs at least one [[stages]]");
    for (index, part) in spec.stages.iter().enumerate() {
        stage(spec, index, part)?;
    }
    require!(spec.checkpoint.every_steps > 0, "checkpoint.every_steps", "must be at least 1");
    require!(spec.checkpoint.keep > 0, "checkpoint.keep", "must be at least 1");
    require!(spec.evaluation.sequences > 0, "evaluation.sequences", "must be at least 1");
    let passed_over = spec.branch.as_ref().map_or(0, |branch| branch.skip_steps);
    let tokens = spec.stages.iter().map(|stage| {
        let step = u128::from(stage.slots) * (stage.slot_sequences * stage.sequence_length) as u128;
        step * (u128::from(stage.steps) + u128::from(passed_over))
    });
    let tokens: u128 = tokens.sum();
    require!(
        tokens <= u128::from(MAX_STAGE_TOKENS),
        "stages",
        "all together have {tokens} tokens, more than {MAX_STAGE_TOKENS}; use fewer steps"
    );
    let heat = spec.sample.temperature;
    require!(
        heat.is_finite() && heat >= 0.0,
        "sample.temperature",
        "must be 0 or more, not {heat}"
    );
    Ok(())
}

/// Whether a run or a dataset may be called so.
#[must_use]
pub fn is_name(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('.')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

fn run(spec: &Spec) -> Result<(), Complaint> {
    let name = &spec.run.name;
    require!(
        is_name(name),
        "run.name",
        "`{name}` is no name; use letters, digits, `.`, `_` and `-`, not starting with `.`"
    );
    let store = &spec.run.store;
    require!(
        store.contains("://"),
        "run.store",
        "`{store}` is no URL; write file://PATH s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
    );
    let cluster = &spec.cluster;
    require!(
        (1..=MAX_WORKERS).contains(&cluster.workers),
        "cluster.workers",
        "must be between 1 and {MAX_WORKERS}, not {}",
        cluster.workers
    );
    let most = cluster.max_workers;
    require!(
        most == 0 || (cluster.workers..=MAX_WORKERS).contains(&most),
        "cluster.max_workers",
        "must be 0 or between cluster.workers = {} and {MAX_WORKERS}, not {most}",
        cluster.workers
    );
    let factor = cluster.straggler_factor;
    require!(
        factor.is_finite() && factor > 1.0,
        "cluster.straggler_factor",
        "must be above 1, not {factor}"
    );
    let peak = cluster.peak_tflops;
    require!(
        peak.is_finite() && peak >= 0.0,
        "cluster.peak_tflops",
        "must be 0 or more, not {peak}"
    );
    let share = cluster.drain_below;
    require!(
        (0.0..1.0).contains(&share),
        "cluster.drain_below",
        "must be at least 0 and below 1, not {share}"
    );
    let timeout = cluster.worker_timeout;
    require!(
        (0.1..=MAX_TIMEOUT).contains(&timeout),
        "cluster.worker_timeout",
        "must be between 0.1 and {MAX_TIMEOUT} seconds, not {timeout}"
    );
    let bits = cluster.fraction_bits;
    require!(
        (16..=52).contains(&bits),
        "cluster.fraction_bits",
        "must be between 16 and 52, not {bits}: fewer lose small gradients, more overflow large ones"
    );
    let streams = cluster.streams;
    require!(
        (1..=MAX_STREAMS).contains(&streams),
        "cluster.streams",
        "must be between 1 and {MAX_STREAMS}, not {streams}"
    );
    let memory = spec.compute.memory_gib;
    require!(
        (0.0..=MAX_MEMORY_GIB).contains(&memory),
        "compute.memory_gib",
        "must be between 0 (what the machine has) and {MAX_MEMORY_GIB}, not {memory}"
    );
    Ok(())
}

fn model(model: &Model) -> Result<(), Complaint> {
    for (key, value, most) in [
        ("hidden_size", model.hidden_size, MAX_DIMENSION),
        ("num_hidden_layers", model.num_hidden_layers, MAX_LAYERS),
        ("num_attention_heads", model.num_attention_heads, MAX_DIMENSION),
        ("intermediate_size", model.intermediate_size, MAX_DIMENSION),
        ("vocab_size", model.vocab_size, MAX_DIMENSION),
    ] {
        require!(
            (1..=most).contains(&value),
            format!("model.{key}"),
            "must be between 1 and {most}, not {value}"
        );
    }
    let (hidden, heads) = (model.hidden_size, model.num_attention_heads);
    require!(
        hidden.is_multiple_of(heads),
        "model.num_attention_heads",
        "{heads} heads do not divide model.hidden_size = {hidden}; choose a divisor"
    );
    require!(
        model.head_dim().is_multiple_of(2),
        "model.num_attention_heads",
        "{heads} heads of model.hidden_size = {hidden} have the odd dimension {}; rotary embedding needs an even one",
        model.head_dim()
    );
    let eps = model.rms_norm_eps;
    require!(eps > 0.0 && eps < 1.0, "model.rms_norm_eps", "must be between 0 and 1, not {eps}");
    let range = model.initializer_range;
    require!(
        range.is_finite() && range > 0.0,
        "model.initializer_range",
        "must be above 0, not {range}"
    );
    Ok(())
}

fn branch(spec: &Spec, branch: &Branch) -> Result<(), Complaint> {
    let Branch { run: name, step, sequences, skip_steps, .. } = branch;
    require!(
        is_name(name),
        "branch.run",
        "`{name}` is no name; use letters, digits, `.`, `_` and `-`, not starting with `.`"
    );
    require!(
        *name != spec.run.name,
        "branch.run",
        "a run is no branch of itself; give this one another run.name"
    );
    require!(
        spec.initial.is_none(),
        "branch",
        "there is [initial] as well; leave it out, for a branch has the weights of its checkpoint"
    );
    let total = spec.stages.iter().fold(0_u64, |sum, stage| sum.saturating_add(stage.steps));
    require!(
        (1..total).contains(step),
        "branch.step",
        "must be between 1 and the step before the last of the stages, {total}, not {step}"
    );
    require!(
        *skip_steps <= MAX_COUNT,
        "branch.skip_steps",
        "must be {MAX_COUNT} at most, not {skip_steps}"
    );
    let sequences = sequences.unwrap_or(0);
    require!(
        sequences <= MAX_COUNT,
        "branch.sequences",
        "must be {MAX_COUNT} at most, not {sequences}"
    );
    Ok(())
}

fn optimizer(spec: &Spec) -> Result<(), Complaint> {
    let optimizer = &spec.optimizer;
    for (key, value) in [("beta1", optimizer.beta1), ("beta2", optimizer.beta2)] {
        require!(
            (0.0..1.0).contains(&value),
            format!("optimizer.{key}"),
            "must be at least 0 and below 1, not {value}"
        );
    }
    for (key, value, least) in [
        ("epsilon", optimizer.epsilon, f64::MIN_POSITIVE),
        ("weight_decay", optimizer.weight_decay, 0.0),
        ("clip_norm", optimizer.clip_norm, f64::MIN_POSITIVE),
    ] {
        require!(
            value.is_finite() && value >= least,
            format!("optimizer.{key}"),
            "must be {} 0, not {value}",
            if least > 0.0 { "above" } else { "at least" }
        );
    }
    if let Some(spikes) = &optimizer.spikes {
        let (deviations, window) = (spikes.deviations, spikes.window);
        require!(
            deviations.is_finite() && deviations > 0.0,
            "optimizer.spikes.deviations",
            "must be above 0, not {deviations}"
        );
        require!(
            (2..=MAX_WINDOW).contains(&window),
            "optimizer.spikes.window",
            "must be between 2 and {MAX_WINDOW}, not {window}"
        );
    }
    Ok(())
}

fn datasets(datasets: &[Dataset], model: &Model) -> Result<(), Complaint> {
    require!(!datasets.is_empty(), "datasets", "a run needs at least one [[datasets]]");
    let mut names = HashSet::new();
    for (index, dataset) in datasets.iter().enumerate() {
        let key = |name: &str| format!("datasets.{index}.{name}");
        let name = &dataset.name;
        require!(
            is_name(name),
            key("name"),
            "`{name}` is no name; use letters, digits, `.`, `_` and `-`, not starting with `.`"
        );
        require!(names.insert(name), key("name"), "`{name}` is there twice; rename one");
        let Some(source) = &dataset.source else { continue };
        source.check().map_err(|(name, reason)| (key(&format!("source.{name}")), reason))?;
        let vocabulary = source.tokenizer_vocabulary;
        require!(
            source.tokenizer.is_some() || vocabulary <= model.vocab_size,
            key("source.tokenizer_vocabulary"),
            "{vocabulary} is larger than model.vocab_size = {}; raise that or lower this",
            model.vocab_size
        );
    }
    Ok(())
}

impl Model {
    /// Whether there is such a model.
    ///
    /// # Errors
    /// The key at fault, and what is wrong with it.
    pub fn check(&self) -> Result<(), (String, String)> {
        model(self)
    }
}

impl Source {
    /// Whether the options are consistent.
    ///
    /// # Errors
    /// The key at fault, and what is wrong with it.
    pub fn check(&self) -> Result<(), (String, String)> {
        require!(!self.paths.is_empty(), "paths", "name a file or a directory");
        require!(!self.field.is_empty(), "field", "name the field that holds the text");
        let fraction = self.validation_fraction;
        require!(
            fraction > 0.0 && fraction < 1.0,
            "validation_fraction",
            "must be between 0 and 1, not {fraction}"
        );
        let share = self.max_malformed;
        require!(
            (0.0..=1.0).contains(&share),
            "max_malformed",
            "must be a share from 0 to 1, not {share}"
        );
        let vocabulary = self.tokenizer_vocabulary;
        require!(
            vocabulary >= 260,
            "tokenizer_vocabulary",
            "{vocabulary} is too small: 256 bytes and the special tokens need 260"
        );
        require!(
            self.end_of_text.is_none() || self.tokenizer.is_some(),
            "end_of_text",
            "a tokenizer that is trained has its own; name a tokenizer or leave this out"
        );
        for (name, value) in [
            ("max_bytes", self.max_bytes),
            ("tokenizer_bytes", self.tokenizer_bytes),
            ("shard_tokens", self.shard_tokens),
        ] {
            require!(value > 0, name, "must be at least 1");
        }
        require!(
            self.shard_tokens <= MAX_SHARD_TOKENS,
            "shard_tokens",
            "must be {MAX_SHARD_TOKENS} at most: shards are made and read in memory"
        );
        Ok(())
    }
}

fn stage(spec: &Spec, index: usize, stage: &Stage) -> Result<(), Complaint> {
    let key = |name: &str| format!("stages.{index}.{name}");
    for (name, value, most) in [
        ("steps", stage.steps, MAX_COUNT),
        ("sequence_length", stage.sequence_length as u64, MAX_COUNT),
        ("slots", u64::from(stage.slots), MAX_COUNT),
        ("slot_sequences", stage.slot_sequences as u64, MAX_COUNT),
        ("loops", stage.loops as u64, MAX_LOOPS),
    ] {
        require!(
            (1..=most).contains(&value),
            key(name),
            "must be between 1 and {most}, not {value}"
        );
    }
    let tokens = u128::from(stage.slots)
        * stage.slot_sequences as u128
        * (stage.sequence_length as u128 + 1);
    require!(
        tokens <= u128::from(MAX_STEP_TOKENS),
        key("slot_sequences"),
        "slots x slot_sequences x sequence_length is {tokens} tokens per step; use smaller steps"
    );
    require!(
        stage.slots <= MAX_SLOTS,
        key("slots"),
        "{} slots are more than the {MAX_SLOTS} that fixed point can add up; make slots larger",
        stage.slots
    );
    let all = tokens.saturating_mul(u128::from(stage.steps));
    require!(
        all <= u128::from(MAX_STAGE_TOKENS),
        key("steps"),
        "{} steps of {tokens} tokens are more than {MAX_STAGE_TOKENS} tokens; use fewer",
        stage.steps
    );
    if let Some(ramp) = &stage.ramp {
        require!(
            (1..=stage.slots).contains(&ramp.slots),
            key("ramp.slots"),
            "must be between 1 and the {} slots that it leads to, not {}",
            stage.slots,
            ramp.slots
        );
        require!(
            (1..=MAX_RAMP).contains(&ramp.steps),
            key("ramp.steps"),
            "must be between 1 and {MAX_RAMP}, not {}",
            ramp.steps
        );
    }
    let weight = stage.entropy_weight;
    require!(
        weight.is_finite() && weight >= 0.0,
        key("entropy_weight"),
        "must be at least 0, not {weight}"
    );
    require!(
        stage.objective == Objective::Language || stage.loops > 1,
        key("objective"),
        "an exit gate has nothing to choose from with one loop; train it with more"
    );
    let base = stage.rope_base;
    require!(base.is_finite() && base > 1.0, key("rope_base"), "must be above 1, not {base}");
    let rate = &stage.learning_rate;
    for (name, value) in [("peak", rate.peak), ("last", rate.last)] {
        require!(
            value.is_finite() && value >= 0.0,
            key(&format!("learning_rate.{name}")),
            "must be at least 0, not {value}"
        );
    }
    require!(
        rate.warmup_steps.saturating_add(rate.decay_steps) <= stage.steps,
        key("learning_rate"),
        "warmup_steps = {} and decay_steps = {} are more than the stage's {} steps",
        rate.warmup_steps,
        rate.decay_steps,
        stage.steps
    );
    require!(
        !stage.mixture.is_empty() || spec.datasets.len() == 1,
        key("mixture"),
        "the spec has {} datasets; say which ones this stage draws from",
        spec.datasets.len()
    );
    for (place, part) in stage.mixture.iter().enumerate() {
        let key = key(&format!("mixture.{place}"));
        require!(
            spec.datasets.iter().any(|dataset| dataset.name == part.dataset),
            key,
            "there is no dataset `{}`; add a [[datasets]] of that name",
            part.dataset
        );
        require!(part.weight > 0, key, "the weight must be at least 1");
    }
    let weights: u64 = stage.mixture.iter().map(|part| u64::from(part.weight)).sum();
    require!(
        weights <= MAX_WEIGHTS,
        key("mixture"),
        "the weights add up to {weights}, more than {MAX_WEIGHTS}; use smaller numbers"
    );
    Ok(())
}
