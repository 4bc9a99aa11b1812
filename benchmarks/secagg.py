"""A secure sum: time of a client and of the server, bytes, beside the keystream alone and beside Flower's SecAgg+ functions.

    python benchmarks/secagg.py [--clients 100 1000] [--sizes 147456 1048576] [--dropped 0 0.05 0.1] [--python-flower PATH]

All messages run as bytes through both state machines in one process; 20 bits, neighbours for a tenth corrupt and a tenth dropped.
Clients drop out after they sent their shares. "Of the keystream" compares with making and adding the masks alone, by AES-256
in counter mode. Processor time of one thread: the median client, and all that the server does. Flower's functions (another
interpreter that has `flwr[simulation]`) do what its client and server do for the same neighbours, threshold and masks; the time
of its server is scaled up from twenty secrets and masks.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dp_federated_lora.secagg import ClientSession, ServerSession, Terms, degree_for
from dp_federated_lora.secagg.client_session import STAGES
from dp_federated_lora.secagg.crypto import PrivateKey, add_mask, agree
from dp_federated_lora.signing import SigningKey, signature_holds

BITS: Final = 20
T = TypeVar("T")


class Result(NamedTuple):
    """Seconds of the median client and of the server, bytes of a client, and masks that each side makes."""

    client: float
    server: float
    sent: int
    client_masks: int
    server_masks: int


def timed(work: Callable[..., T], *arguments: object) -> tuple[T, float]:
    """What `work` gives, and its processor time."""
    start = time.process_time()
    return work(*arguments), time.process_time() - start


def measured(clients: int, size: int, dropped: float, degree: int) -> Result:
    """One round, whose sum is checked."""
    keys = {f"site-{number:04}": SigningKey(Ed25519PrivateKey.generate()) for number in range(clients)}
    roster = {name: key.public for name, key in keys.items()}
    terms = Terms("bench", 1, size, BITS, roster, bytes(32), min_cohort=clients // 2, degree=degree)
    gone = set(list(keys)[:: round(1 / dropped)] if dropped else ())
    pattern = np.arange(size, dtype=np.int64)
    server, sessions = ServerSession(terms), {name: ClientSession(name, terms, key) for name, key in keys.items()}
    spent, sent, total = dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 0), 0.0
    messages = dict.fromkeys(keys, b"")
    for stage in STAGES:
        for name, message in messages.items():
            if stage == "mask" and name in gone:
                continue
            own = {"advertise": (), "mask": (message, (pattern * int(name[5:])) % (1 << BITS))}.get(stage, (message,))
            answer, seconds = timed(getattr(sessions[name], stage), *own)
            spent[name] += seconds
            sent[name] += len(answer)
            total += timed(server.receive, name, answer)[1]
        messages, seconds = timed(server.advance)
        total += seconds
    if server.result is None or set(server.result.names) != keys.keys() - gone:
        sys.exit("the sum is not of those who stayed")
    if not np.array_equal(server.result.integers, (pattern * sum(int(name[5:]) for name in server.result.names)) % (1 << BITS)):
        sys.exit("the sum is wrong")
    near = {name: terms.neighbours(name, sorted(keys)) for name in gone}
    server_masks = len(server.result.names) + sum(len(set(others) - gone) for others in near.values())
    staying = [name for name in keys if name not in gone]
    client = statistics.median(spent[name] for name in staying)
    return Result(client, total, sent[staying[0]], len(terms.neighbours(staying[0], sorted(keys))) + 1, server_masks)


def median_of(work: Callable[..., object], *arguments: object) -> float:
    """Seconds of `work`, the median of thirty."""
    return statistics.median(timed(work, *arguments)[1] for _ in range(30))


def keystream(size: int) -> float:
    """Seconds to make a mask and add it."""
    return median_of(add_mask, np.zeros(size, dtype=np.uint32), bytes(32))


def primitives() -> str:
    """What a client does for each neighbour whatever the size: one signature checked, two keys agreed on."""
    key, private = SigningKey(Ed25519PrivateKey.generate()), PrivateKey.generate()
    public = PrivateKey.generate().public_key().public_bytes_raw()
    checking = median_of(signature_holds, key.public, "bench", b"", key.sign("bench", b""))
    agreeing = median_of(agree, private, public, "bench", b"")
    return f"checking a signature {1e3 * checking:.3f} ms, agreeing on a key {1e3 * agreeing:.3f} ms"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[147_456, 1_048_576])
    parser.add_argument("--dropped", type=float, nargs="+", default=[0.0, 0.05, 0.1])
    parser.add_argument("--python-flower", default=None)
    options = parser.parse_args()
    print(f"{platform.machine()}, numpy {np.__version__}, one thread, processor time, {BITS} bits")
    print(primitives() + "".join(f", a mask of {size:,} {1e3 * keystream(size):.3f} ms" for size in options.sizes))
    columns = f"{'clients':>8}{'size':>10}{'dropped':>9}{'degree':>8}{'client, ms':>12}"
    columns += f"{'of the keystream':>18}{'server, s':>11}{'of it':>7}"
    print(columns + f"{'MB sent':>9}" + (f"{'Flower client':>15}{'server':>9}" if options.python_flower else ""))
    for clients in options.clients:
        degree, threshold = degree_for(clients, corrupt=0.1, dropped=0.1)
        for size in options.sizes:
            limit = keystream(size)
            for dropped in options.dropped:
                found = measured(clients, size, dropped, degree)
                times = found.client / limit / found.client_masks, found.server / limit / found.server_masks
                line = f"{clients:8}{size:10}{dropped:9.0%}{degree:8}{1e3 * found.client:12.1f}{times[0]:17.1f}x"
                line += f"{found.server:11.2f}{times[1]:6.1f}x{found.sent / 1e6:9.2f}"
                if options.python_flower:
                    script = Path(__file__).with_name("secagg_flower.py")
                    counts = [size, degree, threshold, clients, found.server_masks]
                    command = [options.python_flower, str(script), *map(str, counts)]
                    peer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                    line += f"{peer['client'] / found.client:14.1f}x{peer['server'] / found.server:8.1f}x"
                print(line, flush=True)


if __name__ == "__main__":
    main()
