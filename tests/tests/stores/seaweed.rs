//! A real S3 server for as long as a test needs it: SeaweedFS, on free ports of the loopback.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::ports::free_port;

/// A server is usually there within two seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a program until stdin ends, as it does with this process, however that ends.
const WITH_STDIN: &str = "\"$0\" \"$@\" & read -r line; kill -KILL $!; wait";

/// Credentials that occur in no other text.
pub(crate) const ACCESS_KEY: &str = "AKIATESTSEAWEED0";
pub(crate) const SECRET_KEY: &str = "s3cr3t-of-the-test-Qm9vLg";

/// A running server with an empty bucket; it ends with this.
pub(crate) struct Seaweed {
    server: Child,
    port: u16,
    _directory: TempDir,
}

impl Seaweed {
    /// Starts one. Where the program is not installed there is none, and the test says so; in CI it
    /// must be.
    pub(crate) fn start() -> Option<Self> {
        let Some(program) = program() else {
            assert!(std::env::var_os("CI").is_none(), "SeaweedFS is missing; see tests/run");
            eprintln!("left out: there is no SeaweedFS (`weed`); tests/run installs it with pip");
            return None;
        };
        let directory = TempDir::new().unwrap();
        let [master, volume, filer, s3, admin] = [(); 5].map(|()| free_port());
        let log = File::create(directory.path().join("log")).unwrap();
        std::fs::create_dir(directory.path().join("data")).unwrap();
        let server = Command::new("sh")
            .args(["-c", WITH_STDIN])
            .arg(program)
            .arg("mini")
            .arg(format!("-dir={}", directory.path().join("data").display()))
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-bucket=lab"])
            .arg(format!("-master.port={master}"))
            .arg(format!("-volume.port={volume}"))
            .arg(format!("-filer.port={filer}"))
            .arg(format!("-s3.port={s3}"))
            .arg(format!("-admin.port={admin}"))
            .args(["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"])
            .env("AWS_ACCESS_KEY_ID", ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut seaweed = Self { server, port: s3, _directory: directory };
        seaweed.wait_until_ready();
        Some(seaweed)
    }

    /// The variables that name the server, as a user sets them.
    pub(crate) fn variables(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let variables = [
            ("AWS_ENDPOINT_URL", endpoint.as_str()),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ];
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    /// It is ready when it takes an object.
    fn wait_until_ready(&mut self) {
        let begin = Instant::now();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let store = looptrain_storage::Store::open_with("s3://lab", self.variables()).unwrap();
        loop {
            let here = std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok();
            if here && runtime.block_on(store.put("ready", "yes")).is_ok() {
                return runtime.block_on(store.delete("ready")).unwrap();
            }
            let ended = self.server.try_wait().unwrap();
            assert!(ended.is_none(), "SeaweedFS ended with {ended:?}");
            assert!(begin.elapsed() < PATIENCE, "SeaweedFS does not get ready");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Seaweed {
    fn drop(&mut self) {
        drop(self.server.stdin.take());
        let _ = self.server.wait();
    }
}

/// Where `weed` is: said by tests/run, or on the path.
fn program() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("LOOPTRAIN_TEST_WEED") {
        return Some(given.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join("weed")).find(|file| file.is_file())
}
