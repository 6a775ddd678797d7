//! One command trains, checkpoints, evaluates, samples, and can be asked about it.

use serde_json::Value;

use crate::support::{Running, Scratch, repository};

#[test]
fn a_run_trains_to_its_last_step_and_leaves_everything_in_the_store() {
    let scratch = Scratch::new();
    let peak = ["--set", "cluster.peak_tflops=0.001"];
    let end = scratch.train(&[&["--workers", "2"][..], &peak].concat()).done();
    assert_eq!(end.field("run"), "small");
    assert_eq!(end.field("step"), "14");
    assert_eq!(end.field("tokens"), (8 * 6 * 24 + 6 * 10 * 40).to_string());
    assert!(end.field("weights").starts_with("blake3:"));
    for words in ["validation at step 14", "perplexity", "unigram model", "sample: pub fn "] {
        assert!(end.stdout.contains(words), "{words}: {end:?}");
    }
    assert!(end.stderr.contains("validation at step 7:"), "{end:?}");
    assert!(!end.stderr.contains("validation at step 14:"), "said once: {end:?}");

    let lines = scratch.metrics();
    let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=14).collect::<Vec<_>>(), "one line per committed step");
    for line in &lines {
        let loops = if line["step"].as_u64() <= Some(8) { 3 } else { 2 };
        let of_loops = |key: &str| -> Vec<f64> {
            line[key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
        };
        for key in ["loss_per_loop", "hidden_rms_per_loop", "gradient_norm_per_loop"] {
            assert_eq!(of_loops(key).len(), loops, "{key} in {line}");
            assert!(of_loops(key).iter().all(|value| *value > 0.0), "{key} in {line}");
        }
        let agreement = of_loops("agreement_per_loop");
        assert_eq!((agreement.len(), agreement.last()), (loops, Some(&1.0)), "{line}");
        assert!(of_loops("loss_rise_per_loop").is_empty(), "the stages are short");
        let mfu = line["flops"].as_f64().unwrap() / line["seconds"].as_f64().unwrap() / 2e9;
        assert!((line["mfu"].as_f64().unwrap() / mfu - 1.0).abs() < 1e-9, "{line}");
        let pdf = line["exit_pdf"].as_array().unwrap();
        let total: f64 = pdf.iter().map(|p| p.as_f64().unwrap()).sum();
        assert!((total - 1.0).abs() < 1e-6, "{line}");
        for key in ["generation", "world", "loss", "entropy", "grad_norm", "lr", "seconds"] {
            assert!(line[key].as_f64().is_some_and(f64::is_finite), "{key} in {line}");
        }
        assert!(line["digest"].as_str().unwrap().starts_with("blake3:"));
    }
    let loss = |line: &Value| line["loss_per_loop"][0].as_f64().unwrap();
    assert!(loss(&lines[13]) < loss(&lines[0]) - 0.3, "it learns");

    let plot = ["plot", "--store", "file://store", "--run", "small", "--output", "curves.svg"];
    assert_eq!(scratch.run(&plot).code, Some(0));
    let curves = std::fs::read_to_string(scratch.path("curves.svg")).unwrap();
    for words in ["small: loss by loop", "exit distribution", "agreement", "loop 3"] {
        assert!(curves.contains(words), "{words}");
    }

    let status = scratch.run(&["status", "--store", "file://store", "--run", "small", "--json"]);
    let status: Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["phase"], "finished");
    // How many there are depends on the store's speed: while one is being written, others that are
    // due wait, and one is made for all of them.
    let saved = end.stderr.lines().filter_map(|line| {
        line.strip_prefix("checkpoint of step ")?.split_once(": ")?.0.parse().ok()
    });
    let saved: Vec<u64> = saved.collect();
    assert!(saved.len() >= 2 && saved[0] == 5 && saved.last() == Some(&14), "{saved:?}");
    let newest = &saved[saved.len() - 2..];
    assert_eq!(status["checkpoints"], serde_json::json!(newest), "the newest two are kept");

    let text = [
        "generate",
        "--store",
        "file://store",
        "--run",
        "small",
        "--prompt",
        "fn ",
        "--tokens",
        "4",
    ];
    let text = scratch.run(&text);
    assert!(text.code == Some(0) && text.stdout.starts_with("fn "), "{text:?}");
}

#[test]
fn a_coordinator_and_workers_that_are_started_apart_train_together() {
    let scratch = Scratch::new();
    let listen = ["coordinator", "spec.toml", "--listen", "127.0.0.1:0"];
    let mut coordinator = Running::start(scratch.command(&listen));
    let line = coordinator.wait_for(|line| line.starts_with("listening for workers on http://"));
    let url = line.rsplit(' ').next().unwrap();
    let worker = ["worker", "--coordinator", url, "--threads", "1"];
    let workers = [(); 2].map(|()| Running::start(scratch.command(&worker)));
    for end in workers.map(Running::end) {
        assert_eq!(end.code, Some(0), "{end:?}");
        assert!(
            end.stderr.contains(&format!("joins {url}; device: cpu; compute threads: 1")),
            "{end:?}"
        );
        assert!(end.stderr.contains("ended: all 14 steps are done"), "{end:?}");
        assert!(!end.stderr.contains('\x1b'), "no colours in a pipe: {end:?}");
    }
    assert_eq!(coordinator.end().code, Some(0));
}

#[test]
fn a_finished_run_says_so_again_without_training() {
    let scratch = Scratch::new();
    let first = scratch.train(&["--workers", "1"]).done();
    let again = scratch.train(&["--workers", "1"]).done();
    assert_eq!(again.field("weights"), first.field("weights"));
    assert!(!again.stderr.contains("worker"), "no worker was needed: {again:?}");
}

#[test]
fn a_second_spec_under_the_same_name_is_refused_until_told_to_begin_anew() {
    let scratch = Scratch::new();
    let other = ["--workers", "1", "--set", "run.seed=4"];
    let first = scratch.train(&["--workers", "1"]).done();
    scratch.train(&other).fails(1, &["small", "another spec", "--fresh"]);
    let fresh = scratch.train(&[&other[..], &["--fresh"]].concat()).done();
    assert_ne!(fresh.field("weights"), first.field("weights"));
}

#[test]
fn the_status_page_and_the_metrics_are_served_while_it_trains() {
    let scratch = Scratch::new();
    let steps = ["--set", "stages.0.steps=1000000", "--dashboard", "127.0.0.1:0"];
    let arguments = [&["train", "spec.toml", "--workers", "1"], &steps[..]].concat();
    let mut running = Running::start(scratch.command(&arguments));
    let line = running.wait_for(|line| line.starts_with("status page on http://"));
    let url = line.trim_start_matches("status page on ").to_owned();
    running.wait_for(|line| line.starts_with("step "));
    let fetch = |path: &str| {
        let address = url.trim_start_matches("http://");
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
        let mut answer = String::new();
        std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
        answer
    };
    assert!(fetch("/").contains("<html"));
    assert!(fetch("/api/status").contains("\"small\""));
    assert!(fetch("/metrics").contains("looptrain_"));
    running.signal("TERM");
    let end = running.end();
    assert_eq!(end.code, Some(0), "{end:?}");
    assert!(end.last_line().starts_with("stopped "), "{end:?}");
}

#[test]
fn the_tiny_example_trains_as_it_is() {
    let scratch = Scratch::new();
    let spec = repository().join("examples/tiny.toml");
    let end = scratch.run(&["train", spec.to_str().unwrap()]).done();
    let sentence = end.stdout.lines().find(|line| line.starts_with("unigram model")).unwrap();
    let numbers: Vec<f64> = sentence
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter_map(|word| word.parse().ok())
        .collect();
    assert!(numbers[1] < numbers[0], "the model is no better than a unigram model: {sentence}");
}
