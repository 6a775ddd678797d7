//! Parquet: one document a row, the text in one column.
//!
//! Only that column is read, page by page, with as many rows at a time as a few MiB hold: a row group
//! may be larger than memory. A single page has to fit, which writers keep to a MiB or so.

use std::io::{self, BufReader, Read};
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::Type as Physical;
use parquet::column::reader::{ColumnReader, get_column_reader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use super::blocks::Blocks;
use super::{LARGEST_RECORD, Raw, Sink};
use crate::error::one_line;
use crate::{Error, Result};

/// A page at most, as it lies in the file.
const LARGEST_PAGE: usize = 256 << 20;
/// Text of the rows that are decoded at once, about.
const DECODE_BYTES: usize = 2 << 20;
const DECODE_ROWS: usize = 64;

/// Gives the text of each row, with its number.
///
/// # Errors
/// When the file cannot be read, is damaged, or has no such column of strings.
pub(super) fn read(place: &str, blocks: Blocks, column: &str, sink: &mut Sink<'_>) -> Result<()> {
    let malformed = |reason: String| Error::Malformed { place: place.to_owned(), reason };
    let damaged = |row: u64, error: ParquetError| Error::Malformed {
        place: format!("{place}:{row}"),
        reason: format!("{}; restore the file or leave it out", one_line(&error.to_string())),
    };
    let size = blocks.size();
    let file = SerializedFileReader::new(Chunks(Arc::new(blocks))).map_err(|e| damaged(0, e))?;
    let metadata = file.metadata();
    let rows = metadata.file_metadata().num_rows().max(1) as u64;
    let schema = metadata.file_metadata().schema_descr();
    let index = find(schema, column).map_err(malformed)?;
    let levels = schema.column(index).max_def_level();
    let mut row = 0;
    for group in 0..metadata.num_row_groups() {
        let group = file.get_row_group(group).map_err(|error| damaged(row, error))?;
        let pages = group.get_column_page_reader(index).map_err(|error| damaged(row, error))?;
        let ColumnReader::ByteArrayColumnReader(mut reader) =
            get_column_reader(schema.column(index), pages)
        else {
            return Err(malformed(format!("its column `{column}` holds no strings")));
        };
        let mut wanted = 1;
        loop {
            let (mut defined, mut values) = (Vec::new(), Vec::new());
            let (records, _, _) = reader
                .read_records(wanted, Some(&mut defined), None, &mut values)
                .map_err(|error| damaged(row + 1, error))?;
            if records == 0 {
                break;
            }
            let text: usize = values.iter().map(parquet::data_type::ByteArray::len).sum();
            // The next rows may be longer than these were.
            wanted = (records * DECODE_BYTES / text.max(1)).clamp(1, (2 * wanted).min(DECODE_ROWS));
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

/// What the Parquet reader reads from.
struct Chunks(Arc<Blocks>);

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.0.size()
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Rest>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        // Headers of pages are small.
        Ok(BufReader::with_capacity(512, Rest { blocks: Arc::clone(&self.0), position: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        if length > LARGEST_PAGE {
            return Err(ParquetError::General(format!(
                "it has a page of {} MiB, more than {} MiB; write it with smaller pages",
                length >> 20,
                LARGEST_PAGE >> 20
            )));
        }
        let bytes = self.0.get(start, length)?;
        match bytes.len() == length {
            true => Ok(bytes),
            false => Err(ParquetError::EOF("it ends early".to_owned())),
        }
    }
}

/// The file from a position on.
struct Rest {
    blocks: Arc<Blocks>,
    position: u64,
}

impl Read for Rest {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.blocks.get(self.position, buffer.len())?;
        self.position += bytes.len() as u64;
        (&bytes[..]).read_exact(&mut buffer[..bytes.len()])?;
        Ok(bytes.len())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
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
        let result = read("f.parquet", blocks, column, &mut sink).and_then(|()| sink.flush());
        result.map(|()| records)
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
