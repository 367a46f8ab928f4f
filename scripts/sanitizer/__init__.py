"""What ``sanitize.py`` runs under each tool, in parts that processes of their own run side by side."""

from __future__ import annotations

from scripts.sanitizer import calls, kernels

SUITE = (*kernels.PARTS, *calls.PARTS)
