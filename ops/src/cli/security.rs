//! Certificates, tokens, and where a process may listen.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use looptrain_proto::transport::Role;

/// With which certificates a coordinator is called.
#[derive(Clone, Debug, Args)]
pub(crate) struct TlsArgs {
    /// Directory with ca.crt, tls.crt and tls.key, for TLS in both directions; who calls a coordinator
    /// that has one writes https://
    #[arg(long, value_name = "DIR")]
    pub(crate) tls: Option<PathBuf>,
}

/// How a process listens to others.
#[derive(Clone, Debug, Args)]
pub(crate) struct ListenArgs {
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// File of tokens, one a line, each of which lets its holder read the page and /metrics
    #[arg(long, value_name = "FILE")]
    pub(crate) page_tokens: Option<PathBuf>,
    /// Listen without TLS on addresses that other machines can reach: whoever reaches them can read, take
    /// part and stop the run
    #[arg(long, conflicts_with = "tls")]
    pub(crate) insecure: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Certs {
    /// Make an authority that signs the certificates of a cluster
    #[command(after_help = "Example: looptrain certs ca --to ca\n\
        Keep ca.key off the machines of the cluster: who has it can be anybody.")]
    Ca(NewAuthority),
    /// Make the certificate of a process or a person
    #[command(
        after_help = "Example: looptrain certs issue --ca ca --role worker --name node7 --to tls\n\
        A worker's certificate may serve many workers. Processes take a new one into use by themselves."
    )]
    Issue(Issue),
    /// Show what a certificate says, and whether it is good; exit status 1 when it is not
    #[command(after_help = "Example: looptrain certs show tls")]
    Show(ShowCertificate),
    /// Make a token for the status page
    #[command(after_help = "Example: looptrain certs token --to page.tokens")]
    Token(NewToken),
}

#[derive(Debug, Args)]
pub(crate) struct NewAuthority {
    /// Directory for ca.crt and ca.key
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// What certificates call it
    #[arg(long, default_value = "looptrain")]
    pub(crate) name: String,
    /// How long it is good
    #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub(crate) days: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Issue {
    /// Directory of the authority
    #[arg(long, value_name = "DIR")]
    pub(crate) ca: PathBuf,
    /// What its holder may do: coordinator, worker, operator (drain, pause, resume, save, stop, see) or viewer
    #[arg(long)]
    pub(crate) role: Role,
    /// Whose it is, for logs: letters, digits, `-`, `_` and `.`
    #[arg(long)]
    pub(crate) name: String,
    /// A DNS name or address under which browsers and Prometheus reach its holder; may be repeated
    #[arg(long = "host", value_name = "HOST")]
    pub(crate) hosts: Vec<String>,
    /// How long it is good
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
    /// Directory for ca.crt, tls.crt and tls.key
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Replace what is there
    #[arg(long)]
    pub(crate) renew: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ShowCertificate {
    /// Directory with ca.crt, tls.crt and tls.key
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct NewToken {
    /// The file to write
    #[arg(long, value_name = "FILE")]
    pub(crate) to: PathBuf,
}
