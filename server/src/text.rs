//! Text to tokens and back: tokenizer, detokenizer, stop strings, chat template.
//!
//! Everything here is pure and synchronous but [`pool`], which runs the slow part off the async threads. It knows
//! the files of a Hugging Face directory by their content, and neither requests nor HTTP.

mod bounds;
pub mod chat_template;
pub mod detokenize;
mod pieces;
pub mod pool;
pub mod reasoning;
pub mod stop;
pub mod tokenizer;
pub mod tool_calls;
pub mod vocabulary;

pub use chat_template::ChatTemplate;
pub use detokenize::Detokenizer;
pub use pool::TextPool;
pub use stop::StopMatcher;
pub use tokenizer::Tokenizer;
pub use vocabulary::Vocabulary;

/// Why the text files of a model can't be used, or a text can't be turned into tokens.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is not what its name says.
    #[error("{file}: {reason}")]
    File {
        /// The file's name, as in a model directory.
        file: &'static str,
        /// What was found and what was expected.
        reason: String,
    },
    /// The tokenizer uses a decoder that can't be streamed exactly.
    #[error(
        "tokenizer.json: the decoder {found} is not supported; supported are ByteLevel, Metaspace, WordPiece, and \
         sequences of Replace, ByteFallback, Fuse and a leading Strip"
    )]
    Decoder {
        /// What the file asks for.
        found: String,
    },
    /// The tokenizer failed on a text.
    #[error("the tokenizer failed on this text: {0}")]
    Encode(String),
    /// The chat template refused these messages; in its own words.
    #[error("the chat template of this model says: {0}")]
    Template(String),
    /// The model has none.
    #[error(
        "this model has no chat template; use /v1/completions, or add chat_template.jinja to the model"
    )]
    NoTemplate,
    /// A text that has no place to be cut at, and that is too long to be tokenized at once.
    #[error("{n_bytes} bytes of the text have to be tokenized at once, at most {limit} can be")]
    NoCut {
        /// Bytes without a place to cut.
        n_bytes: usize,
        /// Bytes at once.
        limit: usize,
    },
    /// No prompt that fits the context has as long a text.
    #[error(
        "the prompt is too long: it has {n_bytes} bytes, this model's maximum context length is {max_tokens} tokens, {limit} bytes at most"
    )]
    TooLong {
        /// Bytes of the text.
        n_bytes: usize,
        /// Prompt and output together.
        max_tokens: u32,
        /// Bytes that so many tokens may have.
        limit: usize,
    },
    /// The work on a text panicked; the panic's message is on standard error.
    #[error("the work on this text failed")]
    Panicked,
    /// Too many long texts wait for the tokenizer.
    #[error("{limit} long texts wait for the tokenizer already")]
    Busy {
        /// Texts that may wait.
        limit: usize,
    },
    /// The pool is shutting down.
    #[error("the tokenizer has stopped")]
    Stopped,
}
