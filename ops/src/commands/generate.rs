//! `looptrain generate`, and the sample at the end of `looptrain train`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use anyhow::{Context, Result, ensure};
use looptrain_model::{CacheSharing, Exit, Generated, Sampling, generate};
use looptrain_proto::Step;
use looptrain_storage::{Checkpoints, TextTokenizer};
use serde_json::json;

use super::all_threads;
use super::coordinator::PreparedRun;
use crate::cli::Generate;
use crate::progress::print_line;
use crate::trained::{Found, Trained};

pub(crate) async fn run(args: Generate) -> Result<()> {
    let model = Trained::open(&args.model).await?;
    let tokenizer = model.tokenizer()?.clone();
    let mut stop = model.ends.clone();
    for name in &args.stops {
        let token = tokenizer.token(name);
        stop.push(token.with_context(|| format!("the tokenizer has no token `{name}`"))?);
    }
    let prompt = if args.chat {
        let (prompt, end) = conversation(&tokenizer, args.system.as_deref(), &args.prompt)?;
        stop.push(end);
        prompt
    } else {
        text(&tokenizer, &args.prompt)?
    };
    if model.settings.loops > model.trained_loops {
        let (loops, trained) = (model.settings.loops, model.trained_loops);
        print_line(&format!("{loops} loops, and trained with {trained}"));
    }
    let sampling = Sampling {
        tokens: args.tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        context: args.context.map_or(model.context, |context| context as usize),
        stop,
        vocabulary: tokenizer.vocabulary_size(),
        exit: args.exit.map_or(Exit::Last, Exit::Threshold),
        sharing: args.cache.into(),
        document_end: model.document_end,
    };
    let prompt_tokens = prompt.len();
    let stream = (!args.json).then(|| TextStream::new(tokenizer.clone()));
    if stream.is_some() && !args.chat {
        out!("{}", args.prompt);
    }
    let generated = written(model, prompt, sampling, stream).await?;
    let Generated { tokens, mean_depth, mean_loops, cache_bytes, prompt_time, time } = &generated;
    let rate = tokens.len() as f64 / time.as_secs_f64().max(1e-9);
    if args.json {
        let result = json!({
            "text": tokenizer.decode(tokens)?,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "tokens_per_second": rate,
            "prompt_seconds": prompt_time.as_secs_f64(),
            "mean_exit": mean_depth,
            "mean_loops": mean_loops,
            "cache_bytes": cache_bytes,
        });
        outln!("{result}");
        return Ok(());
    }
    outln!();
    print_line(&format!(
        "{} tokens, {rate:.1}/s behind a prompt of {prompt_tokens} in {:.2} s; exit after loop {mean_depth:.2}, \
         {mean_loops:.2} loops computed; {cache_bytes} bytes of keys and values",
        tokens.len(),
        prompt_time.as_secs_f64(),
    ));
    Ok(())
}

/// Prints the sample that the spec asks for.
pub(crate) async fn print_sample(run: &PreparedRun, step: Step) -> Result<()> {
    let sample = &run.spec.sample;
    let read = Checkpoints::new(&run.store, &run.spec.run.name).weights(step).await?;
    let (manifest, tensors) = read;
    let (spec, pins) = (Box::new(run.spec.clone()), BTreeMap::new());
    let found = Found::Checkpoint { spec, pins, manifest, tensors };
    let tokenizer = run.dataset_of(step).tokenizer().await?;
    let model = Trained::new(found, Some(tokenizer.clone()), all_threads()).await?;
    let prompt = text(&tokenizer, &sample.prompt)?;
    let sampling = Sampling {
        tokens: sample.tokens,
        temperature: sample.temperature,
        top_k: 0,
        top_p: 1.0,
        seed: run.spec.run.seed,
        context: model.context,
        stop: model.ends.clone(),
        vocabulary: tokenizer.vocabulary_size(),
        exit: Exit::Last,
        sharing: CacheSharing::Full,
        document_end: model.document_end,
    };
    let generated = written(model, prompt, sampling, None).await?;
    outln!("sample: {}{}", sample.prompt, tokenizer.decode(&generated.tokens)?);
    Ok(())
}

/// Continues a prompt, away from the async threads, and prints what comes into `stream`.
async fn written(
    model: Trained,
    prompt: Vec<u32>,
    sampling: Sampling,
    mut stream: Option<TextStream>,
) -> Result<Generated> {
    let work = move || {
        let generated =
            generate(&model.engine, &model.settings, &prompt, &sampling, &mut |token| {
                match stream.as_mut().map(|stream| stream.push(token)) {
                    // Whoever read it has gone away.
                    Some(Err(_)) => ControlFlow::Break(()),
                    _ => ControlFlow::Continue(()),
                }
            });
        if let Some(stream) = &mut stream {
            stream.finish()?;
        }
        Ok(generated)
    };
    tokio::task::spawn_blocking(work).await.context("generation failed")?
}

/// The tokens of a text; of an empty one that which stands before every text.
fn text(tokenizer: &TextTokenizer, text: &str) -> Result<Vec<u32>> {
    let mut tokens = tokenizer.encode(text)?;
    if tokens.is_empty() {
        tokens.push(tokenizer.end_of_text());
    }
    Ok(tokens)
}

/// A conversation in ChatML up to where the answer begins, and the token that ends the answer.
fn conversation(
    tokenizer: &TextTokenizer,
    system: Option<&str>,
    prompt: &str,
) -> Result<(Vec<u32>, u32)> {
    let token = |name: &str| {
        let missing = || format!("the tokenizer has no token `{name}`, which --chat needs");
        tokenizer.token(name).with_context(missing)
    };
    let (start, end) = (token("<|im_start|>")?, token("<|im_end|>")?);
    ensure!(start != end, "the tokenizer has one token for both ends of a turn");
    let mut tokens = Vec::new();
    for (role, said) in system.map(|said| ("system", said)).into_iter().chain([("user", prompt)]) {
        tokens.push(start);
        tokens.extend(tokenizer.encode(&format!("{role}\n{said}"))?);
        tokens.push(end);
        tokens.extend(tokenizer.encode("\n")?);
    }
    tokens.push(start);
    tokens.extend(tokenizer.encode("assistant\n")?);
    Ok((tokens, end))
}

/// Prints tokens as text as soon as their bytes are whole characters. What a token's text is may depend on
/// the one before it, so some that are printed are decoded once more with those that are not.
struct TextStream {
    tokenizer: TextTokenizer,
    /// The last tokens that were printed together, and those that were not yet.
    tokens: Vec<u32>,
    /// How many of them are printed.
    printed: usize,
}

impl TextStream {
    fn new(tokenizer: TextTokenizer) -> Self {
        Self { tokenizer, tokens: Vec::new(), printed: 0 }
    }

    fn push(&mut self, token: u32) -> Result<()> {
        self.tokens.push(token);
        // The rest of a character may come with the next token.
        if !self.tokenizer.decode(&self.tokens)?.ends_with('\u{fffd}') {
            self.finish()?;
        }
        Ok(())
    }

    /// Prints what is there.
    fn finish(&mut self) -> Result<()> {
        let before = self.tokenizer.decode(&self.tokens[..self.printed])?;
        let text = self.tokenizer.decode(&self.tokens)?;
        if let Some(new) = text.get(before.len()..) {
            out!("{new}");
        }
        self.tokens.drain(..self.printed);
        self.printed = self.tokens.len();
        Ok(())
    }
}
