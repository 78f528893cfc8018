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

/// Of a hundred answers so many may be wrong that are right in bf16, over all tasks and in each; which of few means none.
const POINTS: f64 = 0.02;

/// Tasks whose drafts the trainer was asked for.
const DRAFTED: usize = 8;

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
    let (mut lost_of_all, mut asked, mut drafted) = (0.0, 0.0, 0);
    for task in &report.tasks {
        let stored = task.stored.as_ref().unwrap();
        let compared = stored.compared.unwrap();
        println!(
            "{:>16}: {compared:?}, drafts {:?} and {:?}",
            task.task, task.draft_acceptance, stored.draft_acceptance
        );
        let lost = (compared.stored_accuracy - compared.accuracy) * compared.prompts as f64;
        (lost_of_all, asked) = (lost_of_all + lost.max(0.0), asked + compared.prompts as f64);
        // Shares of whole numbers, nearly.
        assert!(
            lost < (POINTS * compared.prompts as f64).floor() + 1e-3,
            "{}: {lost} of {} are right in bf16 alone",
            task.task,
            compared.prompts
        );
        if let Some(theirs) = stored.draft_acceptance {
            let ours = task.draft_acceptance.unwrap();
            drafted += 1;
            assert!(ours > theirs - 0.1, "{}: drafts accepted {ours}, in bf16 {theirs}", task.task);
        }
    }
    assert!(lost_of_all < POINTS * asked, "{lost_of_all} of {asked} are right in bf16 alone");
    assert_eq!(drafted, DRAFTED);
    let text = report.text.unwrap();
    let apart = text.perplexity / text.stored_perplexity.unwrap() - 1.0;
    println!("held-back text: perplexity {:.4}, {:+.2} %", text.perplexity, 100.0 * apart);
    assert!(apart.abs() < 0.005, "{apart}");
}
