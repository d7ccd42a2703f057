//! A certificate and its key as PEM files, made ready for connections: TLS 1.2 and 1.3, HTTP/1.1.

use std::sync::Arc;

use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Reads a chain of certificates, the server's own first, and its private key. An error tells nothing of the key.
pub fn parse(certificates: &[u8], key: &[u8]) -> Result<ServerConfig, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificates).collect();
    let chain = chain.map_err(|_| "the certificate file is not PEM".to_owned())?;
    if chain.is_empty() {
        return Err("the certificate file has no certificate in PEM".to_owned());
    }
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|_| "the key file has no private key in PEM that is not encrypted".to_owned())?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can't be set up: {error}"))?;
    let mut config = builder
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| format!("the certificate and the key can't be used: {error}"))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_and_key_belong_together() {
        let make = || rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (one, other) = (make(), make());
        let (certificate, key) = (one.cert.pem(), one.signing_key.serialize_pem());
        assert!(parse(certificate.as_bytes(), key.as_bytes()).is_ok());
        let other_key = other.signing_key.serialize_pem();
        for (certificate, key, part) in [
            ("", key.as_str(), "no certificate in PEM"),
            (key.as_str(), key.as_str(), "no certificate in PEM"),
            (certificate.as_str(), "", "no private key in PEM"),
            (certificate.as_str(), certificate.as_str(), "no private key"),
            (certificate.as_str(), other_key.as_str(), "can't be used"),
        ] {
            let error = parse(certificate.as_bytes(), key.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
