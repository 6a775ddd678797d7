//! Tensors to safetensors and back.
//!
//! A part file is made without copying: a list of chunks, of which the first is the header and the
//! others are the tensors' own memory. The header is written here, because the same tensors must have the same bytes: the crate's own
//! writer goes through a hash map, whose order changes from run to run. Reading is the crate's,
//! which checks offsets and sizes.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::Tensor;

/// Data begins at a multiple of this many bytes.
const ALIGNMENT: usize = 8;

/// The bytes of a part file, in chunks; tensors stand in it sorted by name.
pub(super) fn encode(
    tensors: &Arc<[Tensor]>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<Bytes>, String> {
    let mut sorted: Vec<usize> = (0..tensors.len()).collect();
    sorted.sort_by(|a, b| tensors[*a].name.cmp(&tensors[*b].name));

    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut end = 0;
    for tensor in sorted.iter().map(|index| &tensors[*index]) {
        if tensor.shape.iter().product::<usize>() != tensor.data.len() {
            return Err(format!(
                "tensor `{}` has the shape {:?} and {} values",
                tensor.name,
                tensor.shape,
                tensor.data.len()
            ));
        }
        let start = end;
        end += 4 * tensor.data.len();
        let entry = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end] });
        if header.insert(tensor.name.clone(), entry).is_some() {
            return Err(format!("tensor `{}` is there twice", tensor.name));
        }
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');

    let mut begin = (header.len() as u64).to_le_bytes().to_vec();
    begin.extend_from_slice(&header);
    let data = sorted.into_iter().map(|index| values(tensors, index));
    Ok(std::iter::once(begin.into()).chain(data).collect())
}

/// The values of a tensor as they are stored: its own memory, which stays until they are dropped.
#[cfg(target_endian = "little")]
fn values(tensors: &Arc<[Tensor]>, index: usize) -> Bytes {
    struct Values(Arc<[Tensor]>, usize);

    impl AsRef<[u8]> for Values {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0[self.1].data)
        }
    }

    Bytes::from_owner(Values(Arc::clone(tensors), index))
}

/// The values of a tensor as they are stored.
#[cfg(target_endian = "big")]
fn values(tensors: &Arc<[Tensor]>, index: usize) -> Bytes {
    little_endian(&tensors[index].data).into_owned().into()
}

/// The tensors of a part file.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<Tensor>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let read = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
        if view.dtype() != Dtype::F32 {
            return Err(format!("tensor `{name}` is {:?}, not F32", view.dtype()));
        }
        let words = view.data().chunks_exact(4);
        let data = words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        Ok(Tensor { name: name.to_owned(), shape: view.shape().to_vec(), data: data.collect() })
    };
    file.iter().map(read).collect()
}

/// Floats as they are stored.
#[cfg(target_endian = "little")]
pub(super) fn little_endian(data: &[f32]) -> std::borrow::Cow<'_, [u8]> {
    bytemuck::cast_slice(data).into()
}

/// Floats as they are stored.
#[cfg(target_endian = "big")]
pub(super) fn little_endian(data: &[f32]) -> std::borrow::Cow<'_, [u8]> {
    data.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// The whole file.
    fn encode(tensors: &[Tensor], metadata: &BTreeMap<String, String>) -> Result<Bytes, String> {
        super::encode(&Arc::from(tensors), metadata).map(|chunks| chunks.concat().into())
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        let values = 0..shape.iter().product::<usize>();
        let data = values.map(|i| f32::from_bits(0x3f80_0001 + 77 * i as u32)).collect();
        Tensor { name: name.into(), shape: shape.to_vec(), data }
    }

    #[test]
    fn tensors_and_metadata_survive_to_the_bit() {
        let mut odd = tensor("b.odd", &[5]);
        odd.data = vec![f32::NAN, -0.0, f32::INFINITY, f32::MIN_POSITIVE / 2.0, 1.0];
        let tensors = vec![tensor("z", &[2, 3]), odd, tensor("a", &[]), tensor("none", &[0, 4])];
        let metadata: BTreeMap<String, String> =
            (0..9).map(|i| (format!("key{i}"), format!("{i}"))).collect();
        let bytes = encode(&tensors, &metadata).unwrap();
        let mut read = decode(&bytes).unwrap();
        read.sort_by(|a, b| a.name.cmp(&b.name));
        let bits = |tensor: &Tensor| tensor.data.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for (read, index) in read.iter().zip([2, 1, 3, 0]) {
            let written: &Tensor = &tensors[index];
            assert_eq!((&read.name, &read.shape), (&written.name, &written.shape));
            assert_eq!(bits(read), bits(written));
        }
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(*header.metadata(), Some(HashMap::from_iter(metadata.clone())));

        let shuffled: Vec<Tensor> = tensors.into_iter().rev().collect();
        assert_eq!(encode(&shuffled, &metadata).unwrap(), bytes, "one state, one file");
    }

    #[test]
    fn a_shape_that_does_not_fit_its_data_and_a_name_that_comes_twice_are_refused() {
        let mut wrong = tensor("w", &[2, 3]);
        wrong.data.pop();
        assert!(encode(&[wrong], &BTreeMap::new()).unwrap_err().contains("`w`"));
        let twice = [tensor("w", &[1]), tensor("w", &[2])];
        assert!(encode(&twice, &BTreeMap::new()).unwrap_err().contains("twice"));
    }

    #[test]
    fn what_is_no_part_is_an_error_and_no_panic() {
        let bytes = encode(&[tensor("w", &[4])], &BTreeMap::new()).unwrap();
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(decode(b"no safetensors file").is_err());
    }
}
