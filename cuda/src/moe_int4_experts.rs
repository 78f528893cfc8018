//! A layer's INT4 experts in device memory.

use dsa80_reference::{Error, HostExpert, HostInt4, HostLinear, RandomLinear, Result};

use crate::device::Device;
use crate::int4::{Int4Rows, Int4Shape, PackedInt4};
use crate::moe_sort::MAX_EXPERTS;
use crate::repack_int4::{CanonicalInt4, RepackInt4Tile};

const UPLOAD: &str = "upload_experts_int4";

/// The routed experts of one layer, all INT4, in the layout that `moe_int4` wants.
#[derive(Debug)]
pub struct ExpertsInt4<D: Device> {
    /// Gate and up of every expert, interleaved.
    pub(crate) gate_up: PackedInt4<D>,
    pub(crate) down: PackedInt4<D>,
}

impl<D: Device> ExpertsInt4<D> {
    /// Of packed weights, one an expert: gates with their up projections, and downs.
    ///
    /// # Errors
    /// Counts or dimensions that differ; rows that are not packed so.
    pub fn new(gate_up: PackedInt4<D>, down: PackedInt4<D>) -> Result<Self> {
        let (first, second) = (*gate_up.shape(), *down.shape());
        let wanted = (first.out_features, first.in_features, gate_up.count());
        let found = (second.in_features, second.out_features, down.count());
        if (first.rows, second.rows) != (Int4Rows::GateUp, Int4Rows::One) || wanted != found {
            let expected = format!("gates with their up projections, then downs of {wanted:?}");
            return Err(refuse("experts", &expected, format!("{first:?}, {second:?} of {}", down.count())));
        }
        Ok(Self { gate_up, down })
    }

    /// The gates and up projections.
    pub fn gate_up(&self) -> &PackedInt4<D> {
        &self.gate_up
    }

    /// The downs.
    pub fn down(&self) -> &PackedInt4<D> {
        &self.down
    }

    /// Uploads and repacks.
    ///
    /// # Errors
    /// Experts that [`HostExpert::fit_moe_int4`] denies or of unequal dimensions, named; memory; the device.
    pub fn upload(device: &D, tile: &RepackInt4Tile, experts: Vec<HostExpert>) -> Result<Self> {
        if experts.len() > MAX_EXPERTS {
            return Err(refuse("experts", &format!("at most {MAX_EXPERTS}"), experts.len().to_string()));
        }
        if let Some(random) = all_random(&experts) {
            return Self::random(device, tile, &random);
        }
        let experts: Vec<HostExpert> = experts.into_iter().map(HostExpert::made).collect();
        let first = experts.first().ok_or_else(|| refuse("experts", "at least one", "0".into()))?;
        let [gate, up, down] = int4(first, 0)?;
        let (intermediate, hidden) = (gate.out_features, gate.in_features);
        let (mut gate_up_shape, mut down_shape) = (Int4Shape::of(&[gate, up])?, Int4Shape::of(&[down])?);
        for (e, expert) in experts.iter().enumerate() {
            let weights = int4(expert, e)?;
            for (tensor, weight, expected, group_size) in [
                ("gate_proj", weights[0], [intermediate, hidden], gate.group_size),
                ("up_proj", weights[1], [intermediate, hidden], gate.group_size),
                ("down_proj", weights[2], [hidden, intermediate], down.group_size),
            ] {
                let found = vec![weight.out_features, weight.in_features];
                if found != expected {
                    return Err(Error::Shape {
                        kernel: UPLOAD,
                        tensor,
                        expected: format!("{expected:?}"),
                        found,
                    });
                }
                if weight.group_size != group_size {
                    let found = format!("groups of {} in expert {e}", weight.group_size);
                    return Err(refuse(tensor, &format!("groups of {group_size} as in expert 0"), found));
                }
            }
            gate_up_shape.zero_points |= weights[..2].iter().any(|weight| weight.zero_points.is_some());
            down_shape.zero_points |= weights[2].zero_points.is_some();
        }
        let count = experts.len();
        let mut all = Self {
            gate_up: PackedInt4::alloc(device, "experts' gate and up", gate_up_shape, count)?,
            down: PackedInt4::alloc(device, "experts' down", down_shape, count)?,
        };
        let canonical = |shape| CanonicalInt4::alloc(device, shape);
        let mut gate_up_staging = [canonical(gate_up_shape)?, canonical(gate_up_shape)?];
        let mut down_staging = [canonical(down_shape)?];
        for (e, expert) in experts.iter().enumerate() {
            let [gate, up, down] = int4(expert, e)?;
            all.gate_up.upload_at(device, tile, &mut gate_up_staging, e, &[gate, up])?;
            all.down.upload_at(device, tile, &mut down_staging, e, &[down])?;
        }
        Ok(all)
    }

    /// Makes experts of random numbers, in order.
    fn random(device: &D, tile: &RepackInt4Tile, experts: &[[RandomLinear; 3]]) -> Result<Self> {
        let [gate, up, down] =
            experts.first().ok_or_else(|| refuse("experts", "at least one", "0".into()))?;
        let (gate_up_shape, down_shape) =
            (Int4Shape::of_random(&[gate, up])?, Int4Shape::of_random(&[down])?);
        let mut gate_up = PackedInt4::alloc(device, "experts' gate and up", gate_up_shape, experts.len())?;
        let mut downs = PackedInt4::alloc(device, "experts' down", down_shape, experts.len())?;
        let canonical = |shape| CanonicalInt4::alloc(device, shape);
        let mut gate_up_staging = [canonical(gate_up_shape)?, canonical(gate_up_shape)?];
        let mut down_staging = [canonical(down_shape)?];
        for (e, [gate, up, down]) in experts.iter().enumerate() {
            gate_up.random_at(device, tile, &mut gate_up_staging, e, &[gate, up])?;
            downs.random_at(device, tile, &mut down_staging, e, &[down])?;
        }
        Self::new(gate_up, downs)
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.down.count()
    }

    /// Columns of a token's row.
    pub fn hidden(&self) -> usize {
        self.down.out_features()
    }

    /// Features between gate-up and down.
    pub fn moe_intermediate(&self) -> usize {
        self.gate_up.out_features()
    }
}

/// The projections of expert `e`: gate, up, down.
fn int4(expert: &HostExpert, e: usize) -> Result<[&HostInt4; 3]> {
    Ok([
        take("gate_proj", &expert.gate_proj, e)?,
        take("up_proj", &expert.up_proj, e)?,
        take("down_proj", &expert.down_proj, e)?,
    ])
}

/// Gate, up and down of every expert, if all are random.
fn all_random(experts: &[HostExpert]) -> Option<Vec<[RandomLinear; 3]>> {
    let of = |weight: &HostLinear| match weight {
        HostLinear::Random(random) => Some(*random),
        _ => None,
    };
    experts
        .iter()
        .map(|expert| Some([of(&expert.gate_proj)?, of(&expert.up_proj)?, of(&expert.down_proj)?]))
        .collect()
}

fn take<'a>(tensor: &'static str, weight: &'a HostLinear, e: usize) -> Result<&'a HostInt4> {
    match weight {
        HostLinear::Int4(weight) => Ok(weight),
        HostLinear::Dense(_) | HostLinear::Random(_) => {
            let found = format!("unquantised in expert {e}");
            Err(refuse(tensor, "INT4 (use `upload_experts` and `moe`)", found))
        }
    }
}

fn refuse(name: &'static str, expected: &str, found: String) -> Error {
    Error::Value { kernel: UPLOAD, name, expected: expected.to_owned(), found }
}
