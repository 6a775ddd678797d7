//! `docs/spec.md` and `docs/spec.schema.json`, written from the types of the spec: their fields, doc
//! comments, defaults and bounds. The bounds are held against `validate.rs` here, so that the page says
//! what a spec is checked by. Only tests know of it: nothing of this is in the product.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use serde::de::{Deserialize, Deserializer, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

use super::*;

/// A key that is optional, but has no value of its own then.
pub(super) fn no_default(schema: &mut Schema) {
    schema.remove("default");
}

/// A table of the spec on the page.
struct Section {
    /// As it is written in a spec.
    title: &'static str,
    /// Its key in [`SMALL`], as `--set` takes it.
    path: &'static str,
    /// The type, as the schema calls it.
    name: &'static str,
    /// Its keys in the order of the type.
    keys: &'static [&'static str],
}

fn sections() -> Vec<Section> {
    fn section<T: for<'de> Deserialize<'de>>(title: &'static str, path: &'static str) -> Section {
        let (name, keys) = fields::<T>();
        Section { title, path, name, keys }
    }
    vec![
        section::<Run>("[run]", "run"),
        section::<Cluster>("[cluster]", "cluster"),
        section::<Compute>("[compute]", "compute"),
        section::<Model>("[model]", "model"),
        section::<Initial>("[initial]", "initial"),
        section::<Branch>("[branch]", "branch"),
        section::<Optimizer>("[optimizer]", "optimizer"),
        section::<Spikes>("[optimizer.spikes]", "optimizer.spikes"),
        section::<Dataset>("[[datasets]]", "datasets.0"),
        section::<Source>("[datasets.source]", "datasets.0.source"),
        section::<Stage>("[[stages]]", "stages.0"),
        section::<Ramp>("[stages.ramp]", "stages.0.ramp"),
        section::<LearningRate>("[stages.learning_rate]", "stages.0.learning_rate"),
        section::<MixturePart>("[[stages.mixture]]", "stages.0.mixture.0"),
        section::<Checkpoint>("[checkpoint]", "checkpoint"),
        section::<Evaluation>("[evaluation]", "evaluation"),
        section::<Sample>("[sample]", "sample"),
        section::<Telemetry>("[telemetry]", "telemetry"),
    ]
}

/// A spec with every table but `[branch]` and only such keys as must be there.
const SMALL: &str = r#"
    [run]
    name = "small"
    store = "memory://"
    [model]
    hidden_size = 16
    num_hidden_layers = 1
    num_attention_heads = 2
    intermediate_size = 24
    vocab_size = 4096
    [initial]
    model = "other"
    weights = "blake3:0000000000000000000000000000000000000000000000000000000000000000"
    [optimizer.spikes]
    [[datasets]]
    name = "text"
    [datasets.source]
    [[stages]]
    name = "only"
    steps = 4
    sequence_length = 8
    slots = 4
    ramp = { slots = 2, steps = 2 }
    slot_sequences = 2
    loops = 2
    entropy_weight = 0.05
    learning_rate = { peak = 1e-2 }
    mixture = [{ dataset = "text", weight = 1 }]
"#;

/// In place of `[initial]`, which does not go with it.
const BRANCH: &str = r#"
    [branch]
    run = "other"
    step = 2
    weights = "blake3:0000000000000000000000000000000000000000000000000000000000000000"
"#;

/// [`SMALL`] with the table of a key.
fn small(path: &str) -> String {
    if !path.starts_with("branch.") {
        return SMALL.to_owned();
    }
    let initial = SMALL.find("    [initial]").unwrap()..SMALL.find("    [optimizer").unwrap();
    SMALL.replace(&SMALL[initial], BRANCH)
}

/// What serde calls a struct, and its fields in their order, which a schema does not keep.
fn fields<T: for<'de> Deserialize<'de>>() -> (&'static str, &'static [&'static str]) {
    /// Learns what is asked for and has nothing to give.
    struct Probe<'a>(&'a mut (&'static str, &'static [&'static str]));

    impl<'de> Deserializer<'de> for Probe<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("nothing here"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            name: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = (name, fields);
            self.deserialize_any(visitor)
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
            option unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
            ignored_any
        }
    }

    let mut found = ("", &[][..]);
    let _ = T::deserialize(Probe(&mut found));
    found
}

/// The schema as editors take it: draft 7, and without null, which TOML has not.
fn schema() -> Schema {
    let no_null = RecursiveTransform(|schema: &mut Schema| {
        if let Some(Value::Array(types)) = schema.get_mut("type") {
            types.retain(|kind| kind != "null");
            if let [only] = &types[..] {
                let only = only.clone();
                schema.insert("type".into(), only);
            }
        }
        if let Some(Value::Array(choices)) = schema.get_mut("anyOf") {
            choices.retain(|choice| choice["type"] != "null");
            if let [only] = &choices[..] {
                let only = only.clone();
                schema.remove("anyOf");
                schema.insert("allOf".into(), vec![only].into());
            }
        }
        if schema.get("default").is_some_and(Value::is_null) {
            schema.remove("default");
        }
    });
    let mut schema = SchemaSettings::draft07().into_generator().into_root_schema_for::<Spec>();
    { no_null }.transform(&mut schema);
    schema.insert("title".into(), "Run spec of looptrain".into());
    schema
}

/// The properties of a type.
fn properties<'a>(schema: &'a Schema, name: &str) -> &'a Map<String, Value> {
    let pointer = format!("/definitions/{name}/properties");
    schema.pointer(&pointer).and_then(Value::as_object).unwrap_or_else(|| panic!("no {pointer}"))
}

/// The name of the type that a property refers to.
fn reference(property: &Value) -> Option<&str> {
    let place = property.get("$ref").or_else(|| property.pointer("/allOf/0/$ref"))?;
    place.as_str()?.strip_prefix("#/definitions/")
}

/// Values of an enumeration with their meanings.
fn values(definition: &Value) -> Option<Vec<(&str, String)>> {
    let choices = definition["oneOf"].as_array()?;
    choices.iter().map(|choice| Some((choice["const"].as_str()?, description(choice)))).collect()
}

fn description(of: &Value) -> String {
    let text = of["description"].as_str().unwrap_or_else(|| panic!("{of} has no doc comment"));
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What kind of value a key takes.
fn kind(schema: &Schema, property: &Value) -> &'static str {
    if let Some(name) = reference(property) {
        let definition = schema.pointer(&format!("/definitions/{name}")).unwrap();
        return if values(definition).is_some() { "choice" } else { "table" };
    }
    match (property["type"].as_str(), property["items"]["type"].as_str()) {
        (Some("string"), _) => "text",
        (Some("integer"), _) => "integer",
        (Some("number"), _) => "number",
        (Some("boolean"), _) => "true or false",
        (Some("array"), Some("string")) => "list of texts",
        (Some("array"), None) => "list of tables",
        other => panic!("no word for {other:?} of {property}"),
    }
}

/// A bound for people: large powers of two as such.
fn bound(value: &Value) -> String {
    match value.as_u64() {
        Some(count) if count > 4096 && count.is_power_of_two() => {
            format!("2^{}", count.trailing_zeros())
        }
        Some(count) => count.to_string(),
        None => value.as_f64().map(|number| number.to_string()).unwrap_or_default(),
    }
}

/// What a key takes: its values, bounds or form; nothing where any value of its kind will do.
fn allowed(schema: &Schema, property: &Value) -> String {
    if let Some(name) = reference(property) {
        let definition = schema.pointer(&format!("/definitions/{name}")).unwrap();
        let values = values(definition).unwrap_or_default();
        let names: Vec<String> = values.iter().map(|(name, _)| format!("`{name}`")).collect();
        return names.join(", ");
    }
    let mut words: Vec<String> = Vec::new();
    for (key, word) in [
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "and below"),
    ] {
        if let Some(value) = property.get(key) {
            words.push(format!("{word} {}", bound(value)));
        }
    }
    if property.get("minItems").is_some() || property.get("minLength").is_some() {
        words.push("not empty".into());
    }
    match property["pattern"].as_str() {
        Some("://") => words.push("a URL".into()),
        Some(pattern) if pattern.starts_with("^blake3:") => words.push("`blake3:HEX`".into()),
        Some(_) => words.push("a name".into()),
        None => {}
    }
    words.join(" ")
}

/// The default of a key as TOML.
fn default(schema: &Schema, section: &Section, key: &str, property: &Value) -> String {
    let required = schema.pointer(&format!("/definitions/{}/required", section.name));
    let required = required.and_then(Value::as_array).cloned().unwrap_or_default();
    if required.iter().any(|name| name == key) {
        return "required".into();
    }
    match property.get("default") {
        None => "none".into(),
        Some(value) => match value.as_f64().filter(|number| *number > 0.0 && *number < 1e-4) {
            Some(small) => format!("`{small:e}`"),
            None => format!("`{}`", toml::Value::try_from(value).unwrap()),
        },
    }
}

/// The spec as a page for people, in Markdown.
fn page() -> String {
    let schema = schema();
    let example = include_str!("../../../examples/tiny.toml");
    let mut page = format!("{INTRODUCTION}\n```toml\n{}```\n{RULES}", without_head(example));
    for section in sections() {
        let definition = schema.pointer(&format!("/definitions/{}", section.name)).unwrap();
        let _ = write!(page, "\n## {}\n\n{}\n\n", section.title, description(definition));
        page.push_str("| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n");
        let mut choices = String::new();
        for key in section.keys {
            let property = &properties(&schema, section.name)[*key];
            let _ = writeln!(
                page,
                "| `{key}` | {} | {} | {} | {} |",
                kind(&schema, property),
                default(&schema, &section, key, property),
                allowed(&schema, property),
                description(property).replace('|', "\\|"),
            );
            let definition = reference(property)
                .and_then(|name| schema.pointer(&format!("/definitions/{name}")));
            for (value, meaning) in definition.and_then(values).unwrap_or_default() {
                let _ = writeln!(choices, "- `{key} = \"{value}\"`: {meaning}");
            }
        }
        if !choices.is_empty() {
            let _ = write!(page, "\n{choices}");
        }
    }
    page
}

/// The text of an example without the comment it begins with.
fn without_head(example: &str) -> String {
    let lines = example.lines().skip_while(|line| line.starts_with('#') || line.is_empty());
    lines.map(|line| format!("{line}\n")).collect()
}

const INTRODUCTION: &str = "\
# Run spec

This page is written from the types in `proto/src/spec/mod.rs`; a test compares the two.

A run spec is one TOML file that says everything about a run. `looptrain train SPEC` and
`looptrain coordinator SPEC` take it; workers get it from the coordinator. Unknown keys are errors, and
so are values that make no sense by themselves or beside others: the message names the file, the line
or the key, and what to do. `looptrain train SPEC --dry-run` reads a spec and prints what it asks for.
This one is `examples/tiny.toml`:
";

const RULES: &str = "
## Other values for a start

`--set KEY=VALUE` puts a value in place of the file's and may be given many times; what is said last counts.
KEY is the dotted path of a key, with a number from 0 for an element of a list:

```sh
looptrain train examples/tiny.toml --set stages.0.learning_rate.peak=1e-3 --set run.name=slower --dry-run
```

VALUE is read as TOML would read it; what is no TOML value is a text and needs no quotes
(`--set run.store=s3://lab/tiny`). Keys and tables that the file does not have can be given too; what such a table must have,
as `[stages.ramp]` must have both of its keys, is given with it: `--set 'stages.0.ramp={slots=2,steps=100}'`. With `stages.N.steps` given, the file's `tokens` no longer count,
and the other way round.

## What may change between two starts

A run may be stopped and gone on with under a changed spec, but what decides its weights stays as it
was at the first start: `run.seed`, `[model]`, `initial.weights`, `[branch]`, `[optimizer]`, the names of
`[[datasets]]` and their contents, `[[stages]]`, `cluster.reduction` and `cluster.fraction_bits`. A start with others
is refused. `--fresh` begins anew, another `run.name` is another run; one that goes on from a checkpoint of this one
by another spec is a branch ([models.md](models.md#branch-off)). Everything else may change: workers, intervals,
memory, telemetry.

## In an editor

[spec.schema.json](spec.schema.json) is a JSON schema of the spec, with which an editor completes and checks
it. Editors with the TOML language server Taplo (in Visual Studio Code: Even Better TOML) take it from the
first line of a spec, which names it as seen from the spec:

```toml
#:schema ../docs/spec.schema.json
```

The schema has the types and bounds of the tables below; rules between keys are checked when the spec is
loaded.
";

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)
}

fn compare(name: &str, text: &str) {
    let path = docs(name);
    if std::env::var_os("LOOPTRAIN_WRITE_REFERENCE").is_some() {
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == text,
        "docs/{name} is not what the types of the spec say; run this test with \
         LOOPTRAIN_WRITE_REFERENCE=1 to write it"
    );
}

#[test]
fn the_reference_page_is_that_of_the_types() {
    compare("spec.md", &page());
}

#[test]
fn the_schema_for_editors_is_that_of_the_types() {
    compare("spec.schema.json", &format!("{:#}\n", schema().as_value()));
}

#[test]
fn every_table_is_on_the_page_with_every_key() {
    let schema = schema();
    let shown: Vec<&str> = sections().iter().map(|section| section.name).collect();
    let definitions = schema.pointer("/definitions").and_then(Value::as_object).unwrap();
    for (name, definition) in definitions {
        let is_shown = shown.contains(&name.as_str());
        assert_ne!(is_shown, values(definition).is_some(), "{name}");
    }
    for section in sections() {
        let keys: std::collections::BTreeSet<&str> = section.keys.iter().copied().collect();
        assert!(properties(&schema, section.name).keys().eq(keys), "{}", section.title);
    }
}

fn with(path: &str, value: &Value) -> Result<Spec, String> {
    let value = toml::Value::try_from(value).unwrap_or_else(|error| panic!("{path}: {error}"));
    let given = [format!("{path}={value}")];
    Spec::parse("small.toml", &small(path), &given).map_err(|error| error.to_string())
}

/// All keys with their dotted paths.
fn each(mut see: impl FnMut(String, &Value)) {
    let schema = schema();
    for section in sections() {
        for (key, property) in properties(&schema, section.name) {
            see(format!("{}.{key}", section.path), property);
        }
    }
}

#[test]
fn defaults_on_the_page_are_those_of_a_spec_that_says_nothing() {
    let mut seen = 0;
    each(|path, property| {
        let Some(value) = property.get("default") else { return };
        // A stage's mixture has a part here, so that there is one to look at.
        if path != "stages.0.mixture" {
            let plain = Spec::parse("small.toml", &small(&path), &[]).unwrap();
            assert_eq!(with(&path, value).as_ref(), Ok(&plain), "{path}");
            seen += 1;
        }
    });
    assert!(seen > 45, "{seen}");
}

#[test]
fn keys_and_tables_that_a_file_lacks_can_be_given() {
    let start = SMALL.find("    [initial]").unwrap()..SMALL.find("    [[datasets]]").unwrap();
    assert!(SMALL[start.clone()].contains("[optimizer.spikes]"));
    let text = SMALL.replace(&SMALL[start], "").replace("ramp = { slots = 2, steps = 2 }", "");
    let parse = |given: &str| Spec::parse("small.toml", &text, &[given.to_owned()]);
    for given in [
        "telemetry.trace_every_steps=7",
        "stages.0.rope_base=5e4",
        "stages.0.ramp={slots=2,steps=100}",
        "optimizer.spikes.action=stop",
    ] {
        assert_ne!(parse(given).unwrap(), parse("run.seed=0").unwrap(), "{given}");
    }
    let error = parse("stages.0.ramp.slots=2").unwrap_err().to_string();
    assert!(error.contains("missing field `steps`"), "{error}");
    let error = parse("stages.0.rampe.slots=2").unwrap_err().to_string();
    assert!(error.contains("unknown field `rampe`"), "{error}");
}

#[test]
fn bounds_on_the_page_are_those_that_a_spec_is_checked_by() {
    let mut seen = 0;
    each(|path, property| {
        let is_whole = property["type"] == "integer";
        let number = |key: &str| property.get(key).and_then(Value::as_f64);
        let value = |number: f64| match is_whole {
            true => Value::from(number as i64),
            false => Value::from(number),
        };
        // The next value beyond, or next to, a bound.
        let near = |number: f64, sign: f64| match is_whole {
            true => number + sign,
            false => number + sign * 1e-9 * number.abs().max(1.0),
        };
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (key, sign) in [("minimum", -1.0), ("maximum", 1.0)] {
            good.extend(number(key));
            bad.extend(number(key).map(|number| near(number, sign)));
        }
        for (key, sign) in [("exclusiveMinimum", 1.0), ("exclusiveMaximum", -1.0)] {
            good.extend(number(key).map(|number| near(number, sign)));
            bad.extend(number(key));
        }
        for number in bad {
            assert!(with(&path, &value(number)).is_err(), "{path} = {number} is taken");
            seen += 1;
        }
        // This one is also bounded by the slots of its stage.
        good.retain(|_| path != "stages.0.ramp.slots");
        for number in good {
            // Others may not go with it, but by itself it is in order.
            if let Err(error) = with(&path, &value(number)) {
                let complaint = format!("{path}: must be ");
                assert!(!error.contains(&complaint), "{path} = {number}: {error}");
            }
        }
        for (key, empty) in
            [("minItems", Value::from(Vec::<Value>::new())), ("minLength", "".into())]
        {
            if property.get(key).is_some() {
                assert!(with(&path, &empty).is_err(), "{path} may be empty");
                seen += 1;
            }
        }
        if property.get("pattern").is_some() {
            assert!(with(&path, &"of no form".into()).is_err(), "{path} takes anything");
            seen += 1;
        }
    });
    assert!(seen > 80, "{seen}");
}

/// What the schema has against a spec.
fn complaint(text: &str) -> Option<String> {
    let spec: toml::Table = text.parse().unwrap_or_else(|error| panic!("{error}"));
    let spec = serde_json::to_value(spec).unwrap();
    let (mut schemas, mut compiler) = (boon::Schemas::new(), boon::Compiler::new());
    compiler.add_resource("spec.json", schema().to_value()).unwrap();
    let index = compiler.compile("spec.json", &mut schemas).unwrap();
    schemas.validate(&spec, index).err().map(|error| error.to_string())
}

#[test]
fn the_schema_takes_every_example() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for folder in [examples.clone(), examples.join("mano")] {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "toml") {
                let text = std::fs::read_to_string(&path).unwrap();
                assert_eq!(complaint(&text), None, "{}", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen >= 8, "{seen}");
    assert_eq!(complaint(SMALL), None);
    assert_eq!(complaint(&small("branch.run")), None);
}

#[test]
fn the_schema_refuses_what_a_spec_may_not_have() {
    for (right, wrong) in [
        ("hidden_size = 16", "hidden_sizes = 16"),
        ("hidden_size = 16", ""),
        ("hidden_size = 16", "hidden_size = \"16\""),
        ("hidden_size = 16", "hidden_size = 0"),
        ("name = \"small\"", "name = \"../small\""),
        ("steps = 4", "steps = 4\ntokens = 256"),
        ("steps = 4", ""),
        ("[datasets.source]", "[datasets.source]\nformat = \"csv\""),
    ] {
        assert!(SMALL.contains(right));
        let text = SMALL.replacen(right, wrong, 1);
        assert!(complaint(&text).is_some(), "{right} -> {wrong}");
    }
}
