//! Who may ask and how much: API keys, the limits of each, web pages' origins, TLS, and the files that keys and
//! certificates come from.
//!
//! Pure but for [`reload`]. It knows no HTTP: `http::access` asks it around every request.

pub mod keys;
pub mod limits;
pub mod origins;
pub mod reload;
pub mod tls;
