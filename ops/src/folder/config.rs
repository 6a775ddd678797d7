//! `config.json` and its companions. Field names, and the values that the published models share, are
//! those of the published Ouro configuration.

use anyhow::{Context, Result};
use looptrain_proto::spec::{Model, Stage};
use serde_json::{Value, json};

use super::Float;

/// Where the code is that the library runs for this kind of model.
const CODE: &str = "ByteDance/Ouro-1.4B";

/// Tokens with a meaning of their own.
pub(crate) struct Tokens {
    /// Stands between documents; there is no other that begins or ends one.
    pub(crate) end_of_text: u32,
    /// As the tokenizer writes it.
    pub(crate) text: String,
}

impl Tokens {
    /// Finds what entry `end_of_text` of a `tokenizer.json` is called.
    pub(crate) fn find(tokenizer: &[u8], end_of_text: u32) -> Result<Self> {
        let json: Value = serde_json::from_slice(tokenizer).context("the dataset's tokenizer")?;
        let added = json["added_tokens"].as_array().into_iter().flatten();
        let added = added
            .filter(|token| token["id"] == end_of_text)
            .find_map(|token| token["content"].as_str());
        let vocabulary = json["model"]["vocab"].as_object().into_iter().flatten();
        let mut listed =
            vocabulary.filter(|(_, id)| **id == end_of_text).map(|(text, _)| text.as_str());
        let text = added.or_else(|| listed.next());
        let text = text.with_context(|| format!("the tokenizer has no entry {end_of_text}"))?;
        Ok(Self { end_of_text, text: text.to_owned() })
    }
}

/// What the files say of a model as it is trained in a stage.
pub(crate) struct Config<'a> {
    pub(crate) model: &'a Model,
    pub(crate) stage: &'a Stage,
    pub(crate) tokens: &'a Tokens,
    pub(crate) float: Float,
}

impl Config<'_> {
    /// `config.json`, with every field: the published code's own defaults are those of another model.
    pub(crate) fn config(&self) -> Value {
        let Self { model, stage, tokens, float } = self;
        json!({
            "architectures": ["OuroForCausalLM"],
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": format!("{CODE}--configuration_ouro.OuroConfig"),
                "AutoModel": format!("{CODE}--modeling_ouro.OuroModel"),
                "AutoModelForCausalLM": format!("{CODE}--modeling_ouro.OuroForCausalLM"),
            },
            "bos_token_id": tokens.end_of_text,
            "eos_token_id": tokens.end_of_text,
            // Newer versions of the library ask for it.
            "pad_token_id": null,
            "head_dim": model.head_dim(),
            "hidden_act": "silu",
            "hidden_size": model.hidden_size,
            "initializer_range": model.initializer_range,
            "intermediate_size": model.intermediate_size,
            "layer_types": vec!["full_attention"; model.num_hidden_layers],
            "max_position_embeddings": stage.sequence_length,
            "max_window_layers": model.num_hidden_layers,
            "model_type": "ouro",
            "num_attention_heads": model.num_attention_heads,
            "num_hidden_layers": model.num_hidden_layers,
            "num_key_value_heads": model.num_attention_heads,
            "rms_norm_eps": model.rms_norm_eps,
            "rope_scaling": null,
            "rope_theta": stage.rope_base,
            "sliding_window": null,
            "tie_word_embeddings": false,
            "torch_dtype": float.torch_name(),
            "total_ut_steps": stage.loops,
            // Of all loops, unless who generates says otherwise.
            "early_exit_threshold": 1.0,
            "transformers_version": "4.55.0",
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": model.vocab_size,
        })
    }

    /// `generation_config.json`.
    pub(crate) fn generation(&self) -> Value {
        json!({
            "_from_model_config": true,
            "bos_token_id": self.tokens.end_of_text,
            "eos_token_id": self.tokens.end_of_text,
            "transformers_version": "4.55.0",
        })
    }

    /// `tokenizer_config.json`.
    pub(crate) fn tokenizer(&self) -> Value {
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.tokens.text,
            "eos_token": self.tokens.text,
            "unk_token": self.tokens.text,
            "clean_up_tokenization_spaces": false,
            "model_max_length": self.stage.sequence_length,
        })
    }

    /// `special_tokens_map.json`.
    pub(crate) fn special_tokens(&self) -> Value {
        let text = &self.tokens.text;
        json!({ "bos_token": text, "eos_token": text, "unk_token": text })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::spec::{Decay, LearningRate, Objective};

    use super::*;

    /// The fields of the published configuration.
    const PUBLISHED: &str = "architectures attention_dropout auto_map bos_token_id early_exit_threshold \
        eos_token_id head_dim hidden_act hidden_size initializer_range intermediate_size layer_types \
        max_position_embeddings max_window_layers model_type num_attention_heads num_hidden_layers \
        num_key_value_heads rms_norm_eps rope_scaling rope_theta sliding_window tie_word_embeddings \
        torch_dtype total_ut_steps transformers_version use_cache use_sliding_window vocab_size";

    #[test]
    fn a_model_of_the_published_shape_has_every_published_field_and_value() {
        let model = Model {
            hidden_size: 2048,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            intermediate_size: 5632,
            vocab_size: 49_152,
            rms_norm_eps: 1e-6,
            initializer_range: 0.02,
        };
        let stage = Stage {
            name: "mid".into(),
            steps: 1,
            tokens: 0,
            ramp: None,
            sequence_length: 65_536,
            slots: 1,
            slot_sequences: 1,
            loops: 4,
            entropy_weight: 0.05,
            objective: Objective::Language,
            rope_base: 1e6,
            learning_rate: LearningRate {
                peak: 1e-5,
                warmup_steps: 0,
                decay_steps: 0,
                last: 0.0,
                decay: Decay::Linear,
            },
            mixture: Vec::new(),
            document_masking: false,
        };
        let tokens = Tokens { end_of_text: 0, text: "<|endoftext|>".into() };
        let (model, stage, tokens) = (&model, &stage, &tokens);
        let json = Config { model, stage, tokens, float: Float::Bf16 }.config();
        for field in PUBLISHED.split_whitespace() {
            assert!(json.get(field).is_some(), "{field}");
        }
        assert_eq!(json.as_object().unwrap().len(), PUBLISHED.split_whitespace().count() + 1);
        for (field, value) in [
            ("head_dim", json!(128)),
            ("num_key_value_heads", json!(16)),
            ("total_ut_steps", json!(4)),
            ("rope_theta", json!(1_000_000.0)),
            ("max_position_embeddings", json!(65_536)),
            ("torch_dtype", json!("bfloat16")),
        ] {
            assert_eq!(json[field], value, "{field}");
        }
        assert_eq!(json["layer_types"].as_array().unwrap().len(), 24);
    }

    #[test]
    fn the_end_of_text_is_found_among_added_tokens_and_in_the_vocabulary() {
        let added = br#"{"added_tokens":[{"id":7,"content":"<|end|>"}],"model":{"vocab":{"a":0}}}"#;
        assert_eq!(Tokens::find(added, 7).unwrap().text, "<|end|>");
        assert_eq!(Tokens::find(added, 0).unwrap().text, "a");
        let error = Tokens::find(added, 9).err().unwrap().to_string();
        assert!(error.contains("no entry 9"), "{error}");
    }
}
