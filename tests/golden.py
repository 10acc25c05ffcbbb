"""Reference vectors of the released code, where they are present: ``$XCOMP_GOLDEN`` or ``../shared/golden``."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("XCOMP_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))
FOLDER = ROOT / "videochat_flash_tiny"
needs_golden = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no reference vectors in {ROOT}; set XCOMP_GOLDEN to their folder"
)
