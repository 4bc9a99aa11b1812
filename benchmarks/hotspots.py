"""Where the time of a recipe's run goes, and how much of its batches is padding.

    python benchmarks/hotspots.py [--recipe newswire] [--functions 12] [--set privacy.rounds=20 ...]

The run is that of `dpfl train` on one core, without what an earlier one kept. Functions are listed by the time spent in
themselves (cProfile, which counts calls of compiled code as functions). Padding is counted over batches of the training
table as they are first computed, and over those of one participant's sample.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
from pathlib import Path

import torch

from dp_federated_lora import train
from dp_federated_lora.data import Examples, length_batches
from dp_federated_lora.federated import Purpose, Request
from dp_federated_lora.lab.config import load_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.recipes import recipe_text
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import SecureRandom


def padding(examples: Examples, most: int) -> float:
    """Share of the positions of batches of at most `most` tokens that hold no token."""
    lengths = [*map(len, examples.tokens)]
    batches = length_batches(lengths, max_tokens=most)
    return 1.0 - sum(lengths) / sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="newswire")
    parser.add_argument("--functions", type=int, default=12)
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(recipe_text(options.recipe), encoding="utf-8")
        config = load_config(path, overrides=[*options.set, "run.threads=1"])
        bench, plan = Workbench.of(config), privacy_plan(config)
        table, most = bench.tokenize(bench.training_table()), config.training.batch_tokens
        client, rng = bench.clients(plan)[0], SecureRandom.from_os()
        request = Request(Purpose.TRAINING, plan.rounds, plan.content_id, bench.model.state(), plan.clip_norm)
        sample, _ = client.sample(request, rng)
        for what, examples in (("all texts", table), ("one participant's sample", sample)):
            print(f"padding, {what}: {padding(examples, most):.1%}")
        profiler = cProfile.Profile()
        profiler.runcall(train, config, out=f"{folder}/run")
    found = pstats.Stats(profiler)
    total = found.total_tt  # type: ignore[attr-defined]
    print(f"torch {torch.__version__}, {total:.0f} s")
    own = sorted(((times[2], where) for where, times in found.stats.items()), reverse=True)  # type: ignore[attr-defined]
    for seconds, (file, _, name) in own[: options.functions]:
        print(f"{seconds / total:6.1%}  {name}  {Path(file).name if file != '~' else ''}")


if __name__ == "__main__":
    main()
