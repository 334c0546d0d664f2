"""These tests need TRITON_INTERPRET=1 before triton is imported: they run in their own process.

`test_triton.py` runs them; by hand:
TRITON_INTERPRET=1 python -m pytest tests/backends/interpreted
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
