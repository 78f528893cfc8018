//! Chat templates as HF transformers renders them.

use std::collections::HashSet;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat;
use serde_json::{Map, Value as Json, json};

use super::TextError;
use super::tojson::tojson;

const FILE: &str = "chat_template.jinja";
const NAME: &str = "chat_template";

/// Appended to the last message to find its end in the rendered text. It ends in a space, so that a template
/// that trims its messages gives itself away.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A compiled chat template with its tokenizer's special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// `bos_token`, `eos_token` and the like, as template variables.
    special_tokens: Map<String, Json>,
    /// Names that the template looks up.
    variables: HashSet<String>,
    /// Whether a message's content may be a list of parts.
    takes_parts: bool,
    /// Whether the template knows the role `developer`.
    takes_developer: bool,
}

/// How to render, beside the messages.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// End with the opening of an assistant message.
    pub add_generation_prompt: bool,
    /// Leave the last message open, for the model to go on with it.
    pub continue_final_message: bool,
    /// The request's `tools`, passed on as they are.
    pub tools: Option<Json>,
    /// Further template variables.
    pub kwargs: Map<String, Json>,
}

/// A conversation that the template refuses, in the template's own words where it has any.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RenderError(pub String);

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// [`TextError::Invalid`] with the line that does not parse.
    pub fn new(source: &str, special_tokens: Map<String, Json>) -> Result<Self, TextError> {
        let mut env = Environment::new();
        // The environment of transformers' `_compile_jinja_template`.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|error| TextError::Invalid { file: FILE, problem: describe(&error) })?);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_unknown_method_callback(pycompat::unknown_method_callback);
        env.add_filter("tojson", |value: Value, kwargs| tojson(&value, kwargs));
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| {
            jiff::fmt::strtime::format(&format, &jiff::ZonedDateTime::now())
                .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
        });
        env.add_template_owned(NAME, source.to_owned()).map_err(|error| TextError::Invalid {
            file: FILE,
            problem: format!("the template does not parse: {}", describe(&error)),
        })?;
        let variables = env.get_template(NAME).map(|t| t.undeclared_variables(false)).unwrap_or_default();
        let mut template = Self {
            env,
            special_tokens,
            variables,
            takes_parts: false,
            takes_developer: source.contains("developer"),
        };
        template.takes_parts = template.probe_parts();
        Ok(template)
    }

    /// Whether the template looks up a variable of this name.
    pub fn uses(&self, variable: &str) -> bool {
        self.variables.contains(variable)
    }

    /// The text of a conversation. `messages` are OpenAI's, as JSON objects.
    ///
    /// # Errors
    /// [`RenderError`] when the template raises, or when there is no last message to continue.
    pub fn render(&self, messages: &[Json], options: &RenderOptions) -> Result<String, RenderError> {
        let mut messages: Vec<Json> = messages.iter().map(|message| self.adapt(message)).collect();
        if options.continue_final_message {
            tag_last(&mut messages)?;
        }
        let text = self.render_raw(&messages, options)?;
        if !options.continue_final_message {
            return Ok(text);
        }
        let cut = text.rfind(CONTINUE_TAG.trim_end()).ok_or_else(|| {
            RenderError("continue_final_message: the chat template does not print the last message".into())
        })?;
        let kept = if text[cut..].starts_with(CONTINUE_TAG) { &text[..cut] } else { text[..cut].trim_end() };
        Ok(kept.to_owned())
    }

    fn render_raw(&self, messages: &[Json], options: &RenderOptions) -> Result<String, RenderError> {
        let mut context = self.special_tokens.clone();
        context.insert("documents".into(), Json::Null);
        context.extend(options.kwargs.clone());
        context.insert("messages".into(), Json::Array(messages.to_vec()));
        context.insert("tools".into(), options.tools.clone().unwrap_or(Json::Null));
        context.insert("add_generation_prompt".into(), Json::Bool(options.add_generation_prompt));
        self.env
            .get_template(NAME)
            .and_then(|template| template.render(Value::from(Serde(context))))
            .map_err(|error| RenderError(describe(&error)))
    }

    /// What differs from OpenAI's shape for templates that know less than GLM's.
    fn adapt(&self, message: &Json) -> Json {
        let mut message = message.clone();
        if !self.takes_developer && message["role"] == "developer" {
            message["role"] = json!("system");
        }
        if !self.takes_parts
            && let Some(parts) = message["content"].as_array()
        {
            let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
            message["content"] = Json::String(texts.join("\n"));
        }
        message
    }

    /// Whether a text part renders as the same text does: then the template handles lists itself.
    fn probe_parts(&self) -> bool {
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        let render =
            |content: Json| self.render_raw(&[json!({"role": "user", "content": content})], &options);
        match (render(json!("probe")), render(json!([{"type": "text", "text": "probe"}]))) {
            (Ok(plain), Ok(parts)) => plain == parts && plain.contains("probe"),
            _ => false,
        }
    }
}

/// Marks the end of the last message's content.
fn tag_last(messages: &mut [Json]) -> Result<(), RenderError> {
    let content = messages.last_mut().map(|message| &mut message["content"]);
    let text = match content {
        Some(Json::Array(parts)) => {
            parts.iter_mut().rev().map(|part| &mut part["text"]).find(|t| t.is_string())
        }
        other => other,
    };
    match text {
        Some(Json::String(text)) => {
            text.push_str(CONTINUE_TAG);
            Ok(())
        }
        _ => Err(RenderError("continue_final_message needs a last message with text content".into())),
    }
}

/// A template error with its causes and its line; a message raised by the template itself stands alone.
fn describe(error: &Error) -> String {
    if let (ErrorKind::InvalidOperation, Some(detail)) = (error.kind(), error.detail()) {
        return detail.to_owned();
    }
    let mut text = error.to_string();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

/// The chat template of a checkpoint's `tokenizer_config.json`: a string, or a list of named ones (the one
/// called `default` is taken).
pub(super) fn template_in_tokenizer_config(config: &Json) -> Option<String> {
    match config.get("chat_template")? {
        Json::String(source) => Some(source.clone()),
        Json::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

/// The special tokens of `tokenizer_config.json`, each a string or an object with `content`.
pub(super) fn special_tokens(config: &Json) -> Map<String, Json> {
    let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    names
        .into_iter()
        .filter_map(|name| {
            let token = &config[name];
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            Some((name.to_owned(), Json::String(text.to_owned())))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let tokens = special_tokens(&json!({"eos_token": {"content": "<eos>"}, "bos_token": "<bos>"}));
        ChatTemplate::new(source, tokens).unwrap()
    }

    const PLAIN: &str = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

    fn say(role: &str, content: &str) -> Json {
        json!({"role": role, "content": content})
    }

    #[test]
    fn special_tokens_and_the_generation_prompt() {
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        let text = template(PLAIN).render(&[say("user", "hi")], &options).unwrap();
        assert_eq!(text, "<bos><user>hi<eos><assistant>");
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_trims_them() {
        let source =
            "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
        assert_eq!(template(source).render(&[say("user", "a")], &RenderOptions::default()).unwrap(), "a\n");
    }

    #[test]
    fn parts_are_joined_for_a_template_that_only_knows_strings() {
        let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
        let text = template(PLAIN).render(std::slice::from_ref(&parts), &RenderOptions::default()).unwrap();
        assert_eq!(text, "<bos><user>a\nb<eos>");
        let source = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}";
        assert_eq!(template(source).render(&[parts], &RenderOptions::default()).unwrap(), "ab");
    }

    #[test]
    fn developer_is_system_where_the_template_does_not_know_it() {
        let messages = [say("developer", "x")];
        assert_eq!(
            template(PLAIN).render(&messages, &RenderOptions::default()).unwrap(),
            "<bos><system>x<eos>"
        );
    }

    #[test]
    fn a_message_is_continued_where_it_ends() {
        let options = RenderOptions { continue_final_message: true, ..RenderOptions::default() };
        let messages = [say("user", "q"), say("assistant", "so far ")];
        assert_eq!(
            template(PLAIN).render(&messages, &options).unwrap(),
            "<bos><user>q<eos><assistant>so far"
        );
        let untrimmed = PLAIN.replace(" | trim", "");
        assert_eq!(
            template(&untrimmed).render(&messages, &options).unwrap(),
            "<bos><user>q<eos><assistant>so far "
        );
        assert!(template(PLAIN).render(&[json!({"role": "user", "content": ""})], &options).is_ok());
        assert!(template(PLAIN).render(&[], &options).is_err());
        assert!(template("fixed").render(&messages, &options).is_err());
    }

    #[test]
    fn python_methods_namespaces_loop_controls_and_kwargs() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}{{ ns.n }}{% if extra is defined %}{{ extra.items() | list | length }}{% endif %}";
        let kwargs = json!({"extra": {"a": 1, "b": 2}}).as_object().unwrap().clone();
        let options = RenderOptions { kwargs, ..RenderOptions::default() };
        let messages = [say("skip", "no"), say("user", "<think>x</think>\nyes")];
        assert_eq!(template(source).render(&messages, &options).unwrap(), "yes12");
    }

    #[test]
    fn what_the_template_raises_is_what_the_caller_reads() {
        let error = template("{{ raise_exception('roles must alternate') }}")
            .render(&[say("user", "x")], &RenderOptions::default())
            .unwrap_err();
        assert_eq!(error.to_string(), "roles must alternate");
        let error = template("{{ messages[0].a.b }}")
            .render(&[say("user", "x")], &RenderOptions::default())
            .unwrap_err();
        assert!(error.to_string().contains("chat_template:1"), "{error}");
    }

    #[test]
    fn the_date_is_formatted_and_a_bad_format_is_an_error() {
        let render = |source: &str| template(source).render(&[], &RenderOptions::default());
        let year: i16 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
        assert!(year >= 2026);
        assert!(render("{{ strftime_now('%!') }}").is_err());
    }

    #[test]
    fn variables_that_the_template_reads_are_known() {
        let template = template("{% if enable_thinking is defined %}x{% endif %}{{ messages }}");
        assert!(template.uses("enable_thinking"));
        assert!(!template.uses("reasoning_effort"));
    }

    #[test]
    fn named_templates_in_tokenizer_config() {
        let named = json!({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
        assert_eq!(template_in_tokenizer_config(&named).as_deref(), Some("d"));
        assert_eq!(template_in_tokenizer_config(&json!({"chat_template": "s"})).as_deref(), Some("s"));
        assert_eq!(template_in_tokenizer_config(&json!({})), None);
    }
}
