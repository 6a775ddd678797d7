//! Decoding: new tokens of one sequence through all loops, with keys and values of the earlier ones
//! from a cache.
//!
//! A loop sees the keys and values that the same loop has made of earlier tokens, so a cache has
//! loops times layers of them. They may be shared among loops (Ouro, arXiv 2510.25741, table 14): once
//! the prompt is through, only those of its last loop are kept, or their mean over loops, and all
//! loops read them.
//!
//! Bits are those of a forward pass over the whole sequence, unless caches are shared or documents do not
//! see each other (then it is so to rounding): products and
//! softmax take the same chains of additions here, whatever the number of rows.

use rayon::prelude::*;

use super::product::{Left, Right, Shape as Product, product};
use super::rotary::Rotary;
use super::scratch::with_scratch;
use super::simd;
use super::slot::Shape;
use super::weights::{Layer, Weights};

/// Tokens that go through the layers together.
const CHUNK: usize = 256;

/// Whose keys and values a loop reads, of tokens that were there before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheSharing {
    /// Its own.
    #[default]
    Full,
    /// Those of the last loop.
    Last,
    /// The mean over all loops.
    Averaged,
}

/// Keys and values of a layer in one loop, or in all of them.
struct Slot {
    /// Rotated keys, turned: `[H, head_dim, capacity]`.
    keys: Vec<f32>,
    /// `[H, capacity, head_dim]`.
    values: Vec<f32>,
}

/// Keys and values of a sequence.
pub(crate) struct Cache {
    shape: Shape,
    capacity: usize,
    /// Tokens that are in it.
    length: usize,
    sharing: CacheSharing,
    /// `[R, L]`, or `[L]` once they are shared.
    slots: Vec<Slot>,
    is_shared: bool,
    rotary: Rotary,
    /// The last token of a document, where documents do not see each other.
    document_end: Option<u32>,
    /// Where the document of the next token begins.
    start: usize,
}

/// What the loops make of the last of some new tokens.
pub(crate) struct Decoded {
    /// Its normed state after each loop, `[R, d]`, of as many loops as it went through.
    pub(crate) states: Vec<f32>,
    /// Its gate logits, `[R]`.
    pub(crate) gates: Vec<f32>,
}

impl Cache {
    /// Room for `capacity` tokens of a sequence. Of `shape`, the length does not matter.
    pub(crate) fn new(
        shape: Shape,
        capacity: usize,
        rope_base: f64,
        sharing: CacheSharing,
    ) -> Self {
        let head_dim = shape.hidden / shape.heads;
        let mut this = Self {
            shape,
            capacity,
            length: 0,
            sharing,
            slots: Vec::new(),
            is_shared: false,
            rotary: Rotary::new(capacity, head_dim, rope_base),
            document_end: None,
            start: 0,
        };
        this.clear();
        this
    }

    /// Forgets all tokens.
    pub(crate) fn clear(&mut self) {
        let (len, count) =
            (self.capacity * self.shape.hidden, self.shape.loops * self.shape.layers);
        let slot = || Slot { keys: vec![0.0; len], values: vec![0.0; len] };
        self.slots.resize_with(count, slot);
        self.length = 0;
        self.start = 0;
        self.is_shared = false;
    }

    /// From here on a token sees nothing from before `end`, where that is not the last token.
    pub(crate) fn end_documents_with(&mut self, end: u32) {
        self.document_end = Some(end);
    }

    /// Tokens that are in it.
    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// Bytes of the keys and values of one token, once it is in the cache.
    pub(crate) fn token_bytes(&self) -> usize {
        let loops = if self.sharing == CacheSharing::Full { self.shape.loops } else { 1 };
        2 * loops * self.shape.layers * self.shape.hidden * size_of::<f32>()
    }

    /// Ends the prompt: from here on loops share what the sharing says.
    fn share(&mut self) {
        let (layers, loops) = (self.shape.layers, self.shape.loops);
        if self.is_shared || self.sharing == CacheSharing::Full {
            return;
        }
        if self.sharing == CacheSharing::Averaged {
            let (capacity, length) = (self.capacity, self.length);
            let head_dim = self.shape.hidden / self.shape.heads;
            let share = 1.0 / loops as f32;
            let (first, others) = self.slots.split_at_mut(layers);
            first.par_iter_mut().enumerate().for_each(|(layer, mean)| {
                let same = || others.iter().skip(layer).step_by(layers);
                // What is used of keys, and of values.
                for row in 0..self.shape.hidden {
                    let used = row * capacity..row * capacity + length;
                    same().for_each(|slot| {
                        simd::add(&mut mean.keys[used.clone()], &slot.keys[used.clone()]);
                    });
                    simd::scale(&mut mean.keys[used], share);
                }
                for head in 0..self.shape.heads {
                    let first = head * capacity * head_dim;
                    let used = first..first + length * head_dim;
                    same().for_each(|slot| {
                        simd::add(&mut mean.values[used.clone()], &slot.values[used.clone()]);
                    });
                    simd::scale(&mut mean.values[used], share);
                }
            });
        } else {
            self.slots.rotate_right(layers);
        }
        self.slots.truncate(layers);
        self.slots.shrink_to_fit();
        self.is_shared = true;
    }

    /// Takes new tokens through all loops, and behind those that are there. With caches that are shared,
    /// a call after the first (the prompt's) takes one token, and ends with the loop after which
    /// `is_enough` says so of its gate logits: later loops leave nothing that anybody reads.
    ///
    /// # Panics
    /// If there is no token, no room, or an id is outside the vocabulary.
    pub(crate) fn extend(
        &mut self,
        weights: &Weights,
        ids: &[u32],
        is_enough: &dyn Fn(&[f32]) -> bool,
    ) -> Decoded {
        assert!(!ids.is_empty(), "there is a token to decode");
        assert!(self.length + ids.len() <= self.capacity, "the cache has room for the tokens");
        let is_prompt = self.length == 0;
        assert!(is_prompt || !self.is_shared || ids.len() == 1, "shared caches take one at a time");
        let mut decoded = Decoded { states: Vec::new(), gates: Vec::new() };
        for ids in ids.chunks(CHUNK) {
            decoded = self.chunk(weights, ids, is_enough);
            self.length += ids.len();
        }
        if is_prompt {
            self.share();
        }
        decoded
    }

    fn chunk(
        &mut self,
        weights: &Weights,
        ids: &[u32],
        is_enough: &dyn Fn(&[f32]) -> bool,
    ) -> Decoded {
        let (d, n) = (self.shape.hidden, ids.len());
        let mut x = Vec::with_capacity(n * d);
        for &id in ids {
            let at = id as usize * d;
            x.extend_from_slice(&weights.embedding[at..at + d]);
        }
        let starts: Vec<usize> = (ids.iter().enumerate())
            .map(|(row, &id)| {
                let own = self.start;
                if self.document_end == Some(id) {
                    self.start = self.length + row + 1;
                }
                own
            })
            .collect();
        let mut decoded = Decoded { states: Vec::new(), gates: Vec::new() };
        let mut sums = Vec::new();
        for r in 0..self.shape.loops {
            for (l, layer) in weights.layers.iter().enumerate() {
                let slot = if self.is_shared { l } else { r * self.shape.layers + l };
                let kv = self.layer(layer, slot, &mut x, &starts);
                if self.is_shared && self.sharing == CacheSharing::Averaged {
                    if r == 0 {
                        sums.push(kv);
                    } else {
                        simd::add(&mut sums[l], &kv);
                    }
                }
            }
            let mut states = vec![0.0; n * d];
            for (x, state) in x.chunks_exact(d).zip(states.chunks_exact_mut(d)) {
                simd::rms_norm(x, &weights.norm, None, state, self.shape.eps);
            }
            x = states;
            let last = &x[(n - 1) * d..];
            decoded.states.extend_from_slice(last);
            decoded.gates.push(simd::dot(last, &weights.exit_weight) + weights.exit_bias);
            if self.is_shared && is_enough(&decoded.gates) {
                break;
            }
        }
        for (l, mut sum) in sums.into_iter().enumerate() {
            simd::scale(&mut sum, 1.0 / decoded.gates.len() as f32);
            self.put(l, &sum, n);
        }
        decoded
    }

    /// Writes rotated keys and values `[n, 2 d]` of new tokens into a slot.
    fn put(&mut self, slot: usize, kv: &[f32], n: usize) {
        let (d, capacity, first) = (self.shape.hidden, self.capacity, self.length);
        let head_dim = d / self.shape.heads;
        let Slot { keys, values } = &mut self.slots[slot];
        let heads = keys.par_chunks_mut(head_dim * capacity);
        let heads = heads.zip(values.par_chunks_mut(head_dim * capacity)).enumerate();
        heads.for_each(|(head, (keys, values))| {
            for row in 0..n {
                let key = &kv[row * 2 * d + head * head_dim..][..head_dim];
                for (keys, key) in keys.chunks_exact_mut(capacity).zip(key) {
                    keys[first + row] = *key;
                }
                let value = &kv[row * 2 * d + d + head * head_dim..][..head_dim];
                values[(first + row) * head_dim..][..head_dim].copy_from_slice(value);
            }
        });
    }

    /// One layer over `x [n, d]`, in place, of tokens whose attention begins at `starts [n]`; their
    /// rotated keys and values, `[n, 2 d]`.
    fn layer(&mut self, layer: &Layer, slot: usize, x: &mut [f32], starts: &[usize]) -> Vec<f32> {
        let n = starts.len();
        let Shape { hidden: d, inner: f, eps, .. } = self.shape;
        let size = super::layer::block_of(n);
        let (mut queries, mut kv) = (vec![0.0; n * d], vec![0.0; n * 2 * d]);
        let blocks = (
            x.par_chunks(size * d),
            queries.par_chunks_mut(size * d),
            kv.par_chunks_mut(size * 2 * d),
        );
        blocks.into_par_iter().enumerate().for_each(|(block, (x, q, kv))| {
            let rows = x.len() / d;
            let mut normed = vec![0.0; rows * d];
            for (x, normed) in x.chunks_exact(d).zip(normed.chunks_exact_mut(d)) {
                simd::rms_norm(x, &layer.input_norm, None, normed, eps);
            }
            layer.query.apply_shared(rows, &normed, q, d);
            layer.key.apply_shared(rows, &normed, kv, 2 * d);
            layer.value.apply_shared(rows, &normed, &mut kv[d..], 2 * d);
            for (row, (q, kv)) in q.chunks_exact_mut(d).zip(kv.chunks_exact_mut(2 * d)).enumerate()
            {
                let position = self.length + block * size + row;
                self.rotary.turn(position, q, self.rotary.scale());
                self.rotary.turn(position, &mut kv[..d], 1.0);
            }
        });
        self.put(slot, &kv, n);
        let mixed = self.attention(slot, &queries, starts);
        x.par_chunks_mut(size * d).zip(mixed.par_chunks(size * d)).for_each(|(x, mixed)| {
            let rows = x.len() / d;
            let (mut branch, mut normed) = (vec![0.0; rows * d], vec![0.0; rows * d]);
            layer.output.apply_shared(rows, mixed, &mut branch, d);
            for row in 0..rows {
                let at = row * d..(row + 1) * d;
                let middle = &mut normed[at.clone()];
                let residual = Some(&x[at.clone()]);
                simd::rms_norm(&branch[at.clone()], &layer.attention_norm, residual, middle, eps);
                x[at.clone()].copy_from_slice(middle);
                simd::rms_norm(&x[at], &layer.mlp_norm, None, middle, eps);
            }
            let (mut gates, mut swiglu) = (vec![0.0; rows * 2 * f], vec![0.0; rows * f]);
            layer.gate.apply_shared(rows, &normed, &mut gates, 2 * f);
            layer.up.apply_shared(rows, &normed, &mut gates[f..], 2 * f);
            for (gates, out) in gates.chunks_exact(2 * f).zip(swiglu.chunks_exact_mut(f)) {
                let (gate, up) = gates.split_at(f);
                simd::swiglu(gate, up, out);
            }
            layer.down.apply_shared(rows, &swiglu, &mut branch, d);
            for row in 0..rows {
                let at = row * d..(row + 1) * d;
                let (out, residual) = (&mut normed[at.clone()], Some(&x[at.clone()]));
                simd::rms_norm(&branch[at.clone()], &layer.output_norm, residual, out, eps);
                x[at.clone()].copy_from_slice(&normed[at]);
            }
        });
        kv
    }

    /// Outputs of the heads beside each other, `[n, d]`, of rotated queries `[n, d]` against what is in
    /// the slot from each one's start up to itself.
    fn attention(&self, slot: usize, queries: &[f32], starts: &[usize]) -> Vec<f32> {
        let n = starts.len();
        let (d, capacity, first) = (self.shape.hidden, self.capacity, self.length);
        let head_dim = d / self.shape.heads;
        let Slot { keys, values } = &self.slots[slot];
        let of_heads: Vec<Vec<f32>> = (0..self.shape.heads)
            .into_par_iter()
            .map(|head| {
                let (at, seen) = (head * head_dim * capacity, first + n);
                let (keys, values) = (&keys[at..], &values[at..]);
                let mut mixed = vec![0.0; n * head_dim];
                with_scratch([n * seen], |[scores]| {
                    let shape = Product { m: n, n: seen, k: head_dim };
                    let queries = Left::rows(&queries[head * head_dim..], d);
                    product(shape, scores, seen, false, queries, Right::Rows(keys, capacity));
                    let mut inverses = Vec::with_capacity(n);
                    for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                        let own = starts[row]..first + row + 1;
                        inverses.push(1.0 / simd::exp_and_sum(&mut scores[own.clone()]).1);
                        scores[..own.start].fill(0.0);
                        scores[own.end..].fill(0.0);
                    }
                    let shape = Product { m: n, n: head_dim, k: seen };
                    let (left, right) = (Left::rows(scores, seen), Right::Rows(values, head_dim));
                    product(shape, &mut mixed, head_dim, false, left, right);
                    for (row, inverse) in mixed.chunks_exact_mut(head_dim).zip(inverses) {
                        simd::scale(row, inverse);
                    }
                });
                mixed
            })
            .collect();
        let mut mixed = vec![0.0; n * d];
        for (row, out) in mixed.chunks_exact_mut(d).enumerate() {
            for (head, out) in of_heads.iter().zip(out.chunks_exact_mut(head_dim)) {
                out.copy_from_slice(&head[row * head_dim..(row + 1) * head_dim]);
            }
        }
        mixed
    }
}

#[cfg(test)]
mod tests {
    use looptrain_proto::spec;

    use super::*;
    use crate::{Layout, TrainState};

    const LOOPS: usize = 3;
    const LAYERS: usize = 2;

    fn weights() -> Weights {
        let model = spec::Model {
            hidden_size: 16,
            num_hidden_layers: LAYERS,
            num_attention_heads: 2,
            intermediate_size: 24,
            vocab_size: 31,
            rms_norm_eps: 1e-6,
            initializer_range: 0.3,
        };
        let layout = Layout::new(&model);
        let mut weights = Weights::new(&layout, LAYERS, false);
        weights.fill(&layout, &TrainState::initial(&model, 5).weights);
        weights
    }

    fn cache(sharing: CacheSharing) -> Cache {
        let shape = Shape {
            sequences: 1,
            length: 12,
            heads: 2,
            hidden: 16,
            inner: 24,
            vocab: 31,
            layers: LAYERS,
            loops: LOOPS,
            eps: 1e-6,
        };
        Cache::new(shape, 12, 1e4, sharing)
    }

    /// What the loops' values become.
    type Leveller = fn([f32; LOOPS]) -> f32;

    /// Gives all loops of a cache that is not shared what `of` makes of the values that the loops
    /// have at the same place.
    fn level(cache: &mut Cache, of: Leveller) {
        for l in 0..LAYERS {
            for at in 0..cache.slots[0].keys.len() {
                let places: [usize; LOOPS] = std::array::from_fn(|r| r * LAYERS + l);
                let key = of(places.map(|place| cache.slots[place].keys[at]));
                let value = of(places.map(|place| cache.slots[place].values[at]));
                for place in places {
                    cache.slots[place].keys[at] = key;
                    cache.slots[place].values[at] = value;
                }
            }
        }
    }

    #[test]
    fn loops_that_share_a_cache_read_what_the_last_one_or_all_on_average_have_left() {
        let weights = weights();
        let never = |_: &[f32]| false;
        let cases: [(CacheSharing, Leveller); 2] = [
            (CacheSharing::Last, |of| of[2]),
            (CacheSharing::Averaged, |of| of.iter().sum::<f32>() / 3.0),
        ];
        for (sharing, of) in cases {
            let (mut shared, mut full) = (cache(sharing), cache(CacheSharing::Full));
            for ids in [&[3, 8, 1, 30][..], &[4], &[9], &[17]] {
                let found = shared.extend(&weights, ids, &never);
                let expected = full.extend(&weights, ids, &never);
                level(&mut full, of);
                for (found, expected) in found.states.iter().zip(&expected.states) {
                    assert!((found - expected).abs() < 1e-5, "{sharing:?}: {found} {expected}");
                }
            }
            assert_eq!(shared.slots.len(), LAYERS);
        }
    }
}
