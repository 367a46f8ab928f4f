"""What the benchmarks are made of: a module for each regime of ``bench.py``, and below them what all of them use.

``peers`` has the calls that are measured and who computes them, ``libraries`` the peers that other packages bring,
``timing`` the clock, ``report`` what a report starts with, ``tables`` how it is shown, and ``command`` what commands
do alike. ``gemma4`` and ``model_contenders`` are the whole model of ``bench_model.py`` and ``bench_finetune.py``.
"""
