//! Files that are read again when they change: mounted Secrets, whose directory Kubernetes replaces by moving a symlink.
//!
//! They are read every second and compared by what they hold: no event is told of a symlink above a file.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::watch;

/// How often the files are read.
const INTERVAL: Duration = Duration::from_secs(1);

/// The most that one file may hold.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Reads the files, in this order.
pub type Parse<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send>;

/// Some files and what they mean together.
struct Source<T> {
    paths: Vec<PathBuf>,
    parse: Parse<T>,
    /// The digest of what they held the last time, or why they couldn't be read.
    seen: Option<Result<[u8; 32], String>>,
}

impl<T> Source<T> {
    /// Reads the files. `None`: all is as it was the last time.
    fn changed(&mut self) -> Option<Result<T, String>> {
        let contents: Result<Vec<Vec<u8>>, String> = self.paths.iter().map(read).collect();
        let now = contents.as_ref().map_err(Clone::clone).map(digest);
        if self.seen.as_ref() == Some(&now) {
            return None;
        }
        self.seen = Some(now);
        Some(contents.and_then(|contents| (self.parse)(&contents)))
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("{} can't be read ({error})", path.display());
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut content = Vec::new();
    let mut file = file.take(MAX_FILE_BYTES + 1);
    file.read_to_end(&mut content).map_err(failed)?;
    match content.len() as u64 > MAX_FILE_BYTES {
        true => Err(format!(
            "{} is larger than {MAX_FILE_BYTES} bytes",
            path.display()
        )),
        false => Ok(content),
    }
}

fn digest(contents: &Vec<Vec<u8>>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for content in contents {
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    hash.finalize().into()
}

/// Reads the files now, which must succeed, and from then on whenever they change, on a thread of its own that ends with the
/// last receiver. What can't be used is logged once, for `flag`, and what was valid stays.
pub fn follow<T: Send + Sync + 'static>(
    flag: &'static str,
    paths: Vec<PathBuf>,
    parse: Parse<T>,
) -> Result<watch::Receiver<Arc<T>>, String> {
    let mut source = Source {
        paths,
        parse,
        seen: None,
    };
    let first = source.changed().expect("nothing was seen before")?;
    let (sender, receiver) = watch::channel(Arc::new(first));
    let thread = std::thread::Builder::new().name("reload".to_owned());
    let follow = move || {
        while !sender.is_closed() {
            std::thread::sleep(INTERVAL);
            match source.changed() {
                None => {}
                Some(Ok(value)) => {
                    tracing::info!(flag, "read again");
                    sender.send_replace(Arc::new(value));
                }
                Some(Err(error)) => {
                    tracing::error!(flag, error, "can't be used: what was valid stays valid");
                }
            }
        }
    };
    let failed = |error| format!("a thread could not be started ({error})");
    thread.spawn(follow).map_err(failed)?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// As the kubelet does: a new directory, and a symlink that is moved over the old one.
    fn swap(mount: &Path, version: &str, content: &str) {
        std::fs::create_dir(mount.join(version)).unwrap();
        std::fs::write(mount.join(version).join("keys"), content).unwrap();
        std::os::unix::fs::symlink(version, mount.join("..tmp")).unwrap();
        std::fs::rename(mount.join("..tmp"), mount.join("..data")).unwrap();
    }

    #[test]
    fn what_changed_is_told_once() {
        let mount = tempfile::tempdir().unwrap();
        let mount = mount.path();
        let mut source = Source {
            paths: vec![mount.join("keys")],
            parse: Box::new(|contents| match contents {
                [one] if one.starts_with(b"good") => Ok(one.clone()),
                _ => Err("is no good".to_owned()),
            }),
            seen: None,
        };
        let missing = source.changed().unwrap().unwrap_err();
        assert!(
            missing.contains("keys can't be read (No such file"),
            "{missing}"
        );
        assert_eq!(source.changed(), None, "once");
        swap(mount, "..1", "good 1");
        std::os::unix::fs::symlink("..data/keys", mount.join("keys")).unwrap();
        assert_eq!(source.changed(), Some(Ok(b"good 1".to_vec())));
        assert_eq!(source.changed(), None);
        swap(mount, "..2", "good 2");
        assert_eq!(source.changed(), Some(Ok(b"good 2".to_vec())));
        swap(mount, "..3", "bad");
        assert_eq!(source.changed(), Some(Err("is no good".to_owned())));
        assert_eq!(source.changed(), None, "once");
        std::fs::remove_file(mount.join("keys")).unwrap();
        assert!(source.changed().unwrap().is_err());
        assert_eq!(source.changed(), None);
        let large = vec![b'x'; MAX_FILE_BYTES as usize + 1];
        std::fs::write(mount.join("keys"), large).unwrap();
        let error = source.changed().unwrap().unwrap_err();
        assert!(error.contains("larger than 1048576"), "{error}");
    }
}
