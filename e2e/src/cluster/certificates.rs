//! The cluster's certificates and the kubeconfigs that carry them. One authority signs servers and
//! clients; a second one signs the aggregation proxy, as Kubernetes requires.
//! It knows subjects and files, and nothing of who uses them how.

use crate::Error;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// A certificate authority whose certificates are written into one folder.
pub(super) struct Authority {
    folder: PathBuf,
    name: &'static str,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// A new one; its certificate is `<name>.crt`, its key never leaves this process.
    ///
    /// # Errors
    /// When the certificate cannot be made or written.
    pub(super) fn create(folder: &Path, name: &'static str) -> Result<Self, Error> {
        let failed = |source| Error::Certificate {
            subject: name.to_owned(),
            source,
        };
        let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let key = KeyPair::generate().map_err(failed)?;
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(failed)?;
        let authority = Self {
            folder: folder.to_owned(),
            name,
            issuer,
        };
        write_private(&authority.certificate(), &authority.issuer.pem())?;
        Ok(authority)
    }

    /// The path of its own certificate.
    #[must_use]
    pub(super) fn certificate(&self) -> PathBuf {
        self.folder.join(format!("{}.crt", self.name))
    }

    /// Signs `<name>.crt` and writes `<name>.key`: for clients and servers both. `names` are DNS names
    /// and addresses, empty for a pure client.
    ///
    /// # Errors
    /// When the certificate cannot be made or written.
    pub(super) fn sign(
        &self,
        name: &str,
        subject: Subject<'_>,
        names: &[&str],
    ) -> Result<Signed, Error> {
        let failed = |source| Error::Certificate {
            subject: subject.common_name.to_owned(),
            source,
        };
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).map_err(failed)?;
        params
            .distinguished_name
            .push(DnType::CommonName, subject.common_name);
        if let Some(organization) = subject.organization {
            params
                .distinguished_name
                .push(DnType::OrganizationName, organization);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        let signed = Signed {
            certificate: self.folder.join(format!("{name}.crt")),
            key: self.folder.join(format!("{name}.key")),
        };
        write_private(&signed.certificate, &certificate.pem())?;
        write_private(&signed.key, &key.serialize_pem())?;
        Ok(signed)
    }
}

/// Whom a certificate names: user and group, to Kubernetes.
#[derive(Clone, Copy)]
pub(super) struct Subject<'a> {
    /// The user.
    pub(super) common_name: &'a str,
    /// The group.
    pub(super) organization: Option<&'a str>,
}

/// A certificate and its key, as files.
pub(super) struct Signed {
    /// PEM.
    pub(super) certificate: PathBuf,
    /// PEM, PKCS #8.
    pub(super) key: PathBuf,
}

/// A key pair of no certificate, for signing service account tokens and for checking them.
///
/// # Errors
/// When it cannot be made or written.
pub(super) fn token_keys(folder: &Path) -> Result<TokenKeys, Error> {
    let key = KeyPair::generate().map_err(|source| Error::Certificate {
        subject: "service accounts".to_owned(),
        source,
    })?;
    let keys = TokenKeys {
        private: folder.join("service-accounts.key"),
        public: folder.join("service-accounts.pub"),
    };
    write_private(&keys.private, &key.serialize_pem())?;
    write_private(&keys.public, &key.public_key_pem())?;
    Ok(keys)
}

/// Two PEM files.
pub(super) struct TokenKeys {
    /// Signs.
    pub(super) private: PathBuf,
    /// Checks.
    pub(super) public: PathBuf,
}

/// Writes a kubeconfig that reaches `server` with the client certificate.
///
/// # Errors
/// When it cannot be written.
pub(super) fn write_kubeconfig(
    path: &Path,
    server: &str,
    authority: &Path,
    client: &Signed,
) -> Result<(), Error> {
    let text = format!(
        "apiVersion: v1\nkind: Config\n\
         clusters:\n- name: kvasir\n  cluster: {{server: '{server}', certificate-authority: '{}'}}\n\
         users:\n- name: kvasir\n  user: {{client-certificate: '{}', client-key: '{}'}}\n\
         contexts:\n- name: kvasir\n  context: {{cluster: kvasir, user: kvasir}}\n\
         current-context: kvasir\n",
        authority.display(),
        client.certificate.display(),
        client.key.display(),
    );
    write_private(path, &text)
}

/// Readable by its owner only: kubeconfigs and keys are as good as the cluster.
fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    use std::io::Write as _;
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path).map_err(Error::file("write", path))?;
    file.write_all(text.as_bytes())
        .map_err(Error::file("write", path))
}
