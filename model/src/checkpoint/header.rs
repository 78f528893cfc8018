//! The header of a safetensors file: eight bytes of length, a JSON object of tensors, then their bytes
//! without gaps.
//!
//! The `safetensors` crate judges dtypes, shapes and offsets. Before it is asked, each entry is looked at
//! alone, because the crate's errors mostly do not say which tensor is wrong, and it takes the last of two
//! entries of one name.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

/// Bytes of the length field.
const LENGTH: usize = 8;

/// The same bound as the `safetensors` crate's.
const MAX_HEADER: usize = 100_000_000;

/// One tensor of a file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) info: TensorInfo,
    /// Its bytes, counted from the start of the file.
    pub(super) bytes: Range<usize>,
}

/// Parses and checks the header of `file`. The error is the reason alone; the caller knows the file's name.
pub(super) fn parse(file: &[u8]) -> Result<Vec<Entry>, String> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH>() else {
        return Err(format!("expected at least {LENGTH} bytes, found {}", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().filter(|n| *n <= MAX_HEADER).and_then(|n| rest.get(..n));
    let Some(header) = header else {
        return Err(format!(
            "its header claims {length} bytes; expected at most {} (truncated, or not safetensors)",
            rest.len().min(MAX_HEADER)
        ));
    };
    let data_len = rest.len() - header.len();
    let data_start = LENGTH + header.len();

    let header = std::str::from_utf8(header).map_err(|e| format!("its header is not UTF-8: {e}"))?;
    let Tensors(mut tensors) = serde_json::from_str(header).map_err(|e| format!("its header: {e}"))?;
    for (name, info) in &tensors {
        check_entry(info, data_len).map_err(|reason| format!("tensor `{name}`: {reason}"))?;
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    check_coverage(&tensors, data_len)?;
    let entries = tensors.iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        Entry { name: name.clone(), info: info.clone(), bytes: data_start + start..data_start + end }
    });
    let entries = entries.collect();
    Metadata::new(None, tensors).map_err(|e| e.to_string())?;
    Ok(entries)
}

fn check_entry(info: &TensorInfo, data_len: usize) -> Result<(), String> {
    let (start, end) = info.data_offsets;
    if start > end || end > data_len {
        return Err(format!(
            "data_offsets [{start}, {end}]; expected an ascending pair inside the {data_len} bytes of data"
        ));
    }
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, dim| bits.checked_mul(*dim));
    match bits {
        Some(bits) if bits % 8 == 0 && bits / 8 == end - start => Ok(()),
        Some(bits) => Err(format!(
            "{} elements of shape {:?} take {} bytes; its data_offsets span {}",
            info.dtype,
            info.shape,
            bits.div_ceil(8),
            end - start
        )),
        None => Err(format!(
            "shape {:?} of {} elements has more bytes than can be addressed",
            info.shape, info.dtype
        )),
    }
}

/// Tensors in the order of their offsets must follow each other without gap or overlap, to the end of the
/// file.
fn check_coverage(tensors: &[(String, TensorInfo)], data_len: usize) -> Result<(), String> {
    let mut end = 0;
    let mut previous = "the header";
    for (name, info) in tensors {
        let start = info.data_offsets.0;
        if start != end {
            let what = if start < end { "overlaps" } else { "leaves a gap after" };
            return Err(format!(
                "tensor `{name}` starts at {start} and {what} {previous}, which ends at {end}"
            ));
        }
        end = info.data_offsets.1;
        previous = name;
    }
    if end == data_len { Ok(()) } else { Err(format!("its tensors take {end} bytes; found {data_len}")) }
}

/// The header's object, in file order, without `__metadata__`.
struct Tensors(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TensorsVisitor)
    }
}

struct TensorsVisitor;

impl<'de> Visitor<'de> for TensorsVisitor {
    type Value = Tensors;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensors, A::Error> {
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(A::Error::custom(format_args!("tensor `{name}` is listed twice")));
            }
            let wrong = |e: A::Error| A::Error::custom(format_args!("tensor `{name}`: {e}"));
            if name == "__metadata__" {
                map.next_value::<Option<BTreeMap<String, String>>>().map_err(wrong)?;
            } else {
                let info = map.next_value::<TensorInfo>().map_err(wrong)?;
                tensors.push((name, info));
            }
        }
        Ok(Tensors(tensors))
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes());
        file.resize(file.len() + data, 0);
        file
    }

    #[test]
    fn entries_in_the_order_of_their_offsets() {
        let header = r#"{"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
            "empty":{"dtype":"U8","shape":[0,9],"data_offsets":[4,4]}}"#;
        let file = file(header, 16);
        let entries = parse(&file).unwrap();
        let found: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.bytes.clone())).collect();
        let start = file.len() - 16;
        assert_eq!(
            found,
            [("a", start..start + 4), ("empty", start + 4..start + 4), ("b", start + 4..start + 16)]
        );
        assert!(SafeTensors::deserialize(&file).is_ok());
    }

    /// One case a way to be malformed; the reason names the tensor wherever one is to blame.
    #[test]
    fn malformed_headers() {
        let f32s = |name: &str, shape: &str, offsets: &str| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#)
        };
        let one = |entry: String| file(&format!("{{{entry}}}"), 8);
        let two = |a: String, b: String| file(&format!("{{{a},{b}}}"), 8);
        let claim = |length: u64| [&length.to_le_bytes(), b"{}".as_slice()].concat();
        let cases = [
            (Vec::new(), "expected at least 8 bytes, found 0"),
            (vec![0; 7], "expected at least 8 bytes, found 7"),
            (claim(u64::MAX), "claims 18446744073709551615 bytes"),
            (claim(i64::MAX as u64), "claims 9223372036854775807 bytes"),
            (claim(100_000_001), "claims 100000001 bytes"),
            (claim(3), "claims 3 bytes; expected at most 2"),
            (claim(0), "its header: EOF"),
            (file("[]", 0), "expected an object of tensors"),
            (file("{\"a\": \u{1}}", 0), "its header:"),
            (file(&"[".repeat(10_000), 0), "its header:"),
            ([file("{  }", 0), vec![1]].concat(), "found 1"),
            (one(f32s("a", "[1]", "[0,4]")), "its tensors take 4 bytes; found 8"),
            (one(f32s("a", "[2]", "[8,0]")), "tensor `a`: data_offsets [8, 0]"),
            (one(f32s("a", "[4]", "[0,16]")), "tensor `a`: data_offsets [0, 16]"),
            (
                one(f32s("a", "[3]", "[0,8]")),
                "tensor `a`: F32 elements of shape [3] take 12 bytes; its data_offsets span 8",
            ),
            (
                one(f32s("a", "[4611686018427387904,4]", "[0,8]")),
                "tensor `a`: shape [4611686018427387904, 4]",
            ),
            (one(f32s("a", "[-2]", "[0,8]")), "tensor `a`: invalid value: integer `-2`"),
            (one(f32s("a", "[1.5]", "[0,8]")), "tensor `a`: invalid type: floating point"),
            (one(f32s("a", "[2]", "[0]")), "tensor `a`: invalid length 1"),
            (one(f32s("a", "[2]", "[4,12]")), "tensor `a`: data_offsets [4, 12]"),
            (one(f32s("a", "[1]", "[4,8]")), "tensor `a` starts at 4 and leaves a gap after the header"),
            (
                one(r#""a":{"dtype":"F128","shape":[2],"data_offsets":[0,8]}"#.to_owned()),
                "tensor `a`: unknown variant `F128`",
            ),
            (
                one(r#""a":{"shape":[2],"data_offsets":[0,8]}"#.to_owned()),
                "tensor `a`: missing field `dtype`",
            ),
            (one(r#""__metadata__":[]"#.to_owned()), "tensor `__metadata__`: invalid type"),
            (two(f32s("a", "[1]", "[0,4]"), f32s("a", "[1]", "[4,8]")), "tensor `a` is listed twice"),
            (two(f32s("a", "[0]", "[0,0]"), f32s("a", "[2]", "[0,8]")), "tensor `a` is listed twice"),
            (
                two(f32s("a", "[2]", "[0,8]"), f32s("b", "[1]", "[4,8]")),
                "tensor `b` starts at 4 and overlaps a, which ends at 8",
            ),
            (
                two(f32s("a", "[1]", "[0,4]"), f32s("b", "[1]", "[0,4]")),
                "tensor `b` starts at 0 and overlaps a",
            ),
        ];
        for (file, expected) in cases {
            let reason = parse(&file).unwrap_err();
            assert!(reason.contains(expected), "{reason}\nexpected {expected}");
        }
        let mut broken = one(f32s("a", "[2]", "[0,8]"));
        assert!(parse(&broken).is_ok());
        broken[10] = 0xff;
        assert!(parse(&broken).unwrap_err().contains("not UTF-8"));
    }
}
