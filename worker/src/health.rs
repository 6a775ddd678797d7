//! The health of the GPU that a worker computes on, as NVIDIA's management library (NVML) tells it.
//!
//! The library comes with the driver and is looked for when there is a GPU; without it, and for what a
//! device does not tell, there are no series. It is asked whenever somebody looks at the metrics.

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use looptrain_proto::metrics::{self, Metric, Series};
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::error::NvmlError;

use crate::Stop;

/// The library's name where a driver installs it.
const LIBRARY: &str = "libnvidia-ml.so.1";

/// What holds clocks down though there is work to do.
const REASONS: [(&str, ThrottleReasons); 3] = [
    ("thermal", ThrottleReasons::SW_THERMAL_SLOWDOWN.union(ThrottleReasons::HW_THERMAL_SLOWDOWN)),
    ("power", ThrottleReasons::SW_POWER_CAP),
    ("hardware", ThrottleReasons::HW_SLOWDOWN.union(ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN)),
];

/// What a device tells now.
type Read = fn(&nvml_wrapper::Device) -> Result<Vec<(&'static str, f64)>, NvmlError>;

/// What is reported of a GPU; of some metrics a value for each label beside the GPU's.
const OBSERVED: &[(Metric, Read)] = &[
    (metrics::GPU_TEMPERATURE, |gpu| {
        Ok(vec![("", f64::from(gpu.temperature(TemperatureSensor::Gpu)?))])
    }),
    // Told in milliwatts.
    (metrics::GPU_POWER, |gpu| Ok(vec![("", f64::from(gpu.power_usage()?) / 1e3)])),
    // And in percent.
    (metrics::GPU_UTILIZATION, |gpu| {
        Ok(vec![("", f64::from(gpu.utilization_rates()?.gpu) / 100.0)])
    }),
    (metrics::GPU_MEMORY_USED, |gpu| Ok(vec![("", gpu.memory_info()?.used as f64)])),
    (metrics::GPU_MEMORY_SIZE, |gpu| Ok(vec![("", gpu.memory_info()?.total as f64)])),
    (metrics::GPU_ECC_ERRORS, |gpu| {
        let errors = |kind| gpu.total_ecc_errors(kind, EccCounter::Volatile);
        Ok(vec![
            ("corrected", errors(MemoryError::Corrected)? as f64),
            ("uncorrected", errors(MemoryError::Uncorrected)? as f64),
        ])
    }),
    (metrics::GPU_THROTTLED, |gpu| {
        let now = gpu.current_throttle_reasons()?;
        Ok(REASONS.map(|(name, reasons)| (name, f64::from(now.intersects(reasons)))).to_vec())
    }),
];

/// Has the health of the GPU with this UUID reported.
pub(crate) fn observe(uuid: &str) {
    match Nvml::builder().lib_path(OsStr::new(LIBRARY)).init() {
        Ok(library) => observe_with(&Arc::new(library), uuid),
        Err(error) => {
            tracing::warn!(%error, "the GPU's health is not reported: {LIBRARY} does not start")
        }
    }
}

/// What the management library tells of a GPU now, as the metrics have it: (metric, what of it, value).
///
/// # Errors
/// When the library is not there or does not start.
pub fn gpu_health(uuid: &str) -> Result<Vec<(Metric, String, f64)>, String> {
    let library = Nvml::builder().lib_path(OsStr::new(LIBRARY)).init();
    let library = library.map_err(|error| format!("{LIBRARY} does not start: {error}"))?;
    Ok(health_with(&library, uuid))
}

/// How often it is looked whether a GPU is still well.
const LOOK: Duration = Duration::from_secs(10);

/// What keeps a GPU from being trusted with a run; `None` when it is well, or nothing is known.
pub(crate) fn ailment(uuid: &str) -> Option<String> {
    let library = Nvml::builder().lib_path(OsStr::new(LIBRARY)).init().ok()?;
    ailment_with(&library, uuid)
}

fn ailment_with(library: &Nvml, uuid: &str) -> Option<String> {
    let uncorrected = |(metric, of, _): &(Metric, String, f64)| {
        metric.name == metrics::GPU_ECC_ERRORS.name && of == "uncorrected"
    };
    let (_, _, errors) = health_with(library, uuid).into_iter().find(uncorrected)?;
    (errors > 0.0).then(|| {
        format!(
            "{uuid} has had {errors:.0} uncorrected memory errors since its driver started; reset it \
             (nvidia-smi --gpu-reset), and replace it when they come back"
        )
    })
}

/// Has the worker leave when its GPU turns out not to be well: what it computes may be wrong from then on.
/// Ends with the process.
pub(crate) async fn watch(uuid: String, stop: Stop) {
    loop {
        tokio::time::sleep(LOOK).await;
        let uuid = uuid.clone();
        let found = tokio::task::spawn_blocking(move || ailment(&uuid)).await;
        if let Ok(Some(ailment)) = found {
            tracing::error!(ailment, "this worker leaves");
            return stop.tell(format!("its GPU is not well: {ailment}"));
        }
    }
}

fn health_with(library: &Nvml, uuid: &str) -> Vec<(Metric, String, f64)> {
    let told = |(metric, read): &(Metric, Read)| {
        let metric = *metric;
        let one = move |(mut labels, value): Series| {
            (metric, labels.drain(1..).next().unwrap_or_default(), value)
        };
        series(library, uuid, *read).into_iter().map(one).collect::<Vec<_>>()
    };
    OBSERVED.iter().flat_map(told).collect()
}

fn observe_with(library: &Arc<Nvml>, uuid: &str) {
    for (metric, read) in OBSERVED {
        let (library, uuid) = (Arc::clone(library), uuid.to_owned());
        metric.observe(move || series(&library, &uuid, *read));
    }
}

fn series(library: &Nvml, uuid: &str, read: Read) -> Vec<Series> {
    let told = library.device_by_uuid(uuid).and_then(|gpu| read(&gpu));
    let labelled = |(label, value): (&str, f64)| {
        let mut labels = vec![uuid.to_owned()];
        labels.extend((!label.is_empty()).then(|| label.to_owned()));
        (labels, value)
    };
    // What a device does not tell is no error: consumer cards have no ECC memory.
    told.unwrap_or_default().into_iter().map(labelled).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use looptrain_proto::metrics::{CATALOGUE, Reporter};

    use super::*;

    /// A management library with one GPU, which is hot.
    const FAKE: &str = r#"
        #include <cstring>
        extern "C" {
        int nvmlInit_v2() { return 0; }
        int nvmlShutdown() { return 0; }
        const char* nvmlErrorString(int) { return "fake"; }
        int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
            *device = (void*)1;
            return std::strcmp(uuid, "GPU-here") == 0 ? 0 : 6;
        }
        int nvmlDeviceGetTemperature(void*, int, unsigned* value) { *value = 91; return 0; }
        int nvmlDeviceGetPowerUsage(void*, unsigned* value) { *value = 250500; return 0; }
        int nvmlDeviceGetUtilizationRates(void*, unsigned* values) { values[0] = 75; values[1] = 10; return 0; }
        struct Memory { unsigned version; unsigned long long total, reserved, free, used; };
        int nvmlDeviceGetMemoryInfo_v2(void*, Memory* memory) {
            memory->total = 80000; memory->free = 20000; memory->used = 60000; memory->reserved = 0;
            return 0;
        }
        int nvmlDeviceGetTotalEccErrors(void*, int, int, unsigned long long* count) {
            if (ERRORS < 0) return 3;
            *count = ERRORS;
            return 0;
        }
        // Software thermal slowdown, and that there is nothing to do, which is no reason for concern.
        int nvmlDeviceGetCurrentClocksThrottleReasons(void*, unsigned long long* reasons) {
            *reasons = 0x20 | 0x1;
            return 0;
        }
        }
    "#;

    /// The library, of a GPU that has had so many errors in its memory; one that is negative does not tell.
    fn fake(errors: i32) -> (tempfile::TempDir, Nvml) {
        let folder = tempfile::tempdir().unwrap();
        let [source, library] = ["nvml.cpp", "libnvml.so"].map(|name| folder.path().join(name));
        std::fs::write(&source, FAKE.replace("ERRORS", &errors.to_string())).unwrap();
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let mut compile = Command::new(compiler);
        compile.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
        assert!(compile.status().unwrap().success());
        (folder, Nvml::builder().lib_path(library.as_os_str()).init().unwrap())
    }

    #[test]
    fn a_gpu_with_uncorrected_errors_is_not_well() {
        let (_folder, ill) = fake(2);
        let told = ailment_with(&ill, "GPU-here").unwrap();
        assert!(told.starts_with("GPU-here has had 2 uncorrected memory errors"), "{told}");
        let (_folder, well) = fake(0);
        assert_eq!(ailment_with(&well, "GPU-here"), None);
        assert_eq!(ailment_with(&ill, "GPU-gone"), None, "nothing is known");
    }

    #[test]
    fn what_the_management_library_tells_is_reported_and_what_it_does_not_is_left_out() {
        let (_folder, library) = fake(-1);
        let told: Vec<(&str, Vec<Series>)> = OBSERVED
            .iter()
            .map(|(metric, read)| (metric.name, series(&library, "GPU-here", *read)))
            .collect();
        let one = |value: f64| vec![(vec!["GPU-here".to_owned()], value)];
        let throttled = [("thermal", 1.0), ("power", 0.0), ("hardware", 0.0)]
            .map(|(reason, value)| (vec!["GPU-here".to_owned(), reason.to_owned()], value));
        assert_eq!(
            told,
            [
                ("looptrain.gpu.temperature", one(91.0)),
                ("looptrain.gpu.power", one(250.5)),
                ("looptrain.gpu.utilization", one(0.75)),
                ("looptrain.gpu.memory.used", one(60_000.0)),
                ("looptrain.gpu.memory.size", one(80_000.0)),
                ("looptrain.gpu.ecc.errors", vec![]),
                ("looptrain.gpu.throttled", throttled.to_vec()),
            ]
        );
        assert!(OBSERVED.iter().all(|(_, read)| series(&library, "GPU-gone", *read).is_empty()));

        let health = health_with(&library, "GPU-here");
        assert_eq!(health[0], (metrics::GPU_TEMPERATURE, String::new(), 91.0));
        assert!(health.contains(&(metrics::GPU_THROTTLED, "thermal".into(), 1.0)), "{health:?}");
        assert_eq!(health.len(), 8);
    }

    #[test]
    fn all_of_a_gpus_catalogue_is_reported() {
        let listed = CATALOGUE.iter().filter(|metric| metric.reporter == Reporter::Gpu);
        let listed: Vec<&str> = listed.map(|metric| metric.name).collect();
        let reported: Vec<&str> = OBSERVED.iter().map(|(metric, _)| metric.name).collect();
        assert_eq!(listed, reported);
    }
}
