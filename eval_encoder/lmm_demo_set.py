"""The earlier name of `python -m eval_encoder.lmm.demo.question_set`."""

import sys

from eval_encoder.lmm.demo.question_set import main

if __name__ == "__main__":
    sys.exit(main())
