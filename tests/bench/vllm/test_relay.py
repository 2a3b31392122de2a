import hashlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from cacheflow.bench.vllm.rivals.pacing import Pacer
from cacheflow.bench.vllm.rivals.relay import Relay
from cacheflow.errors import ConfigError
from support.manual_clock import ManualClock
from support.waiting import eventually


def test_the_pace_is_that_of_the_link():
    clock = ManualClock()
    pacer = Pacer(100.0, clock=clock, sleep=clock.sleep)
    for _ in range(50):
        pacer.pass_bytes(10, there_since_s=0.0)
    assert clock.now_s == pytest.approx(5.0)
    assert pacer.passed_bytes == 500


@pytest.mark.parametrize("late_s", [0.01, 0.09, 3.0])
def test_late_wake_ups_do_not_add_up(late_s: float):
    clock = ManualClock()
    pacer = Pacer(100.0, clock=clock, sleep=lambda duration_s: clock.sleep(duration_s + late_s))
    for _ in range(50):
        pacer.pass_bytes(10, there_since_s=float("-inf"))
    assert 5.0 <= clock.now_s <= 5.0 + late_s + 1e-9


def test_an_idle_link_saves_up_nothing():
    clock = ManualClock()
    pacer = Pacer(100.0, clock=clock, sleep=clock.sleep)
    pacer.pass_bytes(10, there_since_s=0.0)
    clock.sleep(30.0)
    pacer.pass_bytes(100, there_since_s=clock.now_s)
    assert clock.now_s == pytest.approx(0.1 + 30.0 + 1.0)


def test_a_link_without_limit_never_waits():
    def never(_: float) -> None:
        raise AssertionError("slept")

    pacer = Pacer(float("inf"), sleep=never)
    pacer.pass_bytes(10**12, there_since_s=0.0)
    assert pacer.passed_bytes == 10**12


@pytest.mark.parametrize("bytes_per_s", [0.0, -1.0, float("nan")])
def test_a_link_that_never_delivers_is_refused(bytes_per_s: float):
    with pytest.raises(ConfigError, match="must be above 0"):
        Pacer(bytes_per_s)


@pytest.fixture
def digest_server() -> Iterator[int]:
    """Reads until its client has sent everything, then answers with the digest and ten times the bytes."""

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                asked = _read_all(peer)
                peer.sendall(hashlib.sha256(asked).digest() + asked * 10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def _read_all(peer: socket.socket) -> bytes:
    return b"".join(iter(lambda: peer.recv(65536), b""))


def _exchange(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return _read_all(client)


def test_every_byte_passes_in_both_directions(digest_server: int):
    data = random.Random(3).randbytes(300_001)
    with closing(Relay(digest_server, bytes_per_s=1e9)) as relay:
        for _ in range(2):
            assert _exchange(relay.port, data) == hashlib.sha256(data).digest() + data * 10
        assert relay.answered_bytes == 2 * (32 + 10 * len(data))


def test_connections_share_the_link_and_do_not_mix(digest_server: int):
    answers: dict[int, bytes] = {}

    def ask(number: int) -> None:
        answers[number] = _exchange(relay.port, bytes([number]) * 50_000)

    with closing(Relay(digest_server, bytes_per_s=1e8)) as relay:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {number: answer[32:] for number, answer in answers.items()} == {
        number: bytes([number]) * 500_000 for number in range(4)
    }


def test_a_server_that_is_not_there_closes_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with closing(Relay(port, bytes_per_s=1e9)) as relay, socket.create_connection(("127.0.0.1", relay.port)) as client:
        assert client.recv(1) == b""


def test_closing_ends_open_connections(digest_server: int):
    relay = Relay(digest_server, bytes_per_s=1e9)
    with socket.create_connection(("127.0.0.1", relay.port)) as client:
        client.sendall(b"not finished")
        eventually(lambda: relay.num_open == 2)  # the relay's thread accepts in its own time
        relay.close()
        assert client.recv(1) == b""
