//! Where workers come in: TCP, with TLS or without, unless a simulation stands in for the network.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use looptrain_proto::transport::{Connection, Credentials, Gate, Port, Refusal};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_stream::Stream;
use tonic::transport::server::Connected;

/// A network on which a coordinator can be reached.
pub trait Listen: Send {
    /// One worker's connection.
    type Connection: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static;
    /// Connections as they come in.
    type Incoming: Stream<Item = io::Result<Self::Connection>> + Send + 'static;

    /// Takes an address; port 0 is any free one. Gives the address that was taken, and who connects
    /// to it.
    ///
    /// # Errors
    /// What the network says, when the address cannot be had.
    fn bind(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<(SocketAddr, Self::Incoming)>> + Send;
}

/// The machine's own network.
#[derive(Clone, Debug)]
pub(crate) struct Tcp {
    pub(crate) credentials: Option<Arc<Credentials>>,
}

/// Connections that may wait for the server, which takes them at once.
const BACKLOG: usize = 1024;

impl Listen for Tcp {
    type Connection = Connection;
    type Incoming = BoxStream<'static, io::Result<Connection>>;

    async fn bind(&self, address: SocketAddr) -> io::Result<(SocketAddr, Self::Incoming)> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let incoming = introduced(listener, Port::Coordinator, self.credentials.clone());
        Ok((address, incoming.map(Ok).boxed()))
    }
}

/// Those of a listener's connections that have introduced themselves: by a certificate, or without
/// TLS by the first word of what is spoken there.
pub(crate) fn introduced(
    listener: TcpListener,
    port: Port,
    credentials: Option<Arc<Credentials>>,
) -> impl Stream<Item = Connection> + Send + 'static {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    // Ends its task when it is dropped, with the stream.
    let mut gate = JoinSet::new();
    gate.spawn(Gate::new(port).keep(listener, move |stream, _| {
        let (credentials, sender) = (credentials.clone(), sender.clone());
        async move {
            Refusal::unless_it_speaks(&stream).await?;
            let mut connection = match credentials {
                Some(credentials) => {
                    credentials.accept(stream, port).await.map_err(Refusal::in_tls)?
                }
                None => {
                    preface(&stream, port).await?;
                    Connection::plain(stream)
                }
            };
            // Within TLS, too, it begins to speak before it is taken for a caller.
            if poll_fn(|cx| connection.poll_peek(cx)).await.unwrap_or(0) == 0 {
                return Err(Refusal::HungUp);
            }
            // Nobody takes it when the server has ended.
            let _ = sender.send(connection).await;
            Ok(())
        }
    }));
    futures::stream::unfold((receiver, gate), |(mut receiver, gate)| async move {
        Some((receiver.recv().await?, (receiver, gate)))
    })
}

/// How HTTP/2 begins (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A beginning that comes in pieces is looked at again this much later.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Waits for all of it where HTTP/2 is spoken, and leaves it there: what serves it would wait for the
/// rest without a limit.
async fn preface(stream: &TcpStream, port: Port) -> Result<(), Refusal> {
    if port != Port::Coordinator {
        return Ok(());
    }
    let mut word = [0; PREFACE.len()];
    loop {
        let there = stream.peek(&mut word).await.map_err(|_| Refusal::HungUp)?;
        if there == 0 {
            return Err(Refusal::Stranger("it hung up in its first word".to_owned()));
        }
        if word == *PREFACE {
            return Ok(());
        }
        if !PREFACE.starts_with(&word[..there]) {
            let reason = match word[0] {
                22 => "it speaks TLS, and this coordinator has no credentials (--tls)",
                _ => "it does not speak HTTP/2",
            };
            return Err(Refusal::Stranger(reason.to_owned()));
        }
        sleep(LOOK_AGAIN).await;
    }
}
