"""The earlier name of `python -m eval_encoder.lmm.scoring.lmms_eval`."""

import sys

from eval_encoder.lmm.scoring.lmms_eval import main

if __name__ == "__main__":
    sys.exit(main())
