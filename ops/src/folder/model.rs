//! A folder of the Hugging Face kind, as the published Ouro models are: what its `config.json` says, and
//! its weights, in one file or in several with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use looptrain_model::{Layout, StageSettings};
use looptrain_proto::spec::{Model, Objective};
use serde_json::Value;

use super::tensors::TensorFile;

/// The loss of a folder's model has this weight of the entropy, which its files do not say: that of the
/// published models' later stages.
const ENTROPY_WEIGHT: f64 = 0.05;

/// What `config.json` says of a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ReadConfig {
    pub(crate) model: Model,
    pub(crate) settings: StageSettings,
    /// Longest sequence.
    pub(crate) context: usize,
    /// Tokens that end a text, the first of them that which stands between documents.
    pub(crate) ends: Vec<u32>,
}

impl ReadConfig {
    fn parse(text: &[u8]) -> Result<Self> {
        let json: Value = serde_json::from_slice(text).context("it is no JSON")?;
        ensure!(json.is_object(), "it is no JSON object");
        let size = |key: &str| {
            let value = json.get(key).with_context(|| format!("it has no {key}"))?;
            let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
            size.with_context(|| format!("{key}: {value} is no whole number"))
        };
        let number = |key: &str| {
            let value = json.get(key).with_context(|| format!("it has no {key}"))?;
            value.as_f64().with_context(|| format!("{key}: {value} is no number"))
        };
        // What the published code can be told to do otherwise, and this program cannot.
        for (key, is_known) in [
            ("model_type", &["ouro"].map(Value::from)[..]),
            ("hidden_act", &["silu"].map(Value::from)),
            ("tie_word_embeddings", &[false.into()]),
            ("rope_scaling", &[Value::Null]),
            ("use_sliding_window", &[false.into()]),
            ("attention_bias", &[false.into()]),
            ("mlp_bias", &[false.into()]),
        ] {
            let value = json.get(key).unwrap_or(&is_known[0]);
            ensure!(
                is_known.contains(value),
                "{key}: {value} is not supported, only {}",
                is_known[0]
            );
        }
        let model = Model {
            hidden_size: size("hidden_size")?,
            num_hidden_layers: size("num_hidden_layers")?,
            num_attention_heads: size("num_attention_heads")?,
            intermediate_size: size("intermediate_size")?,
            vocab_size: size("vocab_size")?,
            rms_norm_eps: number("rms_norm_eps")?,
            initializer_range: json
                .get("initializer_range")
                .map_or(Ok(0.02), |_| number("initializer_range"))?,
        };
        model.check().map_err(|(key, reason)| {
            anyhow::anyhow!("{}: {reason}", key.trim_start_matches("model."))
        })?;
        for (key, only) in
            [("num_key_value_heads", model.num_attention_heads), ("head_dim", model.head_dim())]
        {
            let found = if json.get(key).is_some() { size(key)? } else { only };
            ensure!(
                found == only,
                "{key}: {found} is not supported beside {} heads, only {only}",
                model.num_attention_heads
            );
        }
        let loops = size("total_ut_steps")?;
        ensure!((1..=1024).contains(&loops), "total_ut_steps: {loops} is no number of loops");
        let rope_base = number("rope_theta")?;
        ensure!(rope_base.is_finite() && rope_base > 1.0, "rope_theta: it must be above 1");
        let context = size("max_position_embeddings")?;
        ensure!(
            (1..=1 << 24).contains(&context),
            "max_position_embeddings: {context} is no length of a sequence"
        );
        let layers = json.get("layer_types").and_then(Value::as_array).into_iter().flatten();
        for layer in layers {
            ensure!(layer == "full_attention", "layer_types: {layer} is not supported");
        }
        let ends = match json.get("eos_token_id") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(ids)) => ids.iter().map(token).collect::<Result<_>>()?,
            Some(id) => vec![token(id)?],
        };
        if let Some(end) = ends.iter().find(|end| **end as usize >= model.vocab_size) {
            bail!("eos_token_id: {end} is not below vocab_size, {}", model.vocab_size);
        }
        let settings = StageSettings {
            loops,
            entropy_weight: ENTROPY_WEIGHT,
            rope_base,
            objective: Objective::Language,
        };
        Ok(Self { model, settings, context, ends })
    }
}

fn token(value: &Value) -> Result<u32> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.with_context(|| format!("eos_token_id: {value} is no token"))
}

/// An open folder whose tensors are those of its model.
#[derive(Debug)]
pub(crate) struct ModelFolder {
    path: PathBuf,
    pub(crate) config: ReadConfig,
    files: Vec<TensorFile>,
    /// Of each tensor in layout order, the file that has it.
    places: Vec<usize>,
    layout: Layout,
}

impl ModelFolder {
    /// Opens a folder and checks names, shapes and sizes; of values nothing is known yet.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        ensure!(path.is_dir(), "{} is no folder", path.display());
        let config = path.join("config.json");
        let text =
            fs::read(&config).with_context(|| format!("cannot read {}", config.display()))?;
        let config = ReadConfig::parse(&text).with_context(|| config.display().to_string())?;
        let names = weight_files(path)?;
        let files: Vec<TensorFile> =
            names.iter().map(|name| TensorFile::open(&path.join(name))).collect::<Result<_>>()?;
        let (layers, tensors) = (
            config.model.num_hidden_layers,
            files.iter().map(|file| file.tensors().count()).sum::<usize>(),
        );
        ensure!(
            layers <= tensors,
            "{} has {tensors} tensors, too few for the {layers} layers of its config.json",
            path.display()
        );
        let layout = Layout::new(&config.model);
        let mut found: BTreeMap<&str, (usize, &[usize])> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for (name, shape) in file.tensors() {
                if let Some((other, _)) = found.insert(name, (index, shape)) {
                    bail!("tensor `{name}` is in {} and in {}", names[other], names[index]);
                }
            }
        }
        let mut places = Vec::with_capacity(layout.tensors().len());
        for tensor in layout.tensors() {
            let name = &tensor.name;
            let Some((file, shape)) = found.remove(name.as_str()) else {
                bail!("{} has no tensor `{name}`, which its config.json asks for", path.display());
            };
            ensure!(
                shape == tensor.shape,
                "tensor `{name}` of {} has the shape {shape:?}, its config.json says {:?}",
                path.join(&names[file]).display(),
                tensor.shape
            );
            places.push(file);
        }
        if let Some((name, (file, _))) = found.pop_first() {
            bail!(
                "{} has the tensor `{name}`, which a model of its config.json has not",
                path.join(&names[file]).display()
            );
        }
        Ok(Self { path: path.to_owned(), config, files, places, layout })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a tensor, by its index in the layout.
    pub(crate) fn read(&self, index: usize) -> Result<Vec<f32>> {
        let tensor = &self.layout.tensors()[index];
        let mut values = Vec::with_capacity(tensor.len);
        let take = &mut |piece: &[f32]| values.extend_from_slice(piece);
        self.files[self.places[index]].read(&tensor.name, take)?;
        Ok(values)
    }

    /// As [`ModelFolder::read`]; `None` behind the last one.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn try_read(&self, index: usize) -> Option<Result<Vec<f32>>> {
        (index < self.layout.tensors().len()).then(|| self.read(index))
    }

    /// The `tokenizer.json`, if there is one.
    pub(crate) fn tokenizer(&self) -> Result<Option<Vec<u8>>> {
        let path = self.path.join("tokenizer.json");
        match fs::read(&path) {
            Ok(json) => Ok(Some(json)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }
}

/// Names of the files with weights, without repetition.
fn weight_files(path: &Path) -> Result<Vec<String>> {
    const ONE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    if path.join(ONE).exists() {
        return Ok(vec![ONE.to_owned()]);
    }
    let index = path.join(INDEX);
    let text = match fs::read(&index) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{} has neither {ONE} nor {INDEX}", path.display());
        }
        Err(error) => {
            return Err(error).with_context(|| format!("cannot read {}", index.display()));
        }
    };
    let place = || index.display().to_string();
    let json: Value = serde_json::from_slice(&text).context("it is no JSON").with_context(place)?;
    let map = json["weight_map"].as_object().context("it has no weight_map").with_context(place)?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|file| !file.contains(['/', '\\']));
        let file =
            file.with_context(|| format!("weight_map: `{tensor}` is in no file of the folder"));
        files.insert(file.with_context(place)?.to_owned());
    }
    Ok(files.into_iter().collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn config() -> Value {
        json!({
            "model_type": "ouro", "hidden_act": "silu", "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
            "intermediate_size": 12, "vocab_size": 10, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
            "rope_scaling": null, "total_ut_steps": 3, "max_position_embeddings": 64,
            "eos_token_id": [2, 0], "tie_word_embeddings": false,
        })
    }

    /// Names and shapes.
    type Tensors = Vec<(String, Vec<usize>)>;

    /// Writes a safetensors file of some tensors of zeros.
    fn write(path: &Path, file: &str, tensors: &[(String, Vec<usize>)]) {
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let begin = end;
            end += 4 * shape.iter().product::<usize>();
            let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] });
            header.insert(name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + end, 0);
        fs::write(path.join(file), bytes).unwrap();
    }

    fn tensors() -> Tensors {
        let model = ReadConfig::parse(config().to_string().as_bytes()).unwrap().model;
        let layout = Layout::new(&model);
        layout.tensors().iter().map(|it| (it.name.clone(), it.shape.clone())).collect()
    }

    fn folder(config: &Value, tensors: &[(String, Vec<usize>)]) -> Result<ModelFolder> {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("config.json"), config.to_string())?;
        write(directory.path(), "model.safetensors", tensors);
        ModelFolder::open(directory.path())
    }

    #[test]
    fn a_config_says_what_the_model_is() {
        let read = folder(&config(), &tensors()).unwrap();
        assert_eq!((read.config.settings.loops, read.config.context), (3, 64));
        assert_eq!(read.config.ends, [2, 0]);
        assert_eq!(read.config.model.head_dim(), 4);
        assert_eq!(read.read(0).unwrap(), vec![0.0; 80]);
    }

    #[test]
    fn what_this_program_cannot_run_is_named() {
        for (key, value, said) in [
            ("model_type", json!("llama"), "only \"ouro\""),
            ("hidden_act", json!("gelu"), "hidden_act: \"gelu\" is not supported"),
            ("tie_word_embeddings", json!(true), "only false"),
            ("rope_scaling", json!({ "type": "yarn" }), "rope_scaling"),
            ("num_key_value_heads", json!(1), "num_key_value_heads: 1 is not supported"),
            ("head_dim", json!(16), "head_dim: 16"),
            ("hidden_size", json!(9), "num_attention_heads"),
            ("hidden_size", json!(-8), "no whole number"),
            ("total_ut_steps", json!(0), "no number of loops"),
            ("rope_theta", json!("big"), "rope_theta"),
            ("eos_token_id", json!(-1), "eos_token_id: -1 is no token"),
            ("eos_token_id", json!(10), "eos_token_id: 10 is not below vocab_size"),
            ("layer_types", json!(["sliding_attention"]), "layer_types: \"sliding_attention\""),
            ("max_position_embeddings", json!(1u64 << 60), "no length"),
            ("rms_norm_eps", json!(0), "rms_norm_eps"),
        ] {
            let mut config = config();
            config[key] = value;
            let error = format!("{:#}", folder(&config, &tensors()).unwrap_err());
            assert!(error.contains("config.json") && error.contains(said), "{error}");
        }
        for key in ["hidden_size", "total_ut_steps", "vocab_size", "rope_theta"] {
            let mut config = config();
            config.as_object_mut().unwrap().remove(key);
            let error = format!("{:#}", folder(&config, &tensors()).unwrap_err());
            assert!(error.contains(&format!("it has no {key}")), "{error}");
        }
    }

    #[test]
    fn tensors_that_are_missing_too_many_or_misshapen_are_named() {
        let refusal = |change: &dyn Fn(&mut Tensors)| {
            let mut tensors = tensors();
            change(&mut tensors);
            format!("{:#}", folder(&config(), &tensors).unwrap_err())
        };
        let error = refusal(&|it| it.retain(|(name, _)| name != "lm_head.weight"));
        assert!(error.contains("no tensor `lm_head.weight`"), "{error}");
        let error = refusal(&|it| it.push(("model.extra".into(), vec![1])));
        assert!(error.contains("has the tensor `model.extra`"), "{error}");
        let error = refusal(&|it| it[0].1 = vec![8, 10]);
        assert!(error.contains("has the shape [8, 10]") && error.contains("[10, 8]"), "{error}");
    }

    /// Any JSON that is not deep.
    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (0u64..70).prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::vec((".{0,4}", inner), 0..3)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_config_is_an_error_or_a_model(place in any::<prop::sample::Index>(), value in any_value()) {
            let mut config = config();
            let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
            config[&keys[place.index(keys.len())]] = value.clone();
            let _ = folder(&config, &tensors());
            let _ = ReadConfig::parse(value.to_string().as_bytes());
        }
    }

    #[test]
    fn more_layers_than_there_can_be_are_no_reason_to_make_room_for_them() {
        let mut config = config();
        config["num_hidden_layers"] = json!(4096);
        let error = format!("{:#}", folder(&config, &tensors()).unwrap_err());
        assert!(error.contains("16 tensors, too few for the 4096 layers"), "{error}");
    }

    #[test]
    fn weights_may_be_spread_over_files_with_an_index() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::write(path.join("config.json"), config().to_string()).unwrap();
        assert!(ModelFolder::open(path).unwrap_err().to_string().contains("neither"));
        let all = tensors();
        let (one, two) = all.split_at(5);
        write(path, "model-00001-of-00002.safetensors", one);
        write(path, "model-00002-of-00002.safetensors", two);
        let file =
            |at: usize| format!("model-0000{}-of-00002.safetensors", 1 + usize::from(at >= 5));
        let map: serde_json::Map<String, Value> =
            all.iter().enumerate().map(|(at, (name, _))| (name.clone(), file(at).into())).collect();
        let index = path.join("model.safetensors.index.json");
        fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
        assert_eq!(ModelFolder::open(path).unwrap().read(15).unwrap().len(), all[15].1[0] * 8);

        fs::write(&index, json!({ "weight_map": { "a": "../x.safetensors" } }).to_string())
            .unwrap();
        let error = format!("{:#}", ModelFolder::open(path).unwrap_err());
        assert!(error.contains("index.json") && error.contains("`a`"), "{error}");
        write(path, "model-00002-of-00002.safetensors", &all[4..]);
        fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
        let error = format!("{:#}", ModelFolder::open(path).unwrap_err());
        assert!(error.contains("is in model-00001") && error.contains("model-00002"), "{error}");
    }
}
