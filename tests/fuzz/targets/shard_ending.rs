#![no_main]

looptrain_fuzz::target!("shard_ending");
