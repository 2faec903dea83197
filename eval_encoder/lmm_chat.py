"""A conversation with a trained model: `python eval_encoder/lmm_chat.py --model OUT`."""

import sys

from eval_encoder.lmm.chat import main

if __name__ == "__main__":
    sys.exit(main())
