"""The maintainers' commands, each a file here, and the packages of what they share.

A command runs as ``python scripts/bench.py`` from a checkout, whether cupymoe is installed or not.
"""
