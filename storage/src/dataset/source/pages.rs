//! The pages of a Parquet column, looked at before they are unpacked: a page of a few kilobytes may
//! unpack to gigabytes, and the library makes room for whatever its header says. What the header says
//! is read here first; where unpacking does not keep to it (gzip, frames of LZ4), what comes out is
//! counted first unless it cannot be too much.

use std::io::{self, BufReader, Read};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use parquet::basic::{Compression, Encoding};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use super::blocks::Blocks;

/// What gzip makes of a byte at most, and LZ4.
const GZIP_EXPANDS: u64 = 1032;
const LZ4_EXPANDS: u64 = 255;
/// How a frame of LZ4 begins; other forms of it keep to a size.
const LZ4_FRAME: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];

/// Values of a page whose lengths are written as differences. The library makes room for as many as the page
/// says, and of differences that are all the same no byte is the proof; writers keep to thousands.
const MOST_VALUES: u64 = 2 << 20;

/// A page that is not unpacked because it is too large.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error(
    "a page of its text column has {bytes} bytes unpacked, or more, and the limit is {limit}; write \
     the file anew with smaller pages (data_page_size and dictionary_pagesize_limit in pyarrow, \
     parquet.page.size in Spark), or leave it out"
)]
pub(super) struct TooLarge {
    bytes: u64,
    limit: u64,
}

impl From<TooLarge> for ParquetError {
    fn from(page: TooLarge) -> Self {
        Self::External(Box::new(page))
    }
}

/// What the reader of one column's pages reads from.
pub(super) struct Pages {
    blocks: Arc<Blocks>,
    compression: Compression,
    /// Bytes of a page at most, as it lies in the file and unpacked.
    limit: u64,
    /// Where the reader began to read lately, the last place first: the header of a page, and perhaps
    /// the page itself.
    begun: Mutex<[u64; 2]>,
}

impl Pages {
    pub(super) fn new(blocks: Arc<Blocks>, compression: Compression, limit: u64) -> Self {
        Self { blocks, compression, limit, begun: Mutex::default() }
    }

    /// Refuses the page whose header lies at `header` and whose `length` bytes lie at `start`, when it
    /// unpacks to more than the limit.
    fn check(&self, header: u64, start: u64, length: usize) -> ParquetResult<Bytes> {
        let limit = self.limit;
        let fits = |bytes: u64| match bytes <= limit {
            true => Ok(()),
            false => Err(TooLarge { bytes, limit }),
        };
        fits(length as u64)?;
        let bytes = self.blocks.get(header, (start - header) as usize)?;
        let told = Told::of(&bytes).ok_or_else(|| {
            ParquetError::General("the header of a page does not begin with its sizes".to_owned())
        })?;
        fits(told.unpacked)?;
        let bytes = self.blocks.get(start, length)?;
        if bytes.len() < length {
            return Err(ParquetError::EOF("it ends early".to_owned()));
        }
        let packed = bytes.get(told.levels as usize..).unwrap_or_default();
        let at_most = |expands: u64| (packed.len() as u64).saturating_mul(expands);
        match self.compression {
            Compression::GZIP(_) if at_most(GZIP_EXPANDS) > limit => fits(counted(packed, limit))?,
            Compression::LZ4 if packed.starts_with(&LZ4_FRAME) => fits(at_most(LZ4_EXPANDS))?,
            _ => {}
        }
        Ok(bytes)
    }
}

/// Pages that are unpacked, of which those are refused whose values say that there are more of them than a
/// page may have.
pub(super) struct Counted<R> {
    pages: R,
    /// The highest definition level; pages have levels before their values unless it is 0.
    levels: i16,
}

impl<R> Counted<R> {
    pub(super) fn new(pages: R, levels: i16) -> Self {
        Self { pages, levels }
    }

    fn check(&self, page: &Page) -> ParquetResult<()> {
        let (buffer, encoding, start) = match page {
            Page::DataPage { buf, num_values, encoding, def_level_encoding, .. } => {
                let start = match (self.levels, def_level_encoding) {
                    (0, _) => Some(0),
                    // Of the deprecated encoding: as many bits as they take.
                    #[allow(deprecated)]
                    (levels, Encoding::BIT_PACKED) => {
                        let bits = u64::from(i16::BITS - levels.leading_zeros());
                        usize::try_from((u64::from(*num_values) * bits).div_ceil(8)).ok()
                    }
                    _ => buf.first_chunk().map(|length| u32::from_le_bytes(*length) as usize + 4),
                };
                (buf, encoding, start)
            }
            Page::DataPageV2 {
                buf, encoding, def_levels_byte_len, rep_levels_byte_len, ..
            } => {
                let start = u64::from(*def_levels_byte_len) + u64::from(*rep_levels_byte_len);
                (buf, encoding, usize::try_from(start).ok())
            }
            Page::DictionaryPage { .. } => return Ok(()),
        };
        // The library says what is wrong with levels beyond the end.
        let Some(values) = start.and_then(|start| buffer.get(start..)) else { return Ok(()) };
        let sequences = match encoding {
            Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
            Encoding::DELTA_BYTE_ARRAY => 2,
            _ => 0,
        };
        let mut rest = values;
        for _ in 0..sequences {
            let Some((count, behind)) = differences(rest) else { return Ok(()) };
            if count > MOST_VALUES {
                return Err(ParquetError::General(format!(
                    "a page of its text column says that it has {count} values, and the limit is {MOST_VALUES}"
                )));
            }
            rest = behind;
        }
        Ok(())
    }
}

impl<R: PageReader> Iterator for Counted<R> {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl<R: PageReader> PageReader for Counted<R> {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        let page = self.pages.get_next_page()?;
        page.iter().try_for_each(|page| self.check(page))?;
        Ok(page)
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.pages.skip_next_page()
    }
}

/// How many numbers a sequence of differences says that it has, and what comes after it; `None` when it
/// cannot be followed, or has too many to be. The format is Parquet's DELTA_BINARY_PACKED.
fn differences(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut rest = bytes;
    let (block, parts, count) = (vlq(&mut rest)?, vlq(&mut rest)?, vlq(&mut rest)?);
    let _first = vlq(&mut rest)?;
    if count > MOST_VALUES {
        return Some((count, rest));
    }
    let (parts, values) = (usize::try_from(parts).ok()?, block.checked_div(parts)?);
    let mut left = count.saturating_sub(1);
    while left > 0 && values > 0 {
        let _least = vlq(&mut rest)?;
        let (widths, packed) = rest.split_at_checked(parts)?;
        rest = packed;
        // The widths of parts without values mean nothing.
        for width in widths.iter().take(usize::try_from(left.div_ceil(values)).ok()?) {
            let bytes = u64::from(*width).checked_mul(values)? / 8;
            rest = rest.get(usize::try_from(bytes).ok()?..)?;
            left = left.saturating_sub(values);
        }
    }
    Some((count, rest))
}

/// A number in seven bits a byte.
fn vlq(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Bytes that gzip makes of these, counted to one more than the limit.
fn counted(packed: &[u8], limit: u64) -> u64 {
    let mut unpacked = MultiGzDecoder::new(packed).take(limit + 1);
    // What is damaged ends early, and the library says so.
    io::copy(&mut unpacked, &mut io::sink()).unwrap_or_default()
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.blocks.size()
    }
}

impl ChunkReader for Pages {
    type T = BufReader<Rest>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if begun[0] != start {
            *begun = [start, begun[0]];
        }
        Ok(Rest::new(&self.blocks, start))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let begun = *self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let header = begun.into_iter().find(|&begun| begun < start);
        self.check(header.unwrap_or_default(), start, length)
    }
}

/// A file from a position on.
pub(super) struct Rest {
    blocks: Arc<Blocks>,
    position: u64,
}

impl Rest {
    pub(super) fn new(blocks: &Arc<Blocks>, position: u64) -> BufReader<Self> {
        // Headers of pages are small.
        BufReader::with_capacity(512, Self { blocks: Arc::clone(blocks), position })
    }
}

impl Read for Rest {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.blocks.get(self.position, buffer.len())?;
        self.position += bytes.len() as u64;
        (&bytes[..]).read_exact(&mut buffer[..bytes.len()])?;
        Ok(bytes.len())
    }
}

/// What the header of a page says about its size.
#[derive(Debug, PartialEq)]
struct Told {
    unpacked: u64,
    /// Bytes before what is packed: the levels of a data page of the second version.
    levels: u64,
}

impl Told {
    /// Reads the beginning of a `PageHeader` in Thrift's compact protocol: the fields 1 to 4 are
    /// numbers, and then comes a structure; field 8 is that of a data page of the second version, whose
    /// fields 5 and 6 are lengths of levels.
    fn of(header: &[u8]) -> Option<Self> {
        let mut header = header;
        let (mut page, mut levels) = ([0; 5], [0; 7]);
        if numbers(&mut header, &mut page)? == 8 {
            numbers(&mut header, &mut levels)?;
        }
        let positive = |number: i64| u64::try_from(number).ok();
        let levels = positive(levels[5])?.checked_add(positive(levels[6])?)?;
        Some(Self { unpacked: positive(page[2])?, levels })
    }
}

/// Reads the fields of a structure that are 32-bit numbers into the places of their numbers, up to the
/// first other field, whose number it gives; 0 at the structure's end.
fn numbers(bytes: &mut &[u8], fields: &mut [i64]) -> Option<usize> {
    const NUMBER: u8 = 5;
    let mut field = 0;
    loop {
        let (&first, rest) = bytes.split_first()?;
        *bytes = rest;
        if first == 0 {
            return Some(0);
        }
        field = match first >> 4 {
            0 => usize::try_from(varint(bytes)?).ok()?,
            more => field + usize::from(more),
        };
        if first & 0xf != NUMBER {
            return Some(field);
        }
        let number = varint(bytes)?;
        *fields.get_mut(field)? = number;
    }
}

/// A number whose sign is its lowest bit, in seven bits a byte.
fn varint(bytes: &mut &[u8]) -> Option<i64> {
    let mut number = 0_u64;
    for shift in (0..35).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((number >> 1) as i64 ^ -((number & 1) as i64));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_in_a_header_are_read_whatever_follows() {
        // type 0, unpacked 70,000, packed 300, a data page header of some values.
        let first = [0x15, 0, 0x15, 0xe0, 0xc5, 0x08, 0x15, 0xd8, 0x04, 0x2c, 0x15, 2, 0];
        assert_eq!(Told::of(&first), Some(Told { unpacked: 70_000, levels: 0 }));
        // type 3, a checksum, and lengths of levels 5 and 3.
        let second = [
            0x15, 6, 0x15, 20, 0x15, 18, 0x15, 7, 0x4c, 0x15, 2, 0x15, 0, 0x15, 2, 0x15, 0, 0x15,
            10, 0x15, 6, 0x11, 0,
        ];
        assert_eq!(Told::of(&second), Some(Told { unpacked: 10, levels: 8 }));
    }

    #[test]
    fn differences_are_followed_to_their_end() {
        // Blocks of 128 in 4 parts of 32: 40 numbers from 7 on, in parts of 2 bits and 1 bit; the other
        // widths mean nothing.
        let head = [0x80, 1, 4, 40, 14];
        let block = [3, 2, 1, 99, 99];
        let packed = [0xaa; 8 + 4];
        let all = [&head[..], &block, &packed, &[1, 2, 3]].concat();
        assert_eq!(differences(&all), Some((40, &[1, 2, 3][..])));
        // One number, and none, have no block.
        assert_eq!(differences(&[0x80, 1, 4, 1, 14, 9]), Some((1, &[9][..])));
        assert_eq!(differences(&[0x80, 1, 4, 0, 0]), Some((0, &[][..])));
        // Cut off, or without parts.
        assert_eq!(differences(&all[..12]), None);
        assert_eq!(differences(&[0x80, 1, 0, 40, 14, 3]), None);
        // More than anybody writes is told as it is.
        let most = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        let count = differences(&[&[0x80, 1, 4][..], &most, &[0]].concat()).map(|found| found.0);
        assert_eq!(count, Some(u64::MAX >> 1));
    }

    #[test]
    fn a_page_that_says_that_it_has_more_values_than_any_is_refused() {
        let claim = [0x80, 1, 4, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1, 0];
        let honest = [0x80, 1, 4, 1, 0];
        let page = |buf: Vec<u8>, encoding| Page::DataPage {
            buf: buf.into(),
            num_values: 8,
            encoding,
            def_level_encoding: Encoding::RLE,
            rep_level_encoding: Encoding::RLE,
            statistics: None,
        };
        let levels = [2, 0, 0, 0, 16, 1];
        for (before, highest) in [(&[][..], 0), (&levels[..], 1)] {
            let check = |parts: &[&[u8]], encoding| {
                let buf = [before, &parts.concat()].concat();
                Counted::new((), highest).check(&page(buf, encoding))
            };
            let (lengths, prefixes) =
                (Encoding::DELTA_LENGTH_BYTE_ARRAY, Encoding::DELTA_BYTE_ARRAY);
            assert!(check(&[&honest, b"text"], lengths).is_ok());
            assert!(check(&[&honest, &honest, b"text"], prefixes).is_ok());
            assert!(check(&[&claim], lengths).is_err());
            assert!(check(&[&claim, &honest], prefixes).is_err());
            assert!(check(&[&honest, &claim], prefixes).is_err());
            assert!(check(&[&claim], Encoding::PLAIN).is_ok(), "it is text");
        }
    }

    #[test]
    fn what_is_no_header_tells_nothing_and_does_not_panic() {
        for bytes in [&[][..], &[0x15], &[0x15, 0x80], &[0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]]
        {
            assert_eq!(Told::of(bytes), None, "{bytes:?}");
        }
        // Sizes below nothing.
        assert_eq!(Told::of(&[0x15, 0, 0x15, 1, 0x15, 2, 0]), None);
        for first in 0..=255 {
            let _ = Told::of(&[first, 0x15, 3, 0x15, first, 0x80, 0x25, 9]);
        }
    }
}
