//! A seccomp filter's answers: the kernel's classic BPF, run on the system calls that one wants to know about.
//!
//! The programs come from a bundle's profile, or from the kernel, which has checked them. Either way a program cannot do
//! more here than answer: jumps go forward only, and what is malformed kills the process, as the kernel has it.

use std::collections::BTreeSet;

/// A system call as the kernel shows it to a filter (`struct seccomp_data`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number, in the architecture's numbering.
    pub number: u32,
    /// `AUDIT_ARCH_X86_64` or another.
    pub architecture: u32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// What a filter says (`SECCOMP_RET_*`); the first that applies of several filters' answers is the strictest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// The process ends.
    KillProcess,
    /// The thread ends.
    KillThread,
    /// SIGSYS.
    Trap,
    /// An errno.
    Errno(u16),
    /// Another process decides.
    Notify,
    /// A tracer decides.
    Trace,
    /// It goes on, and is logged.
    Log,
    /// It goes on.
    Allow,
}

impl Answer {
    /// The answer of a filter's value.
    fn of(value: u32) -> Self {
        match value & 0xFFFF_0000 {
            libc::SECCOMP_RET_KILL_THREAD => Self::KillThread,
            libc::SECCOMP_RET_TRAP => Self::Trap,
            libc::SECCOMP_RET_ERRNO => Self::Errno(value as u16),
            libc::SECCOMP_RET_USER_NOTIF => Self::Notify,
            libc::SECCOMP_RET_TRACE => Self::Trace,
            libc::SECCOMP_RET_LOG => Self::Log,
            libc::SECCOMP_RET_ALLOW => Self::Allow,
            _ => Self::KillProcess,
        }
    }

    /// Whether the call takes place, or may: what another process decides counts as allowed, since a tracer may be the
    /// container's own.
    pub fn lets_through(self) -> bool {
        matches!(self, Self::Notify | Self::Trace | Self::Log | Self::Allow)
    }
}

/// A filter program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// A program as the kernel takes it.
    pub fn new(program: Vec<libc::sock_filter>) -> Self {
        Self(program)
    }

    /// What it says to a call.
    pub fn answer(&self, call: &Call) -> Answer {
        let load = |offset| call.word(offset).map(Value::Known);
        match self.follow(State::default(), load, |_| {}) {
            Some(End::Answer(Value::Known(value))) => Answer::of(value),
            // All words are known: the program is malformed.
            _ => Answer::KillProcess,
        }
    }

    /// From a state to the program's end, or to the next jump that may go two ways, with `load` for the words of the call.
    /// What a word of the arguments is compared with is told to `compared`. `None`: the program is malformed.
    /// (`linux/bpf_common.h`, and what kernel/seccomp.c takes of it.)
    fn follow(
        &self,
        mut state: State,
        load: impl Fn(u32) -> Option<Value>,
        mut compared: impl FnMut(Compared),
    ) -> Option<End> {
        loop {
            let libc::sock_filter { code, jt, jf, k } = *self.0.get(state.at)?;
            state.at += 1;
            let operand = if code & 0x08 == 0 {
                Value::Known(k)
            } else {
                state.x
            };
            match code & 0x07 {
                // Load into the accumulator, or into the index register.
                class @ (0x00 | 0x01) => {
                    let value = match code & 0xE0 {
                        0x00 => Value::Known(k),
                        0x20 if class == 0x00 => load(k)?,
                        0x60 => *state.memory.get(k as usize)?,
                        0x80 => Value::Known(SECCOMP_DATA_SIZE),
                        _ => return None,
                    };
                    *(if class == 0x00 {
                        &mut state.a
                    } else {
                        &mut state.x
                    }) = value;
                }
                0x02 => *state.memory.get_mut(k as usize)? = state.a,
                0x03 => *state.memory.get_mut(k as usize)? = state.x,
                0x04 => state.a = compute(code & 0xF0, state.a, operand)?,
                0x05 if code & 0xF0 == 0x00 => state.at = state.at.checked_add(k as usize)?,
                0x05 => match (state.a, operand) {
                    (Value::Known(a), Value::Known(operand)) => {
                        let holds = compare(code & 0xF0, a, operand)?;
                        state.at += usize::from(if holds { jt } else { jf });
                    }
                    (a, operand) => {
                        // Whether there is such a comparison.
                        compare(code & 0xF0, 0, 0)?;
                        if let (Value::Word(word, mask), Value::Known(with)) = (a, operand) {
                            // A test of bits compares what they leave.
                            let (mask, with) = match code & 0xF0 {
                                0x40 => (mask & with, 0),
                                _ => (mask, with),
                            };
                            compared(Compared { word, mask, with });
                        }
                        let mut other = state.clone();
                        state.at += usize::from(jt);
                        other.at += usize::from(jf);
                        return Some(End::Both(Box::new([state, other])));
                    }
                },
                0x06 => {
                    let is_a = code & 0x18 == 0x10;
                    return Some(End::Answer(if is_a { state.a } else { Value::Known(k) }));
                }
                _ if code & 0xF8 == 0x00 => state.x = state.a,
                _ => state.a = state.x,
            }
        }
    }
}

/// What is known of a register.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Value {
    Known(u32),
    /// A word of the arguments, and which of its bits are left.
    Word(usize, u32),
    Unknown,
}

/// A filter between two instructions.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct State {
    at: usize,
    a: Value,
    x: Value,
    memory: [Value; 16],
}

impl Default for State {
    fn default() -> Self {
        let zero = Value::Known(0);
        Self {
            at: 0,
            a: zero,
            x: zero,
            memory: [zero; 16],
        }
    }
}

/// Where following came to.
enum End {
    Answer(Value),
    Both(Box<[State; 2]>),
}

/// A number that a word of the arguments is compared with.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Compared {
    /// The first half of the first argument is 0.
    pub word: usize,
    /// What is left of it before.
    pub mask: u32,
    pub with: u32,
}

/// What a filter may say to a call, whatever its arguments are.
pub(super) struct Ways {
    answers: BTreeSet<Answer>,
    /// What the arguments are compared with on the way.
    pub compared: BTreeSet<Compared>,
    /// Whether it was followed to all its ends.
    pub are_all: bool,
}

impl Ways {
    /// Follows a filter with what is known of `call` beside its arguments.
    pub fn of(filter: &Filter, call: &Call) -> Self {
        let mut ways = Self {
            answers: BTreeSet::new(),
            compared: BTreeSet::new(),
            are_all: true,
        };
        let load = |offset| {
            let word = call.word(offset)?;
            Some(match offset {
                0 | 4 => Value::Known(word),
                8 | 12 => Value::Unknown,
                offset => Value::Word((offset - ARGUMENTS_OFFSET) as usize / 4, u32::MAX),
            })
        };
        let mut left = vec![State::default()];
        // Where a jump went two ways; both may come to the same place.
        let mut known = BTreeSet::new();
        while let Some(state) = left.pop() {
            if known.len() > STATE_LIMIT {
                ways.are_all = false;
                break;
            }
            match filter.follow(state, load, |one| {
                ways.compared.insert(one);
            }) {
                None => {
                    ways.answers.insert(Answer::KillProcess);
                }
                Some(End::Answer(Value::Known(value))) => {
                    ways.answers.insert(Answer::of(value));
                }
                // Whatever it likes.
                Some(End::Answer(_)) => {
                    ways.answers.extend([Answer::KillProcess, Answer::Allow]);
                }
                Some(End::Both(states)) => {
                    for state in *states {
                        if known.insert(state.clone()) {
                            left.push(state);
                        }
                    }
                }
            }
        }
        ways
    }

    /// Whether it may let the call through, or not; also if that would take too long to find out.
    pub fn may(&self, let_through: bool) -> bool {
        let mut answers = self.answers.iter();
        !self.are_all || answers.any(|answer| answer.lets_through() == let_through)
    }
}

fn compute(operation: u16, a: Value, operand: Value) -> Option<Value> {
    Some(match (a, operand) {
        (Value::Word(word, mask), Value::Known(operand)) if operation == 0x50 => {
            Value::Word(word, mask & operand)
        }
        (Value::Known(a), Value::Known(operand)) => Value::Known(match operation {
            0x00 => a.wrapping_add(operand),
            0x10 => a.wrapping_sub(operand),
            0x20 => a.wrapping_mul(operand),
            0x30 => a.checked_div(operand)?,
            0x40 => a | operand,
            0x50 => a & operand,
            0x60 => a.checked_shl(operand)?,
            0x70 => a.checked_shr(operand)?,
            0x80 => a.wrapping_neg(),
            0xA0 => a ^ operand,
            _ => return None,
        }),
        _ => Value::Unknown,
    })
}

fn compare(operation: u16, a: u32, operand: u32) -> Option<bool> {
    Some(match operation {
        0x10 => a == operand,
        0x20 => a > operand,
        0x30 => a >= operand,
        0x40 => a & operand != 0,
        _ => return None,
    })
}

/// How many states of a filter are followed for a call. Those that libseccomp makes take some hundreds at most; one that was
/// written to take long is not to keep us for minutes.
const STATE_LIMIT: usize = 1 << 12;

/// Where the arguments begin in `struct seccomp_data`.
const ARGUMENTS_OFFSET: u32 = 16;

/// `sizeof(struct seccomp_data)`.
const SECCOMP_DATA_SIZE: u32 = 64;

impl Call {
    /// A call without arguments.
    pub fn new(architecture: u32, number: u32) -> Self {
        Self {
            number,
            architecture,
            arguments: [0; 6],
        }
    }

    /// The word at `offset` of the kernel's structure.
    fn word(&self, offset: u32) -> Option<u32> {
        let half = |value: u64, is_upper: bool| (value >> (32 * u32::from(is_upper))) as u32;
        match offset {
            0 => Some(self.number),
            4 => Some(self.architecture),
            // The instruction pointer: no filter of ours asks for it.
            8 | 12 => Some(0),
            ARGUMENTS_OFFSET..SECCOMP_DATA_SIZE if offset.is_multiple_of(4) => {
                let word = (offset - ARGUMENTS_OFFSET) / 4;
                Some(half(self.arguments[word as usize / 2], word % 2 == 1))
            }
            _ => None,
        }
    }
}

/// What several filters say together: the strictest answer; without any, everything is allowed.
pub fn answer(filters: &[Filter], call: &Call) -> Answer {
    let answers = filters.iter().map(|filter| filter.answer(call));
    answers.min().unwrap_or(Answer::Allow)
}

/// Whether the system call `name` gets through in any of the machine's numberings, with all arguments one of `arguments`.
pub fn lets_through(filters: &[Filter], name: &str, arguments: &[u64]) -> bool {
    engine::syscall_numbers(name)
        .into_iter()
        .any(|(architecture, number)| {
            arguments.iter().any(|argument| {
                let mut call = Call::new(architecture, number);
                call.arguments = [*argument; 6];
                answer(filters, &call).lets_through()
            })
        })
}

/// Whether the system call `name` gets through in any of the machine's numberings with any arguments.
pub fn may_let_through(filters: &[Filter], name: &str) -> bool {
    let mut numbers = engine::syscall_numbers(name).into_iter();
    numbers.any(|(architecture, number)| {
        let call = Call::new(architecture, number);
        filters
            .iter()
            .all(|filter| Ways::of(filter, &call).may(true))
    })
}

#[cfg(test)]
mod tests {
    use engine::{AUDIT_ARCH_I386 as I386, AUDIT_ARCH_X86_64 as X86_64};

    use super::*;

    fn filter(program: &[(u16, u8, u8, u32)]) -> Filter {
        let instruction = |(code, jt, jf, k): &(u16, u8, u8, u32)| libc::sock_filter {
            code: *code,
            jt: *jt,
            jf: *jf,
            k: *k,
        };
        Filter::new(program.iter().map(instruction).collect())
    }

    #[test]
    fn a_filter_answers_by_number_and_argument() {
        // Call 5 is allowed if the upper half of its second argument is 7.
        let program = filter(&[
            (0x20, 0, 0, 4),
            (0x15, 0, 4, X86_64),
            (0x20, 0, 0, 0),
            (0x15, 0, 2, 5),
            (0x20, 0, 0, 28),
            (0x15, 1, 0, 7),
            (0x06, 0, 0, libc::SECCOMP_RET_ERRNO | 1),
            (0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
        ]);
        let mut call = Call::new(X86_64, 5);
        assert_eq!(program.answer(&call), Answer::Errno(1));
        call.arguments[1] = 7 << 32;
        assert_eq!(program.answer(&call), Answer::Allow);
        call.architecture = I386;
        assert_eq!(program.answer(&call), Answer::Errno(1));
    }

    #[test]
    fn arguments_that_are_let_through_are_found_whatever_they_are() {
        let by_argument = |value: u32| {
            filter(&[
                (0x20, 0, 0, 0),
                (0x15, 0, 3, 5),
                (0x20, 0, 0, 16),
                (0x15, 0, 1, 0x1234),
                (0x06, 0, 0, value),
                (0x06, 0, 0, libc::SECCOMP_RET_ERRNO | 1),
            ])
        };
        let may = |filter: &Filter, number| Ways::of(filter, &Call::new(X86_64, number)).may(true);
        for value in [libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_TRACE] {
            assert!(may(&by_argument(value), 5));
            assert!(!may(&by_argument(value), 6));
        }
        assert!(!may(&by_argument(libc::SECCOMP_RET_KILL_THREAD), 5));
        // Each of these may go two ways, which meet again.
        let mut long = [[(0x20, 0, 0, 16), (0x15, 0, 1, 7), (0x00, 0, 0, 1)]; 1000].concat();
        long.push((0x06, 0, 0, libc::SECCOMP_RET_ERRNO | 1));
        assert!(!may(&filter(&long), 5));
    }

    #[test]
    fn the_strictest_of_several_filters_counts() {
        let all = filter(&[(0x06, 0, 0, libc::SECCOMP_RET_ALLOW)]);
        let none = filter(&[(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | 38)]);
        let call = Call::new(X86_64, 1);
        assert_eq!(answer(&[], &call), Answer::Allow);
        assert_eq!(answer(&[all, none], &call), Answer::Errno(38));
    }

    #[test]
    fn a_malformed_program_allows_nothing() {
        for program in [
            &[][..],
            &[(0x05, 0, 0, u32::MAX)],
            &[(0x34, 0, 0, 0)],
            &[(0x20, 0, 0, 62)],
            &[(0x60, 0, 0, 16)],
            &[(0xFFFF, 0, 0, 0)],
        ] {
            let answer = filter(program).answer(&Call::new(X86_64, 0));
            assert_eq!(answer, Answer::KillProcess, "{program:?}");
        }
    }

    #[test]
    fn both_registers_and_the_memory_compute() {
        let program = filter(&[
            (0x00, 0, 0, 100),
            (0x07, 0, 0, 0),
            (0x00, 0, 0, 7),
            (0x0C, 0, 0, 0), // 107
            (0x24, 0, 0, 3), // 321
            (0x64, 0, 0, 2), // 1284
            (0x74, 0, 0, 1), // 642
            (0xA4, 0, 0, 2), // 640
            (0x44, 0, 0, 1), // 641
            (0x02, 0, 0, 3),
            (0x87, 0, 0, 0),
            (0x60, 0, 0, 3),
            (0x1C, 0, 0, 0), // 541
            (0x15, 0, 1, 541),
            (0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
            (0x06, 0, 0, libc::SECCOMP_RET_KILL_THREAD),
        ]);
        assert_eq!(program.answer(&Call::new(X86_64, 0)), Answer::Allow);
    }
}
