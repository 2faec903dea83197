"""Serves a page that asks a trained model: `python eval_encoder/lmm_web.py --model OUT`."""

import sys

from eval_encoder.lmm.web.page import main

if __name__ == "__main__":
    sys.exit(main())
