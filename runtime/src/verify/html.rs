//! A report as one page that needs nothing else: no script, no style, no font from elsewhere.
//!
//! Attacks in several models stand side by side, so that a reader sees what the machine adds. All text is escaped: what a
//! bundle says, it cannot make part of the page.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use quick_xml::escape::escape;

use super::conformance::Property;
use super::policy::Severity;
use super::{Finding, Report};
use crate::isolation::Model;

const STYLE: &str = "\
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --wall: #0969da; --bad: #cf222e; --warn: #9a6700 }
@media (prefers-color-scheme: dark) {
  :root { --good: #3fb950; --wall: #58a6ff; --bad: #f85149; --warn: #d29922 }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line) }
td { overflow-wrap: anywhere }
td:first-child { font-family: ui-monospace, monospace; white-space: nowrap }
small { opacity: .75 }
.good { color: var(--good) } .wall { color: var(--wall) } .bad { color: var(--bad); font-weight: 600 }
.warn { color: var(--warn) } .none { opacity: .6 }
.verdict { padding: .15rem .6rem; border: 1px solid; border-radius: .4rem }
section { margin-top: 2rem }
article { border-left: .25rem solid var(--line); padding: .1rem 0 .1rem 1rem; margin: 1rem 0 }
article.error { border-color: var(--bad) } article.warning { border-color: var(--warn) }
code { font-family: ui-monospace, monospace }
";

impl Report {
    /// The page.
    pub(super) fn html(&self) -> String {
        let mut page = String::new();
        let title = escape(self.subject.as_str());
        let class = if self.holds && self.unseen == 0 {
            "good"
        } else {
            "bad"
        };
        let verdict = self.verdict();
        let policy = self
            .policy
            .as_ref()
            .map(|policy| format!(" under the policy <code>{}</code>", escape(policy.as_str())))
            .unwrap_or_default();
        // Writing to a string does not fail.
        let _ = write!(
            page,
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>rt verify: {title}</title>\n<style>\n{STYLE}</style>\n\
             <h1>{title}</h1>\n<p><span class=\"verdict {class}\">{verdict}</span>{policy}</p>\n"
        );
        let models: Vec<Model> = [Model::Container, Model::Microvm]
            .into_iter()
            .filter(|model| self.properties.iter().any(|one| one.model == Some(*model)))
            .collect();
        if models.is_empty() {
            properties(&mut page, &self.properties);
        } else {
            matrix(&mut page, &self.properties, &models);
        }
        if self.policy.is_some() {
            findings(&mut page, &self.findings);
        }
        let version = env!("CARGO_PKG_VERSION");
        let _ = writeln!(page, "<p><small>rt {version}</small></p>\n</html>");
        page
    }
}

/// The class of a property's cell.
fn class(property: &Property) -> &'static str {
    match property.holds {
        Some(true) if property.is_by_the_machine() => "wall",
        Some(true) => "good",
        Some(false) => "bad",
        None => "none",
    }
}

fn properties(page: &mut String, all: &[Property]) {
    if all.is_empty() {
        return;
    }
    page.push_str(
        "<section>\n<h2>What was asked for, and what is there</h2>\n<table>\n\
         <tr><th>Property<th>Asked<th>Found<th>Holds\n",
    );
    for one in all {
        let holds = match one.holds {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not seen",
        };
        let _ = writeln!(
            page,
            "<tr><td>{}<td>{}<td title=\"{}\">{}<td class=\"{}\">{holds}",
            escape(one.name.as_str()),
            escape(one.asked.as_str()),
            escape(one.at.as_str()),
            escape(one.found.as_str()),
            class(one)
        );
    }
    page.push_str("</table>\n</section>\n");
}

/// A row for each attack, a column for each model.
fn matrix(page: &mut String, all: &[Property], models: &[Model]) {
    page.push_str("<section>\n<h2>What stopped each attack</h2>\n<p>");
    for model in models {
        let of_model: Vec<&Property> = all.iter().filter(|one| one.model == Some(*model)).collect();
        let count = |is_meant: fn(&&&Property) -> bool| of_model.iter().filter(is_meant).count();
        let (through, by_the_machine) = (
            count(|one| one.holds == Some(false)),
            count(|one| one.is_by_the_machine()),
        );
        let class = if through == 0 { "good" } else { "bad" };
        let _ = write!(
            page,
            "<b>{model}</b>: <span class=\"{class}\">{through} of {} got through</span>",
            of_model.len()
        );
        if by_the_machine > 0 {
            let _ = write!(
                page,
                ", <span class=\"wall\">{by_the_machine} ended at the machine's wall</span>"
            );
        }
        page.push_str("<br>\n");
    }
    page.push_str("</p>\n<table>\n<tr><th>Attack");
    for model in models {
        let _ = write!(page, "<th>{model}");
    }
    page.push('\n');
    let mut seen = BTreeSet::new();
    for first in all.iter().filter(|one| seen.insert(one.name.as_str())) {
        let _ = write!(
            page,
            "<tr><td>{}<br><small>{}</small>",
            escape(first.name.as_str()),
            escape(first.asked.as_str())
        );
        for model in models {
            let mut cells = all.iter();
            let cell = cells.find(|one| one.model == Some(*model) && one.name == first.name);
            match cell {
                Some(one) => {
                    let found = escape(one.found.as_str());
                    let _ = write!(page, "<td class=\"{}\">{found}", class(one));
                }
                None => page.push_str("<td class=\"none\">not tried"),
            }
        }
        page.push('\n');
    }
    page.push_str("</table>\n</section>\n");
}

fn findings(page: &mut String, all: &[Finding]) {
    page.push_str("<section>\n<h2>What the policy says</h2>\n");
    if all.is_empty() {
        page.push_str("<p class=\"good\">Nothing was found.</p>\n");
    }
    let mut last = "";
    for one in all {
        if one.rule != last {
            if !last.is_empty() {
                page.push_str("</article>\n");
            }
            last = one.rule;
            let severity = one.severity.name();
            let class = match one.severity {
                Severity::Error => "bad",
                Severity::Warning => "warn",
                _ => "none",
            };
            let _ = write!(
                page,
                "<article class=\"{severity}\">\n<h3><span class=\"{class}\">{severity}</span> {}</h3>\n\
                 <p>{}. To mend it, {} (<a href=\"{reference}\">more</a>).</p>\n",
                one.rule,
                escape(sentence(one.why).as_str()),
                escape(one.fix),
                reference = escape(one.reference)
            );
        }
        let (at, what) = (escape(one.at.as_str()), escape(one.what.as_str()));
        let _ = writeln!(page, "<p><code>{at}</code>: {what}</p>");
    }
    if !last.is_empty() {
        page.push_str("</article>\n");
    }
    page.push_str("</section>\n");
}

/// A text that begins with a capital.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string());
    first.unwrap_or_default() + letters.as_str()
}
