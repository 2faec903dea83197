# The training image. Build:  docker build -t llava_vit:TAG .
#   --build-arg BASE=IMAGE@sha256:...   another base with torch, best by digest
#   --build-arg FLASH_ATTN=2.8.3        also compiles flash-attn (long; torch's own varlen kernels are used without it)
# Run with --shm-size 32g and --gpus all; no privileges are needed. See docker/run_multi_node.sh.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM ${BASE}

RUN useradd --create-home --uid 1000 univit
WORKDIR /workspace/univit
COPY pyproject.toml README.md LICENSE ./
COPY docker/constraints-gpu.txt docker/
COPY training training
COPY model_factory model_factory
COPY data_pipeline data_pipeline
COPY eval_encoder eval_encoder
COPY shells shells
COPY docker docker

# the image's own torch stays: pip must not replace it by another build
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /tmp/torch.txt \
    && pip install --no-cache-dir --constraint /tmp/torch.txt --constraint docker/constraints-gpu.txt \
        --editable ".[gpu,eval]"

ARG FLASH_ATTN=""
RUN if [ -n "$FLASH_ATTN" ]; then pip install --no-cache-dir --no-build-isolation "flash-attn==$FLASH_ATTN"; fi

# HOME for whatever user the container is given; shells/ must not make an environment of their own
ENV UNIVIT_INSTALLED=1 HOME=/tmp OMP_NUM_THREADS=1
USER univit
ENTRYPOINT ["bash", "docker/entrypoint.sh"]
