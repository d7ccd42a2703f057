//! What the API's port does around every call for those who run it: a request id, an access log, CORS, API keys and their
//! limits; one layer each, none where it isn't asked for. Handlers know nothing of it but the [`Call`] in the request's
//! extensions, whose tokens are counted.
//!
//! [`Call`]: crate::frontend::Call

mod authenticate;
mod cors;
mod limit;
mod log;
mod request_id;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use tokio::sync::watch;

use super::App;
use super::serve::Tls;
use crate::access::keys::{self, Keyring};
use crate::access::limits::KeyLimits;
use crate::access::origins::AllowedOrigins;
use crate::access::{reload, tls};
use crate::args::{AccessArgs, TlsArgs};
use limit::Limiter;

/// Who may call the API's port. The default: everybody, and no web page.
#[derive(Debug, Default)]
pub struct Access {
    keys: Option<watch::Receiver<Arc<Keyring>>>,
    limiter: Option<Arc<Limiter>>,
    origins: AllowedOrigins,
    log: bool,
    tokenizer_info: bool,
}

impl Access {
    /// Reads the file of keys, and goes on to do so. An error is a sentence for the user.
    pub fn open(args: &AccessArgs) -> Result<Self, String> {
        let limits = KeyLimits {
            requests_per_minute: NonZeroU32::new(args.requests_per_minute),
            tokens_per_minute: NonZeroU32::new(args.tokens_per_minute),
            max_concurrent_requests: NonZeroU32::new(args.max_concurrent_requests),
        };
        Ok(Self {
            keys: open_keys(args)?,
            limiter: (!limits.is_none()).then(|| Arc::new(Limiter::new(limits))),
            origins: args.allowed_origins.clone(),
            log: args.access_log,
            tokenizer_info: args.enable_tokenizer_info_endpoint,
        })
    }

    /// What the model's files say of the tokenizer may be read.
    pub(super) fn tokenizer_info(&self) -> bool {
        self.tokenizer_info
    }
}

fn open_keys(args: &AccessArgs) -> Result<Option<watch::Receiver<Arc<Keyring>>>, String> {
    let given = args.api_keys.clone();
    let Some(file) = &args.api_key_file else {
        if given.is_empty() {
            return Ok(None);
        }
        let keys = Keyring::new(given).map_err(|error| format!("--api-key: {error}"))?;
        return Ok(Some(watch::channel(Arc::new(keys)).1));
    };
    let name = file.display().to_string();
    let parse = move |contents: &[Vec<u8>]| {
        let keys = keys::parse_file(&contents.concat());
        let keys = keys.and_then(|keys| Keyring::new([given.as_slice(), &keys].concat()));
        keys.map_err(|error| format!("{name}: {error}"))
    };
    reload::follow("--api-key-file", vec![file.clone()], Box::new(parse))
        .map(Some)
        .map_err(|error| format!("--api-key-file: {error}"))
}

/// Reads certificate and key, and goes on to do so. An error is a sentence for the user.
pub fn open_tls(args: &TlsArgs) -> Result<Option<Tls>, String> {
    let (Some(certificates), Some(key)) = (&args.ssl_certfile, &args.ssl_keyfile) else {
        return Ok(None);
    };
    let paths: Vec<PathBuf> = vec![certificates.clone(), key.clone()];
    let names = format!("{}, {}", certificates.display(), key.display());
    let parse = move |contents: &[Vec<u8>]| match contents {
        [certificates, key] => {
            tls::parse(certificates, key).map_err(|error| format!("{names}: {error}"))
        }
        _ => Err("two files are read".to_owned()),
    };
    reload::follow("--ssl-certfile", paths, Box::new(parse))
        .map(Some)
        .map_err(|error| format!("--ssl-certfile and --ssl-keyfile: {error}"))
}

/// Between the connection and the count of answers: what must hold for refusals of all kinds.
pub(super) fn outer(router: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
    let router = match app.access.log {
        true => router.layer(axum::middleware::from_fn(log::layer)),
        false => router,
    };
    router.layer(from_fn_with_state(Arc::clone(app), request_id::layer))
}

/// Between the count of answers and the routes. A page's question whether it may ask has no key; what it reads of a
/// refusal has its headers.
pub(super) fn inner(mut router: Router<Arc<App>>, app: &Arc<App>) -> Router<Arc<App>> {
    let Access {
        keys,
        limiter,
        origins,
        ..
    } = &app.access;
    if let Some(limiter) = limiter {
        router = router.layer(from_fn_with_state(Arc::clone(limiter), limit::layer));
    }
    if let Some(keys) = keys {
        router = router.layer(from_fn_with_state(keys.clone(), authenticate::layer));
    }
    if !origins.is_empty() {
        router = router.layer(from_fn_with_state(origins.clone(), cors::layer));
    }
    router
}
