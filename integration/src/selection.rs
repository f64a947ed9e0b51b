//! Which `rt` is under test, and which isolation models this machine can run.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Model;

/// The `rt` that `RT` names, else the one that is built beside this test program.
///
/// # Errors
/// What to do when there is none.
pub fn binary_under_test() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("RT") {
        return Ok(path.into());
    }
    let own =
        env::current_exe().map_err(|error| format!("cannot find this test's own path: {error}"))?;
    let beside = own.ancestors().nth(2).map(|dir| dir.join("rt"));
    beside
        .filter(|path| path.exists())
        .ok_or_else(|| "the binary `rt` is not built: run `make test`, or name it in RT".to_owned())
}

/// Asks `rt doctor`, which tries it out, whether this machine can run the model.
pub fn reason_not_to_run(rt: &Path, model: Model) -> Option<String> {
    if let Ok(models) = env::var("RT_MODELS")
        && !models.split(',').any(|name| name == model.name())
    {
        return Some("not among RT_MODELS".to_owned());
    }
    let report = Command::new(rt).args(["doctor", "--json"]).output();
    let report =
        match report.map(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout)) {
            Ok(Ok(report)) => report,
            // A broken doctor must not hide every test: let them run and fail.
            _ => return None,
        };
    let part = &report[model.name()];
    if part["usable"] != false {
        return None;
    }
    let failed = part["checks"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|check| check["status"] == "fail");
    Some(
        failed
            .and_then(|check| check["message"].as_str())
            .unwrap_or("rt doctor says no")
            .to_owned(),
    )
}
