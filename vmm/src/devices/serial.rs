//! The 16550 serial port: the way by which a kernel's early messages and its panic come out.
//!
//! Each byte costs the guest an exit, so it is quiet unless something is wrong. The bytes are the
//! guest's: they go to the caller's sink as they are, and the last lines are kept, bounded in length
//! and number, to be quoted when the machine fails.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;

/// How many of the last lines are kept.
const TAIL_LINES: usize = 128;
/// How many bytes of a line are kept; the rest of a longer one is dropped.
const TAIL_LINE_BYTES: usize = 1024;

/// The last lines that the guest wrote to its console.
///
/// The text is the guest's: control characters are left out, but nothing else about it can be
/// relied on.
#[derive(Debug, Clone, Default)]
pub struct ConsoleTail(Arc<Mutex<Tail>>);

#[derive(Debug, Default)]
struct Tail {
    lines: VecDeque<String>,
    open: Vec<u8>,
}

impl ConsoleTail {
    /// The last lines, oldest first, at most 128.
    pub fn lines(&self) -> Vec<String> {
        let tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let open = Some(printable(&tail.open)).filter(|line| !line.is_empty());
        tail.lines.iter().cloned().chain(open).collect()
    }

    /// What the guest's kernel said when it panicked, if it did.
    pub fn panic_message(&self) -> Option<String> {
        const MARK: &str = "Kernel panic - not syncing: ";
        let lines = self.lines();
        lines.iter().rev().find_map(|line| {
            let (_, message) = line.split_once(MARK)?;
            Some(message.trim().to_owned())
        })
    }

    fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if byte == b'\n' {
                let line = printable(&tail.open);
                tail.open.clear();
                if tail.lines.len() == TAIL_LINES {
                    tail.lines.pop_front();
                }
                tail.lines.push_back(line);
            } else if tail.open.len() < TAIL_LINE_BYTES {
                tail.open.push(byte);
            }
        }
    }
}

fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .chars()
        .filter(|c| !c.is_control())
        .collect()
}

/// The port's interrupt line.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port's transmitter: collects a line, then gives it to the sink in one write.
struct Output {
    sink: Box<dyn Write + Send>,
    line: Vec<u8>,
    tail: ConsoleTail,
}

impl Output {
    fn drain(&mut self) -> io::Result<()> {
        let result = self.sink.write_all(&self.line);
        self.line.clear();
        result
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        self.line.extend_from_slice(bytes);
        if self.line.len() >= TAIL_LINE_BYTES || bytes.contains(&b'\n') {
            self.drain()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // The model flushes after each byte; a line goes out when it is complete.
        Ok(())
    }
}

/// How the registers are written down.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
pub(crate) struct SerialRegisters {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// The serial port at its eight registers.
pub(crate) struct SerialPort {
    model: Serial<Interrupt, NoEvents, Output>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// Number of ports.
    pub const PORTS: u64 = 8;

    /// A port that writes to `sink` and `tail` and interrupts by `interrupt`, with these registers.
    ///
    /// # Errors
    /// They are no port's, or the interrupt that they ask for cannot be raised.
    pub fn new(
        interrupt: EventFd,
        sink: Box<dyn Write + Send>,
        tail: ConsoleTail,
        registers: &SerialState,
    ) -> io::Result<Self> {
        let output = Output {
            sink,
            line: Vec::new(),
            tail,
        };
        let model = Serial::from_state(registers, Interrupt(interrupt), NoEvents, output);
        let model = model.map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(Self { model })
    }

    /// The registers as they are.
    pub fn registers(&self) -> SerialState {
        self.model.state()
    }

    /// Gives an unfinished line to the sink.
    pub fn drain(&mut self) {
        if let Err(error) = self.model.writer_mut().drain() {
            tracing::warn!(%error, "writing the guest's console output");
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.model.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (&[byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.model.write(offset, byte)
        {
            tracing::debug!(?error, "the guest's serial port");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_reaches_the_sink_by_lines_and_the_tail_at_once() {
        let (sink, tail) = (Sink::default(), ConsoleTail::default());
        let interrupt = EventFd::new(0).unwrap();
        let mut port = SerialPort::new(
            interrupt,
            Box::new(sink.clone()),
            tail.clone(),
            &SerialState::default(),
        )
        .unwrap();
        for &byte in b"one\ntw" {
            port.write(0, &[byte]);
        }
        assert_eq!(*sink.0.lock().unwrap(), b"one\n");
        assert_eq!(tail.lines(), ["one", "tw"]);
        port.drain();
        assert_eq!(*sink.0.lock().unwrap(), b"one\ntw");
        // The line status register says that the transmitter is empty.
        let mut status = [0];
        port.read(5, &mut status);
        assert_eq!(status[0] & 0x60, 0x60);
    }

    #[test]
    fn the_tail_is_bounded_whatever_the_guest_writes() {
        let tail = ConsoleTail::default();
        tail.push(&[b'x'; 100_000]);
        assert_eq!(tail.lines(), ["x".repeat(TAIL_LINE_BYTES)]);
        for _ in 0..1000 {
            tail.push(b"\n\xff\x1b[31mred\r");
        }
        let lines = tail.lines();
        assert_eq!(lines.len(), TAIL_LINES + 1);
        assert_eq!(lines[TAIL_LINES], "\u{fffd}[31mred");
    }

    #[test]
    fn a_panic_is_found_in_the_tail() {
        let tail = ConsoleTail::default();
        assert_eq!(tail.panic_message(), None);
        tail.push(b"[    0.1] Kernel panic - not syncing: No working init found.\r\n[ 0.2] CPU: 0");
        let message = tail.panic_message().unwrap();
        assert_eq!(message, "No working init found.");
    }
}
