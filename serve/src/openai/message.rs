//! Chat messages as clients send them.

use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::ApiError;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// Instructions, in OpenAI's newer word.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// A message.
#[derive(Debug, Clone, Deserialize)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// What is said; absent only in an assistant's message that calls tools.
    pub content: Option<Content>,
    /// The speaker's name.
    pub name: Option<String>,
    /// An assistant's earlier tool calls.
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Which call a tool message answers.
    pub tool_call_id: Option<String>,
    /// An assistant's earlier reasoning.
    pub reasoning_content: Option<String>,
    /// The same, as some servers and clients call it.
    pub reasoning: Option<String>,
}

/// A message's content.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of text parts")]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts; only those of type `text` are supported.
    Parts(Vec<ContentPart>),
}

/// A part of a message's content.
#[derive(Debug, Clone, Deserialize)]
pub struct ContentPart {
    /// `text`, or a kind that is refused.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text.
    pub text: Option<String>,
}

/// A tool call that an assistant made earlier.
#[derive(Debug, Clone, Deserialize)]
pub struct ToolCall {
    /// Its id.
    pub id: Option<String>,
    /// The function called.
    pub function: ToolFunction,
}

/// A called function.
#[derive(Debug, Clone, Deserialize)]
pub struct ToolFunction {
    /// Its name.
    pub name: String,
    /// Its arguments: a JSON object, in a string as OpenAI has it, or as it is.
    pub arguments: Option<Json>,
}

impl ChatMessage {
    /// The message as chat templates read it: arguments as objects, reasoning under both names, and no nulls.
    ///
    /// # Errors
    /// A 400 naming the part that cannot be rendered. `at` is the message's path.
    pub fn for_template(&self, at: &str) -> Result<Json, ApiError> {
        let mut message = Map::new();
        message.insert("role".into(), json!(self.role.as_str()));
        let calls = self.tool_calls.as_deref().unwrap_or_default();
        let calls_tools = self.role == Role::Assistant && !calls.is_empty();
        if self.content.is_none() && !calls_tools {
            return Err(ApiError::field(
                format!("{at}.content"),
                format!("{at}.content: expected a string or a list of text parts, found nothing."),
            ));
        }
        let content = match &self.content {
            None => json!(""),
            Some(Content::Text(text)) => json!(text),
            Some(Content::Parts(parts)) => {
                let parts = parts.iter().enumerate();
                json!(parts.map(|(i, part)| part.for_template(at, i)).collect::<Result<Vec<_>, _>>()?)
            }
        };
        message.insert("content".into(), content);
        for (key, value) in [("name", &self.name), ("tool_call_id", &self.tool_call_id)] {
            if let Some(value) = value {
                message.insert(key.into(), json!(value));
            }
        }
        if let Some(reasoning) = self.reasoning_content.as_ref().or(self.reasoning.as_ref()) {
            message.insert("reasoning_content".into(), json!(reasoning));
            message.insert("reasoning".into(), json!(reasoning));
        }
        if !calls.is_empty() {
            let calls = calls.iter().enumerate();
            let calls = calls.map(|(i, call)| call.for_template(at, i)).collect::<Result<Vec<_>, _>>()?;
            message.insert("tool_calls".into(), Json::Array(calls));
        }
        Ok(Json::Object(message))
    }

    /// About how many bytes of text it holds.
    pub fn len_hint(&self) -> usize {
        match &self.content {
            None => 0,
            Some(Content::Text(text)) => text.len(),
            Some(Content::Parts(parts)) => {
                parts.iter().filter_map(|part| part.text.as_ref()).map(String::len).sum()
            }
        }
    }
}

impl ContentPart {
    fn for_template(&self, at: &str, i: usize) -> Result<Json, ApiError> {
        let at = format!("{at}.content[{i}]");
        if self.kind != "text" {
            return Err(ApiError::unsupported(
                format!("{at}.type"),
                format!("{at}.type: this model reads text only, found {:?}.", self.kind),
            ));
        }
        let text = self.text.as_ref().ok_or_else(|| {
            ApiError::field(format!("{at}.text"), format!("{at}.text: a part of type \"text\" needs it."))
        })?;
        Ok(json!({"type": "text", "text": text}))
    }
}

impl ToolCall {
    fn for_template(&self, at: &str, i: usize) -> Result<Json, ApiError> {
        let arguments = match &self.function.arguments {
            None => json!({}),
            Some(Json::String(text)) if text.trim().is_empty() => json!({}),
            Some(Json::String(text)) => serde_json::from_str(text).unwrap_or(Json::Null),
            Some(other) => other.clone(),
        };
        if !arguments.is_object() {
            let at = format!("{at}.tool_calls[{i}].function.arguments");
            let message = format!("{at}: expected a JSON object, or a string that holds one.");
            return Err(ApiError::field(at, message));
        }
        Ok(json!({
            "id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments},
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(message: Json) -> Result<Json, ApiError> {
        serde_json::from_value::<ChatMessage>(message).unwrap().for_template("messages[2]")
    }

    #[test]
    fn arguments_become_objects_and_reasoning_has_both_names() {
        let message = render(json!({
            "role": "assistant", "content": null, "reasoning": "r",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}],
        }));
        let want = json!({
            "role": "assistant", "content": "", "reasoning_content": "r", "reasoning": "r",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        });
        assert_eq!(message.unwrap(), want);
    }

    #[test]
    fn what_cannot_be_rendered_is_named() {
        let param = |message: Json| render(message).unwrap_err().param.unwrap();
        assert_eq!(param(json!({"role": "user"})), "messages[2].content");
        assert_eq!(param(json!({"role": "assistant", "content": null})), "messages[2].content");
        assert_eq!(
            param(json!({"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]})),
            "messages[2].content[1].type"
        );
        assert_eq!(
            param(json!({"role": "user", "content": [{"type": "text"}]})),
            "messages[2].content[0].text"
        );
        let call = json!({"function": {"name": "f", "arguments": "[1]"}});
        assert_eq!(
            param(json!({"role": "assistant", "tool_calls": [call]})),
            "messages[2].tool_calls[0].function.arguments"
        );
    }
}
