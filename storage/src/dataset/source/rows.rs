//! Parquet: one document a row, the text in one column.
//!
//! Only that column is read, page by page, with as many rows at a time as a few MiB hold: a row group
//! may be larger than memory. A single page has to fit, which writers keep to a MiB or so, and is
//! looked at before it is unpacked: see [`super::pages`].

use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::{Encoding, Type as Physical};
use parquet::column::reader::{ColumnReader, get_column_reader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::SchemaDescriptor;

use super::blocks::Blocks;
use super::pages::{Counted, Pages, Rest, TooLarge};
use super::{LARGEST_RECORD, Raw, Sink};
use crate::error::one_line;
use crate::{Error, Result};

/// A page at most, as it lies in the file and unpacked.
pub(super) const LARGEST_PAGE: u64 = 256 << 20;
/// The description of a file's columns and row groups at most.
const LARGEST_FOOTER: usize = 256 << 20;
/// Text of the rows that are decoded at once, about.
const DECODE_BYTES: usize = 2 << 20;
const DECODE_ROWS: usize = 64;

/// Gives the text of each row, with its number; pages have `largest_page` bytes at most.
///
/// # Errors
/// When the file cannot be read, is damaged, has a larger page, or has no such column of strings.
pub(super) fn read(
    place: &str,
    blocks: Blocks,
    column: &str,
    largest_page: u64,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let malformed = |reason: String| Error::Malformed { place: place.to_owned(), reason };
    let damaged = |row: u64, error: ParquetError| Error::Malformed {
        place: format!("{place}:{row}"),
        reason: format!("{}; restore the file or leave it out", one_line(&error.to_string())),
    };
    let (size, blocks) = (blocks.size(), Arc::new(blocks));
    let chunks = Chunks(Arc::clone(&blocks));
    let file = caught(|| SerializedFileReader::new(chunks)).map_err(|error| damaged(0, error))?;
    let metadata = file.metadata();
    let rows = metadata.file_metadata().num_rows().max(1) as u64;
    let schema = metadata.file_metadata().schema_descr();
    let index = find(schema, column).map_err(malformed)?;
    let levels = schema.column(index).max_def_level();
    let mut row = 0;
    for (number, group) in metadata.row_groups().iter().enumerate() {
        let chunk = group.column(index);
        let pages = Pages::new(Arc::clone(&blocks), chunk.compression(), largest_page);
        let pages = caught(|| {
            SerializedPageReader::new(Arc::new(pages), chunk, group.num_rows() as usize, None)
        });
        let pages = pages.map_err(|error| damaged(row, error))?;
        let ColumnReader::ByteArrayColumnReader(mut reader) =
            get_column_reader(schema.column(index), Box::new(Counted::new(pages, levels)))
        else {
            return Err(malformed(format!("its column `{column}` holds no strings")));
        };
        let damaged = |row: u64, error: ParquetError| match &error {
            ParquetError::External(cause) if cause.is::<TooLarge>() => Error::Malformed {
                place: format!("{place}:{row} (row group {number})"),
                reason: cause.to_string(),
            },
            _ => damaged(row, error),
        };
        // Values that repeat the beginning of the one before are written out: one at a time.
        let repeats = chunk.encodings_mask().is_set(Encoding::DELTA_BYTE_ARRAY);
        let most_rows = if repeats { 1 } else { DECODE_ROWS };
        let mut wanted = 1;
        loop {
            let (mut defined, mut values) = (Vec::new(), Vec::new());
            // It is not used again when this fails.
            let read =
                caught(|| reader.read_records(wanted, Some(&mut defined), None, &mut values));
            let (records, _, _) = read.map_err(|error| damaged(row + 1, error))?;
            if records == 0 {
                break;
            }
            let text: usize = values.iter().map(parquet::data_type::ByteArray::len).sum();
            // The next rows may be longer than these were.
            wanted = (records * DECODE_BYTES / text.max(1)).clamp(1, (2 * wanted).min(most_rows));
            let mut values = values.iter();
            // A column that is required has no levels.
            let is_there = |index: usize| levels == 0 || defined.get(index) == Some(&levels);
            for is_there in (0..records).map(is_there) {
                row += 1;
                let value = if is_there { values.next() } else { None };
                let raw = value.map_or_else(
                    || Raw::Malformed(format!("its column `{column}` is null")),
                    |value| text_of(value.data()),
                );
                let bytes = value.map_or(0, parquet::data_type::ByteArray::len);
                let read = (size as f64 * (row as f64 / rows as f64).min(1.0)) as u64;
                sink.take(row, raw, bytes, read)?;
            }
        }
    }
    Ok(())
}

/// What the library reads. Some damage it does not see in time, and panics; that is an error like any
/// other, for the file is the user's.
fn caught<T>(read: impl FnOnce() -> ParquetResult<T>) -> ParquetResult<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(ParquetError::General("its pages contradict themselves (see above)".to_owned()))
    })
}

fn text_of(bytes: &[u8]) -> Raw {
    if bytes.len() > LARGEST_RECORD {
        return Raw::Malformed(format!("the text is longer than {} MiB", LARGEST_RECORD >> 20));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Raw::Text(text.to_owned()),
        Err(_) => Raw::Malformed("it is not UTF-8 text".to_owned()),
    }
}

/// Index of the column, which may lie in a group (`meta.text`) but not in a list.
fn find(schema: &SchemaDescriptor, column: &str) -> std::result::Result<usize, String> {
    let columns = schema.columns();
    let index = columns.iter().position(|described| described.path().string() == column);
    let Some(index) = index else {
        let names: Vec<String> =
            columns.iter().map(|described| format!("`{}`", described.path().string())).collect();
        return Err(format!(
            "it has no column `{column}`, only {}; say which one holds the text",
            one_line(&names.join(", "))
        ));
    };
    let described = &columns[index];
    if described.physical_type() != Physical::BYTE_ARRAY || described.max_rep_level() > 0 {
        return Err(format!(
            "its column `{column}` holds no strings; say which one holds the text"
        ));
    }
    Ok(index)
}

/// What the reader of the file's own description reads from.
struct Chunks(Arc<Blocks>);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.size()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Rest>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(Rest::new(&self.0, start))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        if length > LARGEST_FOOTER {
            return Err(ParquetError::General(format!(
                "its description takes {} MiB, more than {} MiB; write it in several files",
                length >> 20,
                LARGEST_FOOTER >> 20
            )));
        }
        let bytes = self.0.get(start, length)?;
        match bytes.len() == length {
            true => Ok(bytes),
            false => Err(ParquetError::EOF("it ends early".to_owned())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use parquet::basic::{Compression, GzipLevel, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::{WriterProperties, WriterVersion};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::super::blocks::Place;
    use super::super::{Batch, Record};
    use super::*;

    /// A file with a string column `body` that may be null, in row groups.
    fn write(path: &std::path::Path, groups: &[Vec<Option<String>>], compression: Compression) {
        let schema = "message m { required int64 id; optional binary body (UTF8); required binary name (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder()
            .set_compression(compression)
            .set_dictionary_enabled(false)
            .set_data_page_size_limit(4096)
            .set_write_batch_size(16)
            .build();
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let ids: Vec<i64> = (0..rows.len() as i64).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<parquet::data_type::Int64Type>().write_batch(&ids, None, None).unwrap();
            column.close().unwrap();
            let values: Vec<ByteArray> =
                rows.iter().flatten().map(|text| ByteArray::from(text.as_str())).collect();
            let defined: Vec<i16> = rows.iter().map(|text| i16::from(text.is_some())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&defined), None).unwrap();
            column.close().unwrap();
            let names: Vec<ByteArray> =
                ids.iter().map(|id| ByteArray::from(format!("name {id}").as_str())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&names, None, None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn records(path: &std::path::Path, column: &str) -> Result<Vec<Record>> {
        limited(path, column, LARGEST_PAGE)
    }

    /// The records, when a page may have so many bytes.
    fn limited(path: &std::path::Path, column: &str, largest_page: u64) -> Result<Vec<Record>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let size = std::fs::metadata(path).unwrap().len();
        let blocks = Blocks::new(Place::File(path.to_owned()), size, runtime.handle().clone());
        let mut records = Vec::new();
        let mut give = |batch: Batch| {
            assert!(batch.read <= size);
            records.extend(batch.records);
            Ok(())
        };
        let mut sink = Sink::new(0, &mut give);
        let result = read("f.parquet", blocks, column, largest_page, &mut sink);
        result.and_then(|()| sink.flush()).map(|()| records)
    }

    #[test]
    fn every_row_of_every_group_comes_in_order_whatever_the_compression() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.parquet");
        let text = |i: usize| (i % 10 != 3).then(|| format!("row {i} {}", "é".repeat(i % 300)));
        let groups = [(0..3000).map(text).collect(), vec![], (3000..3500).map(text).collect()];
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(ZstdLevel::default()),
            Compression::GZIP(Default::default()),
            Compression::LZ4_RAW,
        ] {
            write(&path, &groups, compression);
            let names = records(&path, "name").unwrap();
            assert_eq!((names.len(), &names[3001].raw), (3500, &Raw::Text("name 1".into())));
            let records = records(&path, "body").unwrap();
            assert_eq!(records.len(), 3500);
            for (i, record) in records.into_iter().enumerate() {
                assert_eq!(record.at, i as u64 + 1);
                let expected = text(i)
                    .map_or_else(|| Raw::Malformed("its column `body` is null".into()), Raw::Text);
                assert_eq!(record.raw, expected, "{compression:?}");
            }
        }
    }

    /// A file of the required string column `text`, of one page without a dictionary in each group.
    fn write_pages(
        path: &std::path::Path,
        groups: &[Vec<String>],
        compression: Compression,
        version: WriterVersion,
    ) {
        let schema = "message m { required binary text (UTF8); }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder()
            .set_writer_version(version)
            .set_compression(compression)
            .set_dictionary_enabled(false)
            .set_column_encoding("text".into(), Encoding::PLAIN)
            .build();
        let file = std::fs::File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        for texts in groups {
            let mut group = writer.next_row_group().unwrap();
            let values: Vec<ByteArray> =
                texts.iter().map(|text| ByteArray::from(text.as_str())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    fn codecs() -> [Compression; 5] {
        [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(ZstdLevel::default()),
            Compression::GZIP(GzipLevel::default()),
            Compression::LZ4_RAW,
        ]
    }

    #[test]
    fn a_page_that_unpacks_to_more_than_the_limit_is_refused_with_file_row_group_and_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.parquet");
        // The second group's page packs to a few hundred bytes.
        let groups = [vec!["short".to_owned(); 5], vec!["x".repeat(50_000); 2]];
        let page = 2 * (50_000 + 4);
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            for codec in codecs() {
                write_pages(&path, &groups, codec, version);
                assert_eq!(limited(&path, "text", page).unwrap().len(), 7, "{codec:?}");
                let error = limited(&path, "text", page - 1).unwrap_err().to_string();
                for part in [
                    "f.parquet:6 (row group 1)",
                    "100008 bytes unpacked",
                    "100007",
                    "smaller pages",
                ] {
                    assert!(error.contains(part), "`{part}` is missing in: {error}");
                }
                assert!(!error.contains("restore"), "{error}");
            }
        }
    }

    #[test]
    fn a_page_whose_header_lies_about_its_size_is_not_unpacked_to_more_than_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.parquet");
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            for codec in codecs().into_iter().skip(1) {
                write_pages(&path, &[vec!["x".repeat(3_000_000)]], codec, version);
                let mut bytes = std::fs::read(&path).unwrap();
                // Type and size of the first page: the size becomes 1,000, in as many bytes.
                assert_eq!((&bytes[..4], bytes[4], bytes[6]), (&b"PAR1"[..], 0x15, 0x15));
                assert!(bytes[7..10].iter().all(|byte| byte & 0x80 != 0) && bytes[10] & 0x80 == 0);
                bytes[7..11].copy_from_slice(&[0xd0, 0x8f, 0x80, 0x00]);
                std::fs::write(&path, &bytes).unwrap();
                let error = limited(&path, "text", 1 << 20).unwrap_err().to_string();
                assert!(error.contains("f.parquet:1"), "{codec:?}: {error}");
                // Where unpacking heeds no size, it is not begun.
                if matches!(codec, Compression::GZIP(_)) {
                    assert!(error.contains("1048577 bytes unpacked, or more"), "{error}");
                }
            }
        }
    }

    #[test]
    fn values_that_repeat_those_before_are_read_one_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.parquet");
        let schema =
            Arc::new(parse_message_type("message m { required binary text (UTF8); }").unwrap());
        let properties = WriterProperties::builder()
            .set_dictionary_enabled(false)
            .set_column_encoding("text".into(), Encoding::DELTA_BYTE_ARRAY)
            .build();
        let file = std::fs::File::create(&path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        let texts: Vec<String> = (0..300).map(|i| "x".repeat(10_000 + i / 7)).collect();
        let mut group = writer.next_row_group().unwrap();
        let values: Vec<ByteArray> = texts.iter().map(|text| text.as_str().into()).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let read = limited(&path, "text", 100_000).unwrap();
        let read = read.into_iter().map(|record| record.raw);
        assert!(read.eq(texts.into_iter().map(Raw::Text)));
    }

    #[test]
    fn a_file_with_any_byte_wrong_is_read_or_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.parquet");
        let texts = vec!["one".to_owned(), "two".to_owned(), "three".to_owned()];
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            write_pages(&path, std::slice::from_ref(&texts), Compression::UNCOMPRESSED, version);
            let file = std::fs::read(&path).unwrap();
            for (place, value) in (0..file.len()).flat_map(|at| [(at, 0x7f), (at, 0xff)]) {
                let mut damaged = file.clone();
                damaged[place] = value;
                std::fs::write(&path, &damaged).unwrap();
                let _ = limited(&path, "text", 1 << 20);
            }
        }
    }

    #[test]
    fn another_column_and_a_damaged_file_are_named_with_a_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f.parquet");
        write(&path, &[vec![Some("x".repeat(9000)); 100]], Compression::SNAPPY);
        let said = |column: &str| records(&path, column).unwrap_err().to_string();
        let missing = said("text");
        assert!(
            missing.contains("f.parquet") && missing.contains("only `id`, `body`, `name`"),
            "{missing}"
        );
        assert!(said("id").contains("holds no strings"));
        let mut bytes = std::fs::read(&path).unwrap();
        let half = bytes.len() / 2;
        bytes[1000..half].fill(0xff);
        std::fs::write(&path, &bytes).unwrap();
        assert!(said("body").contains("f.parquet:"), "{}", said("body"));
        std::fs::write(&path, &bytes[..half]).unwrap();
        assert!(said("body").contains("restore the file"), "{}", said("body"));
    }
}
