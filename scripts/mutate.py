#!/usr/bin/env python
"""Deliberate faults, one line each, in the kernels and their launchers: do the GPU tests see every one?

Each is made in a copy of the checkout, and a few tests run there until the first fails. The same tests have to pass in
a copy without a fault; otherwise they say nothing about one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import click
import torch

from scripts.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("cuda_src", "cupymoe", "docs", "scripts", "tests", "pyproject.toml", "README.md")


def copy_checkout(folder: Path) -> None:
    """What the tests need, without the reports and caches."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)


def run_tests(folder: Path, tests: Sequence[str], timeout: float) -> int | None:
    """pytest's exit status; None when it did not end in time."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "gpu", "-p", "no:cacheprovider", *tests]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with open(folder / "pytest.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def judge(mutation: Mutation | None, tests: Sequence[str], timeout: float) -> tuple[bool, str]:
    """Whether tests say of a fault, or of none, what they should; and what they did."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cupymoe-mutant-") as name:
        folder = Path(name)
        copy_checkout(folder)
        if mutation is not None:
            mutation.apply(folder)
        fault = mutation.fault if mutation is not None else "no fault"
        status = run_tests(folder, tests, timeout)
        seconds = f"{time.perf_counter() - start:4.0f} s"
        if status == 0:
            return mutation is None, f"{'passed' if mutation is None else 'MISSED':8} {seconds}  {fault}"
        if mutation is not None and status in (1, None):
            return status == 1 or mutation.hangs, f"{'caught' if status else 'HUNG':8} {seconds}  {fault}"
        log = (folder / "pytest.log").read_text()[-3000:]
        return False, f"{'FAILED':8} {seconds}  {fault}: pytest gave {status}\n{log}"


@click.command()
@click.option("--jobs", type=click.IntRange(min=1), default=8, show_default=True, help="Copies tested at once.")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds for the tests of one fault.")
@click.option("--only", multiple=True, default=[""], help="Faults whose description holds this.")
def main(jobs: int, timeout: float, only: tuple[str, ...]) -> None:
    """Run the tests on every fault. Exits with 1 if one is missed, or if the tests fail without a fault."""
    if not torch.cuda.is_available():
        raise click.ClickException("mutate.py needs a CUDA device")
    chosen = [mutation for mutation in MUTATIONS if any(words in mutation.fault for words in only)]
    if not chosen:
        raise click.ClickException(f"no fault's description holds any of {only}")
    click.echo(f"{torch.cuda.get_device_name()}, {len(chosen)} faults")
    with ThreadPoolExecutor(jobs) as pool:
        # The tests without a fault run all in a row, so that they take longest and begin first.
        tests = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
        without = pool.submit(judge, None, tests, 10 * timeout)
        judged = [without, *(pool.submit(judge, mutation, mutation.tests, timeout) for mutation in chosen)]
        for future in as_completed(judged):
            click.echo(future.result()[1])
    if not without.result()[0]:
        raise click.ClickException("the tests fail without a fault, so that they say nothing about one")
    caught = sum(future.result()[0] for future in judged[1:])
    click.echo(f"{caught} of {len(chosen)} faults caught")
    sys.exit(0 if caught == len(chosen) else 1)


if __name__ == "__main__":
    main()
