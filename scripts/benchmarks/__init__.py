"""What the benchmarks are made of: a module for each regime of ``bench.py``, and below them what all of them use.

``peers`` has the calls that are measured and who computes them, ``libraries`` the peers that other packages bring,
``timing`` the clock, and ``report`` what a report starts with.
"""
