//! What a machine is checked for.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use looptrain_model::Device;

use super::{TlsArgs, address};

/// Shown below the options.
pub(super) const EXAMPLES: &str = "Examples:
  looptrain doctor run.toml
  looptrain doctor run.toml --listen 0.0.0.0:7400 --listen 0.0.0.0:8080
  looptrain doctor run.toml --device cuda:0 --coordinator https://10.0.0.5:7400 --tls tls
Exit status 1 when something is to be mended. It leaves nothing in the store.";

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// The run spec, a TOML file; without it only the machine is checked
    pub(crate) spec: Option<PathBuf>,
    /// Override a key of the spec, such as `run.store=s3://lab`; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "spec")]
    pub(crate) overrides: Vec<String>,
    /// Ask this coordinator
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: Option<String>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Where a worker of this machine is to compute; the CPU by default
    #[arg(long, value_name = "cpu|cuda:N", default_value_t)]
    pub(crate) device: Device,
    /// An address that is to be listened on, for workers, peers, the page or metrics; may be repeated
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub(crate) listen: Vec<SocketAddr>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
