//! A connection, plain or within TLS, and who is at the other end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, CertificateError, Error as TlsError};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{client, server};
use tonic::transport::server::Connected;

use super::Identity;
use super::verify::OtherRole;

/// A connection between processes.
#[derive(Debug)]
pub struct Connection {
    wire: Wire,
    identity: Option<Identity>,
}

#[derive(Debug)]
enum Wire {
    Plain(TcpStream),
    Dialled(Box<client::TlsStream<TcpStream>>),
    Accepted(Box<server::TlsStream<TcpStream>>),
}

/// Who is at the other end, as services are told for each request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Where it calls from.
    pub address: Option<SocketAddr>,
    /// What its certificate says; nothing without TLS, or, at a page, when it showed none.
    pub identity: Option<Identity>,
}

impl Connection {
    /// One without TLS.
    #[must_use]
    pub fn plain(stream: TcpStream) -> Self {
        Self { wire: Wire::Plain(stream), identity: None }
    }

    pub(super) fn dialled(stream: client::TlsStream<TcpStream>, identity: Identity) -> Self {
        Self { wire: Wire::Dialled(Box::new(stream)), identity: Some(identity) }
    }

    pub(super) fn accepted(
        stream: server::TlsStream<TcpStream>,
        identity: Option<Identity>,
    ) -> Self {
        Self { wire: Wire::Accepted(Box::new(stream)), identity }
    }

    /// What the certificate of the other end says.
    #[must_use]
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// The TCP connection below.
    #[must_use]
    pub fn tcp(&self) -> &TcpStream {
        match &self.wire {
            Wire::Plain(stream) => stream,
            Wire::Dialled(stream) => stream.get_ref().0,
            Wire::Accepted(stream) => stream.get_ref().0,
        }
    }

    /// Waits until there is something to read, and leaves it there: how many bytes at least, 0 when the
    /// other end has closed.
    ///
    /// # Errors
    /// When the connection is broken.
    pub fn poll_peek(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let there = match &mut self.wire {
            Wire::Plain(stream) => return stream.poll_peek(cx, &mut ReadBuf::new(&mut [0])),
            Wire::Dialled(stream) => ready!(Pin::new(stream).poll_fill_buf(cx)),
            Wire::Accepted(stream) => ready!(Pin::new(stream).poll_fill_buf(cx)),
        };
        Poll::Ready(there.map(<[u8]>::len).or_else(|error| ended(error).map(|()| 0)))
    }
}

/// An end without TLS's own farewell is an end: everything that is spoken here says itself how long
/// it is, and a process that is killed says no farewell.
fn ended(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Ok(()),
        _ => Err(plainly(error)),
    }
}

/// What TLS said, in words that name what to look at.
pub(super) fn plainly(error: io::Error) -> io::Error {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
    let Some(tls) = tls else { return error };
    let is_role = matches!(tls, TlsError::InvalidCertificate(CertificateError::Other(other))
        if other.0.is::<OtherRole>());
    let text = match tls {
        TlsError::NoCertificatesPresented => "it shows no certificate".to_owned(),
        TlsError::InvalidCertificate(reason) => match reason {
            // Two authorities may have one name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is signed by another authority than ours (ca.crt)".to_owned()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet: compare the clocks".to_owned()
            }
            CertificateError::Other(other) => other.to_string(),
            other => format!("its certificate is not good: {other}"),
        },
        TlsError::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => "it wants a certificate".to_owned(),
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "it has another authority (ca.crt) than the one that signed our certificate"
                    .to_owned()
            }
            AlertDescription::CertificateExpired => {
                "it says that our certificate has expired".to_owned()
            }
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => {
                "it does not take our certificate; `looptrain certs show` says which it is"
                    .to_owned()
            }
            other => format!("it ended the handshake: {other:?}"),
        },
        TlsError::InvalidMessage(_) => "it does not speak TLS".to_owned(),
        other => format!("TLS: {other}"),
    };
    io::Error::new(if is_role { io::ErrorKind::PermissionDenied } else { error.kind() }, text)
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = match &mut self.wire {
            Wire::Plain(stream) => return Pin::new(stream).poll_read(cx, buf),
            Wire::Dialled(stream) => ready!(Pin::new(stream).poll_read(cx, buf)),
            Wire::Accepted(stream) => ready!(Pin::new(stream).poll_read(cx, buf)),
        };
        Poll::Ready(read.or_else(ended))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Wire::Dialled(stream) => Pin::new(stream).poll_write(cx, buf),
            Wire::Accepted(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Wire::Dialled(stream) => Pin::new(stream).poll_flush(cx),
            Wire::Accepted(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::Dialled(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::Accepted(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.wire {
            Wire::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Wire::Dialled(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Wire::Accepted(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.wire {
            Wire::Plain(stream) => stream.is_write_vectored(),
            Wire::Dialled(stream) => stream.is_write_vectored(),
            Wire::Accepted(stream) => stream.is_write_vectored(),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller { address: self.tcp().peer_addr().ok(), identity: self.identity.clone() }
    }
}
