//! A hub's refusals in words: which field the user has to mend. Pure.

use super::Repository;

/// What was asked, for the sentence that says why it is refused.
pub(super) struct Asked<'a> {
    pub(super) endpoint: &'a str,
    pub(super) repository: &'a Repository,
    pub(super) has_token: bool,
}

impl Asked<'_> {
    /// The hub's refusal, with the field that is to be mended. `code` is its `X-Error-Code`.
    pub(super) fn refusal(&self, status: u16, code: Option<&str>) -> String {
        let Self {
            endpoint,
            repository: Repository { name, revision },
            has_token,
        } = self;
        let token = "HF_TOKEN (model.source.huggingFace.tokenSecret)";
        let no_revision = format!(
            "the repository has no revision {revision:?}: correct model.source.huggingFace.revision"
        );
        let no_repository = match has_token {
            true => format!(
                "{endpoint} has no repository {name:?} that the token may read: correct model.source.huggingFace.repository, or give another {token}"
            ),
            false => format!(
                "{endpoint} has no repository {name:?}, or it is private: correct model.source.huggingFace.repository, or give a token in {token}"
            ),
        };
        match (status, code) {
            (_, Some("GatedRepo")) => format!(
                "the repository is gated: ask for access at {endpoint}/{name}, and give a token of an account that has it in {token}"
            ),
            (_, Some("RevisionNotFound")) => no_revision,
            (_, Some("RepoNotFound")) => no_repository,
            (401, _) if *has_token => {
                format!("{endpoint} refuses the token in {token}: it is wrong, or no longer valid")
            }
            (403, _) if *has_token => {
                format!("the token in {token} may not read the repository: give one that may")
            }
            (404, Some("EntryNotFound")) => format!(
                "a file that it lists is not there at the revision {revision:?}; choose another revision"
            ),
            (401 | 403 | 404, _) => {
                format!("{no_repository} (or it has no revision {revision:?})")
            }
            (status, _) => format!("{endpoint} answers {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_field_that_is_wrong() {
        let repository = Repository {
            name: "a/b".to_owned(),
            revision: "v2".to_owned(),
        };
        for (why, status, code, has_token, want) in [
            (
                "no such repository, or a private one",
                401,
                Some("RepoNotFound"),
                false,
                "https://hub has no repository \"a/b\", or it is private: correct model.source.huggingFace.repository",
            ),
            (
                "a private one",
                404,
                Some("RepoNotFound"),
                true,
                "https://hub has no repository \"a/b\" that the token may read",
            ),
            (
                "a revision",
                404,
                Some("RevisionNotFound"),
                false,
                "the repository has no revision \"v2\": correct model.source.huggingFace.revision",
            ),
            (
                "a wrong token",
                401,
                None,
                true,
                "https://hub refuses the token in HF_TOKEN (model.source.huggingFace.tokenSecret)",
            ),
            (
                "a gated one",
                403,
                Some("GatedRepo"),
                true,
                "the repository is gated: ask for access at https://hub/a/b",
            ),
            ("rights", 403, None, true, "the token in HF_TOKEN"),
            (
                "a mirror that gives no code",
                404,
                None,
                false,
                "https://hub has no repository \"a/b\", or it is private",
            ),
            ("anything else", 418, None, true, "https://hub answers 418"),
        ] {
            let asked = Asked {
                endpoint: "https://hub",
                repository: &repository,
                has_token,
            };
            let found = asked.refusal(status, code);
            assert!(found.starts_with(want), "{why}: {found}");
        }
    }
}
