//! What ranks say to each other.

use std::io;
use std::sync::Arc;

use dsa80_reference::{Batch, DType, SamplingParams};

use super::wire::{Reader, Writer, malformed};
use crate::engine::{SampleTarget, Step, StepLimits};

/// Changes with every change of a message: ranks of different versions refuse each other.
const PROTOCOL: u64 = 2;
/// In front of a first message, so that a stranger is told from a rank.
const MAGIC: u64 = u64::from_le_bytes(*b"dsa80bus");

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    /// Rank 0's orders, and the answers to them.
    Orders = 0,
    /// Signs of life, and of failure.
    Watch = 1,
    /// Parts of collectives.
    Collectives = 2,
}

/// All of them, in order of their numbers.
pub(super) const CHANNELS: [Channel; 3] = [Channel::Orders, Channel::Watch, Channel::Collectives];

/// The first message of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) rank: usize,
    pub(super) channel: Channel,
    pub(super) creed: Creed,
}

/// What all ranks must agree on: by name, and as each has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Creed(pub Vec<(String, String)>);

impl Creed {
    /// What another rank has otherwise, in words.
    pub(super) fn difference(&self, rank: usize, other: &Self) -> Option<String> {
        let Self(own) = self;
        let Self(theirs) = other;
        let pair = own.iter().zip(theirs).find(|(own, theirs)| own != theirs);
        match pair {
            Some(((name, own), (theirs_name, theirs))) if name == theirs_name => {
                Some(format!("{name} is {theirs} on rank {rank}, and {own} on rank 0"))
            }
            None if own.len() == theirs.len() => None,
            _ => Some(format!("rank {rank} is of another version of dsa80 than rank 0")),
        }
    }
}

impl Hello {
    pub(super) fn encode(&self) -> Vec<u8> {
        let writer = Writer::new().u64(MAGIC).u64(PROTOCOL).size(self.rank).u8(self.channel as u8);
        let Creed(articles) = &self.creed;
        let writer = writer.size(articles.len());
        articles.iter().fold(writer, |writer, (name, value)| writer.text(name).text(value)).finish()
    }

    pub(super) fn decode(body: &[u8]) -> io::Result<Self> {
        whole(body, |reader| {
            if reader.u64()? != MAGIC {
                return Err(malformed("not a rank of dsa80"));
            }
            let protocol = reader.u64()?;
            if protocol != PROTOCOL {
                let message = format!(
                    "a rank speaks version {protocol} of the protocol between ranks, and rank 0 version {PROTOCOL}: all ranks need the \
                     same version of dsa80"
                );
                return Err(io::Error::new(io::ErrorKind::Unsupported, message));
            }
            let (rank, channel) = (reader.size()?, reader.u8()?);
            let channel =
                *CHANNELS.get(usize::from(channel)).ok_or_else(|| malformed("an unknown channel"))?;
            let mut articles = Vec::new();
            for _ in 0..reader.size()? {
                articles.push((reader.text()?, reader.text()?));
            }
            Ok(Self { rank, channel, creed: Creed(articles) })
        })
    }
}

/// Takes a body apart, of which nothing may be left.
fn whole<T>(body: &[u8], take: impl FnOnce(&mut Reader<'_>) -> io::Result<T>) -> io::Result<T> {
    let mut reader = Reader::new(body);
    let taken = take(&mut reader)?;
    reader.end().map(|()| taken)
}

/// What rank 0 tells another rank to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Order {
    /// Begin: with what rank 0's collectives need to be joined.
    Begin(Vec<u8>),
    /// The limits that hold for all.
    Agreed(StepLimits),
    Step(Arc<Step>),
    RecordGraphs,
    /// There is nothing more to do.
    Leave,
}

/// What another rank answers.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answer {
    /// It has a device, of this kind.
    Opened(String),
    /// The limits that it could have.
    Offered(StepLimits),
    /// Weights and caches are in place.
    Loaded,
    /// Decode steps are recorded.
    Recorded,
}

impl Order {
    pub(super) fn encode(&self) -> Vec<u8> {
        let writer = Writer::new();
        match self {
            Self::Begin(bytes) => writer.u8(0).bytes(bytes).finish(),
            Self::Agreed(limits) => put_limits(writer.u8(1), limits).finish(),
            Self::Step(step) => put_step(writer.u8(2), step).finish(),
            Self::RecordGraphs => writer.u8(3).finish(),
            Self::Leave => writer.u8(4).finish(),
        }
    }

    pub(super) fn decode(body: &[u8]) -> io::Result<Self> {
        whole(body, |reader| match reader.u8()? {
            0 => Ok(Self::Begin(reader.bytes()?.to_vec())),
            1 => take_limits(reader).map(Self::Agreed),
            2 => Ok(Self::Step(Arc::new(take_step(reader)?))),
            3 => Ok(Self::RecordGraphs),
            4 => Ok(Self::Leave),
            other => Err(unknown("order", other)),
        })
    }
}

impl Answer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let writer = Writer::new();
        match self {
            Self::Opened(device) => writer.u8(0).text(device).finish(),
            Self::Offered(limits) => put_limits(writer.u8(1), limits).finish(),
            Self::Loaded => writer.u8(2).finish(),
            Self::Recorded => writer.u8(3).finish(),
        }
    }

    pub(super) fn decode(body: &[u8]) -> io::Result<Self> {
        whole(body, |reader| match reader.u8()? {
            0 => reader.text().map(Self::Opened),
            1 => take_limits(reader).map(Self::Offered),
            2 => Ok(Self::Loaded),
            3 => Ok(Self::Recorded),
            other => Err(unknown("answer", other)),
        })
    }
}

/// How a rank is: rank 0's answer to a [`Hello`], and what watches say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sign {
    /// With how far it is, and what it does.
    Alive { count: u64, doing: String },
    /// It, or another, and why; or the one that came is not let in.
    Failed(String),
    /// The rank goes because all is done.
    Left,
    /// All ranks are there.
    Come,
}

impl Sign {
    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Alive { count, doing } => Writer::new().u8(0).u64(*count).text(doing).finish(),
            Self::Failed(reason) => Writer::new().u8(1).text(reason).finish(),
            Self::Left => Writer::new().u8(2).finish(),
            Self::Come => Writer::new().u8(3).finish(),
        }
    }

    pub(super) fn decode(body: &[u8]) -> io::Result<Self> {
        whole(body, |reader| match reader.u8()? {
            0 => Ok(Self::Alive { count: reader.u64()?, doing: reader.text()? }),
            1 => reader.text().map(Self::Failed),
            2 => Ok(Self::Left),
            3 => Ok(Self::Come),
            other => Err(unknown("sign", other)),
        })
    }
}

fn unknown(what: &str, number: u8) -> io::Error {
    malformed(format!("an unknown {what}, number {number}"))
}

/// Taken apart whole, so that a new field is not forgotten.
fn put_limits(writer: Writer, limits: &StepLimits) -> Writer {
    let &StepLimits {
        page_size,
        num_pages,
        cache_dtype,
        max_batch_tokens,
        max_batch_seqs,
        max_model_len,
        vocab_size,
        max_logprobs,
    } = limits;
    writer
        .u8(u8::from(cache_dtype == DType::Fp8))
        .size(page_size)
        .size(num_pages)
        .size(max_batch_tokens)
        .size(max_batch_seqs)
        .size(max_model_len)
        .size(vocab_size)
        .size(max_logprobs)
}

fn take_limits(reader: &mut Reader<'_>) -> io::Result<StepLimits> {
    Ok(StepLimits {
        cache_dtype: if reader.u8()? == 1 { DType::Fp8 } else { DType::Act },
        page_size: reader.size()?,
        num_pages: reader.size()?,
        max_batch_tokens: reader.size()?,
        max_batch_seqs: reader.size()?,
        max_model_len: reader.size()?,
        vocab_size: reader.size()?,
        max_logprobs: reader.size()?,
    })
}

/// The batch, and the rows that are projected to logits. How their tokens are chosen is rank 0's own affair.
fn put_step(writer: Writer, Step { batch, targets }: &Step) -> Writer {
    let Batch {
        page_size,
        token_ids,
        positions,
        seq_ids,
        slot_mapping,
        cu_seqlens,
        context_lens,
        block_table,
        max_blocks,
        max_context_len,
    } = batch;
    let writer = writer
        .size(*page_size)
        .size(*max_blocks)
        .size(*max_context_len)
        .i32s(token_ids)
        .i32s(positions)
        .i32s(seq_ids)
        .i64s(slot_mapping)
        .i32s(cu_seqlens)
        .i32s(context_lens)
        .i32s(block_table)
        .size(targets.len());
    targets.iter().fold(writer, |writer, target| writer.size(target.row))
}

fn take_step(reader: &mut Reader<'_>) -> io::Result<Step> {
    let (page_size, max_blocks, max_context_len) = (reader.size()?, reader.size()?, reader.size()?);
    let batch = Batch {
        page_size,
        max_blocks,
        max_context_len,
        token_ids: reader.i32s()?,
        positions: reader.i32s()?,
        seq_ids: reader.i32s()?,
        slot_mapping: reader.i64s()?,
        cu_seqlens: reader.i32s()?,
        context_lens: reader.i32s()?,
        block_table: reader.i32s()?,
    };
    let (params, rows) = (Arc::new(SamplingParams::default()), reader.size()?);
    let mut targets = Vec::new();
    for _ in 0..rows {
        targets.push(SampleTarget {
            row: reader.size()?,
            params: Arc::clone(&params),
            prompt: Arc::default(),
            output: Vec::new(),
            banned: Arc::default(),
            position: 0,
            forced: None,
            logprobs: None,
        });
    }
    Ok(Step { batch, targets })
}

#[cfg(test)]
mod tests {
    use dsa80_reference::SequenceSlice;

    use super::*;

    fn limits() -> StepLimits {
        StepLimits {
            page_size: 16,
            num_pages: 8,
            cache_dtype: DType::Fp8,
            max_batch_tokens: 512,
            max_batch_seqs: 20,
            max_model_len: 1000,
            vocab_size: 64,
            max_logprobs: 20,
        }
    }

    fn step() -> Step {
        let slice = SequenceSlice { token_ids: &[7, 8, 9], computed_len: 20, pages: &[5, 3] };
        let target = SampleTarget {
            row: 2,
            params: Arc::default(),
            prompt: Arc::default(),
            output: Vec::new(),
            banned: Arc::default(),
            position: 0,
            forced: None,
            logprobs: None,
        };
        Step { batch: Batch::new(16, &[slice.clone(), slice]).unwrap(), targets: vec![target] }
    }

    fn bodies() -> Vec<Vec<u8>> {
        let orders = [
            Order::Begin(vec![1, 2]),
            Order::Agreed(limits()),
            Order::Step(Arc::new(step())),
            Order::RecordGraphs,
            Order::Leave,
        ];
        let bodies = orders.map(|order| {
            let body = order.encode()[4..].to_vec();
            assert_eq!(Order::decode(&body).unwrap(), order);
            body
        });
        bodies.into()
    }

    #[test]
    fn orders_answers_and_signs_come_out_as_they_went_in() {
        bodies();
        for answer in [
            Answer::Opened("cpu".into()),
            Answer::Offered(StepLimits { cache_dtype: DType::Act, ..limits() }),
            Answer::Loaded,
            Answer::Recorded,
        ] {
            assert_eq!(Answer::decode(&answer.encode()[4..]).unwrap(), answer);
        }
        let alive = Sign::Alive { count: 7, doing: "a step".into() };
        for sign in [alive, Sign::Failed("out of pages".into()), Sign::Left, Sign::Come] {
            assert_eq!(Sign::decode(&sign.encode()[4..]).unwrap(), sign);
        }
        let hello = Hello { rank: 3, channel: Channel::Watch, creed: Creed(vec![("a".into(), "b".into())]) };
        assert_eq!(Hello::decode(&hello.encode()[4..]).unwrap(), hello);
    }

    #[test]
    fn what_is_cut_off_or_changed_is_refused_or_read_but_never_a_panic() {
        for body in bodies() {
            for end in 0..body.len() {
                assert!(Order::decode(&body[..end]).is_err(), "{end} of {} bytes", body.len());
            }
            for at in 0..body.len() {
                for flip in [1, 128, 255] {
                    let mut body = body.clone();
                    body[at] ^= flip;
                    let _ = Order::decode(&body);
                    let _ = Answer::decode(&body);
                }
            }
        }
        assert!(Hello::decode(b"GET / HTTP/1.1\r\n").unwrap_err().to_string().contains("not a rank"));
    }

    #[test]
    fn ranks_that_differ_are_told_in_what() {
        let creed = |value: &str| Creed(vec![("version".into(), "1".into()), ("--tp".into(), value.into())]);
        assert_eq!(creed("2").difference(1, &creed("2")), None);
        assert_eq!(creed("2").difference(1, &creed("4")).unwrap(), "--tp is 4 on rank 1, and 2 on rank 0");
        assert!(creed("2").difference(1, &Creed::default()).unwrap().contains("another version"));
    }
}
