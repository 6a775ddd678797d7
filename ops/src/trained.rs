//! A trained model, out of a checkpoint or a folder.

use std::borrow::Cow;
use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use looptrain_model::{Engine, Layout, StageSettings};
use looptrain_proto::{Digest, Spec, Step, spec};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Dataset, SkippedCheckpoint, Store, Tensor, TextTokenizer,
    read_record,
};

use crate::cli::{CheckpointUrl, ModelArgs, ModelSource};
use crate::commands::all_threads;
use crate::folder::ModelFolder;
use crate::progress::print_line;

/// Weights that were found, of which those of a folder are still to be read.
pub(crate) enum Found {
    Folder(ModelFolder),
    /// A checkpoint whose weights are what was saved.
    Checkpoint {
        spec: Box<Spec>,
        /// Digests of the datasets that the run is trained on, by name.
        pins: BTreeMap<String, Digest>,
        manifest: CheckpointManifest,
        /// The weights, sorted by name.
        tensors: Vec<Tensor>,
    },
}

impl Found {
    /// Opens a folder, or reads the weights of a checkpoint; the store of that.
    pub(crate) async fn open(source: &ModelSource) -> Result<(Self, Option<Store>)> {
        match source {
            ModelSource::Folder(path) => Ok((Self::Folder(ModelFolder::open(path)?), None)),
            ModelSource::Checkpoint(url) => {
                let store = Store::open_existing(&url.store)?;
                Ok((Self::read(&store, url).await?, Some(store)))
            }
        }
    }

    async fn read(store: &Store, url: &CheckpointUrl) -> Result<Self> {
        let CheckpointUrl { store: store_url, run, step } = url;
        let Some(record) = read_record(store, run).await? else {
            bail!("there is no run `{run}` in {store_url}");
        };
        let spec = Box::new(Spec::parse("the run record", &record.spec, &[])?);
        let checkpoints = Checkpoints::new(store, run);
        let (manifest, tensors) = if let Some(step) = step {
            let hold = checkpoints.hold(*step).await;
            let read = checkpoints.weights(*step).await;
            hold.release().await;
            read?
        } else {
            let Some((read, skipped)) = checkpoints.newest_weights().await? else {
                bail!("run `{run}` has no checkpoint yet");
            };
            for SkippedCheckpoint { step, reason } in &skipped {
                print_line(&format!("checkpoint of step {step} passed over: {reason}"));
            }
            read
        };
        Ok(Self::Checkpoint { spec, pins: record.datasets, manifest, tensors })
    }

    /// What it is called in what is printed.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Folder(folder) => folder.path().display().to_string(),
            Self::Checkpoint { spec, manifest, .. } => {
                format!("{} at step {}", spec.run.name, manifest.step)
            }
        }
    }

    /// Its shape.
    pub(crate) fn model(&self) -> &spec::Model {
        match self {
            Self::Folder(folder) => &folder.config.model,
            Self::Checkpoint { spec, .. } => &spec.model,
        }
    }

    /// How it is run, and the length of the sequences that it was trained with last.
    pub(crate) fn settings(&self) -> (StageSettings, usize) {
        match self {
            Self::Folder(folder) => (folder.config.settings, folder.config.context),
            Self::Checkpoint { spec, manifest, .. } => {
                let stage = &spec.stages[spec.stage_of(manifest.step)];
                (StageSettings::from(stage), stage.sequence_length)
            }
        }
    }

    /// Whether it has learned to see nothing of other documents.
    fn masks_documents(&self) -> bool {
        match self {
            Self::Folder(_) => false,
            Self::Checkpoint { spec, manifest, .. } => {
                spec.stages[spec.stage_of(manifest.step)].document_masking
            }
        }
    }

    /// Reads a tensor, by its index in the layout.
    pub(crate) fn tensor(&self, layout: &Layout, index: usize) -> Result<Cow<'_, [f32]>> {
        match self {
            Self::Folder(folder) => folder.read(index).map(Cow::Owned),
            Self::Checkpoint { manifest, tensors, .. } => {
                let entry = &layout.tensors()[index];
                let place = tensors
                    .binary_search_by(|tensor| tensor.name.as_str().cmp(&entry.name))
                    .ok()
                    .filter(|&place| tensors[place].shape == entry.shape);
                let missing = || {
                    let (step, name, shape) = (manifest.step, &entry.name, &entry.shape);
                    format!("the checkpoint of step {step} has no {name} {shape:?}")
                };
                Ok(Cow::Borrowed(&tensors[place.with_context(missing)?].data))
            }
        }
    }
}

/// A model that is ready to run, and what is known of it.
pub(crate) struct Trained {
    /// What it is called in what is printed.
    pub(crate) name: String,
    pub(crate) engine: Engine,
    pub(crate) model: spec::Model,
    /// With the loops that were asked for.
    pub(crate) settings: StageSettings,
    /// Loops that it was trained with.
    pub(crate) trained_loops: usize,
    /// Length of the sequences that it was trained with last.
    pub(crate) context: usize,
    pub(crate) tokenizer: Option<TextTokenizer>,
    /// Tokens that end a text.
    pub(crate) ends: Vec<u32>,
    /// The last token of a document, where it has learned to see nothing of the document before.
    pub(crate) document_end: Option<u32>,
    /// The datasets that the stage of a checkpoint draws from, to be opened.
    stored: Vec<StoredDataset>,
}

impl Trained {
    /// Opens what the arguments name and loads its weights.
    pub(crate) async fn open(args: &ModelArgs) -> Result<Self> {
        let (found, store) = Found::open(&args.source()).await?;
        let stored = match (&found, &store) {
            (Found::Checkpoint { spec, pins, manifest, .. }, Some(store)) => {
                drawn_from(store, spec, pins, manifest.step)
            }
            _ => Vec::new(),
        };
        let tokenizer = match stored.first() {
            Some(first) => Some(first.open().await?.tokenizer().await?),
            None => None,
        };
        let threads = args.threads.unwrap_or_else(all_threads);
        let mut this = Self { stored, ..Self::new(found, tokenizer, threads).await? };
        if let Some(loops) = args.loops {
            this.settings.loops = loops as usize;
        }
        Ok(this)
    }

    /// Loads weights that were found; the tokenizer of a checkpoint's data is given.
    pub(crate) async fn new(
        found: Found,
        tokenizer: Option<TextTokenizer>,
        threads: u32,
    ) -> Result<Self> {
        let mut ends = Vec::new();
        let tokenizer = match &found {
            Found::Folder(folder) => {
                ends.clone_from(&folder.config.ends);
                of_folder(folder)?
            }
            Found::Checkpoint { .. } => tokenizer,
        };
        if let Some(tokenizer) = &tokenizer {
            let (has, model) = (tokenizer.vocabulary_size(), found.model().vocab_size);
            ensure!(
                has <= model,
                "the tokenizer of {} has a vocabulary of {has}, the model one of {model}: it is of another model",
                found.name()
            );
        }
        if ends.is_empty() {
            ends.extend(tokenizer.as_ref().map(TextTokenizer::end_of_text));
        }
        let ends_documents = tokenizer.as_ref().filter(|_| found.masks_documents());
        let document_end = ends_documents.map(TextTokenizer::end_of_text);
        let ((settings, context), name) = (found.settings(), found.name());
        let load = move || {
            let model = found.model().clone();
            let (layout, mut engine) = (Layout::new(&model), Engine::new(&model, threads as usize));
            for index in 0..layout.tensors().len() {
                engine.load_tensor(index, &found.tensor(&layout, index)?);
            }
            Ok((model, engine))
        };
        let loaded: Result<_> =
            tokio::task::spawn_blocking(load).await.context("the weights were not loaded")?;
        let (model, engine) = loaded?;
        let trained_loops = settings.loops;
        Ok(Self {
            name,
            engine,
            model,
            settings,
            trained_loops,
            context,
            tokenizer,
            ends,
            document_end,
            stored: Vec::new(),
        })
    }

    /// The datasets that the stage of a checkpoint draws from.
    pub(crate) async fn datasets(&self) -> Result<Vec<Dataset>> {
        let mut datasets = Vec::new();
        for stored in &self.stored {
            datasets.push(stored.open().await?);
        }
        Ok(datasets)
    }

    /// Its tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<&TextTokenizer> {
        self.tokenizer.as_ref().with_context(|| format!("{} has no tokenizer.json", self.name))
    }
}

/// The tokenizer of a folder, if there is one.
fn of_folder(folder: &ModelFolder) -> Result<Option<TextTokenizer>> {
    let Some(json) = folder.tokenizer()? else { return Ok(None) };
    let place = || folder.path().join("tokenizer.json").display().to_string();
    let read = match folder.config.ends.first() {
        Some(end) => TextTokenizer::with_end_of_text(&json, *end),
        None => TextTokenizer::from_json(&json, None),
    };
    read.with_context(place).map(Some)
}

/// A dataset that a run is trained on.
#[derive(Clone, Debug)]
pub(crate) struct StoredDataset {
    store: Store,
    name: String,
    /// Its digest, if the run has pinned it.
    pin: Option<Digest>,
}

impl StoredDataset {
    /// Opens it.
    ///
    /// # Errors
    /// When it is gone, or is not what the run was trained on.
    pub(crate) async fn open(&self) -> Result<Dataset> {
        let Self { store, name, pin } = self;
        let dataset = Dataset::open(store, name).await?;
        let dataset =
            dataset.with_context(|| format!("dataset `{name}`, which the run uses, is gone"))?;
        let has = dataset.digest();
        ensure!(
            pin.is_none_or(|pin| pin == has),
            "dataset `{name}` is not what the run was trained on any more: it has the digest {has}"
        );
        Ok(dataset)
    }
}

/// The datasets that the stage of a run's step draws from, in the order of its mixture; `pins` are those of
/// the run's record.
pub(crate) fn drawn_from(
    store: &Store,
    spec: &Spec,
    pins: &BTreeMap<String, Digest>,
    step: Step,
) -> Vec<StoredDataset> {
    let stored = |(index, _): (usize, u32)| {
        let name = spec.datasets[index].name.clone();
        let pin = pins.get(&name).copied();
        StoredDataset { store: store.clone(), name, pin }
    };
    spec.mixture(spec.stage_of(step)).into_iter().map(stored).collect()
}
