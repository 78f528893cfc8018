//! `tojson` as HF transformers defines it for chat templates: Python's `json.dumps`, byte for byte.
//!
//! minijinja's own filter escapes for HTML and knows no `ensure_ascii`, so templates written for transformers
//! would render differently.

use std::fmt::Write as _;

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde_json::Value as Json;

/// The filter: `value | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is undefined"));
    }
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => match (indent.as_usize(), indent.as_str()) {
            (Some(width), _) => Some(" ".repeat(width)),
            (None, Some(text)) => Some(text.to_owned()),
            (None, None) => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "tojson: indent must be a number or a string",
                ));
            }
        },
    };
    let separators = match kwargs.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => {
            let pair: Vec<String> = pair.try_iter()?.map(|part| part.to_string()).collect();
            let [item, key] = <[String; 2]>::try_from(pair).map_err(|_| {
                Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair of strings")
            })?;
            (item, key)
        }
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let dumper = Dumper {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        separators,
    };
    kwargs.assert_all_used()?;
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, format!("tojson: {error}")))?;
    let mut out = String::new();
    dumper.dump(&json, 0, &mut out);
    Ok(Value::from(out))
}

struct Dumper {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    /// Between items, and between key and value.
    separators: (String, String),
}

impl Dumper {
    fn dump(&self, value: &Json, depth: usize, out: &mut String) {
        match value {
            Json::Null => out.push_str("null"),
            Json::Bool(true) => out.push_str("true"),
            Json::Bool(false) => out.push_str("false"),
            Json::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => out.push_str(&python_float(float)),
                None => out.push_str(&number.to_string()),
            },
            Json::String(text) => self.string(text, out),
            Json::Array(items) => {
                self.container('[', ']', items.iter(), depth, out, |item, out| {
                    self.dump(item, depth + 1, out)
                });
            }
            Json::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(b.0));
                }
                self.container('{', '}', entries.into_iter(), depth, out, |(key, value), out| {
                    self.string(key, out);
                    out.push_str(&self.separators.1);
                    self.dump(value, depth + 1, out);
                });
            }
        }
    }

    fn container<T>(
        &self,
        open: char,
        close: char,
        items: impl ExactSizeIterator<Item = T>,
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(T, &mut String),
    ) {
        out.push(open);
        let empty = items.len() == 0;
        for (i, item) in items.enumerate() {
            if i > 0 {
                out.push_str(&self.separators.0);
            }
            self.new_line(depth + 1, out);
            write(item, out);
        }
        if !empty {
            self.new_line(depth, out);
        }
        out.push(close);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
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
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a String cannot fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `repr(float)`: the shortest digits that come back, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if value == 0.0 {
        return if value.is_sign_negative() { "-0.0".into() } else { "0.0".into() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if exponent < -4 => format!("{digits}e-{:02}", -exponent),
        Ok(exponent) if exponent >= 16 => format!("{digits}e+{exponent:02}"),
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::value::Serde;
    use minijinja::{Environment, context};

    use super::*;

    fn render(expression: &str) -> String {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        let json = serde_json::json!({
            "b": [1, 2.0, 1e-7, 1.5e300, -0.0, null, true],
            "a": {"ключ <&>": "é\"\\\n\u{1}\u{7f}🙂", "empty": {}, "none": []},
        });
        env.render_str(&format!("{{{{ x | {expression} }}}}"), context! { x => Value::from(Serde(json)) })
            .unwrap()
    }

    // What Python 3's json.dumps prints for the same values.
    #[test]
    fn defaults_are_those_of_json_dumps() {
        assert_eq!(
            render("tojson"),
            "{\"b\": [1, 2.0, 1e-07, 1.5e+300, -0.0, null, true], \"a\": {\"ключ <&>\": \"é\\\"\\\\\\n\\u0001\u{7f}🙂\", \
             \"empty\": {}, \"none\": []}}"
        );
    }

    #[test]
    fn ensure_ascii_escapes_by_utf16() {
        assert_eq!(
            render("tojson(ensure_ascii=True, sort_keys=True)"),
            "{\"a\": {\"empty\": {}, \"none\": [], \"\\u043a\\u043b\\u044e\\u0447 <&>\": \
             \"\\u00e9\\\"\\\\\\n\\u0001\\u007f\\ud83d\\ude42\"}, \"b\": [1, 2.0, 1e-07, 1.5e+300, -0.0, null, true]}"
        );
    }

    #[test]
    fn indent_puts_each_item_on_a_line() {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        let text = env.render_str("{{ {'k': [1, {}]} | tojson(indent=2) }}", ()).unwrap();
        assert_eq!(text, "{\n  \"k\": [\n    1,\n    {}\n  ]\n}");
        let text = env.render_str("{{ {'k': [1, 2]} | tojson(separators=(',', ':')) }}", ()).unwrap();
        assert_eq!(text, "{\"k\":[1,2]}");
    }

    #[test]
    fn what_json_dumps_does_not_know_is_an_error() {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        assert!(env.render_str("{{ nothing | tojson }}", ()).is_err());
        assert!(env.render_str("{{ 1 | tojson(colour=1) }}", ()).is_err());
    }

    #[test]
    fn floats_print_as_python_prints_them() {
        for (value, text) in [
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1e22, "1e+22"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (123456789.125, "123456789.125"),
            (-1.25e-10, "-1.25e-10"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }
}
