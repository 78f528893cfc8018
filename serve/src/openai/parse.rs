//! Request bodies: parsed strictly, with the JSON path of what is wrong, and with a list of what nobody
//! reads.

use serde::de::DeserializeOwned;

use super::ApiError;

/// A request body. It may be read in several passes, each of them a plain struct: serde's `flatten` would
/// lose the path of an error.
pub trait Body: Sized {
    /// Reads the body.
    ///
    /// # Errors
    /// A 400 naming the field.
    fn parse(bytes: &[u8], unknown: &mut Unknown) -> Result<Self, ApiError>;
}

/// Fields of a body that no pass reads.
#[derive(Debug, Default)]
pub struct Unknown {
    /// Ignored by every pass so far; `None` before the first.
    top: Option<Vec<String>>,
    /// Inside a field that some pass does read.
    nested: Vec<String>,
}

impl Unknown {
    /// Reads `bytes` as a `T`, noting what `T` ignores.
    ///
    /// # Errors
    /// A 400 with the path, what was expected and what was found.
    pub fn pass<T: DeserializeOwned>(&mut self, bytes: &[u8]) -> Result<T, ApiError> {
        // serde would also take a list, as the fields in order.
        if let Some(first) =
            bytes.iter().find(|byte| !byte.is_ascii_whitespace()).filter(|&&byte| byte != b'{')
        {
            let found = char::from(*first).escape_default();
            return Err(ApiError::bad_request(format!(
                "The request body must be a JSON object, found one that begins with '{found}'."
            )));
        }
        let mut ignored = Vec::new();
        let mut json = serde_json::Deserializer::from_slice(bytes);
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(&mut json, &mut track);
        let value = serde_ignored::deserialize(tracked, |path| {
            // serde_ignored writes `?` where an Option or a newtype was passed through.
            ignored.push(path.to_string().replace(".?", ""));
        });
        let value: T = match value.and_then(|value| json.end().map(|()| value)) {
            Ok(value) => value,
            Err(error) => return Err(explain(&track.path().to_string(), &error)),
        };
        let (nested, top): (Vec<_>, Vec<_>) = ignored.into_iter().partition(|path| path.contains('.'));
        self.nested.extend(nested);
        self.top = Some(match self.top.take() {
            None => top,
            Some(before) => before.into_iter().filter(|name| top.contains(name)).collect(),
        });
        Ok(value)
    }

    /// Paths that nobody read.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.top.iter().flatten().chain(&self.nested).map(String::as_str)
    }
}

/// serde_json's message with the path in front; its line and column only where the JSON itself is broken.
fn explain(path: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    if !error.is_data() {
        return ApiError {
            code: Some("invalid_json"),
            ..ApiError::bad_request(format!("The request body is not valid JSON: {message}."))
        };
    }
    let what = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
    if path == "." {
        // A missing field has no path yet; its name stands between backquotes.
        let field = what.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
        return ApiError {
            param: field.map(str::to_owned),
            ..ApiError::bad_request(format!("The request body: {what}."))
        };
    }
    ApiError::field(path, format!("{path}: {what}."))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsing is looked at")]
    struct First {
        model: Option<String>,
        items: Option<Vec<Item>>,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsing is looked at")]
    struct Item {
        count: u32,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsing is looked at")]
    struct Second {
        seed: Option<i64>,
    }

    fn fails(body: &str) -> (Option<String>, String) {
        let error = Unknown::default().pass::<First>(body.as_bytes()).unwrap_err();
        (error.param, error.message)
    }

    #[test]
    fn a_wrong_type_names_its_path() {
        let (param, message) = fails(r#"{"items": [{"count": 1}, {"count": "x"}]}"#);
        assert_eq!(param.as_deref(), Some("items[1].count"));
        assert_eq!(message, "items[1].count: invalid type: string \"x\", expected u32.");
    }

    #[test]
    fn broken_json_says_where() {
        for body in ["", "{", "{\"a\":}", "{} x"] {
            let (param, message) = fails(body);
            assert_eq!(param, None);
            assert!(message.starts_with("The request body is not valid JSON: "), "{message}");
            assert!(message.contains(" at line 1 column "), "{message}");
        }
    }

    #[test]
    fn a_body_that_is_no_object_says_so() {
        for body in ["3", " [\"m\"]", "\"x\""] {
            assert!(fails(body).1.starts_with("The request body must be a JSON object"), "{body}");
        }
    }

    #[test]
    fn what_no_pass_reads_is_known() {
        let body = br#"{"model": "m", "seed": 1, "zzz": {"a": 1}, "items": [{"count": 1, "colour": 2}]}"#;
        let mut unknown = Unknown::default();
        unknown.pass::<First>(body).unwrap();
        unknown.pass::<Second>(body).unwrap();
        let paths: Vec<&str> = unknown.paths().collect();
        assert_eq!(paths, ["zzz", "items.0.colour"]);
    }
}
