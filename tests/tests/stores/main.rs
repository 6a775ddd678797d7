//! Every store keeps the same promises, and what is saved survives whoever saves it.

#![allow(clippy::unwrap_used)]

mod conformance;
mod kills;
mod ports;
mod seaweed;
