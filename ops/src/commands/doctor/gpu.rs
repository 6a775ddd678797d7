//! Whether a GPU can train: driver and libraries, the device itself, and how it is.

use looptrain_model::Device;

use super::Finding;

/// What was found of the GPU.
#[derive(Default)]
pub(super) struct Gpu {
    pub(super) findings: Vec<Finding>,
    /// Bytes of its memory that nobody uses.
    pub(super) memory: Option<u64>,
    /// What a run pins that begins on it.
    pub(super) numerics: Option<String>,
}

pub(super) async fn check(device: Device) -> Gpu {
    if device == Device::Cpu {
        let why = "workers compute on the CPU; --device cuda:N checks a GPU";
        return Gpu { findings: vec![Finding::not_checked("gpu", why)], ..Gpu::default() };
    }
    // Libraries are loaded, and kernels compiled.
    tokio::task::spawn_blocking(move || examine(device)).await.unwrap_or_default()
}

#[cfg(not(feature = "cuda"))]
fn examine(_: Device) -> Gpu {
    let remedy = "build it with --features cuda, which is the default";
    let found = "this program was built without GPUs";
    Gpu { findings: vec![Finding::problem("gpu", found, remedy)], ..Gpu::default() }
}

#[cfg(feature = "cuda")]
fn examine(device: Device) -> Gpu {
    use indicatif::BinaryBytes;
    use looptrain_worker::reduce::nccl;

    let mut gpu = Gpu::default();
    let findings = &mut gpu.findings;
    let libraries = looptrain_model::gpu_libraries();
    for (what, found) in &libraries {
        findings.push(match found {
            Ok(()) => Finding::well("library", format!("{what} is there")),
            Err(error) => Finding::error("library", error),
        });
    }
    findings.push(match nccl::version() {
        Ok(version) => Finding::well("nccl", format!("NCCL {version}: workers can reduce with it")),
        Err(error) => {
            let remedy = "workers with GPUs reduce over TCP without it, which is slower: install a release that \
                          works, the same one on all machines (nvidia-nccl-cu13 from PyPI has it)";
            Finding::warning("nccl", error.to_string(), remedy)
        }
    });
    let Device::Cuda(wanted) = device else { return gpu };
    if libraries.iter().any(|(_, found)| found.is_err()) {
        findings.push(Finding::not_checked("device", "without these libraries"));
        return gpu;
    }
    let facts = match looptrain_model::gpu_facts(wanted) {
        Ok(facts) => facts,
        Err(error) => {
            let remedy =
                "take a number below the count of devices, and see whether `nvidia-smi` works";
            findings.push(Finding::problem("device", error.to_string(), remedy));
            return gpu;
        }
    };
    let (major, minor) = facts.capability;
    let found = format!(
        "{device} of {}: {}, compute capability {major}.{minor}, {}; driver for CUDA {}, NVRTC {}",
        facts.count,
        facts.name,
        BinaryBytes(facts.memory),
        facts.driver,
        facts.compiler,
    );
    if !facts.is_new_enough {
        let remedy = "take a GPU with compute capability 8.0 or more: bf16 needs it";
        findings.push(Finding::problem("device", found, remedy));
        return gpu;
    }
    findings.push(Finding::well("device", found));
    let health = match facts.uuid.as_deref().map(looptrain_worker::gpu_health) {
        Some(Ok(health)) => {
            health.into_iter().map(|(metric, of, value)| (metric.name, of, value)).collect()
        }
        Some(Err(error)) => {
            findings.push(Finding::not_checked("health", error));
            Vec::new()
        }
        None => Vec::new(),
    };
    findings.extend(judge(&health));
    let used = value(&health, "looptrain.gpu.memory.used", "").unwrap_or(0.0);
    gpu.memory = Some(facts.memory.saturating_sub(used as u64));
    match looptrain_model::numerics(device) {
        Ok(numerics) => {
            let found = format!("it computes; a run that begins on it pins {numerics}");
            gpu.findings.push(Finding::well("kernels", found));
            gpu.numerics = Some(numerics);
        }
        Err(error) => gpu.findings.push(Finding::error("kernels", &error)),
    }
    gpu
}

/// Degrees above which a GPU is about to slow down.
#[cfg(feature = "cuda")]
const HOT: f64 = 85.0;

#[cfg(feature = "cuda")]
type Told = (&'static str, String, f64);

#[cfg(feature = "cuda")]
fn value(health: &[Told], metric: &str, of: &str) -> Option<f64> {
    health.iter().find(|told| told.0 == metric && told.1 == of).map(|told| told.2)
}

/// What the management library's numbers say: (metric, what of it, value).
#[cfg(feature = "cuda")]
fn judge(health: &[Told]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut words = Vec::new();
    let value = |metric, of| value(health, metric, of);
    if let Some(temperature) = value("looptrain.gpu.temperature", "") {
        words.push(format!("{temperature:.0} degrees"));
        if temperature >= HOT {
            let found = format!("it has {temperature:.0} degrees");
            findings.push(Finding::warning("temperature", found, "look after its cooling"));
        }
    }
    if let Some(errors) = value("looptrain.gpu.ecc.errors", "uncorrected") {
        words.push(format!("{errors:.0} uncorrected memory errors"));
        if errors > 0.0 {
            let found = format!("{errors:.0} uncorrected memory errors since the driver started");
            let remedy =
                "do not train on it: restart the machine, and replace the GPU when they come back";
            findings.push(Finding::problem("memory errors", found, remedy));
        }
    }
    for (reason, remedy) in [
        ("thermal", "look after its cooling"),
        ("hardware", "look after its power supply and cooling"),
    ] {
        if value("looptrain.gpu.throttled", reason).is_some_and(|throttled| throttled > 0.0) {
            let found = format!("its clocks are held down now: {reason}");
            findings.push(Finding::warning("clocks", found, remedy));
        }
    }
    let [used, size] =
        ["looptrain.gpu.memory.used", "looptrain.gpu.memory.size"].map(|metric| value(metric, ""));
    if let (Some(used), Some(size)) = (used, size) {
        let share = used / size.max(1.0);
        words.push(format!("{:.0} % of its memory in use", 100.0 * share));
        if share > 0.1 {
            let found = format!("{:.0} % of its memory is in use by others", 100.0 * share);
            let remedy = "end what uses it (`nvidia-smi` names it), or take another GPU";
            findings.push(Finding::warning("memory in use", found, remedy));
        }
    }
    if !words.is_empty() && findings.is_empty() {
        findings.push(Finding::well("health", words.join(", ")));
    }
    findings
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    fn verdicts(health: &[(&'static str, &str, f64)]) -> Vec<(String, Verdict)> {
        let health: Vec<Told> =
            health.iter().map(|(metric, of, value)| (*metric, (*of).to_owned(), *value)).collect();
        judge(&health).into_iter().map(|finding| (finding.check, finding.verdict)).collect()
    }

    #[test]
    fn a_gpu_is_well_or_it_is_said_what_ails_it() {
        let well = [
            ("looptrain.gpu.temperature", "", 40.0),
            ("looptrain.gpu.memory.used", "", 1e9),
            ("looptrain.gpu.memory.size", "", 80e9),
            ("looptrain.gpu.ecc.errors", "uncorrected", 0.0),
            ("looptrain.gpu.throttled", "power", 1.0),
        ];
        assert_eq!(verdicts(&well), [("health".to_owned(), Verdict::Well)]);
        let ill = [
            ("looptrain.gpu.temperature", "", 91.0),
            ("looptrain.gpu.ecc.errors", "uncorrected", 2.0),
            ("looptrain.gpu.throttled", "hardware", 1.0),
            ("looptrain.gpu.memory.used", "", 60e9),
            ("looptrain.gpu.memory.size", "", 80e9),
        ];
        let expected = [
            ("temperature", Verdict::Warning),
            ("memory errors", Verdict::Problem),
            ("clocks", Verdict::Warning),
            ("memory in use", Verdict::Warning),
        ];
        assert_eq!(verdicts(&ill), expected.map(|(check, verdict)| (check.to_owned(), verdict)));
        assert!(verdicts(&[]).is_empty(), "nothing is known");
    }

    /// Metrics that are looked for by their names.
    #[test]
    fn the_names_are_those_of_the_catalogue() {
        use looptrain_proto::metrics::{CATALOGUE, Reporter};
        let of_gpus = CATALOGUE.iter().filter(|metric| metric.reporter == Reporter::Gpu);
        let names: Vec<&str> = of_gpus.map(|metric| metric.name).collect();
        for name in ["temperature", "ecc.errors", "throttled", "memory.used", "memory.size"] {
            assert!(names.contains(&format!("looptrain.gpu.{name}").as_str()), "{name}");
        }
    }
}
