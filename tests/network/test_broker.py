"""The real nats-server: who gets in, and what each may send and hear."""

import asyncio
import json
import shutil
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from dp_federated_lora.errors import BrokerFailed
from dp_federated_lora.network import broker as broker_module
from dp_federated_lora.network import connection as connection_module
from dp_federated_lora.network.authority import Authority, create_key, pem_of
from dp_federated_lora.network.broker import MAX_PAYLOAD, Broker, broker_config
from dp_federated_lora.network.connection import Connection, Inbox, Message
from dp_federated_lora.network.kit import Kit, client_context
from dp_federated_lora.network.project import Member, Server, subject_of
from dp_federated_lora.network.provisioning import provision
from dp_federated_lora.network.subjects import (
    FROM_ADMINISTRATORS,
    FROM_SITES,
    VERBS,
    grants_of,
    inbox_of,
    outbox_of,
    sender_of,
)
from kits import Place, a_project, free_ports


class Room:
    """Connections by member, with the troubles that each was told of; all are closed in the end."""

    def __init__(self, place: Place, stack: AsyncExitStack) -> None:
        self.place, self.stack = place, stack
        self.troubles: dict[str, list[str]] = {}

    async def enter(self, name: str, kit: Kit | None = None, patience: float | None = None) -> Connection:
        told = self.troubles.setdefault(name, [])
        connection = await Connection.connect(kit or self.place.kit(name), report=told.append, patience=patience)
        return await self.stack.enter_async_context(connection)

    def forbidden(self, name: str) -> list[str]:
        """The subjects that `name` was told that it may not use."""
        return [each.partition('"')[2].rstrip('"') for each in self.troubles[name] if "permissions violation" in each]


def in_room(place: Place, play: Callable[[Room], Awaitable[None]]) -> None:
    async def scene() -> None:
        async with AsyncExitStack() as stack:
            await play(Room(place, stack))

    asyncio.run(scene())


async def read(inbox: Inbox, count: int) -> list[Message]:
    async with asyncio.timeout(20):
        return [await anext(inbox) for _ in range(count)]


def test_messages_arrive_in_order_and_say_who_sent_them(place: Place):
    async def play(room: Room) -> None:
        main, a, b, alice = [await room.enter(name) for name in ("main", "a", "b", "alice")]
        sites, administrators = await main.subscribe(FROM_SITES), await main.subscribe(FROM_ADMINISTRATORS)
        to_a, to_alice = await a.subscribe("dpfl.site.a.in"), await alice.subscribe("dpfl.admin.alice.out")
        for number in range(200):
            await a.publish("dpfl.site.a.out", b"a%d" % number)
            await b.publish("dpfl.site.b.out", b"b%d" % number)
            await main.publish("dpfl.site.a.in", b"%d" % number)
        await alice.publish("dpfl.admin.alice.in.submit", b"run")
        await main.publish("dpfl.admin.alice.out", b"started")
        got = await read(sites, 400)
        for name in ("a", "b"):
            sent = [message.data for message in got if message.sender == Member("site", name)]
            assert sent == [b"%s%d" % (name.encode(), number) for number in range(200)]
        heard = await read(to_a, 200)
        assert [message.data for message in heard] == [b"%d" % number for number in range(200)]
        assert {message.sender for message in heard} == {None}
        (asked,) = await read(administrators, 1)
        assert (asked.sender, asked.subject, asked.data) == (Member("admin", "alice"), "dpfl.admin.alice.in.submit", b"run")
        assert (await read(to_alice, 1))[0].data == b"started"
        assert all(told == [] for told in room.troubles.values())

    in_room(place, play)


def test_a_site_cannot_send_as_anybody_else(place: Place):
    others = ["dpfl.site.b.out", "dpfl.site.a.in", "dpfl.site.b.in", "dpfl.admin.alice.in.submit", "dpfl.admin.alice.out"]
    others += ["dpfl.coordinator.main", "dpfl.site.a.out.more", "dpfl.site.a", "_INBOX.x", "$SYS.REQ.SERVER.PING"]

    async def play(room: Room) -> None:
        main, a = await room.enter("main"), await room.enter("a")
        sites, administrators = await main.subscribe(FROM_SITES), await main.subscribe(FROM_ADMINISTRATORS)
        for subject in others:
            await a.publish(subject, b"false")
        await a.publish("dpfl.site.a.out", b"true")
        await a.flush()
        assert room.forbidden("a") == [subject.lower() for subject in others]
        await main.close()
        assert [message.data async for message in sites] == [b"true"]
        assert [message.data async for message in administrators] == []

    in_room(place, play)


@pytest.mark.parametrize("name", ["a", "bob"])
def test_nobody_hears_what_is_meant_for_somebody_else(place: Place, name: str):
    own = inbox_of(next(member for member in place.project.members if member.name == name))

    async def play(room: Room) -> None:
        main, one = await room.enter("main"), await room.enter(name)
        mine = await one.subscribe(own)
        for subject in (
            "dpfl.site.b.in",
            "dpfl.site.b.out",
            "dpfl.site.*.in",
            "dpfl.*.*.in",
            "dpfl.admin.alice.out",
            "dpfl.coordinator.>",
            "dpfl.>",
            ">",
            "*.*.*.*",
            "_INBOX.>",
            "$SYS.>",
        ):
            with pytest.raises(BrokerFailed, match="does not let"):
                await one.subscribe(subject)
        for subject in ("dpfl.site.b.in", "dpfl.admin.alice.out", own):
            await main.publish(subject, subject.encode())
        await main.flush()
        await one.flush()
        await one.close()
        assert [message.subject async for message in mine] == [own]

    in_room(place, play)


def test_an_administrator_can_do_what_its_rights_say_and_no_more(place: Place):
    verbs = [verb for each in VERBS.values() for verb in each]

    async def play(room: Room) -> None:
        main = await room.enter("main")
        asked = await main.subscribe(FROM_ADMINISTRATORS)
        for name in ("alice", "bob"):
            one = await room.enter(name)
            for verb in [*verbs, "delete"]:
                await one.publish(outbox_of(Member("admin", name), verb), b"")
            await one.publish(outbox_of(Member("admin", "bob" if name == "alice" else "alice"), "status"), b"")
            await one.flush()
        assert room.forbidden("alice") == ["dpfl.admin.alice.in.delete", "dpfl.admin.bob.in.status"]
        denied = [f"dpfl.admin.bob.in.{verb}" for verb in ("submit", "stop", "delete")]
        assert room.forbidden("bob") == [*denied, "dpfl.admin.alice.in.status"]
        await main.flush()
        await main.close()
        got = [message.subject async for message in asked]
        assert got == [f"dpfl.admin.alice.in.{verb}" for verb in verbs] + [f"dpfl.admin.bob.in.{verb}" for verb in VERBS["view"]]

    in_room(place, play)


def test_coordinators_talk_to_each_other_and_to_everybody(place: Place):
    grants = grants_of(Member("coordinator", "main"))
    assert grants.publish == ("dpfl.site.*.in", "dpfl.admin.*.out", "dpfl.coordinator.>")
    assert grants.subscribe == ("dpfl.site.*.out", "dpfl.admin.*.in.*", "dpfl.coordinator.>")
    assert sender_of("dpfl.coordinator.main") is sender_of("dpfl.site.a.in") is sender_of("other") is None

    async def play(room: Room) -> None:
        main = await room.enter("main")
        peers = await main.subscribe("dpfl.coordinator.>")
        await main.publish("dpfl.coordinator.state.7", b"x")
        assert await read(peers, 1) == [Message("dpfl.coordinator.state.7", b"x")]
        with pytest.raises(BrokerFailed, match="does not let"):
            await main.subscribe("dpfl.site.a.in")

    in_room(place, play)


def test_the_largest_message_passes_and_a_larger_one_is_refused_before_it_is_sent(place: Place):
    async def play(room: Room) -> None:
        main, a = await room.enter("main"), await room.enter("a")
        sites = await main.subscribe("dpfl.site.a.out")
        with pytest.raises(BrokerFailed, match=f"{MAX_PAYLOAD + 1} bytes .* at most {MAX_PAYLOAD}; send it in parts"):
            await a.publish("dpfl.site.a.out", bytes(MAX_PAYLOAD + 1))
        await a.publish("dpfl.site.a.out", bytes(MAX_PAYLOAD))
        assert [len(message.data) for message in await read(sites, 1)] == [MAX_PAYLOAD]

    in_room(place, play)


def test_a_reader_that_is_too_slow_is_told_what_was_dropped(place: Place, monkeypatch):
    monkeypatch.setattr(connection_module, "UNREAD", 3)

    async def play(room: Room) -> None:
        main, a = await room.enter("main"), await room.enter("a")
        sites = await main.subscribe("dpfl.site.a.out")
        for number in range(5):
            await a.publish("dpfl.site.a.out", b"%d" % number)
        await a.flush()
        await main.flush()
        await asyncio.sleep(0)
        assert [message.data for message in await read(sites, 3)] == [b"0", b"1", b"2"]
        assert len([each for each in room.troubles["main"] if "on dpfl.site.a.out was dropped" in each]) == 2

    in_room(place, play)


def test_a_wait_that_is_cancelled_loses_no_message(place: Place):
    async def play(room: Room) -> None:
        main, a = await room.enter("main"), await room.enter("a")
        sites = await main.subscribe(FROM_SITES)
        got: list[bytes] = []
        for number in range(50):
            await a.publish("dpfl.site.a.out", b"%d" % number)
        while len(got) < 50:
            waiting = asyncio.ensure_future(anext(sites))
            for _ in range(len(got) % 4):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting}, timeout=1)
            got += [] if waiting.cancelled() else [waiting.result().data]
            got += [message.data for message in await read(sites, 1)] if len(got) < 50 else []
        assert got == [b"%d" % number for number in range(50)]

    in_room(place, play)


def tls_of(authority: Authority, folder: Path, name: str = "site/a", **options: Any) -> ssl.SSLContext:
    key = create_key(folder / "tls.key")
    certificate = authority.certify(subject_of("lungs", name), key.public_key(), days=30, **options)
    return client_context(authority.pem, pem_of(certificate), folder / "tls.key")


def refused(place: Place, tls: ssl.SSLContext) -> str:
    async def play(room: Room) -> None:
        await room.enter("a", replace(place.kit("a"), tls=tls), patience=20)

    with pytest.raises(BrokerFailed) as caught:
        in_room(place, play)
    return str(caught.value)


def test_a_certificate_of_another_authority_does_not_connect(place: Place, tmp_path: Path):
    stranger = tls_of(Authority.open(tmp_path / "authority", "lungs"), tmp_path)
    assert "do not accept each other" in refused(place, stranger)  # it does not trust the broker
    stranger.load_verify_locations(place.out / "broker" / "authority.pem")
    assert "do not accept each other" in refused(place, stranger)  # the broker does not trust it


def test_an_expired_certificate_does_not_connect(place: Place, tmp_path: Path):
    authority = Authority.open(place.out / "authority", "lungs")
    past = tls_of(authority, tmp_path, now=datetime.now(UTC) - timedelta(days=31))
    assert "do not accept each other" in refused(place, past)


def test_without_a_certificate_nobody_connects(place: Place):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(place.out / "broker" / "authority.pem")
    assert "do not accept each other" in refused(place, bare)


@pytest.mark.parametrize("name", ["site/gone", "coordinator/a", "broker", "authority"])
def test_a_certificate_of_nobody_in_the_project_does_not_connect(place: Place, tmp_path: Path, name: str):
    nobody = tls_of(Authority.open(place.out / "authority", "lungs"), tmp_path, name)
    assert "Authorization Violation" in refused(place, nobody)


def test_tls_older_than_1_3_is_not_spoken(place: Place):
    old = place.kit("a").tls
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    assert "do not accept each other" in refused(place, old)


def test_a_site_cannot_pose_as_the_broker(kits: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(kits, out)
    project = a_project(*free_ports(1))
    provision(project, out)
    certificate = json.loads((out / "b" / "kit.json").read_text())["content"]["certificate"]
    (out / "broker" / "server.pem").write_text(certificate)
    shutil.copy(out / "b" / "tls.key", out / "broker" / "server.key")
    with Broker(project, out / "broker"):
        place = Place(project, out)
        assert "certificate verify failed" in refused(place, place.kit("a").tls)


def test_a_server_that_offers_to_go_without_tls_learns_nothing(place: Place):
    heard: list[bytes] = []

    async def play(room: Room) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"tls_required": false, "max_payload": 1048576}\r\n')
            heard.append(await reader.read(4096))
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            kit = replace(place.kit("a"), servers=(Server(host="127.0.0.1", port=port),))
            await room.enter("a", kit, patience=0.2)

    with pytest.raises(BrokerFailed, match="no broker answers"):
        in_room(place, play)
    assert {data[:1] for data in heard} == {b"\x16"}  # a handshake of TLS


def test_a_server_that_says_nothing_is_given_up_and_its_socket_is_closed(place: Place):
    async def play(room: Room) -> None:
        called, hung_up = asyncio.Event(), asyncio.Event()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            called.set()
            await reader.read()  # until the other side hangs up
            writer.close()
            await writer.wait_closed()
            hung_up.set()

        async with await asyncio.start_server(listen, "127.0.0.1", 0) as server, asyncio.timeout(20):
            kit = replace(place.kit("a"), servers=(Server(host="127.0.0.1", port=server.sockets[0].getsockname()[1]),))
            with pytest.raises(BrokerFailed, match="no broker answers"):
                await room.enter("a", kit, patience=0.5)
            assert called.is_set()
            await hung_up.wait()

    in_room(place, play)


def test_a_broker_that_is_not_there_is_named(place: Place):
    (port,) = free_ports(1)

    async def play(room: Room) -> None:
        await room.enter("a", replace(place.kit("a"), servers=(Server(host="127.0.0.1", port=port),)), patience=0.1)

    with pytest.raises(BrokerFailed, match=rf"no broker answers at 127\.0\.0\.1:{port} \(Connect"):
        in_room(place, play)


def test_members_come_back_after_the_broker_and_what_they_said_meanwhile_arrives(kits: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(connection_module, "UNSENT", 1000)
    out = tmp_path / "out"
    shutil.copytree(kits, out)
    project = a_project(*free_ports(1))
    provision(project, out)
    broker = Broker(project, out / "broker")

    async def play(room: Room) -> None:
        main, a = await room.enter("main"), await room.enter("a")
        sites = await main.subscribe(FROM_SITES)
        await a.publish("dpfl.site.a.out", b"before")
        assert [message.data for message in await read(sites, 1)] == [b"before"]
        await asyncio.to_thread(broker.stop)
        async with asyncio.timeout(20):
            while not (room.troubles["a"] and room.troubles["main"]):
                await asyncio.sleep(0.01)
        await a.publish("dpfl.site.a.out", b"meanwhile")
        with pytest.raises(BrokerFailed, match="the broker is away and 1000 bytes wait"):
            await a.publish("dpfl.site.a.out", bytes(1000))
        await asyncio.to_thread(broker.start)
        while True:  # main may come back later than a, and then it has missed what a said
            await a.publish("dpfl.site.a.out", b"after")
            await a.flush()
            try:
                async with asyncio.timeout(0.1):
                    message = await anext(sites)
            except TimeoutError:
                continue
            assert message.data in (b"meanwhile", b"after")
            return

    with broker:
        in_room(Place(project, out), play)
    broker.stop()  # stopping twice is no error


def test_a_connection_that_is_closed_ends_its_inboxes_after_what_they_hold(place: Place):
    async def play(room: Room) -> None:
        main, a = await room.enter("main"), await room.enter("a")
        sites = await main.subscribe(FROM_SITES)
        await a.publish("dpfl.site.a.out", b"last")
        await a.flush()
        await main.flush()
        await main.close()
        assert [message.data async for message in sites] == [b"last"]
        assert [message async for message in sites] == []
        for again in (main.publish("dpfl.site.a.in", b""), main.flush(), main.subscribe(FROM_SITES)):
            with pytest.raises(BrokerFailed):
                await again

    in_room(place, play)


def test_a_broker_that_sends_a_member_away_ends_its_inboxes_with_an_error(place: Place):
    async def play(room: Room) -> None:
        main = await room.enter("main")
        sites = await main.subscribe(FROM_SITES)
        await main._client._process_err("'user authentication revoked'")
        with pytest.raises(BrokerFailed, match="closed the connection for good: nats: user authentication revoked"):
            await read(sites, 1)

    in_room(place, play)


def test_trouble_is_logged_where_nobody_asks_for_it(place: Place, capsys: pytest.CaptureFixture[str]):
    async def play(room: Room) -> None:
        a = await room.stack.enter_async_context(await Connection.connect(place.kit("a")))
        await a.publish("dpfl.site.b.out", b"")
        await a.flush()

    in_room(place, play)
    assert "permissions violation for publish" in capsys.readouterr().out


def test_a_port_that_is_taken_is_named(place: Place):
    port = place.project.servers[0].port
    with pytest.raises(BrokerFailed, match=rf"cannot listen on 127\.0\.0\.1, port {port}: Address already in use"):
        Broker(place.project, place.out / "broker").start()


def test_a_broker_that_does_not_start_says_why(kits: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(kits, out)
    project = a_project(*free_ports(1))
    (out / "broker" / "server.key").write_text("nonsense")
    with pytest.raises(BrokerFailed, match=r"nats-server did not start: .*certificate/key.*; see .*broker-0\.log"):
        Broker(project, out / "broker").start()

    def missing(_name: str) -> None:
        raise PackageNotFoundError

    monkeypatch.setattr(broker_module, "files", missing)
    with pytest.raises(BrokerFailed, match=r"pip install 'dp-federated-lora-lab\[network\]'"):
        Broker(project, out / "broker").start()


def test_the_configuration_allows_what_is_listed_and_nothing_by_default(place: Place):
    config = json.loads(broker_config(place.project, place.out / "broker", bind="0.0.0.0"))
    assert (config["host"], config["max_payload"], "cluster" in config) == ("0.0.0.0", 8 * 2**20, False)
    assert config["tls"]["verify_and_map"] and config["tls"]["handshake_first"]
    users = {user["user"]: user["permissions"] for user in config["authorization"]["users"]}
    assert set(users) == {f"CN={member},O=lungs" for member in place.project.members}
    assert users["CN=site/a,O=lungs"] == {
        "publish": {"allow": ["dpfl.site.a.out"]},
        "subscribe": {"allow": ["dpfl.site.a.in"]},
    }
    assert users["CN=admin/bob,O=lungs"]["publish"]["allow"] == [f"dpfl.admin.bob.in.{verb}" for verb in VERBS["view"]]
    assert all(permissions[way]["allow"] for permissions in users.values() for way in ("publish", "subscribe"))


def on_a_route(port: int, tls: ssl.SSLContext) -> bytes:
    """What a server says to somebody who poses as another one on the port for routes, once TLS has begun."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
        try:
            with tls.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
                secure.sendall(b'CONNECT {"verbose":false,"name":"x","cluster":"lungs"}\r\nINFO {"server_id":"x"}\r\nPING\r\n')
                return secure.recv(4096)
        except OSError:
            return b""


async def heard_by(inbox: Inbox, sender: Connection, subject: str) -> None:
    """Servers learn of each other's listeners in their own time, so the message is repeated until it comes."""
    async with asyncio.timeout(20):
        while True:
            await sender.publish(subject, b"x")
            try:
                async with asyncio.timeout(0.05):
                    await anext(inbox)
                    return
            except TimeoutError:
                continue


def test_three_servers_are_one_broker_and_only_servers_have_routes(kits: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(kits, out)
    ports = free_ports(6)
    project = a_project(*ports[:3])
    provision(project, out)
    place = Place(project, out)

    def at(name: str, servers: Sequence[int]) -> Kit:
        kit = place.kit(name)
        return replace(kit, servers=tuple(kit.servers[number] for number in servers))

    brokers = [Broker(project, out / "broker", server=number, route_ports=ports[3:]) for number in range(3)]

    async def play(room: Room) -> None:
        main, a = await room.enter("main", at("main", [2])), await room.enter("a", at("a", [0, 1]))
        await room.enter("b", at("b", [1]))
        sites = await main.subscribe("dpfl.site.a.out")
        await heard_by(sites, a, "dpfl.site.a.out")
        await asyncio.to_thread(brokers[0].stop)
        await heard_by(sites, a, "dpfl.site.a.out")
        await a.flush()
        assert room.forbidden("a") == []

    with brokers[0], brokers[1], brokers[2]:
        assert on_a_route(ports[3], place.kit("a").tls) == b""
        server = client_context(
            (out / "broker" / "authority.pem").read_text(),
            (out / "broker" / "server.pem").read_text(),
            out / "broker" / "server.key",
        )
        assert on_a_route(ports[3], server) != b""
        in_room(place, play)
