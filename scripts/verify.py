"""``cupymoe verify`` from a checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe.tools.cli import verify

if __name__ == "__main__":
    verify()
