//! Whether the machine has what a worker needs: instructions, cores, memory, disk, open files.

use std::path::Path;

use indicatif::BinaryBytes;
use looptrain_model::{Device, KernelLevel};
use looptrain_proto::Spec;
use looptrain_proto::spec::Recompute;
use looptrain_storage::Store;
use looptrain_worker::{available_memory, worker_bytes};
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::commands::{all_threads, worker};
use crate::plan::CHECKPOINT_BYTES;

/// Files that a process has open whatever the number of workers: libraries, connections to the store,
/// the page.
const OTHER_FILES: u64 = 256;

pub(super) fn check(
    spec: Option<&Spec>,
    store: Option<&Store>,
    device: Device,
    numerics: Option<&str>,
    gpu_memory: Option<u64>,
) -> Vec<Finding> {
    let mut findings =
        vec![kernels(KernelLevel::detect(), numerics), threads(all_threads(), cores())];
    let workers = spec.map_or(1, |spec| spec.cluster.workers.max(spec.cluster.max_workers));
    // A coordinator raises the lower of the two limits to the higher one.
    findings.push(open_files(getrlimit(Resource::Nofile).maximum, workers));
    let Some(spec) = spec else {
        findings.push(Finding::not_checked("memory", "there is no spec that says how much"));
        return findings;
    };
    findings.push(match device {
        Device::Cpu => memory_of_machine(spec, available_memory()),
        _ => memory(spec, device, gpu_memory),
    });
    findings.extend(disk(spec, store));
    findings
}

/// What a run pins that begins on this machine's CPU.
pub(super) async fn numerics() -> Option<String> {
    let probe = tokio::task::spawn_blocking(|| looptrain_model::numerics(Device::Cpu));
    probe.await.ok()?.ok()
}

fn kernels(level: KernelLevel, numerics: Option<&str>) -> Finding {
    let found = match numerics {
        Some(numerics) => format!("{}; a run that begins here pins {numerics}", level.name()),
        None => level.name().to_owned(),
    };
    if level == KernelLevel::Portable {
        let remedy = "use a machine with AVX2 and FMA, or let a virtual machine see those of its host: \
                      without them training is many times slower";
        return Finding::warning("kernels", found, remedy);
    }
    Finding::well("kernels", found)
}

/// Cores of the machine, whoever may use them.
fn cores() -> Option<u32> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let count = text.lines().filter(|line| line.starts_with("processor")).count();
    u32::try_from(count).ok().filter(|count| *count > 0)
}

fn threads(usable: u32, cores: Option<u32>) -> Finding {
    match cores {
        Some(cores) if cores > usable => Finding::well(
            "threads",
            format!(
                "{usable} of the machine's {cores} cores are this process's (quota or affinity)"
            ),
        ),
        _ => Finding::well("threads", format!("{usable} cores")),
    }
}

fn open_files(limit: Option<u64>, workers: u32) -> Finding {
    let needed = OTHER_FILES + 2 * u64::from(workers);
    match limit {
        None => Finding::well("open files", "without limit"),
        Some(limit) if limit >= needed => Finding::well("open files", format!("{limit} allowed")),
        Some(limit) => Finding::problem(
            "open files",
            format!("{limit} allowed, {needed} are needed for {workers} workers"),
            "raise the hard limit: `ulimit -Hn`, LimitNOFILE= of a systemd unit, or the container's",
        ),
    }
}

fn gib(bytes: u64) -> BinaryBytes {
    BinaryBytes(bytes)
}

/// Memory for the CPU: as much as the spec allows, which the machine has to have.
fn memory_of_machine(spec: &Spec, available: Option<u64>) -> Finding {
    let allowed = (spec.compute.memory_gib * (1u64 << 30) as f64) as u64;
    if allowed == 0 {
        return memory(spec, Device::Cpu, available);
    }
    if let Some(available) = available.filter(|available| *available < allowed) {
        let found =
            format!("compute.memory_gib allows {}, {} are available", gib(allowed), gib(available));
        let remedy = "lower compute.memory_gib, or raise the memory limit of the control group";
        return Finding::problem("memory", found, remedy);
    }
    memory(spec, Device::Cpu, Some(allowed))
}

/// What the stages of a spec take on the device against what there is.
fn memory(spec: &Spec, device: Device, available: Option<u64>) -> Finding {
    let mut needs = Vec::new();
    for stage in &spec.stages {
        match worker_bytes(spec, stage, device, all_threads() as usize) {
            Ok(bytes) => needs.push((stage.name.as_str(), bytes)),
            Err(error) => return Finding::error("memory", &error),
        }
    }
    judge(&needs, spec.compute.recompute, available)
}

/// What is done for less memory, in the order of the bytes.
const MODES: [&str; 3] =
    ["keeping everything", "computing a loop at a time again", "computing a layer at a time again"];

/// `needs` are the bytes of each stage when nothing is computed again, a loop, and a layer.
fn judge(needs: &[(&str, [u64; 3])], wanted: Recompute, available: Option<u64>) -> Finding {
    let modes = match wanted {
        Recompute::Auto => 0..3,
        Recompute::None => 0..1,
        Recompute::Loop => 1..2,
        Recompute::Layer => 2..3,
    };
    // The fastest way that fits, else the one that takes the least.
    let of_stage = |(stage, bytes): &(_, [u64; 3])| {
        let fits = |mode: &usize| available.is_none_or(|available| bytes[*mode] <= available);
        let least = || modes.clone().min_by_key(|mode| bytes[*mode]).unwrap_or(0);
        let mode = modes.clone().find(fits).unwrap_or_else(least);
        (bytes[mode], mode, *stage)
    };
    let Some((bytes, mode, stage)) = needs.iter().map(of_stage).max() else {
        return Finding::not_checked("memory", "the spec has no stage");
    };
    let takes = format!("a worker takes {} in stage `{stage}`, {}", gib(bytes), MODES[mode]);
    match available {
        None => {
            Finding::not_checked("memory", format!("{takes}; the system does not tell what it has"))
        }
        Some(available) if bytes <= available => {
            Finding::well("memory", format!("{takes}; {} are available", gib(available)))
        }
        Some(available) => {
            let remedy = match wanted {
                Recompute::Auto => {
                    "take a machine with more memory, fewer threads (--threads), or smaller slots \
                     (stages.N.slot_sequences)"
                }
                _ => {
                    "set compute.recompute to auto, or take a machine with more memory, fewer threads \
                     (--threads), or smaller slots (stages.N.slot_sequences)"
                }
            };
            let found = format!("{takes}; only {} are available", gib(available));
            Finding::problem("memory", found, remedy)
        }
    }
}

/// Room for what is kept on this machine's disk: blocks of a remote store, or the store itself.
fn disk(spec: &Spec, store: Option<&Store>) -> Option<Finding> {
    let store = store?;
    if let Some(path) = spec.run.store.strip_prefix("file://") {
        let checkpoint = CHECKPOINT_BYTES * spec.model.parameters();
        let kept = spec.checkpoint.keep as u64;
        return Some(match free(Path::new(path)) {
            Some(free) => room_for_checkpoints(free, checkpoint, kept),
            None => Finding::not_checked("disk", "the system does not tell what is free"),
        });
    }
    if !store.is_remote() {
        return None;
    }
    Some(match worker::cache(None, None) {
        Err(error) => Finding::error("disk", &error),
        Ok(None) => Finding::well("disk", "no cache is kept, so none is needed"),
        Ok(Some(cache)) => match free(&cache.directory) {
            Some(free) => room_for_cache(free, cache.bytes, &cache.directory.display().to_string()),
            None => Finding::not_checked("disk", "the system does not tell what is free"),
        },
    })
}

/// Bytes that are free where this path is, or would be.
fn free(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|above| above.exists())?;
    let disk = rustix::fs::statvfs(there).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn room_for_cache(free: u64, cache: u64, directory: &str) -> Finding {
    let found = format!("{} free for a cache of {} in {directory}", gib(free), gib(cache));
    if free >= cache {
        return Finding::well("disk", found);
    }
    let remedy = "make room, give workers a smaller cache (--cache-gib) or another place (--cache)";
    Finding::warning("disk", found, remedy)
}

fn room_for_checkpoints(free: u64, checkpoint: u64, kept: u64) -> Finding {
    // One more is there while it is written.
    let needed = checkpoint.saturating_mul(kept.saturating_add(1));
    let found =
        format!("{} free for {kept} checkpoints of {} and one more", gib(free), gib(checkpoint));
    let remedy = "make room, lower checkpoint.keep, or set run.store to another place";
    if free < checkpoint {
        Finding::problem("disk", found, remedy)
    } else if free < needed {
        Finding::warning("disk", found, remedy)
    } else {
        Finding::well("disk", found)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    const NEEDS: [(&str, [u64; 3]); 2] = [("short", [40, 30, 20]), ("long", [100, 60, 50])];

    #[test]
    fn memory_is_enough_when_every_stage_fits_in_some_way() {
        for (wanted, available, verdict, words) in [
            (
                Recompute::Auto,
                Some(100),
                Verdict::Well,
                "100 B in stage `long`, keeping everything",
            ),
            (Recompute::Auto, Some(60), Verdict::Well, "60 B in stage `long`, computing a loop"),
            (Recompute::Auto, Some(50), Verdict::Well, "50 B in stage `long`, computing a layer"),
            (Recompute::Auto, Some(49), Verdict::Problem, "only 49 B are available"),
            (Recompute::None, Some(99), Verdict::Problem, "100 B in stage `long`"),
            (Recompute::Loop, Some(99), Verdict::Well, "60 B in stage `long`"),
            (Recompute::Auto, None, Verdict::NotChecked, "100 B"),
        ] {
            let finding = judge(&NEEDS, wanted, available);
            assert_eq!(finding.verdict, verdict, "{wanted:?} {available:?}");
            assert!(finding.found.contains(words), "{finding:?}");
        }
        let wish = judge(&NEEDS, Recompute::None, Some(60)).remedy.unwrap();
        assert!(wish.contains("compute.recompute to auto"), "{wish}");
    }

    #[test]
    fn what_the_spec_allows_has_to_be_there() {
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/tiny.toml");
        let given = ["compute.memory_gib=2".to_owned()];
        let spec = Spec::load(Path::new(example), &given).unwrap();
        assert_eq!(memory_of_machine(&spec, Some(3 << 30)).verdict, Verdict::Well);
        let finding = memory_of_machine(&spec, Some(1 << 30));
        assert_eq!(finding.verdict, Verdict::Problem);
        assert!(finding.found.contains("compute.memory_gib allows 2.00 GiB"), "{finding:?}");
    }

    #[test]
    fn a_disk_has_room_for_what_is_kept_and_one_more() {
        for (free, verdict) in [
            (40, Verdict::Well),
            (39, Verdict::Warning),
            (10, Verdict::Warning),
            (9, Verdict::Problem),
        ] {
            assert_eq!(room_for_checkpoints(free, 10, 3).verdict, verdict, "{free}");
        }
        assert_eq!(room_for_cache(16, 16, "/cache").verdict, Verdict::Well);
        assert_eq!(room_for_cache(15, 16, "/cache").verdict, Verdict::Warning);
    }

    #[test]
    fn a_coordinator_has_a_file_open_for_every_worker() {
        assert_eq!(open_files(Some(1024), 256).verdict, Verdict::Well);
        assert_eq!(open_files(Some(1024), 2000).verdict, Verdict::Problem);
        assert_eq!(open_files(None, 2000).verdict, Verdict::Well);
    }

    #[test]
    fn kernels_without_vectors_are_slow() {
        assert_eq!(kernels(KernelLevel::Portable, None).verdict, Verdict::Warning);
        let finding = kernels(KernelLevel::Avx2, Some("avx2-00"));
        assert_eq!(finding.verdict, Verdict::Well);
        assert!(finding.found.contains("pins avx2-00"));
    }
}
