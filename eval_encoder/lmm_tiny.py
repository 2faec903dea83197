"""The earlier name of `python -m eval_encoder.lmm.demo.tiny`."""

import sys

from eval_encoder.lmm.demo.tiny import main

if __name__ == "__main__":
    sys.exit(main())
