//! What was found, and how it is told.

use serde_json::{Value, json};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As it should be.
    Well,
    /// A run works, but not as well as it could.
    Warning,
    /// A run does not work.
    Problem,
    /// Nothing is known.
    NotChecked,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Well => "ok",
            Self::Warning => "warning",
            Self::Problem => "problem",
            Self::NotChecked => "not checked",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// What was checked, in a word or two.
    pub(super) check: String,
    pub(super) verdict: Verdict,
    /// What was found, in a line.
    pub(super) found: String,
    /// What to do about it, in a line.
    pub(super) remedy: Option<String>,
}

impl Finding {
    pub(super) fn well(check: &str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Well, found.into(), None)
    }

    pub(super) fn warning(check: &str, found: impl Into<String>, remedy: &str) -> Self {
        Self::new(check, Verdict::Warning, found.into(), Some(remedy))
    }

    pub(super) fn problem(check: &str, found: impl Into<String>, remedy: &str) -> Self {
        Self::new(check, Verdict::Problem, found.into(), Some(remedy))
    }

    /// A problem whose error says what to do.
    pub(super) fn error(check: &str, error: &dyn std::fmt::Display) -> Self {
        Self::new(check, Verdict::Problem, error.to_string(), None)
    }

    pub(super) fn not_checked(check: &str, why: impl Into<String>) -> Self {
        Self::new(check, Verdict::NotChecked, why.into(), None)
    }

    fn new(check: &str, verdict: Verdict, found: String, remedy: Option<&str>) -> Self {
        let remedy = remedy.map(str::to_owned);
        Self { check: check.to_owned(), verdict, found: found.replace('\n', " "), remedy }
    }
}

/// All findings, by group.
#[derive(Debug, Default)]
pub(super) struct Report {
    groups: Vec<(&'static str, Vec<Finding>)>,
}

impl Report {
    pub(super) fn add(&mut self, group: &'static str, findings: Vec<Finding>) {
        self.groups.push((group, findings));
    }

    fn count(&self, verdict: Verdict) -> usize {
        let all = self.groups.iter().flat_map(|(_, findings)| findings);
        all.filter(|finding| finding.verdict == verdict).count()
    }

    pub(super) fn problems(&self) -> usize {
        self.count(Verdict::Problem)
    }

    /// For people: a line each, with a remedy below where there is one.
    pub(super) fn table(&self) -> String {
        let all = || self.groups.iter().flat_map(|(_, findings)| findings);
        let width = all().map(|finding| finding.check.chars().count()).max().unwrap_or(0);
        let mut lines = Vec::new();
        for (group, findings) in self.groups.iter().filter(|(_, findings)| !findings.is_empty()) {
            lines.push((*group).to_owned());
            for Finding { check, verdict, found, remedy } in findings {
                let verdict = verdict.name();
                lines.push(format!("  {verdict:<11}  {check:<width$}  {found}"));
                let remedy = remedy.iter();
                lines.extend(
                    remedy.map(|remedy| format!("{:width$}  -> {remedy}", "", width = 15 + width)),
                );
            }
        }
        let [well, warnings, problems, rest] =
            [Verdict::Well, Verdict::Warning, Verdict::Problem, Verdict::NotChecked]
                .map(|verdict| self.count(verdict));
        lines.push(format!(
            "{well} ok, {warnings} {}, {problems} {}, {rest} not checked",
            if warnings == 1 { "warning" } else { "warnings" },
            if problems == 1 { "problem" } else { "problems" },
        ));
        lines.join("\n") + "\n"
    }

    /// For scripts.
    pub(super) fn to_json(&self) -> Value {
        let all = self.groups.iter().flat_map(|(group, findings)| {
            findings.iter().map(move |finding| {
                json!({
                    "group": group,
                    "check": finding.check,
                    "result": finding.verdict.name(),
                    "found": finding.found,
                    "remedy": finding.remedy,
                })
            })
        });
        json!({ "well": self.problems() == 0, "checks": all.collect::<Vec<_>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_is_a_line_with_its_remedy_below() {
        let mut report = Report::default();
        report.add("store", vec![Finding::well("reached", "at once")]);
        report.add("empty", vec![]);
        report.add("machine", vec![Finding::problem("open files", "16", "raise `ulimit -n`")]);
        assert_eq!(
            report.table(),
            "store\n  ok           reached     at once\nmachine\n  problem      open files  16\n\
             \x20                          -> raise `ulimit -n`\n\
             1 ok, 0 warnings, 1 problem, 0 not checked\n"
        );
        let told = report.to_json();
        assert_eq!(told["well"], false);
        assert_eq!(told["checks"][1]["group"], "machine");
        assert_eq!(told["checks"][1]["result"], "problem");
        assert_eq!(told["checks"][0]["remedy"], Value::Null);
    }
}
