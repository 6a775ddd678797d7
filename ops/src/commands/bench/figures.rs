//! Numbers from measurements: quantiles, and what machine they are of.

use serde_json::{Value, json};

/// Durations or other samples of one quantity.
pub(super) struct Samples(Vec<f64>);

impl Samples {
    pub(super) fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// The smallest sample that at least `share` of all samples do not exceed; NaN without any.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
    }

    pub(super) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub(super) fn max(&self) -> f64 {
        self.quantile(1.0)
    }
}

/// Three decimals: what a reader compares, and not more than was measured.
pub(super) fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// What a figure is worth depends on where it was taken.
pub(super) fn machine() -> Value {
    let information = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = information.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    json!({ "cpu": model, "threads": crate::commands::all_threads() })
}

/// Memory of this process that is in use, in bytes; `None` where the system does not tell.
pub(super) fn resident_bytes() -> Option<u64> {
    status("VmRSS:")
}

/// The most memory that this process has used, in bytes; `None` where the system does not tell.
pub(super) fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

fn status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_sample_that_so_many_do_not_exceed() {
        let samples = Samples::new((1..=200).rev().map(f64::from).collect());
        assert_eq!(
            (samples.median(), samples.quantile(0.99), samples.max()),
            (100.0, 198.0, 200.0)
        );
        let one = Samples::new(vec![7.0]);
        assert_eq!((one.quantile(0.0), one.median(), one.max()), (7.0, 7.0, 7.0));
        assert!(Samples::new(Vec::new()).median().is_nan());
    }

    #[test]
    fn a_process_uses_memory() {
        let now = resident_bytes().unwrap_or_default();
        assert!(now > 1 << 20);
        // Other tests use memory, too, and the system counts it in batches.
        assert!(peak_bytes().unwrap_or_default() > now / 2);
    }
}
