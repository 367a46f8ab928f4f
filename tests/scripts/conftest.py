"""The scripts import each other as modules of their own folder."""

import sys

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
