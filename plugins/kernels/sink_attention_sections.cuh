// What a block of attention finds where: the cache's sections, and the order of their tiles.
#pragma once

#include "sink_attention_rows.cuh"
#include "sink_attention_tile.cuh"

namespace sinkexport {
namespace sink_attention {

enum Section : int { kSinks, kWindow, kChunk };

// The stream's position.
template <typename C>
struct Position {
  sinkrt::Ring ring;
  int64_t t;        // of the run's first token
  int newest_slot;  // of the newest token that the window holds, or takes in this step
  bool is_sink;     // whether a step's token is one

  __device__ Position(const SinkAttentionParams& p, int stream)
      : ring{p.num_sinks, p.window_size},
        t(streamPosition(p.position, stream)),
        newest_slot(slotOf(p, stream, C::kPrefill ? -1 : 0)) {
    is_sink = ring.isSink(t);
  }
};

// A tile by its first row.
struct TileAt {
  Section section;
  int row0;
};

// Tiles are counted: of the sinks, then of the window, then of the chunk. A step counts all that the states have room
// for, so that its first tiles are known before its position is. A chunk counts those that its rows may see, beginning
// with the oldest of the window.
template <typename C>
struct Sections {
  Source sinks, window, chunk;
  int own_row = 0;  // of a step's token, in its section
  ScaleSource window_scales{}, chunk_scales{};
  int sink_tiles, window_tiles;
  int first_window_tile = 0, all_window_tiles;  // a chunk's window tiles go round
  int begin, end;                               // of this block's tiles

  __device__ Sections(const AttendArgs& args, const Place<C>& at) {
    const SinkAttentionParams& p = args.p;
    constexpr int kElement = C::kInt8 ? 1 : 2;
    sinks = {static_cast<const char*>(p.sink_k) + at.sink_row * C::kHeadDim * 2,
             static_cast<const char*>(p.sink_v) + at.sink_row * C::kHeadDim * 2, p.num_sinks};
    window = {static_cast<const char*>(p.window_k) + at.window_row * C::kHeadDim * kElement,
              static_cast<const char*>(p.window_v) + at.window_row * C::kHeadDim * kElement, p.window_size};
    chunk = {static_cast<const char*>(args.k) + at.chunk_row * C::kHeadDim * 2,
             static_cast<const char*>(args.v) + at.chunk_row * C::kHeadDim * 2, 0};
    if constexpr (C::kInt8) {
      const size_t num_heads = at.num_heads;
      window_scales =
          scaleSource<C>(p.window_k_scale, p.window_v_scale, at.window_row, num_heads * p.window_size, at.lane);
      if (C::kPrefill) {
        chunk_scales = scaleSource<C>(args.k_scale, args.v_scale, at.chunk_row, num_heads * p.num_tokens, at.lane);
      }
    }
    sink_tiles = divideUp(p.num_sinks, C::kOtherKeys);
    window_tiles = all_window_tiles = divideUp(p.window_size, C::kWindowKeys);
    begin = blockIdx.y * args.tiles_per_split;
    end = min(begin + args.tiles_per_split, sink_tiles + window_tiles);
  }

  // What a step's position leaves of its tiles.
  __device__ void settleStep(const Position<C>& position) {
    sinks.limit = static_cast<int>(position.ring.numSinks(position.t));
    window.limit = static_cast<int>(position.ring.numWindowTokens(position.t));
    end = min(end, sink_tiles + divideUp(window.limit, C::kWindowKeys));
    own_row = position.is_sink ? static_cast<int>(position.t) : position.newest_slot;
  }

  // What there is for a chunk's rows.
  __device__ void settleChunk(const AttendArgs& args, const Place<C>& at, const Position<C>& position) {
    const SinkAttentionParams& p = args.p;
    const int64_t newest = position.t - 1;
    sinks.limit = static_cast<int>(position.ring.numSinks(newest));
    window.limit = static_cast<int>(position.ring.numWindowTokens(newest));
    chunk.limit = p.num_valid != nullptr ? p.num_valid[at.stream] : p.num_tokens;
    const int first_token = at.tokenOf(at.row_begin), last_token = at.tokenOf(at.row_begin + at.rowsHere() - 1);
    sink_tiles = divideUp(sinks.limit, C::kOtherKeys);
    all_window_tiles = divideUp(window.limit, C::kWindowKeys);
    window_tiles = 0;
    const int seen = min(window.limit, p.window_size - 1 - first_token);  // by the first row, which sees most
    if (seen > 0) {
      const int first_slot = position.newest_slot - (seen - 1);
      first_window_tile = (first_slot < 0 ? first_slot + window.limit : first_slot) / C::kWindowKeys;
      const int last_tile = position.newest_slot / C::kWindowKeys;
      window_tiles = last_tile - first_window_tile + 1 + (first_slot < 0 ? all_window_tiles : 0);
      window_tiles = min(window_tiles, all_window_tiles);
    }
    const int chunk_tiles = divideUp(min(chunk.limit, last_token + 1), C::kOtherKeys);
    const int tiles = first_token < chunk.limit ? sink_tiles + window_tiles + chunk_tiles : 0;
    const int tiles_of_split = divideUp(divideUp(tiles, C::kWarps), args.num_splits) * C::kWarps;
    begin = min(static_cast<int>(blockIdx.y) * tiles_of_split, tiles);
    end = min(begin + tiles_of_split, tiles);
  }

  __device__ Source sourceOf(Section section) const {
    if (section == kSinks) return sinks;
    return !C::kPrefill || section == kWindow ? window : chunk;
  }

  __device__ TileAt tileAt(int tile) const {
    if (tile < sink_tiles) return {kSinks, tile * C::kOtherKeys};
    tile -= sink_tiles;
    if constexpr (C::kPrefill) {
      if (tile >= window_tiles) return {kChunk, (tile - window_tiles) * C::kOtherKeys};
      tile += first_window_tile;
      if (tile >= all_window_tiles) tile -= all_window_tiles;
    }
    return {kWindow, tile * C::kWindowKeys};
  }

  // The tile that holds a step's own token.
  __device__ int tileOf(const Position<C>& own) const {
    return own.is_sink ? own_row / C::kOtherKeys : sink_tiles + own_row / C::kWindowKeys;
  }
};

}  // namespace sink_attention
}  // namespace sinkexport
