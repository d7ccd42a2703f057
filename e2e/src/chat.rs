//! One question to an OpenAI-compatible server, its answer streamed to standard output. It knows the wire
//! format of chat completions and nothing of clusters.

use crate::Error;
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};

/// Asks the server at `base_url` (without `/v1`) and prints each piece of the answer as it comes.
///
/// # Errors
/// When the server does not answer, answers nothing, or the answer breaks off.
pub fn stream_answer(base_url: &str, model: &str, question: &str) -> Result<(), Error> {
    let url = format!("{base_url}/v1/chat/completions");
    let broken =
        |error: &dyn std::fmt::Display| Error::Refused(format!("{url} did not answer: {error}"));
    let body = serde_json::json!({
        "model": model,
        "stream": true,
        "temperature": 0,
        "max_tokens": 120,
        "messages": [{ "role": "user", "content": question }],
    });
    let answer = ureq::post(&url)
        .send_json(&body)
        .map_err(|error| broken(&error))?;
    let mut out = std::io::stdout().lock();
    let (mut n_pieces, mut ended) = (0_usize, false);
    for line in BufReader::new(answer.into_body().into_reader()).lines() {
        let line = line.map_err(|error| broken(&error))?;
        ended |= line == "data: [DONE]";
        let piece = piece(&line);
        n_pieces += usize::from(!piece.is_empty());
        // A terminal that went away is not worth failing for.
        let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
    }
    let _ = out.write_all(b"\n\n");
    if n_pieces == 0 || !ended {
        return Err(broken(&"the stream ended before its answer did"));
    }
    Ok(())
}

/// The text that one line of the event stream adds; most lines add none.
fn piece(line: &str) -> String {
    let event = line.strip_prefix("data: ").unwrap_or_default();
    let event: Value = serde_json::from_str(event).unwrap_or_default();
    event["choices"][0]["delta"]["content"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_its_pieces() {
        for (why, line, want) in [
            (
                "a piece",
                r#"data: {"choices":[{"delta":{"content":"A block"}}]}"#,
                "A block",
            ),
            (
                "the first event names the role only",
                r#"data: {"choices":[{"delta":{"role":"assistant"}}]}"#,
                "",
            ),
            ("the last event", "data: [DONE]", ""),
            ("between events", "", ""),
        ] {
            assert_eq!(piece(line), want, "{why}");
        }
    }
}
