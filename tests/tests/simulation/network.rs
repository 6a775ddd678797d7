//! Coordinator and worker on turmoil's network in place of TCP, and the frames in which the pretended
//! workers talk to each other.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use hyper_util::rt::TokioIo;
use looptrain_coordinator::Listen;
use looptrain_worker::parts::Dial;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::time::sleep;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Uri};
use turmoil::net::tcp::OwnedWriteHalf;
use turmoil::net::{TcpListener, TcpStream};

use crate::shared::{Latency, Shared};

/// Where every coordinator listens on its host.
pub(crate) const COORDINATOR_PORT: u16 = 9000;

/// What all workers are told; who is behind it is [`Shared::route`]'s affair, as it is a name
/// server's or a floating address's elsewhere.
pub(crate) const COORDINATOR_URL: &str = "http://coordinator:9000";

/// A connection. What is written is on its way together with all that follows within a moment, as
/// long as the connection's own dice say: so neither how many writes there were nor in which order
/// tasks came to them changes what happens. (tonic's server polls in an order that nobody can fix.)
#[derive(Debug)]
pub(crate) struct Wire(DuplexStream);

/// More than anybody writes before it is read.
const BUFFER: usize = 1 << 20;

impl Wire {
    /// From `host`, to whoever is told.
    pub(crate) async fn connect(
        shared: &Shared,
        host: &str,
        address: impl turmoil::ToSocketAddrs,
    ) -> io::Result<Self> {
        Ok(Self::over(TcpStream::connect(address).await?, shared, host))
    }

    pub(crate) fn over(stream: TcpStream, shared: &Shared, host: &str) -> Self {
        let peer = stream.peer_addr().map_or_else(|_| String::new(), |peer| peer.ip().to_string());
        let latency = shared.latency(host, &peer);
        let (near, far) = tokio::io::duplex(BUFFER);
        // One task has all of the connection, so that it ends as a whole.
        tokio::spawn(async move {
            let (mut read, write) = stream.into_split();
            let (out, mut back) = tokio::io::split(far);
            tokio::select! {
                biased;
                // Whoever has hung up notices when he next looks.
                _ = send_later(out, write, latency) => {}
                _ = tokio::io::copy(&mut read, &mut back) => {}
            }
        });
        Self(near)
    }
}

/// Sends what is written, a little later.
async fn send_later(
    mut out: impl AsyncRead + Unpin,
    mut write: OwnedWriteHalf,
    mut latency: Latency,
) -> io::Result<()> {
    let mut bytes = Vec::new();
    while out.read_buf(&mut bytes).await? > 0 {
        sleep(latency.next()).await;
        while let Some(Ok(1..)) = out.read_buf(&mut bytes).now_or_never() {}
        write.write_all(&bytes).await?;
        bytes.clear();
    }
    write.shutdown().await
}

impl Connected for Wire {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// The coordinator's side.
pub(crate) struct Inlet {
    pub(crate) host: &'static str,
    pub(crate) shared: Arc<Shared>,
}

impl Listen for Inlet {
    type Connection = Wire;
    type Incoming = BoxStream<'static, io::Result<Wire>>;

    async fn bind(&self, address: SocketAddr) -> io::Result<(SocketAddr, Self::Incoming)> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await?;
        let (host, shared) = (self.host, Arc::clone(&self.shared));
        let incoming =
            futures::stream::unfold((listener, shared), move |(listener, shared)| async move {
                let accepted = listener.accept().await;
                let wire = accepted.map(|(stream, _)| Wire::over(stream, &shared, host));
                Some((wire, (listener, shared)))
            });
        Ok((address, incoming.boxed()))
    }
}

/// A worker's side.
pub(crate) struct Outlet {
    pub(crate) worker: &'static str,
    pub(crate) shared: Arc<Shared>,
}

impl Dial for Outlet {
    async fn dial(&self, endpoint: &Endpoint) -> Result<Channel, tonic::transport::Error> {
        let (worker, shared) = (self.worker, Arc::clone(&self.shared));
        let connector = tower::service_fn(move |_: Uri| {
            let shared = Arc::clone(&shared);
            async move {
                let address = (shared.route(worker), COORDINATOR_PORT);
                Wire::connect(&shared, worker, address).await.map(TokioIo::new)
            }
            .boxed()
        });
        endpoint.connect_with_connector(connector).await
    }
}

/// Sends numbers with their count before them.
pub(crate) async fn send(stream: &mut (impl AsyncWrite + Unpin), words: &[u64]) -> io::Result<()> {
    let mut bytes = (words.len() as u64).to_le_bytes().to_vec();
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    stream.write_all(&bytes).await
}

pub(crate) async fn receive(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u64>> {
    let count = stream.read_u64_le().await?;
    let mut words = Vec::new();
    for _ in 0..count {
        words.push(stream.read_u64_le().await?);
    }
    Ok(words)
}
