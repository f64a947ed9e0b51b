//! `rt doctor` on the command line.

use std::io::{self, Write};

use super::{Findings, Report, Status};
use crate::config::Config;
use crate::isolation::Model;

/// Tell whether this host can run each isolation model and, if not, what to do
///
/// Exits with 0 if the model named by --isolation can run; without it, if the container model can.
#[derive(Clone, Copy, clap::Args, Debug)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Args {
    /// Examines the host, prints what was found for `asked` (or both models) and returns the exit code.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn run(
        self,
        asked: Option<Model>,
        config: &Config,
        out: &mut impl Write,
    ) -> io::Result<u8> {
        let report = Report::examine(config);
        let text = if self.json {
            format!("{}\n", serde_json::to_string_pretty(&report)?)
        } else {
            let models = [Model::Container, Model::Microvm];
            let models = models
                .into_iter()
                .filter(|model| asked.is_none_or(|asked| asked == *model));
            models
                .map(|model| render(model, report.of(model)))
                .collect::<Vec<_>>()
                .join("\n")
        };
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => return Err(e),
            _ => {}
        }
        Ok(u8::from(
            !report.of(asked.unwrap_or(Model::Container)).usable,
        ))
    }
}

/// One line a check, and what to do below it.
fn render(model: Model, findings: &Findings) -> String {
    let verdict = if findings.usable {
        "can run here"
    } else {
        "cannot run here"
    };
    let mut text = format!("{model}: {verdict}\n");
    for check in &findings.checks {
        let status = match check.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        };
        text.push_str(&format!(
            "  {status:4}  {:15}  {}",
            check.name, check.message
        ));
        if let Some(advice) = &check.advice {
            text.push_str(&format!(" -> {advice}"));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    #[test]
    fn a_check_is_one_line_with_its_advice() {
        let checks = vec![
            Check::ok("root", "running as root"),
            Check::fail("kvm", "there is none", "get one"),
        ];
        assert_eq!(
            render(Model::Microvm, &Findings::new(None, checks)),
            "microvm: cannot run here\n\
             \x20 ok    root             running as root\n\
             \x20 fail  kvm              there is none -> get one\n"
        );
    }
}
