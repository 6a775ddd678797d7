//! The way from records to shards.
//!
//! Three threads are in a row, with a little room between them: one reads, one has all cores parse
//! and tokenize, one packs and hashes. So memory holds a few batches and a shard of each split
//! whatever the size of the text.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::ScopedJoinHandle;

use looptrain_proto::Digest;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::names::Names;
use super::pack::{Counts, Packed, Packer, Shard, Work};
use super::prepare::{Maker, Output, PrepareEvent};
use super::resume::{Entries, Progress};
use super::source::{Batch, Document, Record, Sink, Source};
use super::{Split, TextTokenizer};
use crate::{Error, Result};

/// Batches between two threads.
const ROOM: usize = 2;
/// Malformed records that are told one by one.
const TOLD: u64 = 20;
/// A share of fewer records than this says little: only more of them end the work before its end.
const FEW_RECORDS: u64 = 10_000;

/// Records that have been looked into, in their order, and the bytes read until then.
type Looked = (Vec<(u32, u64, Packed)>, u64);

/// The way from records to shards.
pub(super) struct Making<'a> {
    pub(super) maker: &'a Maker,
    pub(super) source: &'a dyn Source,
    pub(super) tokenizer: &'a TextTokenizer,
    pub(super) names: &'a Names,
    /// Where the work begins.
    pub(super) begin: &'a Work,
    pub(super) total_bytes: u64,
    pub(super) sources: Digest,
}

impl Making<'_> {
    /// Makes all shards that are not there yet; gives how far it has come, and what was read.
    pub(super) fn pack(&self, mut packer: Packer, entries: &mut Entries) -> Result<(Work, Counts)> {
        let threads = self.maker.recipe.threads;
        let pool = threads.map(|threads| ThreadPoolBuilder::new().num_threads(threads).build());
        let pool = pool.transpose().map_err(|error| self.maker.text(error.to_string()))?;
        std::thread::scope(|scope| {
            let (raw, batches) = sync_channel(ROOM);
            let (give, looked) = sync_channel(ROOM);
            let reading = scope.spawn(move || self.read(&raw));
            let tokenizing = scope.spawn(move || self.tokenize(&batches, &give, pool.as_ref()));
            let packed = self.take(looked, &mut packer, entries);
            // Whoever has nobody to give to any more was interrupted by the next one's failure.
            let ends = [joined(reading), joined(tokenizing), packed];
            let mut failures = ends.into_iter().filter_map(Result::err).collect::<Vec<_>>();
            failures.sort_by_key(|error| matches!(error, Error::Interrupted));
            failures.into_iter().next().map_or(Ok(()), Err)
        })?;
        while let Some(shard) = packer.cut(true)? {
            self.write(shard, &mut packer, entries)?;
            self.tell(&packer, self.total_bytes)?;
        }
        self.check_malformed(packer.counts(), 0)?;
        Ok((packer.work(), packer.counts()))
    }

    fn read(&self, raw: &SyncSender<Batch>) -> Result<()> {
        let first = self.begin.file as usize;
        let before = (0..first).map(|file| self.source.bytes(file)).sum();
        let mut give = |batch| raw.send(batch).map_err(|_| Error::Interrupted);
        let mut sink = Sink::new(before, &mut give);
        for file in first..self.source.files() {
            sink.begin(file);
            let from = if file == first { self.begin.from() } else { 0 };
            self.source.read(file, from, &mut sink)?;
            sink.end(self.source.bytes(file));
        }
        sink.flush()
    }

    fn tokenize(
        &self,
        batches: &Receiver<Batch>,
        give: &SyncSender<Looked>,
        pool: Option<&ThreadPool>,
    ) -> Result<()> {
        for batch in batches {
            let look = || batch.records.into_par_iter().map(|record| self.look(record)).collect();
            let looked: Result<Vec<_>> = match pool {
                Some(pool) => pool.install(look),
                None => look(),
            };
            give.send((looked?, batch.read)).map_err(|_| Error::Interrupted)?;
        }
        Ok(())
    }

    fn look(&self, record: Record) -> Result<(u32, u64, Packed)> {
        let (file, at) = (record.file, record.at);
        let packed = match self.source.document(record)? {
            Document::Empty => Packed::Empty,
            Document::Malformed(reason) => Packed::Malformed(reason),
            Document::Text { text, held } => {
                let split = if held { Split::Validation } else { Split::Train };
                let mut tokens = Vec::new();
                if self.begin.split(split).cut.wants(file, at) {
                    tokens = self.tokenizer.encode(&text)?;
                    tokens.push(self.tokenizer.end_of_text());
                }
                Packed::Document { split, tokens, bytes: text.len() as u64 }
            }
        };
        Ok((file, at, packed))
    }

    fn take(
        &self,
        looked: Receiver<Looked>,
        packer: &mut Packer,
        entries: &mut Entries,
    ) -> Result<()> {
        for (records, read) in looked {
            for (file, at, packed) in records {
                if let Packed::Malformed(reason) = &packed
                    && packer.counts().malformed < TOLD
                {
                    let place = format!("{}:{at}", self.source.place(file as usize));
                    let reason = reason.clone();
                    self.maker.event(PrepareEvent::Malformed { place, reason })?;
                }
                packer.take(file, at, packed);
                while let Some(shard) = packer.cut(false)? {
                    self.write(shard, packer, entries)?;
                    self.tell(packer, read)?;
                }
            }
            self.check_malformed(packer.counts(), FEW_RECORDS)?;
            self.tell(packer, read)?;
        }
        Ok(())
    }

    /// Tells how far it has come, with so many bytes read.
    fn tell(&self, packer: &Packer, bytes: u64) -> Result<()> {
        self.maker.event(PrepareEvent::Tokenizing {
            bytes,
            total_bytes: self.total_bytes,
            tokens: packer.tokens(),
            shards: packer.shards(),
            malformed: packer.counts().malformed,
        })
    }

    /// A shard first, then its entry, and last that both are there.
    fn write(&self, shard: Shard, packer: &mut Packer, entries: &mut Entries) -> Result<()> {
        let file = shard.entry.file.clone();
        entries.split(shard.split).push(shard.entry);
        self.maker.send(Output::File(file, shard.bytes))?;
        let (file, json) = entries.segment(self.names, shard.split);
        self.maker.send(Output::File(file, json.into()))?;
        let progress = Progress::new(self.sources, self.tokenizer.digest(), packer.work());
        self.maker.send(Output::File(self.names.progress(), progress.to_json().into()))
    }

    /// Fails when more records than their share of all, or of so many, are malformed.
    fn check_malformed(&self, counts: Counts, at_least: u64) -> Result<()> {
        let Counts { records, malformed, .. } = counts;
        let share = self.maker.options.max_malformed;
        if malformed as f64 <= share * records.max(at_least) as f64 {
            return Ok(());
        }
        Err(self.maker.text(format!(
            "{malformed} of {records} records are malformed, more than the share of {share} that may be; mend them, or allow more (max_malformed, --max-malformed)"
        )))
    }
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
