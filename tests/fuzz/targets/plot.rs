#![no_main]

looptrain_fuzz::target!("plot");
