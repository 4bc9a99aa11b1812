"""What attacks do to a private run, with and without a defence: newswires, 20 participants of whom 4 lie.

    python benchmarks/robustness.py                                   # every attack against every defence
    python benchmarks/robustness.py --attacks alie --rounds 10        # a short look
    python benchmarks/robustness.py --table-only                      # the table again, from results measured earlier

The recipe is shortened: 64 tokens, one adapted block, few rounds of which the last ones train the adapter, and a head that starts
from label names. All cells share one model and what it computes once. A result is one JSON file under
benchmarks/results/robustness; the table is written to docs/robustness.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from dp_federated_lora import Config, load_config
from dp_federated_lora.lab.attackers import MESSAGES, POISONS, prepared_bench, scores_under_attack
from dp_federated_lora.lab.recipes import recipe_text

RESULTS = Path("benchmarks/results/robustness")
TABLE = Path("docs/robustness.md")
PARTICIPANTS, LIARS, GROUPS = 20, 4, 10
HEAD_SHARE = 0.9
ATTACKS = (None, *MESSAGES, *POISONS)
DEFENCES = {
    "mean": "",
    "clip around aggregate": "[robust]\nclip_around_aggregate = true\n",
    "trimmed mean of groups": f'[robust]\nrule = "trimmed_mean"\nbyzantine = {LIARS}\ngroups = {GROUPS}\n',
    "nnm + median of groups": f'[robust]\nrule = "median"\nbefore = ["nnm"]\nbyzantine = {LIARS}\ngroups = {GROUPS}\n',
    "smea of groups": f'[robust]\nrule = "smea"\nbyzantine = {LIARS}\ngroups = {GROUPS}\n',
    "smea of groups + clip around aggregate": (
        f'[robust]\nrule = "smea"\nbyzantine = {LIARS}\ngroups = {GROUPS}\nclip_around_aggregate = true\n'
    ),
    "median of groups + clip around aggregate": (
        f'[robust]\nrule = "median"\nbyzantine = {LIARS}\ngroups = {GROUPS}\nclip_around_aggregate = true\n'
    ),
}


def configuration(defence: str, rounds: int, seed: int) -> Config:
    """The newswire recipe, shortened, with a defence."""
    path = Path("runs/robustness.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{recipe_text('newswire')}\n{DEFENCES[defence]}", encoding="utf-8")
    changes = {
        "model.max_tokens": 64,
        "lora.last_layers": 1,
        "federation.clients": PARTICIPANTS,
        "federation.partition": '"iid"',
        "privacy.rounds": rounds,
        "training.head_rounds": round(HEAD_SHARE * rounds),
        "training.head_start": '"labels"',
        "run.seed": seed,
    }
    return load_config(path, overrides=[f"{key}={value}" for key, value in changes.items()])


def write_table() -> None:
    """docs/robustness.md from all results: accuracy by attack and defence, and what is lost to no attack."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    if not results:
        raise SystemExit(f"there are no results in {RESULTS}; run without --table-only first")

    def accuracy(attack: str | None, defence: str) -> list[float]:
        return [100 * r["accuracy"] for r in results if (r["attack"], r["defence"]) == (attack, defence)]

    known = [defence for defence in DEFENCES if any(r["defence"] == defence for r in results)]
    lines = [
        "# Robustness",
        "",
        "Written by `python benchmarks/robustness.py`: the newswire recipe, shortened (64 tokens, one adapted block, rounds as",
        "below, a head that starts from label names), unit example, epsilon 8 at delta 1e-5,",
        f"{PARTICIPANTS} equal participants of whom {LIARS} lie. Test accuracy in per cent, mean over seeds, and in brackets the",
        "points lost to no attack under the same defence. Liars know all honest contributions; what they send is clipped like",
        f"the rest. Rules see {GROUPS} groups: {GROUPS**0.5:.2f} times the noise.",
        "",
        f"| Attack | {' | '.join(known)} |",
        f"|---|{'---|' * len(known)}",
    ]
    for attack in ATTACKS:
        cells = []
        for defence in known:
            found, base = accuracy(attack, defence), accuracy(None, defence)
            lost = f" ({statistics.mean(base) - statistics.mean(found):+.1f})" if attack and found and base else ""
            cells.append(f"{statistics.mean(found):.1f}{lost}" if found else "")
        if any(cells):
            lines.append(f"| {attack or 'none'} | {' | '.join(cells)} |")
    shares = [(r["defence"], 100 * r["backdoor"]) for r in results if "backdoor" in r]
    if shares:
        means = [(d, statistics.mean(share for name, share in shares if name == d)) for d in known if d in dict(shares)]
        lines += ["", "Share of other examples that the backdoor's trigger turns into its label, in per cent: "]
        lines[-1] += ", ".join(f"{defence} {share:.1f}" for defence, share in means) + "."
    rounds, seeds = ", ".join(sorted({str(r["rounds"]) for r in results})), len({r["seed"] for r in results})
    seconds = statistics.median(r["seconds"] for r in results)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines += ["", f"Rounds: {rounds}. Seeds: {seeds}. Median of a cell: {seconds:.0f} s. Machine: {machine}."]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    """Measure what is asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=[str(attack) for attack in ATTACKS], default=[str(a) for a in ATTACKS])
    parser.add_argument("--defences", nargs="+", choices=list(DEFENCES), default=list(DEFENCES))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds) if not options.table_only else ():
        bench = prepared_bench(configuration("mean", options.rounds, seed))
        for defence in options.defences:
            config = configuration(defence, options.rounds, seed)
            for name in options.attacks:
                attack, start = None if name == "None" else name, time.monotonic()
                scores = scores_under_attack(config, attack=attack, liars=LIARS, bench=bench)
                result = {"attack": attack, "defence": defence, "seed": seed, "rounds": options.rounds, **scores}
                result["seconds"] = time.monotonic() - start
                (RESULTS / f"{name}-{defence.replace(' ', '-')}-{seed}.json").write_text(json.dumps(result), encoding="utf-8")
                print(result, flush=True)
    write_table()


if __name__ == "__main__":
    main()
