#![no_main]

looptrain_fuzz::target!("checkpoint_part");
