#![no_main]

looptrain_fuzz::target!("status_reply");
