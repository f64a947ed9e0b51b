//! A tap device of the host's kernel: an Ethernet interface whose packets this process reads and writes.
//!
//! The kernel is trusted; what it hands on of the guest's packets and headers it checks itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{c_int, c_uint};
use thiserror::Error;

/// The device that makes tap devices.
const TUN: &str = "/dev/net/tun";

/// The bytes of `struct virtio_net_hdr_v1` before each packet, in both directions (virtio 1.2, 5.1.6).
pub(super) const HEADER_SIZE: usize = 12;

/// Packets that wait to be sent count against no limit of the socket: the guest's queue bounds them.
const SEND_BUFFER: c_int = c_int::MAX;

/// Why there is no tap device.
#[derive(Debug, Error)]
pub enum TapError {
    /// The device cannot be opened.
    #[error("cannot open {TUN}: load the kernel module `tun` (CONFIG_TUN)")]
    Open(#[source] io::Error),
    /// A name that the kernel does not take.
    #[error("{0:?} is no name of a network device")]
    Name(String),
    /// The device refuses a request.
    #[error("the ioctl {request} on {TUN} failed")]
    Request {
        /// Its name.
        request: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A tap device. It is gone when it is dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

/// What the guest takes over from the kernel of the host: packets without their checksum, and such that are longer
/// than the wire allows and still to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Offloads {
    /// Checksums.
    pub(super) checksum: bool,
    /// TCP segments over IPv4.
    pub(super) tso4: bool,
    /// TCP segments over IPv6.
    pub(super) tso6: bool,
    /// Of segments with congestion notification too.
    pub(super) ecn: bool,
}

impl Tap {
    /// Makes a tap device in the caller's network namespace. It is down and has no address. In `pattern` the kernel
    /// puts a number for `%d`.
    ///
    /// # Errors
    /// There is no such device on the host, or the caller may not use it.
    pub fn create(pattern: &str) -> Result<Self, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN)
            .map_err(TapError::Open)?;
        // SAFETY: all zeroes is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if pattern.len() >= request.ifr_name.len() || !pattern.is_ascii() {
            return Err(TapError::Name(pattern.to_owned()));
        }
        for (target, byte) in request.ifr_name.iter_mut().zip(pattern.bytes()) {
            *target = byte.cast_signed();
        }
        // At most 0x5002.
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        request.ifr_ifru.ifru_flags = flags;
        // SAFETY: the request is an `ifreq` that outlives the call, as TUNSETIFF wants it.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        check("TUNSETIFF", done)?;
        let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
        let name = name.map(|byte| char::from(byte.cast_unsigned())).collect();
        let tap = Self { file, name };
        // At most 12.
        tap.set(
            "TUNSETVNETHDRSZ",
            libc::TUNSETVNETHDRSZ,
            HEADER_SIZE as c_int,
        )?;
        tap.set("TUNSETSNDBUF", libc::TUNSETSNDBUF, SEND_BUFFER)?;
        Ok(tap)
    }

    /// A socket that keeps the borders of packets, in place of a device of the kernel's.
    #[cfg(feature = "fuzzing")]
    pub(super) fn of_socket(socket: std::os::fd::OwnedFd) -> Self {
        Self {
            file: socket.into(),
            name: "socket".to_owned(),
        }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn set(&self, name: &'static str, request: libc::Ioctl, value: c_int) -> Result<(), TapError> {
        // SAFETY: both requests read an `int` through the pointer.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), request, &raw const value) };
        check(name, done)
    }

    /// Says what the kernel may leave to the reader of packets.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let flag = |set: bool, flag: c_uint| if set { flag } else { 0 };
        let flags = flag(offloads.checksum, libc::TUN_F_CSUM)
            | flag(offloads.tso4, libc::TUN_F_TSO4)
            | flag(offloads.tso6, libc::TUN_F_TSO6)
            | flag(offloads.ecn, libc::TUN_F_TSO_ECN);
        // SAFETY: the request takes its flags by value.
        let done = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn check(request: &'static str, done: c_int) -> Result<(), TapError> {
    if done == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    Err(TapError::Request { request, source })
}
