"""The kernels without a GPU: compiled by g++ behind a small CUDA-shaped world (tests/host/cuda), run on the CPU.

cuda/            what the kernels see: CUDA's built-ins, twins of the PTX headers, threads as fibers (world.h says more)
build.py         a source and its defines to a library, once, in build/host
tensor_map.py    what stands for a CUtensorMap
run.py           launching one; schedules; what the world complains about
kernel_run.py    a case as its plan says, into poisoned memory, against the reference
cases.py         which cases
sanitized.py     the same in a process that the address and undefined-behaviour sanitizers watch

By hand: `FA2_PLANT=flash_fwd.cu:107 pytest tests/host/test_flash_fwd.py` leaves out the barrier, wait or fence of that
line, and should fail. It all happens in one thread, so gdb and printf work in a kernel. CXX chooses the compiler.
"""
