//! Whether the store has what the spec draws from and goes on with.

use std::path::Path;

use looptrain_proto::Spec;
use looptrain_proto::spec::{Branch, Source};
use looptrain_storage::{Dataset, RunRecord, Split, Store, check_fit, read_record};

use super::Finding;
use crate::commands::import::{check_branch, check_initial};

/// Tokens that are read to see whether shards can be read.
const GLANCE: usize = 16;

pub(super) async fn check(
    spec: Option<&Spec>,
    store: Option<&Store>,
    numerics: Option<&str>,
) -> Vec<Finding> {
    let (Some(spec), Some(store)) = (spec, store) else {
        return vec![Finding::not_checked("datasets", "there is no store to look into")];
    };
    let mut findings = Vec::new();
    let mut datasets = Vec::new();
    for wanted in &spec.datasets {
        let (dataset, finding) = dataset(store, spec, &wanted.name, wanted.source.as_ref()).await;
        findings.push(finding);
        datasets.extend(dataset);
    }
    findings.push(match datasets.len() == spec.datasets.len() {
        true => sequences(spec, &datasets),
        false => Finding::not_checked("sequences", "some datasets are not there"),
    });
    if let Some(initial) = &spec.initial {
        findings.push(match check_initial(store, spec).await {
            Ok(()) => {
                Finding::well("initial weights", format!("models/{} fits [model]", initial.model))
            }
            Err(error) => Finding::error("initial weights", &format!("{error:#}")),
        });
    }
    let record = read_record(store, &spec.run.name).await;
    // A run that has a checkpoint has no use for what it began from.
    let begun = record
        .as_ref()
        .is_ok_and(|record| record.as_ref().is_some_and(|record| record.last_checkpoint.is_some()));
    if let Some(Branch { run, step, .. }) = spec.branch.as_ref().filter(|_| !begun) {
        findings.push(match check_branch(store, spec).await {
            Ok(()) => Finding::well("branch", format!("step {step} of run `{run}` fits [model]")),
            Err(error) => Finding::error("branch", &format!("{error:#}")),
        });
    }
    findings.push(match record {
        Ok(record) => run(spec, record.as_ref(), numerics),
        Err(error) => Finding::error("run", &error),
    });
    findings
}

/// One dataset: there, whole as far as a glance shows, and of a vocabulary that the model has.
async fn dataset(
    store: &Store,
    spec: &Spec,
    name: &str,
    source: Option<&Source>,
) -> (Option<Dataset>, Finding) {
    let check = format!("dataset {name}");
    let dataset = match (Dataset::open(store, name).await, source) {
        (Err(error), _) => return (None, Finding::error(&check, &error)),
        (Ok(Some(dataset)), _) => dataset,
        (Ok(None), Some(source)) => return (None, to_make(&check, source)),
        (Ok(None), None) => {
            let remedy = format!(
                "give it a [datasets.source], or make it: looptrain data prepare --input ... --output \
                 {}/datasets/{name}",
                store.url().trim_end_matches('/')
            );
            return (None, Finding::problem(&check, "it is not in the store", &remedy));
        }
    };
    let (tokens, vocabulary) = {
        let manifest = dataset.manifest();
        (manifest.train.tokens + manifest.validation.tokens, manifest.vocabulary_size)
    };
    if let Some(finding) = too_many_entries(&check, vocabulary, spec.model.vocab_size) {
        return (None, finding);
    }
    if let Some(Err(error)) = source.map(|source| dataset.check_source(source)) {
        return (None, Finding::error(&check, &error));
    }
    for split in [Split::Train, Split::Validation] {
        if dataset.sequences(split, GLANCE) > 0
            && let Err(error) = dataset.read_sequence(split, GLANCE, 0).await
        {
            return (None, Finding::error(&check, &error));
        }
    }
    let found = format!("{tokens} tokens, vocabulary {vocabulary}, {}", dataset.digest());
    (Some(dataset), Finding::well(&check, found))
}

fn too_many_entries(check: &str, vocabulary: usize, limit: usize) -> Option<Finding> {
    let found =
        format!("its tokenizer has {vocabulary} entries, more than model.vocab_size = {limit}");
    let remedy = format!("raise model.vocab_size to at least {vocabulary}, or use another dataset");
    (vocabulary > limit).then(|| Finding::problem(check, found, &remedy))
}

/// A dataset that a start would make.
fn to_make(check: &str, source: &Source) -> Finding {
    let is_missing = |path: &&String| {
        !path.contains("://") && *path != "cargo-registry" && !Path::new(path.as_str()).exists()
    };
    if let Some(path) = source.paths.iter().find(is_missing) {
        let found = format!("it is not in the store, and of its source there is no {path}");
        let remedy = "mend datasets.N.source.paths; relative ones count from the working directory";
        return Finding::problem(check, found, remedy);
    }
    Finding::well(check, "it is not in the store; the first start makes it from its source")
}

/// Whether there is enough of it, and how often the data is gone through.
fn sequences(spec: &Spec, datasets: &[Dataset]) -> Finding {
    if let Err(error) = check_fit(spec, datasets) {
        return Finding::error("sequences", &error);
    }
    let mut most = (0.0, "");
    for (index, stage) in spec.stages.iter().enumerate() {
        let mixture = spec.mixture(index);
        let weights: u64 = mixture.iter().map(|part| u64::from(part.1)).sum();
        let drawn = stage.sequences_of(stage.steps) as f64;
        for (dataset, weight) in mixture {
            let held = datasets[dataset].sequences(Split::Train, stage.sequence_length);
            let times = drawn * f64::from(weight) / weights as f64 / held.max(1) as f64;
            if times > most.0 {
                most = (times, &spec.datasets[dataset].name);
            }
        }
    }
    let (times, name) = most;
    let found =
        format!("enough for every stage; `{name}` is gone through {times:.2} times at most");
    Finding::well("sequences", found)
}

/// Whether what the store holds of the run is one that this spec and this machine can go on with.
fn run(spec: &Spec, record: Option<&RunRecord>, numerics: Option<&str>) -> Finding {
    let name = &spec.run.name;
    let Some(record) = record else {
        return Finding::well("run", format!("there is no run `{name}` yet"));
    };
    if record.trajectory != spec.trajectory_digest() {
        let before = Spec::parse("the run record", &record.spec, &[]);
        let differences = before.map(|before| before.differences(spec)).unwrap_or_default();
        let differences = match differences.is_empty() {
            true => "a spec that leads to other weights".to_owned(),
            false => format!("another spec: {}", differences.join(", ")),
        };
        let found = format!("run `{name}` was begun with {differences}");
        let remedy = "put that back, give the run another run.name, or begin it anew with --fresh; \
                      `looptrain branch` goes on from a checkpoint of it by another spec";
        return Finding::problem("run", found, remedy);
    }
    if let (Some(pinned), Some(here)) = (record.numerics.as_deref(), numerics)
        && pinned != here
    {
        let found =
            format!("run `{name}` has pinned the arithmetic {pinned}, this machine has {here}");
        let remedy =
            "use machines of the kind that the run began on, or begin it anew with --fresh";
        return Finding::problem("run", found, remedy);
    }
    let at = record.last_checkpoint.map_or("without a checkpoint yet".to_owned(), |step| {
        format!("with a checkpoint of step {step}")
    });
    Finding::well("run", format!("run `{name}` is there, {at}, and goes on from it"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::Step;

    use super::super::report::Verdict;
    use super::*;

    fn spec(overrides: &[&str]) -> Spec {
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/tiny.toml");
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        Spec::load(Path::new(example), &overrides).unwrap()
    }

    #[test]
    fn a_vocabulary_may_be_as_large_as_the_models() {
        assert_eq!(too_many_entries("dataset", 512, 512), None);
        let finding = too_many_entries("dataset", 513, 512).unwrap();
        assert_eq!(finding.verdict, Verdict::Problem);
        assert!(finding.remedy.unwrap().contains("at least 513"));
    }

    #[test]
    fn a_dataset_can_be_made_when_its_text_is_there() {
        let source = |path: &str| Source { paths: vec![path.to_owned()], ..Source::default() };
        for there in ["cargo-registry", "s3://corpus/web", env!("CARGO_MANIFEST_DIR")] {
            assert_eq!(to_make("dataset", &source(there)).verdict, Verdict::Well, "{there}");
        }
        assert_eq!(to_make("dataset", &source("/no/such/text")).verdict, Verdict::Problem);
    }

    #[test]
    fn a_run_goes_on_with_its_spec_and_its_arithmetic() {
        let spec = spec(&[]);
        let mut record = RunRecord::new(spec.trajectory_digest(), spec.to_toml(), &[]);
        record.last_checkpoint = Some(Step(100));
        record.numerics = Some("avx2-00".into());
        let verdict = |spec: &Spec, numerics| run(spec, Some(&record), numerics).verdict;
        assert_eq!(verdict(&spec, Some("avx2-00")), Verdict::Well);
        assert_eq!(verdict(&spec, None), Verdict::Well, "nothing is known of the machine");
        assert_eq!(verdict(&spec, Some("avx512-00")), Verdict::Problem);
        let other = self::spec(&["run.seed=8"]);
        assert_eq!(verdict(&other, Some("avx2-00")), Verdict::Problem);
        assert_eq!(run(&other, None, None).verdict, Verdict::Well);
    }
}
