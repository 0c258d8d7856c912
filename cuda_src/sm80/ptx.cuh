// Tensor-core and asynchronous-copy PTX of sm_80. One instruction, one function, named as in the PTX ISA.
// tests/host/cuda/sm80/ptx.cuh has the same functions for a CPU. Fragment pictures: cuda_src/README.md.
#pragma once

#include "common/ptx.cuh"

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8; register i of lane l
// receives elements (l / 4, 2 * (l % 4) + {0, 1}) of matrix i, or of its transpose (PTX ISA 9.7.14.5.15).
FA2_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FA2_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// D (16x8, float32) += A (16x16) B (16x8), g = lane / 4, t = lane % 4 (PTX ISA 9.7.14.5.8):
//   a[0] (g, 2t+{0,1})  a[1] (g+8, 2t+{0,1})  a[2] (g, 2t+8+{0,1})  a[3] (g+8, 2t+8+{0,1})
//   b0 (2t+{0,1}, g)    b1 (2t+8+{0,1}, g)    d[0,1] (g, 2t+{0,1})  d[2,3] (g+8, 2t+{0,1})
template <typename T>
FA2_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FA2_DEVICE void mma_m16n8k16<half_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FA2_DEVICE void mma_m16n8k16<bf16_t>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D (16x8, float32) += A (16x8) B (8x8), of floats whose low 13 bits are not looked at (PTX ISA 9.7.14.5.7):
//   a[0] (g, t)  a[1] (g+8, t)  a[2] (g, t+4)  a[3] (g+8, t+4)    b0 (t, g)  b1 (t+4, g)    d as above
FA2_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of doubles. sm_90 and newer (PTX ISA 9.7.14.5.12)
FA2_DEVICE void mma_m16n8k8_f64(double (&d)[4], const double (&a)[4], double b0, double b1) {
#if __CUDA_ARCH__ >= 900
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b0), "d"(b1));
#endif
}
// D (8x8) += A (8x4) B (4x8): a (g, t)  b (t, g)  d0, d1 (g, 2t+{0,1}) (PTX ISA 9.7.14.5.1)
FA2_DEVICE void mma_m8n8k4_f64(double& d0, double& d1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+d"(d0), "+d"(d1) : "d"(a), "d"(b));
}

// 16 bytes from global to shared memory; only the first `src_bytes` are read, the rest becomes 0 (PTX ISA 9.7.9.25.3)
FA2_DEVICE void cp_async_16(uint32_t smem, const void* gmem, int src_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(src_bytes) : "memory");
}
FA2_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last kPending groups of this thread are on their way.
template <int kPending>
FA2_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
