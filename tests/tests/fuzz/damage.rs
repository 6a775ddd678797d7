//! Damage to samples, drawn from a seed: what disks, networks and bad writers do, and numbers where
//! numbers are.

/// What lies at the edge of something.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// What may stand for a number or a value in text.
const WORDS: [&str; 26] = [
    "0",
    "-1",
    "1",
    "2",
    "255",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "1099511627776",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "-1e300",
    "1e-400",
    "0.1",
    "null",
    "true",
    "\"\"",
    "\"a/../b\"",
    "[]",
    "{}",
    "[[[[[[[[[[",
    "NaN",
    "\\ud800",
];

/// A case: a stream of random numbers.
pub(crate) struct Damage(u64);

impl Damage {
    /// Of a target by its name, and a number.
    pub(crate) fn new(name: &str, case: u64) -> Self {
        let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(seed ^ case.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn edge(&mut self) -> u64 {
        let edge = EDGES[self.below(EDGES.len())];
        match self.below(3) {
            0 => edge.wrapping_add(self.next() % 9).wrapping_sub(4),
            _ => edge,
        }
    }

    /// A range within `length`, mostly short.
    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length);
        let longest = if self.below(4) == 0 { length } else { length.min(24) };
        start..length.min(start + 1 + self.below(longest))
    }

    /// A damaged sample.
    pub(crate) fn of(&mut self, samples: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = samples[self.below(samples.len())].clone();
        for _ in 0..1 + self.below(4) {
            if bytes.is_empty() {
                break;
            }
            self.once(&mut bytes, samples);
        }
        bytes
    }

    fn once(&mut self, bytes: &mut Vec<u8>, samples: &[Vec<u8>]) {
        let length = bytes.len();
        match self.below(12) {
            0 => {
                let bit = self.below(8 * length);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            1 => {
                let place = self.below(length);
                bytes[place] = self.next() as u8;
            }
            2 => bytes.truncate(self.below(length)),
            3 => drop(bytes.drain(self.range(length))),
            4 => {
                // Again, there or elsewhere.
                let (range, place) = (self.range(length), self.below(length + 1));
                let copy = bytes[range].to_vec();
                let times = if self.below(8) == 0 { 1 + self.below(64) } else { 1 };
                bytes.splice(place..place, copy.repeat(times));
            }
            5 => {
                // Something of another sample.
                let other = &samples[self.below(samples.len())];
                let (from, into) = (self.range(other.len()), self.range(length));
                bytes.splice(into, other[from].iter().copied());
            }
            6 | 7 => {
                // A number, in either order of bytes.
                let (width, edge) = (1 << self.below(4), self.edge());
                let place = self.below(length);
                let little = edge.to_le_bytes();
                let word: Vec<u8> = match self.below(4) {
                    0 => little[..width].iter().rev().copied().collect(),
                    _ => little[..width].to_vec(),
                };
                let end = length.min(place + width);
                bytes[place..end].copy_from_slice(&word[..end - place]);
            }
            8 => {
                let range = self.range(length);
                bytes[range].fill_with(|| self.next() as u8);
            }
            _ => self.word(bytes),
        }
    }

    /// Puts another value in the place of a number, or of what else stands behind a separator.
    fn word(&mut self, bytes: &mut Vec<u8>) {
        let start = self.below(bytes.len());
        let is_digit = |byte: &u8| byte.is_ascii_digit();
        let begin = bytes[start..].iter().position(is_digit).map_or(start, |at| start + at);
        let digits = bytes[begin..].iter().take_while(|byte| is_digit(byte)).count();
        // A whole value once in a while, not a number alone.
        let value = |byte: &u8| !b",:=\n]}".contains(byte);
        let end = match self.below(3) {
            0 => begin + bytes[begin..].iter().take_while(|byte| value(byte)).count(),
            _ => begin + digits,
        };
        let word = match self.below(3) {
            0 => self.edge().to_string(),
            _ => WORDS[self.below(WORDS.len())].to_owned(),
        };
        bytes.splice(begin..end, word.into_bytes());
    }
}
