//! Whether the spec is one.

use std::path::Path;

use indicatif::HumanCount;
use looptrain_proto::Spec;

use super::Finding;

/// The spec, if there is a good one, and what was found.
pub(super) fn check(path: Option<&Path>, overrides: &[String]) -> (Option<Spec>, Vec<Finding>) {
    let Some(path) = path else {
        let why = "no spec is given: neither its store nor its data are looked at";
        return (None, vec![Finding::not_checked("spec", why)]);
    };
    match Spec::load(path, overrides) {
        Err(error) => {
            let remedy = "mend the spec; docs/spec.md has its keys";
            (None, vec![Finding::problem("spec", error.to_string(), remedy)])
        }
        Ok(spec) => {
            let steps = spec.total_steps();
            let found = format!(
                "run `{}` in {}: {} parameters, {} steps, {} tokens",
                spec.run.name,
                spec.run.store,
                HumanCount(spec.model.parameters()),
                HumanCount(steps.0),
                HumanCount(spec.tokens_after(steps)),
            );
            (Some(spec), vec![Finding::well("spec", found)])
        }
    }
}
