//! What operators deploy, held against schemas, against each other and against the program.

use std::process::Command;

use crate::others::given;
use crate::support::repository;

#[test]
fn manifests_scripts_and_units_are_what_their_systems_take() {
    let Some(tools) =
        given("LOOPTRAIN_TEST_DEPLOYMENT", "folder of kubernetes-validate and kubectl")
    else {
        return;
    };
    let bin = std::path::Path::new(&tools).join("bin");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut check = Command::new("python3");
    check.args(["ops/checks", "--require"]).current_dir(repository());
    check.env("PATH", format!("{}:{path}", bin.display())).env("PYTHONPATH", &tools);
    check.env("PYTHONDONTWRITEBYTECODE", "1");
    let checked = check.output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(said.starts_with("ok: ") || said.contains("\nok: "), "{said}");
}
