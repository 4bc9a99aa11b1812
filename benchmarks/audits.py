"""Attack the intact build and every broken one, and write the table of what caught which.

python benchmarks/audits.py               # a minute or two on one core; writes docs/audits.md
python benchmarks/audits.py --seeds 100   # more intact builds to count false alarms in
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from broken_builds import BROKEN, INTACT, Build, D, Found, audits  # noqa: E402

TABLE = ROOT / "docs" / "audits.md"


def attack(build: Build, seed: int) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        return audits(build, Path(folder), seed=seed)


def influence(value: float) -> str:
    return f"{value:.4f}" if value < 1e4 else f"{value:.1e}"


def row(name: str, build: Build, found: Found) -> str:
    verdict = found.verdict
    cells = (
        name,
        build.wrong,
        "; ".join(found.caught_by) or "nothing",
        f"{verdict.claimed:.2f}",
        f"{verdict.lower_bound:.2f}",
        f"{verdict.estimate.epsilon:.2f}" if verdict.estimate else "none",
        influence(found.influence),
        influence(found.hostile_influence),
    )
    return f"| {' | '.join(cells)} |"


def page(rows: list[str], alarms: int, runs: int) -> str:
    return f"""# Audits of broken builds

Written by `python benchmarks/audits.py`; `tests/audit/test_broken_builds.py` checks the same builds. Each broken build differs
from the real one in one place, which is patched while a small engine runs ({D:,} trained numbers, five sites). It is attacked by

- **canaries**: 2,000 known contributions, each in the run by the toss of a coin, through sampler, clip and noise. 200 are guessed
  to have taken part and 200 not to. The lower bound is the larger of two one-run bounds (arXiv 2305.08846; arXiv 2410.22235 for
  this plan's own mechanism), which hold together at 95 %. A lower bound above the claimed epsilon refutes the build.
- **replay**: the same seed with and without one unit. Influence is the largest distance of two releases over clip norm / divisor:
  at most 1 in a correct build.
- **replay, hostile unit**: the same for a unit that sends 1e9 and a NaN; such a unit counts as zero in a correct build.

The estimate (cosines against their exact null, arXiv 2302.03098) is an estimate and decides nothing: it moves with the fitted
standard deviation and may lie above the claim of a correct build.

| build | what is wrong | caught by | claimed epsilon | lower bound (95 %) | estimate | influence | influence, hostile |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

With all 400 guesses right the bound is 7.63: a build that leaks more shows no more.

**False alarms.** A correct build fails with probability at most 5 % by the theorems; of the intact builds here, with other seeds,
{alarms} of {runs} did. A replay has none: both runs have the same noise.

**What audits cannot show.** A pass proves nothing. Bounds from one run show about half of the epsilon that a mechanism really
has: "two factors, one charge" acts as if it added 0.71 of its noise, and passes the canaries.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="intact builds of each kind")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)  # thousands of short vectors: threads only wait for each other
    rows = []
    for name, build in {**INTACT, **BROKEN}.items():
        rows.append(row(name, build, attack(build, seed=1)))
        print(rows[-1], flush=True)
    others = [attack(build, seed=seed) for build in INTACT.values() for seed in range(2, seeds + 2)]
    alarms = sum(bool(found.caught_by) for found in others)
    TABLE.write_text(page(rows, alarms, len(others)), encoding="utf-8")
    print(f"{alarms} false alarms in {len(others)} intact builds; wrote {TABLE}")


if __name__ == "__main__":
    main()
