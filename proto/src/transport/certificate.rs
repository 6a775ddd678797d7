//! What a certificate says.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Identity, NoIdentity};

/// The parts of a certificate that looptrain looks at. Whether it is signed by whom it should be is
/// another question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Whose it is, where it is that of a process of looptrain.
    pub identity: Result<Identity, NoIdentity>,
    /// DNS names and addresses for which it is valid.
    pub hosts: Vec<String>,
    /// When it begins.
    pub begins: SystemTime,
    /// When it ends.
    pub ends: SystemTime,
    /// Who signed it, as its issuer field says.
    pub issuer: String,
    /// What its issuer calls it.
    pub serial: String,
}

impl Certificate {
    /// The public key of a certificate, as it is encoded (SubjectPublicKeyInfo); none of what is no
    /// certificate.
    pub(super) fn key_of(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        Some(parsed.public_key().raw.to_vec())
    }

    /// Reads a certificate.
    ///
    /// # Errors
    /// What is wrong with its encoding.
    pub fn read(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
        let names = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
        let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
        let uris = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let hosts = names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => Some(address(bytes)?.to_string()),
            _ => None,
        });
        let validity = parsed.validity();
        let moment =
            |time: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(time).unwrap_or_default());
        Ok(Self {
            identity: Identity::among(uris),
            hosts: hosts.collect(),
            begins: moment(validity.not_before.timestamp()),
            ends: moment(validity.not_after.timestamp()),
            issuer: parsed.issuer().to_string(),
            serial: parsed.raw_serial_as_string(),
        })
    }
}

fn address(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}
