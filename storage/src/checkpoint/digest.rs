//! One digest for all weights: what two runs compare to say that they trained the same model.

use looptrain_proto::Digest;

use super::codec::little_endian;
use super::{FIRST_MOMENT, SECOND_MOMENT};

/// The digest of all weights among `tensors` (name, shape, data), whatever order they come in;
/// moments are left out.
///
/// It is blake3 over the weights sorted by name, each as: length of the name, name, number of
/// dimensions, dimensions, values. Lengths and dimensions are 64-bit, values 32-bit floats, all
/// little-endian.
#[must_use]
pub fn weights_digest<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
) -> Digest {
    let mut weights: Vec<_> = tensors.into_iter().filter(|(name, ..)| is_weight(name)).collect();
    weights.sort_by_key(|&(name, ..)| name);

    let mut hasher = WeightsHasher::default();
    for (name, shape, data) in weights {
        hasher.begin(name, shape);
        hasher.update(&little_endian(data));
    }
    hasher.finish()
}

/// Makes the digest of weights that come sorted by name, piece by piece.
#[derive(Debug, Default)]
pub struct WeightsHasher(blake3::Hasher);

impl WeightsHasher {
    /// What follows are the values of this one.
    pub fn begin(&mut self, name: &str, shape: &[usize]) {
        let Self(hasher) = self;
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&(shape.len() as u64).to_le_bytes());
        for &length in shape {
            hasher.update(&(length as u64).to_le_bytes());
        }
    }

    /// Some values.
    pub fn add(&mut self, values: &[f32]) {
        self.update(&little_endian(values));
    }

    /// Some values as they are stored.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all.
    #[must_use]
    pub fn finish(self) -> Digest {
        self.0.finalize().into()
    }
}

/// Whether a tensor of that name is a weight, not a moment of one.
pub(super) fn is_weight(name: &str) -> bool {
    !name.starts_with(FIRST_MOMENT) && !name.starts_with(SECOND_MOMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_depends_on_names_shapes_and_bits_but_not_on_order_or_moments() {
        let (a, b): (&[f32], &[f32]) = (&[1.0, 2.0], &[0.0; 4]);
        let digest = weights_digest([("a", &[2][..], a), ("b", &[2, 2], b)]);
        assert_eq!(digest, weights_digest([("b", &[2, 2][..], b), ("a", &[2], a)]));
        let moments = [("a", &[2][..], a), ("b", &[2, 2], b), ("optim.m.a", &[2], b)];
        assert_eq!(digest, weights_digest(moments));

        let negative: &[f32] = &[-0.0, 0.0, 0.0, 0.0];
        for other in [
            [("c", &[2][..], a), ("b", &[2, 2], b)],
            [("a", &[1, 2][..], a), ("b", &[2, 2], b)],
            [("a", &[2][..], a), ("b", &[4], b)],
            [("a", &[2][..], a), ("b", &[2, 2], negative)],
        ] {
            assert_ne!(digest, weights_digest(other));
        }
    }
}
