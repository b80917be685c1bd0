"""`broker worker`, whose blocked event loop keeps its runs for four leases and no longer: `python -m
tests.kit.impatient_worker worker`.
"""

from __future__ import annotations

from broker.cli import main
from worker import keeper

keeper.LEAST_SECONDS = 0.0

if __name__ == "__main__":
    main()
