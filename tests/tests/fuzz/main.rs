//! Every parser of bytes that come from outside gets its samples, and thousands of damaged ones: it may
//! refuse them, but not panic, hang, or take memory that the bytes are not worth.
//!
//! The damage is drawn from a seed, so that a case that fails comes again. For longer than CI has:
//!
//! ```sh
//! LOOPTRAIN_FUZZ_SECONDS=300 cargo test --release --workspace --test fuzz -- spec --nocapture
//! LOOPTRAIN_FUZZ_CASE=12345 cargo test --release --workspace --test fuzz -- spec     # one case
//! ```
//!
//! The same functions run under libFuzzer: see `tests/fuzz/README.md`.
#![allow(clippy::unwrap_used)]

mod damage;
mod memory;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use looptrain_proto::fuzzing::Target;

use damage::Damage;

/// Time for the cases of a target, unless told otherwise; cases beyond [`CASES`] are not asked for.
const SECONDS: f64 = 2.0;
const CASES: u64 = 20_000;

/// Cases that have to come even on a slow machine.
const LEAST_CASES: u64 = 30;

/// No case may take longer, on a busy machine.
const LONGEST: Duration = Duration::from_secs(10);

fn targets() -> Vec<Target> {
    [
        &looptrain_proto::fuzzing::TARGETS[..],
        &looptrain_storage::fuzzing::targets(),
        &looptrain_coordinator::fuzzing::TARGETS,
        &looptrain::fuzzing::TARGETS,
    ]
    .concat()
}

fn number<T: std::str::FromStr>(variable: &str) -> Option<T> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Runs one case; whether its bytes were taken.
fn check(target: &Target, case: u64, bytes: &[u8]) -> bool {
    memory::begin(target.name, case);
    let begin = Instant::now();
    let ran = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    let (took, peak) = (begin.elapsed(), memory::peak());
    let case = format!("{}, case {case} ({} bytes)", target.name, bytes.len());
    let Ok(taken) = ran else {
        if let Ok(directory) = std::env::var("LOOPTRAIN_FUZZ_KEEP") {
            std::fs::write(format!("{directory}/{case}"), bytes).unwrap();
        }
        panic!("{case}: it panics, see above; LOOPTRAIN_FUZZ_CASE runs it again");
    };
    assert!(took < LONGEST, "{case}: it takes {took:?}");
    assert!(peak <= target.memory, "{case}: it takes {peak} bytes of {}", target.memory);
    taken
}

fn fuzz(name: &str) {
    let target = targets().into_iter().find(|target| target.name == name).unwrap();
    // A backtrace takes memory that is none of the parser's.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    // What is made once, such as tables, is no case's.
    let samples = (target.samples)();
    assert!(!samples.is_empty());
    for (index, sample) in samples.iter().enumerate() {
        let _ = (target.run)(sample);
        assert!(check(&target, 0, sample), "{name} does not take its sample {index}");
    }
    if let Some(case) = number("LOOPTRAIN_FUZZ_CASE") {
        let bytes = Damage::new(name, case).of(&samples);
        println!("{name}, case {case}: {:?}", String::from_utf8_lossy(&bytes));
        check(&target, case, &bytes);
        return;
    }
    let seconds = number("LOOPTRAIN_FUZZ_SECONDS");
    let most = if seconds.is_some() { u64::MAX } else { CASES };
    let time = Duration::from_secs_f64(seconds.unwrap_or(SECONDS));
    let (begin, mut taken) = (Instant::now(), 0);
    let first = number("LOOPTRAIN_FUZZ_SEED").map_or(1, |seed: u64| seed << 32);
    let mut case = first;
    while case - first < LEAST_CASES || (case - first < most && begin.elapsed() < time) {
        let bytes = Damage::new(name, case).of(&samples);
        taken += u64::from(check(&target, case, &bytes));
        case += 1;
    }
    let cases = case - first;
    println!("{name}: {cases} cases in {:?}, {taken} of them taken", begin.elapsed());
    assert!(taken < cases, "{name} takes whatever it gets");
}

macro_rules! each {
    ($($name:ident)+) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name));
            }
        )+

        /// Nothing that is listed is left out.
        #[test]
        fn every_target_has_a_test() {
            let tests = [$(stringify!($name)),+];
            let targets = targets();
            for target in &targets {
                assert!(tests.contains(&target.name), "`{}` has no test", target.name);
            }
            assert_eq!(tests.len(), targets.len());
        }
    };
}

each! {
    spec worker_message coordinator_message status_reply held
    record metrics audit keys checkpoint_manifest checkpoint_part
    dataset_manifest dataset_shard shard_ending progress tokenizer
    jsonl jsonl_gzip jsonl_zstd text parquet
    session chronicle history
    model_config model_tensors model_index npy preemption status plot
}

/// The checks see what they are for.
#[test]
fn a_panic_and_too_much_memory_are_seen() {
    fn panics(bytes: &[u8]) -> bool {
        bytes[1000] == 0
    }
    fn grows(bytes: &[u8]) -> bool {
        vec![bytes.len(); 1 << 20].len() == 1
    }
    let target =
        |run: fn(&[u8]) -> bool| Target { name: "x", run, samples: Vec::new, memory: 1 << 20 };
    for run in [panics as fn(&[u8]) -> bool, grows] {
        assert!(catch_unwind(|| check(&target(run), 0, b"abc")).is_err());
    }
}
