// What the host works out for a run of sink attention, and the memory that it hands to the kernels.
#pragma once

#include "sink_attention.h"

namespace sinkexport::cpu {

constexpr int kStepBlock = 64;    // keys that a step takes at a time
constexpr int kMaxItemTiles = 4;  // tiles of rows that share one reading of the cache

// Cache of one stream before a run. A unit is one (stream, kv head).
struct StreamCache {
  int64_t position = 0;  // of the first token of the run
  int num_valid = 0;     // tokens of the run that count
  int num_sinks = 0;
  int num_ring = 0;  // tokens in the ring
};

// Arrays of one worker of a step. G: query heads of a kv head.
struct StepWork {
  float *cos, *sin, *sink_cos, *sink_sin, *shift_cos, *shift_sin;  // [R/2]
  float *q, *sink_q;                                               // [G][D padded to 16]
  float *row, *normed;                                             // [max(D, Dv) padded to 16]
  float* logits;                                                   // [G][kStepBlock]
  float *key_scale, *value_scale;                                  // [kStepBlock]
  // Sums of a unit that began before this worker's keys, and of the worker's last: [G] largest logits, [G] sums of
  // weights, [G][Dv padded to 16] sums of values.
  float* sums[2];
};

// A step: keys of all units, one after another, are cut into as many pieces as there are workers. A unit that several
// workers have parts of is merged by the one that ends last.
struct StepPlan {
  const StreamCache* streams;   // [B]
  const int64_t* stream_start;  // [B + 1], keys of all units of the streams before
  const int64_t* bounds;        // [workers + 1], keys
  const StepWork* work;         // [workers]
  int* ended;                   // [workers], zero before the run: parts of the unit that this worker begins
  int workers;
};

// The chunk's new rows of one unit, which all workers share.
struct ChunkRows {
  float *keys, *values;         // [T][D], [T][Dv]: as they are stored, in float32
  void *stored_k, *stored_v;    // [T] rows of the window's type
  uint16_t *scale_k, *scale_v;  // [T]
  void *pairs_k, *pairs_v;      // bfloat16 [T][D], [T padded to 2 / 2][Dv][2]; null: workers make their own
};

// Arrays of one worker of a chunk. n: keys of a block; R: rows of a tile, a multiple of 16.
struct ChunkWork : ChunkRows {                                     // of the unit that it works on
  float *cos, *sin, *sink_cos, *sink_sin, *shift_cos, *shift_sin;  // [R/2]
  float *row, *sink_row, *normed;                                  // [max(D, Dv) padded to 16]
  void *q, *sink_q;                                 // [tiles][D][R], or pairs of bfloat16 [tiles][D/2][R][2]
  float* logits;                                    // [n][R], then weights
  void* weights;                                    // pairs of bfloat16 [n/2][R][2]
  void *tile_k, *tile_v;                            // [n][D], [n][Dv] float; or bfloat16 [n][D], [n/2][Dv][2]
  float *largest, *sums, *out;                      // [tiles][R], [tiles][R], [tiles][Dv][R]
  float* out_rows;                                  // [16][Dv]
  float *token, *slope, *sink_place, *sink_factor;  // [tiles][R]
};

// A chunk. First workers prepare its new rows, in pieces of kPieceTokens tokens of a unit. Then they take items in
// turn, (unit, some tiles of its rows). Rows are (token, query head of the group). The last item of a unit writes its
// new rows.
struct ChunkPlan {
  const StreamCache* streams;  // [B]
  const ChunkRows* rows;       // [B * Hkv]
  const ChunkWork* work;       // [workers]
  int64_t* next_piece;         // zero before the run
  int64_t* next_item;          // zero before the run
  int* ended;                  // [B * Hkv], items that have ended, zero before the run
  int64_t num_items;
  int pieces_per_unit;
  int items_per_unit;
  int tiles_per_item;
  int tile_vectors;  // vectors of 16 rows in a tile
  int block_keys;    // keys that are taken at a time, even
  int workers;
  bool is_bfloat16;
};
constexpr int kPieceTokens = 16;  // even, so that pairs lie within a piece

// What one instruction set has.
struct AttentionKernels {
  void (*step)(const SinkAttentionParams& params, const StepPlan& plan, int worker);
  void (*prepare)(const SinkAttentionParams& params, const ChunkPlan& plan, int worker);
  void (*chunk)(const SinkAttentionParams& params, const ChunkPlan& plan, int worker);
  int max_tile_vectors;
  bool has_bfloat16;
};

}  // namespace sinkexport::cpu
