//! The forms of a report: text and a page for a person, JSON for a program, SARIF and JUnit for CI.

use std::collections::BTreeSet;
use std::io;

use quick_xml::Writer;
use quick_xml::events::BytesText;
use serde_json::{Value, json};

use super::conformance::Property;
use super::policy::Severity;
use super::{Report, jail, rules};

/// The form of a report.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Format {
    /// For a person
    Text,
    /// For a program
    Json,
    /// SARIF 2.1.0, for what shows findings beside the source
    Sarif,
    /// JUnit's XML, a test case for each rule
    Junit,
    /// A page for a browser, which needs no other file
    Html,
}

impl Report {
    /// The report in a form, with its last line's end.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn render(&self, format: Format) -> io::Result<String> {
        let mut text = match format {
            Format::Text => return Ok(self.text()),
            Format::Html => return Ok(self.html()),
            Format::Json => serde_json::to_string_pretty(self)?,
            Format::Sarif => serde_json::to_string_pretty(&self.sarif())?,
            Format::Junit => self.junit()?,
        };
        text.push('\n');
        Ok(text)
    }

    /// What was asked for and is not there.
    fn broken(&self) -> impl Iterator<Item = &Property> {
        self.properties
            .iter()
            .filter(|one| one.holds == Some(false))
    }

    /// What is to be said of the whole.
    pub(super) fn verdict(&self) -> &'static str {
        match (self.holds, self.unseen) {
            (false, _) => "does not hold",
            (true, 0) => "holds",
            (true, _) => "not known",
        }
    }

    fn text(&self) -> String {
        let mut text = match &self.policy {
            Some(policy) => format!("{} under the policy {policy}\n", self.subject),
            None => format!("{}\n", self.subject),
        };
        let width = self
            .properties
            .iter()
            .map(|one| one.label().len())
            .max()
            .unwrap_or_default();
        for one in &self.properties {
            let holds = match one.holds {
                Some(true) => "holds",
                Some(false) => "BROKEN",
                None => "-",
            };
            let (name, asked, found) = (one.label(), &one.asked, &one.found);
            text.push_str(&format!(
                "  {holds:6}  {name:width$}  asked: {asked}; found: {found}\n"
            ));
        }
        let mut last = "";
        for one in &self.findings {
            // What is common to the findings of a rule is said with the first.
            if one.rule != last {
                text.push_str(&format!(
                    "\n{}: {}\n  why: {}\n  fix: {}\n  see: {}\n",
                    one.severity.name(),
                    one.rule,
                    one.why,
                    one.fix,
                    one.reference
                ));
                last = one.rule;
            }
            text.push_str(&format!("  at {}: {}\n", one.at, one.what));
        }
        let count = |severity: Severity| {
            let count = self.count(severity);
            let plural = if count == 1 { "" } else { "s" };
            format!("{count} {}{plural}", severity.name())
        };
        let mut counts = Vec::new();
        if !self.properties.is_empty() {
            let (all, broken) = (self.properties.len(), self.broken().count());
            counts.push(format!("{broken} of {all} properties broken"));
            if self.unseen > 0 {
                counts.push(format!("{} could not be seen", self.unseen));
            }
        }
        if !self.rules.is_empty() {
            for severity in [Severity::Error, Severity::Warning, Severity::Note] {
                counts.push(count(severity));
            }
        }
        let verdict = self.verdict();
        text.push_str(&format!("\n{verdict}: {}\n", counts.join(", ")));
        text
    }

    /// <https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html>
    fn sarif(&self) -> Value {
        let known = rules::ALL
            .iter()
            .filter(|rule| self.rules.contains(&rule.id));
        let mut descriptors: Vec<Value> = known
            .map(|rule| {
                json!({
                    "id": rule.id,
                    "shortDescription": { "text": rule.why },
                    "help": { "text": rule.fix },
                    "helpUri": rule.reference,
                })
            })
            .collect();
        let conformance = descriptors.len();
        if !self.properties.is_empty() {
            descriptors.push(json!({
                "id": CONFORMANCE,
                "shortDescription": { "text": "what was asked for is what the kernel says is there" },
            }));
        }
        let uri = file_uri(&self.subject);
        let location = |at: &str, line: Option<usize>| {
            let mut location =
                json!({ "logicalLocations": [{ "fullyQualifiedName": at, "kind": "member" }] });
            // A process is in no file.
            if let Some(uri) = &uri {
                let mut place = json!({ "artifactLocation": { "uri": uri } });
                if let Some(line) = line {
                    place["region"] = json!({ "startLine": line });
                }
                location["physicalLocation"] = place;
            }
            location
        };
        let of_property = |one: &Property, kind: &str, level: &str| {
            let text = format!(
                "{}: asked: {}; found: {}",
                one.label(),
                one.asked,
                one.found
            );
            json!({
                "ruleId": CONFORMANCE,
                "ruleIndex": conformance,
                "kind": kind,
                "level": level,
                "message": { "text": text },
                "locations": [location(&one.at, None)],
            })
        };
        let broken = self.broken();
        let broken = broken.map(|one| of_property(one, "fail", "error"));
        let unseen = self.properties.iter().filter(|one| jail::must_be_seen(one));
        let unseen = unseen.map(|one| of_property(one, "open", "none"));
        let results: Vec<Value> = self
            .findings
            .iter()
            .map(|one| {
                json!({
                    "ruleId": one.rule,
                    "ruleIndex": self.rules.iter().position(|id| *id == one.rule),
                    "level": one.severity.name(),
                    "message": { "text": format!("{}: {}", one.at, one.what) },
                    "locations": [location(&one.at, one.line)],
                })
            })
            .chain(broken)
            .chain(unseen)
            .collect();
        json!({
            "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
            "version": "2.1.0",
            "runs": [{
                "tool": { "driver": {
                    "name": "rt verify",
                    "version": env!("CARGO_PKG_VERSION"),
                    "rules": descriptors,
                }},
                "results": results,
            }],
        })
    }

    fn junit(&self) -> io::Result<String> {
        let errors = self
            .findings
            .iter()
            .filter(|one| one.severity == Severity::Error);
        let broken: BTreeSet<&str> = errors.map(|one| one.rule).collect();
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        let suite = writer
            .create_element("testsuite")
            .with_attribute(("name", "rt verify"))
            .with_attribute((
                "tests",
                (self.rules.len() + self.properties.len())
                    .to_string()
                    .as_str(),
            ))
            .with_attribute((
                "failures",
                (broken.len() + self.broken().count()).to_string().as_str(),
            ))
            .with_attribute(("errors", "0"))
            .with_attribute((
                "skipped",
                self.properties
                    .iter()
                    .filter(|one| one.holds.is_none())
                    .count()
                    .to_string()
                    .as_str(),
            ));
        suite.write_inner_content(|writer| {
            for one in &self.properties {
                let case = writer
                    .create_element("testcase")
                    .with_attribute(("classname", self.subject.as_str()))
                    .with_attribute(("name", one.label().as_str()));
                let text = format!("asked: {}; found: {}", one.asked, one.found);
                let element = match one.holds {
                    Some(true) => {
                        case.write_empty()?;
                        continue;
                    }
                    Some(false) => "failure",
                    None => "skipped",
                };
                case.write_inner_content(|writer| {
                    let element = writer
                        .create_element(element)
                        .with_attribute(("message", text.as_str()));
                    element.write_empty().map(drop)
                })?;
            }
            for rule in &self.rules {
                let findings = self.findings.iter().filter(|one| one.rule == *rule);
                let lines: Vec<String> = findings
                    .map(|one| format!("{}: {}: {}", one.severity.name(), one.at, one.what))
                    .collect();
                let lines = lines.join("\n");
                let case = writer
                    .create_element("testcase")
                    .with_attribute(("classname", self.subject.as_str()))
                    .with_attribute(("name", *rule));
                if lines.is_empty() {
                    case.write_empty()?;
                    continue;
                }
                case.write_inner_content(|writer| {
                    let element = if broken.contains(rule) {
                        let why = rules::find(rule).map_or("", |rule| rule.why);
                        writer
                            .create_element("failure")
                            .with_attribute(("message", why))
                    } else {
                        writer.create_element("system-out")
                    };
                    element.write_text_content(BytesText::new(&lines)).map(drop)
                })?;
            }
            Ok(())
        })?;
        let body = String::from_utf8(writer.into_inner()).map_err(io::Error::other)?;
        Ok(format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{body}"
        ))
    }
}

/// The name under which a property that does not hold is reported in SARIF.
const CONFORMANCE: &str = "conformance";

/// A path as a URI (RFC 8089).
fn file_uri(path: &str) -> Option<String> {
    if !path.starts_with('/') {
        return None;
    }
    let mut uri = "file://".to_owned();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    Some(uri)
}
