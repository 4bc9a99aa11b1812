"""Studies: many runs of recipes with changes, beside baselines, in tables and plots."""

from dp_federated_lora.lab.study.grid import Cell, read_grid
from dp_federated_lora.lab.study.runner import run_study
from dp_federated_lora.lab.study.tables import write_study

__all__ = ("Cell", "read_grid", "run_study", "write_study")
