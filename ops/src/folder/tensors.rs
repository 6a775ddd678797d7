//! A safetensors file that somebody else has written: its header is believed only as far as the file
//! bears it out, and tensors are read one at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use serde_json::{Map, Value};

/// A longer header is none.
const LONGEST_HEADER: u64 = 100 << 20;

/// Bytes that are read at a time, a multiple of any value's.
const PIECE: usize = 4 << 20;

/// How the numbers of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dtype {
    Bf16,
    F16,
    F32,
}

impl Dtype {
    fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A tensor of a file.
#[derive(Clone, Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// First byte in the file.
    begin: u64,
    elements: usize,
}

/// An open file.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, Entry>,
}

impl TensorFile {
    /// Opens a file and checks what its header says of names, kinds and places.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let place = || path.display().to_string();
        let file = File::open(path).with_context(place)?;
        let bytes = file.metadata().with_context(place)?.len();
        let tensors = read_header(&file, bytes).with_context(place)?;
        Ok(Self { path: path.to_owned(), file, tensors })
    }

    /// Names and shapes.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry.shape.as_slice()))
    }

    /// Reads a tensor that is in the file, some values at a time.
    pub(crate) fn read(&self, name: &str, take: &mut dyn FnMut(&[f32])) -> Result<()> {
        let place = || format!("tensor `{name}` of {}", self.path.display());
        let entry = self.tensors.get(name).with_context(|| format!("there is no {}", place()))?;
        let (size, mut done) = (entry.dtype.bytes(), 0);
        let (mut bytes, mut values) = (Vec::new(), Vec::new());
        while done < entry.elements {
            let count = (PIECE / size).min(entry.elements - done);
            bytes.resize(count * size, 0);
            let at = entry.begin + (done * size) as u64;
            self.file.read_exact_at(&mut bytes, at).with_context(place)?;
            values.clear();
            match entry.dtype {
                Dtype::F32 => values.extend(words(&bytes).map(f32::from_le_bytes)),
                Dtype::Bf16 => {
                    values.extend(words(&bytes).map(|it| bf16::from_le_bytes(it).to_f32()));
                }
                Dtype::F16 => {
                    values.extend(words(&bytes).map(|it| f16::from_le_bytes(it).to_f32()))
                }
            }
            if let Some(bad) = values.iter().position(|value| !value.is_finite()) {
                bail!("{}: value {} is {}, no finite number", place(), done + bad, values[bad]);
            }
            take(&values);
            done += count;
        }
        Ok(())
    }
}

fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks().0.iter().copied()
}

fn read_header(file: &File, bytes: u64) -> Result<BTreeMap<String, Entry>> {
    let mut length = [0; 8];
    ensure!(bytes >= 8, "it has {bytes} bytes, too few for a safetensors file");
    file.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    ensure!(
        length <= LONGEST_HEADER.min(bytes - 8),
        "its header would have {length} bytes; it is cut off, or no safetensors file"
    );
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8)?;
    let header: Map<String, Value> =
        serde_json::from_slice(&header).context("its header is no JSON object")?;
    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::new();
    for (name, info) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let (entry, range) = parse_entry(&info, 8 + length)
            .with_context(|| format!("tensor `{name}` in its header"))?;
        ranges.push((range, name.clone()));
        tensors.insert(name, entry);
    }
    // The format allows neither gaps nor overlaps.
    ranges.sort();
    let mut end = 0;
    for ((begin, next), name) in ranges {
        ensure!(begin == end, "tensor `{name}` begins at {begin}, where {end} was to come");
        end = next;
    }
    let ends = (8 + length).saturating_add(end);
    ensure!(
        ends == bytes,
        "its tensors end at {ends}, the file at {bytes}; it is cut off, or was not written to its end"
    );
    Ok(tensors)
}

/// A tensor whose bytes are counted from `data`, and their range there.
fn parse_entry(info: &Value, data: u64) -> Result<(Entry, (u64, u64))> {
    let dtype = match info["dtype"].as_str() {
        Some("BF16") => Dtype::Bf16,
        Some("F16") => Dtype::F16,
        Some("F32") => Dtype::F32,
        Some(other) => bail!("its dtype is {other}; BF16, F16 and F32 can be read"),
        None => bail!("it has no dtype"),
    };
    let shape = info["shape"].as_array().context("it has no shape")?;
    let length = |value: &Value| value.as_u64().and_then(|length| usize::try_from(length).ok());
    let shape: Option<Vec<usize>> = shape.iter().map(length).collect();
    let shape = shape.context("a length in its shape is no whole number")?;
    let offsets = info["data_offsets"].as_array().map(Vec::as_slice);
    let Some([begin, end]) = offsets else { bail!("its data_offsets are not two numbers") };
    let (begin, end) = begin.as_u64().zip(end.as_u64()).context("an offset is no whole number")?;
    let elements = shape.iter().try_fold(1, |a: usize, b| a.checked_mul(*b));
    let elements = elements.context("its shape is larger than any memory")?;
    let needs = elements.checked_mul(dtype.bytes()).map(|needs| needs as u64);
    ensure!(
        end.checked_sub(begin) == needs,
        "its shape {shape:?} does not have the {begin}..{end} bytes of its data_offsets"
    );
    let at = data.checked_add(begin).context("it begins past any file")?;
    Ok((Entry { dtype, shape, begin: at, elements }, (begin, end)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn file(header: &Value, data: &[u8]) -> Vec<u8> {
        let header = header.to_string().into_bytes();
        [&(header.len() as u64).to_le_bytes(), header.as_slice(), data].concat()
    }

    fn good() -> (Value, Vec<u8>) {
        let header = json!({
            "__metadata__": { "format": "pt" },
            "a": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] },
            "b": { "dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12] },
            "c": { "dtype": "F16", "shape": [], "data_offsets": [12, 14] },
        });
        let mut data = Vec::new();
        data.extend([1.5f32, -0.1].iter().flat_map(|value| value.to_le_bytes()));
        data.extend([3.0, -2.5].iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()));
        data.extend(f16::from_f32(0.25).to_le_bytes());
        (header, data)
    }

    fn open(bytes: &[u8]) -> Result<TensorFile> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("model.safetensors");
        std::fs::write(&path, bytes)?;
        TensorFile::open(&path)
    }

    fn read(file: &TensorFile, name: &str) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        file.read(name, &mut |values| all.extend_from_slice(values))?;
        Ok(all)
    }

    #[test]
    fn numbers_of_every_kind_are_read() {
        let (header, data) = good();
        let file = open(&file(&header, &data)).unwrap();
        let shapes: Vec<_> = file.tensors().collect();
        assert_eq!(shapes, [("a", &[2][..]), ("b", &[1, 2]), ("c", &[])]);
        assert_eq!(read(&file, "a").unwrap(), [1.5, -0.1]);
        assert_eq!(read(&file, "b").unwrap(), [3.0, -2.5]);
        assert_eq!(read(&file, "c").unwrap(), [0.25]);
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_tensor() {
        let (header, data) = good();
        let with = |name: &str, key: &str, value: Value| {
            let mut header = header.clone();
            header[name][key] = value;
            file(&header, &data)
        };
        for (bytes, parts) in [
            (with("b", "dtype", json!("F8_E4M3")), &["`b`", "F8_E4M3", "BF16"][..]),
            (with("b", "dtype", json!(7)), &["`b`", "no dtype"]),
            (with("a", "shape", json!([3])), &["`a`", "[3]", "0..8"]),
            (with("a", "shape", json!([-1])), &["`a`", "whole number"]),
            (with("a", "shape", json!([1u64 << 40, 1u64 << 40])), &["`a`", "larger"]),
            (with("a", "data_offsets", json!([8, 0])), &["`a`", "8..0"]),
            (with("c", "data_offsets", json!([10, 12])), &["`c`", "begins at 10", "12"]),
            (file(&header, &data[1..]), &["cut off"]),
            (file(&json!([]), &[]), &["no JSON object"]),
            (vec![1, 2], &["too few"]),
            ((u64::MAX).to_le_bytes().to_vec(), &["header would have"]),
        ] {
            let error = format!("{:#}", open(&bytes).unwrap_err());
            assert!(error.contains("model.safetensors"), "{error}");
            for part in parts {
                assert!(error.contains(part), "{error} has no {part}");
            }
        }
        let mut data = data;
        data[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
        let file = open(&file(&header, &data)).unwrap();
        let error = read(&file, "a").unwrap_err().to_string();
        assert!(error.contains("`a`") && error.contains("value 1 is NaN"), "{error}");
        assert!(read(&file, "d").unwrap_err().to_string().contains("no tensor `d`"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_file(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = open(&bytes);
        }

        #[test]
        fn a_damaged_file_is_an_error_or_other_numbers(place in 0usize..300, byte in any::<u8>()) {
            let (header, data) = good();
            let mut bytes = file(&header, &data);
            let place = place % bytes.len();
            bytes[place] = byte;
            if let Ok(file) = open(&bytes) {
                let names: Vec<String> = file.tensors().map(|(name, _)| name.to_owned()).collect();
                for name in names {
                    let _ = read(&file, &name);
                }
            }
        }

        #[test]
        fn a_header_of_any_shape_is_an_error_or_a_file(
            shape in proptest::collection::vec(any::<u64>(), 0..4),
            begin in any::<u64>(),
            end in any::<u64>(),
        ) {
            let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] });
            let _ = open(&file(&json!({ "a": entry }), &[0; 16]));
        }
    }
}
