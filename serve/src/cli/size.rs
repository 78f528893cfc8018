//! Sizes on the command line and on the terminal.

/// Parses `1048576`, `512M`, `1.5G`, `2GiB`: powers of 1024.
pub(super) fn parse(text: &str) -> Result<usize, String> {
    let expected = || format!("expected a size such as 512M, 1.5G or a number of bytes, found {text:?}");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(expected()),
    };
    let number: f64 = digits.trim().parse().map_err(|_| expected())?;
    let bytes = number * (1_u64 << unit) as f64;
    // Above 2^53 a float no longer counts bytes; no memory is that large.
    if number.is_finite() && (0.0..9e15).contains(&bytes) { Ok(bytes as usize) } else { Err(expected()) }
}

/// `1.5 GiB`.
pub(super) fn show(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_and_without_units() {
        for (text, bytes) in
            [("0", 0), ("17", 17), ("512M", 512 << 20), ("1.5G", 3 << 29), ("2 GiB", 2 << 30)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1X", "1e300", "nan", "inf"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(show(1023), "1023 B");
        assert_eq!(show(1536), "1.5 KiB");
        assert_eq!(show(474_000_000_000), "441.4 GiB");
    }
}
