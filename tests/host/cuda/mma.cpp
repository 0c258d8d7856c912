// The product of a warp, of all libraries that have one: compiled once, and optimised as kernels are not.
#include "sm80/ptx.cuh"

namespace fa2_host {

using Row = float __attribute__((vector_size(32)));  // the 8 columns of D

template <class T>
void mma_complete(void* const* lanes) {
  uint32_t a_bits[16][8];  // rows of A; two k each
  uint16_t b_bits[16][8];  // rows of B, k
  float a[16][16];
  Row b[16], d[16];
  for (int l = 0; l < 32; l++) {
    const Mma& lane = *static_cast<const Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; i++) a_bits[g + 8 * (i % 2)][t + 4 * (i / 2)] = lane.a[i];
    for (int i = 0; i < 2; i++) {
      b_bits[2 * t + 8 * i][g] = static_cast<uint16_t>(lane.b[i]);
      b_bits[2 * t + 8 * i + 1][g] = static_cast<uint16_t>(lane.b[i] >> 16);
    }
    for (int i = 0; i < 4; i++) d[g + 8 * (i / 2)][2 * t + i % 2] = lane.d[i];
  }
  for (int k = 0; k < 16; k++) {
    float row[8];
    for (int n = 0; n < 8; n++) row[n] = to_float(T{b_bits[k][n]});
    memcpy(&b[k], row, sizeof row);
  }
  for (int m = 0; m < 16; m++) {
    uint16_t row[16];
    memcpy(row, a_bits[m], sizeof row);
    for (int k = 0; k < 16; k++) a[m][k] = to_float(T{row[k]});
  }
  for (int m = 0; m < 16; m++) {
    Row sum{};
    for (int k = 0; k < 16; k++) sum += a[m][k] * b[k];
    d[m] += sum;
  }
  for (int l = 0; l < 32; l++) {
    const Mma& lane = *static_cast<const Mma*>(lanes[l]);
    for (int i = 0; i < 4; i++) lane.d[i] = d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  }
}

template void mma_complete<bf16_t>(void* const*);
template void mma_complete<half_t>(void* const*);

}  // namespace fa2_host
