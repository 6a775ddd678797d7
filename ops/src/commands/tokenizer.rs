//! `looptrain tokenizer`: train one for several datasets, and look into one.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{HumanBytes, HumanCount};
use looptrain_proto::spec;
use looptrain_storage::{
    PrepareEvent, TextTokenizer, TrainedTokenizer, read_tokenizer, train_tokenizer, write_tokenizer,
};
use serde_json::{Value, json};

use crate::cli::{InspectTokenizer, Tokenizer, TrainTokenizer};
use crate::progress::print_line;
use crate::signals;

/// Entries with the longest texts that are shown.
const LONGEST: usize = 8;
/// Special tokens that a person is shown.
const SPECIAL: usize = 16;
/// Tokens of a text that a person is shown.
const TOKENS: usize = 1000;

pub(crate) async fn run(tokenizer: Tokenizer) -> Result<()> {
    match tokenizer {
        Tokenizer::Train(args) => train(args).await,
        Tokenizer::Inspect(args) => look(args).await,
    }
}

/// What the options say, as a spec would.
fn source(args: &TrainTokenizer) -> Result<spec::Source> {
    let source = spec::Source {
        tokenizer_vocabulary: args.vocabulary as usize,
        tokenizer_bytes: args.bytes,
        validation_fraction: args.validation,
        ..args.texts.source()
    };
    source.check().map_err(|(key, reason)| anyhow!("{key}: {reason}"))?;
    Ok(source)
}

async fn train(args: TrainTokenizer) -> Result<()> {
    let source = source(&args)?;
    let output = &args.output;
    if Path::new(output).is_dir() {
        bail!("{output} is a directory; name the file, such as --output {output}/tokenizer.json");
    }
    let stop = signals::stop_on_signals("stopping")?;
    let threads = args.threads.map(|threads| threads as usize);
    let made = async {
        let trained = train_tokenizer(&source, threads, show).await?;
        write_tokenizer(output, &trained.json).await?;
        Ok::<_, looptrain_storage::Error>(trained)
    };
    let trained = tokio::select! {
        made = made => made?,
        () = stop.cancelled() => bail!("stopped before {output} was written"),
    };
    let (entries, digest) = (trained.tokenizer.vocabulary_size(), trained.tokenizer.digest());
    match args.json {
        true => outln!("{}", told(output, &trained)),
        false => outln!(
            "done tokenizer={output} entries={entries} digest={digest} documents={} bytes={} bytes_per_token={:.3}",
            trained.inputs.iter().map(|input| input.documents).sum::<u64>(),
            trained.bytes(),
            per_token(trained.bytes(), trained.tokens).unwrap_or_default(),
        ),
    }
    Ok(())
}

fn show(event: PrepareEvent) {
    match event {
        PrepareEvent::TrainingTokenizer { bytes, vocabulary } => print_line(&format!(
            "tokenizer: training up to {} entries on {}",
            HumanCount(vocabulary as u64),
            HumanBytes(bytes)
        )),
        PrepareEvent::TokenizerTrained { vocabulary } => {
            print_line(&format!("tokenizer: {} entries trained", HumanCount(vocabulary as u64)));
        }
        _ => {}
    }
}

fn per_token(bytes: u64, tokens: u64) -> Option<f64> {
    (tokens > 0).then(|| bytes as f64 / tokens as f64)
}

/// What was trained, for a script.
fn told(output: &str, trained: &TrainedTokenizer) -> Value {
    json!({
        "tokenizer": output,
        "entries": trained.tokenizer.vocabulary_size(),
        "digest": trained.tokenizer.digest().to_string(),
        "end_of_text": trained.tokenizer.end_of_text(),
        "bytes": trained.bytes(),
        "tokens": trained.tokens,
        "bytes_per_token": per_token(trained.bytes(), trained.tokens),
        "inputs": trained.inputs,
    })
}

async fn look(args: InspectTokenizer) -> Result<()> {
    let place = &args.tokenizer;
    let json = read_tokenizer(place).await?;
    let tokenizer = TextTokenizer::from_json(&json, args.end_of_text.as_deref())
        .with_context(|| format!("{place} cannot be used"))?;
    let text = match (args.text, &args.file) {
        (None, Some(file)) => {
            let read = tokio::fs::read_to_string(file).await;
            Some(read.with_context(|| format!("cannot read a text from {}", file.display()))?)
        }
        (text, _) => text,
    };
    let longest = tokenizer.longest(LONGEST)?;
    let tokens = text.as_deref().map(|text| Tokens::of(&tokenizer, text)).transpose()?;
    if args.json {
        let named = |(id, token): &(u32, String)| json!({ "id": id, "token": token });
        let with_text = |(id, text): &(u32, String)| json!({ "id": id, "text": text });
        let end = tokenizer.end_of_text();
        let output = json!({
            "tokenizer": place,
            "digest": tokenizer.digest().to_string(),
            "entries": tokenizer.entries(),
            "vocabulary": tokenizer.vocabulary_size(),
            "end_of_text": { "id": end, "token": tokenizer.name(end) },
            "special": tokenizer.special_tokens().iter().map(named).collect::<Vec<_>>(),
            "byte_level": tokenizer.is_byte_level(),
            "short_way": tokenizer.has_short_way(),
            "longest": longest.iter().map(with_text).collect::<Vec<_>>(),
            "text": tokens.as_ref().map(Tokens::told),
        });
        outln!("{output:#}");
        return Ok(());
    }
    print_tokenizer(place, &tokenizer, &longest);
    if let Some(tokens) = tokens {
        tokens.print(&tokenizer);
    }
    Ok(())
}

/// For people.
fn print_tokenizer(place: &str, tokenizer: &TextTokenizer, longest: &[(u32, String)]) {
    let (entries, vocabulary) = (tokenizer.entries(), tokenizer.vocabulary_size());
    let holes = match entries == vocabulary {
        true => String::new(),
        false => format!(" with ids below {}", HumanCount(vocabulary as u64)),
    };
    let end = tokenizer.end_of_text();
    let special = tokenizer.special_tokens();
    let mut names: Vec<String> =
        special.iter().take(SPECIAL).map(|(id, name)| format!("{name} ({id})")).collect();
    if special.len() > SPECIAL {
        names.push(format!("and {} more", special.len() - SPECIAL));
    }
    let longest: Vec<String> =
        longest.iter().map(|(id, text)| format!("{text:?} ({id})")).collect();
    outln!("tokenizer {place}  {}", tokenizer.digest());
    outln!("entries      {}{holes}", HumanCount(entries as u64));
    outln!("end of text  {} ({end})", tokenizer.name(end).unwrap_or_default());
    outln!("special      {}", if names.is_empty() { "none".to_owned() } else { names.join(" ") });
    outln!(
        "byte-level   {}",
        match tokenizer.is_byte_level() {
            true => "yes: decoding gives any text back",
            false => "not known to be: a text may come back changed",
        }
    );
    outln!(
        "encoding     {}",
        match tokenizer.has_short_way() {
            true => "the short way, for byte-level BPE with the GPT-2 pattern",
            false => "all by the library",
        }
    );
    outln!("longest      {}", longest.join(" "));
}

/// What a tokenizer makes of a text.
struct Tokens {
    bytes: u64,
    /// Each token, and what it decodes to by itself.
    tokens: Vec<(u32, String)>,
    /// Where what all of them decode to is no longer the text, in bytes.
    differs: Option<usize>,
}

impl Tokens {
    fn of(tokenizer: &TextTokenizer, text: &str) -> Result<Self> {
        let ids = tokenizer.encode(text)?;
        let back = tokenizer.decode(&ids)?;
        let same = text.bytes().zip(back.bytes()).take_while(|(a, b)| a == b).count();
        let piece = |id| tokenizer.decode(&[id]).map(|piece| (id, piece));
        let tokens = ids.into_iter().map(piece).collect::<Result<_, _>>()?;
        Ok(Self { bytes: text.len() as u64, tokens, differs: (back != text).then_some(same) })
    }

    fn per_token(&self) -> Option<f64> {
        per_token(self.bytes, self.tokens.len() as u64)
    }

    fn told(&self) -> Value {
        let token = |(id, piece): &(u32, String)| json!({ "id": id, "piece": piece });
        json!({
            "bytes": self.bytes,
            "count": self.tokens.len(),
            "bytes_per_token": self.per_token(),
            "round_trip": self.differs.is_none(),
            "tokens": self.tokens.iter().map(token).collect::<Vec<_>>(),
        })
    }

    /// For people.
    fn print(&self, tokenizer: &TextTokenizer) {
        let back = match self.differs {
            None => "decoding gives it back".to_owned(),
            Some(byte) => format!("decoding gives another text, from byte {byte} on"),
        };
        outln!(
            "\n{} tokens of {} bytes, {:.3} bytes per token; {back}",
            HumanCount(self.tokens.len() as u64),
            HumanCount(self.bytes),
            self.per_token().unwrap_or_default(),
        );
        for (id, piece) in self.tokens.iter().take(TOKENS) {
            // A part of a character shows nothing by itself.
            match tokenizer.name(*id).filter(|_| piece.contains(char::REPLACEMENT_CHARACTER)) {
                Some(name) => outln!("{id:>9}  {piece:?} {name}"),
                None => outln!("{id:>9}  {piece:?}"),
            }
        }
        if self.tokens.len() > TOKENS {
            let more = HumanCount((self.tokens.len() - TOKENS) as u64);
            outln!("          and {more} more; --json has all of them");
        }
    }
}
