//! Makes Rust types of the messages in `proto/`.

use protobuf_codegen::{Codegen, Customize};

fn main() {
    println!("cargo::rerun-if-changed=proto");
    Codegen::new()
        .pure()
        .include("proto")
        .inputs(["proto/cri.proto", "proto/runtimeoptions.proto"])
        .customize(Customize::default().lite_runtime(true))
        .cargo_out_dir("proto")
        .run_from_script();
}
