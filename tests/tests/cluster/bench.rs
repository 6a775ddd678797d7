//! `looptrain bench`: one line of JSON with figures that can be.

use serde_json::Value;

use super::support::{End, Scratch};

/// The one line of a bench.
#[track_caller]
fn figures(end: &End) -> Value {
    assert_eq!(end.code, Some(0), "{end:?}");
    let lines: Vec<&str> = end.stdout.lines().collect();
    assert_eq!(lines.len(), 1, "{end:?}");
    let figures: Value = serde_json::from_str(lines[0]).unwrap();
    assert!(figures["machine"]["threads"].as_u64().unwrap() > 0, "{figures}");
    figures
}

/// A figure that a measurement cannot have missed.
#[track_caller]
fn positive(figures: &Value, pointer: &str) -> f64 {
    let value = figures.pointer(pointer).and_then(Value::as_f64);
    value.filter(|value| *value > 0.0).unwrap_or_else(|| panic!("{pointer} of {figures}"))
}

#[test]
fn the_time_from_the_last_vote_to_the_last_commit_is_measured_with_real_sessions() {
    let figures =
        figures(&Scratch::new().run(&["bench", "commit", "--workers", "20", "--steps", "30"]));
    assert_eq!((&figures["bench"], &figures["workers"]), (&"commit".into(), &20.into()));
    let quantile = |name: &str| positive(&figures, &format!("/vote_to_commit_ms/{name}"));
    assert!(quantile("p50") <= quantile("p99") && quantile("p99") <= quantile("max"));
    assert!(quantile("p50") < positive(&figures, "/step_ms_p50"), "{figures}");
    for field in ["/joins_per_second", "/form_ms", "/resident_bytes_per_session"] {
        positive(&figures, field);
    }
}

#[test]
fn the_feed_is_measured_over_an_epoch_and_its_first_batch_near_and_far() {
    let scratch = Scratch::new();
    let (store, cache) = ("file://bench-store", "cache");
    let arguments = ["--million-tokens", "2", "--sequence-length", "512", "--rounds", "3"];
    let arguments =
        [&["bench", "data", "--store", store, "--cache", cache], &arguments[..]].concat();
    let cold = figures(&scratch.run(&arguments));
    assert_eq!(cold["bench"], "data");
    let samples = positive(&cold, "/samples");
    assert_eq!(samples, (1_999_999 / 512 / 64 * 64) as f64);
    let speed = samples / positive(&cold, "/seconds");
    assert!((positive(&cold, "/samples_per_second") / speed - 1.0).abs() < 0.1, "{cold}");
    let (near, far) =
        (positive(&cold, "/first_batch_ms/at_0"), positive(&cold, "/first_batch_ms/at_1e12"));
    assert!((positive(&cold, "/first_batch_ratio") / (far / near) - 1.0).abs() < 0.1, "{cold}");
    // Another process, to which the cache on the disk gives the same.
    let warm = figures(&scratch.run(&arguments));
    assert_eq!(warm["sum_of_tokens"], cold["sum_of_tokens"]);
    assert_eq!((&warm["blocks"]["store"], &warm["store_bytes"]), (&0.into(), &0.into()));
    assert!(positive(&warm, "/blocks/disk") > 60.0, "{warm}");
}

#[test]
fn a_state_is_fetched_from_several_sources_and_its_speed_measured() {
    let arguments = ["bench", "transfer", "--mib", "16", "--sources", "2", "--rounds", "2"];
    let figures = figures(&Scratch::new().run(&arguments));
    assert_eq!((&figures["bench"], &figures["sources"]), (&"transfer".into(), &2.into()));
    let bytes = positive(&figures, "/bytes");
    assert!((16e6..17e6).contains(&bytes), "{figures}");
    let typical = positive(&figures, "/gigabytes_per_second");
    assert!(typical <= positive(&figures, "/best_gigabytes_per_second"), "{figures}");
}

#[test]
fn a_save_is_measured_beside_a_plain_copy_and_the_client_alone_and_leaves_nothing() {
    let scratch = Scratch::new();
    let arguments = ["bench", "checkpoint", "--store", "file://store", "--mib", "24"];
    let figures =
        figures(&scratch.run(&[&arguments[..], &["--ranks", "2", "--rounds", "2"]].concat()));
    assert_eq!((&figures["bench"], &figures["ranks"]), (&"checkpoint".into(), &2.into()));
    let bytes = positive(&figures, "/bytes");
    assert!((24e6..28e6).contains(&bytes), "{figures}");
    let copies = positive(&figures, "/stall_ms") / positive(&figures, "/copy_ms");
    assert!((copies / positive(&figures, "/stall_in_copies") - 1.0).abs() < 0.05, "{figures}");
    let speed = |name: &str| positive(&figures, &format!("/{name}_megabytes_per_second"));
    let share = speed("upload") / speed("client_alone");
    assert!((share / positive(&figures, "/share_of_client_alone") - 1.0).abs() < 0.2, "{figures}");
    assert!(!scratch.path("store/runs/.bench-checkpoint").join("bare-0").exists());
}

#[test]
fn all_reduces_are_measured_beside_the_way_into_the_sums_and_back() {
    let bench = ["bench", "reduce", "--workers", "3", "--bytes", "4000004", "--rounds", "3"];
    let all = figures(&Scratch::new().run(&bench));
    assert_eq!((&all["bench"], &all["workers"]), (&"reduce".into(), &3.into()));
    for (name, bytes) in [("exact", 8_000_008), ("fast", 4_000_008)] {
        let figures = &all[name];
        assert_eq!(figures["sum_bytes"], bytes, "{all}");
        let bus = positive(figures, "/bus_gigabytes_per_second") * 1e9;
        let formula = 4.0 / 3.0 * bytes as f64 / (positive(figures, "/reduce_ms") / 1e3);
        assert!((bus / formula - 1.0).abs() < 0.1, "{all}");
        for field in ["/add_ms", "/mean_ms", "/reduce_min_ms"] {
            positive(figures, field);
        }
    }
    let times = ["/exact/reduce_ms", "/fast/reduce_ms"].map(|field| positive(&all, field));
    let ratio = positive(&all, "/exact_over_fast");
    assert!((times[0] / times[1] / ratio - 1.0).abs() < 0.1, "{all}");
    let alone = ["--reduction", "fast", "--streams", "3"];
    let one = figures(&Scratch::new().run(&[&bench[..], &alone[..]].concat()));
    assert!(one["exact"].is_null() && one["exact_over_fast"].is_null(), "{one}");
    assert_eq!(one["streams"], 3, "{one}");
    positive(&one, "/fast/reduce_ms");
}

/// A model that takes a few milliseconds a step.
const SMALL_STEP: [&str; 18] = [
    "bench",
    "step",
    "--hidden",
    "32",
    "--layers",
    "2",
    "--loops",
    "3",
    "--heads",
    "2",
    "--ffn",
    "48",
    "--vocab",
    "100",
    "--batch",
    "4",
    "--sequence",
    "16",
];

#[test]
fn a_training_step_is_measured_beside_the_rate_of_matrix_products() {
    let step = |more: &[&str]| {
        let given = [&SMALL_STEP[..], &["--threads", "2", "--steps", "3"], more].concat();
        figures(&Scratch::new().run(&given))
    };
    let exact = step(&[]);
    assert_eq!(
        (&exact["bench"], &exact["slots"], &exact["steps"]),
        (&"step".into(), &2.into(), &3.into())
    );
    let median = positive(&exact, "/median_seconds");
    assert!(positive(&exact, "/min_seconds") <= median, "{exact}");
    let speed = positive(&exact, "/tokens_per_second") * median;
    assert!((speed / 64.0 - 1.0).abs() < 0.1, "{exact}");
    let share =
        positive(&exact, "/gflop_per_second") / positive(&exact, "/matrix_gflop_per_second");
    assert!((share - positive(&exact, "/share_of_matrix_rate")).abs() < 0.01, "{exact}");
    for field in ["/peak_bytes", "/gflop", "/parts/compute", "/parts/prepare", "/parts/update"] {
        positive(&exact, field);
    }
    // The batch stays the same, so it is learnt.
    assert!(positive(&exact, "/loss") < positive(&exact, "/first_loss"), "{exact}");
    // However it is computed, and however slots are added, it is the same model.
    let whole = step(&["--slots", "1", "--recompute", "loop"]);
    let plain = step(&["--reduction", "none", "--recompute", "layer"]);
    let composite = step(&["--kernels", "composite", "--slots", "4"]);
    assert_eq!(composite["reduction"], "none");
    for other in [whole, plain, composite] {
        for of in ["/first_loss", "/loss"] {
            let ratio = positive(&other, of) / positive(&exact, of);
            assert!((ratio - 1.0).abs() < 1e-4, "{of}: {other} beside {exact}");
        }
    }
}

#[test]
fn a_step_that_cannot_be_measured_is_refused_with_the_remedy() {
    let scratch = Scratch::new();
    for (more, code, words) in [
        (["--device", "cuda:0"], 1, "heads of 8 numbers"),
        (["--device", "tpu"], 2, "write cpu"),
        (["--steps", "0"], 2, "--steps"),
        (["--slots", "3"], 1, "--slots 3 does not divide --batch 4"),
        (["--heads", "5"], 2, "5 heads do not divide"),
    ] {
        let end =
            scratch.run(&[&SMALL_STEP[..8], &["--ffn", "48", "--batch", "4"], &more].concat());
        assert_eq!(end.code, Some(code), "{more:?}: {end:?}");
        assert!(end.stderr.contains(words) && end.stdout.is_empty(), "{more:?}: {end:?}");
    }
}

#[test]
fn text_is_tokenized_into_a_store_and_its_speed_measured() {
    let scratch = Scratch::new();
    let lines: String = (0..3000)
        .map(|i| format!("{}\n", serde_json::json!({ "text": format!("Line {i} of the text.") })))
        .collect();
    std::fs::write(scratch.path("lines.jsonl"), &lines).unwrap();
    let train = ["data", "prepare", "--input", "lines.jsonl", "--vocabulary", "300", "--output"];
    let made = scratch.run(&[&train[..], &["file://store/datasets/first"]].concat());
    assert_eq!(made.code, Some(0), "{made:?}");
    let tokenizer = scratch.file_of("first", "tokenizer-").unwrap();
    let tokenizer = ["--tokenizer", tokenizer.to_str().unwrap()];
    let bench = [&["bench", "tokenize", "--input", "lines.jsonl"], &tokenizer[..]].concat();
    let figures = figures(
        &scratch.run(&[&bench[..], &["--store", "file://store", "--rounds", "2"]].concat()),
    );
    assert_eq!((&figures["bench"], &figures["documents"]), (&"tokenize".into(), &3000.into()));
    let speed = positive(&figures, "/megabytes_per_second") * positive(&figures, "/seconds");
    assert!((speed * 1e6 / positive(&figures, "/text_bytes") - 1.0).abs() < 0.2, "{figures}");
    for field in ["/tokens", "/tokens_per_second", "/peak_bytes", "/threads"] {
        positive(&figures, field);
    }
    assert!(!scratch.path("store/datasets/bench-tokenize").exists(), "it is removed again");
}

#[test]
fn the_same_steps_are_measured_bare_and_in_a_local_run_that_leaves_the_specs_run_alone() {
    let scratch = Scratch::new();
    let figures = figures(&scratch.run(&["bench", "orchestration", "spec.toml", "--steps", "5"]));
    assert_eq!(figures["bench"], "orchestration");
    assert_eq!((&figures["steps"], &figures["step"]["slots"]), (&5.into(), &6.into()));
    let (bare, local) = (positive(&figures, "/bare_ms/p50"), positive(&figures, "/local_ms/p50"));
    let ratio = positive(&figures, "/ratio");
    assert!((local / bare / ratio - 1.0).abs() < 0.01, "{figures}");
    assert!(positive(&figures, "/bare_ms/compute") < bare, "{figures}");
    assert!(positive(&figures, "/local_ms/compute") < local, "{figures}");
    assert!(figures["control_plane_ms"].is_number(), "{figures}");
    for kind in ["bare_ms", "local_ms"] {
        assert_eq!(figures["rounds"][kind].as_array().unwrap().len(), 2, "{figures}");
    }
    assert!(scratch.path("store/runs/small-bench").is_dir());
    assert!(!scratch.path("store/runs/small").exists());
}

#[test]
fn more_sessions_than_the_system_has_files_for_are_refused_with_the_remedy() {
    // In a shell whose limit cannot be raised any more.
    let program = env!("CARGO_BIN_EXE_looptrain-under-test");
    let script = format!("ulimit -n 100; exec {program} bench commit --workers 50");
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("50 sessions") && error.contains("ulimit -n"), "{error}");
}
