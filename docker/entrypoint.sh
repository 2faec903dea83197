#!/usr/bin/env bash
# Inside the container: says what is there, then runs the given command (a shell without one).
set -euo pipefail
python - <<'PY'
import torch

gpus = torch.cuda.device_count()
print(f"torch {torch.__version__}, {gpus} GPUs" + (f" ({torch.cuda.get_device_name(0)})" if gpus else ""))
PY
if [ $# -eq 0 ]; then set -- bash; fi
exec "$@"
