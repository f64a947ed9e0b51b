//! A bundle's configuration: parsed, checked, and judged.

use std::fs;

use runtime::bundle::{Bundle, CONFIG_FILE};
use runtime::verify::{self, policy::Policy};
use tempfile::TempDir;

struct Place {
    directory: TempDir,
    policy: Policy,
}

thread_local! {
    static PLACE: Place = Place::new();
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        Self {
            directory,
            policy: Policy::load("rt-strict").unwrap(),
        }
    }
}

/// The text of a config.json, as `rt create` and `rt verify` take it.
pub fn config(data: &[u8]) {
    PLACE.with(|place| {
        let directory = place.directory.path();
        fs::write(directory.join(CONFIG_FILE), data).unwrap();
        // Either is fine, here and below.
        if let Ok(bundle) = Bundle::load(directory) {
            let _ = engine::validate(bundle.spec());
            let json = bundle.to_json().unwrap();
            serde_json::from_slice::<serde_json::Value>(&json).unwrap();
        }
        let _ = verify::bundle(directory, &place.policy);
    });
}
