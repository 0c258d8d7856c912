// The functions of cuda_src/sm80/ptx.cuh on a CPU. Found first by the order of -I.
#pragma once

#include "common/ptx.cuh"

namespace fa2_host {

struct Ldmatrix {
  const char* row;   // 8 elements of the matrix that this lane's address belongs to
  uint32_t* result;  // 4 registers
  Site site;
};

// Each lane's row has arrived where it is read by all.
inline void check_rows(void* const* lanes) {
  for (int l = 0; l < 32; l++) {
    const Ldmatrix& lane = *static_cast<const Ldmatrix*>(lanes[l]);
    check_arrived(lane.row, l, lane.site);
  }
}

inline void ldmatrix(const char* name, uint32_t* r, uint32_t address, Complete complete, Site site) {
  Ldmatrix args{shared_pointer(address, 16, site), r, site};
  collective(name, &args, complete, site);
}

struct Mma {
  float* d;           // 4: row g, columns 2t and 2t+1; row g+8, the same
  const uint32_t* a;  // 4: rows g, g+8, g, g+8; k = 2t, 2t+1 and, in the last two, 2t+8, 2t+9
  uint32_t b[2];      // column g; k = 2t, 2t+1 and 2t+8, 2t+9
};

template <class T>
void mma_complete(void* const* lanes);  // mma.cpp

struct MmaTf32 {
  float* d;           // as of Mma
  const uint32_t* a;  // 4: rows g, g+8, g, g+8; k = t and, in the last two, t+4
  uint32_t b[2];      // column g; k = t and t+4
};
void mma_tf32_complete(void* const* lanes);

template <int kRows, int kSum>
struct MmaF64 {
  double* d;        // rows g (and g+8), columns 2t and 2t+1
  const double* a;  // rows g (and g+8); k = t (and t+4)
  const double* b;  // column g; k likewise
};
template <int kRows, int kSum>
void mma_f64_complete(void* const* lanes);

}  // namespace fa2_host

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, FA2_HOST_SITE) {
  fa2_host::ldmatrix("ldmatrix_x4", r, address, [](void* const* lanes) {
    fa2_host::check_rows(lanes);
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) {
        const char* row = static_cast<const fa2_host::Ldmatrix*>(lanes[8 * i + l / 4])->row;
        memcpy(&static_cast<fa2_host::Ldmatrix*>(lanes[l])->result[i], row + 4 * (l % 4), 4);
      }
    }
  }, {file, line});
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, FA2_HOST_SITE) {
  fa2_host::ldmatrix("ldmatrix_x4_trans", r, address, [](void* const* lanes) {
    fa2_host::check_rows(lanes);
    for (int l = 0; l < 32; l++) {
      for (int i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (int j = 0; j < 2; j++) {
          const char* row = static_cast<const fa2_host::Ldmatrix*>(lanes[8 * i + 2 * (l % 4) + j])->row;
          memcpy(&pair[j], row + 2 * (l / 4), 2);
        }
        memcpy(&static_cast<fa2_host::Ldmatrix*>(lanes[l])->result[i], pair, 4);
      }
    }
  }, {file, line});
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FA2_HOST_SITE) {
  fa2_host::Mma args{d, a, {b0, b1}};
  fa2_host::collective("mma_m16n8k16", &args, fa2_host::mma_complete<T>, {file, line});
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FA2_HOST_SITE) {
  fa2_host::MmaTf32 args{d, a, {b0, b1}};
  fa2_host::collective("mma_m16n8k8_tf32", &args, fa2_host::mma_tf32_complete, {file, line});
}

inline void mma_m16n8k8_f64(double (&d)[4], const double (&a)[4], double b0, double b1, FA2_HOST_SITE) {
  const double b[2] = {b0, b1};
  fa2_host::MmaF64<16, 8> args{d, a, b};
  fa2_host::collective("mma_m16n8k8_f64", &args, fa2_host::mma_f64_complete<16, 8>, {file, line});
}
inline void mma_m8n8k4_f64(double& d0, double& d1, double a, double b, FA2_HOST_SITE) {
  double d[2] = {d0, d1};
  fa2_host::MmaF64<8, 4> args{d, &a, &b};
  fa2_host::collective("mma_m8n8k4_f64", &args, fa2_host::mma_f64_complete<8, 4>, {file, line});
  d0 = d[0], d1 = d[1];
}

inline void cp_async_16(uint32_t smem, const void* gmem, int src_bytes, FA2_HOST_SITE) {
  fa2_host::copy_async(fa2_host::shared_pointer(smem, 16, {file, line}), gmem, 16, src_bytes);
}
inline void cp_async_commit_group() { fa2_host::copy_async_commit(); }
template <int kPending>
inline void cp_async_wait_group(FA2_HOST_SITE) {
  if (fa2_host::synchronises("cp_async_wait_group", {file, line})) fa2_host::copy_async_wait(kPending);
}
