#![no_main]

looptrain_fuzz::target!("worker_message");
