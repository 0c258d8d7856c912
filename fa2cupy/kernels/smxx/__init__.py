"""Hosts of the kernels in cuda_src/smxx, which are the same on every GPU: one module each, of the same name."""
