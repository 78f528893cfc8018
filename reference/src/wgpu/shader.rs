//! The kernels' sources.

use super::act::ActType;

const PRELUDE: &str = include_str!("../../shaders/prelude.wgsl");
const ACT_BF16: &str = include_str!("../../shaders/act_bf16.wgsl");
const ACT_F32: &str = include_str!("../../shaders/act_f32.wgsl");
const REDUCE_SUBGROUPS: &str = include_str!("../../shaders/reduce_subgroups.wgsl");
const REDUCE_PLAIN: &str = include_str!("../../shaders/reduce_plain.wgsl");

/// What multiplies matrices.
pub(super) const MATRICES: &str = "enable f16;\nenable wgpu_cooperative_matrix;\n";

/// A file of `shaders/`.
#[derive(Debug)]
pub(super) struct Shader {
    /// The file's name.
    pub(super) name: &'static str,
    pub(super) source: &'static str,
    /// What of the language is switched on.
    pub(super) enables: &'static str,
    /// The files that go before it: names and sources.
    pub(super) after: &'static [(&'static str, &'static str)],
}

/// The [`Shader`] of a name.
macro_rules! shader {
    ($name:literal) => {
        $crate::wgpu::shader::Shader {
            name: $name,
            source: include_str!(concat!("../../shaders/", $name, ".wgsl")),
            enables: "",
            after: &[],
        }
    };
    ($name:literal, after $($before:literal),+) => {
        $crate::wgpu::shader::shader!($name, enabling "", after $($before),+)
    };
    ($name:literal, enabling $enables:expr, after $($before:literal),+) => {
        $crate::wgpu::shader::Shader {
            name: $name,
            source: include_str!(concat!("../../shaders/", $name, ".wgsl")),
            enables: $enables,
            after: &[$(($before, include_str!(concat!("../../shaders/", $before, ".wgsl")))),+],
        }
    };
}
pub(super) use shader;

/// A change of a shader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// The file without its ending; `reduce` is the one of the reductions that is used.
    pub shader: &'static str,
    /// What is there once.
    pub find: &'static str,
    /// What takes its place.
    pub replace: &'static str,
}

impl Shader {
    /// The whole source: the prelude, the activations, the reductions, the kernel, with `edits` made.
    pub(super) fn with_prelude(
        &self,
        act: ActType,
        subgroups: bool,
        edits: &[Edit],
    ) -> Result<String, String> {
        let reduce = if subgroups { REDUCE_SUBGROUPS } else { REDUCE_PLAIN };
        let act = match act {
            ActType::Bf16 => ("act_bf16", ACT_BF16),
            ActType::F32 => ("act_f32", ACT_F32),
        };
        let mut whole = self.enables.to_owned();
        let common = [("prelude", PRELUDE), act, ("reduce", reduce)];
        let files = common.into_iter().chain(self.after.iter().copied());
        for (name, source) in files.chain([(self.name, self.source)]) {
            let mut source = source.to_owned();
            for edit in edits.iter().filter(|edit| edit.shader == name) {
                if source.matches(edit.find).count() != 1 {
                    return Err(format!("{:?} is not once in {name}.wgsl", edit.find));
                }
                source = source.replace(edit.find, edit.replace);
            }
            whole += &source;
            whole.push('\n');
        }
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wgpu::{indexer_logits, sparse_mla};

    /// What few adapters run, and none of a CPU: that it is WGSL shows everywhere.
    #[test]
    fn shaders_of_matrices_are_valid() {
        for shader in [&sparse_mla::BY_MATRICES, &indexer_logits::BY_MATRICES] {
            let source = shader.with_prelude(ActType::Bf16, true, &[]).unwrap();
            let capabilities = naga::valid::Capabilities::all();
            let options = naga::front::wgsl::Options { parse_doc_comments: false, capabilities };
            let module = naga::front::wgsl::Frontend::new_with_options(options)
                .parse(&source)
                .unwrap_or_else(|error| panic!("{}.wgsl: {}", shader.name, error.emit_to_string(&source)));
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities)
                .validate(&module)
                .unwrap_or_else(|error| panic!("{}.wgsl: {}", shader.name, error.emit_to_string(&source)));
        }
    }
}
