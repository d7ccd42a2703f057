//! Container images without a container engine: an OCI image layout in a tar archive, with one
//! layer, gzip-compressed: the same bytes for the same content. What goes into which image is `recipes`'s.
//!
//! Format: the OCI image specification 1.1, image-layout.md, config.md and layer.md.

use crate::Error;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

pub mod recipes;

/// An image to be written.
#[derive(Clone, Debug)]
pub struct Image {
    /// The reference it goes by, such as `kvasir.dev/kvasir:0.1.0`.
    pub reference: String,
    /// What runs when a pod names no command.
    pub entrypoint: Vec<String>,
    /// Environment variables of whatever runs, as `NAME=value`.
    pub env: Vec<String>,
    /// Numeric user and group of the process.
    pub user: u32,
    /// The content of the root file system.
    pub files: Vec<ImageFile>,
}

/// One regular file of an image.
#[derive(Clone, Debug)]
pub struct ImageFile {
    /// Absolute path in the image.
    pub path: String,
    /// The file on this machine whose bytes it has.
    pub from: PathBuf,
    /// Permission bits.
    pub mode: u32,
}

impl Image {
    /// Writes the archive that `ctr images import` reads and that tools such as skopeo push.
    ///
    /// # Errors
    /// When a file cannot be read or the archive cannot be written.
    pub fn write(&self, archive: &Path) -> Result<(), Error> {
        let layer = self.layer()?;
        let packed = gzip(&layer).map_err(Error::file("pack", archive))?;
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": { "Entrypoint": self.entrypoint, "Env": self.env, "User": format!("{0}:{0}", self.user), "WorkingDir": "/" },
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
        })
        .to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", config.as_bytes()),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &packed)],
        })
        .to_string();
        let mut listed = descriptor(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.as_bytes(),
        );
        let tag = self.reference.rsplit(':').next().unwrap_or_default();
        listed["annotations"] = json!({ "io.containerd.image.name": self.reference, "org.opencontainers.image.ref.name": tag });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [listed],
        })
        .to_string();

        let failed = |path: &Path| Error::file("write", path);
        let file = File::create(archive).map_err(failed(archive))?;
        let mut out = tar::Builder::new(BufWriter::new(file));
        let blobs = [config.as_bytes(), manifest.as_bytes(), packed.as_slice()];
        append(
            &mut out,
            "oci-layout",
            br#"{"imageLayoutVersion":"1.0.0"}"#,
            0o644,
        )
        .map_err(failed(archive))?;
        append(&mut out, "index.json", index.as_bytes(), 0o644).map_err(failed(archive))?;
        for blob in blobs {
            let name = format!("blobs/{}", digest(blob).replace(':', "/"));
            append(&mut out, &name, blob, 0o644).map_err(failed(archive))?;
        }
        out.into_inner()
            .and_then(|mut writer| writer.flush())
            .map_err(failed(archive))
    }

    /// The root file system as one tar, not yet compressed: files by path, each folder before what is in it.
    fn layer(&self) -> Result<Vec<u8>, Error> {
        let mut files: Vec<&ImageFile> = self.files.iter().collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let folders: BTreeSet<&Path> = files
            .iter()
            .flat_map(|file| Path::new(&file.path).ancestors().skip(1))
            .filter(|folder| folder.parent().is_some())
            .collect();
        let mut tar = tar::Builder::new(Vec::new());
        for folder in folders {
            let mut header = header(0, 0o755);
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, relative(folder), std::io::empty())
                .map_err(Error::file("pack", folder))?;
        }
        for file in files {
            let bytes = fs::read(&file.from).map_err(Error::file("read", &file.from))?;
            let name = relative(Path::new(&file.path))
                .to_string_lossy()
                .into_owned();
            append(&mut tar, &name, &bytes, file.mode).map_err(Error::file("pack", &file.from))?;
        }
        tar.into_inner()
            .map_err(Error::file("pack", Path::new(&self.reference)))
    }
}

/// RFC 1952, without a name or a time: the same content has the same bytes.
fn gzip(bytes: &[u8]) -> Result<Vec<u8>, std::io::Error> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(bytes)?;
    packed.finish()
}

fn append<W: std::io::Write>(
    tar: &mut tar::Builder<W>,
    name: &str,
    bytes: &[u8],
    mode: u32,
) -> Result<(), std::io::Error> {
    tar.append_data(&mut header(bytes.len() as u64, mode), name, bytes)
}

/// Root owns everything and the time is the epoch: the same content has the same digest.
fn header(size_bytes: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(size_bytes);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() })
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// This machine's, in the names that OCI takes from Go.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
