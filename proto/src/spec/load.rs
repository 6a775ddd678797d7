//! From TOML text and `--set` overrides to a validated [`Spec`].

use std::path::Path;

use super::{Spec, Stage};

/// Why a spec is refused: one line, naming the file or key and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("cannot read the spec {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The text is not TOML, or has an unknown, missing or mistyped key.
    #[error("{origin}: {message}")]
    Parse {
        /// The file and line.
        origin: String,
        /// What is wrong, on one line.
        message: String,
    },
    /// An override is not `key=value` or its key leads nowhere.
    #[error("--set {given}: {message}")]
    Override {
        /// The override as given.
        given: String,
        /// What is wrong.
        message: String,
    },
    /// A value makes no sense by itself or beside another one.
    #[error("{origin}: {key}: {message}")]
    Invalid {
        /// The file.
        origin: String,
        /// The dotted key.
        key: String,
        /// What is wrong and what to do.
        message: String,
    },
}

impl Spec {
    /// Reads a spec file, applies overrides (`stages.0.steps=20`, `run.seed=3`) and validates.
    /// A relative `file://` store is made absolute: other processes get this spec too, and their
    /// working directories may be others.
    ///
    /// # Errors
    /// A one-line message that names the file, line or key, and the remedy.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, SpecError> {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|error| SpecError::Read { path: origin.clone(), error })?;
        let mut spec = Self::parse(&origin, &text, overrides)?;
        spec.run.store = absolute(&spec.run.store).map_err(|error| SpecError::Invalid {
            origin,
            key: "run.store".into(),
            message: format!("`{}`: {error}", spec.run.store),
        })?;
        Ok(spec)
    }

    /// Another run out of this one, in the store `url`, after `change` and with overrides.
    ///
    /// # Errors
    /// As [`Spec::load`].
    pub fn derive(
        &self,
        url: &str,
        overrides: &[String],
        change: impl FnOnce(&mut Self),
    ) -> Result<Self, SpecError> {
        let origin = format!("out of run `{}`", self.run.name);
        let mut spec = self.clone();
        change(&mut spec);
        spec.run.store = absolute(url).map_err(|error| SpecError::Invalid {
            origin: origin.clone(),
            key: "run.store".into(),
            message: format!("`{url}`: {error}"),
        })?;
        Self::parse(&origin, &spec.to_toml(), overrides)
    }

    /// As [`Spec::load`], from text; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Spec::load`].
    pub fn parse(origin: &str, text: &str, overrides: &[String]) -> Result<Self, SpecError> {
        // Once as written, for errors with a line number; again only if there are overrides.
        let mut spec: Self =
            toml::from_str(text).map_err(|error| parse_error(origin, text, &error))?;
        if !overrides.is_empty() {
            let mut table = toml::Table::try_from(&spec).map_err(|error| SpecError::Parse {
                origin: origin.to_owned(),
                message: one_line(&error.to_string()),
            })?;
            for given in overrides {
                apply(&mut table, given)
                    .map_err(|message| SpecError::Override { given: given.clone(), message })?;
            }
            spec = table.try_into().map_err(|error: toml::de::Error| SpecError::Override {
                given: overrides.join(" --set "),
                message: one_line(error.message()),
            })?;
        }
        let invalid =
            |(key, message)| SpecError::Invalid { origin: origin.to_owned(), key, message };
        for (index, stage) in spec.stages.iter_mut().enumerate() {
            count_steps(index, stage).map_err(invalid)?;
        }
        super::validate::validate(&spec).map_err(invalid)?;
        Ok(spec)
    }
}

/// Turns a stage's tokens into steps.
fn count_steps(index: usize, stage: &mut Stage) -> Result<(), (String, String)> {
    let tokens = std::mem::take(&mut stage.tokens);
    if tokens == 0 {
        return Ok(());
    }
    if stage.steps > 0 {
        let reason = format!("there are steps = {} as well; leave one of the two out", stage.steps);
        return Err((format!("stages.{index}.tokens"), reason));
    }
    let counts =
        [u64::from(stage.slots), stage.slot_sequences as u64, stage.sequence_length as u64];
    let is_sane = counts.iter().all(|count| (1..=1 << 40).contains(count))
        && counts.iter().map(|count| u128::from(*count)).product::<u128>() < 1 << 40
        && stage
            .ramp
            .as_ref()
            .is_none_or(|ramp| (1..=stage.slots).contains(&ramp.slots) && ramp.steps <= 1 << 20);
    // What is wrong with it otherwise is told when the whole spec is looked at.
    stage.steps = if is_sane { stage.steps_for(tokens) } else { 1 };
    Ok(())
}

/// The URL with a relative directory counted from the working directory.
fn absolute(url: &str) -> std::io::Result<String> {
    match url.strip_prefix("file://") {
        Some(path) if !path.is_empty() => {
            Ok(format!("file://{}", std::path::absolute(path)?.display()))
        }
        _ => Ok(url.to_owned()),
    }
}

fn parse_error(origin: &str, text: &str, error: &toml::de::Error) -> SpecError {
    let line =
        error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    SpecError::Parse {
        origin: line.map_or_else(|| origin.to_owned(), |line| format!("{origin}:{line}")),
        message: one_line(error.message()),
    }
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Replaces the value at a dotted key; numbers in the key index lists.
fn apply(table: &mut toml::Table, given: &str) -> Result<(), String> {
    let (key, value) = given.split_once('=').ok_or("expected key=value")?;
    let path: Vec<&str> = key.trim().split('.').collect();
    let mut root = toml::Value::Table(std::mem::take(table));
    let mut result = replace(&mut root, &path, parse_value(value.trim()));
    // A stage says one of the two; what is said last counts.
    if let (Ok(()), ["stages", stage, length @ ("steps" | "tokens")]) = (&result, &path[..]) {
        let other = if *length == "steps" { "tokens" } else { "steps" };
        result = replace(&mut root, &["stages", stage, other], toml::Value::Integer(0));
    }
    if let toml::Value::Table(filled) = root {
        *table = filled;
    }
    result
}

fn replace(place: &mut toml::Value, path: &[&str], value: toml::Value) -> Result<(), String> {
    let Some((part, rest)) = path.split_first() else {
        *place = value;
        return Ok(());
    };
    let inner = match place {
        toml::Value::Table(table) if rest.is_empty() => {
            table.insert((*part).to_owned(), value);
            return Ok(());
        }
        // One that may not be there is read as a table, or refused as a key that there is not.
        toml::Value::Table(table) => {
            Some(table.entry(*part).or_insert_with(|| toml::Value::Table(toml::Table::new())))
        }
        toml::Value::Array(items) => {
            part.parse::<usize>().ok().and_then(|index| items.get_mut(index))
        }
        _ => None,
    };
    replace(inner.ok_or_else(|| format!("there is no `{part}` in the spec"))?, rest, value)
}

/// A value as TOML would read it; anything that is no TOML value is a string.
fn parse_value(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("value = {text}"))
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()))
}
