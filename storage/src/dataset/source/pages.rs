//! The pages of a Parquet column, looked at before they are unpacked: a page of a few kilobytes may
//! unpack to gigabytes, and the library makes room for whatever its header says. What the header says
//! is read here first; where unpacking does not keep to it (gzip, frames of LZ4), what comes out is
//! counted first unless it cannot be too much.

use std::io::{self, BufReader, Read};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use parquet::basic::Compression;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use super::blocks::Blocks;

/// What gzip makes of a byte at most, and LZ4.
const GZIP_EXPANDS: u64 = 1032;
const LZ4_EXPANDS: u64 = 255;
/// How a frame of LZ4 begins; other forms of it keep to a size.
const LZ4_FRAME: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];

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
