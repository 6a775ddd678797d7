//! Names, shapes and places of the parameters.
//!
//! Weights, gradients and moments are flat `f32` buffers; this table says which tensor stands
//! where. Its order is the order of the fields of [`LoopLm`](crate::LoopLm), so it is the same in
//! every process. Names are those of the published Ouro checkpoints.

use std::ops::Range;

use looptrain_proto::spec::{self, Objective};

/// One tensor's place in a flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name in Hugging Face checkpoints.
    pub name: String,
    /// `[out, in]` for matrices, `[n]` for vectors.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// Whether weight decay applies: the matrices of layers and head, not embedding, norms or gate.
    pub decay: bool,
}

impl TensorEntry {
    /// The tensor's elements within a flat buffer.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }

    /// Whether it belongs to the exit gate.
    #[must_use]
    pub fn is_exit_gate(&self) -> bool {
        self.name.starts_with("model.early_exit_gate.")
    }
}

/// The table of all tensors of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<TensorEntry>,
    parameters: usize,
}

impl Layout {
    /// The tensors of a LoopLM: 11 per layer and 5 more.
    #[must_use]
    pub fn new(model: &spec::Model) -> Self {
        let (d, f, v) = (model.hidden_size, model.intermediate_size, model.vocab_size);
        let mut table = Self { tensors: Vec::new(), parameters: 0 };
        table.push("model.embed_tokens.weight".into(), &[v, d], false);
        for layer in 0..model.num_hidden_layers {
            let mut push = |name: &str, shape: &[usize]| {
                let name = format!("model.layers.{layer}.{name}.weight");
                table.push(name, shape, shape.len() > 1);
            };
            push("input_layernorm", &[d]);
            for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                push(&format!("self_attn.{name}"), &[d, d]);
            }
            push("input_layernorm_2", &[d]);
            push("post_attention_layernorm", &[d]);
            push("mlp.gate_proj", &[f, d]);
            push("mlp.up_proj", &[f, d]);
            push("mlp.down_proj", &[d, f]);
            push("post_attention_layernorm_2", &[d]);
        }
        table.push("model.norm.weight".into(), &[d], false);
        table.push("model.early_exit_gate.weight".into(), &[1, d], false);
        table.push("model.early_exit_gate.bias".into(), &[1], false);
        table.push("lm_head.weight".into(), &[v, d], true);
        table
    }

    fn push(&mut self, name: String, shape: &[usize], decay: bool) {
        let len = shape.iter().product();
        let offset = self.parameters;
        self.tensors.push(TensorEntry { name, shape: shape.to_vec(), offset, len, decay });
        self.parameters += len;
    }

    /// All tensors, in the order of the flat buffers.
    #[must_use]
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// Elements of a flat buffer.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// The elements that an objective trains. Gradients have these and no others.
    ///
    /// # Panics
    /// Never: the exit gate's tensors follow each other.
    #[must_use]
    pub fn trained(&self, objective: Objective) -> Range<usize> {
        let of_gate = self.tensors.iter().filter(|tensor| tensor.is_exit_gate());
        match objective {
            Objective::Language => 0..self.parameters,
            Objective::ExitGate => of_gate
                .map(TensorEntry::range)
                .reduce(|first, next| first.start..next.end)
                .expect("every model has an exit gate"),
        }
    }

    /// The tensor that owns an element of the flat buffer, and the element's place in it; `None`
    /// past the end.
    #[must_use]
    pub fn owner(&self, element: usize) -> Option<(&TensorEntry, usize)> {
        let after = self.tensors.partition_point(|tensor| tensor.offset <= element);
        let tensor = self.tensors.get(after.checked_sub(1)?)?;
        (element < self.parameters).then(|| (tensor, element - tensor.offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ouro(layers: usize) -> spec::Model {
        spec::Model {
            hidden_size: 2048,
            num_hidden_layers: layers,
            num_attention_heads: 16,
            intermediate_size: 5632,
            vocab_size: 49152,
            rms_norm_eps: 1e-6,
            initializer_range: 0.02,
        }
    }

    #[test]
    fn the_published_models_have_their_published_sizes() {
        for (layers, tensors, parameters) in [(24, 269, 1_434_652_673), (48, 533, 2_667_974_657)] {
            let layout = Layout::new(&ouro(layers));
            assert_eq!((layout.tensors().len(), layout.parameters()), (tensors, parameters));
            assert_eq!(ouro(layers).parameters(), parameters as u64);
        }
    }

    /// Names and shapes of the published checkpoints, and the sizes of their files: a header of all names
    /// in order, padded to 8 bytes, and two bytes a parameter.
    #[test]
    fn names_and_shapes_are_those_of_the_published_checkpoints() {
        const OF_LAYER: [(&str, &[usize]); 11] = [
            ("self_attn.q_proj.weight", &[2048, 2048]),
            ("self_attn.k_proj.weight", &[2048, 2048]),
            ("self_attn.v_proj.weight", &[2048, 2048]),
            ("self_attn.o_proj.weight", &[2048, 2048]),
            ("mlp.gate_proj.weight", &[5632, 2048]),
            ("mlp.up_proj.weight", &[5632, 2048]),
            ("mlp.down_proj.weight", &[2048, 5632]),
            ("input_layernorm.weight", &[2048]),
            ("input_layernorm_2.weight", &[2048]),
            ("post_attention_layernorm.weight", &[2048]),
            ("post_attention_layernorm_2.weight", &[2048]),
        ];
        const OTHERS: [(&str, &[usize]); 5] = [
            ("model.embed_tokens.weight", &[49_152, 2048]),
            ("model.norm.weight", &[2048]),
            ("model.early_exit_gate.weight", &[1, 2048]),
            ("model.early_exit_gate.bias", &[1]),
            ("lm_head.weight", &[49_152, 2048]),
        ];
        for (layers, file_bytes) in [(24, 2_869_336_434_usize), (48, 5_336_011_242)] {
            let of_layers = (0..layers).flat_map(|layer| {
                OF_LAYER.map(|(name, shape)| (format!("model.layers.{layer}.{name}"), shape))
            });
            let others = OTHERS.map(|(name, shape)| (name.to_owned(), shape));
            let mut expected: Vec<_> = of_layers.chain(others).collect();
            let layout = Layout::new(&ouro(layers));
            let mut found: Vec<_> =
                layout.tensors().iter().map(|t| (t.name.clone(), t.shape.as_slice())).collect();
            expected.sort();
            found.sort();
            assert_eq!(found, expected);

            let mut end = 0;
            let entries = found.iter().map(|(name, shape)| {
                let begin = end;
                end += 2 * shape.iter().product::<usize>();
                format!(r#""{name}":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#)
                    .replace(", ", ",")
            });
            let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
            assert_eq!(8 + header.len().next_multiple_of(8) + end, file_bytes);
        }
    }

    #[test]
    fn a_language_stage_trains_all_and_a_gate_stage_the_two_tensors_of_the_gate() {
        let layout = Layout::new(&ouro(2));
        assert_eq!(layout.trained(Objective::Language), 0..layout.parameters());
        let gate = layout.trained(Objective::ExitGate);
        let inside = layout.tensors().iter().filter(|tensor| gate.contains(&tensor.offset));
        let names: Vec<&str> = inside.map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["model.early_exit_gate.weight", "model.early_exit_gate.bias"]);
        assert_eq!(gate.len(), 2048 + 1);
    }

    #[test]
    fn an_element_knows_its_tensor() {
        let layout = Layout::new(&ouro(1));
        let head = layout.tensors().last().unwrap();
        assert_eq!(layout.owner(head.offset + 5).unwrap(), (head, 5));
        assert_eq!(layout.owner(0).unwrap().0.name, "model.embed_tokens.weight");
        assert!(layout.owner(layout.parameters()).is_none());
    }

    #[test]
    fn only_matrices_of_layers_and_head_decay() {
        let layout = Layout::new(&ouro(1));
        let free: Vec<_> =
            layout.tensors().iter().filter(|t| !t.decay).map(|t| t.name.as_str()).collect();
        assert_eq!(
            free,
            [
                "model.embed_tokens.weight",
                "model.layers.0.input_layernorm.weight",
                "model.layers.0.input_layernorm_2.weight",
                "model.layers.0.post_attention_layernorm.weight",
                "model.layers.0.post_attention_layernorm_2.weight",
                "model.norm.weight",
                "model.early_exit_gate.weight",
                "model.early_exit_gate.bias",
            ]
        );
    }
}
