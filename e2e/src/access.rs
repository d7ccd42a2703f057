//! A way to a cluster, ours or a user's own: kubectl and helm with the kubeconfig and the context that they
//! are to use. It knows nothing of how the cluster came to be.

use crate::Error;
use crate::command::{run, run_with_input};
use std::path::PathBuf;
use std::process::Command;

/// Who talks to which cluster.
#[derive(Debug, Clone)]
pub struct Access {
    /// The program kubectl.
    pub kubectl: PathBuf,
    /// The program helm.
    pub helm: PathBuf,
    /// The kubeconfig; `None` is the user's own.
    pub kubeconfig: Option<PathBuf>,
    /// The context in it; `None` is its current one.
    pub context: Option<String>,
    /// Where both programs keep their caches; `None` is where they usually do.
    pub cache: Option<PathBuf>,
}

impl Access {
    /// A user's own cluster, by the name of its context, with the programs that the user has.
    ///
    /// # Errors
    /// When kubectl or helm is missing, or the context is unknown.
    pub fn existing(context: &str) -> Result<Self, Error> {
        let access = Self {
            kubectl: "kubectl".into(),
            helm: "helm".into(),
            kubeconfig: None,
            context: Some(context.to_owned()),
            cache: None,
        };
        run(access.kubectl().arg("version"))?;
        run(access.helm().arg("version"))?;
        Ok(access)
    }

    /// kubectl, ready for its arguments.
    #[must_use]
    pub fn kubectl(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        if let Some(kubeconfig) = &self.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        if let Some(cache) = &self.cache {
            command.env("KUBECACHEDIR", cache.join("kubectl"));
        }
        if let Some(context) = &self.context {
            command.args(["--context", context]);
        }
        command
    }

    /// helm, ready for its arguments.
    #[must_use]
    pub fn helm(&self) -> Command {
        let mut command = Command::new(&self.helm);
        if let Some(kubeconfig) = &self.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        if let Some(cache) = &self.cache {
            for kind in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
                command.env(kind, cache.join("helm"));
            }
        }
        if let Some(context) = &self.context {
            command.args(["--kube-context", context]);
        }
        command
    }

    /// Applies a manifest.
    ///
    /// # Errors
    /// With what the API server says.
    pub fn apply(&self, yaml: &str) -> Result<String, Error> {
        run_with_input(
            self.kubectl().args(["apply", "--server-side", "-f", "-"]),
            yaml,
        )
    }
}
