// Which tile comes when: the order in which thread blocks take the tiles of all heads.
#pragma once

#include "common/visit.cuh"

struct Tile2 {
  int block;  // along the sequence
  int head, batch;
};

// Launch order: heads are taken in sections whose keys and values fit the L2 cache together. Within a section the
// block index runs slowest, so that every head's longest blocks start before anybody's short ones.
FA2_DEVICE Tile2 tile_of(int linear, int blocks, int heads, const Shape& shape) {
  const int rows = heads * shape.batch;
  const int section = linear / (shape.heads_per_section * blocks);
  const int first = section * shape.heads_per_section;
  const int section_heads = min(shape.heads_per_section, rows - first);
  const int index = linear - first * blocks;
  const int row = first + index % section_heads;
  return {index / section_heads, row % heads, row / heads};
}
