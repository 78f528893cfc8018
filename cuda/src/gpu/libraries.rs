//! Where NVIDIA's libraries may lie that are loaded at run time.

use std::path::PathBuf;

/// What `variable` names; or else, with `stem` as in `libnvrtc.so`, the loader's search path and then the toolkit's folder. Of several
/// versions the one whose major is `preferred` comes first: a driver of that version surely runs it.
pub(super) fn candidates(variable: &str, stem: &str, preferred: Option<u32>) -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return vec![path.into()];
    }
    let majors = if preferred == Some(12) { [12, 13] } else { [13, 12] };
    let names: Vec<String> = if cfg!(windows) {
        let suffix = if stem == "nvrtc" { "0_0" } else { "" };
        majors.iter().map(|major| format!("{stem}64_{major}{suffix}.dll")).collect()
    } else {
        let versioned = majors.iter().map(|major| format!("lib{stem}.so.{major}"));
        versioned.chain([format!("lib{stem}.so")]).collect()
    };
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let folders = toolkits.chain([PathBuf::from("/usr/local/cuda")]).map(|toolkit| toolkit.join("lib64"));
    let in_folders: Vec<PathBuf> = folders
        .flat_map(|folder| names.iter().map(move |name| folder.join(name)).collect::<Vec<_>>())
        .collect();
    names.into_iter().map(PathBuf::from).chain(in_folders).collect()
}
