// wgmma: D (64 x N, float32, in the registers of a warpgroup) (+)= A (64 x 16) B (16 x N), asynchronously.
// PTX ISA 9.7.15. tests/host/cuda/sm90/wgmma.cuh has the same functions for a CPU.
//
// D's fragment is that of mma.m16n8k16, 16 rows per warp: an Accumulator<1, N / 8>. A comes from shared memory (SS) or, as
// the same fragments as for mma.m16n8k16, from registers (RS). Operands in shared memory are given by descriptors.
#pragma once

#include "common/accumulator.cuh"
#include "common/config.cuh"

// Registers written by ordinary code (accumulators, RS operands) before the first wgmma that uses them.
FA2_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FA2_DEVICE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most the last kPending groups of this warpgroup are on their way.
template <int kPending>
FA2_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator above the wait that precedes this.
template <int kNTiles>
FA2_DEVICE void pin(Accumulator<1, kNTiles>& acc) {
#pragma unroll
  for (int j = 0; j < kNTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(acc.x[0][j][e])::"memory");
}

// An operand in shared memory with 128-byte swizzle (PTX ISA 9.7.15.5.1.2.2): rows of 64 elements, 8 of them (1024 bytes)
// a group. `leading` bytes lie between neighbouring 64-column panels (only read where the sum runs down the rows).
FA2_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  const uint64_t base = (address & 0x3ffff) >> 4, lbo = leading >> 4, sbo = 1024 >> 4, swizzle_128b = 1;
  return base | lbo << 16 | sbo << 32 | swizzle_128b << 62;
}

// wgmma_ss<T, kADown, kBDown>(d, a, b, accumulate), wgmma_rs<T, kBDown>(d, a, b, accumulate), for the widths of d that the
// tile tables use. kBDown: B is stored with the sum running down its rows (V), else along them (K); kADown: likewise A.
// accumulate = false: D = A B, whatever was in D.
//
// FA2_TEXT and FA2_REGS name the accumulator's registers, ten at a time, in the instruction and among its operands.
template <typename T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16_t> = true;

#define FA2_D(i) "+f"(d.x[0][(i) / 4][(i) % 4])
#define FA2_T2(t) "%" #t "0, %" #t "1"
#define FA2_T4(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3"
#define FA2_T6(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5"
#define FA2_T8(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7"
#define FA2_T10(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define FA2_D2(t) FA2_D(t##0), FA2_D(t##1)
#define FA2_D4(t) FA2_D(t##0), FA2_D(t##1), FA2_D(t##2), FA2_D(t##3)
#define FA2_D6(t) FA2_D(t##0), FA2_D(t##1), FA2_D(t##2), FA2_D(t##3), FA2_D(t##4), FA2_D(t##5)
#define FA2_D8(t) FA2_D(t##0), FA2_D(t##1), FA2_D(t##2), FA2_D(t##3), FA2_D(t##4), FA2_D(t##5), FA2_D(t##6), FA2_D(t##7)
#define FA2_D10(t) FA2_D(t##0), FA2_D(t##1), FA2_D(t##2), FA2_D(t##3), FA2_D(t##4), FA2_D(t##5), FA2_D(t##6), FA2_D(t##7), FA2_D(t##8), FA2_D(t##9)
#define FA2_TEXT16 FA2_T10() ", " FA2_T6(1)
#define FA2_REGS16 FA2_D10(), FA2_D6(1)
#define FA2_TEXT32 FA2_T10() ", " FA2_T10(1) ", " FA2_T10(2) ", " FA2_T2(3)
#define FA2_REGS32 FA2_D10(), FA2_D10(1), FA2_D10(2), FA2_D2(3)
#define FA2_TEXT40 FA2_T10() ", " FA2_T10(1) ", " FA2_T10(2) ", " FA2_T10(3)
#define FA2_REGS40 FA2_D10(), FA2_D10(1), FA2_D10(2), FA2_D10(3)
#define FA2_TEXT48 FA2_T10() ", " FA2_T10(1) ", " FA2_T10(2) ", " FA2_T10(3) ", " FA2_T8(4)
#define FA2_REGS48 FA2_D10(), FA2_D10(1), FA2_D10(2), FA2_D10(3), FA2_D8(4)
#define FA2_TEXT56 FA2_T10() ", " FA2_T10(1) ", " FA2_T10(2) ", " FA2_T10(3) ", " FA2_T10(4) ", " FA2_T6(5)
#define FA2_REGS56 FA2_D10(), FA2_D10(1), FA2_D10(2), FA2_D10(3), FA2_D10(4), FA2_D6(5)
#define FA2_TEXT64 FA2_T10() ", " FA2_T10(1) ", " FA2_T10(2) ", " FA2_T10(3) ", " FA2_T10(4) ", " FA2_T10(5) ", " FA2_T4(6)
#define FA2_REGS64 FA2_D10(), FA2_D10(1), FA2_D10(2), FA2_D10(3), FA2_D10(4), FA2_D10(5), FA2_D4(6)
#define FA2_TEXT96 FA2_T10() ", " FA2_T10(1) ", " FA2_T10(2) ", " FA2_T10(3) ", " FA2_T10(4) ", " FA2_T10(5) ", " FA2_T10(6) ", " FA2_T10(7) ", " FA2_T10(8) ", " FA2_T6(9)
#define FA2_REGS96 FA2_D10(), FA2_D10(1), FA2_D10(2), FA2_D10(3), FA2_D10(4), FA2_D10(5), FA2_D10(6), FA2_D10(7), FA2_D10(8), FA2_D6(9)
#define FA2_TEXT128 FA2_T10() ", " FA2_T10(1) ", " FA2_T10(2) ", " FA2_T10(3) ", " FA2_T10(4) ", " FA2_T10(5) ", " FA2_T10(6) ", " FA2_T10(7) ", " FA2_T10(8) ", " FA2_T10(9) ", " FA2_T10(10) ", " FA2_T10(11) ", " FA2_T8(12)
#define FA2_REGS128 FA2_D10(), FA2_D10(1), FA2_D10(2), FA2_D10(3), FA2_D10(4), FA2_D10(5), FA2_D10(6), FA2_D10(7), FA2_D10(8), FA2_D10(9), FA2_D10(10), FA2_D10(11), FA2_D8(12)

#define FA2_WGMMA_SS(kN, kType, kRegs, a_, b_, p_, adown_, bdown_)                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN              \
               "k16.f32." kType "." kType " {" FA2_TEXT##kRegs "}, %" #a_ ", %" #b_ ", p, 1, 1, %" #adown_ ", %" #bdown_ ";\n}" \
               : FA2_REGS##kRegs                                                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kADown), "n"(kBDown))
#define FA2_WGMMA_RS(kN, kType, kRegs, a0_, a1_, a2_, a3_, b_, p_, down_)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN              \
               "k16.f32." kType "." kType " {" FA2_TEXT##kRegs "}, {%" #a0_ ", %" #a1_ ", %" #a2_ ", %" #a3_          \
               "}, %" #b_ ", p, 1, 1, %" #down_ ";\n}"                                                               \
               : FA2_REGS##kRegs                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kBDown))

// The operands after the kRegs accumulators are numbered by hand: o0 = kRegs, o1 = kRegs + 1, ...
#define FA2_WGMMA(kN, kRegs, o0, o1, o2, o3, o4, o5, o6)                                                              \
  template <typename T, bool kADown, bool kBDown>                                                                     \
  FA2_DEVICE void wgmma_ss(Accumulator<1, kN / 8>& d, uint64_t a, uint64_t b, bool accumulate) {                      \
    if constexpr (kIsBf16<T>) {                                                                                       \
      FA2_WGMMA_SS(kN, "bf16", kRegs, o0, o1, o2, o3, o4);                                                                \
    } else {                                                                                                          \
      FA2_WGMMA_SS(kN, "f16", kRegs, o0, o1, o2, o3, o4);                                                                 \
    }                                                                                                                 \
  }                                                                                                                   \
  template <typename T, bool kBDown>                                                                                  \
  FA2_DEVICE void wgmma_rs(Accumulator<1, kN / 8>& d, const uint32_t (&a)[4], uint64_t b, bool accumulate) {          \
    if constexpr (kIsBf16<T>) {                                                                                       \
      FA2_WGMMA_RS(kN, "bf16", kRegs, o0, o1, o2, o3, o4, o5, o6);                                                    \
    } else {                                                                                                          \
      FA2_WGMMA_RS(kN, "f16", kRegs, o0, o1, o2, o3, o4, o5, o6);                                                     \
    }                                                                                                                 \
  }

FA2_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
FA2_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
FA2_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
FA2_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
FA2_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
FA2_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
FA2_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
FA2_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
