//! The system calls that the filters in force let through, against those that the profile asked for.
//!
//! Both are programs, and the one in force may be anybody's: for each call they are first followed with arguments that
//! are not known, which finds the calls whose answer depends on them and the numbers that they are compared with; only
//! those calls are then asked with such arguments. What would take too long to follow is told, not left out.

use std::collections::BTreeSet;

use engine::observation::{ThreadFilters, Topic};

use super::conformance::{Comparison, Property};
use super::filter::{self, Call, Compared, Filter, Ways};
use super::live;
use super::posture::Fact;

/// System call numbers beyond the greatest in use.
const NUMBERS: u32 = 1024;

/// The bit in the number of a call of the x32 kind.
const X32: u32 = 0x4000_0000;

/// How many arguments a call is asked with.
const CASE_LIMIT: usize = 1 << 16;

/// How many calls are told.
const TOLD: usize = 40;

/// Every call that the filters in force let through must be one that the profile lets through, in every thread.
pub(super) fn property(one: &Comparison<'_>) -> Property {
    let (asked, found) = (&one.asked.seccomp, &one.found.seccomp);
    let wanted = asked.value.as_deref().unwrap_or_default();
    let text = |filters: &[Filter]| match filters.len() {
        0 => "no filter".to_owned(),
        1 => "a filter".to_owned(),
        count => format!("{count} filters"),
    };
    let mut property = Property::new(
        "seccomp",
        text(wanted),
        &Fact::new(&found.at, String::new()),
        true,
    );
    let mut unknown: Vec<String> = Vec::new();
    let mut said = match (&found.value, &one.seen.seccomp) {
        (Some(filters), _) => text(filters),
        (None, Err(why)) => {
            unknown.push(why.clone());
            "filters that cannot be read".to_owned()
        }
        (None, Ok(_)) => "filters that cannot be read".to_owned(),
    };
    if wanted.is_empty() {
        property.found = said;
        return property;
    }
    let mut check = |filters: &[Filter], whose: &str, unknown: &mut Vec<String>| {
        let excess = beyond(wanted, filters);
        unknown.extend(excess.unknown.map(|why| format!("{whose}{why}")));
        let more = excess.calls.len().saturating_sub(TOLD);
        let mut calls: Vec<String> = excess.calls.into_iter().take(TOLD).collect();
        if calls.is_empty() {
            return;
        }
        if more > 0 {
            calls.push(format!("{more} others"));
        }
        said.push_str(&format!(
            "; {whose}lets more calls through: {}",
            calls.join(", ")
        ));
        property.holds = Some(false);
    };
    if let Some(filters) = &found.value {
        check(filters, "it ", &mut unknown);
    }
    for ThreadFilters { pid, tid, filters } in &one.seen.other_filters {
        let whose = format!("thread {tid} of process {pid} ");
        match filters {
            Ok(filters) => {
                let filters: Vec<Filter> = filters.iter().map(|one| live::filter_of(one)).collect();
                check(&filters, &whose, &mut unknown);
            }
            Err(why) => unknown.push(format!("{whose}{why}")),
        }
    }
    let bounds = [Topic::Processes, Topic::Threads, Topic::Filters];
    let bounds = bounds.iter().filter_map(|topic| one.seen.unseen.get(topic));
    unknown.extend(bounds.cloned());
    if property.holds == Some(true) && !unknown.is_empty() {
        property.holds = None;
        said.push_str("; not known: ");
        said.push_str(&unknown.join(", "));
    } else if property.holds == Some(true) {
        said.push_str(", no more let through");
    }
    property.found = said;
    property
}

/// Calls that are let through and should not be.
#[derive(Default)]
struct Excess {
    calls: Vec<String>,
    /// Why there may be others.
    unknown: Option<String>,
}

fn beyond(wanted: &[Filter], found: &[Filter]) -> Excess {
    let mut excess = Excess::default();
    if wanted == found {
        return excess;
    }
    for (architecture, kind, bit) in [
        (engine::AUDIT_ARCH_X86_64, "64-bit", 0),
        (engine::AUDIT_ARCH_X86_64, "x32", X32),
        (engine::AUDIT_ARCH_I386, "32-bit", 0),
    ] {
        for number in 0..NUMBERS {
            match is_beyond(wanted, found, Call::new(architecture, number | bit)) {
                Some(false) => {}
                Some(true) => excess.calls.push(told(architecture, number | bit, kind)),
                None => {
                    let call = told(architecture, number | bit, kind);
                    let why = format!("{call} is answered in too many ways");
                    excess.unknown.get_or_insert(why);
                }
            }
        }
    }
    excess
}

/// A call by its name, or by its number if it has none that is known.
fn told(architecture: u32, number: u32, kind: &str) -> String {
    match engine::syscall_name(architecture, number) {
        Some(name) => format!("{name} ({kind})"),
        None => format!("call {} ({kind})", number & !X32),
    }
}

/// Whether there are arguments with which `found` lets a call through and `wanted` does not; `None`: there are too many to
/// be sure.
fn is_beyond(wanted: &[Filter], found: &[Filter], call: Call) -> Option<bool> {
    let follow = |filters: &[Filter]| -> Vec<Ways> {
        filters.iter().map(|one| Ways::of(one, &call)).collect()
    };
    let found_ways = follow(found);
    if !found_ways.iter().all(|ways| ways.may(true)) {
        return Some(false);
    }
    let wanted_ways = follow(wanted);
    if wanted_ways.iter().all(|ways| !ways.may(false)) {
        return Some(false);
    }
    let always = found_ways.iter().all(|ways| !ways.may(false));
    let never = wanted_ways.iter().any(|ways| !ways.may(true));
    if always && never {
        return Some(true);
    }
    let all = || found_ways.iter().chain(&wanted_ways);
    let mut compared = BTreeSet::new();
    all().for_each(|ways| compared.extend(&ways.compared));
    let (cases, are_all) = cases(&compared);
    let is_beyond = cases.into_iter().any(|arguments| {
        let mut call = call;
        call.arguments = arguments;
        filter::answer(found, &call).lets_through() && !filter::answer(wanted, &call).lets_through()
    });
    if is_beyond {
        return Some(true);
    }
    (are_all && all().all(|ways| ways.are_all)).then_some(false)
}

/// Arguments on both sides of all that they are compared with, in all combinations; if those are too many, the first of
/// them, and that they are not all.
fn cases(compared: &BTreeSet<Compared>) -> (Vec<[u64; 6]>, bool) {
    let mut cases = vec![[0; 6]];
    let mut are_all = true;
    for index in 0..6 {
        let values = values(compared, index);
        let mut more = Vec::new();
        for value in values {
            // What comes later is asked with the first ones, at least.
            let room = CASE_LIMIT.saturating_sub(cases.len() + more.len());
            are_all &= room >= cases.len();
            more.extend(cases.iter().take(room).map(|case| {
                let mut case = *case;
                case[index] = value;
                case
            }));
        }
        cases.extend(more);
    }
    (cases, are_all)
}

/// The values of an argument that are worth asking with: none if it is compared with nothing.
fn values(compared: &BTreeSet<Compared>, index: usize) -> Vec<u64> {
    let half = |word: usize| {
        let of_word = compared.iter().filter(|one| one.word == word);
        let mut values = BTreeSet::new();
        for one in of_word {
            let Compared { mask, with, .. } = *one;
            values.extend([
                with,
                with.wrapping_add(1),
                with.wrapping_sub(1),
                with | !mask,
            ]);
            if mask != u32::MAX {
                // Each bit for itself: a mask that lacks one differs there alone.
                let bits = (0..u32::BITS).map(|bit| 1 << bit);
                values.extend(bits.filter(|bit| mask & bit != 0).map(|bit| with ^ bit));
            }
        }
        values
    };
    let (mut low, mut high) = (half(2 * index), half(2 * index + 1));
    if low.is_empty() && high.is_empty() {
        return Vec::new();
    }
    // 0 is in the cases anyway, and a half that is compared with nothing can be anything.
    low.insert(0);
    high.insert(0);
    let values = high.iter().flat_map(|high| {
        let low = low.iter();
        low.map(|low| u64::from(*high) << 32 | u64::from(*low))
    });
    values.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The calls that `real` lets through and `asked` does not; both are the rules of a profile that denies.
    fn excess(asked: serde_json::Value, real: serde_json::Value) -> Vec<String> {
        let compile = |rules: serde_json::Value| {
            let profile = json!({
                "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules
            });
            let profile = serde_json::from_value(profile).unwrap();
            vec![Filter::new(engine::compile_seccomp(&profile).unwrap())]
        };
        let excess = beyond(&compile(asked), &compile(real));
        assert_eq!(excess.unknown, None);
        excess.calls
    }

    fn rule(name: &str, arguments: &[(u32, u64, u64, &str)]) -> serde_json::Value {
        let arguments = arguments.iter().map(|(index, value, two, op)| {
            json!({"index": index, "value": value, "valueTwo": two, "op": format!("SCMP_CMP_{op}")})
        });
        let arguments: Vec<_> = arguments.collect();
        json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": arguments})
    }

    #[test]
    fn what_one_argument_more_lets_through_is_found() {
        let masked = |mask: u64| rule("clone", &[(0, mask, 0, "MASKED_EQ")]);
        let (strict, loose) = (masked(0x7E02_0000), masked(0x6E02_0000));
        assert_eq!(excess(json!([strict]), json!([loose])), ["clone (64-bit)"]);
        assert_eq!(excess(json!([loose]), json!([strict])), [""; 0]);
        let personality = |value| rule("personality", &[(0, value, 0, "EQ")]);
        assert_eq!(
            excess(
                json!([personality(0)]),
                json!([personality(0), personality(0x40000)])
            ),
            ["personality (64-bit)"]
        );
        assert_eq!(
            excess(
                json!([loose]),
                json!([loose, rule("unshare", &[(0, 0x1000_0000, 0, "EQ")])])
            ),
            ["unshare (64-bit)"]
        );
        let ioctl = |value| rule("ioctl", &[(1, value, 0, "NE")]);
        assert_eq!(
            excess(json!([ioctl(0x5412)]), json!([ioctl(0x5413)])),
            ["ioctl (64-bit)"]
        );
        let with = |fd| json!([ioctl(0x5412), rule("ioctl", &[(0, fd, 0, "EQ")])]);
        assert_eq!(excess(json!([ioctl(0x5412)]), with(5)), ["ioctl (64-bit)"]);
        let two = |second| rule("prctl", &[(0, 1, 0, "EQ"), (1, second, 0, "EQ")]);
        assert_eq!(excess(json!([two(2)]), json!([two(3)])), ["prctl (64-bit)"]);
        assert_eq!(excess(json!([two(2)]), json!([two(2)])), [""; 0]);
        let below = rule("keyctl", &[(0, 10, 0, "LT")]);
        let more = json!([below, rule("keyctl", &[(0, 20, 0, "EQ")])]);
        assert_eq!(excess(json!([below]), more), ["keyctl (64-bit)"]);
        let high = json!([loose, rule("clone", &[(0, 1 << 40, 1 << 40, "MASKED_EQ")])]);
        assert_eq!(excess(json!([loose]), high), ["clone (64-bit)"]);
    }

    #[test]
    fn a_call_is_told_by_its_name() {
        let (wide, narrow) = (engine::AUDIT_ARCH_X86_64, engine::AUDIT_ARCH_I386);
        assert_eq!(told(wide, 321, "64-bit"), "bpf (64-bit)");
        assert_eq!(told(wide, X32 | 321, "x32"), "bpf (x32)");
        assert_eq!(told(narrow, 357, "32-bit"), "bpf (32-bit)");
        assert_eq!(told(wide, 1000, "64-bit"), "call 1000 (64-bit)");
    }

    #[test]
    fn a_filter_that_is_malformed_lets_nothing_through() {
        let all = Filter::new(vec![libc::sock_filter {
            code: 6,
            jt: 0,
            jf: 0,
            k: 0x7fff_0000,
        }]);
        let none = Filter::new(Vec::new());
        let call = Call::new(engine::AUDIT_ARCH_X86_64, 1);
        let (all, none) = (vec![all], vec![none]);
        assert_eq!(is_beyond(&none, &all, call), Some(true));
        assert_eq!(is_beyond(&all, &none, call), Some(false));
        assert_eq!(is_beyond(&all, &[], call), Some(false));
        assert_eq!(is_beyond(&none, &[], call), Some(true));
    }
}
