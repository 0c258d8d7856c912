// What dropout keeps of an accumulator, in a layout and of a size of one's choice: test_dropout.py. A warp has the first of its rows
// and columns at the first query and key.
#include "common/dropout.cuh"

struct KeptParams : DropoutParams {
  int* kept;     // (rows, columns) of the accumulator: whether an element is kept, by has() and by both drop()
  int query, key, head, batch;
  int as_much;  // what before() gives for 7
};

using KeptBits = Kept<FA2_TRANSPOSED, FA2_M_TILES, FA2_N_TILES>;

struct Tile {
  int batch;
};

extern "C" __global__ void kept(const __grid_constant__ KeptParams params) {
  const int row = accumulator_row(), col = accumulator_col();
  const Position<FA2_TRANSPOSED> position{params.query + (FA2_TRANSPOSED ? col : row), params.key + (FA2_TRANSPOSED ? row : col)};
  const Drawing drawing = drawing_of(params, Tile{params.batch}, params.head);
  KeptBits bits;
  bits.draw(drawing, position);
  Accumulator<FA2_M_TILES, FA2_N_TILES> acc;
  uint32_t pairs[FA2_M_TILES][FA2_N_TILES / 2][4];
  for (int i = 0; i < FA2_M_TILES; ++i) {
    for (int j = 0; j < FA2_N_TILES; ++j)
      for (int e = 0; e < 4; ++e) acc.x[i][j][e] = 3.f, pairs[i][j / 2][j % 2 * 2 + e / 2] = 0x3c003c00;
    bits.drop(i, pairs[i]);
  }
  bits.drop(acc);
  for (int i = 0; i < FA2_M_TILES; ++i)
    for (int j = 0; j < FA2_N_TILES; ++j)
      for (int e = 0; e < 4; ++e) {
        const uint32_t pair = pairs[i][j / 2][j % 2 * 2 + e / 2] >> 16 * (e % 2) & 0xffff;
        const int ways = bits.has(i, j, e) + 2 * (acc.x[i][j][e] == 3.f) + 4 * (pair == 0x3c00);
        params.kept[(row + row_of(i, e)) * 8 * FA2_N_TILES + col + col_of(j, e)] = ways + 8 * bits.before(drawing, 7);
      }
}
