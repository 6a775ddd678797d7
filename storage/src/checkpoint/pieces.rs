//! The weights of a checkpoint one after another, for readers that do not want the whole of its parts
//! in memory.

use std::ops::Range;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use looptrain_proto::{Digest, Step};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::digest::{WeightsHasher, is_weight};
use super::load::REMEDY;
use super::{CheckpointManifest, Checkpoints, PartEntry};
use crate::{Error, Result};

/// Bytes that are read at a time, a multiple of a value's.
const PIECE: u64 = 4 << 20;

/// Pieces under way at a time.
const CONCURRENT_PIECES: usize = 8;

/// Headers of parts that are read at a time.
const CONCURRENT_HEADERS: usize = 16;

/// A longer header is none.
const LONGEST_HEADER: u64 = 100 << 20;

/// A tensor of a checkpoint, and where its values lie.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    /// Hugging Face name.
    pub name: String,
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// The part.
    key: Arc<str>,
    /// Its bytes there.
    bytes: Range<u64>,
}

impl Checkpoints {
    /// The weights of the checkpoint of `step`, sorted by name. Nothing of them has been read yet, so
    /// nothing is known of their values: see [`Checkpoints::read_weights`].
    ///
    /// # Errors
    /// When there is no such checkpoint, or a part is missing, has another size, or begins otherwise than
    /// what was saved.
    pub async fn stored_weights(
        &self,
        step: Step,
    ) -> Result<(CheckpointManifest, Vec<StoredTensor>)> {
        let manifest = self.manifest(step).await?;
        // What a manifest says may be anything; of the sizes the store says the same from here on.
        self.check_parts(&manifest).await?;
        let mut weights = self.stored_tensors(&manifest).await?;
        weights.retain(|tensor| is_weight(&tensor.name));
        Ok((manifest, weights))
    }

    /// All tensors, sorted by name; none of them is there twice.
    pub(super) async fn stored_tensors(
        &self,
        manifest: &CheckpointManifest,
    ) -> Result<Vec<StoredTensor>> {
        let reads: Vec<_> =
            manifest.parts.iter().map(|part| self.tensors_of(manifest.step, part)).collect();
        let reads = futures::stream::iter(reads).buffered(CONCURRENT_HEADERS);
        let mut tensors: Vec<StoredTensor> = reads.try_concat().await?;
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        match tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            Some(pair) => Err(self.twice(manifest.step, &pair[0].name)),
            None => Ok(tensors),
        }
    }

    /// Hands out the values of all `weights`, in their order and a few megabytes at a time, as they are
    /// stored (32-bit floats, little-endian): the index of the weight, and some of its bytes. What
    /// was handed out is what was saved once this has returned.
    ///
    /// # Errors
    /// When a part is damaged, which shows at the end alone; when `take` fails.
    pub async fn read_weights<E: From<Error>>(
        &self,
        manifest: &CheckpointManifest,
        weights: &[StoredTensor],
        mut take: impl FnMut(usize, &[u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let mut hasher = WeightsHasher::default();
        let mut ranges = Vec::new();
        for (index, weight) in weights.iter().enumerate() {
            ranges.extend(pieces(weight.bytes.clone()).map(|range| (index, range)));
        }
        // Small weights do not wait for each other.
        let read = futures::stream::iter(ranges)
            .map(move |(index, range)| async move {
                let piece = self.store.get_range(&weights[index].key, range).await?;
                Ok::<_, Error>((index, piece))
            })
            .buffered(CONCURRENT_PIECES);
        let mut read = std::pin::pin!(read);
        let mut begun = 0;
        while let Some((index, piece)) = read.try_next().await? {
            // Each has a piece, and they come in their order.
            if index == begun {
                hasher.begin(&weights[index].name, &weights[index].shape);
                begun += 1;
            }
            hasher.update(&piece);
            take(index, &piece)?;
        }
        Ok(self.check_weights(manifest, hasher.finish())?)
    }

    /// Whether weights that were `found` are those of the manifest.
    pub(super) fn check_weights(&self, manifest: &CheckpointManifest, found: Digest) -> Result<()> {
        let says = manifest.weights_digest;
        if found == says {
            return Ok(());
        }
        let place = self.store.place(&self.manifest_key(manifest.step));
        let reason = format!("the weights of its parts are {found}, it says {says}; {REMEDY}");
        Err(Error::Malformed { place, reason })
    }

    /// From the header of a part.
    async fn tensors_of(&self, step: Step, part: &PartEntry) -> Result<Vec<StoredTensor>> {
        let key: Arc<str> = self.part_key(step, &part.file).into();
        let malformed = |reason: String| Error::Malformed { place: self.store.place(&key), reason };
        let length = self.store.get_range(&key, 0..8).await?;
        let length = length.as_ref().try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
        if length > LONGEST_HEADER.min(part.bytes) {
            return Err(malformed(format!("its header would have {length} bytes")));
        }
        let header = self.store.get_range(&key, 8..8 + length).await?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|error| malformed(error.to_string()))?;
        let (ends, says) = ((8 + length).saturating_add(header.data_len() as u64), part.bytes);
        if ends != says {
            return Err(malformed(format!("it ends at {ends}, the manifest says {says}")));
        }
        let begin = 8 + length;
        let mut tensors = Vec::new();
        for (name, info) in header.tensors() {
            if info.dtype != Dtype::F32 {
                return Err(malformed(format!("tensor `{name}` is {:?}, not F32", info.dtype)));
            }
            let (start, end) = info.data_offsets;
            let elements = info.shape.iter().try_fold(1, |a: usize, b| a.checked_mul(*b));
            if elements.and_then(|it| it.checked_mul(4)) != end.checked_sub(start) {
                return Err(malformed(format!("tensor `{name}` has not the size of its shape")));
            }
            tensors.push(StoredTensor {
                name,
                shape: info.shape.clone(),
                key: Arc::clone(&key),
                bytes: begin + start as u64..begin + end as u64,
            });
        }
        match tensors.len() as u64 {
            has if has == part.tensors => Ok(tensors),
            has => {
                Err(malformed(format!("it has {has} tensors, the manifest says {}", part.tensors)))
            }
        }
    }
}

/// A weight's bytes in pieces, of which the last may be shorter; one that is empty for a weight without
/// values.
fn pieces(bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let Range { start, end } = bytes;
    let count = (end - start).div_ceil(PIECE).max(1);
    (0..count).map(move |piece| {
        let begin = start + piece * PIECE;
        begin..end.min(begin + PIECE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_and_a_weight_without_values_has_an_empty_one() {
        let of = |end: u64| pieces(8..end).map(|it| (it.start, it.end)).collect::<Vec<_>>();
        assert_eq!(of(8), [(8, 8)]);
        assert_eq!(of(12), [(8, 12)]);
        assert_eq!(of(8 + PIECE), [(8, 8 + PIECE)]);
        assert_eq!(of(12 + PIECE), [(8, 8 + PIECE), (8 + PIECE, 12 + PIECE)]);
    }
}
