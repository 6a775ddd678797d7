//! What a worker holds, as a file: beside a checkpoint that it leaves without a coordinator.

use prost::Message;

use crate::v1::Held;

impl Held {
    /// The message as it would travel.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// The other way round.
    ///
    /// # Errors
    /// In words, when the bytes are no such message.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        Self::decode(bytes).map_err(|error| error.to_string())
    }
}
