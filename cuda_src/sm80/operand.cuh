// Operands of products, in the registers of a warp and in shared memory: those of 16 bits. operand_f32.cuh and operand_f64.cuh have
// the same for float and double. Blocks are 16 x 16 of all types.
#pragma once

#include "common/accumulator.cuh"
#include "common/config.cuh"
#include "sm80/ptx.cuh"

// Fragments of 16 x 16 blocks, and what is done with them.
//   Words        as they are in memory, and in the registers of Fragments
//   A            as a product takes it, once prepare() has seen its words
//   kTilesB      blocks of 8 columns of B that are read together
//   kPad         elements behind each row of a tile; kScorePad: of a tile of scores
//   kInterleaved of two neighbouring blocks of 8 columns of a sum (a product with operand_b) a thread has columns that alternate, as
//                store_accumulator knows them; else those of an Accumulator
// Arrays, not structs of arrays: these make other binaries.
template <typename T>
struct Fragment {
  using Words = uint32_t[4];
  using A = Words;
  static constexpr int kTilesB = 2;
  static constexpr int kPad = 8, kScorePad = 8;
  static constexpr bool kInterleaved = false;

  static FA2_DEVICE Words& words(Words& fragment) { return fragment; }
  static FA2_DEVICE void copy(Words& to, const Words& from) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = from[i];
  }
  static FA2_DEVICE void prepare(Words&) {}

  // d += a b for columns of blocks j kTilesB, ...; of the sum block k.
  template <int kMTiles, int kNTiles, typename OperandB>
  static FA2_DEVICE void multiply(float (&d)[kMTiles][kNTiles][4], int j, const A (&a)[kMTiles], const OperandB& b, int k) {
    Words frag_b;
    b.load(frag_b, j, k);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
      mma_m16n8k16<T>(d[i][2 * j], a[i], frag_b[0], frag_b[1]);
      mma_m16n8k16<T>(d[i][2 * j + 1], a[i], frag_b[2], frag_b[3]);
    }
  }

  // The accumulators of two blocks of 8 columns, rounded, are the A fragments of one block: no data moves.
  static FA2_DEVICE void of_scores(Words& words, const float (&low)[4], const float (&high)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float(&pair)[4] = r < 2 ? low : high;
      words[r] = cvt_pack<T>(pair[r % 2 * 2], pair[r % 2 * 2 + 1]);
    }
  }

  // Element h * 2 and the one after of such a block, low or high: put there by themselves, dropped (of 16 bits never: Kept drops
  // whole fragments), and stored.
  static void drop_of_pair(Words&, int, int, bool, bool);
  static FA2_DEVICE void set_pair(Words& words, int high, int h, float x, float y) { words[high * 2 + h] = cvt_pack<T>(x, y); }
  static FA2_DEVICE void store_pair_of(uint32_t address, const Words& words, int high, int h) {
    st_shared_b32(address, words[high * 2 + h]);
  }
  // Two neighbours of a row.
  static FA2_DEVICE void store_pair(uint32_t address, float x, float y) { st_shared_b32(address, cvt_pack<T>(x, y)); }
};

// One operand of a product, in shared memory. load(r, i, k) reads the fragments of its 16 x 16 block (i, k), where i runs
// along the rows of the product (A) or its columns (B), and k along the sum.
//   kSumIsContiguous: stored [i][k], ldmatrix as it is; otherwise stored [k][i], ldmatrix transposes.
template <typename T, int kRowBytes, bool kIsA, bool kSumIsContiguous>
struct Operand {
  uint32_t address;  // this lane's row of block (0, 0)

  FA2_DEVICE explicit Operand(uint32_t first) {
    const int lane = lane_id();
    // A wants the 8x8 matrices (i, k) in the order (0,0) (1,0) (0,1) (1,1), B in the order (0,0) (0,1) (1,0) (1,1).
    const bool rows_first = kIsA == kSumIsContiguous;
    const int row = rows_first ? lane % 16 : lane % 8 + lane / 16 * 8;
    const int chunk = rows_first ? lane / 16 : lane / 8 % 2;
    address = first + row * kRowBytes + chunk * 16;
  }
  FA2_DEVICE void load(typename Fragment<T>::Words& r, int i, int k) const {
    if constexpr (kSumIsContiguous) {
      ldmatrix_x4(r, address + i * 16 * kRowBytes + k * 32);
    } else {
      ldmatrix_x4_trans(r, address + k * 16 * kRowBytes + i * 32);
    }
  }
};

// Scores as A: like any other tile.
template <typename T, int kRowBytes, bool kSumIsContiguous>
struct ScoreOperand : Operand<T, kRowBytes, true, kSumIsContiguous> {
  using Operand<T, kRowBytes, true, kSumIsContiguous>::Operand;
};
