"""Flower's SecAgg+ functions: the median of five clients, and the server scaled up from twenty secrets and masks; prints JSON.

python benchmarks/secagg_flower.py SIZE DEGREE THRESHOLD SECRETS SERVER_MASKS
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Final

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

SAMPLE: Final = 20
CLIENTS: Final = 5
MODULUS: Final = 1 << 20


def main() -> None:
    """Print seconds of processor time by side."""
    size, degree, threshold, secrets, server_masks = map(int, sys.argv[1:])
    neighbour = [generate_key_pairs() for _ in range(degree)]

    times = []
    for _ in range(CLIENTS):
        start = time.process_time()
        sealing, masking, seed = generate_key_pairs(), generate_key_pairs(), bytes(range(32))
        shares = (
            create_shares(seed, threshold, degree + 1),
            create_shares(private_key_to_bytes(masking[0]), threshold, degree + 1),
        )
        total = np.zeros(size, dtype=np.int64)
        for number, (_, public) in enumerate(neighbour):
            common = generate_shared_key(sealing[0], public)
            decrypt(common, encrypt(common, share_keys_plaintext_concat(1, number, shares[0][number], shares[1][number])))
            total = (total + pseudo_rand_gen(generate_shared_key(masking[0], public), MODULUS, [(size,)])[0]) % MODULUS
        total = (total + pseudo_rand_gen(seed, MODULUS, [(size,)])[0]) % MODULUS
        times.append(time.process_time() - start)
    client = statistics.median(times)

    start = time.process_time()
    for _ in range(SAMPLE):
        combine_shares(shares[0][:threshold])
    opening = (time.process_time() - start) / SAMPLE
    start = time.process_time()
    for _ in range(SAMPLE):
        total = (total - pseudo_rand_gen(seed, MODULUS, [(size,)])[0]) % MODULUS
    removing = (time.process_time() - start) / SAMPLE
    print(json.dumps({"client": client, "server": secrets * opening + server_masks * removing}))


if __name__ == "__main__":
    main()
