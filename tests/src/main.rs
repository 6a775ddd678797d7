//! The `looptrain` program once more, so that the tests of this package have it at hand: cargo tells
//! tests the path of their own package's programs alone.

use std::process::ExitCode;

fn main() -> ExitCode {
    looptrain::main()
}
