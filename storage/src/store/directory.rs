//! A directory as an object store: the client's own, and conditional updates, which it lacks.
//!
//! An update takes a lock on the directory, looks whether the object is still the one that the
//! caller has seen, and replaces it. The system ends the lock with its holder, however that ends, so
//! a process that is killed leaves none behind. It keeps updates apart from each other, on one
//! machine; a plain write in between is not noticed.

use std::fmt;
use std::fs::{DirEntry, File};
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};

/// The objects below a directory.
#[derive(Debug)]
pub(super) struct Directory {
    files: LocalFileSystem,
    root: PathBuf,
}

impl Directory {
    /// Those below `root`, which exists.
    pub(super) fn new(root: &FilePath) -> Result<Self> {
        // Synced writes: a manifest must not outlive its parts when the machine loses power.
        let files = LocalFileSystem::new_with_prefix(root)?;
        let files = files.with_fsync(true).with_automatic_cleanup(true);
        Ok(Self { files, root: root.to_owned() })
    }

    /// Nobody else updates an object until this is dropped.
    async fn lock(&self) -> Result<File> {
        let root = self.root.clone();
        let locked = tokio::task::spawn_blocking(move || {
            let directory = File::open(root)?;
            directory.lock()?;
            std::io::Result::Ok(directory)
        });
        let failed = |source| Error::Generic { store: "LocalFileSystem", source };
        locked.await?.map_err(|error| failed(error.into()))
    }
}

impl fmt::Display for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Directory {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        let PutMode::Update(seen) = &options.mode else {
            return self.files.put_opts(location, payload, options).await;
        };
        let _locked = self.lock().await?;
        let there = match self.files.head(location).await {
            Ok(meta) => meta.e_tag,
            Err(Error::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        if there.is_none() || there != seen.e_tag {
            let source = "the object is not the one that was read".into();
            return Err(Error::Precondition { path: location.to_string(), source });
        }
        options.mode = PutMode::Overwrite;
        self.files.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.files.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.files.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.files.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.files.copy_opts(from, to, options).await
    }
}

/// As [`sweep`], of those directories right below whose names are `wanted`.
pub(super) fn sweep_some(
    directory: &FilePath,
    age: Duration,
    wanted: impl Fn(&str) -> bool,
) -> std::io::Result<usize> {
    let mut swept = 0;
    for entry in entries(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() && entry.file_name().to_str().is_some_and(&wanted) {
            swept += sweep(&entry.path(), age)?;
        }
    }
    Ok(swept)
}

/// Removes files that were being written, `NAME#NUMBER`, and are older than `age`.
pub(super) fn sweep(directory: &FilePath, age: Duration) -> std::io::Result<usize> {
    let mut swept = 0;
    for entry in entries(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            swept += sweep(&entry.path(), age)?;
            continue;
        }
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.rsplit_once('#'));
        let staged = number.is_some_and(|(_, number)| number.parse::<u64>().is_ok());
        // A file that is gone by now had a living writer; one from the future goes another time.
        let touched = entry.metadata().and_then(|metadata| metadata.modified());
        let old = touched.is_ok_and(|time| time.elapsed().is_ok_and(|old| old >= age));
        if staged && old {
            std::fs::remove_file(entry.path())?;
            swept += 1;
        }
    }
    Ok(swept)
}

/// What is in a directory; nothing when it is not there.
fn entries(
    directory: &FilePath,
) -> std::io::Result<impl Iterator<Item = std::io::Result<DirEntry>>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        entries => Some(entries?),
    };
    Ok(entries.into_iter().flatten())
}
