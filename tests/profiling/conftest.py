from __future__ import annotations

import sys
from pathlib import Path

# The runs with one bottleneck each are shared with the benchmark that counts how many are found.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
