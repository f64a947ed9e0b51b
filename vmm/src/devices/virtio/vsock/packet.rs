//! The header of a vsock packet (virtio 1.2, 5.10.6): the bytes are the guest's when it sends.

use crate::devices::virtio::queue::Chain;
use crate::memory::GuestRam;

/// Length of a header on the wire.
pub const HEADER_SIZE: usize = 44;

/// The only socket type that is offered.
pub const TYPE_STREAM: u16 = 1;

/// SHUTDOWN flag: the sender of the packet will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender of the packet will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A connection's name: what the host calls the port, and what the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A header as it came. `op` and `kind` may be unknown ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub length: u32,
    pub kind: u16,
    pub op: Option<Op>,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header of a packet that the guest sends, if the chain is long enough.
    pub fn read(memory: &GuestRam, chain: &Chain) -> Option<Self> {
        let mut raw = [0; HEADER_SIZE];
        if chain.copy_from(memory, 0, &mut raw) != HEADER_SIZE {
            return None;
        }
        Some(Self::from_bytes(&raw))
    }

    /// Decodes a header.
    pub fn from_bytes(raw: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = raw.as_slice();
        Self {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: Op::from_wire(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes the header.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let op = self.op.map_or(0, Op::to_wire);
        let mut raw = [0; HEADER_SIZE];
        let mut rest = raw.as_mut_slice();
        put(&mut rest, &self.source_cid.to_le_bytes());
        put(&mut rest, &self.destination_cid.to_le_bytes());
        put(&mut rest, &self.source_port.to_le_bytes());
        put(&mut rest, &self.destination_port.to_le_bytes());
        put(&mut rest, &self.length.to_le_bytes());
        put(&mut rest, &self.kind.to_le_bytes());
        put(&mut rest, &op.to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buf_alloc.to_le_bytes());
        put(&mut rest, &self.fwd_cnt.to_le_bytes());
        raw
    }
}

/// The next `N` bytes; zeros past the end, which a header's size rules out.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((head, tail)) => {
            *rest = tail;
            *head
        }
        None => [0; N],
    }
}

fn put(rest: &mut &mut [u8], bytes: &[u8]) {
    if let Some((head, tail)) = std::mem::take(rest).split_at_mut_checked(bytes.len()) {
        head.copy_from_slice(bytes);
        *rest = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire_and_lies_where_the_specification_says() {
        let header = Header {
            source_cid: 3,
            destination_cid: 2,
            source_port: 0x0102_0304,
            destination_port: 1024,
            length: 77,
            kind: TYPE_STREAM,
            op: Some(Op::Data),
            flags: 3,
            buf_alloc: 0x1_0000,
            fwd_cnt: u32::MAX,
        };
        let raw = header.to_bytes();
        assert_eq!(Header::from_bytes(&raw), header);
        assert_eq!(raw[..8], 3u64.to_le_bytes());
        assert_eq!(raw[16..20], [4, 3, 2, 1]);
        assert_eq!(raw[28..32], [1, 0, 5, 0]);
        assert_eq!(raw[40..], [0xff; 4]);
    }
}
