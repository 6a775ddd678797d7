//! The status page and its JSON, over HTTP.
#![allow(clippy::unwrap_used)]

// Not all of it is used here.
#[allow(dead_code)]
mod fake;

use std::net::SocketAddr;
use std::sync::Arc;

use fake::{Manner, PATIENCE, settings, spec, work};
use looptrain_coordinator::{RunEvent, Started, start};
use looptrain_proto::Step;
use looptrain_storage::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

async fn fetch(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut reply)).await.unwrap().unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_dashboard_shows_a_run_as_page_json_and_metrics() {
    // Who freezes below is not taken for dead before all has been looked at.
    let spec = spec("shown", &["cluster.workers=1", "cluster.worker_timeout=60"]);
    let store = Store::open("memory://").unwrap();
    let mut settings = settings(&spec, &store, &CancellationToken::new());
    settings.dashboard = Some("127.0.0.1:0".parse().unwrap());
    settings.render_metrics = Some(Arc::new(|| "looptrain_up 1\n".into()));
    let Started::Running(mut running) = start(settings).await.unwrap() else { panic!() };
    let page = running.dashboard.unwrap();

    let (status, html) = fetch(page, "/").await;
    assert_eq!(status, 200);
    assert!(html.starts_with("<!doctype html>") && !html.contains("https://"), "nothing from afar");
    let parts: Vec<&str> =
        html.split('"').filter(|word| word.ends_with(".js") || word.ends_with(".css")).collect();
    assert!(parts.len() >= 2, "style and script are files of their own: {parts:?}");
    for part in parts {
        let (status, text) = fetch(page, &format!("/{}", part.trim_start_matches("./"))).await;
        assert!(status == 200 && !text.contains("https://"), "{part}");
    }
    assert_eq!(fetch(page, "/metrics").await, (200, "looptrain_up 1\n".to_owned()));
    assert_eq!(fetch(page, "/api/steps?after=x").await.0, 400);

    // A worker that freezes keeps the run at step 9 while the page is read.
    let (address, hands) = (running.address, store.clone());
    tokio::spawn(async move { work(address, "w0", hands, Manner::FreezesAt(9)).await });
    loop {
        let event = timeout(PATIENCE, running.events.recv()).await.unwrap().unwrap();
        if matches!(event, RunEvent::Committed(record) if record.step == Step(8)) {
            break;
        }
    }
    let (_, json) = fetch(page, "/api/status").await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((json["run"].as_str(), json["step"].as_u64()), (Some("shown"), Some(8)));
    assert_eq!(json["phase"], "training");
    assert_eq!(json["workers"][0]["name"], "w0");
    assert_eq!(json["workers"][0]["slots"], 5);
    assert_eq!(json["last"]["step_tokens"], 160);
    assert_eq!(json["evaluations"][0]["step"], 6);
    let events = json["events"].as_array().unwrap();
    let says =
        |text: &str| events.iter().any(|event| event["text"].as_str().unwrap().contains(text));
    assert!(says("worker w0 joined from loopback") && says("generation 1: 1 worker from step 0"));

    let (_, steps) = fetch(page, "/api/steps?after=5").await;
    let steps: Vec<serde_json::Value> = serde_json::from_str(&steps).unwrap();
    assert_eq!(
        steps.iter().map(|step| step["step"].as_u64().unwrap()).collect::<Vec<_>>(),
        [6, 7, 8]
    );
}
