//! Programs of others that tests look at the product with. `tests/run` gets them; without it, and
//! outside CI, a test that needs one that is not there says so and is left out.

use std::ffi::OsString;
use std::path::PathBuf;

/// What a variable that `tests/run` sets names; `None` when the test is to be left out.
#[track_caller]
pub(crate) fn given(variable: &str, what: &str) -> Option<OsString> {
    let given = std::env::var_os(variable).filter(|value| !value.is_empty());
    if given.is_none() {
        assert!(std::env::var_os("CI").is_none(), "{variable} names no {what}; see tests/run");
        println!("left out: {variable} names no {what}");
    }
    given
}

/// The folder with `prometheus` and `promtool`.
#[track_caller]
pub(crate) fn prometheus() -> Option<PathBuf> {
    given("LOOPTRAIN_TEST_PROMETHEUS", "folder of Prometheus").map(PathBuf::from)
}
