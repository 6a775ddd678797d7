//! `looptrain import` and `looptrain upcycle`: weights that runs may begin from.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use looptrain_coordinator::find_branch;
use looptrain_model::{Layout, TensorEntry};
use looptrain_proto::{Cursor, Digest, Generation, Spec, Step, spec};
use looptrain_storage::{
    CheckpointManifest, Checkpoints, Store, StoredTensor, Tensor, WeightsHasher,
};

use crate::cli::{Import, LayerOrder, ModelUrl, Upcycle};
use crate::trained::Found;

/// Bytes of a part, or one tensor of more.
const PART: usize = 256 << 20;

pub(crate) async fn run(args: Import) -> Result<()> {
    let (found, _) = Found::open(&args.from).await?;
    let layers = (0..found.model().num_hidden_layers).collect();
    bring(args, &Arc::new(found), layers, "imported").await
}

pub(crate) async fn upcycle(args: Upcycle) -> Result<()> {
    let (found, _) = Found::open(&args.import.from).await?;
    let layers = repeated(found.model().num_hidden_layers, args.layers as usize, args.order)?;
    bring(args.import, &Arc::new(found), layers, "upcycled").await
}

/// Writes the model, and prints what a spec says to begin from it.
async fn bring(args: Import, found: &Arc<Found>, layers: Vec<usize>, what: &str) -> Result<()> {
    let ModelUrl { store: url, name } = args.to;
    let store = Store::open(&url)?;
    if !Checkpoints::of_model(&store, &name).list().await?.is_empty() {
        bail!("there is a model `{name}` in {url} already; choose another name");
    }
    let model = spec::Model { num_hidden_layers: layers.len(), ..found.model().clone() };
    let (settings, context) = found.settings();
    let written = write(&store, &name, found, layers).await?;
    let weights = written.weights_digest;
    let bytes: u64 = written.parts.iter().map(|part| part.bytes).sum();
    outln!("[model]\n{}", toml::to_string(&model)?);
    outln!("[initial]\n{}", toml::to_string(&spec::Initial { model: name.clone(), weights })?);
    outln!(
        "# Trained with loops = {}, rope_base = {:?}, sequences of {context} at most.",
        settings.loops,
        settings.rope_base
    );
    outln!("# Data begins anew: on what the model has been trained on, take another run.seed.");
    outln!(
        "{what} model={name} weights={weights} parameters={} bytes={bytes} store={url}",
        model.parameters()
    );
    Ok(())
}

/// Which of `old` layers each of `new` ones is.
fn repeated(old: usize, new: usize, order: LayerOrder) -> Result<Vec<usize>> {
    ensure!(
        new.is_multiple_of(old),
        "--layers {new} is no multiple of the {old} layers of the model"
    );
    let of = |layer| match order {
        LayerOrder::Block => layer % old,
        LayerOrder::Interleave => layer / (new / old),
    };
    Ok((0..new).map(of).collect())
}

/// Writes a model into a store whose layers are those of the found one that `layers` says.
pub(super) async fn write(
    store: &Store,
    name: &str,
    found: &Arc<Found>,
    layers: Vec<usize>,
) -> Result<CheckpointManifest> {
    let checkpoints = Checkpoints::of_model(store, name);
    let model = spec::Model { num_hidden_layers: layers.len(), ..found.model().clone() };
    let old = Layout::new(found.model());
    let mut entries: Vec<TensorEntry> = Layout::new(&model).tensors().to_vec();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let parts = parts(&entries);
    let count = parts.len();
    let shared = Arc::new((old, entries, layers));
    let mut hasher = WeightsHasher::default();
    let mut written = Vec::with_capacity(count);
    for (index, part) in parts.into_iter().enumerate() {
        let (found, shared) = (Arc::clone(found), Arc::clone(&shared));
        let read = move || {
            let (old, entries, layers) = &*shared;
            let mut tensors = Vec::with_capacity(part.len());
            for entry in &entries[part] {
                let place = source_of(entry, old, layers)?;
                let data = found.tensor(old, place)?.into_owned();
                hasher.begin(&entry.name, &entry.shape);
                hasher.add(&data);
                tensors.push(Tensor { name: entry.name.clone(), shape: entry.shape.clone(), data });
            }
            Ok::<_, anyhow::Error>((hasher, tensors))
        };
        let read = tokio::task::spawn_blocking(read).await.context("the weights were not read")?;
        let (next, tensors) = read?;
        hasher = next;
        let metadata = BTreeMap::from([("model".to_owned(), name.to_owned())]);
        let saved = checkpoints.save_part(Step(0), index, count, tensors, metadata).await?;
        written.push(saved);
    }
    let manifest = CheckpointManifest {
        version: CheckpointManifest::VERSION,
        run: name.to_owned(),
        step: Step(0),
        cursor: Cursor::default(),
        // No steps led here.
        trajectory: Digest::of(b""),
        generation: Generation(0),
        weights_digest: hasher.finish(),
        parts: written,
        trend: None,
    };
    checkpoints.commit(&manifest).await?;
    Ok(manifest)
}

/// Runs of tensors that make a part each.
fn parts(entries: &[TensorEntry]) -> Vec<Range<usize>> {
    let (mut parts, mut bytes) = (Vec::<Range<usize>>::new(), PART);
    for (index, entry) in entries.iter().enumerate() {
        bytes += entry.len * size_of::<f32>();
        match parts.last_mut() {
            Some(part) if bytes <= PART => part.end = index + 1,
            _ => {
                parts.push(index..index + 1);
                bytes = entry.len * size_of::<f32>();
            }
        }
    }
    parts
}

/// The index in the old layout of what a tensor of the new one is a copy of.
fn source_of(entry: &TensorEntry, old: &Layout, layers: &[usize]) -> Result<usize> {
    const LAYERS: &str = "model.layers.";
    let name = match entry.name.strip_prefix(LAYERS).and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => {
            let layer = layer.parse::<usize>().ok().and_then(|layer| layers.get(layer));
            format!("{LAYERS}{}.{rest}", layer.context("a layer that the model has not")?)
        }
        None => entry.name.clone(),
    };
    let place = old.tensors().iter().position(|tensor| tensor.name == name);
    place.with_context(|| format!("the model has no tensor `{name}`"))
}

/// Whether the store has what the spec's run is to begin from.
///
/// # Errors
/// When it has not, or something else; the error says what to do.
pub(crate) async fn check_initial(store: &Store, spec: &Spec) -> Result<()> {
    let Some(spec::Initial { model, weights }) = &spec.initial else { return Ok(()) };
    let checkpoints = Checkpoints::of_model(store, model);
    if checkpoints.list().await?.is_empty() {
        let url = store.url();
        bail!("initial.model: there is no models/{model} in {url}; `looptrain import` brings one");
    }
    let (manifest, stored) = checkpoints.stored_weights(Step(0)).await?;
    ensure!(
        manifest.weights_digest == *weights,
        "initial.weights: models/{model} has {}, the spec says {weights}; take what the import printed",
        manifest.weights_digest
    );
    fits(spec, &stored).map_err(|differs| {
        anyhow!(
            "initial.model: in models/{model} {differs}; copy [model] from what the import printed"
        )
    })
}

/// Whether the store has the checkpoint that the spec's run branches off from, of a model of this shape.
///
/// # Errors
/// When it has not, or something else; the error says what to do.
pub(crate) async fn check_branch(store: &Store, spec: &Spec) -> Result<()> {
    let Some(manifest) = find_branch(store, spec).await? else { return Ok(()) };
    let (run, step) = (&manifest.run, manifest.step);
    let (_, stored) = Checkpoints::new(store, run).stored_weights(step).await?;
    fits(spec, &stored).map_err(|differs| {
        anyhow!("branch.run: at step {step} of run `{run}` {differs}; a branch has the [model] of its run")
    })
}

/// Whether these are the weights of the spec's model, or else what differs.
fn fits(spec: &Spec, stored: &[StoredTensor]) -> Result<(), String> {
    let layout = Layout::new(&spec.model);
    for tensor in layout.tensors() {
        let found = stored.binary_search_by(|stored| stored.name.cmp(&tensor.name));
        let shape = found.ok().map(|place| stored[place].shape.as_slice());
        if shape != Some(tensor.shape.as_slice()) {
            let shape = shape.map_or("not there".to_owned(), |shape| format!("{shape:?}"));
            let (name, ours) = (&tensor.name, &tensor.shape);
            return Err(format!("{name} is {shape}, and {ours:?} by [model]"));
        }
    }
    match (stored.len(), layout.tensors().len()) {
        (has, needs) if has != needs => Err(format!("are {has} tensors, [model] asks for {needs}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_repeated_as_a_stack_or_each_for_itself() {
        assert_eq!(repeated(3, 6, LayerOrder::Block).unwrap(), [0, 1, 2, 0, 1, 2]);
        assert_eq!(repeated(3, 6, LayerOrder::Interleave).unwrap(), [0, 0, 1, 1, 2, 2]);
        assert_eq!(repeated(2, 2, LayerOrder::Interleave).unwrap(), [0, 1]);
        let error = repeated(3, 7, LayerOrder::Block).unwrap_err().to_string();
        assert!(error.contains("--layers 7") && error.contains("3 layers"), "{error}");
    }

    #[test]
    fn parts_hold_every_tensor_once_and_are_no_larger_than_they_must_be() {
        let entry = |len: usize| TensorEntry {
            name: String::new(),
            shape: vec![len],
            offset: 0,
            len,
            decay: false,
        };
        let half = PART / 8;
        let sizes = [1, half, half, 3 * half, 1, 2, half];
        let entries: Vec<TensorEntry> = sizes.iter().map(|len| entry(*len)).collect();
        assert_eq!(parts(&entries), [0..2, 2..3, 3..4, 4..7]);
        assert!(parts(&[]).is_empty());
    }
}
