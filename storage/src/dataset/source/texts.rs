//! Plain text files.
//!
//! A file from a directory is a document; one that was named itself is cut into documents of at most
//! 64 KiB, so that one long file also has a training and a validation part. Files of more than 1 MiB
//! are cut into documents of at most that.
//!
//! A piece that is no text is malformed, and the file goes on behind it.

use std::io::{BufRead, Read};

use super::Raw;
use super::sample::{LARGEST_FILE, LARGEST_PIECE, cut};
use crate::error::one_line;
use crate::{Error, Result};

/// Gives each document of a file, with its number and size.
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
        let taken = if is_rest { buffer.len() } else { end(&buffer, largest) };
        match text(&buffer[..taken]) {
            Ok(text) => take(number, Raw::Text(text), taken)?,
            Err(reason) => take(number, Raw::Malformed(reason.to_owned()), 0)?,
        }
        buffer.drain(..taken);
    }
}

/// The text of a piece, without a character when it is blank; the error says why it is none.
fn text(piece: &[u8]) -> std::result::Result<String, &'static str> {
    let text = std::str::from_utf8(piece).map_err(|_| "it is not UTF-8 text")?;
    if text.contains('\0') {
        return Err("it is not text: it holds a NUL");
    }
    Ok(if text.trim().is_empty() { String::new() } else { text.to_owned() })
}

/// Where a piece ends in a buffer of one byte more, which tells that the file goes on.
fn end(buffer: &[u8], largest: usize) -> usize {
    match std::str::from_utf8(buffer) {
        Ok(text) => cut(text, largest),
        // A character may go on behind the buffer.
        Err(error) if error.error_len().is_none() => {
            let whole = std::str::from_utf8(&buffer[..error.valid_up_to()]);
            cut(whole.unwrap_or_default(), largest)
        }
        // Only the piece with the bad byte is to be malformed, and that may be the next one.
        Err(_) => cut_bytes(buffer, largest),
    }
}

/// As [`cut`], of bytes of which some are no text.
fn cut_bytes(bytes: &[u8], largest: usize) -> usize {
    let half = largest / 2;
    let window = &bytes[half..largest];
    let blank = window.windows(2).rposition(|pair| pair == b"\n\n").map(|at| at + 2);
    let line = || window.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1);
    let begins_character = |at: &usize| bytes[*at] & 0b1100_0000 != 0b1000_0000;
    blank.or_else(line).map_or_else(
        || (largest - 3..=largest).rfind(begins_character).unwrap_or(largest),
        |at| half + at,
    )
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

    #[test]
    fn a_bad_byte_costs_its_piece_and_no_other() {
        let book: String = (0..300_000).map(|i| format!("Line {i}.\n\n")).collect();
        let (early, late) = (book[1000..].find('L').unwrap() + 1000, book.rfind('L').unwrap());
        for named in [true, false] {
            let whole = texts(&book, named);
            assert!(whole.len() > 3);
            for (at, bad) in [(early, 0xe9), (book.len() / 2, 0), (late, 0xff)] {
                let mut bytes = book.clone().into_bytes();
                bytes[at] = bad;
                let (taken, mut begin, mut malformed) = (documents(&bytes, named), 0, 0);
                assert_eq!(taken.len(), whole.len());
                for (raw, text) in taken.into_iter().zip(&whole) {
                    match raw {
                        Raw::Text(taken) => assert_eq!(&taken, text),
                        raw => {
                            assert!(matches!(raw, Raw::Malformed(_)), "{raw:?}");
                            assert!((begin..begin + text.len()).contains(&at));
                            malformed += 1;
                        }
                    }
                    begin += text.len();
                }
                assert_eq!(malformed, 1, "a byte {bad} at {at}");
            }
        }
    }

    #[test]
    fn a_piece_before_a_bad_byte_and_characters_behind_it_stay_whole() {
        let malformed = || Raw::Malformed("it is not UTF-8 text".into());
        let first = format!("{}\n\n", "a".repeat(50_000));
        let second = [&b"b".repeat(15_000)[..], b"\xe9", &b"b".repeat(1000), b"\n\n"].concat();
        let third = "c".repeat(60_000);
        let file = [first.as_bytes(), &second, third.as_bytes()].concat();
        let rest = "c".repeat(second.len() + third.len() - LARGEST_PIECE);
        assert_eq!(documents(&file, true), [Raw::Text(first), malformed(), Raw::Text(rest)]);

        // Without a line's end the cut is between two characters, wherever these lie.
        for bad in 1..=4 {
            let file = [vec![0xff; bad], "\u{1f600}".repeat(50_000).into_bytes()].concat();
            let mut taken = documents(&file, true).into_iter();
            assert_eq!(taken.next(), Some(malformed()));
            let is_whole = |raw| matches!(raw, Raw::Text(text) if text.starts_with('\u{1f600}'));
            assert!(taken.len() > 1 && taken.all(is_whole));
        }
    }
}
