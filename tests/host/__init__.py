"""The kernels without a GPU: compiled by g++ behind a small CUDA-shaped world (tests/host/cuda), run on the CPU."""
