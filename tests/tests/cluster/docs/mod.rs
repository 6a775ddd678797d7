//! The documents do what they say: commands in them are ones that the program understands, the tutorial
//! runs from its first line to its last, and links lead somewhere.

mod commands;
mod links;
mod pages;
mod shell;
mod tutorial;
