"""The earlier name of `python -m eval_encoder.lmm.scoring.answers`."""

import sys

from eval_encoder.lmm.scoring.answers import main

if __name__ == "__main__":
    sys.exit(main())
