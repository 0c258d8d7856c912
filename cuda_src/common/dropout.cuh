// Which elements of P take part in a product: the hook between the softmax, whose l is summed from all of them, and P's rounding.
#pragma once

#include "common/position.cuh"

// P = 0 where it is not kept. Empty: all of P is kept. What decides must not depend on S, so that it can be drawn while S is being
// computed, and must be the same for one (query, key) in both layouts. The backward's P goes the same way on its way into dV, and dP
// where it meets D in differentiate_softmax.
template <bool kTransposed, int kMTiles, int kNTiles>
FA2_DEVICE void keep(Accumulator<kMTiles, kNTiles>&, const Position<kTransposed>&) {}
