//! TLS for `https://` addresses: rustls over ring, and the authorities that this system trusts.
//!
//! The store is the system's own, or the file that `SSL_CERT_FILE` names, as for other programs. A
//! certificate that does not hold is an error that names the server and the reason; there is no switch
//! that looks away.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Error, Result, anyhow, bail};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, CertificateError, ClientConfig, RootCertStore};

/// What is needed to speak TLS with one server.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Tls {
    /// Reads the authorities that this system trusts.
    ///
    /// # Errors
    /// There are none; the host is neither a name nor an address.
    pub fn new(host: &str) -> Result<Self> {
        let name = ServerName::try_from(host.to_string());
        let name = name.with_context(|| format!("{host:?} is no name that a certificate has"))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("TLS")?
            .with_root_certificates(authorities()?)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), name })
    }

    /// Greets the server and checks its certificate.
    ///
    /// # Errors
    /// Names the reason.
    pub async fn connect(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>> {
        let connected = self.connector.connect(self.name.clone(), stream).await;
        connected.map_err(|error| self.explained(error))
    }

    fn explained(&self, error: io::Error) -> Error {
        let host = self.name.to_str();
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return anyhow!(
                "{host} closed the connection; does it speak TLS? http:// does without"
            );
        }
        let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match cause {
            Some(rustls::Error::InvalidCertificate(why)) => {
                anyhow!("the certificate of {host} does not hold: {}", reason(why))
            }
            Some(rustls::Error::InvalidMessage(_)) => {
                anyhow!("{host} does not speak TLS on this port; http:// may be meant")
            }
            Some(other) => anyhow!("TLS with {host}: {other}"),
            None => anyhow!(error).context(format!("TLS with {host}")),
        }
    }
}

fn authorities() -> Result<RootCertStore> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(found.certs);
    if usable == 0 {
        let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        bail!(
            "this system trusts no authority{why}; install its certificates (ca-certificates), or \
             set SSL_CERT_FILE to a file of them"
        );
    }
    Ok(roots)
}

fn reason(why: &CertificateError) -> String {
    match why {
        CertificateError::UnknownIssuer => "nobody whom this system trusts has signed it; \
             SSL_CERT_FILE names a file of authorities that are trusted instead"
            .into(),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            format!("it has expired, or this clock is wrong ({why})")
        }
        other => other.to_string(),
    }
}
