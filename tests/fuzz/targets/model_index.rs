#![no_main]

looptrain_fuzz::target!("model_index");
