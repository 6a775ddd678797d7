//! `looptrain export`.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::HumanBytes;
use looptrain_model::Layout;
use looptrain_proto::{Spec, Step};
use looptrain_storage::{CheckpointManifest, Checkpoints, Store, StoredTensor, read_record};

use crate::cli::{CheckpointUrl, Export};
use crate::folder::{Config, NewFolder, Tokens, WeightsFile};
use crate::progress::print_line;
use crate::trained::drawn_from;

pub(crate) async fn run(args: Export) -> Result<()> {
    let begin = Instant::now();
    let CheckpointUrl { store: url, run, step } = &args.checkpoint;
    let store = Store::open_existing(url)?;
    let Some(record) = read_record(&store, run).await? else {
        bail!("there is no run `{run}` in {url}");
    };
    let spec = Spec::parse("the run record", &record.spec, &[])?;
    let checkpoints = Checkpoints::new(&store, run);
    let step = match step {
        Some(step) => *step,
        None => newest(&checkpoints, run).await?,
    };
    let drawn = drawn_from(&store, &spec, &record.datasets, step);
    let dataset =
        drawn.first().context("the spec of the run draws from no dataset")?.open().await?;
    let tokenizer = dataset.tokenizer_json().await?;
    let tokens = Tokens::find(&tokenizer, dataset.manifest().end_of_text)?;
    let stage = &spec.stages[spec.stage_of(step)];
    let config = Config { model: &spec.model, stage, tokens: &tokens, float: args.dtype };

    let folder = NewFolder::begin(&args.to)?;
    let pretty = |json: serde_json::Value| serde_json::to_vec_pretty(&json);
    folder.write("config.json", &pretty(config.config())?)?;
    folder.write("generation_config.json", &pretty(config.generation())?)?;
    folder.write("tokenizer.json", &tokenizer)?;
    folder.write("tokenizer_config.json", &pretty(config.tokenizer())?)?;
    folder.write("special_tokens_map.json", &pretty(config.special_tokens())?)?;
    let hold = checkpoints.hold(step).await;
    let written = write_weights(&checkpoints, &spec, step, &args, &folder).await;
    hold.release().await;
    let (manifest, bytes) = written?;
    folder.finish()?;
    println!(
        "exported run={run} step={step} weights={} dtype={} bytes={bytes} to={}",
        manifest.weights_digest,
        args.dtype.torch_name(),
        args.to.display()
    );
    let (size, seconds) = (HumanBytes(bytes), begin.elapsed().as_secs_f64());
    print_line(&format!("{size} of weights in {seconds:.1} s"));
    Ok(())
}

/// The step of the newest checkpoint that has a manifest: its weights are checked as they are read.
async fn newest(checkpoints: &Checkpoints, run: &str) -> Result<Step> {
    let steps = checkpoints.list().await?;
    steps.last().copied().with_context(|| format!("run `{run}` has no checkpoint yet"))
}

/// Streams the weights into the folder; the manifest, and the size of the file.
async fn write_weights(
    checkpoints: &Checkpoints,
    spec: &Spec,
    step: Step,
    args: &Export,
    folder: &NewFolder,
) -> Result<(CheckpointManifest, u64)> {
    let (manifest, weights) = checkpoints.stored_weights(step).await?;
    check(&weights, &Layout::new(&spec.model), step)?;
    let mut file = WeightsFile::create(&folder.path("model.safetensors"), &weights, args.dtype)?;
    let add = |_, values: &[u8]| file.add(values);
    checkpoints.read_weights::<anyhow::Error>(&manifest, &weights, add).await?;
    Ok((manifest, file.finish()?))
}

/// Whether these are the tensors of the model.
fn check(weights: &[StoredTensor], layout: &Layout, step: Step) -> Result<()> {
    let shape = |name: &str| weights.iter().find(|it| it.name == name).map(|it| &it.shape);
    for tensor in layout.tensors() {
        match shape(&tensor.name) {
            Some(shape) if *shape == tensor.shape => {}
            Some(shape) => bail!(
                "the checkpoint of step {step} has {} {shape:?}, the spec says {:?}",
                tensor.name,
                tensor.shape
            ),
            None => bail!("the checkpoint of step {step} has no {}", tensor.name),
        }
    }
    if weights.len() != layout.tensors().len() {
        bail!("the checkpoint of step {step} has tensors that the model has not");
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use looptrain_proto::Digest;
    use looptrain_storage::{Register, RunRecord, Synthetic, synthetic};

    use super::*;
    use crate::folder::Float;

    /// A spec whose second stage draws from its second dataset.
    const SPEC: &str = r#"
        [run]
        name = "r"
        store = "memory://export"
        [model]
        hidden_size = 16
        num_hidden_layers = 1
        num_attention_heads = 2
        intermediate_size = 24
        vocab_size = 300
        [[datasets]]
        name = "first"
        [[datasets]]
        name = "second"
        [[stages]]
        name = "one"
        steps = 4
        sequence_length = 8
        slots = 4
        slot_sequences = 2
        loops = 2
        entropy_weight = 0.05
        learning_rate = { peak = 1e-2 }
        mixture = [{ dataset = "first", weight = 1 }]
        [[stages]]
        name = "two"
        steps = 4
        sequence_length = 8
        slots = 4
        slot_sequences = 2
        loops = 2
        entropy_weight = 0.05
        learning_rate = { peak = 1e-2 }
        mixture = [{ dataset = "second", weight = 1 }]
    "#;

    #[tokio::test]
    async fn the_tokenizer_is_that_of_the_data_that_the_step_was_trained_on() {
        let store = Store::open("memory://export").unwrap();
        let what = Synthetic { tokens: 9000, shard_tokens: 9000, vocabulary_size: 300 };
        let mut pins = BTreeMap::new();
        for name in ["first", "second"] {
            let dataset = synthetic(&store, name, what).await.unwrap();
            pins.insert(name.to_owned(), dataset.digest());
        }
        let spec = Spec::parse("export.toml", SPEC, &[]).unwrap();
        let record = |pins: BTreeMap<String, Digest>| {
            let pins: Vec<_> = pins.into_iter().collect();
            RunRecord::new(spec.trajectory_digest(), SPEC.to_owned(), &pins)
        };
        let export = async |step: u64| {
            let checkpoint = CheckpointUrl {
                store: "memory://export".into(),
                run: "r".into(),
                step: Some(Step(step)),
            };
            let directory = tempfile::tempdir().unwrap();
            let args = Export { checkpoint, to: directory.path().join("out"), dtype: Float::F32 };
            run(args).await.unwrap_err().to_string()
        };
        Register::claim(&store, "r", |_| Ok(record(pins.clone()))).await.unwrap();
        // A dataset for measurements has a name for its tokenizer, but no file.
        for (step, name) in [(4, "datasets/first/tokenizer-"), (5, "datasets/second/tokenizer-")] {
            let error = export(step).await;
            assert!(error.contains(name), "{error}");
        }
        pins.insert("second".into(), Digest::of(b"other"));
        Register::claim(&store, "r", |_| Ok(record(pins.clone()))).await.unwrap();
        let error = export(5).await;
        assert!(error.contains("`second` is not what the run was trained on"), "{error}");
    }
}
