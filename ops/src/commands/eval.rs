//! `looptrain eval`.

use anyhow::{Context, Result, bail, ensure};
use looptrain_model::{DepthReport, DepthSums, document_starts};
use looptrain_storage::{Dataset, Error, Mano, Split, Store, TextTokenizer, read_sequences};
use serde_json::{Value, json};

use crate::chart::{self, Chart, Line};
use crate::cli::{DatasetUrl, Eval};
use crate::npy::Table;
use crate::progress::print_line;
use crate::trained::Trained;

/// Where tokens exit, for the curve of depth and quality.
const THRESHOLDS: [f64; 13] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0];

/// Tokens that are computed together, or one sequence of more.
const TOGETHER: usize = 2048;

/// Longest sequence, unless somebody asks for another.
const LONGEST: usize = 4096;

/// Sequences of equal length to measure a model on.
pub(super) struct Sequences {
    /// What they are called in what is printed.
    name: String,
    /// `[sequences, length]`.
    inputs: Vec<u32>,
    targets: Vec<u32>,
    /// Whether a target counts.
    counts: Vec<bool>,
    length: usize,
    /// Bytes of the text of the targets that count, where they are text.
    bytes: Option<u64>,
}

pub(crate) async fn run(args: Eval) -> Result<()> {
    let mut model = Trained::open(&args.model).await?;
    if let Some(weight) = args.entropy_weight {
        model.settings.entropy_weight = weight;
    }
    let sequences = match (&args.tokens, &args.targets) {
        (Some(tokens), Some(targets)) => {
            let name = tokens.display().to_string();
            of_tables(name, &Table::read(tokens)?, &Table::read(targets)?, model.model.vocab_size)?
        }
        _ => of_datasets(&args, &model).await?,
    };
    let exercises = match args.mano {
        None => Vec::new(),
        Some(count) => mano(&model, count, length_of(&args, &model))?,
    };
    let measure = move || {
        let report = measured(&model, &sequences, &THRESHOLDS)?;
        let answers = exercises
            .iter()
            .map(|(length, sequences)| Ok((*length, measured(&model, sequences, &THRESHOLDS)?)));
        let answers = answers.collect::<Result<Vec<_>>>()?;
        Ok((model, sequences, report, answers))
    };
    let result: Result<_> =
        tokio::task::spawn_blocking(measure).await.context("the evaluation failed")?;
    let (model, sequences, report, answers) = result?;
    let result = result_json(&model, &sequences, &report, &answers);
    if args.json {
        outln!("{result}");
    } else {
        print_table(&result);
    }
    match &args.plot {
        Some(path) => chart::draw(path, &charts(&model.name, &report)),
        None => Ok(()),
    }
}

/// Runs the model over all sequences; `thresholds` are those of the curve of depth and quality.
pub(super) fn measured(
    model: &Trained,
    sequences: &Sequences,
    thresholds: &[f64],
) -> Result<DepthReport> {
    let Trained { engine, settings, document_end, .. } = model;
    let Sequences { inputs, targets, counts, length, .. } = sequences;
    let mut sums = DepthSums::new(settings, thresholds);
    let together = (TOGETHER / length).max(1) * length;
    let parts = inputs.chunks(together).zip(targets.chunks(together)).zip(counts.chunks(together));
    let mut done = 0;
    for ((inputs, targets), counts) in parts {
        let tokens = inputs.len();
        let starts = document_end.map(|end| document_starts(inputs, *length, end));
        let starts = starts.unwrap_or_default();
        let measures = engine.measure_tokens(settings, inputs, targets, &starts, tokens / length);
        let is_bad = |at: &usize| counts[at % tokens] && !measures.losses[*at].is_finite();
        if let Some(at) = (0..measures.losses.len()).find(is_bad) {
            let (sequence, position) = ((done + at % tokens) / length, at % tokens % length);
            bail!(
                "the loss at position {position} of sequence {sequence} of {} is no number after loop {}",
                sequences.name,
                at / tokens + 1
            );
        }
        done += tokens;
        sums.add(&measures, *length, |token| counts[token]);
    }
    sums.report().with_context(|| format!("no target of {} counts", sequences.name))
}

/// From two tables of ids.
fn of_tables(
    name: String,
    inputs: &Table,
    targets: &Table,
    vocabulary: usize,
) -> Result<Sequences> {
    ensure!(
        (inputs.rows, inputs.columns) == (targets.rows, targets.columns),
        "tokens are {} x {}, targets {} x {}",
        inputs.rows,
        inputs.columns,
        targets.rows,
        targets.columns
    );
    ensure!(!inputs.values.is_empty(), "{name} has no tokens");
    let ids = |what: &str, values: &[i64]| {
        let id = |(at, value): (usize, &i64)| {
            let id = u32::try_from(*value).ok().filter(|id| (*id as usize) < vocabulary);
            id.with_context(|| {
                let (row, column) = (at / inputs.columns, at % inputs.columns);
                format!("{what} [{row}, {column}]: {value} is no id below the model's vocabulary of {vocabulary}")
            })
        };
        values.iter().enumerate().map(id).collect::<Result<Vec<u32>>>()
    };
    let targets_or_0: Vec<i64> = targets.values.iter().map(|target| (*target).max(0)).collect();
    let counts: Vec<bool> = targets.values.iter().map(|target| *target >= 0).collect();
    Ok(Sequences {
        name,
        inputs: ids("--tokens", &inputs.values)?,
        targets: ids("--targets", &targets_or_0)?,
        counts,
        length: inputs.columns,
        bytes: None,
    })
}

/// From the dataset that the arguments name, or those of the run's stage.
async fn of_datasets(args: &Eval, model: &Trained) -> Result<Sequences> {
    let datasets = match &args.data {
        None => model.datasets().await?,
        Some(DatasetUrl { store, name }) => {
            let dataset = Dataset::open(&Store::open_existing(store)?, name).await?;
            vec![dataset.with_context(|| format!("there is no dataset `{name}` in {store}"))?]
        }
    };
    let (split, length) = (Split::from(args.split), length_of(args, model));
    spread(model, &datasets, split, u64::from(args.sequences), length).await
}

/// Tokens per sequence.
fn length_of(args: &Eval, model: &Trained) -> usize {
    args.sequence_length.map_or(model.context.min(LONGEST), |length| length as usize)
}

/// Sequences spread evenly over a split of some datasets.
pub(super) async fn spread(
    model: &Trained,
    datasets: &[Dataset],
    split: Split,
    sequences: u64,
    length: usize,
) -> Result<Sequences> {
    ensure!(
        !datasets.is_empty(),
        "say what to evaluate on: --data STORE/datasets/NAME, or --tokens and --targets"
    );
    let each = sequences.div_ceil(datasets.len() as u64);
    let mut wanted = Vec::new();
    for dataset in datasets {
        let (name, has) = (&dataset.manifest().name, dataset.manifest().vocabulary_size);
        ensure!(
            has <= model.model.vocab_size,
            "dataset `{name}` has a vocabulary of {has}, the model one of {}",
            model.model.vocab_size
        );
        if let Some(tokenizer) = &model.tokenizer
            && tokenizer.digest() != dataset.manifest().tokenizer_digest
        {
            bail!("dataset `{name}` was made with another tokenizer than the model's");
        }
        let held = dataset.sequences(split, length);
        ensure!(
            held > 0,
            "the {split} split of `{name}` has no sequence of {length} tokens; choose a shorter --sequence-length"
        );
        let take = each.min(held);
        wanted.extend((0..take).map(|turn| (dataset, turn * held / take)));
    }
    wanted.truncate(usize::try_from(sequences).unwrap_or(usize::MAX));
    let tokens = read_sequences(&wanted, split, length).await?;
    let rows = || tokens.chunks_exact(length + 1);
    let targets: Vec<u32> = rows().flat_map(|row| &row[1..]).copied().collect();
    let bytes = match datasets[0].tokenizer().await {
        Ok(tokenizer) => Some(text_bytes(&tokenizer, &targets, length)?),
        // Nobody wrote the text of a dataset for measurements.
        Err(Error::NotFound { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let names: Vec<&str> =
        datasets.iter().map(|dataset| dataset.manifest().name.as_str()).collect();
    Ok(Sequences {
        name: format!("{} ({split})", names.join(", ")),
        inputs: rows().flat_map(|row| &row[..length]).copied().collect(),
        counts: vec![true; targets.len()],
        targets,
        length,
        bytes,
    })
}

/// Bytes of the text that tokens stand for, sequence after sequence; ends of texts have none.
fn text_bytes(tokenizer: &TextTokenizer, tokens: &[u32], length: usize) -> Result<u64> {
    let mut bytes = 0;
    for sequence in tokens.chunks(length) {
        for text in sequence.split(|token| *token == tokenizer.end_of_text()) {
            bytes += tokenizer.decode(text)?.len() as u64;
        }
    }
    Ok(bytes)
}

/// Exercises of each length that the model's vocabulary has, as many whole ones to a sequence as there
/// is room for; the answers count.
fn mano(model: &Trained, count: u32, length: usize) -> Result<Vec<(u32, Sequences)>> {
    let tokenizer = model.tokenizer()?;
    let lengths = (1..).take_while(|length| tokenizer.token(&format!("<len_{length}>")).is_some());
    let answer = tokenizer.token("<ans>");
    let lengths: Vec<u32> = lengths.collect();
    let numbers = (0_u32..).take_while(|number| tokenizer.token(&number.to_string()).is_some());
    let modulus = numbers.count() as u32;
    let Some(answer) = answer.filter(|_| !lengths.is_empty() && modulus > 1) else {
        bail!("the model's tokenizer is not that of Mano exercises");
    };
    let end = tokenizer.end_of_text();
    let mut all = Vec::new();
    for operators in lengths {
        let exercises =
            Mano { operators, modulus, train: 1, validation: u64::from(count), seed: 0 };
        let mut sequence = Vec::new();
        let mut sequences = Sequences {
            name: format!("Mano exercises of {operators} operators"),
            inputs: Vec::new(),
            targets: Vec::new(),
            counts: Vec::new(),
            length,
            bytes: None,
        };
        let Ok(held_out) = exercises.held_out() else {
            // Modulo a small number there are few of one operator.
            print_line(&format!("training has seen all Mano exercises of {operators} operators"));
            continue;
        };
        for text in held_out {
            let tokens = tokenizer.encode(&text)?;
            ensure!(
                tokens.len() < length,
                "an exercise of {operators} operators has {} tokens, more than sequences of {length}",
                tokens.len()
            );
            if sequence.len() + tokens.len() > length {
                sequences.push(&mut sequence, answer, end);
            }
            sequence.extend(tokens);
            sequence.push(end);
        }
        sequences.push(&mut sequence, answer, end);
        all.push((operators, sequences));
    }
    Ok(all)
}

impl Sequences {
    /// Adds a sequence of which nothing counts but what follows `answer`, filled up with `fill`.
    fn push(&mut self, tokens: &mut Vec<u32>, answer: u32, fill: u32) {
        tokens.resize(self.length + 1, fill);
        self.inputs.extend_from_slice(&tokens[..self.length]);
        self.targets.extend_from_slice(&tokens[1..]);
        self.counts.extend(tokens[..self.length].iter().map(|token| *token == answer));
        tokens.clear();
    }
}

fn result_json(
    model: &Trained,
    sequences: &Sequences,
    report: &DepthReport,
    answers: &[(u32, DepthReport)],
) -> Value {
    let per_loop = |of: &dyn Fn(f64) -> f64| {
        report.loss_per_loop.iter().map(|loss| of(*loss)).collect::<Vec<f64>>()
    };
    let bits_per_byte = sequences.bytes.filter(|bytes| *bytes > 0).map(|bytes| {
        let per_byte = report.tokens as f64 / bytes as f64;
        per_loop(&|loss| loss / std::f64::consts::LN_2 * per_byte)
    });
    let mut result = json!({
        "model": model.name,
        "data": sequences.name,
        "tokens": report.tokens,
        "loops": model.settings.loops,
        "trained_loops": model.trained_loops,
        "entropy_weight": model.settings.entropy_weight,
        "loss": report.loss,
        "loss_per_loop": report.loss_per_loop,
        "perplexity_per_loop": per_loop(&f64::exp),
        "bits_per_byte_per_loop": bits_per_byte,
        "accuracy_per_loop": report.accuracy_per_loop,
        "exit_pdf": report.exit_pdf,
        "entropy": report.entropy,
        "mean_depth": report.mean_depth,
        "quality": quality_json(report),
    });
    if !answers.is_empty() {
        let answers = answers.iter().map(|(length, report)| {
            json!({
                "operators": length,
                "exercises": report.tokens,
                "exact_match_per_loop": report.accuracy_per_loop,
            })
        });
        result["mano"] = answers.collect();
    }
    result
}

/// The curve of depth and quality.
pub(super) fn quality_json(report: &DepthReport) -> Value {
    let quality = report.quality.iter().map(|it| {
        json!({
            "threshold": it.threshold,
            "mean_depth": it.mean_depth,
            "loss": it.loss,
            "accuracy": it.accuracy,
        })
    });
    quality.collect()
}

/// For people: what the JSON says, in columns.
fn print_table(result: &Value) {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    outln!("model: {}", result["model"].as_str().unwrap_or_default());
    outln!("data: {}, {} tokens", result["data"].as_str().unwrap_or_default(), result["tokens"]);
    outln!(
        "Stage I loss {:.4}, entropy {:.4}, mean depth {:.3}",
        number(&result["loss"]),
        number(&result["entropy"]),
        number(&result["mean_depth"])
    );
    outln!("loop    loss  perplexity  bits/byte  accuracy    exit");
    let columns = [
        "loss_per_loop",
        "perplexity_per_loop",
        "bits_per_byte_per_loop",
        "accuracy_per_loop",
        "exit_pdf",
    ];
    for index in 0..result["loops"].as_u64().unwrap_or(0) as usize {
        let [loss, perplexity, bits, accuracy, exit] =
            columns.map(|name| number(&result[name][index]));
        let bits = if bits.is_nan() { "-".to_owned() } else { format!("{bits:.4}") };
        outln!(
            "{:4}  {loss:6.4}  {perplexity:10.3}  {bits:>9}  {accuracy:8.4}  {exit:6.4}",
            index + 1
        );
    }
    outln!("threshold  mean depth    loss  accuracy");
    for it in result["quality"].as_array().into_iter().flatten() {
        let [threshold, depth, loss, accuracy] =
            ["threshold", "mean_depth", "loss", "accuracy"].map(|name| number(&it[name]));
        outln!("{threshold:9.2}  {depth:10.3}  {loss:6.4}  {accuracy:8.4}");
    }
    for it in result["mano"].as_array().into_iter().flatten() {
        let matches: Vec<String> = (it["exact_match_per_loop"].as_array().into_iter().flatten())
            .map(|share| format!("{:.3}", number(share)))
            .collect();
        outln!(
            "Mano, {} operators: exact match by loop {} of {}",
            it["operators"],
            matches.join(" "),
            it["exercises"]
        );
    }
}

fn charts(name: &str, report: &DepthReport) -> [Chart; 3] {
    let by_loop = |values: &[f64]| (1..).map(f64::from).zip(values.iter().copied()).collect();
    let line = |name: &str, points| Line { name: name.into(), points };
    let curve = |of: fn(&looptrain_model::Quality) -> f64| {
        report.quality.iter().map(|it| (it.mean_depth, of(it))).collect::<Vec<_>>()
    };
    [
        Chart {
            title: format!("{name}: loss by loop"),
            x: "loop",
            y: "cross-entropy (nats)",
            lines: vec![line("loss", by_loop(&report.loss_per_loop))],
        },
        Chart {
            title: "loss by compute".into(),
            x: "mean depth (loops)",
            y: "cross-entropy (nats)",
            lines: vec![
                line("Q-exit", curve(|it| it.loss)),
                line("fixed depth", by_loop(&report.loss_per_loop)),
            ],
        },
        Chart {
            title: "accuracy by compute".into(),
            x: "mean depth (loops)",
            y: "next token right",
            lines: vec![
                line("Q-exit", curve(|it| it.accuracy)),
                line("fixed depth", by_loop(&report.accuracy_per_loop)),
            ],
        },
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn table(rows: usize, values: &[i64]) -> Table {
        Table { rows, columns: values.len() / rows, values: values.to_vec() }
    }

    #[test]
    fn tables_of_ids_are_checked_and_negative_targets_do_not_count() {
        let inputs = table(2, &[1, 2, 3, 4]);
        let found = of_tables("x".into(), &inputs, &table(2, &[2, -100, 4, -1]), 5).unwrap();
        assert_eq!((found.length, &found.inputs[..]), (2, &[1, 2, 3, 4][..]));
        assert_eq!(found.counts, [true, false, true, false]);
        let refused = |inputs: &Table, targets: &Table| {
            of_tables("x".into(), inputs, targets, 4).err().unwrap().to_string()
        };
        assert!(refused(&inputs, &inputs).contains("--tokens [1, 1]: 4 is no id below"));
        assert!(
            refused(&inputs, &table(1, &[1, 2, 3, 3])).contains("tokens are 2 x 2, targets 1 x 4")
        );
        assert!(refused(&table(1, &[-1]), &table(1, &[1])).contains("-1 is no id"));
        assert!(refused(&table(1, &[]), &table(1, &[])).contains("no tokens"));
    }

    #[test]
    fn of_a_sequence_of_exercises_the_answers_count() {
        let mut sequences = Sequences {
            name: String::new(),
            inputs: Vec::new(),
            targets: Vec::new(),
            counts: Vec::new(),
            length: 6,
            bytes: None,
        };
        // 9 stands before answers, 0 ends.
        sequences.push(&mut vec![5, 9, 7, 0], 9, 0);
        assert_eq!(sequences.inputs, [5, 9, 7, 0, 0, 0]);
        assert_eq!(sequences.targets, [9, 7, 0, 0, 0, 0]);
        assert_eq!(sequences.counts, [false, true, false, false, false, false]);
    }
}
