//! What times are measured by.

use dsa80_reference::{DType, Kernels};
use dsa80_tests::parity::devices::tell;
use dsa80_tests::parity::{Values, contract};

#[test]
fn a_copy_is_what_was_copied() {
    contract::on_wgpu(|wgpu| {
        for (dtype, shape) in
            [(DType::Float, vec![1, 1]), (DType::Act, vec![3, 2730]), (DType::Float, vec![0, 4])]
        {
            let values = Values::Normal.take(5, shape.iter().product());
            let (_, from) = contract::numbers(wgpu, dtype, &shape, &values);
            let (_, mut to) = contract::output(wgpu, dtype, &shape);
            wgpu.copy(&from, &mut to).unwrap();
            assert_eq!(wgpu.read(&to).unwrap(), wgpu.read(&from).unwrap());
        }
        let (from, mut to) =
            (wgpu.alloc(DType::Act, &[2, 4]).unwrap(), wgpu.alloc(DType::Act, &[4, 2]).unwrap());
        let error = wgpu.copy(&from, &mut to).unwrap_err().to_string();
        assert!(error.contains("copy: `to`") && error.contains("[2, 4]"), "{error}");
    });
}

#[test]
fn more_work_takes_the_device_longer() {
    contract::on_wgpu(|wgpu| {
        let (_, from) = contract::numbers(wgpu, DType::Float, &[512, 1024], &vec![1.0; 512 * 1024]);
        let (_, mut to) = contract::output(wgpu, DType::Float, &[512, 1024]);
        let mut seconds =
            |times: usize| wgpu.device_seconds(|| (0..times).try_for_each(|_| wgpu.copy(&from, &mut to)));
        // The least of several: other work may share the machine.
        let mut least = |times| {
            (0..5).map(|_| seconds(times).unwrap()).min_by(|a, b| a.partial_cmp(b).unwrap()).flatten()
        };
        let (Some(one), Some(many)) = (least(1), least(64)) else {
            let name = wgpu.context().name();
            return tell(&format!("left out: how long the device takes ({name} has no timestamps)"));
        };
        assert!(one > 0.0 && many > 4.0 * one, "{one} and {many} s");
    });
}
