//! The whole program with real processes: what a user does, and what must hold when he does it.

#![allow(clippy::unwrap_used)]

mod audit;
mod bad_input;
mod bench;
mod branch;
mod chaos;
mod checkpoints;
mod cluster;
mod data;
mod data_on_s3;
mod deployment;
mod docs;
mod doctor;
mod elastic;
mod end_to_end;
mod export;
mod fast;
mod http;
mod kills;
mod left_behind;
mod moments;
mod nccl;
mod network;
mod operate;
mod others;
mod page;
#[path = "../stores/ports.rs"]
mod ports;
mod preemption;
mod prometheus;
mod recipe;
mod same_bits;
#[path = "../stores/seaweed.rs"]
mod seaweed;
mod security;
mod stores;
mod support;
mod telemetry;
mod tensorboard;
mod tokenizer;
mod tool;
mod trained;
