"""One simulated round on one core and on all of them.

    python benchmarks/cores.py [--repetitions 5] [--clients 32]

Clients as in cohort.py, one by one and in stacks of 256 tokens. "All cores" is `run.threads`: a client, a stack or a share of
examples on each. "Each operation on all" is what torch does by itself: clients in turn, each matrix product on all cores.
Wall-clock time, the engines in turn, medians; the ratio to one core is the number to compare between machines.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Final

import torch
from cohort import ROWS, Row

from dp_federated_lora.federated import Purpose, Request
from dp_federated_lora.lab.speed import BATCH_TOKENS, minilm_shaped, random_clients
from dp_federated_lora.privacy import PrivacyUnit, SecureRandom
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import Learner

STACK: Final = 256


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    cores = torch.get_num_threads()
    print(
        f"{platform.machine()}, torch {torch.__version__}, {cores} cores, wall clock, {options.clients} clients, "
        f"{options.repetitions} repetitions"
    )
    print(f"{'unit':10}{'examples x tokens':20}{'stack':>8}{'1 core, ms':>12}{'all cores':>12}{'each operation on all':>24}")
    model = minilm_shaped()
    engines = {
        "one": (1, Learner(model, pad_id=0, batch_tokens=BATCH_TOKENS, last_layers=None)),
        "all": (cores, Learner(model, pad_id=0, batch_tokens=BATCH_TOKENS, last_layers=None, threads=cores)),
        "operations": (cores, Learner(model, pad_id=0, batch_tokens=BATCH_TOKENS, last_layers=None)),
    }
    for row in (*ROWS, Row(PrivacyUnit.EXAMPLE, 8, 64)):
        clients = random_clients(row.unit, options.clients, row.examples, row.tokens)
        request = Request(Purpose.TRAINING, 1, clients[0].plan.content_id, model.state(), 1.0)
        for stack in (None, STACK):
            times: dict[str, list[float]] = {}
            for _ in range(options.repetitions):
                for name, (threads, learner) in engines.items():
                    torch.set_num_threads(threads)
                    engine = Simulator(clients, learner, stack_tokens=stack)
                    start = time.perf_counter()
                    for _ in engine(request, range(len(clients)), SecureRandom.from_os()):
                        pass
                    times.setdefault(name, []).append(time.perf_counter() - start)
            one, everything, operations = (statistics.median(times[name]) for name in engines)
            label = f"{row.unit.value:10}{f'{row.examples} x {row.tokens}':20}{stack or 'none':>8}"
            print(f"{label}{1e3 * one:12.0f}{one / everything:11.2f}x{one / operations:23.2f}x", flush=True)


if __name__ == "__main__":
    main()
