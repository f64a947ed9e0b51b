//! Content digests (OCI image specification, descriptor.md): `sha256:<hex>` and `sha512:<hex>`.

use std::fmt;
use std::io::{self, Read};

use serde::Deserialize;
use sha2::{Digest as _, Sha256, Sha512};

use super::Error;

/// A digest whose form is right: it can be a file name.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq)]
#[serde(try_from = "String")]
pub(super) struct Digest {
    algorithm: Algorithm,
    hex: String,
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Digest {
    /// The name of the algorithm, as the folder of its blobs.
    pub(super) fn algorithm(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// The lower-case hexadecimal digits.
    pub(super) fn hex(&self) -> &str {
        &self.hex
    }

    /// The SHA-256 digest of these digits.
    pub(super) fn sha256(hex: &str) -> Option<Self> {
        Self::try_from(format!("sha256:{hex}")).ok()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (algorithm, hex) = match text.split_once(':') {
            Some(("sha256", hex)) if hex.len() == 64 => (Algorithm::Sha256, hex),
            Some(("sha512", hex)) if hex.len() == 128 => (Algorithm::Sha512, hex),
            _ => return Err(format!("{text:?} is not a sha256 or sha512 digest")),
        };
        if !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(format!("{text:?} is not in lower-case hexadecimal digits"));
        }
        Ok(Self {
            algorithm,
            hex: hex.to_owned(),
        })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex)
    }
}

enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

/// A reader that digests what passes through, if there is a digest to compare with.
pub(super) struct Verified<R> {
    inner: R,
    check: Option<(Digest, Hasher)>,
}

impl<R: Read> Verified<R> {
    pub(super) fn new(inner: R, expected: Option<Digest>) -> Self {
        let check = expected.map(|expected| {
            let hasher = match expected.algorithm {
                Algorithm::Sha256 => Hasher::Sha256(Sha256::new()),
                Algorithm::Sha512 => Hasher::Sha512(Sha512::new()),
            };
            (expected, hasher)
        });
        Self { inner, check }
    }

    /// Compares the digest of all that was read with the expected one.
    pub(super) fn verify(self) -> Result<(), Error> {
        let Some((expected, hasher)) = self.check else {
            return Ok(());
        };
        let hex = match hasher {
            Hasher::Sha256(hasher) => hex(&hasher.finalize()),
            Hasher::Sha512(hasher) => hex(&hasher.finalize()),
        };
        if hex == expected.hex {
            return Ok(());
        }
        let actual = format!("{}:{hex}", expected.algorithm());
        Err(Error::Digest {
            expected: expected.to_string(),
            actual,
        })
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buf)?;
        match &mut self.check {
            Some((_, Hasher::Sha256(hasher))) => hasher.update(&buf[..len]),
            Some((_, Hasher::Sha512(hasher))) => hasher.update(&buf[..len]),
            None => {}
        }
        Ok(len)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The SHA-256 digest of `content`, as text.
    pub(in crate::image) fn of(content: &[u8]) -> String {
        format!("sha256:{}", hex(&Sha256::digest(content)))
    }

    #[test]
    fn content_is_told_from_its_digest() {
        let digest = Digest::try_from(of(b"content")).unwrap();
        let mut good = Verified::new(&b"content"[..], Some(digest.clone()));
        io::copy(&mut good, &mut io::sink()).unwrap();
        good.verify().unwrap();
        let mut bad = Verified::new(&b"c0ntent"[..], Some(digest));
        io::copy(&mut bad, &mut io::sink()).unwrap();
        assert!(matches!(bad.verify(), Err(Error::Digest { .. })));
    }

    #[test]
    fn a_digest_that_is_no_file_name_is_refused() {
        let slashes = format!(
            "sha256:{}",
            "../".repeat(22).chars().take(64).collect::<String>()
        );
        for text in [
            "",
            "sha256:",
            "sha256:12",
            "md5:00",
            "../../etc/passwd",
            &slashes,
            &of(b"").to_uppercase(),
        ] {
            Digest::try_from(text.to_owned()).unwrap_err();
        }
    }
}
