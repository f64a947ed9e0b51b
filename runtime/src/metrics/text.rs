//! Prometheus' text format, version 0.0.4: families with a line of help and one of type, and a line for each sample.

use std::fmt::Write as _;

/// The type of content, as a server says it.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a figure is.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// It only rises.
    Counter,
    /// It rises and falls.
    Gauge,
}

/// The text as it grows.
#[derive(Debug, Default)]
pub struct Text {
    text: String,
    family: &'static str,
}

impl Text {
    /// Begins a family. The help has neither a backslash nor a line's end.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        self.family = name;
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// A sample of the family that was begun last.
    pub fn sample(&mut self, labels: &[(&str, impl AsRef<str>)], value: f64) {
        self.text.push_str(self.family);
        for (index, (name, label)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{before}{name}=\"{}\"", escape(label.as_ref()));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    /// All of it.
    pub fn finish(self) -> String {
        self.text
    }
}

fn escape(label: &str) -> String {
    label
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_a_line_below_its_family() {
        let mut text = Text::default();
        text.family("rt_x", Kind::Counter, "What it is.");
        text.sample(&[("id", "a\"b\\\n"), ("m", "c")], 1.5);
        text.sample(&[] as &[(&str, &str)], 2_f64.powi(40));
        assert_eq!(
            text.finish(),
            "# HELP rt_x What it is.\n# TYPE rt_x counter\nrt_x{id=\"a\\\"b\\\\\\n\",m=\"c\"} 1.5\nrt_x 1099511627776\n"
        );
    }
}
