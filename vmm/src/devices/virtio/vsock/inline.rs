//! The socket device without its thread, for the fuzz targets.

use std::os::unix::net::UnixListener;
use std::sync::mpsc::Receiver;

use super::super::worker::Control;
use super::*;

/// A socket device that serves its queues, and the host's sockets, on the driver's notification.
pub struct InlineVsock {
    muxer: Muxer,
    mailbox: Arc<Mailbox<Message>>,
}

impl std::fmt::Debug for InlineVsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InlineVsock")
    }
}

/// The host's side of an [`InlineVsock`]: it only asks, the device answers when it is notified.
#[derive(Debug)]
pub struct VsockHost(VsockHandle);

impl InlineVsock {
    /// A device for the guest `cid`; clients come to `socket`, which must not block.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(cid: GuestCid, socket: UnixListener) -> io::Result<(Self, VsockHost)> {
        let mailbox = Arc::new(Mailbox::new()?);
        let listeners = Arc::<Listeners>::default();
        let muxer = Muxer::new(
            cid.0,
            &mailbox,
            Vec::new(),
            Some(socket),
            Arc::clone(&listeners),
        )?;
        let host = VsockHost(VsockHandle {
            mailbox: Arc::clone(&mailbox),
            listeners,
        });
        Ok((Self { muxer, mailbox }, host))
    }

    fn tell(&mut self, control: Control) {
        // The mailbox is closed by a thread's end only, and there is none.
        let _ = self.mailbox.send(control.into());
        self.turn();
    }

    fn turn(&mut self) {
        if let Err(error) = self.muxer.turn(&self.mailbox, 0) {
            tracing::error!(%error, "waiting for vsock events");
        }
    }
}

impl VirtioDevice for InlineVsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Socket
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_events(&self) -> &[EventFd] {
        &[]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, queues: Vec<VirtQueue>, _features: u64) {
        self.tell(Control::Activate(queues));
    }

    fn notify(&mut self, _queue: usize) {
        self.turn();
    }

    fn reset(&mut self) {
        let (done, _wait) = mpsc::sync_channel(1);
        self.tell(Control::Reset(done));
    }
}

impl VsockHost {
    /// As [`VsockHandle::listen`].
    ///
    /// # Errors
    /// There is a listener already.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        self.0.listen(port)
    }

    /// As [`VsockHandle::connect`], but does not wait: what the receiver gets is the guest's answer.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn connect(&self, port: u32) -> io::Result<(UnixStream, Receiver<io::Result<()>>)> {
        let (ours, stream) = UnixStream::pair()?;
        let (reply, answer) = mpsc::sync_channel(1);
        let message = Message::Connect {
            port,
            stream,
            reply,
        };
        // The mailbox is closed by a thread's end only, and there is none.
        let _ = self.0.mailbox.send(message);
        Ok((ours, answer))
    }
}
