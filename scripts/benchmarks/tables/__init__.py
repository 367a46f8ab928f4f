"""The tables of the reports, in markdown: what the benchmarks print, and what README.md and docs/benchmarks.md show.

A module for each kind of report; here is which table a part of a report has.
"""

from __future__ import annotations

from collections.abc import Callable

from scripts.benchmarks.report import Report
from scripts.benchmarks.tables.experts import (
    experts_table,
    first_call_table,
    invariant_table,
    memory_table,
    skewed_table,
    summary,
)
from scripts.benchmarks.tables.other_calls import (
    batched_table,
    lora_table,
    models_table,
    portable_table,
    quantised_table,
    vllm_table,
)
from scripts.benchmarks.tables.stages import host_table, stages_table
from scripts.benchmarks.tables.training import training_table
from scripts.benchmarks.tables.whole_models import finetune_table, greedy_table, model_memory_table, model_table


def rows_table(report: Report) -> str:
    """The table of a report's ``"rows"``: of many models, training, adapters, builds, batches, or one model's calls."""
    tables = {
        "model": models_table,
        "mode": training_table,
        "adapters": lora_table,
        "build": portable_table,
        "format": quantised_table,
        "tokens_per_expert": batched_table,
    }
    if "vllm_triton" in report["rows"][0].get("ms", {}):
        return vllm_table(report)
    return next((tables[key] for key in report["rows"][0] if key in tables), experts_table)(report)


def any_memory_table(report: Report) -> str:
    """The table of a report's ``"memory"``: of a whole model, or of one layer's calls."""
    return (memory_table if isinstance(report["memory"], list) else model_memory_table)(report)


TABLES: dict[str, Callable[[Report], str]] = {
    "rows": rows_table,
    "skewed": skewed_table,
    "memory": any_memory_table,
    "stages": stages_table,
    "calls": host_table,
    "first_call_s": first_call_table,
    "cells": model_table,
    "greedy": greedy_table,
    "recipes": finetune_table,
}
"""By the part of a report that they show."""

RENDERED = {**TABLES, "summary": summary, "invariant": invariant_table}
"""What a document may ask for, by name."""
