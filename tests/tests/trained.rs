//! The trained model that is served by default, in INT4 on the oracle, judged as `dsa80 eval` judges it: against its own bf16 in transformers.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use dsa80_model::checkpoint::Checkpoint;
use dsa80_model::launch::{Device, LaunchOptions, launch};
use dsa80_serve::ServedModel;
use dsa80_serve::eval::{Amount, Prompts, Reference, Report, judge};
use dsa80_serve::text::{TextFiles, TextModel};
use dsa80_tests::fixture;

/// Of a hundred answers so many may be wrong that are right in bf16; of few, one is within chance.
const POINTS: f64 = 0.02;

fn report() -> Report {
    let checkpoint = Checkpoint::open(&fixture::root().join("trained")).unwrap().with_draft_layer().unwrap();
    let (prompts, reference) = (Prompts::read(&checkpoint).unwrap(), Reference::read(&checkpoint).unwrap());
    let text = TextModel::load(&TextFiles::from_checkpoint(&checkpoint).unwrap()).unwrap();
    let options = LaunchOptions { device: Device::Cpu, ..LaunchOptions::default() };
    let engine = launch(&Arc::new(checkpoint), &options).unwrap();
    let model = ServedModel { text: Arc::new(text), engine };
    let report = judge(&model, &prompts, reference.as_ref(), Amount::QUICK, &mut |_| ()).unwrap();
    model.engine.shutdown(Duration::ZERO);
    report
}

#[test]
fn int4_answers_as_bf16_in_transformers_does() {
    let report = report();
    for task in &report.tasks {
        let stored = task.stored.as_ref().unwrap();
        let compared = stored.compared.unwrap();
        println!(
            "{:>16}: {compared:?}, drafts {:?} and {:?}",
            task.task, task.draft_acceptance, stored.draft_acceptance
        );
        let lost = (compared.stored_accuracy - compared.accuracy) * compared.prompts as f64;
        let allowed = (POINTS * compared.prompts as f64).max(1.0);
        assert!(
            lost < allowed + 0.5,
            "{}: {lost} of {} are right in bf16 alone",
            task.task,
            compared.prompts
        );
        if let (Some(ours), Some(theirs)) = (task.draft_acceptance, stored.draft_acceptance) {
            assert!(ours > theirs - 0.1, "{}: drafts accepted {ours}, in bf16 {theirs}", task.task);
        }
    }
    let text = report.text.unwrap();
    let apart = text.perplexity / text.stored_perplexity.unwrap() - 1.0;
    println!("held-back text: perplexity {:.4}, {:+.2} %", text.perplexity, 100.0 * apart);
    assert!(apart.abs() < 0.03, "{apart}");
}
