#![no_main]

looptrain_fuzz::target!("held");
