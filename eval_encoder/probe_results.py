"""The earlier name of `python -m eval_encoder.probe.compare`."""

import sys

from eval_encoder.probe.compare import main

if __name__ == "__main__":
    sys.exit(main())
