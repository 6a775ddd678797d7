//! Small value types: what the protocol counts and compares, each with a name of its own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// Number of committed optimizer updates; the first update is step 1, step 0 is the
    /// initial state.
    Step
}
counter! {
    /// A numbered membership: which workers, and their ranks.
    Generation
}
counter! {
    /// A numbered coordinator process; a higher one fences a lower one.
    Incarnation
}
counter! {
    /// A worker's session with one coordinator; never reused within an incarnation.
    WorkerId
}

/// Position of a worker in the ring of one generation, from 0.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Rank(pub u32);

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The whole data position of a run: how many sequences of which stage committed steps have
/// consumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cursor {
    /// Index of the stage in the spec.
    pub stage: usize,
    /// Sequences of that stage consumed so far.
    pub sequences: u64,
}

/// A blake3 hash; written `blake3:HEX`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

/// Text that is no digest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is no digest; expected `blake3:` and 64 hexadecimal digits")]
pub struct NoDigest(String);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Takes the 32 bytes of a protocol field.
    ///
    /// # Errors
    /// When there are not exactly 32.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NoDigest> {
        match bytes.try_into() {
            Ok(array) => Ok(Self(array)),
            Err(_) => Err(NoDigest(format!("{} bytes", bytes.len()))),
        }
    }

    /// The digest as the bytes of a protocol field.
    #[must_use]
    pub fn to_vec(self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = NoDigest;

    fn from_str(text: &str) -> Result<Self, NoDigest> {
        text.strip_prefix("blake3:")
            .and_then(|hex| blake3::Hash::from_hex(hex).ok())
            .map(Self::from)
            .ok_or_else(|| NoDigest(text.to_owned()))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_its_text_form() {
        let digest = Digest::of(b"loop");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!("blake3:12".parse::<Digest>().is_err());
        assert!("sha256:00".parse::<Digest>().is_err());
    }

    #[test]
    fn a_digest_field_of_the_wrong_length_is_refused() {
        assert!(Digest::from_bytes(&[0; 31]).is_err());
        assert_eq!(Digest::from_bytes(&[7; 32]), Ok(Digest([7; 32])));
    }
}
