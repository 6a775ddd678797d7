//! One call to a client: tried again where that may help, and what its failure says, without what
//! nobody is to read.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use looptrain_proto::metrics;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram};

use super::Store;
use super::retry::{Failure, may_pass};
use crate::error::one_line;
use crate::{Error, Tries};

/// What the process's calls came to.
struct Instruments {
    operations: Counter<u64>,
    retries: Counter<u64>,
    duration: Histogram<f64>,
}

static INSTRUMENTS: LazyLock<Instruments> = LazyLock::new(|| {
    let instruments = Instruments {
        operations: metrics::STORE_OPERATIONS.counter(),
        retries: metrics::STORE_RETRIES.counter(),
        duration: metrics::STORE_OPERATION_DURATION.histogram(),
    };
    // What has not happened yet is nothing, and not unknown.
    for operation in ["read", "write", "list", "look at", "delete"] {
        let named = KeyValue::new("operation", operation);
        instruments.retries.add(0, std::slice::from_ref(&named));
        instruments.operations.add(0, &[named, KeyValue::new("outcome", "failed")]);
    }
    instruments
});

impl Store {
    /// Tries a call until it succeeds, cannot succeed, or has had its chances.
    pub(super) async fn retried<T, F>(
        &self,
        operation: &'static str,
        key: &str,
        attempt: impl FnMut() -> F,
    ) -> std::result::Result<T, Failure>
    where
        F: Future<Output = std::result::Result<T, object_store::Error>>,
    {
        let named = KeyValue::new("operation", operation);
        let tell = |attempts: u32, pause: Duration, error: &object_store::Error| {
            INSTRUMENTS.retries.add(1, std::slice::from_ref(&named));
            let (place, reason) = (self.place(key), reason(error, &self.secrets));
            let again = format!("attempt {}, in {} ms", attempts + 1, pause.as_millis());
            // Once may happen to any call.
            match attempts {
                1 => tracing::info!("cannot {operation} {place}: {reason}; {again}"),
                _ => tracing::warn!("cannot {operation} {place}: {reason}; {again}"),
            }
        };
        let begin = Instant::now();
        let result = self.retry.run(attempt, tell).await;
        // That there is no such object is an answer, and what a race's losers are told is one.
        let failed = result.as_ref().is_err_and(|failure| {
            use object_store::Error as E;
            !matches!(
                failure.error,
                E::NotFound { .. } | E::AlreadyExists { .. } | E::Precondition { .. }
            )
        });
        let outcome = KeyValue::new("outcome", if failed { "failed" } else { "done" });
        INSTRUMENTS.operations.add(1, &[named.clone(), outcome]);
        INSTRUMENTS.duration.record(begin.elapsed().as_secs_f64(), &[named]);
        result
    }

    pub(super) fn failed(&self, operation: &'static str, key: &str, failure: Failure) -> Error {
        let Failure { error, attempts, elapsed } = failure;
        let (place, reason) = (self.place(key), reason(&error, &self.secrets));
        match error {
            object_store::Error::NotImplemented { .. }
            | object_store::Error::NotSupported { .. } => {
                Error::Unsupported { operation, place, reason }
            }
            _ => {
                let tries = Tries { attempts, elapsed, may_pass: may_pass(&error) };
                Error::Operation { operation, place, reason, tries }
            }
        }
    }
}

/// A key that no store takes; said by every attempt anew, for errors of the client have no copies.
pub(super) fn wrong_key(error: &object_store::Error) -> object_store::Error {
    let source = error.to_string().into();
    object_store::Error::NotSupported { source }
}

/// What the system said when it was the system, else what the client and the server said; nothing
/// of `secrets` is in it.
pub(super) fn reason(error: &object_store::Error, secrets: &[String]) -> String {
    let said = one_line(&answered(&error.to_string()));
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let system = loop {
        let Some(inner) = cause else { break None };
        if let Some(io) = inner.downcast_ref::<std::io::Error>()
            && io.raw_os_error().is_some()
        {
            break Some(io.to_string());
        }
        cause = inner.source();
    };
    let mut reason = match system {
        // Of a remote store one wants to know which server it was.
        Some(system) if said.contains("://") => format!("{said}: {system}"),
        Some(system) => system,
        None => said,
    };
    for secret in secrets {
        reason = reason.replace(secret.as_str(), "***");
    }
    reason
}

/// An error with the server's document cut down to its code and message: servers repeat in it what
/// they were sent.
fn answered(text: &str) -> String {
    let Some((before, document)) = text.split_once('<') else { return text.to_owned() };
    let element = |name: &str| {
        let (_, rest) = document.split_once(&format!("{name}>"))?;
        Some(rest.split_once('<')?.0)
    };
    match (element("Code"), element("Message")) {
        (Some(code), Some(message)) => format!("{before}{code}: {message}"),
        (Some(code), None) => format!("{before}{code}"),
        _ => format!("{before}(a document)"),
    }
}
