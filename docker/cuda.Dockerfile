# H100, H200, B200: NVIDIA's container with PyTorch and FlashAttention.
#
#   docker build -f docker/cuda.Dockerfile -t wan-mlperf:cuda .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit nofile=65536 \
#       -v $HOME/.cache:/root/.cache -v $PWD/outputs:/wan-mlperf/outputs \
#       wan-mlperf:cuda torchrun --nproc-per-node 8 -m wan_mlperf.run --recipe configs/h100.yaml
#
# ~/.cache keeps the model from one run to the next. FP8 attention needs FlashAttention 3 or SageAttention: `python3 -m
# wan_mlperf.doctor` says which kernels this container has and what is missing; docs/gpu.md has a way without building them.
ARG BASE=nvcr.io/nvidia/pytorch:25.08-py3
FROM ${BASE}

WORKDIR /wan-mlperf
COPY . .
# Keeps the container's own torch, triton and CUDA packages.
RUN make install PYTHON=python3

CMD ["python3", "-m", "wan_mlperf.doctor"]
