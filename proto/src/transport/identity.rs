//! Who a certificate says its holder is.

use std::fmt;
use std::str::FromStr;

/// What the holder of a certificate may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Runs the coordinator.
    Coordinator,
    /// Joins runs and exchanges gradients and state with other workers.
    Worker,
    /// Drains workers; pauses, resumes, saves and stops runs; sees what a viewer sees.
    Operator,
    /// Sees the status, the page and metrics.
    Viewer,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Coordinator, Self::Worker, Self::Operator, Self::Viewer];

    /// As it is written in certificates and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
            Self::Operator => "operator",
            Self::Viewer => "viewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = NoIdentity;

    fn from_str(text: &str) -> Result<Self, NoIdentity> {
        let role = Self::ALL.into_iter().find(|role| role.name() == text);
        role.ok_or_else(|| NoIdentity::Role { role: text.to_owned() })
    }
}

/// A role and a name, written `spiffe://looptrain/ROLE/NAME` as one URI among a certificate's
/// subject alternative names (the form is that of a SPIFFE ID).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What it may do.
    pub role: Role,
    /// For people and logs: letters, digits, `-`, `_` and `.`, 128 at most.
    pub name: String,
}

/// Why there is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoIdentity {
    /// None of the URIs is one.
    #[error(
        "it names no identity: one of its subject alternative names must be a URI like \
         {SCHEME}worker/NAME"
    )]
    Missing,
    /// More than one of the URIs is.
    #[error("it names more than one identity ({first} and {second})")]
    Several {
        /// One of them.
        first: String,
        /// Another one.
        second: String,
    },
    /// The role is none.
    #[error("there is no role `{role}`; roles are coordinator, worker, operator and viewer")]
    Role {
        /// What is there instead.
        role: String,
    },
    /// The name is none.
    #[error("`{name}` is no name: write up to 128 letters, digits, `-`, `_` and `.`")]
    Name {
        /// What is there instead.
        name: String,
    },
}

/// What an identity begins with.
const SCHEME: &str = "spiffe://looptrain/";

/// More is no name.
const LONGEST_NAME: usize = 128;

impl Identity {
    /// An identity of these parts.
    ///
    /// # Errors
    /// When the name has characters that no name has, or is too long.
    pub fn new(role: Role, name: impl Into<String>) -> Result<Self, NoIdentity> {
        let name = name.into();
        let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        match (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(usual) {
            true => Ok(Self { role, name }),
            false => Err(NoIdentity::Name { name }),
        }
    }

    /// The one identity among a certificate's URIs.
    ///
    /// # Errors
    /// When there is none, or more than one, or its role or name is none.
    pub fn among<'a>(uris: impl IntoIterator<Item = &'a str>) -> Result<Self, NoIdentity> {
        let mut identities =
            uris.into_iter().filter_map(|uri| Some((uri, uri.strip_prefix(SCHEME)?)));
        let (first, path) = identities.next().ok_or(NoIdentity::Missing)?;
        if let Some((second, _)) = identities.next() {
            return Err(NoIdentity::Several { first: first.into(), second: second.into() });
        }
        let (role, name) = path.split_once('/').ok_or(NoIdentity::Missing)?;
        Self::new(role.parse()?, name)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.role, self.name)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_is_written() {
        for role in Role::ALL {
            let identity = Identity::new(role, "node-7.rack_2").unwrap();
            let uri = identity.to_string();
            assert_eq!(Identity::among(["https://elsewhere", &uri]).unwrap(), identity);
        }
    }

    #[test]
    fn what_is_no_identity_is_told_apart() {
        let of = |uris: &[&str]| Identity::among(uris.iter().copied()).unwrap_err();
        assert_eq!(of(&[]), NoIdentity::Missing);
        assert_eq!(of(&["spiffe://other/worker/a"]), NoIdentity::Missing);
        assert_eq!(of(&["spiffe://looptrain/worker"]), NoIdentity::Missing);
        let two = ["spiffe://looptrain/worker/a", "spiffe://looptrain/operator/a"];
        assert!(matches!(of(&two), NoIdentity::Several { .. }));
        assert!(matches!(of(&["spiffe://looptrain/root/a"]), NoIdentity::Role { .. }));
        for name in ["", "a/b", "a b", "ä", &"x".repeat(129)] {
            let uri = format!("spiffe://looptrain/worker/{name}");
            assert!(matches!(of(&[&uri]), NoIdentity::Name { .. }), "{name}");
        }
    }
}
