//! The texts that a tokenizer is trained on: the first ones of each file.
//!
//! Each file in turn gives whole documents until they make up its share. Where documents are longer
//! than that, those of the first files leave no room for the others; then no file gives more than its
//! share, its last document is cut, and the files are taken in an order of which any beginning is
//! spread evenly over all of them.

use super::{Batch, Document, Sink, Source};
use crate::{Error, Result};

/// Files that are wanted at least when they give no more than their share.
const LEAST_FILES: u64 = 128;
/// More of them only when each can give so many bytes: less says little about a file.
const LEAST_SHARE: u64 = 64 << 10;

/// Training texts of about so many bytes from the beginnings of files.
///
/// # Errors
/// When a file cannot be read.
pub(in super::super) fn first_texts(source: &dyn Source, bytes: u64) -> Result<Vec<String>> {
    match whole_texts(source, bytes)? {
        Some(texts) => Ok(texts),
        None => cut_texts(source, bytes),
    }
}

/// Whole documents of each file; `None` when they leave out more than a tenth of the files.
fn whole_texts(source: &dyn Source, bytes: u64) -> Result<Option<Vec<String>>> {
    let files = source.files();
    let share = (bytes / files.max(1) as u64).max(1);
    let (mut texts, mut sum) = (Vec::new(), 0);
    for file in 0..files {
        if sum >= bytes {
            return Ok((file * 10 >= files * 9).then_some(texts));
        }
        let first = beginning(source, file, share.min(bytes - sum))?;
        sum += size(&first);
        texts.extend(first);
    }
    Ok(Some(texts))
}

/// Documents of files from everywhere, of none more than its share.
fn cut_texts(source: &dyn Source, bytes: u64) -> Result<Vec<String>> {
    let files = source.files();
    let wanted = (files as u64).min(LEAST_FILES.max(bytes / LEAST_SHARE));
    let share = (bytes / wanted.max(1)).max(1);
    let (mut texts, mut sum) = (Vec::new(), 0);
    for file in spread(files) {
        if sum >= bytes {
            break;
        }
        let limit = share.min(bytes - sum);
        let mut first = beginning(source, file, limit)?;
        let over = size(&first).saturating_sub(limit) as usize;
        if let Some(last) = first.last_mut() {
            // Without the last one they are below the limit.
            last.truncate(last.floor_char_boundary(last.len() - over));
        }
        sum += size(&first);
        texts.extend(first);
    }
    Ok(texts)
}

/// The first training texts of a file: until they have so many bytes, or all of them.
fn beginning(source: &dyn Source, file: usize, bytes: u64) -> Result<Vec<String>> {
    let (mut texts, mut sum, mut enough) = (Vec::new(), 0, false);
    let mut give = |batch: Batch| {
        for record in batch.records {
            if let Document::Text { text, held: false } = source.document(record)? {
                sum += text.len() as u64;
                texts.push(text);
            }
            if sum >= bytes {
                enough = true;
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    };
    let mut sink = Sink::new(0, &mut give);
    sink.begin(file);
    let read = source.read(file, 0, &mut sink).and_then(|()| sink.flush());
    if !enough {
        read?;
    }
    Ok(texts)
}

fn size(texts: &[String]) -> u64 {
    texts.iter().map(|text| text.len() as u64).sum()
}

/// The numbers below `count` in the order of their bits read backwards, in which each falls into one of
/// the largest gaps between those before it: the sequence of van der Corput.
fn spread(count: usize) -> impl Iterator<Item = usize> {
    let bits = count.next_power_of_two().trailing_zeros().max(1);
    (0..1_usize << bits)
        .map(move |number| number.reverse_bits() >> (usize::BITS - bits))
        .filter(move |&number| number < count)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use looptrain_proto::Digest;

    use super::super::{Raw, Record};
    use super::*;

    /// The documents of each file.
    struct Texts(Vec<Vec<String>>);

    impl Texts {
        /// Files of documents of so many bytes, which begin with their numbers.
        fn new(files: usize, documents: usize, bytes: usize) -> Self {
            let text = |file, document| format!("{:<bytes$}", format!("{file} {document}"));
            let texts = |file| (0..documents).map(|document| text(file, document)).collect();
            Self((0..files).map(texts).collect())
        }
    }

    impl Source for Texts {
        fn files(&self) -> usize {
            self.0.len()
        }

        fn bytes(&self, file: usize) -> u64 {
            size(&self.0[file])
        }

        fn digest(&self) -> Digest {
            Digest::of(b"texts")
        }

        fn place(&self, file: usize) -> String {
            file.to_string()
        }

        fn read(&self, file: usize, _: u64, sink: &mut Sink<'_>) -> Result<()> {
            for (at, text) in (1..).zip(&self.0[file]) {
                sink.take(at, Raw::Text(text.clone()), text.len(), 0)?;
            }
            Ok(())
        }

        fn document(&self, record: Record) -> Result<Document> {
            match record.raw {
                Raw::Text(text) => Ok(Document::Text { text, held: record.at % 4 == 3 }),
                other => panic!("{other:?}"),
            }
        }
    }

    /// How many texts are of each tenth of the files.
    fn tenths(texts: &[String], files: usize) -> [usize; 10] {
        let mut tenths = [0; 10];
        for text in texts {
            let file: usize = text.split(' ').next().unwrap().parse().unwrap();
            tenths[file * 10 / files] += 1;
        }
        tenths
    }

    #[test]
    fn few_files_give_whole_documents_in_their_order_until_each_has_given_its_share() {
        let source = Texts::new(4, 9, 100);
        let texts = first_texts(&source, 1300).unwrap();
        // The third one is held out, and the last file gives what is left.
        let expected = source.0.iter().zip([4, 4, 4, 1]).flat_map(|(texts, taken)| {
            let train = texts.iter().enumerate().filter(|(index, _)| index % 4 != 2);
            train.map(|(_, text)| text.clone()).take(taken)
        });
        assert_eq!(texts, expected.collect::<Vec<_>>());
        // All there is.
        assert_eq!(first_texts(&source, 1 << 20).unwrap().len(), 4 * 7);
    }

    #[test]
    fn long_documents_of_many_files_are_cut_and_come_from_all_over_them() {
        for (files, bytes) in [(1000, 1_000_000), (100, 200_000), (5, 10_000)] {
            let texts = first_texts(&Texts::new(files, 3, 9000), bytes).unwrap();
            let tenths = tenths(&texts, files);
            let asked = files.min(129);
            assert_eq!(tenths.iter().sum::<usize>(), asked);
            let even = |count: &usize| (asked / 10 - 3..=asked / 10 + 3).contains(count);
            assert!(files < 10 || tenths.iter().all(even), "{tenths:?}");
            assert!(texts.iter().all(|text| text.len() <= bytes as usize / files.min(128)));
            assert_eq!(size(&texts), bytes);
        }
    }

    #[test]
    fn more_small_files_than_there_is_room_for_come_from_all_over_them() {
        let texts = first_texts(&Texts::new(10_000, 1, 50), 100_000).unwrap();
        assert_eq!(size(&texts), 100_000);
        let tenths = tenths(&texts, 10_000);
        assert!(tenths.iter().all(|count| (190..210).contains(count)), "{tenths:?}");
    }

    #[test]
    fn no_file_and_no_text_are_no_texts_and_a_cut_is_between_characters() {
        for source in [Texts(Vec::new()), Texts(vec![Vec::new()])] {
            assert_eq!(first_texts(&source, 100).unwrap(), [""; 0]);
        }
        let wide = Texts(vec![vec!["ä".repeat(50)]; 30]);
        let texts = first_texts(&wide, 100).unwrap();
        assert!(texts.iter().all(|text| text == "ä"), "{texts:?}");
        assert!(texts.len() > 25);
    }

    #[test]
    fn any_beginning_of_an_order_that_is_spread_has_no_large_gap() {
        assert_eq!(spread(8).collect::<Vec<_>>(), [0, 4, 2, 6, 1, 5, 3, 7]);
        for count in [0, 1, 2, 3, 100, 1000, 1025] {
            let order: Vec<usize> = spread(count).collect();
            for taken in [1, 7, 60, count].into_iter().filter(|taken| (1..=count).contains(taken)) {
                let mut seen = order[..taken].to_vec();
                seen.extend([0, count]);
                seen.sort_unstable();
                let gap = seen.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
                assert!(gap <= 4 * count.div_ceil(taken), "{gap} of {count} after {taken}");
            }
            let mut all = order;
            all.sort_unstable();
            assert!(all.into_iter().eq(0..count));
        }
    }
}
