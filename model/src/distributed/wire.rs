//! Frames on a connection, and the values in them: little-endian, every length checked before it is believed.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

/// Bytes of a frame at most: a step of the longest contexts is a few MiB.
pub(super) const MAX_FRAME: usize = 256 << 20;

/// Bytes of a frame's length.
const HEADER: usize = 4;

/// Builds a frame.
#[derive(Debug)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn new() -> Self {
        Self(vec![0; HEADER])
    }

    pub(super) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn size(self, value: usize) -> Self {
        self.u64(value as u64)
    }

    pub(super) fn bytes(mut self, value: &[u8]) -> Self {
        self = self.size(value.len());
        self.0.extend(value);
        self
    }

    pub(super) fn text(self, value: &str) -> Self {
        self.bytes(value.as_bytes())
    }

    pub(super) fn i32s(mut self, values: &[i32]) -> Self {
        self = self.size(values.len());
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }

    pub(super) fn i64s(mut self, values: &[i64]) -> Self {
        self = self.size(values.len());
        self.0.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self
    }

    /// The frame, with its length in front.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let body = u32::try_from(self.0.len() - HEADER).unwrap_or(u32::MAX);
        self.0[..HEADER].copy_from_slice(&body.to_le_bytes());
        self.0
    }
}

/// Sends a frame in one write.
pub(super) fn send(mut stream: impl Write, frame: &[u8]) -> io::Result<()> {
    if frame.len() - HEADER > MAX_FRAME {
        let message = format!("a message of {} bytes; expected at most {MAX_FRAME}", frame.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    stream.write_all(frame)
}

/// Receives a frame's body of at most `most` bytes.
pub(super) fn receive(mut stream: impl Read, most: usize) -> io::Result<Vec<u8>> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let length = u32::from_le_bytes(header) as usize;
    if length > most {
        return Err(malformed(format!("a message of {length} bytes; expected at most {most}")));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(body)
}

/// [`receive`], all of it until `deadline`, however slowly it comes. The stream has no read timeout afterwards.
pub(super) fn receive_until(stream: &TcpStream, most: usize, deadline: Instant) -> io::Result<Vec<u8>> {
    let body = receive(Until { stream, deadline }, most)?;
    stream.set_read_timeout(None).map(|()| body)
}

/// A stream that is read until a deadline.
struct Until<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, "no whole message came in time");
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(out).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => late(),
            _ => error,
        })
    }
}

pub(super) fn malformed(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

/// Takes a frame's body apart.
#[derive(Debug)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(body: &'a [u8]) -> Self {
        Self(body)
    }

    fn take(&mut self, bytes: usize) -> io::Result<&'a [u8]> {
        let Some((taken, rest)) = self.0.split_at_checked(bytes) else {
            let found = self.0.len();
            return Err(malformed(format!(
                "a message that ends early: {bytes} bytes more expected, {found} found"
            )));
        };
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn u8(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(bytes))
    }

    pub(super) fn size(&mut self) -> io::Result<usize> {
        usize::try_from(self.u64()?).map_err(|_| malformed("a size beyond this machine's"))
    }

    pub(super) fn bytes(&mut self) -> io::Result<&'a [u8]> {
        let length = self.size()?;
        self.take(length)
    }

    pub(super) fn text(&mut self) -> io::Result<String> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| malformed("text that is not UTF-8"))
    }

    /// A list of elements of `N` bytes each.
    fn list<const N: usize, T>(&mut self, of: impl Fn([u8; N]) -> T) -> io::Result<Vec<T>> {
        let count = self.size()?;
        let bytes = self.take(count.checked_mul(N).ok_or_else(|| malformed("a list that is too long"))?)?;
        let (elements, _) = bytes.as_chunks::<N>();
        Ok(elements.iter().map(|element| of(*element)).collect())
    }

    pub(super) fn i32s(&mut self) -> io::Result<Vec<i32>> {
        self.list(i32::from_le_bytes)
    }

    pub(super) fn i64s(&mut self) -> io::Result<Vec<i64>> {
        self.list(i64::from_le_bytes)
    }

    /// Fails unless everything was read.
    pub(super) fn end(self) -> io::Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(malformed(format!("{} bytes too many", self.0.len()))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in() {
        let frame = Writer::new().u8(7).text("é").i32s(&[-1, 2]).i64s(&[i64::MIN]).size(9).finish();
        let mut wire = Vec::new();
        send(&mut wire, &frame).unwrap();
        let body = receive(&wire[..], 100).unwrap();
        let mut reader = Reader::new(&body);
        assert_eq!((reader.u8().unwrap(), reader.text().unwrap()), (7, "é".to_owned()));
        assert_eq!((reader.i32s().unwrap(), reader.i64s().unwrap()), (vec![-1, 2], vec![i64::MIN]));
        assert_eq!(reader.size().unwrap(), 9);
        reader.end().unwrap();
    }

    #[test]
    fn lengths_are_not_believed() {
        let refused = |bytes: &[u8], most| receive(bytes, most).unwrap_err().to_string();
        assert!(refused(&[255, 255, 255, 255, 0], 100).contains("expected at most 100"));
        assert!(receive(&[4, 0, 0, 0, 1][..], 100).is_err(), "it ends early");
        let huge = Writer::new().size(usize::MAX).finish();
        for list in [Reader::new(&huge[4..]).i32s().err(), Reader::new(&huge[4..]).i64s().err()] {
            assert!(list.unwrap().to_string().contains("too long"));
        }
        assert!(Reader::new(&huge[4..]).bytes().unwrap_err().to_string().contains("ends early"));
        assert!(Reader::new(&[1]).end().unwrap_err().to_string().contains("1 bytes too many"));
    }
}
