//! `model.safetensors`, written tensor by tensor.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use half::bf16;
use looptrain_storage::StoredTensor;
use serde_json::{Map, Value, json};

/// How the numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Float {
    /// As the published models are; rounded to the nearest, ties to even
    Bf16,
    /// As they are trained, to the bit
    F32,
}

impl Float {
    fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
        }
    }

    /// What `config.json` calls it.
    pub(crate) fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
        }
    }
}

/// The file in the making: header first, then values in the order of the tensors.
pub(crate) struct WeightsFile {
    file: BufWriter<File>,
    float: Float,
}

impl WeightsFile {
    /// Begins the file of these tensors, which come sorted by name.
    pub(crate) fn create(path: &Path, weights: &[StoredTensor], float: Float) -> Result<Self> {
        let file = File::create_new(path).with_context(|| path.display().to_string())?;
        let mut this = Self { file: BufWriter::with_capacity(1 << 20, file), float };
        this.file.write_all(&header(weights, float))?;
        Ok(this)
    }

    /// Adds values, 32-bit floats in little-endian order.
    pub(crate) fn add(&mut self, values: &[u8]) -> Result<()> {
        match self.float {
            Float::F32 => self.file.write_all(values)?,
            Float::Bf16 => {
                for word in values.chunks_exact(4) {
                    let value = f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
                    self.file.write_all(&bf16::from_f32(value).to_le_bytes())?;
                }
            }
        }
        Ok(())
    }

    /// Makes the file durable; its size in bytes.
    pub(crate) fn finish(self) -> Result<u64> {
        let file = self.file.into_inner().map_err(|error| error.into_error())?;
        file.sync_all()?;
        Ok(file.metadata()?.len())
    }
}

/// The begin of the file: the header's length, and the header, padded to eight bytes.
fn header(weights: &[StoredTensor], float: Float) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0;
    for weight in weights {
        let start = end;
        end += weight.shape.iter().product::<usize>() * float.bytes();
        let entry =
            json!({ "dtype": float.name(), "shape": weight.shape, "data_offsets": [start, end] });
        entries.insert(weight.name.clone(), entry);
    }
    let mut header = Value::Object(entries).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut begin = (header.len() as u64).to_le_bytes().to_vec();
    begin.extend_from_slice(&header);
    begin
}
