"""How hard the tests try: `make thorough` sets HWDBM_EFFORT to how many times as many examples as by default."""

import os

EFFORT = int(os.environ.get("HWDBM_EFFORT", "1"))
