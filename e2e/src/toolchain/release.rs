//! Kubernetes' own release: the archive of the server's programs, by version and SHA-512, unpacked into the cache. The
//! checksums are those that the project publishes (CHANGELOG/CHANGELOG-1.34.md, "Downloads for v1.34.4").

use super::download::{DownloadError, download};
use super::{KUBERNETES, PROGRAMS, beside, cache, locked};
use crate::{Error, progress};
use flate2::read::MultiGzDecoder;
use std::fs::{self, File};
use std::io::{BufReader, ErrorKind};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Where the Kubernetes project publishes its releases.
const HOST: &str = "https://dl.k8s.io";

/// One archive of the release [`KUBERNETES`].
struct Archive {
    file: &'static str,
    sha512: &'static str,
}

const AMD64: Archive = Archive {
    file: "kubernetes-server-linux-amd64.tar.gz",
    sha512: "65c75e81e3ea488f6d42b493cad64d7577ddfa1e5372037a1c841ac069039997d359b5b2f2d44e7665bf04c48ed0065cf9d4c9801b1e63bb6a1b099ef00d4863",
};

const ARM64: Archive = Archive {
    file: "kubernetes-server-linux-arm64.tar.gz",
    sha512: "a1fad7060ed67b5634f32f3256a295179dd887dab5c82b8550c2eb62c69df34cfbb311c8f93e7608d558eba32b9e2ddc23976db39e512fd747cc6bf9b4c1765f",
};

/// The folder of the release's programs, downloaded where the cache lacks it; `None`, with a sentence for the person at
/// the terminal, where it can't be had.
///
/// # Errors
/// Of this machine's files only.
pub(super) fn ensure() -> Result<Option<PathBuf>, Error> {
    let archive = match std::env::consts::ARCH {
        "x86_64" => &AMD64,
        "aarch64" => &ARM64,
        _ => return Ok(None),
    };
    ensure_from(HOST, archive, &cache())
}

/// Removes what has come of the archive, once nobody is going to ask for the rest.
///
/// # Errors
/// When it can't be removed.
pub(super) fn remove_part() -> Result<(), Error> {
    let part = beside(&packed_file(&cache()), "part");
    match fs::remove_file(&part) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::file("remove", &part)(error))
        }
        _ => Ok(()),
    }
}

/// The archive, until it is unpacked: beside the folder, which is begun anew each time, so that a part of it is kept.
fn packed_file(cache: &Path) -> PathBuf {
    cache.join(format!("kubernetes-{KUBERNETES}.tar.gz"))
}

fn place(cache: &Path) -> PathBuf {
    cache.join(format!("kubernetes-{KUBERNETES}-release"))
}

fn ensure_from(host: &str, archive: &Archive, cache: &Path) -> Result<Option<PathBuf>, Error> {
    let place = place(cache);
    let made = locked(&place, |unpacking| {
        let url = format!("{host}/{KUBERNETES}/{}", archive.file);
        let step = progress::begin(format_args!(
            "Downloading Kubernetes {KUBERNETES} from {url} (once, about 350 MB; kept in {})",
            place.display()
        ));
        let packed = packed_file(cache);
        download(&url, archive.sha512, &packed)?;
        fs::create_dir_all(unpacking).map_err(Error::file("create", unpacking))?;
        unpack(&packed, unpacking)?;
        fs::remove_file(&packed).map_err(Error::file("remove", &packed))?;
        step.done("downloaded, and its checksum is right");
        Ok::<(), DownloadError>(())
    });
    match made {
        Ok(()) => Ok(Some(place)),
        Err(DownloadError::File(error)) => Err(error),
        Err(error) => {
            progress::say(format_args!("    {error}: building it here instead."));
            Ok(None)
        }
    }
}

/// Takes the [`PROGRAMS`] out of the archive.
fn unpack(packed: &Path, folder: &Path) -> Result<(), Error> {
    let failed = || Error::file("unpack", packed);
    let file = File::open(packed).map_err(Error::file("read", packed))?;
    let mut archive = tar::Archive::new(MultiGzDecoder::new(BufReader::new(file)));
    let mut missing = PROGRAMS.to_vec();
    for entry in archive.entries().map_err(failed())? {
        let mut entry = entry.map_err(failed())?;
        let path = entry.path().map_err(failed())?.into_owned();
        let Ok(name) = path.strip_prefix("kubernetes/server/bin") else {
            continue;
        };
        let Some(at) = missing
            .iter()
            .position(|program| Path::new(program) == name)
        else {
            continue;
        };
        let program = folder.join(missing.swap_remove(at));
        let mut out = File::create(&program).map_err(Error::file("write", &program))?;
        std::io::copy(&mut entry, &mut out).map_err(failed())?;
        out.set_permissions(fs::Permissions::from_mode(0o755))
            .map_err(Error::file("write", &program))?;
        if missing.is_empty() {
            return Ok(());
        }
    }
    Err(Error::Refused(format!(
        "{} lacks {}",
        packed.display(),
        missing.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::super::download::tests::{Answer, FileServer, Scratch, sha512};
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;

    /// An archive as the project packs it, with some of the programs.
    fn packed(programs: &[&str]) -> Vec<u8> {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        let mut add = |path: &str, content: &str| {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, content.as_bytes())
                .expect("packed");
        };
        add("kubernetes/LICENSES", "text");
        for program in programs {
            let path = format!("kubernetes/server/bin/{program}");
            add(&format!("{path}.docker_tag"), "v0");
            add(&path, &format!("this is {program}"));
        }
        tar.into_inner()
            .and_then(GzEncoder::finish)
            .expect("packed")
    }

    fn ensure_of(
        content: &[u8],
        answers: &[Answer],
        cache: &Path,
    ) -> Result<Option<PathBuf>, Error> {
        let expected: &'static str = sha512(&packed(&PROGRAMS)).leak();
        let archive = Archive {
            file: "kubernetes-server.tar.gz",
            sha512: expected,
        };
        let server = FileServer::start(content.to_vec(), answers);
        ensure_from(&server.url, &archive, cache)
    }

    #[test]
    fn the_programs_are_there_once_and_can_be_run() {
        let scratch = Scratch::new("release");
        let right = packed(&PROGRAMS);
        let folder = ensure_of(&right, &[Answer::BreaksOff(100), Answer::Right], &scratch.0);
        let folder = folder.expect("no error").expect("a folder");
        for program in PROGRAMS {
            let path = folder.join(program);
            let content = fs::read_to_string(&path).expect("the program");
            assert_eq!(content, format!("this is {program}"));
            let mode = fs::metadata(&path).expect("its mode").permissions().mode();
            assert_eq!(mode & 0o777, 0o755, "{program}");
        }
        let again = ensure_of(b"", &[Answer::NotFound], &scratch.0).expect("no error");
        assert_eq!(again, Some(folder), "nobody is asked a second time");
    }

    #[test]
    fn what_cannot_be_had_is_built_instead_and_asked_for_the_next_time() {
        let scratch = Scratch::new("no-release");
        let right = packed(&PROGRAMS);
        for (why, content, answer) in [
            ("another archive", &packed(&PROGRAMS[1..]), Answer::Right),
            ("no archive", &right, Answer::NotFound),
            ("broken off", &right, Answer::BreaksOff(0)),
        ] {
            let folder = ensure_of(content, &[answer], &scratch.0).expect(why);
            assert_eq!(folder, None, "{why}");
        }
        let folder = ensure_of(&right, &[Answer::Right], &scratch.0).expect("no error");
        assert!(folder.is_some_and(|folder| folder.join("kubelet").exists()));
    }

    #[test]
    fn an_archive_without_a_program_is_an_error_that_names_it() {
        let scratch = Scratch::new("lacking");
        let archive = scratch.0.join("a.tar.gz");
        fs::write(&archive, packed(&["kubelet", "kubectl"])).expect("written");
        let error = unpack(&archive, &scratch.0).expect_err("it lacks four");
        assert!(error.to_string().contains("kube-apiserver"), "{error}");
        assert!(!error.to_string().contains("kubelet"), "{error}");
    }
}
