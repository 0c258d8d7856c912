// The only reader of -D. fa2cupy/kernels/tiles.py says what each one means and why it has its value.
#pragma once

#include "common/types.cuh"

#if FA2_BF16
using Element = bf16_t;
#else
using Element = half_t;
#endif

constexpr int kHeadDim = FA2_HEAD_DIM;  // the true head_dim (a run-time parameter) rounded up: to a multiple of 16, or to a row
constexpr bool kAligned = FA2_ALIGNED;  // rows can be read and written in pieces of 16 bytes
#ifdef FA2_HEAD_DIM_V
constexpr bool kOwnHeadDimV = true;  // V, O and dO have as many columns as head_dim_v says, not as many as Q and K
constexpr int kHeadDimV = FA2_HEAD_DIM_V;  // rounded up likewise
#else
constexpr bool kOwnHeadDimV = false;
constexpr int kHeadDimV = kHeadDim;
#endif
static_assert(kHeadDim % 16 == 0 && kHeadDim >= 16 && kHeadDim <= 256, "head_dim is 16, 32, ..., 256");
static_assert(kHeadDimV % 16 == 0 && kHeadDimV >= 16 && kHeadDimV <= 256, "head_dim_v likewise");

#ifdef FA2_BLOCK_M
constexpr int kBlockM = FA2_BLOCK_M;  // query rows of a tile
constexpr int kBlockN = FA2_BLOCK_N;  // keys of a tile
constexpr int kNumWarps = FA2_NUM_WARPS;
constexpr int kNumThreads = 32 * kNumWarps;
static_assert(kBlockM % 16 == 0 && kBlockN % 16 == 0, "tiles are made of 16 x 16 matrices");
#endif

#ifdef FA2_CAUSAL
constexpr bool kCausal = FA2_CAUSAL;
#endif

// The forward
#ifdef FA2_NUM_KV_STAGES
constexpr int kKvStages = FA2_NUM_KV_STAGES;  // buffers of K and of V (sm_90)
constexpr int kQStages = FA2_NUM_Q_STAGES;    // buffers of Q
constexpr bool kOwnO = FA2_OWN_O;             // O has a buffer of its own, that of one warpgroup
constexpr bool kTurns = FA2_TURNS;            // warpgroups issue their products in turn
#endif
#ifdef FA2_SCALE_FIRST
constexpr bool kScaleFirst = FA2_SCALE_FIRST;  // scores are scaled before anything else is done with them (score.cuh)
#endif
#ifdef FA2_Q_STEPS_IN_REGS
constexpr int kQStepsInRegs = FA2_Q_STEPS_IN_REGS;  // blocks of 16 columns of Q that are read once and stay in registers
#endif

// The backward, and the kernels beside it
#ifdef FA2_DQ_WARPS_M
constexpr int kDqWarps = FA2_DQ_WARPS;    // warps that share a tile of dQ
constexpr int kDqWarpsM = FA2_DQ_WARPS_M;  // warps along the rows of dQ
constexpr int kDqUnit = FA2_DQ_UNIT;      // columns of dQ that no two warps share
constexpr bool kVectorRed = FA2_VECTOR_RED;  // red.global.add.v4.f32: sm_90 and newer
#endif
#ifdef FA2_DQ_PARTS
constexpr int kDqParts = FA2_DQ_PARTS;   // parts of a tile of dQ with turns of their own
constexpr bool kClearDq = FA2_CLEAR_DQ;  // its sum begins with zeros, not with whoever comes first
#endif
#ifdef FA2_NUM_STAGES
constexpr int kStages = FA2_NUM_STAGES;  // buffers of Q and dO: with 2, the next block is copied under this one
#endif
#ifdef FA2_DLSE
enum { kDlse = FA2_DLSE };  // there is a gradient of lse
#else
enum { kDlse = 0 };  // no constexpr bool: NVRTC makes a symbol of each, and ptxas another kernel
#endif
#ifdef FA2_CLUSTER
constexpr int kCluster = FA2_CLUSTER;  // thread blocks that take neighbouring key blocks together (sm_90)
#endif
#ifdef FA2_SPLIT
constexpr int kSplit = FA2_SPLIT;  // warps that share key rows
#endif
#ifdef FA2_DETERMINISTIC
constexpr bool kDeterministic = FA2_DETERMINISTIC;  // dQ is added in the order of the key blocks
#endif
#ifdef FA2_PARTIAL_DKV
constexpr bool kPartialDkv = FA2_PARTIAL_DKV;  // several blocks share a key block: each writes its part of dK and dV
#endif

#ifdef FA2_BAND
enum { kBand = FA2_BAND };  // a query sees a band of keys, whose two ends are parameters
#else
enum { kBand = 0 };
#endif

#ifdef FA2_SOFTCAP
enum { kSoftcap = FA2_SOFTCAP };  // scores become softcap * tanh(score / softcap)
#else
enum { kSoftcap = 0 };
#endif
#ifdef FA2_ALIBI
enum { kAlibi = FA2_ALIBI };  // and lose a head's slope for each key of distance
#else
enum { kAlibi = 0 };
#endif

#ifdef FA2_SINKS
enum { kOwnLogit = FA2_SINKS };  // each head has a logit of its own, which takes part in the softmax of its rows
#else
enum { kOwnLogit = 0 };
#endif

#ifdef FA2_DROPOUT
enum { kDrawn = FA2_DROPOUT };  // only some of P takes part in products: what does is drawn (dropout.cuh)
#else
enum { kDrawn = 0 };
#endif
#ifdef FA2_ONE_BY_ONE
enum { kOneByOne = FA2_ONE_BY_ONE };  // element by element, if it has to be
#else
enum { kOneByOne = 0 };
#endif

#ifdef FA2_FILL_THREADS
constexpr int kFillThreads = FA2_FILL_THREADS;
#endif

// Of pieces of attention that are merged; a thread block takes kBlockM rows
#ifdef FA2_PIECES
constexpr int kPieces = FA2_PIECES;
#if FA2_FLOAT32
using PieceElement = float;  // of out; else Element
#else
using PieceElement = Element;
#endif
#endif

#ifdef FA2_UNSEEN_ROWS
enum { kUnseenRows = FA2_UNSEEN_ROWS };  // there may be rows that see nothing, and tiles of nothing else
#else
enum { kUnseenRows = 0 };
#endif

#ifdef FA2_PICKED
enum { kPicked = FA2_PICKED };  // which blocks meet each other say lists, and which of their elements bits (picked.cuh)
#else
enum { kPicked = 0 };
#endif
#ifdef FA2_WHOLE_QUERIES
enum { kWholeQueries = FA2_WHOLE_QUERIES };  // of each 128 queries there are all tiles, behind the last query too: kPicked, and beside it
#else
enum { kWholeQueries = kPicked };
#endif
#ifdef FA2_OF_KEYS
enum { kOfKeys = FA2_OF_KEYS };  // rows that become 0 are keys
#else
enum { kOfKeys = 0 };
#endif
#ifdef FA2_LISTED
// Tiles come from a list that smxx/list_tiles.cu made, each of a sequence with a place and lengths of its own (listed.cuh).
enum { kListed = FA2_LISTED };
#else
enum { kListed = 0 };
#endif
#ifdef FA2_SEGMENTS
enum { kSegments = FA2_SEGMENTS };  // sequences are what smxx/find_segments.cu found, not what arrays of lengths say
#else
enum { kSegments = 0 };
#endif
#ifdef FA2_SHORT
// The list is of whole sequences, whose keys are one block: a thread block takes one by itself, and dQ is no sum.
enum { kShort = FA2_SHORT };
#else
enum { kShort = 0 };
#endif
#ifdef FA2_REPEAT
enum { kRepeat = FA2_REPEAT };  // there may be more tiles than thread blocks: each takes every so many-th
#else
enum { kRepeat = 0 };
#endif
#ifdef FA2_POSITIONED
enum { kPositioned = FA2_POSITIONED };  // tiles of a list say which rows of their sequence they are
#else
enum { kPositioned = 0 };
#endif
#ifdef FA2_LISTED_RUN
enum { kListedRun = FA2_LISTED_RUN };  // so many neighbours of a list are taken together: at most 8, kernels/listed.py has room
#else
enum { kListedRun = 8 };
#endif
#ifdef FA2_IN_ORDER
enum { kInOrder = FA2_IN_ORDER };  // a list is in the order of the sequences and their blocks, not with the longest first
#endif

// Attention on a cache (cache.cuh)
#ifdef FA2_NEW_KEYS
enum { kNewKeys = FA2_NEW_KEYS };  // new keys come with the call and are written to the cache
#else
enum { kNewKeys = 0 };
#endif
#ifdef FA2_TURNED
enum { kTurned = FA2_TURNED };  // queries and new keys are turned by their positions
#else
enum { kTurned = 0 };
#endif
#ifdef FA2_FIXED_PARTS
enum { kFixedParts = FA2_FIXED_PARTS };  // keys are cut where the call says, not where the shares of thread blocks end
#else
enum { kFixedParts = 0 };
#endif
#ifdef FA2_QUANTISED
enum { kQuantised = FA2_QUANTISED };  // the cache holds 8 bits: 1 float8_e4m3fn, 2 int8
enum { kOfBytes = 1 };
enum { kScaleOfPage = FA2_SCALE_OF_PAGE };  // what they are multiplied by may differ from page to page
#else
enum { kOfBytes = 0 };
enum { kQuantised = 0, kScaleOfPage = 0 };
#endif
#ifdef FA2_CVT_E4M3
enum { kCvtE4m3 = FA2_CVT_E4M3 };  // cvt.rn.f16x2.e4m3x2: sm_89 and newer
#else
enum { kCvtE4m3 = 0 };
#endif
#ifdef FA2_SLOTS
enum { kSlots = FA2_SLOTS };  // slices of keys and values that a warp has on their way or in use
enum { kScattered = FA2_SCATTERED };  // where a sequence's keys lie: 0 together, 1 each anywhere, 2 each slice anywhere
#endif

constexpr int kParamsBytes = FA2_PARAMS_BYTES;  // size of the params struct that the host packs
#ifdef FA2_SHARED_BYTES
constexpr int kSharedBytes = FA2_SHARED_BYTES;  // size of the dynamic shared memory that the host asks for
#endif

// One struct describes the dynamic shared memory of a kernel.
#ifndef FA2_SHARED_MEMORY
#define FA2_SHARED_MEMORY(Type, name)                              \
  extern __shared__ __align__(1024) unsigned char fa2_dynamic_smem[]; \
  Type& name = *reinterpret_cast<Type*>(fa2_dynamic_smem)
#endif
