//! Chat templates: messages to a prompt, as Transformers' `apply_chat_template` renders them.
//!
//! Follows Transformers' environment: Jinja with `trim_blocks`, `lstrip_blocks` and loop controls, its own `tojson`,
//! `raise_exception`, `strftime_now`, and the `generation` tag, which marks text and adds none. The time is an
//! argument. It knows nothing of tokens, and of messages only that they are values.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::TextError;
use super::reasoning::THINK_END;
use super::tool_calls::ToolCallFormat;

const NAME: &str = "chat_template";

/// A compiled template and the names that the tokenizer gives it.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token` and the like.
    special_tokens: BTreeMap<String, String>,
    style: TemplateStyle,
}

/// What a template shows of how its model writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplateStyle {
    /// It shows the model its tools.
    pub shows_tools: bool,
    /// How calls are written in it.
    pub tool_calls: Option<ToolCallFormat>,
    /// It knows reasoning between `<think>` tags.
    pub thinks: bool,
}

impl TemplateStyle {
    fn of(source: &str) -> Self {
        Self {
            shows_tools: source.contains("tools"),
            tool_calls: ToolCallFormat::of_template(source),
            thinks: source.contains(THINK_END),
        }
    }
}

/// What a rendering takes besides the messages.
#[derive(Debug, Default)]
pub struct RenderArgs {
    /// End with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    /// End inside the last message, which the model then continues.
    pub continue_final_message: bool,
    /// The tools that the model may call, a list as in OpenAI's interface; none where it is undefined.
    pub tools: Value,
    /// Further names that the caller passes (`chat_template_kwargs`).
    pub kwargs: BTreeMap<String, Value>,
    /// The local time, for `strftime_now`.
    pub now: jiff::civil::DateTime,
}

impl ChatTemplate {
    /// Compiles a template. `file` is where it stands, for the error.
    pub fn new(
        file: &'static str,
        source: &str,
        special_tokens: BTreeMap<String, String>,
    ) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| file_error(file, &e))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        let style = TemplateStyle::of(source);
        let source = without_generation_tags(source);
        environment
            .add_template_owned(NAME, source)
            .map_err(|e| file_error(file, &e))?;
        Ok(Self {
            environment,
            special_tokens,
            style,
        })
    }

    /// How its model writes.
    pub fn style(&self) -> TemplateStyle {
        self.style
    }

    /// Renders `messages`, a list of maps with `role` and `content`. Fails with the template's own message.
    pub fn render(&self, messages: Value, args: RenderArgs) -> Result<String, TextError> {
        let continued = match args.continue_final_message {
            true => Some(last_content(&messages)?),
            false => None,
        };
        let mut names: BTreeMap<String, Value> = BTreeMap::new();
        let tools = args.tools;
        let has_tools = !tools.is_undefined();
        names.insert(
            "tools".into(),
            if has_tools { tools } else { Value::from(()) },
        );
        names.insert("documents".into(), Value::from(()));
        names.extend(
            self.special_tokens
                .iter()
                .map(|(k, v)| (k.clone(), Value::from(v))),
        );
        names.extend(args.kwargs);
        names.insert("messages".into(), messages);
        names.insert(
            "add_generation_prompt".into(),
            args.add_generation_prompt.into(),
        );
        let now = args.now;
        names.insert(
            "strftime_now".into(),
            Value::from_function(move |format: String| strftime(&format, now)),
        );

        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| template_error(&e))?;
        let mut rendered = template
            .render(Value::from(names))
            .map_err(|e| template_error(&e))?;
        if let Some(content) = continued {
            // As in Transformers: cut behind the last message's own text.
            let content = content.trim();
            let at = rendered.rfind(content).ok_or_else(|| {
                TextError::Template("continue_final_message: the template does not render the last message as it is".into())
            })?;
            rendered.truncate(at + content.len());
        }
        Ok(rendered)
    }
}

fn last_content(messages: &Value) -> Result<String, TextError> {
    let last = messages
        .len()
        .and_then(|n| n.checked_sub(1))
        .and_then(|i| messages.get_item_by_index(i).ok());
    let content = last.and_then(|last| last.get_attr("content").ok());
    content
        .and_then(|c| c.as_str().map(String::from))
        .ok_or_else(|| {
            TextError::Template(
                "continue_final_message: the last message has no text content".into(),
            )
        })
}

fn strftime(format: &str, now: jiff::civil::DateTime) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, now).map_err(|e| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now({format:?}): {e}"),
        )
    })
}

fn file_error(file: &'static str, e: &Error) -> TextError {
    let line = e
        .line()
        .map_or(String::new(), |line| format!(", line {line}"));
    TextError::File {
        file,
        reason: format!("the chat template does not compile{line}: {}", detail(e)),
    }
}

fn template_error(e: &Error) -> TextError {
    TextError::Template(detail(e))
}

/// What went wrong, without the engine's frame around it.
fn detail(e: &Error) -> String {
    match e.detail() {
        Some(detail) => detail.to_owned(),
        None => e.kind().to_string(),
    }
}

/// `{% generation %}` ... `{% endgeneration %}` as a block that is always rendered; its whitespace marks stay.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inner = &tag[2..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&format!(
                "{{%{}",
                inner.replacen("generation", "if true", 1)
            )),
            "endgeneration" => out.push_str(&format!(
                "{{%{}",
                inner.replacen("endgeneration", "endif", 1)
            )),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps` with Transformers' defaults: no escaping for HTML or beyond ASCII, keys in their order.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent = kwargs
        .get::<Option<Value>>("indent")?
        .filter(|v| !v.is_none())
        .map(|v| match v.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(
                v.as_i64()
                    .and_then(|n| usize::try_from(n).ok())
                    .unwrap_or(0),
            ),
        });
    let separators = kwargs
        .get::<Option<Value>>("separators")?
        .filter(|v| !v.is_none());
    kwargs.assert_all_used()?;
    let (item_separator, key_separator) = match separators {
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
        None => (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ),
    };
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        ensure_ascii,
        sort_keys,
    };
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(Value::from(out))
}

struct JsonStyle {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl JsonStyle {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.write_string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_items(out, ('[', ']'), depth, &items, |out, item| {
                    self.write(out, item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_items(out, ('{', '}'), depth, &keys, |out, key| {
                    match key.kind() {
                        ValueKind::None => out.push_str("\"null\""),
                        ValueKind::Bool => out.push_str(if key.is_true() {
                            "\"true\""
                        } else {
                            "\"false\""
                        }),
                        ValueKind::Number => self.write_string(out, &number(key)),
                        _ => self.write_string(out, &key.to_string()),
                    }
                    out.push_str(&self.key_separator);
                    self.write(out, &value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                let message = format!("tojson: a value of kind {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn write_items(
        &self,
        out: &mut String,
        (open, close): (char, char),
        depth: usize,
        items: &[Value],
        mut write: impl FnMut(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item_separator);
            }
            self.new_line(out, depth + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            self.new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn write_string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => push_escape(out, c as u16),
                // Python escapes U+007F only where it escapes what isn't ASCII.
                _ if self.ensure_ascii && !(' '..='~').contains(&c) => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units)
                        .iter()
                        .for_each(|unit| push_escape(out, *unit));
                }
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

fn push_escape(out: &mut String, unit: u16) {
    // Writing to a string cannot fail.
    let _ = write!(out, "\\u{unit:04x}");
}

/// A number as Python prints it.
fn number(value: &Value) -> String {
    let Ok(float) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if value.is_integer() {
        return value.to_string();
    }
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let magnitude = float.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        // Python writes the exponent with a sign and at least two digits.
        let text = format!("{float:e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let text = float.to_string();
    if text.contains('.') {
        text
    } else {
        format!("{text}.0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `tests/golden/make_chat_templates.py`.
    #[derive(serde::Deserialize)]
    struct Golden {
        now: String,
        special_tokens: BTreeMap<String, String>,
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        why: String,
        template: String,
        messages: Value,
        add_generation_prompt: bool,
        tools: Option<Value>,
        #[serde(default)]
        kwargs: BTreeMap<String, Value>,
        rendered: Option<String>,
        error: Option<String>,
    }

    #[test]
    fn renders_as_transformers_does() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/chat_templates.json"
        );
        let golden: Golden = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(golden.cases.len() > 20);
        let mut wrong = Vec::new();
        for case in golden.cases {
            let template = ChatTemplate::new("test", &case.template, golden.special_tokens.clone());
            let args = RenderArgs {
                add_generation_prompt: case.add_generation_prompt,
                continue_final_message: false,
                tools: case.tools.unwrap_or_default(),
                kwargs: case.kwargs,
                now: golden.now.parse().unwrap(),
            };
            let got = template.and_then(|t| t.render(case.messages, args));
            let want = match (case.rendered, case.error) {
                (Some(text), _) => Ok(text),
                (None, error) => Err(TextError::Template(error.unwrap_or_default()).to_string()),
            };
            let got = got.map_err(|e| e.to_string());
            if got != want {
                wrong.push(format!("{}:\n  got  {got:?}\n  want {want:?}", case.why));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn the_generation_tag_keeps_its_whitespace_marks() {
        let template = "{% for m in messages %}<{%- generation -%} {{ m.content }} {%- endgeneration %}>\n{% endfor %}";
        let template = ChatTemplate::new("test", template, BTreeMap::new()).unwrap();
        let messages: Value =
            serde_json::from_str(r#"[{"role":"assistant","content":"hi"}]"#).unwrap();
        assert_eq!(
            template.render(messages, RenderArgs::default()).unwrap(),
            "<hi>\n"
        );
    }

    #[test]
    fn a_final_message_is_continued() {
        let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}";
        let template = ChatTemplate::new("test", template, BTreeMap::new()).unwrap();
        let messages: Value = serde_json::from_str(
            r#"[{"role":"user","content":"a"},{"role":"assistant","content":"So "}]"#,
        )
        .unwrap();
        let args = RenderArgs {
            continue_final_message: true,
            ..RenderArgs::default()
        };
        assert_eq!(
            template.render(messages, args).unwrap(),
            "[user]a[end][assistant]So"
        );
    }

    #[test]
    fn a_broken_template_is_named() {
        let e =
            ChatTemplate::new("chat_template.jinja", "a\n{% if %}", BTreeMap::new()).unwrap_err();
        assert!(
            e.to_string()
                .starts_with("chat_template.jinja: the chat template does not compile, line 2"),
            "{e}"
        );
    }
}
