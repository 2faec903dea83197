"""The earlier name of `python -m eval_encoder.lmm.scoring.table`."""

import sys

from eval_encoder.lmm.scoring.table import main

if __name__ == "__main__":
    sys.exit(main())
