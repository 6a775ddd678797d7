//! Digests of the blocks of a file, such that they prove to be those of the file's own digest.
//!
//! BLAKE3 is a tree: the digest of a file comes of the chaining values of its parts. A part that is
//! a whole subtree (a power of two in size, aligned to that) can be checked alone, against its
//! chaining value, and all chaining values together against the digest in a manifest. So a reader
//! that has the list of them needs no more of a shard than the blocks it wants, and the manifest no
//! more than one digest a shard. (Section 2.1 of the BLAKE3 paper; `blake3::hazmat`.)

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len};
use blake3::hazmat::{merge_subtrees_non_root, merge_subtrees_root};
use looptrain_proto::Digest;

/// Bytes of a block: what is read, checked and cached at a time. A block holds the tokens of some
/// sequences, of which a shuffled order wants one now and the others later.
pub(crate) const BLOCK: u64 = 64 << 10;

/// What names and checks a block: of its bytes and its place in the file.
pub(crate) type BlockHash = ChainingValue;

/// How many blocks so many bytes have; the last one may be short.
pub(crate) fn blocks(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(BLOCK)).expect("a file has no more blocks than bytes of memory")
}

/// The hash of the block `index` of a file.
pub(crate) fn hash(index: usize, bytes: &[u8]) -> BlockHash {
    debug_assert!(!bytes.is_empty() && bytes.len() as u64 <= BLOCK);
    let mut hasher = Hasher::new();
    hasher.set_input_offset(index as u64 * BLOCK).update(bytes);
    hasher.finalize_non_root()
}

/// The hashes of whole blocks, the first of which is the block `first` of its file, and of what is
/// left after them.
pub(crate) fn hashes(first: usize, bytes: &[u8]) -> Vec<BlockHash> {
    (first..).zip(bytes.chunks(BLOCK as usize)).map(|(index, block)| hash(index, block)).collect()
}

/// The digest of a file of these blocks; `None` for one block alone, whose hash says nothing of it.
pub(crate) fn digest(blocks: &[BlockHash]) -> Option<Digest> {
    if blocks.len() < 2 {
        return None;
    }
    let (left, right) = blocks.split_at(left_of(blocks.len()));
    Some(merge_subtrees_root(&merged(left), &merged(right), Mode::Hash).into())
}

fn merged(blocks: &[BlockHash]) -> BlockHash {
    match blocks {
        [one] => *one,
        more => {
            let (left, right) = more.split_at(left_of(more.len()));
            merge_subtrees_non_root(&merged(left), &merged(right), Mode::Hash)
        }
    }
}

/// Blocks in the left one of two subtrees: as blocks are subtrees, the rule for bytes is that for
/// blocks.
fn left_of(blocks: usize) -> usize {
    (left_subtree_len(blocks as u64 * BLOCK) / BLOCK) as usize
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_blocks_of_a_file_of_any_length_give_its_digest() {
        let block = BLOCK as usize;
        let bytes: Vec<u8> = (0..9 * block).map(|i| (i * 31 % 251) as u8).collect();
        let ragged = (1..9).flat_map(|n| [n * block + 1, n * block + 1024, n * block - 1]);
        for length in (2..=9).map(|n| n * block).chain(ragged).filter(|&n| n > block) {
            let bytes = &bytes[..length];
            let all = hashes(0, bytes);
            assert_eq!(all.len(), blocks(length as u64));
            assert_eq!(digest(&all), Some(Digest::of(bytes)), "{length} bytes");
        }
        assert_eq!(digest(&hashes(0, &bytes[..block])), None);
    }

    #[test]
    fn a_block_is_known_by_its_bytes_and_its_place() {
        let zeros = vec![0; 3 * BLOCK as usize];
        let all = hashes(0, &zeros);
        assert!(all[0] != all[1] && all[1] != all[2], "the same bytes elsewhere are another block");
        assert_eq!(hashes(1, &zeros[BLOCK as usize..]), all[1..]);
        let mut damaged = zeros[..BLOCK as usize].to_vec();
        damaged[77] = 1;
        assert_ne!(hash(1, &damaged), all[1]);
    }
}
