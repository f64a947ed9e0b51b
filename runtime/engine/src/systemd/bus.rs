//! Calls to systemd over D-Bus, one after the other.
//!
//! A client of our own, because those there are do not fit a process that forks: they bring threads or an async
//! runtime, or a C library. It knows the few types that these calls need. Who answers is systemd, or the user's own
//! manager; lengths in its messages are checked all the same.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// systemd starts and stops a scope in milliseconds; a boot with hundreds of units may hold it up.
const LIMIT: Duration = Duration::from_secs(30);
/// More than any answer here; the specification allows 128 MiB.
const LONGEST: usize = 1 << 20;
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// Why systemd did not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be reached.
    #[error("cannot reach systemd: none of {places:?} answers; is this system run by systemd?")]
    NotThere {
        /// The sockets that were tried.
        places: Vec<PathBuf>,
    },
    /// The connection broke, or it took too long.
    #[error("cannot talk to systemd")]
    Connection(#[from] io::Error),
    /// It said no.
    #[error("systemd refused {call}: {message} ({name})")]
    Refused {
        /// The method.
        call: &'static str,
        /// The error's name on the bus.
        name: String,
        /// What it said.
        message: String,
    },
    /// A unit's job ended badly.
    #[error("systemd could not {call} {unit}: the job's result is {result:?}")]
    Job {
        /// What was asked for.
        call: &'static str,
        /// Of which unit.
        unit: String,
        /// As systemd names it.
        result: String,
    },
}

impl Error {
    /// Whether systemd's error has this last part of its name.
    pub(super) fn is(&self, kind: &str) -> bool {
        matches!(self, Self::Refused { name, .. } if name.rsplit('.').next() == Some(kind))
    }
}

/// A value of a unit's property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Bool(bool),
    U64(u64),
    Text(String),
    Pids(Vec<u32>),
    Bits(Vec<u8>),
}

/// A unit's property.
pub(super) type Property = (&'static str, Value);

/// D-Bus specification, "Marshaling": each value is aligned from the start of the message.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.0.push(text.len() as u8);
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array, whose elements `fill` writes.
    fn array(&mut self, alignment: usize, fill: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length = self.0.len() - 4;
        self.align(alignment);
        let start = self.0.len();
        fill(self);
        let filled = (self.0.len() - start) as u32;
        self.0[length..length + 4].copy_from_slice(&filled.to_le_bytes());
    }

    fn variant(&mut self, value: &Value) {
        match value {
            Value::Bool(value) => {
                self.signature("b");
                self.u32((*value).into());
            }
            Value::U64(value) => {
                self.signature("t");
                self.align(8);
                self.0.extend(value.to_le_bytes());
            }
            Value::Text(text) => {
                self.signature("s");
                self.string(text);
            }
            Value::Pids(pids) => {
                self.signature("au");
                self.array(4, |array| pids.iter().for_each(|pid| array.u32(*pid)));
            }
            Value::Bits(bits) => {
                self.signature("ay");
                self.array(1, |array| array.0.extend(bits));
            }
        }
    }

    fn properties(&mut self, properties: &[Property]) {
        self.array(8, |array| {
            for (name, value) in properties {
                array.align(8);
                array.string(name);
                array.variant(value);
            }
        });
    }

    /// A header field: its number, and its value as a variant of a string type.
    fn field(&mut self, number: u8, kind: &str, value: &str) {
        self.align(8);
        self.0.push(number);
        self.signature(kind);
        match kind {
            "g" => self.signature(value),
            _ => self.string(value),
        }
    }
}

/// The reading side: it never goes beyond the message.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, alignment: usize, length: usize) -> io::Result<&'a [u8]> {
        let start = self.at.next_multiple_of(alignment);
        let end = start.checked_add(length);
        let bytes = end.and_then(|end| self.bytes.get(start..end));
        let bytes = bytes.ok_or_else(|| malformed("it is too short"))?;
        self.at = start + length;
        Ok(bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        let bytes = self.take(4, 4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self, length: usize) -> io::Result<String> {
        let text = self.take(1, length)?;
        let text = std::str::from_utf8(text).map_err(|_| malformed("a string is not UTF-8"))?;
        self.take(1, 1)?;
        Ok(text.to_owned())
    }

    fn string(&mut self) -> io::Result<String> {
        let length = self.u32()?;
        self.text(length as usize)
    }

    fn signature(&mut self) -> io::Result<String> {
        let length = self.take(1, 1)?[0];
        self.text(length.into())
    }
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("a malformed message: {why}"),
    )
}

/// What came: an answer or a signal.
#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    /// 2 is an answer, 3 an error, 4 a signal.
    kind: u8,
    reply_to: u32,
    /// The member of a signal, or the name of an error.
    name: String,
    signature: String,
    body: Vec<u8>,
}

impl Message {
    /// The header's fixed part says how long the rest is.
    fn lengths(fixed: &[u8; 16]) -> io::Result<(usize, usize)> {
        if fixed[0] != b'l' {
            return Err(malformed("it is not little-endian"));
        }
        let number = |at: usize| {
            u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]) as usize
        };
        let (body, fields) = (number(4), number(12));
        if body > LONGEST || fields > LONGEST {
            return Err(malformed("it is too long"));
        }
        Ok((fields.next_multiple_of(8), body))
    }

    fn parse(kind: u8, fields: &[u8], body: Vec<u8>) -> io::Result<Self> {
        let mut message = Self {
            kind,
            body,
            ..Self::default()
        };
        let mut reader = Reader {
            bytes: fields,
            at: 0,
        };
        // Padding may follow the last field.
        while reader.at + 8 <= fields.len() {
            let number = reader.take(8, 1)?[0];
            let signature = reader.signature()?;
            match (number, signature.as_str()) {
                (0, _) => break,
                (5, "u") => message.reply_to = reader.u32()?,
                (3 | 4, "s") => message.name = reader.string()?,
                (8, "g") => message.signature = reader.signature()?,
                (_, "u") => drop(reader.u32()?),
                (_, "s" | "o") => drop(reader.string()?),
                (_, "g") => drop(reader.signature()?),
                _ => return Err(malformed("a header field of an unknown type")),
            }
        }
        Ok(message)
    }

    fn reader(&self) -> Reader<'_> {
        Reader {
            bytes: &self.body,
            at: 0,
        }
    }
}

/// A connection to systemd.
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
    /// Jobs that ended before somebody asked for them: path and result.
    ended: Vec<(String, String)>,
}

impl Bus {
    /// Connects to the system's manager, or to the user's.
    ///
    /// Both listen on a socket of their own, which is there before a bus is; else on the bus.
    pub(super) fn connect(user: bool) -> Result<Self, Error> {
        let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let address = |name: &str| {
            let value = of(name)?;
            let value = value.to_str()?.split(';').find_map(|one| {
                let path = one.strip_prefix("unix:path=")?;
                path.split(',').next()
            })?;
            Some(PathBuf::from(value))
        };
        let mut places = Vec::new();
        if user {
            let directory = of("XDG_RUNTIME_DIR").map(PathBuf::from);
            if let Some(directory) = &directory {
                places.push((directory.join("systemd/private"), false));
            }
            let bus = address("DBUS_SESSION_BUS_ADDRESS");
            places.extend(
                bus.or(directory.map(|one| one.join("bus")))
                    .map(|one| (one, true)),
            );
        } else {
            places.push((PathBuf::from("/run/systemd/private"), false));
            let bus = address("DBUS_SYSTEM_BUS_ADDRESS");
            places.push((
                bus.unwrap_or_else(|| PathBuf::from("/run/dbus/system_bus_socket")),
                true,
            ));
        }
        for (place, is_bus) in &places {
            let Ok(stream) = UnixStream::connect(place) else {
                continue;
            };
            let mut bus = Self {
                stream,
                serial: 0,
                ended: Vec::new(),
            };
            bus.stream.set_read_timeout(Some(LIMIT))?;
            bus.stream.set_write_timeout(Some(LIMIT))?;
            bus.authenticate()?;
            if *is_bus {
                bus.enter()?;
            }
            return Ok(bus);
        }
        Err(Error::NotThere {
            places: places.into_iter().map(|(place, _)| place).collect(),
        })
    }

    /// The other side sees who we are by our socket, so nothing is claimed: that holds in a user namespace too.
    fn authenticate(&mut self) -> Result<(), Error> {
        self.stream
            .write_all(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")?;
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            line.push(byte[0]);
            if !line.ends_with(b"\r\n") {
                if line.len() > 512 {
                    return Err(malformed("an endless line").into());
                }
                continue;
            }
            if line.starts_with(b"OK") {
                return Ok(());
            }
            if !line.starts_with(b"DATA") {
                let text = String::from_utf8_lossy(&line).trim().to_owned();
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, text).into());
            }
            line.clear();
        }
    }

    /// Makes us known to a bus, and has it pass on which jobs have ended.
    fn enter(&mut self) -> Result<(), Error> {
        let to = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
        self.call(to, to.0, "Hello", "", |_| {})?;
        let rule = format!("type='signal',interface='{MANAGER}',member='JobRemoved'");
        self.call(to, to.0, "AddMatch", "s", |body| body.string(&rule))?;
        Ok(())
    }

    fn call(
        &mut self,
        (destination, path): (&str, &str),
        interface: &str,
        member: &'static str,
        signature: &str,
        fill: impl FnOnce(&mut Writer),
    ) -> Result<Message, Error> {
        let mut body = Writer::default();
        fill(&mut body);
        self.serial += 1;
        let serial = self.serial;
        // Little-endian, a method call, no flags, version 1 of the protocol.
        let mut message = Writer(vec![b'l', 1, 0, 1]);
        message.u32(body.0.len() as u32);
        message.u32(serial);
        message.array(8, |fields| {
            fields.field(1, "o", path);
            fields.field(2, "s", interface);
            fields.field(3, "s", member);
            fields.field(6, "s", destination);
            if !signature.is_empty() {
                fields.field(8, "g", signature);
            }
        });
        message.align(8);
        message.0.append(&mut body.0);
        self.stream.write_all(&message.0)?;
        loop {
            let message = self.receive()?;
            match message.kind {
                2 if message.reply_to == serial => return Ok(message),
                3 if message.reply_to == serial => {
                    let text = match message.signature.starts_with('s') {
                        true => message.reader().string()?,
                        false => String::new(),
                    };
                    return Err(Error::Refused {
                        call: member,
                        name: message.name,
                        message: text,
                    });
                }
                _ => self.note(&message)?,
            }
        }
    }

    fn receive(&mut self) -> io::Result<Message> {
        let mut fixed = [0; 16];
        self.stream.read_exact(&mut fixed)?;
        let (fields, body) = Message::lengths(&fixed)?;
        let mut rest = vec![0; fields + body];
        self.stream.read_exact(&mut rest)?;
        let body = rest.split_off(fields);
        Message::parse(fixed[1], &rest, body)
    }

    /// Remembers a job that has ended.
    fn note(&mut self, message: &Message) -> io::Result<()> {
        if message.kind == 4 && message.name == "JobRemoved" && message.signature == "uoss" {
            let mut reader = message.reader();
            reader.u32()?;
            let job = reader.string()?;
            reader.string()?;
            self.ended.push((job, reader.string()?));
        }
        Ok(())
    }

    /// A call to the manager.
    fn manage(
        &mut self,
        member: &'static str,
        signature: &str,
        fill: impl FnOnce(&mut Writer),
    ) -> Result<Message, Error> {
        let to = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1");
        self.call(to, MANAGER, member, signature, fill)
    }

    /// Waits for the end of the job that a call answered with.
    fn finish(&mut self, call: &'static str, unit: &str, answer: &Message) -> Result<(), Error> {
        let job = answer.reader().string()?;
        loop {
            if let Some((_, result)) = self.ended.iter().find(|(one, _)| *one == job) {
                return match result.as_str() {
                    "done" => Ok(()),
                    result => Err(Error::Job {
                        call,
                        unit: unit.to_owned(),
                        result: result.to_owned(),
                    }),
                };
            }
            let message = self.receive()?;
            self.note(&message)?;
        }
    }

    /// Makes a unit that lives until its processes have ended.
    pub(super) fn start(&mut self, unit: &str, properties: &[Property]) -> Result<(), Error> {
        let answer = self.manage("StartTransientUnit", "ssa(sv)a(sa(sv))", |body| {
            body.string(unit);
            body.string("fail");
            body.properties(properties);
            body.array(8, |_| {});
        })?;
        self.finish("start", unit, &answer)
    }

    /// Ends a unit.
    pub(super) fn stop(&mut self, unit: &str) -> Result<(), Error> {
        let answer = self.manage("StopUnit", "ss", |body| {
            body.string(unit);
            body.string("replace");
        })?;
        self.finish("stop", unit, &answer)
    }

    /// Forgets a unit that has failed.
    pub(super) fn reset_failed(&mut self, unit: &str) -> Result<(), Error> {
        self.manage("ResetFailedUnit", "s", |body| body.string(unit))
            .map(drop)
    }

    /// Changes properties of a unit until it ends.
    pub(super) fn set(&mut self, unit: &str, properties: &[Property]) -> Result<(), Error> {
        self.manage("SetUnitProperties", "sba(sv)", |body| {
            body.string(unit);
            body.u32(1);
            body.properties(properties);
        })
        .map(drop)
    }

    /// The cgroup that the manager itself has.
    pub(super) fn control_group(&mut self) -> Result<String, Error> {
        let to = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1");
        let properties = "org.freedesktop.DBus.Properties";
        let answer = self.call(to, properties, "Get", "ss", |body| {
            body.string(MANAGER);
            body.string("ControlGroup");
        })?;
        let mut reader = answer.reader();
        if reader.signature()? != "s" {
            return Err(malformed("ControlGroup is not a string").into());
        }
        Ok(reader.string()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_marshalled_as_the_specification_says() {
        let mut writer = Writer::default();
        writer.properties(&[("A", Value::Bool(true)), ("B", Value::U64(7))]);
        let expected = [
            // The array's length, and the padding of its first structure.
            &[40, 0, 0, 0, 0, 0, 0, 0][..],
            &[1, 0, 0, 0, b'A', 0, 1, b'b', 0, 0, 0, 0, 1, 0, 0, 0],
            &[1, 0, 0, 0, b'B', 0, 1, b't', 0, 0, 0, 0, 0, 0, 0, 0],
            &[7, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        assert_eq!(writer.0, expected);
    }

    fn signal() -> Vec<u8> {
        let mut writer = Writer::default();
        writer.u32(4);
        writer.string("/job/4");
        writer.string("a.scope");
        writer.string("done");
        writer.0
    }

    #[test]
    fn a_signal_is_parsed_and_its_fields_are_checked() {
        let mut fields = Writer::default();
        fields.field(1, "o", "/org/freedesktop/systemd1");
        fields.field(3, "s", "JobRemoved");
        fields.field(8, "g", "uoss");
        fields.align(8);
        let message = Message::parse(4, &fields.0, signal()).unwrap();
        assert_eq!(
            (message.name.as_str(), message.signature.as_str()),
            ("JobRemoved", "uoss")
        );
        let (stream, _other) = UnixStream::pair().unwrap();
        let mut bus = Bus {
            stream,
            serial: 0,
            ended: Vec::new(),
        };
        bus.note(&message).unwrap();
        assert_eq!(bus.ended, [("/job/4".to_owned(), "done".to_owned())]);
        // Cut short anywhere, it is an error or no such signal, never more than there is.
        for length in 0..message.body.len() {
            let body = message.body[..length].to_vec();
            let cut = Message::parse(4, &fields.0, body).unwrap();
            assert!(bus.note(&cut).is_err());
        }
        for length in 0..fields.0.len() {
            let _ = Message::parse(4, &fields.0[..length], Vec::new());
        }
    }

    #[test]
    fn a_message_that_claims_too_much_is_refused() {
        let mut fixed = [0; 16];
        fixed[0] = b'l';
        assert_eq!(Message::lengths(&fixed).unwrap(), (0, 0));
        fixed[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Message::lengths(&fixed).is_err());
        fixed[0] = b'B';
        assert!(Message::lengths(&fixed).is_err());
    }
}
