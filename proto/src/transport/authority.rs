//! An authority of a cluster's own, and what it signs.
//!
//! Keys are for P-256. Secret files have mode 0600; each file is whole or not there.

use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::time::SystemTime;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::credentials::{AUTHORITY, CERTIFICATE, KEY};
use super::{Certificate, Identity};

/// The key of an authority, beside its `ca.crt`.
const AUTHORITY_KEY: &str = "ca.key";

/// Signs the certificates of a cluster.
#[derive(Debug)]
pub struct Authority {
    certificate: String,
    key: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key, and the authority that signed it; PEM.
#[derive(Debug)]
pub struct Issued {
    authority: String,
    certificate: String,
    key: String,
}

/// Why an authority cannot be made, or does not sign.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// What was made is no certificate.
    #[error("{what}: {error}")]
    Make {
        /// What was to be made, or read.
        what: String,
        /// What the library said.
        error: rcgen::Error,
    },
    /// The key belongs to another authority.
    #[error("{key} is not the key of {certificate}; take both from one `looptrain certs ca`")]
    OtherKey {
        /// The key.
        key: String,
        /// The certificate.
        certificate: String,
    },
    /// A file of the authority cannot be read.
    #[error("cannot read {file}: {error}; `looptrain certs ca` makes an authority")]
    Read {
        /// The file.
        file: String,
        /// What the system said.
        error: io::Error,
    },
}

fn cannot(what: impl Into<String>) -> impl FnOnce(rcgen::Error) -> AuthorityError {
    move |error| AuthorityError::Make { what: what.into(), error }
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// When its key or certificate cannot be made.
    pub fn new(name: &str, valid: Range<SystemTime>) -> Result<Self, AuthorityError> {
        let mut params = within(valid);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(cannot("a new key"))?;
        let certificate = params.self_signed(&key).map_err(cannot("a new authority"))?;
        let (certificate, secret) = (certificate.pem(), key.serialize_pem());
        Ok(Self { certificate, key: secret, issuer: Issuer::new(params, key) })
    }

    /// That of a directory with `ca.crt` and `ca.key`.
    ///
    /// # Errors
    /// When one of them is not there, or not what it should be.
    pub fn load(directory: &Path) -> Result<Self, AuthorityError> {
        let read = |name: &str| {
            let path = directory.join(name);
            let file = path.display().to_string();
            let text = std::fs::read_to_string(path)
                .map_err(|error| AuthorityError::Read { file: file.clone(), error });
            text.map(|text| (file, text))
        };
        let ((file, certificate), (key_file, key)) = (read(AUTHORITY)?, read(AUTHORITY_KEY)?);
        let pair = KeyPair::from_pem(&key).map_err(cannot(&key_file))?;
        let signs = CertificateDer::from_pem_slice(certificate.as_bytes()).is_ok_and(|der| {
            Certificate::key_of(&der).is_some_and(|own| own == pair.subject_public_key_info())
        });
        if !signs {
            return Err(AuthorityError::OtherKey { key: key_file, certificate: file });
        }
        let issuer = Issuer::from_ca_cert_pem(&certificate, pair).map_err(cannot(file))?;
        Ok(Self { certificate, key, issuer })
    }

    /// Writes `ca.crt` and `ca.key`, unless they are there.
    ///
    /// # Errors
    /// When one of them is there, or cannot be written.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        std::fs::create_dir_all(directory)?;
        let missing = |name: &str| match directory.join(name).exists() {
            true => Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!(
                    "{} is there already; an authority is made once",
                    directory.join(name).display()
                ),
            )),
            false => Ok(()),
        };
        missing(AUTHORITY)?;
        missing(AUTHORITY_KEY)?;
        write(&directory.join(AUTHORITY_KEY), &self.key, 0o600)?;
        write(&directory.join(AUTHORITY), &self.certificate, 0o644)
    }

    /// Signs a new certificate. `hosts` are the DNS names and addresses under which browsers reach its
    /// holder.
    ///
    /// # Errors
    /// When a host is none, or the certificate cannot be made.
    pub fn issue(
        &self,
        identity: &Identity,
        hosts: &[String],
        valid: Range<SystemTime>,
    ) -> Result<Issued, AuthorityError> {
        let mut params = within(valid);
        params.distinguished_name.push(DnType::CommonName, &identity.name);
        params.distinguished_name.push(DnType::OrganizationalUnitName, identity.role.name());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Workers are at both ends of connections.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let uri = identity.to_string();
        let name = uri.as_str().try_into().map_err(cannot(format!("the identity {uri}")))?;
        params.subject_alt_names.push(SanType::URI(name));
        for host in hosts {
            params.subject_alt_names.push(match host.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => {
                    let name = host.as_str().try_into();
                    SanType::DnsName(name.map_err(cannot(format!("the host name `{host}`")))?)
                }
            });
        }
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().map_err(cannot("a new key"))?;
        let signed = params.signed_by(&key, &self.issuer);
        let certificate = signed.map_err(cannot(format!("the certificate of {uri}")))?.pem();
        let (authority, key) = (self.certificate.clone(), key.serialize_pem());
        Ok(Issued { authority, certificate, key })
    }
}

impl Issued {
    /// Writes `tls.crt` and `tls.key`, and sees to it that the authority is in `ca.crt`, beside those that
    /// are there; a process that uses what was there takes these into use by itself.
    ///
    /// # Errors
    /// When there are some and they are not to be replaced, when the directory is that of an authority, or
    /// when they cannot be written.
    pub fn write(&self, directory: &Path, replace: bool) -> io::Result<()> {
        std::fs::create_dir_all(directory)?;
        if directory.join(AUTHORITY_KEY).exists() {
            let text = format!(
                "{} is that of an authority, whose key is not to be where processes run; choose another \
                 directory",
                directory.display()
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        for name in [CERTIFICATE, KEY] {
            let path = directory.join(name);
            if !replace && path.exists() {
                let text = format!("{} is there already; --renew replaces it", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
            }
        }
        let authorities = directory.join(AUTHORITY);
        match std::fs::read_to_string(&authorities) {
            Ok(there) if there.contains(self.authority.trim()) => {}
            // Of another authority, whose certificates the others have until theirs are renewed.
            Ok(there) => {
                let both = format!("{}\n{}", there.trim_end(), self.authority);
                write(&authorities, &both, 0o644)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                write(&authorities, &self.authority, 0o644)?;
            }
            Err(error) => return Err(error),
        }
        write(&directory.join(KEY), &self.key, 0o600)?;
        write(&directory.join(CERTIFICATE), &self.certificate, 0o644)
    }
}

fn within(valid: Range<SystemTime>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = valid.start.into();
    params.not_after = valid.end.into();
    params
}

/// Writes a file beside its place and moves it there; one that was there gives it its mode and owner.
fn write(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let beside = path.with_file_name(name);
    let written = (|| {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(text.as_bytes())?;
        if let Ok(there) = std::fs::metadata(path) {
            file.set_permissions(there.permissions())?;
            // Who may not give files away keeps them.
            let _ = fchown(&file, Some(there.uid()), Some(there.gid()));
        }
        file.sync_all()?;
        std::fs::rename(&beside, path)
    })();
    if written.is_err() {
        // What could not be written whole is no use; that it stays changes nothing.
        let _ = std::fs::remove_file(&beside);
    }
    written.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}
