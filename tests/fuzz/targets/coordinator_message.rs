#![no_main]

looptrain_fuzz::target!("coordinator_message");
