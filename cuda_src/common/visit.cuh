// Which blocks of the other sequence a tile meets, and which of them need a mask (mask.cuh). Causal masks and bands are aligned
// bottom-right: query i stands beside key i + seqlen_k - seqlen_q, and sees keys up to that one, or so many before and behind it.
// The host drops leading queries that see no key, and leading keys that no query sees: so a causal problem that arrives here has
// seqlen_q <= seqlen_k, and of a band each query sees a key and each key is seen.
#pragma once

#include "common/picked.cuh"

// The queries and the keys of one row of the batch: seqlen_q, seqlen_k, and the band's ends. Whoever asks for lengths asks a
// Sequence. As all rows of the batch have the same, it is the Shape itself, by reference: a struct of two numbers takes other
// registers.
// Of a list each tile brings its own.
template <bool kHasBand, bool kIsListed>
struct SequenceOf {
  using Type = Shape;
};
template <>
struct SequenceOf<true, false> {
  struct Type {
    int seqlen_q, seqlen_k, left, right;
  };
};
template <>
struct SequenceOf<false, true> {
  struct Type {
    int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k;
  };
};
template <>
struct SequenceOf<true, true> {
  struct Type {
    int first_q, seqlen_q, first_k, seqlen_k, batch_q, batch_k, left, right;
  };
};
using Sequence = SequenceOf<kBand, kListed>::Type;

// `shape` is that of `params`: looked up there once more, plain kernels become others.
template <typename Params>
FA2_DEVICE decltype(auto) sequence_of(const Shape& shape, int /* batch */, const Params& params) {
  if constexpr (kBand) {
    return Sequence{shape.seqlen_q, shape.seqlen_k, params.left, params.right};
  } else {
    return (shape);
  }
}

// That of a tile of a list, or of whoever has its first six fields.
template <typename Tile, typename Params>
FA2_DEVICE Sequence sequence_of_tile(const Tile& tile, const Params& params) {
  if constexpr (kBand) {
    return {tile.first_q, tile.seqlen_q, tile.first_k, tile.seqlen_k, tile.batch_q, tile.batch_k, params.left, params.right};
  } else {
    return {tile.first_q, tile.seqlen_q, tile.first_k, tile.seqlen_k, tile.batch_q, tile.batch_k};
  }
}

template <typename Tile, typename Params>
FA2_DEVICE decltype(auto) sequence_of_tile(const Shape& shape, const Tile& tile, const Params& params) {
  if constexpr (kListed) {
    return sequence_of_tile(tile, params);
  } else {
    return sequence_of(shape, tile.batch, params);
  }
}

// Where its rows are: those of a query and of a key in their row of the batch, and which rows of the batch these are.
template <typename Tile>
FA2_DEVICE int query_row(const Tile& tile, int query) {
  if constexpr (kListed) {
    return tile.first_q + query;
  } else {
    return query;
  }
}
template <typename Tile>
FA2_DEVICE int key_row(const Tile& tile, int key) {
  if constexpr (kListed) {
    return tile.first_k + key;
  } else {
    return key;
  }
}
template <typename Tile>
FA2_DEVICE int query_batch(const Tile& tile) {
  if constexpr (kListed) {
    return tile.batch_q;
  } else {
    return tile.batch;
  }
}
template <typename Tile>
FA2_DEVICE int key_batch(const Tile& tile) {
  if constexpr (kListed) {
    return tile.batch_k;
  } else {
    return tile.batch;
  }
}

// How many queries and keys of the sequence there are in front of those that `query` and `key` above count.
template <typename Tile>
FA2_DEVICE int queries_in_front(const Tile& tile) {
  if constexpr (kPositioned) {
    return tile.in_front_q;
  } else {
    return 0;
  }
}
template <typename Tile>
FA2_DEVICE int keys_in_front(const Tile& tile) {
  if constexpr (kPositioned) {
    return tile.in_front_k;
  } else {
    return 0;
  }
}

// The key that query 0 stands beside.
FA2_DEVICE int offset_of(const Sequence& sequence) { return sequence.seqlen_k - sequence.seqlen_q; }

// Query `query` sees the keys [key_begin, key_end).
template <typename AnySequence>
FA2_DEVICE int key_begin(const AnySequence& sequence, int query) {
  if constexpr (kBand) {
    return max(0, query + offset_of(sequence) - sequence.left);
  } else {
    return 0;
  }
}
template <typename AnySequence>
FA2_DEVICE int key_end(const AnySequence& sequence, int query) {
  if constexpr (kBand) {
    return min(sequence.seqlen_k, query + offset_of(sequence) + sequence.right + 1);
  } else {
    return kCausal ? min(sequence.seqlen_k, query + offset_of(sequence) + 1) : sequence.seqlen_k;
  }
}

// Key `key` is seen by the queries [query_begin, query_end) that there are; a key past the end by none.
template <typename AnySequence>
FA2_DEVICE int query_begin(const AnySequence& sequence, int key) {
  if (key >= sequence.seqlen_k) return 0x7fffffff;
  if constexpr (kBand) {
    return key - offset_of(sequence) - sequence.right;
  } else {
    return kCausal ? key - offset_of(sequence) : 0;
  }
}
template <typename AnySequence>
FA2_DEVICE int query_end(const AnySequence& sequence, int key) {
  if constexpr (kBand) {
    return key - offset_of(sequence) + sequence.left + 1;
  } else {
    return 0x7fffffff;
  }
}

// Key blocks for a block of queries: [begin, end), of which those from mask_from on need a mask, and in a band those before
// left_to. Without a band all queries begin with block 0.
template <bool kHasBand>
struct KeyVisitOf {
  int begin, end, mask_from;
  FA2_DEVICE int unmasked_from() const { return begin; }
};
template <>
struct KeyVisitOf<true> {
  int begin, end, mask_from;
  int left_to;  // at most mask_from
  FA2_DEVICE int unmasked_from() const { return left_to; }
};
template <typename AnySequence>
FA2_DEVICE auto key_blocks(const AnySequence& sequence, int m_block) {
  const int first_query = m_block * kBlockM;
  const int last_query = min(first_query + kBlockM, sequence.seqlen_q) - 1;
  const int end = ceil_div(key_end(sequence, last_query), kBlockN);
  const int unmasked = key_end(sequence, first_query) / kBlockN;
  const int mask_from = min(end, kUnseenRows ? max(0, unmasked) : unmasked);
  if constexpr (kBand) {
    const int left_to = ceil_div(key_begin(sequence, last_query), kBlockN);
    const int from = left_to < end ? mask_from : min(mask_from, end - 1);  // the last block, whose mask it may be that is due
    return KeyVisitOf<true>{key_begin(sequence, first_query) / kBlockN, end, from, min(from, left_to)};
  } else {
    return KeyVisitOf<false>{0, end, mask_from};
  }
}

// What a tile of queries meets: key blocks in a row, or the places of a list, which is taken from its end. There, too, those of which a
// part is hidden come first.
struct PickedKeys {
  int begin, end, mask_from;
  const int2* entries;
  FA2_DEVICE int unmasked_from() const { return begin; }
};
template <bool kIsPicked>
struct KeyVisitType {
  using Type = KeyVisitOf<kBand>;
};
template <>
struct KeyVisitType<true> {
  using Type = PickedKeys;
};
using KeyVisit = KeyVisitType<kPicked>::Type;
template <typename AnySequence, typename Params>
FA2_DEVICE auto key_visit(const AnySequence& sequence, int m_block, const Params& params, int batch, int head) {
  if constexpr (kPicked) {
    const int4 row = picked_row_q(params, batch, head, m_block / kQueryParts);
    return PickedKeys{0, (row.y + row.z) * kKeyParts, row.z * kKeyParts, params.mask_entries_q + row.x};
  } else {
    return key_blocks(sequence, m_block);
  }
}

// The key block at place n of a visit.
template <typename Visit>
FA2_DEVICE MetBlock met_keys(const Visit& visit, int n) {
  if constexpr (kPicked) {
    const int place = visit.end - 1 - n;
    const int2 entry = visit.entries[place / kKeyParts];
    return {entry.x * kKeyParts + kKeyParts - 1 - place % kKeyParts, entry.y};
  } else {
    return {n, -1};
  }
}

// The tile of queries that is the `place`-th if those that meet most come first.
template <typename Params>
FA2_DEVICE int longest_tile(const Params& params, int batch, int head, int place) {
  return picked_row_q(params, batch, head, place / kQueryParts).w * kQueryParts + place % kQueryParts;
}

// Query blocks for a block of keys, or for so many neighbouring ones: [begin, end), of which [mask_from, mask_to) need a mask: the
// first, or all of them if the block has keys past the end; and in a band those from mask_again on, too.
template <bool kHasBand>
struct QueryVisitOf {
  int begin, end, mask_from, mask_to;
};
template <>
struct QueryVisitOf<true> {
  int begin, end, mask_from, mask_to, mask_again;
};
using QueryVisit = QueryVisitOf<kBand>;
template <int kBlocks = 1, typename AnySequence>
FA2_DEVICE auto query_blocks(const AnySequence& sequence, int n_block) {
  const int first_key = n_block * kBlockN;
  const int last_key = first_key + kBlocks * kBlockN - 1;
  const int begin = max(0, query_begin(sequence, first_key)) / kBlockM;
  if constexpr (kBand) {
    const int queries = min(sequence.seqlen_q, query_end(sequence, min(last_key, sequence.seqlen_k - 1)));
    const int end = ceil_div(max(0, queries), kBlockM);
    const int mask_to = last_key >= sequence.seqlen_k ? end : ceil_div(max(0, query_begin(sequence, last_key)), kBlockM);
    return QueryVisitOf<true>{begin, end, begin, min(end, mask_to), max(0, query_end(sequence, first_key)) / kBlockM};
  } else {
    const int end = ceil_div(sequence.seqlen_q, kBlockM);
    if (last_key >= sequence.seqlen_k) return QueryVisitOf<false>{begin, end, begin, end};
    return QueryVisitOf<false>{begin, end, begin, min(end, ceil_div(max(0, query_begin(sequence, last_key)), kBlockM))};
  }
}

// Query block m needs a mask if it is in front of this one: of a QueryVisit, or of whoever has its fields.
template <typename Visit>
FA2_DEVICE int mask_to_of(const Visit& visit, int m) {
  if constexpr (kBand) {
    return m < visit.mask_again ? visit.mask_to : 0x7fffffff;
  } else {
    return visit.mask_to;
  }
}
