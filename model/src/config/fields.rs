//! Typed access to the fields of a JSON object, with errors that name them.

use serde_json::{Map, Value};

use super::ConfigError;

/// An object of the config, and the path that leads to it.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a str,
}

impl<'a> Fields<'a> {
    /// The object at `path` (empty for the config itself).
    pub(super) fn new(object: &'a Map<String, Value>, path: &'a str) -> Self {
        Self { object, path }
    }

    /// The full name of `field`, as messages show it.
    pub(super) fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// The value, unless it is absent or null.
    pub(super) fn value(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    /// "`field` is V; expected E".
    pub(super) fn invalid(&self, field: &str, found: &Value, expected: impl Into<String>) -> ConfigError {
        ConfigError::Invalid { field: self.name(field), found: shorten(found), expected: expected.into() }
    }

    /// "`field` is missing; expected E".
    pub(super) fn missing(&self, field: &str, expected: impl Into<String>) -> ConfigError {
        ConfigError::Missing { field: self.name(field), expected: expected.into() }
    }

    /// An integer in `min..=max`, if present.
    pub(super) fn integer(&self, field: &str, min: usize, max: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        let found = value.as_u64().and_then(|n| usize::try_from(n).ok());
        match found {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.invalid(field, value, format!("an integer from {min} to {max}"))),
        }
    }

    /// A size: an integer from 1 to `i32::MAX`, the range of the kernels' indices.
    pub(super) fn size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        self.integer(field, 1, MAX_SIZE)
    }

    /// [`size`](Self::size) that must be there.
    pub(super) fn required_size(&self, field: &str) -> Result<usize, ConfigError> {
        self.size(field)?.ok_or_else(|| self.missing(field, format!("an integer from 1 to {MAX_SIZE}")))
    }

    /// A finite number above zero, if present.
    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
            _ => Err(self.invalid(field, value, "a number above 0")),
        }
    }

    /// [`positive`](Self::positive) that must be there.
    pub(super) fn required_positive(&self, field: &str) -> Result<f64, ConfigError> {
        self.positive(field)?.ok_or_else(|| self.missing(field, "a number above 0"))
    }

    /// A boolean, or `default`.
    pub(super) fn boolean(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.value(field) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.invalid(field, other, "true or false")),
        }
    }

    /// A string, if present.
    pub(super) fn string(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.invalid(field, other, "a string")),
        }
    }

    /// A list, if present.
    pub(super) fn list(&self, field: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.invalid(field, other, "a list")),
        }
    }

    /// A list of strings, if present.
    pub(super) fn strings(&self, field: &str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        let Some(items) = self.list(field)? else { return Ok(None) };
        let strings =
            items.iter().map(|item| item.as_str().ok_or_else(|| self.invalid(field, item, "strings only")));
        strings.collect::<Result<_, _>>().map(Some)
    }

    /// An object, if present.
    pub(super) fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.invalid(field, other, "an object")),
        }
    }

    /// Refuses any value but `only`; absent means `only`.
    pub(super) fn only(&self, field: &str, only: impl Into<Value>) -> Result<(), ConfigError> {
        let only = only.into();
        match self.value(field) {
            Some(found) if *found != only => {
                Err(self.invalid(field, found, format!("{only} (nothing else is supported)")))
            }
            _ => Ok(()),
        }
    }
}

/// The largest size that a 32-bit index reaches.
const MAX_SIZE: usize = i32::MAX as usize;

/// A value as messages show it.
pub(super) fn shorten(value: &Value) -> String {
    const LIMIT: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
