//! The files of a model directory as Hugging Face writes it: on disk and mapped, or those of the bundled demo model.
//!
//! It knows where bytes come from, and nothing of what they mean.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use kvasir_kernels::mapped::MappedFile;

use super::LoadError;

/// A model directory.
#[derive(Clone, Debug)]
pub struct ModelFiles(Source);

#[derive(Clone, Debug)]
enum Source {
    Directory(PathBuf),
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// The content of one file.
#[derive(Debug)]
pub struct FileBytes(Content);

#[derive(Debug)]
enum Content {
    Mapped(MappedFile),
    Embedded(&'static [u8]),
}

const DEMO: &[(&str, &[u8])] = &[
    (
        "config.json",
        include_bytes!("../../demo-model/config.json"),
    ),
    (
        "generation_config.json",
        include_bytes!("../../demo-model/generation_config.json"),
    ),
    (
        "model.safetensors",
        include_bytes!("../../demo-model/model.safetensors"),
    ),
    (
        "tokenizer.json",
        include_bytes!("../../demo-model/tokenizer.json"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../demo-model/tokenizer_config.json"),
    ),
];

impl ModelFiles {
    /// The model that is part of the binary.
    pub fn demo() -> Self {
        Self(Source::Embedded(DEMO))
    }

    /// The directory at `path`, which must exist.
    pub fn directory(path: impl Into<PathBuf>) -> Result<Self, LoadError> {
        let path = path.into();
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => Ok(Self(Source::Directory(path))),
            Ok(_) => Err(LoadError::NotADirectory { path }),
            Err(source) => Err(LoadError::Read {
                file: path.display().to_string(),
                source,
            }),
        }
    }

    /// The file `name`, or `None` where there is none.
    pub fn open(&self, name: &str) -> Result<Option<FileBytes>, LoadError> {
        match &self.0 {
            Source::Embedded(files) => {
                let found = files.iter().find(|(other, _)| *other == name);
                Ok(found.map(|&(_, bytes)| FileBytes(Content::Embedded(bytes))))
            }
            Source::Directory(path) => match MappedFile::open(&path.join(name)) {
                Ok(file) => Ok(Some(FileBytes(Content::Mapped(file)))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(LoadError::Read {
                    file: self.path_of(name),
                    source,
                }),
            },
        }
    }

    /// The file `name`, which must exist.
    pub fn require(&self, name: &str) -> Result<FileBytes, LoadError> {
        self.open(name)?.ok_or_else(|| LoadError::MissingFile {
            file: self.path_of(name),
        })
    }

    fn path_of(&self, name: &str) -> String {
        match &self.0 {
            Source::Directory(path) => path.join(name).display().to_string(),
            Source::Embedded(_) => format!("demo model: {name}"),
        }
    }
}

impl fmt::Display for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::Directory(path) => Path::display(path).fmt(f),
            Source::Embedded(_) => f.write_str("the bundled demo model"),
        }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Content::Mapped(file) => file,
            Content::Embedded(bytes) => bytes,
        }
    }
}
