//! Plain text files.
//!
//! A file from a directory is a document; one that was named itself is cut into documents of at most
//! 64 KiB, so that one long file also has a training and a validation part. Files of more than 1 MiB
//! are cut into documents of at most that.

use std::io::{BufRead, Read};

use super::Raw;
use super::sample::{LARGEST_FILE, LARGEST_PIECE, cut};
use crate::error::one_line;
use crate::{Error, Result};

/// Gives each document of a file, with its number and size. What is no text ends the file.
///
/// # Errors
/// When the file cannot be read or unpacked.
pub(super) fn read(
    place: &str,
    reader: &mut dyn BufRead,
    named: bool,
    mut take: impl FnMut(u64, Raw, usize) -> Result<()>,
) -> Result<()> {
    let largest = if named { LARGEST_PIECE } else { LARGEST_FILE as usize };
    let (mut number, mut buffer) = (0, Vec::new());
    loop {
        number += 1;
        // One byte more tells whether the file goes on.
        let missing = (largest + 1 - buffer.len()) as u64;
        let read = (&mut *reader).take(missing).read_to_end(&mut buffer);
        read.map_err(|error| Error::Malformed {
            place: place.to_owned(),
            reason: format!("{}; restore the file or leave it out", one_line(&error.to_string())),
        })?;
        if buffer.is_empty() {
            return Ok(());
        }
        let is_rest = buffer.len() <= largest;
        let text = match std::str::from_utf8(&buffer) {
            Ok(text) => Ok(text),
            // A character may go on behind the buffer.
            Err(error) if !is_rest && error.error_len().is_none() => {
                Ok(std::str::from_utf8(&buffer[..error.valid_up_to()]).unwrap_or_default())
            }
            Err(_) => Err("it is not UTF-8 text"),
        };
        let text = text.and_then(|text| match text.contains('\0') {
            true => Err("it is not text: it holds a NUL"),
            false => Ok(text),
        });
        let text = match text {
            Ok(text) if is_rest => text,
            Ok(text) => &text[..cut(text, largest)],
            Err(reason) => return take(number, Raw::Malformed(reason.to_owned()), 0),
        };
        let (taken, blank) = (text.len(), text.trim().is_empty());
        let text = if blank { String::new() } else { text.to_owned() };
        take(number, Raw::Text(text), taken)?;
        buffer.drain(..taken);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn documents(text: &[u8], named: bool) -> Vec<Raw> {
        let mut taken = Vec::new();
        read("book.txt", &mut std::io::Cursor::new(text), named, |at, raw, _| {
            taken.push(raw);
            assert_eq!(at, taken.len() as u64);
            Ok(())
        })
        .unwrap();
        taken
    }

    fn texts(text: &str, named: bool) -> Vec<String> {
        let text_of = |raw| match raw {
            Raw::Text(text) => text,
            other => panic!("{other:?}"),
        };
        documents(text.as_bytes(), named).into_iter().map(text_of).collect()
    }

    #[test]
    fn a_file_is_a_document_and_a_long_or_named_one_is_cut_at_blank_lines() {
        let book: String = (0..100_000).map(|i| format!("Line ä {i}.\n\n")).collect();
        assert_eq!(texts(&book[..100_000], false), [&book[..100_000]]);
        for (named, largest) in [(true, LARGEST_PIECE), (false, 1 << 20)] {
            let texts = texts(&book, named);
            assert!(texts.len() > 1);
            assert_eq!(texts.concat(), book);
            assert!(texts.iter().all(|text| text.len() <= largest && text.ends_with("\n\n")));
        }
        let dense = "ä".repeat(1 << 20);
        assert_eq!(texts(&dense, false).concat(), dense);
    }

    #[test]
    fn what_is_no_text_is_malformed_wherever_it_begins() {
        assert_eq!(documents(b"caf\xe9", false), [Raw::Malformed("it is not UTF-8 text".into())]);
        let late = [vec![b'a'; 2 << 20], b"\0".to_vec()].concat();
        let taken = documents(&late, false);
        assert!(matches!(taken.last(), Some(Raw::Malformed(reason)) if reason.contains("NUL")));
        assert_eq!(documents(b" \n", false), [Raw::Text(String::new())]);
    }
}
