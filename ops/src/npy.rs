//! NumPy's file format, as far as tables of whole numbers need it: format versions 1 to 3, C order,
//! little-endian integers (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// A table of whole numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// `[rows, columns]`.
    pub(crate) values: Vec<i64>,
}

impl Table {
    /// Reads a file; a list is a table of one row.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let place = || path.display().to_string();
        let bytes = std::fs::read(path).with_context(place)?;
        Self::parse(&bytes).with_context(place)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let rest = bytes.strip_prefix(b"\x93NUMPY").context("it is no NumPy file")?;
        let (version, rest) = rest.split_first_chunk::<2>().context("it is cut off")?;
        let (length, rest) = match version[0] {
            1 => {
                let (length, rest) = rest.split_first_chunk().context("it is cut off")?;
                (usize::from(u16::from_le_bytes(*length)), rest)
            }
            2 | 3 => {
                let (length, rest) = rest.split_first_chunk().context("it is cut off")?;
                (u32::from_le_bytes(*length) as usize, rest)
            }
            other => bail!("its format version {other} is not known"),
        };
        let (header, data) = rest.split_at_checked(length).context("it is cut off")?;
        let header = std::str::from_utf8(header).context("its header is no text")?;
        let descr = entry(header, "descr").context("its header has no descr")?;
        let descr = descr.split(['\'', '"']).nth(1).context("its descr is no simple type")?;
        let order = entry(header, "fortran_order").context("its header has no fortran_order")?;
        ensure!(
            order.starts_with("False"),
            "its values are in Fortran order; save a C-ordered copy"
        );
        let shape = entry(header, "shape").and_then(|text| text.strip_prefix('('));
        let shape =
            shape.and_then(|text| text.split(')').next()).context("its header has no shape")?;
        let lengths = shape.split(',').map(str::trim).filter(|length| !length.is_empty());
        let lengths: Vec<usize> = lengths
            .map(str::parse)
            .collect::<Result<_, _>>()
            .context("its shape is no list of lengths")?;
        let (rows, columns) = match lengths[..] {
            [columns] => (1, columns),
            [rows, columns] => (rows, columns),
            _ => bail!("its shape is ({shape}); a table has rows and columns"),
        };
        let size = match descr {
            "|i1" | "|u1" => 1,
            "<i2" | "<u2" => 2,
            "<i4" | "<u4" => 4,
            "<i8" | "<u8" => 8,
            other => bail!("its values are {other}; whole numbers, such as int64, can be read"),
        };
        let needs = rows.checked_mul(columns).and_then(|count| count.checked_mul(size));
        ensure!(
            needs == Some(data.len()),
            "its shape is {rows} x {columns} of {size} bytes, and there are {} bytes",
            data.len()
        );
        let signed = descr.as_bytes()[1] == b'i';
        let value = |word: &[u8]| {
            let mut wide = [if signed && word[size - 1] >= 0x80 { 0xff } else { 0 }; 8];
            wide[..size].copy_from_slice(word);
            i64::from_le_bytes(wide)
        };
        Ok(Self { rows, columns, values: data.chunks_exact(size).map(value).collect() })
    }
}

/// What stands behind a key of the header, a Python dictionary.
fn entry<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let at = header.find(&format!("'{key}'")).or_else(|| header.find(&format!("\"{key}\"")))?;
    Some(header[at + key.len() + 2..].trim_start().strip_prefix(':')?.trim_start())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    }

    fn header(descr: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}          \n")
    }

    #[test]
    fn whole_numbers_of_every_width_are_read() {
        let data: Vec<u8> = [-100i64, 7, 1 << 40, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let table = Table::parse(&file(&header("<i8", "(2, 2)"), &data)).unwrap();
        assert_eq!(table, Table { rows: 2, columns: 2, values: vec![-100, 7, 1 << 40, 0] });
        let read = |descr: &str, shape: &str, data: &[u8]| {
            Table::parse(&file(&header(descr, shape), data)).unwrap().values
        };
        assert_eq!(read("<i4", "(1,)", &(-5i32).to_le_bytes()), [-5]);
        assert_eq!(read("<u2", "(2,)", &[0xff, 0xff, 1, 0]), [65_535, 1]);
        assert_eq!(read("|i1", "(1, 2)", &[0x80, 3]), [-128, 3]);
        let mut second = file(&header("|u1", "(1,)"), &[9]);
        second[6] = 2;
        second.splice(10..10, [0, 0]);
        assert_eq!(Table::parse(&second).unwrap().values, [9]);
    }

    #[test]
    fn what_is_no_such_table_is_named() {
        for (bytes, said) in [
            (b"PK".to_vec(), "no NumPy file"),
            (file(&header("<f4", "(1,)"), &[0; 4]), "<f4"),
            (file(&header(">i8", "(1,)"), &[0; 8]), ">i8"),
            (file(&header("<i8", "(2, 2)"), &[0; 8]), "2 x 2 of 8 bytes, and there are 8"),
            (file(&header("<i8", "(1, 1, 1)"), &[0; 8]), "rows and columns"),
            (file(&header("<i8", "(-1,)"), &[0; 8]), "no list of lengths"),
            (file(&header("<i8", "(1,)").replace("False", "True"), &[0; 8]), "Fortran"),
            (file("{}", &[]), "no descr"),
            (file(&header("<i8", "(1,)"), &[])[..12].to_vec(), "cut off"),
        ] {
            let error = format!("{:#}", Table::parse(&bytes).unwrap_err());
            assert!(error.contains(said), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_an_error_or_a_table(text in ".{0,120}", data in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Table::parse(&file(&text, &data));
            let _ = Table::parse(&file(&header("<i8", &text), &data));
        }
    }
}
