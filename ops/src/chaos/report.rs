//! What came of it: the figures, and whether the run held what it promises.

use std::collections::BTreeMap;
use std::time::Duration;

use looptrain_proto::Step;
use serde_json::{Value, json};

use super::watch::{Event, median};

/// The end of a run: what is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) step: Step,
    /// Digest of the weights.
    pub(crate) weights: String,
    /// Step and digest of the reduced gradient, for each line of the run's log.
    pub(crate) log: Vec<(u64, String)>,
}

/// Why the disturbed run is not what an undisturbed one is; `None` when it is.
pub(crate) fn difference(disturbed: &End, calm: &End) -> Option<String> {
    let last = disturbed.step.0;
    if calm.step != disturbed.step {
        return Some(format!("the undisturbed run ended at step {}, not {last}", calm.step));
    }
    let expected: Vec<u64> = (1..=last).collect();
    let logged: Vec<u64> = disturbed.log.iter().map(|(step, _)| *step).collect();
    let other = disturbed.log.iter().zip(&calm.log).find(|(ours, theirs)| ours != theirs);
    if disturbed.weights != calm.weights {
        let first = match other {
            Some(((step, _), _)) => format!("the first difference is in step {step}"),
            None => "the gradients of all steps are equal".to_owned(),
        };
        return Some(format!(
            "the weights of step {last} are {}, those of an undisturbed run {}; {first}",
            disturbed.weights, calm.weights
        ));
    }
    if logged != expected {
        let twice = logged.windows(2).find(|pair| pair[1] <= pair[0]).map(|pair| pair[1]);
        let missing = expected.iter().find(|step| !logged.contains(step));
        return Some(match (twice, missing) {
            (Some(step), _) => format!("step {step} is in the log more than once"),
            (None, Some(step)) => format!("step {step} is not in the log"),
            (None, None) => format!("the log goes beyond step {last}"),
        });
    }
    other.map(|((step, _), _)| format!("the gradient of step {step} in the log is another one"))
}

/// Everything that is to be told of a run with faults.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) workers: usize,
    pub(crate) seconds: f64,
    pub(crate) worker_timeout: f64,
    pub(crate) steps: u64,
    pub(crate) events: Vec<Event>,
    pub(crate) weights: Option<String>,
    pub(crate) undisturbed: Option<String>,
    pub(crate) failure: Option<String>,
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let events: Vec<Value> = self.events.iter().map(event).collect();
        let mut kinds: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
        for event in &self.events {
            kinds.entry(event.kind).or_default().extend(event.recovery);
        }
        let recovery: BTreeMap<&str, Value> =
            kinds.into_iter().map(|(kind, times)| (kind, spread(times))).collect();
        let step_times = self.events.iter().map(|event| event.step_time).collect();
        json!({
            "seed": self.seed,
            "workers": self.workers,
            "worker_timeout": self.worker_timeout,
            "seconds": self.seconds,
            "steps": self.steps,
            "step_seconds": median(step_times).map(|time| time.as_secs_f64()),
            "events": events,
            "recovery_seconds": recovery,
            "weights": self.weights,
            "undisturbed": self.undisturbed,
            "equal": self.weights.is_some() && self.weights == self.undisturbed,
            "failure": self.failure,
        })
    }
}

fn event(event: &Event) -> Value {
    json!({
        "kind": event.kind,
        "detail": event.detail,
        "at": event.at.as_secs_f64(),
        "step": event.step,
        "step_seconds": event.step_time.as_secs_f64(),
        "recovery_seconds": event.recovery.map(|time| time.as_secs_f64()),
        "pause_seconds": event.pause.as_secs_f64(),
    })
}

fn spread(times: Vec<Duration>) -> Value {
    let seconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64());
    json!({
        // Of the events after which the run has gone on.
        "count": times.len(),
        "min": seconds(times.iter().min().copied()),
        "max": seconds(times.iter().max().copied()),
        "median": seconds(median(times)),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn end(last: u64) -> End {
        let log = (1..=last).map(|step| (step, format!("gradient {step}"))).collect();
        End { step: Step(last), weights: format!("weights {last}"), log }
    }

    #[test]
    fn equal_ends_do_not_differ() {
        assert_eq!(difference(&end(5), &end(5)), None);
    }

    #[test]
    fn other_weights_are_told_with_the_first_step_that_differs() {
        let other = End { weights: "blake3:bad".into(), ..end(5) };
        let told = difference(&other, &end(5)).unwrap();
        assert!(told.contains("blake3:bad") && told.contains("all steps are equal"), "{told}");
        let mut other = other;
        other.log[2].1 = "another gradient".into();
        assert!(difference(&other, &end(5)).unwrap().contains("difference is in step 3"));
    }

    #[test]
    fn a_log_that_is_not_every_step_once_is_a_difference() {
        let mut gap = end(5);
        gap.log.remove(1);
        assert_eq!(difference(&gap, &end(5)).unwrap(), "step 2 is not in the log");
        let mut twice = end(5);
        twice.log.insert(2, twice.log[1].clone());
        assert_eq!(difference(&twice, &end(5)).unwrap(), "step 2 is in the log more than once");
        let beyond = End { log: end(6).log, ..end(5) };
        assert!(difference(&beyond, &end(5)).unwrap().contains("beyond step 5"));
    }

    #[test]
    fn an_end_elsewhere_is_a_difference() {
        assert!(difference(&end(5), &end(4)).unwrap().contains("ended at step 4, not 5"));
    }

    #[test]
    fn the_report_has_the_spread_of_each_kind() {
        let event = |kind, recovery| Event {
            kind,
            detail: "w1".into(),
            at: Duration::from_secs(9),
            step: Step(3),
            step_time: Duration::from_millis(50),
            recovery: Some(Duration::from_millis(recovery)),
            pause: Duration::ZERO,
        };
        let events = vec![event("join", 500), event("leave", 100), event("join", 250)];
        let weights = Some("blake3:aa".to_owned());
        let report = Report { events, undisturbed: weights.clone(), weights, ..Report::default() };
        let json = report.to_json();
        let joins = &json["recovery_seconds"]["join"];
        assert_eq!(*joins, json!({ "count": 2, "min": 0.25, "median": 0.25, "max": 0.5 }));
        assert_eq!(json["events"][1]["kind"], "leave");
        assert_eq!((&json["equal"], &json["failure"]), (&json!(true), &Value::Null));
        let none = Report::default().to_json();
        assert_eq!(none["equal"], false, "nothing is not equal to nothing");
    }
}
