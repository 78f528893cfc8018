//! Server-sent events, from bytes as they come.

/// Collects the data of events. Lines end with `\n` or `\r\n`; everything but `data` is passed over.
#[derive(Debug, Default)]
pub(super) struct Events {
    line: Vec<u8>,
    data: Option<Vec<u8>>,
}

impl Events {
    /// The events that end in `bytes`.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut events = Vec::new();
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                events.extend(self.end_line(&line));
            }
        }
        events
    }

    fn end_line(&mut self, line: &[u8]) -> Option<Vec<u8>> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            return self.data.take();
        }
        if let Some(value) = line.strip_prefix(b"data:") {
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &mut self.data {
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
                none => *none = Some(value.to_vec()),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": ping\n\ndata: {\"a\": 1}\n\nevent: x\r\nid: 3\r\ndata:two\r\ndata: lines\r\n\r\ndata: \n\n\
                          data: gr\u{fc}n\n\ndata: cut off\n";

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        let expected = ["{\"a\": 1}", "two\nlines", "", "gr\u{fc}n"];
        let bytes = STREAM.as_bytes();
        for size in 1..=bytes.len() {
            let mut events = Events::default();
            let found: Vec<Vec<u8>> = bytes.chunks(size).flat_map(|piece| events.push(piece)).collect();
            let found: Vec<&str> = found.iter().map(|data| std::str::from_utf8(data).unwrap()).collect();
            assert_eq!(found, expected, "in pieces of {size}");
        }
        for cut in 0..=bytes.len() {
            let mut events = Events::default();
            let found = [events.push(&bytes[..cut]), events.push(&bytes[cut..])].concat();
            assert_eq!(found.len(), expected.len(), "cut at {cut}");
        }
    }
}
