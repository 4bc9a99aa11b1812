"""A member's connection to the broker: messages out, messages in, and patience while the broker is away.

Delivery is at most once and, from one sender on one connection, in order. What was on its way when a connection broke is lost,
and so is what a member does not read fast enough: whoever needs more numbers its messages and repeats them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, final

import structlog
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

from dp_federated_lora.errors import BrokerFailed
from dp_federated_lora.network.broker import MAX_PAYLOAD
from dp_federated_lora.network.kit import Kit
from dp_federated_lora.network.parts import cut
from dp_federated_lora.network.project import Member
from dp_federated_lora.network.subjects import grants_of, sender_of

Report = Callable[[str], None]

UNREAD: Final = 32 * MAX_PAYLOAD  # bytes that one inbox holds for its reader
UNSENT: Final = 8 * MAX_PAYLOAD  # bytes that wait while the broker is away

_PAUSE: Final = 1  # seconds between two attempts to reach a server
_PING: Final = 20  # seconds between two questions whether it is still there
_PATIENCE: Final = 30  # seconds to wait for its answer


@final
@dataclass(frozen=True, slots=True)
class Message:
    """What somebody has sent.

    Args:
        subject: on which subject.
        data: the bytes.
    """

    subject: str
    data: bytes

    @property
    def sender(self) -> Member | None:
        """Who sent it, as the broker vouches by the subject; None for a coordinator, whose name the subject does not tell."""
        return sender_of(self.subject)


@final
class Inbox:
    """Messages of one subscription, in the order in which they came: `async for message in inbox`. Made by `subscribe`.

    A wait for the next message may be cancelled; no message is lost by that.
    """

    def __init__(self, subject: str, report: Report) -> None:
        self._subject = subject
        self._report = report
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._unread = 0
        self._error: BrokerFailed | None = None

    async def take(self, message: Msg) -> None:
        """Keep a message for the reader; called by the connection."""
        if self._unread + len(message.data) > UNREAD:
            self._report(f"a message on {message.subject} was dropped: {UNREAD} bytes wait for whoever reads {self._subject}")
            return
        self._unread += len(message.data)
        self._queue.put_nowait(Message(message.subject, message.data))

    def end(self, error: BrokerFailed | None) -> None:
        """Let the reader read what is there and no more; called by the connection."""
        self._error = error
        self._queue.put_nowait(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        message = await self._queue.get()
        if message is None:
            self._queue.put_nowait(None)
            raise self._error or StopAsyncIteration
        self._unread -= len(message.data)
        return message


@final
class Connection:
    """A connection of one member; use `connect`, and `close` or an `async with` statement."""

    def __init__(self, kit: Kit, report: Report) -> None:
        self._kit = kit
        self._report = report
        self._client = Client()
        self._inboxes: list[Inbox] = []
        self._subscriptions: list[Subscription] = []
        self._closing = False
        self._sending = asyncio.Lock()
        self._forbidden: set[str] = set()
        self._last = "no answer"
        self._refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(cls, kit: Kit, *, report: Report | None = None, patience: float | None = None) -> Self:
        """Connect to any of the kit's servers, and again whenever the connection breaks, for ever.

        Args:
            kit: the member's.
            report: told in words of every trouble: servers that do not answer, what the broker does not allow, messages that were
                dropped; default structlog's warnings.
            patience: seconds to wait for the first connection; None waits until a server is there.

        Raises:
            BrokerFailed: if the broker refuses the certificate, or is not the one of the kit, or nobody answers in that time.
        """
        connection = cls(kit, report or _log)
        try:
            await connection._open(patience)
        except BaseException:
            connection._hang_up()
            await connection.close()
            raise
        return connection

    @property
    def connected(self) -> bool:
        """Whether the broker is there."""
        return bool(self._client.is_connected)

    async def publish(self, subject: str, data: bytes) -> None:
        """Send a message; while the broker is away, it waits here and this returns.

        That the broker does not allow a subject is reported later, not raised.

        Raises:
            BrokerFailed: if the message is larger than MAX_PAYLOAD bytes, too many wait already, or the connection is closed.
        """
        if len(data) > MAX_PAYLOAD:
            raise BrokerFailed(
                f"a message of {len(data)} bytes for {subject} was not sent: one has at most {MAX_PAYLOAD}; send it in parts"
            )
        try:
            await self._client.publish(subject, data)
        except errors.OutboundBufferLimitError as error:
            raise BrokerFailed(
                f"a message for {subject} was not sent: the broker is away and {UNSENT} bytes wait; start it or check the network"
            ) from error
        except errors.Error as error:
            raise BrokerFailed(f"a message for {subject} was not sent: {error}; connect anew") from error

    async def send(self, subject: str, message: bytes) -> None:
        """Publish a message of any length in parts, between which no other message comes; errors are those of `publish`."""
        async with self._sending:
            for part in cut(message):
                await self.publish(subject, part)

    async def flush(self) -> None:
        """Wait until the broker has all that was sent before, and has answered what it does not allow.

        Raises:
            BrokerFailed: if it does not answer.
        """
        try:
            for _ in range(2):  # the first PING of nats-py overtakes what it has not written yet, the second cannot
                await self._client.flush(_PATIENCE)
        except errors.Error as error:
            raise BrokerFailed(f"the broker does not answer: {error}; last trouble: {self._last}") from error

    async def subscribe(self, subject: str) -> Inbox:
        """Listen to a subject, now and after every reconnection.

        Raises:
            BrokerFailed: if the broker does not allow it or does not answer.
        """
        inbox = Inbox(subject, self._report)
        try:
            subscription = await self._client.subscribe(subject, cb=inbox.take, pending_msgs_limit=0, pending_bytes_limit=0)
        except errors.Error as error:
            raise BrokerFailed(f"cannot listen to {subject}: {error}; connect anew") from error
        await self.flush()
        if subject.lower() in self._forbidden:
            allowed = ", ".join(grants_of(self._kit.member).subscribe)
            raise BrokerFailed(f"the broker does not let {self._kit.member} listen to {subject}; listen to {allowed}")
        self._inboxes.append(inbox)
        self._subscriptions.append(subscription)
        return inbox

    async def close(self) -> None:
        """Send what waits, if the broker is there, and end; inboxes end after what they hold."""
        self._closing = True
        while any(subscription.pending_msgs for subscription in self._subscriptions):
            await asyncio.sleep(0)  # what has come in is on its way to the inboxes
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._client.close()
        self._hang_up()
        self._end(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _open(self, patience: float | None) -> None:
        first = asyncio.ensure_future(self._first())
        try:
            ends: set[asyncio.Future[Any]] = {first, self._refused}
            done, _ = await asyncio.wait(ends, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            while not first.done():  # a cancellation is lost when asyncio.wait_for has its result at the same moment
                first.cancel()
                await asyncio.wait({first}, timeout=_PAUSE)
        servers = ", ".join(map(str, self._kit.servers))
        if self._refused in done:
            raise BrokerFailed(
                f"{self._kit.member} and the broker at {servers} do not accept each other ({self._refused.result()}); check that "
                "the kit is the newest, that project.toml names this member, and that the broker is this project's"
            )
        if first not in done:
            raise BrokerFailed(f"no broker answers at {servers} ({self._last}); start it, or check the network and the kit")
        await first

    async def _first(self) -> None:
        await self._client.connect(
            [f"tls://{server}" for server in self._kit.servers],
            name=str(self._kit.member),
            tls=self._kit.tls,
            tls_handshake_first=True,
            error_cb=self._on_error,
            closed_cb=self._on_closed,
            max_reconnect_attempts=-1,
            reconnect_time_wait=_PAUSE,
            ping_interval=_PING,
            pending_size=UNSENT,
        )
        await self.flush()  # a server that hangs up at once has not refused anything in words yet

    def _hang_up(self) -> None:
        """Close the socket of an attempt that was interrupted: nats-py would leave it open, or wait for its end for ever."""
        transport, self._client._transport = self._client._transport, None
        if isinstance(transport, TcpTransport) and transport._io_writer is not None:
            transport._io_writer.transport.abort()

    async def _on_error(self, error: Exception) -> None:
        self._last = f"{type(error).__name__}: {error}"
        hung_up = isinstance(error, ssl.SSLEOFError)  # as a server does that is just stopping
        refused = (isinstance(error, ssl.SSLError) and not hung_up) or "authorization violation" in str(error).lower()
        if refused and not self._refused.done():
            self._refused.set_result(self._last)
        _, forbidden, rest = self._last.partition('permissions violation for subscription to "')
        if forbidden:
            self._forbidden.add(rest.partition('"')[0])
        self._report(self._last)

    async def _on_closed(self) -> None:
        if not self._closing:
            self._end(BrokerFailed(f"the broker has closed the connection for good: {self._client.last_error}; connect anew"))

    def _end(self, error: BrokerFailed | None) -> None:
        while self._inboxes:
            self._inboxes.pop().end(error)


def _log(trouble: str) -> None:
    structlog.get_logger().warning("broker", trouble=trouble)
