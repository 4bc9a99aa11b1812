"""Rules about the source itself that no import contract expresses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dp_federated_lora"
FILES = sorted(SOURCE.rglob("*.py"))
KERNEL = SOURCE / "privacy"


def calls(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that are called, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def violations(found: Iterator[str]) -> list[str]:
    return sorted(found)


def test_the_private_part_of_a_sealed_value_is_read_inside_the_kernel_only():
    def found() -> Iterator[str]:
        for path in FILES:
            if KERNEL not in path.parents:
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    match node:
                        case ast.Attribute(attr="_value" | "_units"):
                            yield f"{path.name}:{node.lineno}"

    assert violations(found()) == []


@pytest.mark.parametrize(
    "banned", ["pickle.", "torch.load", "torch.save", "eval", "exec", "np.random.", "numpy.random.", "random."]
)
def test_nothing_is_unpickled_evaluated_or_drawn_from_a_global_generator(banned: str):
    def found() -> Iterator[str]:
        for path in FILES:
            for name, line in calls(path):
                if name == banned or (banned.endswith(".") and name.startswith(banned)):
                    yield f"{path.name}:{line} {name}"

    assert violations(found()) == []


def test_methods_secure_sums_clients_and_rounds_read_no_file_clock_or_environment():
    def found() -> Iterator[str]:
        pure = [path for name in ("aggregation", "secagg") for path in (SOURCE / name).rglob("*.py")]
        for path in [*pure, *(SOURCE / "federated" / f"{n}.py" for n in ("client", "round"))]:
            for name, line in calls(path):
                if name == "open" or name.startswith(("time.", "datetime.", "os.", "socket.", "asyncio.")):
                    yield f"{path.name}:{line} {name}"

    assert violations(found()) == []


def test_torch_draws_only_from_generators_that_are_passed_in():
    def found() -> Iterator[str]:
        for path in FILES:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(func=func, keywords=keywords) if re.fullmatch(r"torch\.(rand\w*|normal)", ast.unparse(func)):
                        passed = {keyword.arg for keyword in keywords}
                        yield from [] if "generator" in passed else [f"{path.name}:{node.lineno}"]

    assert violations(found()) == []


def test_files_and_functions_stay_short():
    long_files = [path.name for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > 450]
    long_functions = [
        f"{path.name}:{node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 75
    ]
    assert (long_files, long_functions) == ([], [])


def test_the_privacy_kernel_can_be_read_in_an_afternoon():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in KERNEL.glob("*.py")) <= 2500
