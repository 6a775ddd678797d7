//! Messages that also travel, or lie, outside of a session's stream.

use prost::Message;

use crate::v1::{Held, Votes};

macro_rules! bytes {
    ($($message:ident),*) => {
        $(impl $message {
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
        })*
    };
}

// The first lies beside a checkpoint that a worker leaves without a coordinator; the other goes from
// worker to worker.
bytes!(Held, Votes);
