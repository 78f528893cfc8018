//! Fields that would change the output and are not supported. They are a 400, never silently dropped; a value
//! that asks for nothing (`null`, an empty list, the default) passes.

use std::fmt;

use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::Value as Json;

use super::ApiError;

/// A field that is refused.
#[derive(Debug, Clone, Copy)]
pub struct Refusal {
    /// The field.
    pub name: &'static str,
    /// The endpoints where it is refused.
    pub on: Endpoints,
    /// Whether a value asks for nothing.
    neutral: fn(&Json) -> bool,
    /// What to do instead.
    pub instead: &'static str,
}

/// Where a field is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoints {
    /// Chat and text completions.
    Both,
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

impl Endpoints {
    fn include(self, other: Self) -> bool {
        self == Self::Both || self == other
    }
}

/// All fields that are refused on `endpoint`.
pub fn refusals(endpoint: Endpoints) -> impl Iterator<Item = &'static Refusal> {
    REFUSED.iter().filter(move |refusal| refusal.on.include(endpoint))
}

/// Refuses what a body asks for and cannot have.
///
/// # Errors
/// A 400 naming the first such field.
pub fn check_refused(fields: &RefusedFields, endpoint: Endpoints) -> Result<(), ApiError> {
    let without_tools = fields.0.iter().any(|(name, value)| *name == "tool_choice" && value == "none");
    for (name, value) in &fields.0 {
        let Some(refusal) = refusals(endpoint).find(|refusal| refusal.name == *name) else { continue };
        if (refusal.neutral)(value) || (*name == "tools" && without_tools) {
            continue;
        }
        let message = format!("{name} is not supported by this server{}.", refusal.instead);
        return Err(ApiError::unsupported(*name, message));
    }
    Ok(())
}

/// The fields of a body that stand in the table, in the order in which they came.
#[derive(Debug, Default)]
pub struct RefusedFields(Vec<(&'static str, Json)>);

impl<'de> Deserialize<'de> for RefusedFields {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RefusedFields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RefusedFields, A::Error> {
                let mut fields = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    match REFUSED.iter().find(|refusal| refusal.name == key) {
                        Some(refusal) => fields.push((refusal.name, map.next_value()?)),
                        None => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(RefusedFields(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl RefusedFields {
    /// The value of a field of the table that may pass (`tools` beside `"tool_choice": "none"`).
    pub fn take(&mut self, name: &str) -> Option<Json> {
        let at = self.0.iter().position(|(field, _)| *field == name)?;
        Some(self.0.swap_remove(at).1).filter(|value| !value.is_null())
    }

    /// Whether the table has a field of this name.
    pub fn knows(name: &str) -> bool {
        REFUSED.iter().any(|refusal| refusal.name == name)
    }
}

fn nothing(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::Array(items) => items.is_empty(),
        Json::Object(fields) => fields.is_empty(),
        Json::String(text) => text.is_empty(),
        _ => false,
    }
}

fn nothing_or_false(value: &Json) -> bool {
    nothing(value) || *value == false
}

fn nothing_or_zero(value: &Json) -> bool {
    nothing(value) || value.as_f64() == Some(0.0)
}

fn nothing_or_one(value: &Json) -> bool {
    nothing(value) || value.as_f64() == Some(1.0)
}

const fn refuse(
    name: &'static str,
    on: Endpoints,
    neutral: fn(&Json) -> bool,
    instead: &'static str,
) -> Refusal {
    Refusal { name, on, neutral, instead }
}

use Endpoints::{Both, Chat, Completions};

/// Fields that are accepted and change nothing: they steer accounting, storage or scheduling elsewhere.
pub const NO_OPS: &[&str] = &[
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "priority",
    "spaces_between_special_tokens",
];

const REFUSED: &[Refusal] = &[
    // Tools: a later version reads the model's calls.
    refuse(
        "tools",
        Chat,
        nothing,
        "; send \"tool_choice\": \"none\" to show them to the model without calls",
    ),
    refuse("tool_choice", Chat, |v| nothing(v) || v == "none", "; only \"none\" is"),
    refuse("parallel_tool_calls", Chat, |v| nothing(v) || v.is_boolean(), ""),
    refuse("functions", Chat, nothing, ""),
    refuse("function_call", Chat, |v| nothing(v) || v == "none", ""),
    // Constrained output.
    refuse("response_format", Both, |v| nothing(v) || v["type"] == "text", "; only {\"type\": \"text\"} is"),
    refuse("structured_outputs", Both, nothing, ""),
    refuse("guided_json", Both, nothing, ""),
    refuse("guided_regex", Both, nothing, ""),
    refuse("guided_choice", Both, nothing, ""),
    refuse("guided_grammar", Both, nothing, ""),
    refuse("grammar", Both, nothing, ""),
    refuse("json_schema", Both, nothing, ""),
    refuse("regex", Both, nothing, ""),
    refuse("ebnf", Both, nothing, ""),
    // Other kinds of input and output.
    refuse("audio", Chat, nothing, ""),
    refuse("modalities", Chat, |v| nothing(v) || *v == serde_json::json!(["text"]), "; only [\"text\"] is"),
    refuse("prediction", Chat, nothing, ""),
    refuse("web_search_options", Chat, |v| v.is_null(), ""),
    refuse("verbosity", Chat, nothing, ""),
    refuse("suffix", Completions, nothing, ""),
    refuse("prompt_embeds", Completions, nothing, ""),
    // Prompts put together in other ways.
    refuse("chat_template", Chat, nothing, "; the checkpoint's own template is used"),
    refuse("documents", Chat, nothing, "; pass them inside chat_template_kwargs if the template reads them"),
    refuse("thinking", Chat, nothing, "; use \"chat_template_kwargs\": {\"enable_thinking\": true or false}"),
    refuse("thinking_token_budget", Chat, nothing, ""),
    refuse("include_reasoning", Chat, |v| nothing(v) || *v == true, ""),
    refuse("truncate_prompt_tokens", Both, nothing, ""),
    // Other ways to choose tokens.
    refuse("use_beam_search", Both, nothing_or_false, ""),
    refuse("length_penalty", Both, nothing_or_one, ""),
    refuse("allowed_token_ids", Both, nothing, "; use logit_bias"),
    refuse("bad_words", Both, nothing, "; use logit_bias"),
    refuse("logits_processors", Both, nothing, ""),
    refuse("typical_p", Both, nothing_or_one, ""),
    refuse("top_a", Both, nothing_or_zero, ""),
    refuse("mirostat", Both, nothing_or_zero, ""),
    refuse("dry_multiplier", Both, nothing_or_zero, ""),
    refuse("xtc_probability", Both, nothing_or_zero, ""),
    refuse("dynatemp_range", Both, nothing_or_zero, ""),
    refuse("no_repeat_ngram_size", Both, nothing_or_zero, ""),
    // More in the answer.
    refuse("return_token_ids", Both, nothing_or_false, "; use logprobs with return_tokens_as_token_ids"),
    refuse("stop_regex", Both, nothing, "; use stop"),
    refuse("cache_salt", Both, nothing, "; the prefix cache is shared by all requests"),
    refuse("lora_path", Both, nothing, ""),
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(body: Json, endpoint: Endpoints) -> Result<(), ApiError> {
        check_refused(&serde_json::from_value(body).unwrap(), endpoint)
    }

    #[test]
    fn every_field_is_refused_by_name_and_null_passes() {
        for refusal in REFUSED {
            let endpoint = if refusal.on == Completions { Completions } else { Chat };
            let error = check(json!({refusal.name: {"type": "x"}}), endpoint).unwrap_err();
            assert_eq!(error.status.as_u16(), 400);
            assert_eq!(error.param.as_deref(), Some(refusal.name));
            assert!(error.message.starts_with(&format!("{} is not supported", refusal.name)));
            assert_eq!(check(json!({refusal.name: null}), endpoint), Ok(()));
        }
    }

    #[test]
    fn the_documentation_lists_every_one() {
        let page = include_str!("../../API.md");
        for name in REFUSED.iter().map(|refusal| refusal.name).chain(NO_OPS.iter().copied()) {
            assert!(page.contains(&format!("`{name}`")), "{name} is not in API.md");
        }
    }

    #[test]
    fn a_value_that_asks_for_nothing_passes() {
        let body = json!({
            "tools": [], "tool_choice": "none", "parallel_tool_calls": true, "response_format": {"type": "text"},
            "modalities": ["text"], "use_beam_search": false, "length_penalty": 1.0, "mirostat": 0, "guided_json": "",
        });
        assert_eq!(check(body, Chat), Ok(()));
        assert_eq!(check(json!({"tools": [{"x": 1}], "tool_choice": "none"}), Chat), Ok(()));
        assert!(check(json!({"tools": [{"x": 1}]}), Chat).is_err());
        assert!(check(json!({"tool_choice": "auto"}), Chat).is_err());
        assert!(check(json!({"response_format": {"type": "json_object"}}), Completions).is_err());
    }

    #[test]
    fn a_field_of_the_other_endpoint_is_not_refused_here() {
        assert_eq!(check(json!({"suffix": "x"}), Chat), Ok(()));
        assert_eq!(check(json!({"tools": [1]}), Completions), Ok(()));
    }
}
