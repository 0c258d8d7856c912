// Rings of buffers in shared memory, each with an mbarrier that says "full" and one that says "empty".
#pragma once

#include "common/types.cuh"

// A place in a ring, and the parity of its barriers' phase. A fresh barrier counts as one whose phase of parity 1 is over:
// who fills buffers waits for the opposite parity, and does not wait in the first round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  FA2_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  FA2_DEVICE int before() const { return (stage + kStages - 1) % kStages; }
};
