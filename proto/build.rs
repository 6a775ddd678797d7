//! Generates the tonic code with protox, so that no system protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/looptrain/v1/looptrain.proto";
    println!("cargo::rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    tonic_prost_build::configure()
        // Written by hand, in src/form.rs.
        .extern_path(".looptrain.v1.Form", "crate::form::Form")
        // It lies in logs and manifests, too.
        .type_attribute(".looptrain.v1.Trend", "#[derive(serde::Serialize, serde::Deserialize)]")
        .compile_fds(descriptors)?;
    Ok(())
}
