//! JSON Lines: one object a line, the text in one of its fields.

use std::fmt;
use std::io::{self, BufRead, Read};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::{LARGEST_RECORD, Raw};
use crate::error::one_line;
use crate::{Error, Result};

/// Gives each line that is not blank, with its number and size.
///
/// # Errors
/// When the file cannot be read or unpacked; the line is named.
pub(super) fn read(
    place: &str,
    reader: &mut dyn BufRead,
    mut take: impl FnMut(u64, Raw, usize) -> Result<()>,
) -> Result<()> {
    let mut number = 0;
    loop {
        number += 1;
        let failed = |error: io::Error| Error::Malformed {
            place: format!("{place}:{number}"),
            reason: format!("{}; restore the file or leave it out", one_line(&error.to_string())),
        };
        let mut line = Vec::new();
        let limit = LARGEST_RECORD as u64 + 1;
        let bytes = (&mut *reader).take(limit).read_until(b'\n', &mut line).map_err(failed)?;
        if bytes == 0 {
            return Ok(());
        }
        let is_whole = line.last() == Some(&b'\n');
        if bytes as u64 == limit && !is_whole {
            skip_line(reader).map_err(failed)?;
            let mib = LARGEST_RECORD >> 20;
            take(number, Raw::Malformed(format!("the line is longer than {mib} MiB")), 0)?;
        } else if !line.trim_ascii().is_empty() {
            take(number, Raw::Line(line), bytes)?;
        }
    }
}

fn skip_line(reader: &mut dyn BufRead) -> io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        let (used, done) = match buffer.iter().position(|&byte| byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (buffer.len(), false),
        };
        reader.consume(used);
        if done {
            return Ok(());
        }
    }
}

/// The text of a line; the error says what is wrong with it.
pub(super) fn text(line: &[u8], field: &str) -> std::result::Result<String, String> {
    let mut json = serde_json::Deserializer::from_slice(line);
    let found = Field(field).deserialize(&mut json).and_then(|found| json.end().map(|()| found));
    match found {
        Ok(Some(Value::String(text))) => Ok(text),
        Ok(Some(value)) => {
            let kind = match value {
                Value::Null => "null",
                Value::Bool(_) => "a truth value",
                Value::Number(_) => "a number",
                Value::Array(_) => "a list",
                _ => "an object",
            };
            Err(format!("its field `{field}` is {kind}, not a string"))
        }
        Ok(None) => Err(format!("it has no field `{field}`")),
        Err(error) => Err(format!("it is no JSON object: {}", one_line(&error.to_string()))),
    }
}

/// Takes one field out of an object, without making anything of the others.
struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        json: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
            if key == self.0 {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_taken_from_its_field_and_everything_else_is_said() {
        assert_eq!(
            text(br#"{"id": 1, "text": "a\nb \u00e4", "x": [{}]}"#, "text"),
            Ok("a\nb ä".into())
        );
        assert_eq!(text(br#"{"body": ""}"#, "body"), Ok(String::new()));
        for (line, words) in [
            (&br#"{"body": "x"}"#[..], "no field `text`"),
            (br#"{"text": null}"#, "is null, not a string"),
            (br#"{"text": {"text": "x"}}"#, "is an object"),
            (br#"{"text": "x""#, "no JSON object: EOF"),
            (br#"{"text": "x"} {"text": "y"}"#, "trailing characters"),
            (br#"["text", "x"]"#, "no JSON object: invalid type: sequence"),
            (b"text", "no JSON object"),
            (b"{\"text\": \"caf\xe9\"}", "no JSON object"),
        ] {
            let reason = text(line, "text").unwrap_err();
            assert!(reason.contains(words) && !reason.contains('\n'), "{reason}");
        }
    }

    #[test]
    fn lines_are_numbered_blank_ones_passed_over_and_endless_ones_malformed() {
        let long = vec![b'x'; LARGEST_RECORD + 10];
        let text = [&b"{}\n\n  \n"[..], &long, b"\n{\"a\":1}\nlast"].concat();
        let mut taken = Vec::new();
        read("f.jsonl", &mut io::Cursor::new(text), |at, raw, bytes| {
            taken.push((at, raw, bytes));
            Ok(())
        })
        .unwrap();
        assert_eq!(taken.len(), 4);
        assert_eq!(taken[0], (1, Raw::Line(b"{}\n".to_vec()), 3));
        assert_eq!(taken[1], (4, Raw::Malformed("the line is longer than 64 MiB".into()), 0));
        assert_eq!(taken[2], (5, Raw::Line(b"{\"a\":1}\n".to_vec()), 8));
        assert_eq!(taken[3], (6, Raw::Line(b"last".to_vec()), 4));
    }

    #[test]
    fn a_file_that_breaks_off_is_named_with_the_line() {
        struct Broken(usize);
        impl Read for Broken {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0 += 1;
                match self.0 {
                    1 => io::Cursor::new(b"{}\n{}\n{").read(buffer),
                    _ => Err(io::Error::other("corrupt deflate stream")),
                }
            }
        }
        let mut reader = io::BufReader::new(Broken(0));
        let error = read("f.jsonl.gz", &mut reader, |_, _, _| Ok(())).unwrap_err().to_string();
        assert!(error.contains("f.jsonl.gz:3") && error.contains("corrupt deflate"), "{error}");
    }
}
