//! `looptrain doctor`: whether a machine and a spec are fit for a run, before there is one.
//!
//! Each group of checks is a file here: it finds things out, and judges them in functions that are told
//! what was found. A check ends as a [`Finding`] and never ends the command, so that everything that is
//! to be mended is told at once. What needs something that is not well (a store that does not
//! answer) is not checked, and says so.

mod clock;
mod data;
mod gpu;
mod machine;
mod network;
mod report;
mod security;
mod spec;
mod store;

use anyhow::{Result, bail};
use looptrain_model::Device;

use self::report::{Finding, Report};
use crate::cli::Doctor;

pub(crate) async fn run(args: Doctor) -> Result<()> {
    let report = examine(&args).await;
    if args.json {
        outln!("{}", serde_json::to_string_pretty(&report.to_json())?);
    } else {
        out!("{}", report.table());
    }
    match report.problems() {
        0 => Ok(()),
        1 => bail!("one thing is to be mended before a run"),
        count => bail!("{count} things are to be mended before a run"),
    }
}

/// All checks, those first that others build on.
async fn examine(args: &Doctor) -> Report {
    let mut report = Report::default();
    let (spec, findings) = spec::check(args.spec.as_deref(), &args.overrides);
    report.add("spec", findings);
    let spec = spec.as_ref();

    let mut opened = store::Opened::of(spec);
    let (findings, clock_of_store) = opened.check(spec).await;
    report.add("store", findings);

    let (credentials, findings) = security::check(&args.tls);
    report.add("security", findings);

    let mut findings = network::check_addresses(&args.listen, credentials.is_some()).await;
    let url = args.coordinator.as_deref();
    let (told, clock_of_coordinator) = network::ask(url, credentials.as_ref(), spec).await;
    findings.extend(told);
    report.add("network", findings);
    report.add("clock", clock::check(clock_of_store, clock_of_coordinator));

    let gpu = gpu::check(args.device).await;
    let numerics = match args.device {
        Device::Cpu => machine::numerics().await,
        _ => gpu.numerics,
    };
    let machine =
        machine::check(spec, opened.store(), args.device, numerics.as_deref(), gpu.memory);
    report.add("machine", machine);
    report.add("gpu", gpu.findings);

    report.add("data", data::check(spec, opened.store(), numerics.as_deref()).await);
    report
}
