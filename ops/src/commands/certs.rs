//! `looptrain certs`: an authority of one's own, certificates, and tokens.

use std::fmt::Write as _;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use looptrain_proto::transport::{Authority, Certificate, Credentials, Identity, Role};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::cli::{Certs, Issue, NewAuthority, NewToken, ShowCertificate};

/// Certificates begin this much before they are made, for machines whose clocks are behind.
const BEFORE: Duration = Duration::from_secs(3600);

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Bytes of a token.
const TOKEN: usize = 32;

pub(crate) fn run(command: Certs) -> Result<()> {
    match command {
        Certs::Ca(args) => ca(&args),
        Certs::Issue(args) => issue(&args),
        Certs::Show(args) => show(&args),
        Certs::Token(args) => token(&args),
    }
}

/// From a little before now.
fn of_days(days: u32) -> Range<SystemTime> {
    let now = SystemTime::now();
    now - BEFORE..now + DAY * days
}

fn ca(args: &NewAuthority) -> Result<()> {
    Authority::new(&args.name, of_days(args.days))?.write(&args.to)?;
    let (days, directory) = (args.days, args.to.display());
    outln!("an authority for {days} days in {directory}; keep its ca.key safe");
    Ok(())
}

fn issue(args: &Issue) -> Result<()> {
    let identity = Identity::new(args.role, &args.name)?;
    let issued = Authority::load(&args.ca)?.issue(&identity, &args.hosts, of_days(args.days))?;
    issued.write(&args.to, args.renew)?;
    outln!("{identity} for {} days in {}", args.days, args.to.display());
    Ok(())
}

fn show(args: &ShowCertificate) -> Result<()> {
    let path = args.directory.join("tls.crt");
    let der = CertificateDer::from_pem_file(&path)
        .with_context(|| format!("cannot read a certificate from {}", path.display()))?;
    let certificate =
        Certificate::read(&der).map_err(|reason| anyhow!("{}: {reason}", path.display()))?;
    let good = Credentials::load(&args.directory, &Role::ALL).map(|_| ());
    let [begins, ends] = [certificate.begins, certificate.ends].map(written);
    let (begins, ends) = (begins?, ends?);
    let left = certificate.ends.duration_since(SystemTime::now()).unwrap_or_default();
    let days = (left.as_secs_f64() / DAY.as_secs_f64()).round() as u64;
    if args.json {
        let shown = json!({
            "identity": certificate.identity.as_ref().ok().map(ToString::to_string),
            "hosts": certificate.hosts,
            "begins": begins,
            "ends": ends,
            "days_left": days,
            "issuer": certificate.issuer,
            "serial": certificate.serial,
            "good": good.is_ok(),
            "problem": good.as_ref().err().map(ToString::to_string),
        });
        outln!("{}", serde_json::to_string_pretty(&shown)?);
    } else {
        let identity = match &certificate.identity {
            Ok(identity) => identity.to_string(),
            Err(error) => error.to_string(),
        };
        let hosts = match certificate.hosts.as_slice() {
            [] => "none".to_owned(),
            hosts => hosts.join(", "),
        };
        outln!("identity  {identity}");
        outln!("hosts     {hosts}");
        outln!("valid     {begins} to {ends} ({days} days left)");
        outln!("issuer    {}", certificate.issuer);
        outln!("serial    {}", certificate.serial);
        if good.is_ok() {
            outln!("good      yes: the key fits, and ca.crt has signed it");
        }
    }
    Ok(good?)
}

fn written(time: SystemTime) -> Result<String> {
    let time = OffsetDateTime::from(time);
    time.format(&Rfc3339).context("a time that no calendar has")
}

fn token(args: &NewToken) -> Result<()> {
    let mut bytes = [0; TOKEN];
    let filled = aws_lc_rs::default_provider().secure_random.fill(&mut bytes);
    filled.map_err(|_| anyhow!("the system gives no random numbers"))?;
    let mut token = String::with_capacity(2 * TOKEN + 1);
    for byte in bytes {
        write!(token, "{byte:02x}")?;
    }
    token.push('\n');
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(&args.to);
    let written = file.and_then(|mut file| file.write_all(token.as_bytes()));
    written.with_context(|| format!("cannot write {}", args.to.display()))?;
    outln!("one token in {}; --page-tokens takes the file", args.to.display());
    Ok(())
}
