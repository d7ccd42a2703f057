//! Which web pages may call the API from a browser (CORS, <https://fetch.spec.whatwg.org/#http-cors-protocol>). Pure.

/// Origins of web pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowedOrigins(Vec<String>);

impl AllowedOrigins {
    /// A JSON list, as vLLM takes it: `["https://example.com"]`, or `["*"]` for all.
    pub fn parse(found: &str) -> Result<Self, String> {
        let origins: Option<Vec<String>> = serde_json::from_str(found).ok();
        origins
            .filter(|origins| origins.iter().all(|origin| is_origin(origin)))
            .map(Self)
            .ok_or_else(|| {
                r#"a JSON list of origins, such as ["https://example.com", "http://localhost:3000"] or ["*"]"#.to_owned()
            })
    }

    /// No page may.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Every page may.
    pub fn is_any(&self) -> bool {
        self.0.iter().any(|origin| origin == "*")
    }

    /// A page of this origin may.
    pub fn allows(&self, origin: &[u8]) -> bool {
        self.is_any() || self.0.iter().any(|allowed| allowed.as_bytes() == origin)
    }
}

/// `*`, or a scheme and a host, as browsers send them: in lower case and without a path.
fn is_origin(text: &str) -> bool {
    let is_part = |part: &str| {
        let in_part = |byte: u8| {
            byte.is_ascii_graphic() && !byte.is_ascii_uppercase() && !b"/?#@,*\"".contains(&byte)
        };
        !part.is_empty() && part.bytes().all(in_part)
    };
    let parts = text.split_once("://");
    text == "*" || parts.is_some_and(|(scheme, host)| is_part(scheme) && is_part(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_a_json_list() {
        let some = r#"["https://a.example", "http://[::1]:3000"]"#;
        let origins = AllowedOrigins::parse(some).unwrap();
        for (origin, want) in [
            ("https://a.example", true),
            ("http://[::1]:3000", true),
            ("http://a.example", false),
            ("https://a.example:443", false),
            ("https://a.example.evil", false),
            ("null", false),
            ("", false),
        ] {
            assert_eq!(origins.allows(origin.as_bytes()), want, "{origin}");
        }
        assert!(AllowedOrigins::parse(r#"["*"]"#).unwrap().allows(b"null"));
        assert!(AllowedOrigins::parse("[]").unwrap().is_empty());
        for wrong in [
            "*",
            "https://a.example",
            "",
            "[1]",
            r#"["https://a.example/"]"#,
            r#"["a.example"]"#,
            r#"["https://*.example"]"#,
            r#"["https://A.example"]"#,
            r#"["null"]"#,
            r#"["https://"]"#,
        ] {
            let error = AllowedOrigins::parse(wrong).unwrap_err();
            assert!(error.starts_with("a JSON list of origins"), "{wrong}");
        }
    }
}
