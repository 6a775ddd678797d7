//! Specs as people write them, and as they should not.

use proptest::prelude::*;

use super::*;
use crate::Step;

fn example() -> &'static str {
    include_str!("../../../examples/quickstart.toml")
}

fn parse(text: &str, overrides: &[&str]) -> Result<Spec, String> {
    let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
    Spec::parse("run.toml", text, &overrides).map_err(|error| error.to_string())
}

#[test]
fn a_spec_survives_the_journey_to_a_worker() {
    let spec = parse(example(), &[]).unwrap();
    assert_eq!(Spec::parse("welcome", &spec.to_toml(), &[]).unwrap(), spec);
}

#[test]
fn a_relative_store_is_the_same_directory_for_every_process() {
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let load = |store: &str| {
        let given = [format!("run.store={store}")];
        Spec::load(&examples.join("quickstart.toml"), &given).unwrap().run.store
    };
    let here = std::env::current_dir().unwrap();
    assert_eq!(load("file://some/store"), format!("file://{}/some/store", here.display()));
    assert_eq!(load("file:///some/store"), "file:///some/store");
    assert_eq!(load("s3://bucket/prefix"), "s3://bucket/prefix");
}

#[test]
fn overrides_reach_tables_lists_and_absent_keys() {
    let given = ["run.seed=99", "stages.0.learning_rate.peak=1e-4", "cluster.worker_timeout=7.5"];
    let spec = parse(example(), &given).unwrap();
    assert_eq!(spec.run.seed, 99);
    assert_eq!(spec.stages[0].learning_rate.peak, 1e-4);
    assert_eq!(spec.cluster.worker_timeout, 7.5);
    let named = parse(example(), &["run.name=plain-text"]).unwrap();
    assert_eq!(named.run.name, "plain-text", "text needs no quotes");
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let text = example().replace("seed = 7", "sede = 7");
    let error = parse(&text, &[]).unwrap_err();
    assert!(error.starts_with("run.toml:9: ") && error.contains("sede"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn contradictions_name_the_key_and_the_remedy() {
    for (given, words) in [
        ("model.num_attention_heads=3", "model.num_attention_heads: 3 heads do not divide"),
        ("stages.0.slots=70000", "stages.0.slots: 70000 slots are more than"),
        ("stages.0.loops=0", "stages.0.loops: must be between 1"),
        ("cluster.reduction=\"best\"", "unknown variant `best`"),
        ("cluster.fraction_bits=60", "cluster.fraction_bits: must be between 16 and 52"),
        ("cluster.streams=0", "cluster.streams: must be between 1 and 16, not 0"),
        ("cluster.collective=mpi", "unknown variant `mpi`"),
        ("cluster.streams=17", "cluster.streams: must be between 1 and 16, not 17"),
        ("cluster.workers=0", "cluster.workers: must be between 1 and 4096, not 0"),
        ("cluster.workers=1000000000", "cluster.workers: must be between 1 and 4096"),
        ("cluster.worker_timeout=1e20", "cluster.worker_timeout: must be between"),
        ("stages.0.slot_sequences=1152921504606846976", "stages.0.slot_sequences: must be between"),
        (
            "stages.0.sequence_length=1099511627776",
            "stages.0.slot_sequences: slots x slot_sequences",
        ),
        ("compute.memory_gib=-1", "compute.memory_gib: must be between 0"),
        ("compute.recompute=all", "unknown variant `all`"),
        ("run.name=\"../up\"", "run.name: `../up` is no name"),
        ("optimizer.beta2=1.0", "optimizer.beta2: must be at least 0 and below 1"),
        ("datasets.0.source.max_malformed=1.5", "datasets.0.source.max_malformed: must be a share"),
        ("datasets.0.source.shard_tokens=99999999", "datasets.0.source.shard_tokens: must be"),
        ("datasets.0.source.format=\"csv\"", "unknown variant `csv`"),
        ("stages.0.learning_rate.warmup_steps=599", "stages.0.learning_rate: warmup_steps"),
    ] {
        let error = parse(example(), &[given]).unwrap_err();
        assert!(error.contains(words), "{given}: {error}");
    }
}

#[test]
fn stages_have_no_more_tokens_together_than_can_be_counted() {
    let mut spec = parse(example(), &[]).unwrap();
    let step = spec.stages[0].step_tokens();
    spec.stages[0].steps = (1 << 40) - 1;
    spec.stages[0].learning_rate.decay_steps = 0;
    let stages = (1_u64 << 61).div_ceil(step << 40) as usize + 1;
    spec.stages = vec![spec.stages[0].clone(); stages];
    let error = Spec::parse("long", &spec.to_toml(), &[]).unwrap_err().to_string();
    assert!(error.contains("stages: all together have"), "{error}");
    spec.stages.truncate(stages / 2);
    assert!(Spec::parse("shorter", &spec.to_toml(), &[]).is_ok());
}

#[test]
fn what_decides_the_weights_changes_the_trajectory_and_nothing_else_does() {
    let digest = |given: &[&str]| parse(example(), given).unwrap().trajectory_digest();
    let same = [
        "cluster.workers=5",
        "cluster.streams=4",
        "cluster.collective=nccl",
        "run.name=other",
        "checkpoint.every_steps=7",
        "sample.tokens=1",
        "compute.recompute=layer",
        "compute.memory_gib=0.5",
    ];
    for given in same {
        assert_eq!(digest(&[given]), digest(&[]), "{given}");
    }
    let other = [
        "run.seed=8",
        "stages.0.slots=5",
        "optimizer.beta1=0.8",
        "cluster.fraction_bits=41",
        "cluster.reduction=\"fast\"",
    ];
    for given in other {
        assert_ne!(digest(&[given]), digest(&[]), "{given}");
    }
}

#[test]
fn what_decides_the_weights_and_differs_is_named_by_its_key() {
    let plain = parse(example(), &[]).unwrap();
    let differences = |given: &[&str]| plain.differences(&parse(example(), given).unwrap());
    let more = [
        "stages.0.learning_rate.peak=1e-3",
        "run.seed=8",
        "optimizer.spikes.action=stop",
        "cluster.workers=9",
        "checkpoint.every_steps=3",
    ];
    let told = [
        "optimizer.spikes.action was not there and is \"stop\"",
        "optimizer.spikes.deviations was not there and is 6.0",
        "optimizer.spikes.window was not there and is 128",
        "run.seed was 7 and is 8",
        "stages.0.learning_rate.peak was 0.002 and is 0.001",
    ];
    assert_eq!(differences(&more), told);
    assert!(differences(&["cluster.streams=4", "run.name=b"]).is_empty());
    // There is one for every spec of another digest.
    for given in ["model.num_hidden_layers=4", "stages.0.slots=5", "cluster.reduction=fast"] {
        assert_eq!(differences(&[given]).len(), 1, "{given}");
    }
    assert_eq!(plain.differences(&branched(5, 3, &[]).unwrap()).len(), 3);
}

#[test]
fn steps_know_their_stage_and_the_cursor_counts_its_sequences() {
    let mut spec = parse(example(), &["stages.0.steps=600"]).unwrap();
    let mut second = spec.stages[0].clone();
    second.steps = 5;
    second.slots = 3;
    spec.stages.push(second);
    assert_eq!(spec.total_steps(), Step(605));
    assert_eq!(spec.position(Step(0)), None);
    assert_eq!(spec.position(Step(606)), None);
    let last = spec.position(Step(600)).unwrap();
    assert_eq!((last.stage, last.step_in_stage, last.first_sequence), (0, 599, 599 * 8));
    let first = spec.position(Step(601)).unwrap();
    assert_eq!((first.stage, first.step_in_stage, first.first_sequence), (1, 0, 0));
    assert_eq!(spec.cursor_after(Step(601)), crate::Cursor { stage: 1, sequences: 6 });
}

proptest! {
    #[test]
    fn no_text_and_no_override_makes_the_reader_panic(text in ".{0,200}", given in ".{0,60}") {
        let _ = parse(&text, &[]);
        let _ = parse(example(), &[&given]);
        let _ = parse(example(), &[&format!("stages.0.steps={given}")]);
    }

    #[test]
    fn stages_follow_each_other_without_a_gap(steps in prop::collection::vec(1u64..40, 1..6)) {
        let mut spec = parse(example(), &[]).unwrap();
        let stage = spec.stages[0].clone();
        spec.stages = steps.iter().map(|&steps| Stage { steps, ..stage.clone() }).collect();
        let mut expected = Vec::new();
        for (index, &count) in steps.iter().enumerate() {
            expected.extend((0..count).map(|step| (index, step)));
        }
        let found: Vec<_> = (1..=spec.total_steps().0)
            .map(|step| spec.position(Step(step)).map(|at| (at.stage, at.step_in_stage)).unwrap())
            .collect();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn a_stage_may_say_its_tokens_and_grow_its_batch() {
    // 4 slots of 2 sequences of 128 tokens.
    let tokens = |count: u64| format!("stages.0.tokens={count}");
    let given = |more: &[&str]| parse(example(), &[&["stages.0.steps=0"], more].concat());
    let spec = given(&[&tokens(600_001)]).unwrap();
    assert_eq!((spec.stages[0].steps, spec.stages[0].tokens), (586, 0));
    let ramped = ["stages.0.ramp={ slots = 2, steps = 10 }", &tokens(600_001)];
    let spec = given(&ramped).unwrap();
    // 2 slots in five of the first steps, 3 in the others: 15 slots less.
    assert_eq!(spec.stages[0].steps, 590);
    assert_eq!([1, 5, 6, 11].map(|step| spec.slots_of(Step(step))), [2, 2, 3, 4]);
    assert_eq!([5, 10, 11].map(|step| spec.tokens_after(Step(step))), [2560, 6400, 7424]);
    assert_eq!(spec.cursor_after(Step(10)).sequences, 50);
    assert_eq!(spec.position(Step(11)).unwrap().first_sequence, 50);
    assert_eq!(Spec::parse("welcome", &spec.to_toml(), &[]).unwrap(), spec);

    // What is said last counts; a file says one of the two.
    assert_eq!(
        parse(
            example(),
            &[
                "stages.0.learning_rate.warmup_steps=0",
                "stages.0.learning_rate.decay_steps=0",
                &tokens(9)
            ]
        )
        .unwrap()
        .total_steps(),
        Step(1)
    );
    assert_eq!(given(&[&tokens(9), "stages.0.steps=700"]).unwrap().total_steps(), Step(700));
    let both = example().replace("steps = 600\n", "steps = 600\ntokens = 9\n");
    let both = parse(&both, &[]).unwrap_err();
    assert!(both.contains("stages.0.tokens") && both.contains("steps = 600"), "{both}");
    let endless = given(&["stages.0.steps=1000000000000", "stages.0.sequence_length=10000000"]);
    assert!(endless.unwrap_err().contains("stages.0.steps"));
    for (ramp, said) in
        [("{ slots = 5, steps = 10 }", "ramp.slots"), ("{ slots = 1, steps = 0 }", "ramp.steps")]
    {
        let error = given(&[&format!("stages.0.ramp={ramp}"), &tokens(9)]).unwrap_err();
        assert!(error.contains(said), "{error}");
    }
}

/// The example with a branch at `step` of another run that passes over `skip_steps` steps.
fn branched(step: u64, skip_steps: u64, more: &[&str]) -> Result<Spec, String> {
    let weights = "0".repeat(64);
    let branch = format!(
        "branch={{ run = \"other\", step = {step}, weights = \"blake3:{weights}\", skip_steps = {skip_steps} }}"
    );
    parse(example(), &[&[branch.as_str()], more].concat())
}

#[test]
fn a_branch_reads_on_where_its_run_stood_or_some_steps_later() {
    let plain = parse(example(), &[]).unwrap();
    let (on, past) = (branched(100, 0, &[]).unwrap(), branched(100, 7, &[]).unwrap());
    for step in (1..=600).map(Step) {
        assert_eq!(on.position(step), plain.position(step));
        assert_eq!(on.cursor_after(step), plain.cursor_after(step));
        let skipped = if step > Step(100) { 7 * 8 } else { 0 };
        let (found, before) = (past.position(step).unwrap(), plain.position(step).unwrap());
        assert_eq!(found.first_sequence, before.first_sequence + skipped);
        assert_eq!((found.step_in_stage, found.slots), (before.step_in_stage, before.slots));
        let sequences = plain.cursor_after(step).sequences + skipped;
        assert_eq!(past.cursor_after(step).sequences, sequences);
        assert_eq!(past.tokens_after(step), plain.tokens_after(step));
        assert_eq!(past.learning_rate(step), plain.learning_rate(step));
    }
    let digests = [&plain, &on, &past].map(Spec::trajectory_digest);
    assert!(digests[0] != digests[1] && digests[1] != digests[2] && digests[0] != digests[2]);
}

#[test]
fn a_branch_passes_over_data_of_one_stage_alone_also_while_its_batch_grows() {
    let more = ["stages.0.steps=600", "stages.0.ramp={slots=2,steps=20}"];
    let mut spec = branched(599, 3, &more).unwrap();
    spec.stages.push(spec.stages[0].clone());
    // The first step after the branch is the first one of the next stage, in the middle of its ramp.
    spec.branch.as_mut().unwrap().step = 600;
    let spec = Spec::parse("two", &spec.to_toml(), &[]).unwrap();
    let last = spec.stages[0].sequences_of(599);
    assert_eq!(spec.position(Step(600)).unwrap().first_sequence, last);
    let mut next = spec.stages[1].sequences_of(3);
    for step in (601..=1200).map(Step) {
        let at = spec.position(step).unwrap();
        assert_eq!((at.stage, at.first_sequence), (1, next), "{step}");
        next += u64::from(at.slots) * spec.stages[1].slot_sequences as u64;
        assert_eq!(spec.cursor_after(step).sequences, next);
    }
}

#[test]
fn a_branch_goes_on_from_what_its_run_had_read_whatever_its_own_steps_make_up_to() {
    // One that passed over 50 steps, and one off that, later.
    let first = branched(100, 50, &[]).unwrap();
    let read = first.cursor_after(Step(200));
    assert_eq!(read.sequences, 250 * 8);
    let given = format!("branch.sequences={}", read.sequences);
    let second = branched(200, 0, &[&given]).unwrap();
    assert_eq!(second.cursor_after(Step(200)), read);
    for step in (201..=600).map(Step) {
        assert_eq!(second.position(step), first.position(step), "{step}");
        assert_eq!(second.cursor_after(step), first.cursor_after(step));
    }
    // With another batch, and past some more.
    let wider = branched(200, 3, &[&given, "stages.0.slots=8"]).unwrap();
    for step in 201..=600 {
        let at = wider.position(Step(step)).unwrap();
        assert_eq!(at.first_sequence, 250 * 8 + (step - 201 + 3) * 16, "{step}");
    }
    assert_eq!(Spec::parse("welcome", &second.to_toml(), &[]).unwrap(), second);
    assert_ne!(second.trajectory_digest(), branched(200, 0, &[]).unwrap().trajectory_digest());
}

#[test]
fn a_branch_that_cannot_be_is_refused_by_its_key() {
    for (step, skip, more, words) in [
        (0, 0, "run.seed=7", "branch.step: must be between 1"),
        (600, 0, "run.seed=7", "branch.step: must be between 1 and the step before the last"),
        (5, 1 << 41, "run.seed=7", "branch.skip_steps: must be"),
        (5, 1 << 40, "stages.0.slots=9000", "stages: all together have"),
        (5, 0, "branch.sequences=2000000000000", "branch.sequences: must be"),
        (5, 0, "run.name=other", "branch.run: a run is no branch of itself"),
        (5, 0, "branch.run=../up", "branch.run: `../up` is no name"),
        (5, 0, "initial.model=m", "missing field `weights`"),
    ] {
        let error = branched(step, skip, &[more]).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    let zeros = "0".repeat(64);
    let initial = format!("initial={{ model = \"m\", weights = \"blake3:{zeros}\" }}");
    let error = branched(5, 0, &[&initial]).unwrap_err();
    assert!(error.contains("branch: there is [initial] as well"), "{error}");
}

#[test]
fn a_guard_against_spikes_decides_the_weights_and_may_be_left_out() {
    let digest = |given: &[&str]| parse(example(), given).unwrap().trajectory_digest();
    let plain = parse(example(), &[]).unwrap();
    assert!(plain.optimizer.spikes.is_none() && !plain.to_toml().contains("spikes"));
    assert_ne!(digest(&["optimizer.spikes={}"]), digest(&[]));
    assert_ne!(digest(&["optimizer.spikes={}"]), digest(&["optimizer.spikes.deviations=5"]));
    for (given, words) in [
        ("optimizer.spikes.deviations=0", "optimizer.spikes.deviations: must be above 0"),
        ("optimizer.spikes.window=1", "optimizer.spikes.window: must be between 2"),
        ("optimizer.spikes.action=go", "unknown variant `go`"),
    ] {
        let error = parse(example(), &[given]).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn weights_to_begin_from_count_by_their_digest() {
    let given = |model: &str, digit: &str| {
        let weights = digit.repeat(64);
        let initial = format!("initial={{ model = \"{model}\", weights = \"blake3:{weights}\" }}");
        parse(example(), &[&initial])
    };
    let digest = |model, digit| given(model, digit).unwrap().trajectory_digest();
    assert_eq!(digest("a", "0"), digest("b", "0"));
    assert_ne!(digest("a", "0"), digest("a", "1"));
    assert_ne!(digest("a", "0"), parse(example(), &[]).unwrap().trajectory_digest());
    assert!(given("../a", "0").unwrap_err().contains("initial.model"));
}
