//! What the behaviour tests are written with: a fixture that runs the real
//! `rt` on real bundles under one isolation model, and looks at what is left; for
//! real clients of `rt`, a world of their own and an image for them to run.
//!
//! Nothing here knows how `rt` works inside; it is used as any client uses it.

mod bundle;
pub mod fault;
mod fixture;
mod image;
pub mod network;
mod pseudoterminal;
mod selection;
pub mod snapshot;
mod world;

pub use bundle::{Bundle, copy_program, make_rootfs};
pub use fixture::{Fixture, Model, Outcome, eventually, finish, wait_with_limit};
pub use image::write_image;
pub use pseudoterminal::Pseudoterminal;
pub use selection::{binary_under_test, reason_not_to_run};
pub use world::{Output, World};

/// What a claim returns: nothing, or the reason why it does not hold.
pub type Claim = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Fails the claim with a formatted reason unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err(format!($($reason)+).into());
        }
    };
}

/// Fails the claim, showing both values, unless they are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($what:tt)+) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            return Err(format!(
                "{}: found {:?}, expected {:?}",
                format!($($what)+), left, right
            ).into());
        }
    }};
}
