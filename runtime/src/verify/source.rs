//! Where the values of a configuration are in its text.
//!
//! The text is hostile, but was parsed before: it is JSON, and no deeper than the parser lets it be.

use std::collections::{BTreeMap, BTreeSet};

/// How many keys that are given twice are told.
const TOLD: usize = 64;

/// What was found in a text.
#[derive(Default)]
pub(super) struct Found {
    /// The line of each place that was asked for; of one that is not there, the line of what it would be in.
    pub lines: BTreeMap<String, usize>,
    /// The keys that an object has twice.
    pub twice: Vec<String>,
}

/// Looks for `places`, as findings name them, in a text.
pub(super) fn look<'a>(text: &str, places: impl IntoIterator<Item = &'a str>) -> Found {
    let mut wanted = Wanted::default();
    for place in places {
        let parts = parts(place).into_iter();
        let end = parts.fold(&mut wanted, |one, part| one.below.entry(part).or_default());
        end.named.insert(place);
    }
    let mut search = Search {
        text,
        at: 0,
        line: 1,
        place: Vec::new(),
        found: Found::default(),
    };
    search.value(Some(&wanted));
    search.found
}

/// A place of the text, and those in it that are looked for.
#[derive(Default)]
struct Wanted<'a> {
    named: BTreeSet<&'a str>,
    below: BTreeMap<String, Wanted<'a>>,
}

/// The keys and indices of a place: `linux.sysctl["kernel.sem"]`, `mounts[0].options`.
fn parts(place: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut rest = place;
    while !rest.is_empty() {
        let (part, after) = if let Some(quoted) = rest.strip_prefix("[\"") {
            quoted.split_once("\"]").unwrap_or((quoted, ""))
        } else if let Some(index) = rest.strip_prefix('[') {
            index.split_once(']').unwrap_or((index, ""))
        } else {
            let key = rest.strip_prefix('.').unwrap_or(rest);
            key.split_at(key.find(['.', '[']).unwrap_or(key.len()))
        };
        if !part.is_empty() {
            parts.push(part.to_owned());
        }
        rest = after;
    }
    parts
}

struct Search<'t> {
    text: &'t str,
    at: usize,
    line: usize,
    /// Where we are.
    place: Vec<String>,
    found: Found,
}

impl Search<'_> {
    /// The next byte that is no space; 0 at the end.
    fn next(&mut self) -> u8 {
        loop {
            let byte = self.text.as_bytes().get(self.at).copied().unwrap_or(0);
            if !byte.is_ascii_whitespace() {
                return byte;
            }
            self.line += usize::from(byte == b'\n');
            self.at += 1;
        }
    }

    fn value(&mut self, wanted: Option<&Wanted<'_>>) {
        let first = self.next();
        self.note(wanted);
        match first {
            b'{' => self.object(wanted),
            b'[' => self.list(wanted),
            b'"' => drop(self.string()),
            _ => {
                let rest = self.text.get(self.at..).unwrap_or_default();
                let is_end = |byte: char| byte.is_ascii_whitespace() || ",]}".contains(byte);
                self.at += rest.find(is_end).unwrap_or(rest.len());
            }
        }
    }

    /// Where nothing nearer is found later, what is wanted below is here.
    fn note(&mut self, wanted: Option<&Wanted<'_>>) {
        let mut left: Vec<&Wanted<'_>> = wanted.into_iter().collect();
        while let Some(one) = left.pop() {
            let named = one.named.iter().map(|place| (*place).to_owned());
            self.found
                .lines
                .extend(named.map(|place| (place, self.line)));
            left.extend(one.below.values());
        }
    }

    fn object(&mut self, wanted: Option<&Wanted<'_>>) {
        self.at += 1;
        let mut keys = BTreeSet::new();
        loop {
            match self.next() {
                b',' => self.at += 1,
                b'"' => {
                    let key = self.string();
                    self.next();
                    // The colon.
                    self.at += 1;
                    let below = wanted.and_then(|wanted| wanted.below.get(&key));
                    self.place.push(key.clone());
                    if !keys.insert(key) && self.found.twice.len() < TOLD {
                        self.found
                            .twice
                            .push(self.place.join(".").replace(".[", "["));
                    }
                    self.value(below);
                    self.place.pop();
                }
                _ => break,
            }
        }
        self.at += 1;
    }

    fn list(&mut self, wanted: Option<&Wanted<'_>>) {
        self.at += 1;
        let mut index = 0;
        loop {
            match self.next() {
                b',' => self.at += 1,
                b']' | 0 => break,
                _ => {
                    let below = wanted.and_then(|wanted| wanted.below.get(&index.to_string()));
                    self.place.push(format!("[{index}]"));
                    self.value(below);
                    self.place.pop();
                    index += 1;
                }
            }
        }
        self.at += 1;
    }

    fn string(&mut self) -> String {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let mut is_escaped = true;
        let end = rest.bytes().position(|byte| {
            let is_end = byte == b'"' && !is_escaped;
            is_escaped = byte == b'\\' && !is_escaped;
            is_end
        });
        let length = end.map_or(rest.len(), |end| end + 1);
        self.at += length;
        serde_json::from_str(&rest[..length]).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{
  "mounts": [
    {"destination": "/a"},
    {"destination": "/b, \"]}",
     "options": ["ro"]}
  ],
  "linux": {
    "sysctl": {
      "kernel.sem": "1"
    },
    "a": [[1,
           2]]
  }
}"#;

    #[test]
    fn a_place_has_a_line_and_one_that_is_missing_that_of_what_it_is_in() {
        for (place, line) in [
            (".", 1),
            ("mounts", 2),
            ("mounts[0]", 3),
            ("mounts[1].destination", 4),
            ("mounts[1].options[0]", 5),
            ("mounts[1].type", 4),
            ("mounts[7]", 2),
            ("linux.sysctl[\"kernel.sem\"]", 9),
            ("linux.a[0][1]", 12),
            ("process.cwd", 1),
            ("[\"", 1),
        ] {
            assert_eq!(look(TEXT, [place]).lines[place], line, "{place}");
        }
    }

    #[test]
    fn a_key_that_is_given_twice_is_found_however_it_is_written() {
        assert_eq!(look(TEXT, []).twice, [""; 0]);
        let text = r#"{"x": [{}, {"y": 1, "y": 2}],
            "\u0078": null}"#;
        let found = look(text, ["x"]);
        assert_eq!(found.twice, ["x[1].y", "x"]);
        // The last one counts.
        assert_eq!(found.lines["x"], 2);
    }

    #[test]
    fn what_is_no_json_is_no_panic() {
        for text in [
            "", "{", "[", "\"", "{\"", "{\"a\"", "{\"a\":", "[1,", "\\", "}", "[\"é", "{]",
        ] {
            look(text, ["a", "[0]"]);
        }
    }
}
