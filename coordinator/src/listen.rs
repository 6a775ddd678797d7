//! Where workers come in: TCP, unless a simulation stands in for the network.

use std::future::Future;
use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpIncoming};

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
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tcp;

impl Listen for Tcp {
    type Connection = TcpStream;
    type Incoming = TcpIncoming;

    async fn bind(&self, address: SocketAddr) -> io::Result<(SocketAddr, TcpIncoming)> {
        let listener = TcpListener::bind(address).await?;
        Ok((listener.local_addr()?, TcpIncoming::from(listener).with_nodelay(Some(true))))
    }
}
