//! A bound on what a tar reader may read at one time.
//!
//! The reader keeps long names and extended attributes in memory, whatever their size. They are read while it looks
//! for the next entry; so the budget is set before each step, and lifted while an entry's content is read.

use std::cell::Cell;
use std::io::{self, Read, Seek, SeekFrom};
use std::rc::Rc;

/// An entry's header, names and attributes take no more than this.
const MAX_METADATA: u64 = 1 << 20;

/// A reader that fails when its budget is used up.
pub(super) struct Budget<R> {
    inner: R,
    left: Allowance,
}

/// How much may still be read.
#[derive(Clone)]
pub(super) struct Allowance(Rc<Cell<u64>>);

impl Allowance {
    /// Allows the metadata of one entry.
    pub(super) fn metadata(&self) {
        self.0.set(MAX_METADATA);
    }

    /// Allows everything.
    pub(super) fn content(&self) {
        self.0.set(u64::MAX);
    }
}

impl<R> Budget<R> {
    /// Hands the reader back.
    pub(super) fn into_inner(self) -> R {
        self.inner
    }

    /// Wraps `inner`; nothing may be read until the allowance is set.
    pub(super) fn new(inner: R) -> (Self, Allowance) {
        let left = Allowance(Rc::new(Cell::new(0)));
        (
            Self {
                inner,
                left: left.clone(),
            },
            left,
        )
    }
}

impl<R: Read> Read for Budget<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.left.0.get();
        if left == 0 && !buf.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "an entry's names and attributes exceed {} KiB",
                    MAX_METADATA >> 10
                ),
            ));
        }
        let len = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        let read = self.inner.read(&mut buf[..len])?;
        self.left.0.set(left - read as u64);
        Ok(read)
    }
}

impl<R: Seek> Seek for Budget<R> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.inner.seek(position)
    }
}
