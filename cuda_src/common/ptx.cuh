// PTX that every architecture from sm_80 on has. One instruction, one function, named as in the PTX ISA.
// tests/host/cuda/common/ptx.cuh has the same functions for a CPU.
#pragma once

#include "common/types.cuh"

// ex2.approx.ftz.f32: 2^x; -inf gives 0 (PTX ISA 9.7.3.21)
FA2_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -inf, but not before x is there: holds back what depends on it.
FA2_DEVICE float minus_infinity_after(float x) {
  float y;
  asm volatile("min.f32 %0, %1, 0fFF800000;" : "=f"(y) : "f"(x));
  return y;
}

// lg2.approx.ftz.f32: log2(x) (PTX ISA 9.7.3.20)
FA2_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// rcp.approx.ftz.f32: 1 / x (PTX ISA 9.7.3.13)
FA2_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh.approx.f32 (PTX ISA 9.7.3.24)
FA2_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// cvt.rn.{f16x2,bf16x2}.f32: two floats rounded to nearest even, `lo` in the lower half (PTX ISA 9.7.9.21)
template <typename T>
FA2_DEVICE uint32_t cvt_pack(float lo, float hi);
template <>
FA2_DEVICE uint32_t cvt_pack<half_t>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
template <>
FA2_DEVICE uint32_t cvt_pack<bf16_t>(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// cvt.rn.f16x2.e4m3x2: two numbers of 8 bits, exactly. sm_89 and newer (PTX ISA 9.7.9.21)
FA2_DEVICE uint32_t cvt_f16x2_e4m3x2(uint32_t pair) {
  uint32_t x;
  asm("{\n.reg .b16 low;\ncvt.u16.u32 low, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(x) : "r"(pair));
  return x;
}
// sub.f16x2 (PTX ISA 9.7.4.2)
FA2_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}
// prmt.b32: bytes of x (0 to 3) and y (4 to 7), the lowest first by the lowest digit of the selector (PTX ISA 9.7.9.7)
FA2_DEVICE uint32_t prmt(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(x), "r"(y), "r"(selector));
  return bytes;
}
// div.rn.f32
FA2_DEVICE float div_rn(float x, float y) {
  float quotient;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
  return quotient;
}
// cvt.rni.s32.f32: to nearest, ties to even
FA2_DEVICE int cvt_rni(float x) {
  int nearest;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(nearest) : "f"(x));
  return nearest;
}

FA2_DEVICE float to_float(half_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
FA2_DEVICE float to_float(bf16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// mul.wide.u32: all of a product, its low word in x (PTX ISA 9.7.1.3). Of a product in C++ the halves take an instruction more.
FA2_DEVICE uint2 mul_wide_u32(uint32_t a, uint32_t b) {
  uint2 product;
  asm("{\n.reg .b64 p;\nmul.wide.u32 p, %2, %3;\nmov.b64 {%0, %1}, p;\n}" : "=r"(product.x), "=r"(product.y) : "r"(a), "r"(b));
  return product;
}

// abs.f16x2: both halves without their signs (PTX ISA 9.7.4.6); no instruction of its own in front of the next
FA2_DEVICE uint32_t abs_f16x2(uint32_t x) {
  uint32_t y;
  asm("abs.f16x2 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// set.geu.u32.f16x2: 0xffff in each half where a is not less than b, where one is NaN too (PTX ISA 9.7.7.1)
FA2_DEVICE uint32_t set_geu_u32_f16x2(uint32_t a, uint32_t b) {
  uint32_t halves;
  asm("set.geu.u32.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(a), "r"(b));
  return halves;
}

// %ctaid.x and %nctaid.x, read here: what is computed of blockIdx and gridDim may be kept in registers for a long time
FA2_DEVICE int read_ctaid() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}
FA2_DEVICE int read_nctaid() {
  int blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}

// %clock: cycles of the multiprocessor
FA2_DEVICE uint32_t read_clock() {
  uint32_t cycles;
  asm volatile("mov.u32 %0, %clock;" : "=r"(cycles));
  return cycles;
}

// The 32-bit address of something in shared memory, as ld.shared, ldmatrix and cp.async take it.
FA2_DEVICE uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

FA2_DEVICE void st_shared_b32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
FA2_DEVICE uint4 ld_shared_v4(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
FA2_DEVICE void st_shared_v4(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// red.global.add.f32: relaxed atomic add, no result
FA2_DEVICE void red_add_f32(float* address, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}
// red.global.add.v4.f32: four of them at 16 aligned bytes. sm_90 and newer.
FA2_DEVICE void red_add_v4_f32(float* address, float x, float y, float z, float w) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x), "f"(y), "f"(z), "f"(w)
               : "memory");
}

// griddepcontrol.wait: for the kernel before, where this one may start beside it (LaunchConfig.overlaps_previous); what that one
// wrote is then visible to all of the grid. griddepcontrol.launch_dependents: the next kernel may start. sm_90 and newer (PTX ISA
// 9.7.13.13)
FA2_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
FA2_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ld.global.acquire.gpu.b32 and red.release.gpu.global.add.s32: a counter that orders thread blocks (PTX ISA 8.10)
FA2_DEVICE int ld_acquire(const int* address) {
  int value;
  asm volatile("ld.global.acquire.gpu.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
FA2_DEVICE void red_release_add(int* address, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
// atom.acq_rel.gpu.global.inc.u32: the counter's value before; at `last` it goes back to 0
FA2_DEVICE uint32_t atom_acq_rel_inc(int* address, uint32_t last) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(last) : "memory");
  return before;
}
// ld.global.cg: what another thread block has written, past the first-level cache (PTX ISA 9.7.9.1)
FA2_DEVICE float ld_cg_f32(const float* address) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(address) : "memory");
  return x;
}
FA2_DEVICE float2 ld_cg_v2_f32(const float* address) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(address) : "memory");
  return x;
}
// atom.acquire.gpu.global.add.s32: the counter's value before
FA2_DEVICE int atom_acquire_add(int* address, int value) {
  int before;
  asm volatile("atom.acquire.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}
