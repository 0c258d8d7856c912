// The steps of a tile of keys, where a mask's lists say which tiles of queries it meets (kPicked).
#pragma once

#include "common/bwd_tiles.cuh"

// By lists a step of a tile of keys, a tile of queries of one of the query heads that share the keys, knows its place: which one it is
// says place `place` of the head's list, which begins at entry `first` and has `end` places. bits: of the block that it is a part of,
// see MetBlock. turn: how many tiles of keys add to its dQ before this one (kDeterministic).

// From a place of a list on, or from its end: the step there, or the first of a head behind it that has any, up to last_head. If there is
// none, the step's head is beyond that.
template <typename Step, typename Params>
FA2_DEVICE void find_step(Step& step, const Params& params, int batch, int n_block, int last_head) {
  while (step.place == step.end) {
    if (++step.head > last_head) return;
    const int4 row = picked_row_k(params, batch, step.head, n_block / kKeyParts);
    step.first = row.x, step.place = 0, step.end = (row.y + row.z) * kQueryParts;
  }
  const int entry = step.first + step.place / kQueryParts;
  const int2 met = params.mask_entries_k[entry];
  step.m_block = met.x * kQueryParts + step.place % kQueryParts, step.bits = met.y;
  if constexpr (kDeterministic) step.turn = params.mask_ranks[entry] * kKeyParts + n_block % kKeyParts;
}
// The first one, of step.head or a head behind it; whether there is any.
template <typename Step, typename Params>
FA2_DEVICE bool find_first_step(Step& step, const Params& params, int batch, int n_block, int last_head) {
  if constexpr (kPicked) {
    --step.head, step.place = step.end = step.turn = 0;
    find_step(step, params, batch, n_block, last_head);
  }
  return step.head <= last_head;
}

// A step that has buffers.
template <bool kIsPicked>
struct StagedStepOf {
  int head, m_block, stage;
};
template <>
struct StagedStepOf<true> {
  int head, m_block, stage;
  int first, place, end, bits, turn;
};
template <typename Step, typename Params>
FA2_DEVICE Step step_after(Step step, int stage, const Params& params, int batch, int n_block, int last_head) {
  if constexpr (kPicked) {
    step.stage = stage, ++step.place;
    find_step(step, params, batch, n_block, last_head);
  }
  return step;
}

// What a step knows by lists, for kernels that do without, too.
template <typename Step>
FA2_DEVICE int place_of(const Step& step) {
  if constexpr (kPicked) {
    return step.place;
  } else {
    return 0;
  }
}
template <typename Step>
FA2_DEVICE int bits_of(const Step& step) {
  if constexpr (kPicked) {
    return step.bits;
  } else {
    return -1;
  }
}
template <typename Step>
FA2_DEVICE int turn_at(const Step& step) {
  if constexpr (kPicked) {
    return step.turn;
  } else {
    return 0;
  }
}
// A step needs a mask if its block of queries is in front of this one.
template <typename Visit, typename Step>
FA2_DEVICE int mask_to_at(const Visit& visit, const Step& step) {
  if constexpr (kPicked) {
    return step.bits >= 0 ? 0x7fffffff : 0;
  } else {
    return mask_to_of(visit, step.m_block);
  }
}

// The tile of keys that a place stands for: of a list the entry's, and by a mask's lists the one that meets most of those that are left,
// for the first of its query heads; where tiles add in turn, those in front come first.
template <typename Params, typename Entry>
FA2_DEVICE int key_block_of(const Params& params, const Entry& entry, int place, int batch, int head_k) {
  if constexpr (kListed) {
    return entry.block;
  } else if constexpr (kPicked && !kDeterministic) {
    const int head = head_k * (params.shape.num_heads / params.shape.num_heads_k);
    return picked_row_k(params, batch, head, place / kKeyParts).w * kKeyParts + place % kKeyParts;
  } else {
    return place;
  }
}
