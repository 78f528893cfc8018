//! A model whose cache holds tokens. Every step is checked against the contract, every visible slot against
//! the sequence that it should belong to; what comes next is a function of the whole visible context.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};

use dsa80_reference::{Batch, SamplingParams};

use crate::engine::{
    Event, FinishReason, Request, SampleTarget, Sampled, Step, StepError, StepLimits, StepModel,
    TokenLogprobs, Usage,
};

/// One slot of the cache.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    position: usize,
    token: u32,
    /// Stands for all tokens up to and including this one.
    context: u64,
}

/// What goes wrong in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    Error,
    Panic,
    /// One result too few.
    Short,
    /// A token outside the vocabulary.
    Token,
}

/// Lets a test hold the model inside a step.
pub(super) struct Gate {
    /// Told at the begin of every step.
    pub(super) entered: Sender<()>,
    /// One permit a step; when the other side is dropped, steps are free.
    pub(super) permits: Receiver<()>,
}

pub(super) struct MockModel {
    limits: StepLimits,
    slots: Vec<Option<Row>>,
    pub(super) fault: Option<(usize, Fault)>,
    pub(super) gate: Option<Gate>,
    /// All steps so far.
    pub(super) log: Arc<Mutex<Vec<Arc<Step>>>>,
    /// Why it was given up.
    pub(super) given_up: Arc<Mutex<Vec<String>>>,
}

impl MockModel {
    pub(super) fn new(limits: StepLimits) -> Self {
        let slots = vec![None; limits.num_pages * limits.page_size];
        Self { limits, slots, fault: None, gate: None, log: Arc::default(), given_up: Arc::default() }
    }

    /// What the contract says about a batch, before it is run.
    fn check_batch(&self, batch: &Batch) {
        let limits = &self.limits;
        assert_eq!(batch.page_size, limits.page_size);
        assert!((1..=limits.max_batch_tokens).contains(&batch.num_tokens()), "{} rows", batch.num_tokens());
        assert!((1..=limits.max_batch_seqs).contains(&batch.num_seqs()), "{} sequences", batch.num_seqs());
        assert!(batch.max_context_len <= limits.max_model_len);
        // No two sequences share a page into which either of them writes.
        let mut holders: HashMap<i32, Vec<usize>> = HashMap::new();
        for (entry, &page) in batch.block_table.iter().enumerate().filter(|(_, page)| **page >= 0) {
            assert!((page as usize) < limits.num_pages, "page {page}");
            holders.entry(page).or_default().push(entry / batch.max_blocks);
        }
        for (row, &slot) in batch.slot_mapping.iter().enumerate() {
            let page = (slot / limits.page_size as i64) as i32;
            assert_eq!(holders[&page], [batch.seq_ids[row] as usize], "page {page} is written and shared");
        }
    }

    fn write(&mut self, batch: &Batch) {
        for row in 0..batch.num_tokens() {
            let position = batch.positions[row] as usize;
            let token = batch.token_ids[row] as u32;
            let before = match position.checked_sub(1) {
                Some(before) => {
                    self.slots[batch.slot(row, before)].expect("the row before is written").context
                }
                None => 0,
            };
            let context = mix(before, u64::from(token) + 1);
            let slot = batch.slot_mapping[row] as usize;
            assert_eq!(slot, batch.slot(row, position));
            self.slots[slot] = Some(Row { position, token, context });
        }
    }

    /// The tokens that row `row` sees, which must form one chain from position 0.
    fn visible(&self, batch: &Batch, row: usize) -> Vec<u32> {
        let mut context = 0;
        (0..batch.visible(row))
            .map(|position| {
                let slot = batch.slot(row, position);
                let found =
                    self.slots[slot].unwrap_or_else(|| panic!("slot {slot} is read before it is written"));
                context = mix(context, u64::from(found.token) + 1);
                assert_eq!(found, Row { position, token: found.token, context }, "slot {slot} is stale");
                found.token
            })
            .collect()
    }

    fn answer(&self, batch: &Batch, target: &SampleTarget) -> Sampled {
        let visible = self.visible(batch, target.row);
        let position = target.position as usize;
        assert_eq!(position, visible.len(), "the new token comes behind the row");
        let known = position.min(target.prompt.len());
        assert_eq!(visible[..known], target.prompt[..known], "the cache holds another prompt");
        match target.forced {
            Some(token) => assert_eq!(token, target.prompt[position]),
            None if penalised(&target.params) => assert_eq!(visible[known..], target.output),
            None => assert!(target.output.is_empty(), "copied for nothing"),
        }
        assert!(target.banned.iter().all(|&token| (token as usize) < self.limits.vocab_size));
        let context = self.slots[batch.slot(target.row, position - 1)].expect("just read").context;
        let token = target
            .forced
            .unwrap_or_else(|| choose(context, &target.params, &target.banned, self.limits.vocab_size));
        Sampled { token, logprobs: target.logprobs.map(|top| logprobs(context, token, top)) }
    }
}

impl StepModel for MockModel {
    fn give_up(&mut self, reason: &str) {
        self.given_up.lock().unwrap().push(reason.to_owned());
    }

    fn step_while(
        &mut self,
        step: Arc<Step>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<Sampled>, StepError> {
        meanwhile();
        let number = {
            let mut log = self.log.lock().unwrap();
            log.push(Arc::clone(&step));
            log.len() - 1
        };
        if let Some(gate) = &self.gate {
            let _ = gate.entered.send(());
            let _ = gate.permits.recv();
        }
        let fault = self.fault.filter(|(at, _)| *at == number).map(|(_, fault)| fault);
        match fault {
            Some(Fault::Error) => return Err(StepError("rank 1 lost its device".into())),
            Some(Fault::Panic) => panic!("index out of bounds in a kernel"),
            _ => {}
        }
        self.check_batch(&step.batch);
        self.write(&step.batch);
        // A sequence without a target (in mid-prompt) is checked as well.
        for end in &step.batch.cu_seqlens[1..] {
            self.visible(&step.batch, *end as usize - 1);
        }
        assert!(step.targets.is_sorted_by(|a, b| a.row < b.row), "rows in ascending order, each once");
        let mut sampled: Vec<Sampled> =
            step.targets.iter().map(|target| self.answer(&step.batch, target)).collect();
        match fault {
            Some(Fault::Short) => drop(sampled.pop()),
            Some(Fault::Token) => sampled[0].token = self.limits.vocab_size as u32,
            _ => {}
        }
        Ok(sampled)
    }

    fn limits(&self) -> StepLimits {
        self.limits
    }
}

/// The events of `request` by definition: no cache, no batch, no engine. Cached tokens are 0.
pub(super) fn expected(request: &Request, eos: &[u32], vocab_size: usize) -> Vec<Event> {
    let mut events = vec![Event::Started { cached_tokens: 0 }];
    let contexts: Vec<u64> = request
        .prompt
        .iter()
        .scan(0, |context, &token| {
            *context = mix(*context, u64::from(token) + 1);
            Some(*context)
        })
        .collect();
    if let Some(top) = request.prompt_logprobs {
        let scores =
            contexts.iter().zip(&request.prompt[1..]).map(|(&c, &token)| Some(logprobs(c, token, top)));
        events.push(Event::Prompt(std::iter::once(None).chain(scores).collect()));
    }
    let mut context = contexts[contexts.len() - 1];
    let mut reason = FinishReason::Length;
    let mut generated = 0;
    while generated < request.max_tokens {
        let mut banned = request.stop_token_ids.clone();
        banned.extend(eos);
        if generated >= request.min_tokens {
            banned.clear();
        }
        let token = choose(context, &request.sampling, &banned, vocab_size);
        let logprobs = request.logprobs.map(|top| logprobs(context, token, top));
        events.push(Event::Token { id: token, logprobs });
        context = mix(context, u64::from(token) + 1);
        generated += 1;
        if request.stop_token_ids.contains(&token) || (!request.ignore_eos && eos.contains(&token)) {
            reason = FinishReason::Stop;
            break;
        }
    }
    let usage = Usage { prompt_tokens: request.prompt.len(), completion_tokens: generated, cached_tokens: 0 };
    events.push(Event::Finished { reason, usage });
    events
}

/// The token behind `context`.
fn choose(context: u64, params: &SamplingParams, banned: &[u32], vocab_size: usize) -> u32 {
    let mut token = (mix(context, params.seed) % vocab_size as u64) as u32;
    while banned.contains(&token) {
        token = (token + 1) % vocab_size as u32;
    }
    token
}

fn logprobs(context: u64, token: u32, top: usize) -> TokenLogprobs {
    let of = |token: u32| -((mix(context, !u64::from(token)) % 1000) as f32) / 64.0;
    TokenLogprobs {
        logprob: of(token),
        top: (0..top as u32).map(|token| (token, of(token))).collect(),
        draft: None,
    }
}

fn penalised(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0
}

/// SplitMix64's finaliser over both words.
fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(17) ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
