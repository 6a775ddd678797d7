//! From a URL and the environment to a client.

use std::collections::HashMap;
use std::path::Path as FilePath;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::memory::InMemory;
use object_store::multipart::MultipartStore;
use object_store::{ObjectStore, RetryConfig};

use super::call::reason;
use super::directory::Directory;
use super::patience;
use crate::{Error, Result};

/// A client, and what else is known about its store.
pub(super) struct Backend {
    pub(super) objects: Arc<dyn ObjectStore>,
    /// Where large objects are uploaded in parts.
    pub(super) multipart: Option<Arc<dyn MultipartStore>>,
    /// Put before every key; empty or without `/` at its ends.
    pub(super) prefix: String,
    /// The directory of a `file://` store.
    pub(super) directory: Option<Arc<FilePath>>,
    /// What no message may hold.
    pub(super) secrets: Vec<String>,
    /// Whether it is a server.
    pub(super) remote: bool,
}

/// A variable of the environment.
pub(super) type Variable = (String, String);

/// See [`super::Store::open`].
pub(super) fn open(url: &str, variables: &[Variable]) -> Result<Backend> {
    let wrong = |reason: &str| Error::Url { url: redact(url), reason: reason.to_owned() };
    let (scheme, rest) = url
        .split_once("://")
        .ok_or_else(|| wrong("is no URL; write file://PATH, s3://BUCKET/PREFIX, gs:// or az://"))?;
    match scheme {
        "file" if rest.is_empty() => Err(wrong("names no directory; write file://PATH")),
        "file" => {
            let path = FilePath::new(rest);
            Ok(Backend::local(Arc::new(open_directory(url, path)?), Some(path)))
        }
        "memory" => {
            let memory = open_memory(rest);
            let multipart: Arc<dyn MultipartStore> = memory.clone();
            Ok(Backend { multipart: Some(multipart), ..Backend::local(memory, None) })
        }
        "s3" | "gs" | "az" => open_remote(url, scheme, rest, variables),
        _ => Err(wrong("has an unknown scheme; use file://, s3://, gs:// or az://")),
    }
}

impl Backend {
    fn local(objects: Arc<dyn ObjectStore>, directory: Option<&FilePath>) -> Self {
        let (prefix, secrets) = (String::new(), Vec::new());
        let (multipart, directory, remote) = (None, directory.map(Arc::from), false);
        Self { objects, multipart, prefix, directory, secrets, remote }
    }

    fn remote<T: ObjectStore + MultipartStore>(
        client: T,
        prefix: &str,
        secrets: Vec<String>,
    ) -> Self {
        let client = Arc::new(client);
        let multipart: Arc<dyn MultipartStore> = client.clone();
        Self {
            objects: client,
            multipart: Some(multipart),
            prefix: prefix.trim_matches('/').to_owned(),
            directory: None,
            secrets,
            remote: true,
        }
    }
}

/// Credentials, endpoint and region come from the variables of the provider.
fn open_remote(url: &str, scheme: &str, rest: &str, variables: &[Variable]) -> Result<Backend> {
    let wrong = |reason: String| Error::Url { url: redact(url), reason };
    let (begin, credentials, what) = match scheme {
        "s3" => ("AWS_", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "bucket"),
        "gs" => ("GOOGLE_", "GOOGLE_SERVICE_ACCOUNT", "bucket"),
        _ => ("AZURE_", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY", "container"),
    };
    if rest.contains('@') {
        return Err(wrong(format!("holds credentials; put them into {credentials}")));
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        let form = format!("{scheme}://{}/PREFIX", what.to_uppercase());
        return Err(wrong(format!("names no {what}; write {form}")));
    }
    let given: Vec<(String, &str)> = (variables.iter())
        .filter(|(name, _)| name.starts_with(begin))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
        .collect();
    let secrets: Vec<String> = (given.iter())
        .filter(|(name, value)| is_secret(name) && value.len() >= SECRET_LENGTH)
        .map(|(_, value)| (*value).to_owned())
        .collect();
    // One attempt: it is the store that tries again, whatever the client.
    let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    // The client may say what it could not parse: a key, for instance.
    let unusable = |error: object_store::Error| {
        wrong(format!("cannot be opened: {}", reason(&error, &secrets)))
    };
    match scheme {
        "s3" => {
            let mut builder = AmazonS3Builder::new()
                .with_bucket_name(bucket)
                .with_client_options(patience::client());
            for (name, value) in &given {
                if let Ok(key) = name.parse() {
                    builder = builder.with_config(key, *value);
                }
            }
            let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
            let plain = endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
            let builder = builder.with_allow_http(plain);
            let builder = builder.with_conditional_put(S3ConditionalPut::ETagMatch);
            let client = builder.with_retry(once).build().map_err(unusable)?;
            Ok(Backend::remote(client, prefix, secrets))
        }
        "gs" => {
            let mut builder = GoogleCloudStorageBuilder::new()
                .with_bucket_name(bucket)
                .with_client_options(patience::client());
            for (name, value) in &given {
                if let Ok(key) = name.parse() {
                    builder = builder.with_config(key, *value);
                }
            }
            let client = builder.with_retry(once).build().map_err(unusable)?;
            Ok(Backend::remote(client, prefix, secrets))
        }
        _ => {
            let mut builder = MicrosoftAzureBuilder::new()
                .with_container_name(bucket)
                .with_client_options(patience::client());
            for (name, value) in &given {
                if let Ok(key) = name.parse() {
                    builder = builder.with_config(key, *value);
                }
            }
            let client = builder.with_retry(once).build().map_err(unusable)?;
            Ok(Backend::remote(client, prefix, secrets))
        }
    }
}

/// Shorter values are no secrets, and words that messages need.
const SECRET_LENGTH: usize = 8;

fn is_secret(variable: &str) -> bool {
    ["key", "secret", "token", "sas", "password", "account"]
        .iter()
        .any(|word| variable.contains(word))
}

/// The URL without what stands between `//` and `@`.
pub(super) fn redact(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(start), Some(end)) if end > start => {
            format!("{}***{}", &url[..start + 3], &url[end..])
        }
        _ => url.to_owned(),
    }
}

fn open_directory(url: &str, path: &FilePath) -> Result<Directory> {
    let unwritable = |reason: String| Error::Unwritable {
        url: url.to_owned(),
        reason,
        remedy: "change the permissions or choose another run.store".to_owned(),
    };
    std::fs::create_dir_all(path).map_err(|error| {
        if path.exists() && !path.is_dir() {
            unwritable(format!("{} is a file, not a directory", path.display()))
        } else {
            unwritable(format!("{}: {error}", path.display()))
        }
    })?;
    Directory::new(path).map_err(|error| unwritable(reason(&error, &[])))
}

fn open_memory(name: &str) -> Arc<InMemory> {
    static NAMED: OnceLock<Mutex<HashMap<String, Arc<InMemory>>>> = OnceLock::new();
    if name.is_empty() {
        return Arc::new(InMemory::new());
    }
    let mut named =
        NAMED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(named.entry(name.to_owned()).or_default())
}
