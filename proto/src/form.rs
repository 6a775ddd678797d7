//! The message that forms a generation, written by hand: as the generated code would be, but for the
//! members. All workers of a generation get the same list, and with thousands of them thousands of
//! lists of thousands would be made and encoded. Here the list is shared, and encoded once.
//!
//! On the wire it is the `Form` of `looptrain.proto`.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use prost::bytes::{Buf, BufMut};
use prost::encoding::{self, DecodeContext, WireType};
use prost::{DecodeError, Message};

use crate::v1::{Collective, Member};

const GENERATION: u32 = 1;
const MEMBERS: u32 = 2;
const RANK: u32 = 3;
const STEP: u32 = 4;
const COLLECTIVE: u32 = 6;

/// A new generation. Whatever the worker was doing for an older one is abandoned at once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Form {
    /// Its number.
    pub generation: u64,
    /// In rank order.
    pub members: Members,
    /// The receiver's place among them.
    pub rank: u32,
    /// The committed step whose state every member must hold before it answers Ready.
    pub step: u64,
    /// What all members reduce with: a [`Collective`].
    pub collective: i32,
}

/// A list of members that costs nothing to clone, and is encoded at most once.
#[derive(Clone, Default)]
pub struct Members(Arc<List>);

#[derive(Default)]
struct List {
    members: Vec<Member>,
    encoded: OnceLock<Vec<u8>>,
}

impl Members {
    /// As fields of a `Form`, one a member, with their tags.
    fn encoded(&self) -> &[u8] {
        self.0.encoded.get_or_init(|| {
            let mut bytes = Vec::new();
            encoding::message::encode_repeated(MEMBERS, &self.0.members, &mut bytes);
            bytes
        })
    }

    /// The list, to be changed; a copy of it when others share it.
    fn to_mut(&mut self) -> &mut Vec<Member> {
        if Arc::get_mut(&mut self.0).is_none() {
            *self = self.0.members.clone().into();
        }
        let list = Arc::get_mut(&mut self.0).expect("nobody else has the list that was just made");
        list.encoded = OnceLock::new();
        &mut list.members
    }
}

impl From<Vec<Member>> for Members {
    fn from(members: Vec<Member>) -> Self {
        Self(Arc::new(List { members, encoded: OnceLock::new() }))
    }
}

impl Deref for Members {
    type Target = [Member];

    fn deref(&self) -> &[Member] {
        &self.0.members
    }
}

impl std::fmt::Debug for Members {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.members.fmt(f)
    }
}

impl PartialEq for Members {
    fn eq(&self, other: &Self) -> bool {
        self.0.members == other.0.members
    }
}

impl Form {
    /// What all members reduce with; the ring if it is something that this build does not know.
    #[must_use]
    pub fn collective(&self) -> Collective {
        Collective::try_from(self.collective).unwrap_or_default()
    }
}

impl Message for Form {
    fn encode_raw(&self, buffer: &mut impl BufMut) {
        if self.generation != 0 {
            encoding::uint64::encode(GENERATION, &self.generation, buffer);
        }
        buffer.put_slice(self.members.encoded());
        if self.rank != 0 {
            encoding::uint32::encode(RANK, &self.rank, buffer);
        }
        if self.step != 0 {
            encoding::uint64::encode(STEP, &self.step, buffer);
        }
        if self.collective != 0 {
            encoding::int32::encode(COLLECTIVE, &self.collective, buffer);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buffer: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        let (name, merged) = match tag {
            GENERATION => {
                let merged =
                    encoding::uint64::merge(wire_type, &mut self.generation, buffer, context);
                ("generation", merged)
            }
            MEMBERS => {
                let members = self.members.to_mut();
                let merged = encoding::message::merge_repeated(wire_type, members, buffer, context);
                ("members", merged)
            }
            RANK => ("rank", encoding::uint32::merge(wire_type, &mut self.rank, buffer, context)),
            STEP => ("step", encoding::uint64::merge(wire_type, &mut self.step, buffer, context)),
            COLLECTIVE => {
                let merged =
                    encoding::int32::merge(wire_type, &mut self.collective, buffer, context);
                ("collective", merged)
            }
            _ => return encoding::skip_field(wire_type, tag, buffer, context),
        };
        merged.map_err(|mut error| {
            error.push("Form", name);
            error
        })
    }

    fn encoded_len(&self) -> usize {
        let length = |tag, value: u64| match value {
            0 => 0,
            value => encoding::uint64::encoded_len(tag, &value),
        };
        length(GENERATION, self.generation)
            + self.members.encoded().len()
            + length(RANK, u64::from(self.rank))
            + length(STEP, self.step)
            + match self.collective {
                0 => 0,
                kind => encoding::int32::encoded_len(COLLECTIVE, &kind),
            }
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What prost derives for the `Form` of the proto file.
    #[derive(Clone, PartialEq, Message)]
    struct Derived {
        #[prost(uint64, tag = "1")]
        generation: u64,
        #[prost(message, repeated, tag = "2")]
        members: Vec<Member>,
        #[prost(uint32, tag = "3")]
        rank: u32,
        #[prost(uint64, tag = "4")]
        step: u64,
        #[prost(enumeration = "Collective", tag = "6")]
        collective: i32,
    }

    prop_compose! {
        fn derived()(
            generation in prop_oneof![Just(0), any::<u64>()],
            names in prop::collection::vec("[a-z0-9.:]{0,20}", 0..5),
            rank in prop_oneof![Just(0), any::<u32>()],
            step in prop_oneof![Just(0), any::<u64>()],
            collective in prop_oneof![Just(0), Just(1), any::<i32>()],
        ) -> Derived {
            let member = |name: String| Member { peer_address: format!("{name}:1"), name };
            let members = names.into_iter().map(member).collect();
            Derived { generation, members, rank, step, collective }
        }
    }

    proptest! {
        #[test]
        fn a_form_is_on_the_wire_what_the_proto_file_says(derived in derived()) {
            let Derived { generation, members, rank, step, collective } = derived.clone();
            let form = Form { generation, members: members.into(), rank, step, collective };
            prop_assert_eq!(form.encode_to_vec(), derived.encode_to_vec());
            prop_assert_eq!(form.encoded_len(), derived.encoded_len());
            prop_assert_eq!(Form::decode(derived.encode_to_vec().as_slice()).unwrap(), form);
        }
    }

    #[test]
    fn a_shared_list_is_not_changed_by_what_is_decoded_into_a_clone() {
        let member = Member { name: "w0".into(), peer_address: "here:1".into() };
        let members = Members::from(vec![member]);
        let form = Form { generation: 1, members: members.clone(), ..Form::default() };
        let mut other = form.clone();
        other.merge(form.encode_to_vec().as_slice()).unwrap();
        assert_eq!((members.len(), form.members.len(), other.members.len()), (1, 1, 2));
        assert_eq!(other.encoded_len(), other.encode_to_vec().len());
    }

    #[test]
    fn a_damaged_form_is_told_by_its_field() {
        // A member whose length is beyond the end.
        let error = Form::decode([0x12, 0x05, 0x0a].as_slice()).unwrap_err();
        assert!(error.to_string().contains("Form.members"), "{error}");
    }
}
