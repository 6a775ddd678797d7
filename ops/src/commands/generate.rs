//! `looptrain generate`, and the sample at the end of `looptrain train`.

use anyhow::{Context, Result, bail};
use looptrain_model::{Layout, Sampling, StageSettings, generate};
use looptrain_proto::{Spec, Step};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Dataset, SkippedCheckpoint, Store, Tensor, TextTokenizer,
    read_record,
};

use super::coordinator::PreparedRun;
use crate::cli::Generate;
use crate::progress::print_line;

pub(crate) async fn run(args: Generate) -> Result<()> {
    let store = Store::open_existing(&args.store)?;
    let Some(record) = read_record(&store, &args.run).await? else {
        bail!("there is no run `{}` in {}", args.run, args.store);
    };
    let spec = Spec::parse("the run record", &record.spec, &[])?;
    let Some((read, skipped)) = Checkpoints::new(&store, &args.run).newest_weights().await? else {
        bail!("run `{}` has no checkpoint yet", args.run);
    };
    for SkippedCheckpoint { step, reason } in &skipped {
        print_line(&format!("checkpoint of step {step} passed over: {reason}"));
    }
    let name = &spec.datasets[0].name;
    let dataset = Dataset::open(&store, name)
        .await?
        .with_context(|| format!("dataset `{name}`, whose tokenizer the run uses, is gone"))?;
    let writer = Writer {
        spec: &spec,
        tokenizer: dataset.tokenizer().await?,
        temperature: args.temperature,
        tokens: args.tokens,
        seed: args.seed,
    };
    println!("{}{}", args.prompt, writer.text(read, &args.prompt).await?);
    Ok(())
}

/// Prints the sample that the spec asks for.
pub(crate) async fn print_sample(run: &PreparedRun, step: Step) -> Result<()> {
    let sample = &run.spec.sample;
    let writer = Writer {
        spec: &run.spec,
        tokenizer: run.datasets[0].tokenizer().await?,
        temperature: sample.temperature,
        tokens: sample.tokens,
        seed: run.spec.run.seed,
    };
    let read = Checkpoints::new(&run.store, &run.spec.run.name).weights(step).await?;
    println!("sample: {}{}", sample.prompt, writer.text(read, &sample.prompt).await?);
    Ok(())
}

/// What it takes to continue a text with a run's checkpoint.
struct Writer<'a> {
    spec: &'a Spec,
    tokenizer: TextTokenizer,
    temperature: f64,
    tokens: usize,
    seed: u64,
}

impl Writer<'_> {
    async fn text(
        &self,
        (manifest, tensors): (CheckpointManifest, Vec<Tensor>),
        prompt: &str,
    ) -> Result<String> {
        let step = manifest.step;
        let layout = Layout::new(&self.spec.model);
        let mut weights = vec![0.0; layout.parameters()];
        for entry in layout.tensors() {
            let place = tensors
                .binary_search_by(|tensor| tensor.name.as_str().cmp(&entry.name))
                .ok()
                .filter(|&place| tensors[place].shape == entry.shape);
            let Some(place) = place else {
                bail!("the checkpoint of step {step} has no {} {:?}", entry.name, entry.shape);
            };
            weights[entry.range()].copy_from_slice(&tensors[place].data);
        }
        let mut prompt = self.tokenizer.encode(prompt)?;
        if prompt.is_empty() {
            prompt.push(self.tokenizer.end_of_text());
        }
        let stage = &self.spec.stages[self.spec.stage_of(step)];
        let sampling = Sampling {
            tokens: self.tokens,
            temperature: self.temperature,
            seed: self.seed,
            context: stage.sequence_length,
            stop: self.tokenizer.end_of_text(),
            vocabulary: self.tokenizer.vocabulary_size(),
        };
        let (model, settings) = (self.spec.model.clone(), StageSettings::from(stage));
        let tokens = tokio::task::spawn_blocking(move || {
            generate(&model, &weights, &settings, &prompt, &sampling)
        })
        .await
        .context("generation failed")?;
        Ok(self.tokenizer.decode(&tokens)?)
    }
}
