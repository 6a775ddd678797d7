#![no_main]

looptrain_fuzz::target!("metrics");
