//! A model as a folder that the published Ouro code loads and writes: `config.json`,
//! `model.safetensors`, the tokenizer, and what its library asks for besides.

mod config;
mod model;
mod tensors;
mod weights;

pub(crate) use config::{Config, Tokens};
pub(crate) use model::ModelFolder;
pub(crate) use weights::{Float, WeightsFile};

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A folder in the making: it has its name when all of it is there, and none if that fails.
pub(crate) struct NewFolder {
    to: PathBuf,
    partial: PathBuf,
    finished: bool,
}

impl NewFolder {
    /// Begins the folder `to`, which must not be there yet, or be empty.
    pub(crate) fn begin(to: &Path) -> Result<Self> {
        let taken =
            || format!("{} is there already; choose another --to, or remove it", to.display());
        match fs::read_dir(to).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Ok(false) => bail!(taken()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => bail!("{}: {error}", taken()),
        }
        let name = to.file_name().with_context(|| format!("{} names no folder", to.display()))?;
        let partial = format!("{}.partial-{}", name.to_string_lossy(), std::process::id());
        let partial = to.with_file_name(partial);
        fs::create_dir_all(&partial)
            .with_context(|| format!("cannot make {}", partial.display()))?;
        Ok(Self { to: to.to_owned(), partial, finished: false })
    }

    /// Where a file of it is written.
    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.partial.join(file)
    }

    /// Writes a small file.
    pub(crate) fn write(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(file);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Gives it its name.
    pub(crate) fn finish(mut self) -> Result<()> {
        fs::rename(&self.partial, &self.to)
            .with_context(|| format!("cannot give {} its name", self.to.display()))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.finished {
            // What stays bears another name.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn entries(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_folder_has_its_name_when_it_is_whole_and_leaves_nothing_when_it_fails() {
        let directory =
            std::env::temp_dir().join(format!("looptrain-folder-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let to = directory.join("model");
        let folder = NewFolder::begin(&to).unwrap();
        folder.write("config.json", b"{}").unwrap();
        assert!(!to.exists());
        drop(folder);
        assert!(entries(&directory).is_empty());

        // An empty one may be there.
        fs::create_dir(&to).unwrap();
        let folder = NewFolder::begin(&to).unwrap();
        folder.write("config.json", b"{}").unwrap();
        folder.finish().unwrap();
        assert_eq!(
            (entries(&directory), entries(&to)),
            (vec!["model".into()], vec!["config.json".into()])
        );

        let error = NewFolder::begin(&to).err().unwrap().to_string();
        assert!(error.contains("is there already") && error.contains("--to"), "{error}");
        fs::remove_dir_all(&directory).unwrap();
    }
}
