# MI355X and MI350X: AMD's container with xDiT, and an AITER that has the kernels of the recipes (mha_v4: 17 August 2026 or newer).
#
#   docker build -f docker/rocm.Dockerfile -t wan-mlperf:rocm .
#   docker run --rm -it --device=/dev/kfd --device=/dev/dri --group-add video --security-opt seccomp=unconfined \
#       --ipc=host --ulimit memlock=-1 --ulimit nofile=65536 -v $HOME/.cache:/root/.cache -v $PWD/outputs:/wan-mlperf/outputs \
#       wan-mlperf:rocm torchrun --nproc-per-node 8 -m wan_mlperf.run --recipe configs/mi355x-singlestream.yaml
#
# ~/.cache keeps the model, MIOpen's database and AITER's compiled modules from one run to the next.
ARG BASE=rocm/pytorch-xdit:v26.5
FROM ${BASE}

# The commit that tests/aiter runs in Triton's interpreter.
ARG AITER_COMMIT=e4048607a535ace3a2b51ded31b1c8c2d45c0879
ARG GPU_ARCHS=gfx950
ENV GPU_ARCHS=${GPU_ARCHS}
RUN pip uninstall --yes aiter amd-aiter \
    && git clone https://github.com/ROCm/aiter /opt/aiter \
    && git -C /opt/aiter checkout ${AITER_COMMIT} \
    && git -C /opt/aiter submodule update --init --recursive \
    && pip install --no-build-isolation --editable /opt/aiter

WORKDIR /wan-mlperf
COPY . .
# Keeps the container's own torch, triton and ROCm packages.
RUN make install PYTHON=python3

ENV AITER_JIT_DIR=/root/.cache/aiter
CMD ["python3", "-m", "wan_mlperf.doctor"]
