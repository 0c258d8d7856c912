"""Hosts of the kernels in cuda_src/sm80, which run on every GPU from sm_80 on: one module each, of the same name."""
