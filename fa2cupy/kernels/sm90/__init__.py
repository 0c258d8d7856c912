"""Hosts of the kernels in cuda_src/sm90, which only sm_90a runs: one module each, of the same name."""
