#![no_main]

looptrain_fuzz::target!("jsonl_zstd");
