#![no_main]

looptrain_fuzz::target!("dataset_manifest");
