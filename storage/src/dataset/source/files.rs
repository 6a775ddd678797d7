//! JSON Lines, Parquet and plain text, in files and objects, taken whole and in their order.

use std::cell::Cell;
use std::io::{BufRead, BufReader};

use flate2::bufread::MultiGzDecoder;
use looptrain_proto::Digest;
use looptrain_proto::spec::{self, Format};
use tokio::runtime::Handle;

use super::blocks::{Blocks, Stream};
use super::find::{Found, Packing, find};
use super::{Document, Raw, Record, Sink, Source, is_held, lines, rows, texts};
use crate::error::one_line;
use crate::{Error, Result};

/// Buffers between the steps of unpacking.
const BUFFER: usize = 256 << 10;
/// Logarithm of the largest window that zstd has (`zstd --long=31`). Of the memory that a window asks
/// for, no more is taken than there is text to fill it.
const ZSTD_WINDOW: u32 = 31;

/// The files that paths and URLs name.
pub(in super::super) struct Files {
    found: Vec<Found>,
    field: String,
    /// Share of the texts that is held out.
    held: f64,
    runtime: Handle,
}

impl Files {
    /// Looks for the files; `runtime` is what stores are read by.
    ///
    /// # Errors
    /// A sentence for the person who wrote the paths.
    pub(in super::super) fn find(
        source: &spec::Source,
        runtime: Handle,
    ) -> std::result::Result<Self, String> {
        let found = find(source, &runtime)?;
        let (field, held) = (source.field.clone(), source.validation_fraction);
        Ok(Self { found, field, held, runtime })
    }

    /// Name and size of each file.
    pub(in super::super) fn list(&self) -> impl Iterator<Item = (&str, u64)> {
        self.found.iter().map(|found| (found.url.as_str(), found.bytes))
    }
}

impl Source for Files {
    fn files(&self) -> usize {
        self.found.len()
    }

    fn bytes(&self, file: usize) -> u64 {
        self.found[file].bytes
    }

    fn digest(&self) -> Digest {
        let state = |found: &Found| {
            let (format, packing) = (found.format, found.packing);
            (found.url.clone(), found.bytes, found.changed, format, packing, found.named)
        };
        let states: Vec<_> = self.found.iter().map(state).collect();
        let text = serde_json::to_vec(&states).expect("names and numbers have a JSON form");
        Digest::of(&text)
    }

    fn place(&self, file: usize) -> String {
        self.found[file].url.clone()
    }

    fn read(&self, file: usize, _: u64, sink: &mut Sink<'_>) -> Result<()> {
        let found = &self.found[file];
        if found.bytes == 0 {
            return Ok(());
        }
        let blocks = Blocks::new(found.place.clone(), found.bytes, self.runtime.clone());
        if found.format == Format::Parquet {
            return rows::read(&found.url, blocks, &self.field, rows::LARGEST_PAGE, sink);
        }
        let position = Cell::new(0);
        let stream = BufReader::with_capacity(BUFFER, Stream::new(&blocks, &position));
        let failed = |error: std::io::Error| Error::Malformed {
            place: found.url.clone(),
            reason: one_line(&error.to_string()),
        };
        let mut reader: Box<dyn BufRead + '_> = match found.packing {
            Packing::Plain => Box::new(stream),
            Packing::Gzip => {
                Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(stream)))
            }
            Packing::Zstd => {
                let unpacked = zstd::stream::read::Decoder::with_buffer(stream);
                let mut unpacked = unpacked.map_err(failed)?;
                unpacked.window_log_max(ZSTD_WINDOW).map_err(failed)?;
                Box::new(BufReader::with_capacity(BUFFER, unpacked))
            }
        };
        let take = |at, raw, bytes| sink.take(at, raw, bytes, position.get());
        match found.format {
            Format::Jsonl => lines::read(&found.url, &mut *reader, take),
            _ => texts::read(&found.url, &mut *reader, found.named, take),
        }
    }

    fn document(&self, record: Record) -> Result<Document> {
        let text = match record.raw {
            Raw::Text(text) => Ok(text),
            Raw::Line(line) => lines::text(&line, &self.field),
            Raw::Malformed(reason) => Err(reason),
            Raw::Number => Err("it has a number and no text".to_owned()),
        };
        Ok(match text {
            Ok(text) if text.is_empty() => Document::Empty,
            Ok(text) => Document::Text { held: is_held(&text, self.held), text },
            Err(reason) => Document::Malformed(reason),
        })
    }
}
