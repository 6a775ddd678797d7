//! What the machine has to give.

use std::fmt;
use std::path::Path;

use looptrain_proto::Spec;

/// A number of bytes, for people.
pub(crate) struct Gib(pub(crate) u64);

impl fmt::Display for Gib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} GiB", self.0 as f64 / (1u64 << 30) as f64)
    }
}

/// Bytes that a worker may use: as it was told, else as the spec says, else what the machine has.
pub(crate) fn memory_of(told: Option<u64>, spec: &Spec) -> Option<u64> {
    let gib = spec.compute.memory_gib;
    let of_spec = (gib > 0.0).then_some((gib * (1u64 << 30) as f64) as u64);
    told.or(of_spec).or_else(available_memory)
}

/// Bytes of memory that programs of this process's group can still take: what the machine has
/// available, or what the limits of the control groups above this process leave if that is less.
/// `None` where the system does not tell.
#[must_use]
pub fn available_memory() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| available_of(&text));
    let group = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let limits = left_by_groups(&group, Path::new("/sys/fs/cgroup"));
    machine.into_iter().chain(limits).min()
}

/// `MemAvailable` of a `/proc/meminfo`.
fn available_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// The least that a limit leaves, of the groups in a `/proc/self/cgroup` and all above them, in both
/// versions of control groups. In a container the path may be that of the host, where nothing is
/// mounted; the root of the mount is the container's own group then.
fn left_by_groups(cgroup: &str, root: &Path) -> Option<u64> {
    let mut least = None;
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, names) = if controllers.is_empty() {
            (root.to_owned(), ["memory.max", "memory.current", "inactive_file"])
        } else if controllers.split(',').any(|name| name == "memory") {
            let names = ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"];
            (root.join("memory"), names)
        } else {
            continue;
        };
        let group = root.join(path.trim_start_matches('/'));
        let above = group.ancestors().take_while(|group| group.starts_with(&root));
        least = above.filter_map(|group| left_in(group, names)).chain(least).min();
    }
    least
}

/// What the limit of one group leaves; pages of files that nobody has used for long go when others
/// need the room.
fn left_in(group: &Path, [limit, used, reclaimable]: [&str; 3]) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(group.join(name)).ok()?.trim().parse().ok();
    // `max` where there is no limit.
    let limit: u64 = number(limit)?;
    let used: u64 = number(used)?;
    let statistics = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let reclaimable = statistics.lines().find_map(|line| {
        line.strip_prefix(reclaimable)?.strip_prefix(' ')?.trim().parse::<u64>().ok()
    });
    Some(limit.saturating_sub(used.saturating_sub(reclaimable.unwrap_or(0))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::tiny_spec;

    #[test]
    fn what_a_worker_is_told_comes_before_the_spec_and_that_before_the_machine() {
        let mut spec = tiny_spec("memory://");
        assert_eq!(memory_of(Some(7), &spec), Some(7));
        spec.compute.memory_gib = 0.5;
        assert_eq!((memory_of(Some(7), &spec), memory_of(None, &spec)), (Some(7), Some(1 << 29)));
    }

    #[test]
    fn the_kernel_counts_in_kilobytes() {
        let text = "MemTotal:       24601084 kB\nMemAvailable:   19000000 kB\n";
        assert_eq!(available_of(text), Some(19_000_000 * 1024));
        assert_eq!(available_of("MemTotal: 5 kB\n"), None);
    }

    /// Files of a group, in a directory that stands for the mount.
    fn group(directory: &Path, files: &[(&str, &str)]) {
        std::fs::create_dir_all(directory).unwrap();
        for (name, text) in files {
            std::fs::write(directory.join(name), text).unwrap();
        }
    }

    #[test]
    fn the_tightest_limit_on_the_way_up_counts_without_pages_that_can_go() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let stat = "anon 100\ninactive_file 300\nactive_file 50\n";
        let outer = [("memory.max", "2000\n"), ("memory.current", "800\n"), ("memory.stat", stat)];
        group(&root.join("outer"), &outer);
        group(&root.join("outer/inner"), &[("memory.max", "max\n"), ("memory.current", "500\n")]);
        assert_eq!(left_by_groups("0::/outer/inner\n", root), Some(1500));
        let inner = [("memory.max", "600\n"), ("memory.current", "500\n")];
        group(&root.join("outer/inner"), &inner);
        assert_eq!(left_by_groups("0::/outer/inner\n", root), Some(100));
        assert_eq!(left_by_groups("0::/elsewhere\n", root), None);
    }

    #[test]
    fn limits_of_the_first_version_count_too() {
        let root = tempfile::tempdir().unwrap();
        let files = [
            ("memory.limit_in_bytes", "1000"),
            ("memory.usage_in_bytes", "700"),
            ("memory.stat", "inactive_file 1\ntotal_inactive_file 200\n"),
        ];
        group(&root.path().join("memory/job"), &files);
        let cgroup = "5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n";
        assert_eq!(left_by_groups(cgroup, root.path()), Some(500));
    }
}
