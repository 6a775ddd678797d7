//! Whether clocks agree. No step depends on them; signatures of requests to a store, the validity of
//! certificates, the age of what dead writers have left, and the times in logs do.

use super::Finding;

/// Seconds apart from which times in logs mislead.
const NOTICEABLE: f64 = 5.0;

/// Seconds apart from which stores and certificates are refused.
const FATAL: f64 = 300.0;

const REMEDY: &str = "have both clocks set by NTP (systemd-timesyncd, chrony)";

/// By how many seconds the clocks of the store and of the coordinator are ahead of this machine's, as far
/// as they have told the time.
pub(super) fn check(store: Option<f64>, coordinator: Option<f64>) -> Vec<Finding> {
    let mut findings = vec![synchronised()];
    findings.extend(store.map(|ahead| compare("store", ahead)));
    findings.extend(coordinator.map(|ahead| compare("coordinator", ahead)));
    findings
}

fn compare(whose: &str, ahead: f64) -> Finding {
    let check = format!("clock of the {whose}");
    let apart = ahead.abs();
    let found = match (apart < NOTICEABLE, ahead > 0.0) {
        (true, _) => format!("within {NOTICEABLE} s of this machine's"),
        (false, true) => format!("{apart:.0} s ahead of this machine's"),
        (false, false) => format!("{apart:.0} s behind this machine's"),
    };
    if apart < NOTICEABLE {
        Finding::well(&check, found)
    } else if apart < FATAL {
        Finding::warning(&check, found, REMEDY)
    } else {
        Finding::problem(&check, found, REMEDY)
    }
}

/// Whether the system believes that its clock is right.
#[cfg(target_os = "linux")]
fn synchronised() -> Finding {
    use nix::libc;
    // SAFETY: all zero is a value of the struct, and with no mode set nothing is changed: the kernel
    // writes to it what it knows.
    let (state, error) = unsafe {
        let mut clock: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&mut clock), clock.maxerror)
    };
    let check = "synchronised";
    match state {
        libc::TIME_ERROR => Finding::warning(
            check,
            "the system does not keep this machine's clock synchronised",
            "start systemd-timesyncd or chrony",
        ),
        0.. => {
            Finding::well(check, format!("within {:.0} ms, the system says", error as f64 / 1e3))
        }
        _ => Finding::not_checked(check, "the system does not tell, as in many containers"),
    }
}

#[cfg(not(target_os = "linux"))]
fn synchronised() -> Finding {
    Finding::not_checked("synchronised", "this system is not asked")
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn clocks_may_be_apart_by_seconds_and_not_by_minutes() {
        for (ahead, verdict, words) in [
            (0.0, Verdict::Well, "within 5 s"),
            (-4.0, Verdict::Well, "within 5 s"),
            (60.0, Verdict::Warning, "60 s ahead"),
            (-299.0, Verdict::Warning, "299 s behind"),
            (-900.0, Verdict::Problem, "900 s behind"),
        ] {
            let finding = compare("store", ahead);
            assert_eq!(finding.verdict, verdict, "{ahead}");
            assert!(finding.found.contains(words), "{finding:?}");
        }
        assert_eq!(check(Some(1.0), None).len(), 2);
    }
}
