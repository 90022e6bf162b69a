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

template <typename C>
struct Sections {
  Source sinks, window, chunk;
  int own_row;  // of a step's token, in its section
  ScaleSource window_scales{}, chunk_scales{};
  // This block's tiles: of the sinks, then of the window, then of the chunk.
  int sink_tiles, window_tiles;
  int begin, end;
  int last_token;  // of the block's rows: chunk tokens after it are nobody's business here

  __device__ Sections(const AttendArgs& args, const Place<C>& at, const Position<C>& position) {
    const SinkAttentionParams& p = args.p;
    const int64_t newest = C::kPrefill ? position.t - 1 : position.t;  // that the states hold, or take in this step
    const size_t num_heads = gridDim.z;                                // of [B, Hkv]
    constexpr int kElement = C::kInt8 ? 1 : 2;
    sinks = {static_cast<const char*>(p.sink_k) + at.sink_row * C::kHeadDim * 2,
             static_cast<const char*>(p.sink_v) + at.sink_row * C::kHeadDim * 2,
             static_cast<int>(position.ring.numSinks(newest))};
    window = {static_cast<const char*>(p.window_k) + at.window_row * C::kHeadDim * kElement,
              static_cast<const char*>(p.window_v) + at.window_row * C::kHeadDim * kElement,
              static_cast<int>(position.ring.numWindowTokens(newest))};
    chunk = {static_cast<const char*>(args.k) + at.chunk_row * C::kHeadDim * 2,
             static_cast<const char*>(args.v) + at.chunk_row * C::kHeadDim * 2,
             p.num_valid != nullptr ? p.num_valid[at.stream] : p.num_tokens};
    own_row = position.is_sink ? static_cast<int>(position.t) : position.newest_slot;
    if constexpr (C::kInt8) {
      window_scales =
          scaleSource<C>(p.window_k_scale, p.window_v_scale, at.window_row, num_heads * p.window_size, at.lane);
      if (C::kPrefill) {
        chunk_scales = scaleSource<C>(args.k_scale, args.v_scale, at.chunk_row, num_heads * p.num_tokens, at.lane);
      }
    }
    sink_tiles = divideUp(p.num_sinks, C::kOtherKeys), window_tiles = divideUp(p.window_size, C::kWindowKeys);
    const int chunk_tiles = C::kPrefill ? divideUp(p.num_tokens, C::kOtherKeys) : 0;
    begin = blockIdx.y * args.tiles_per_split;
    end = min(begin + args.tiles_per_split, sink_tiles + window_tiles + chunk_tiles);
    last_token = at.tokenOf(min(at.row_begin + C::kRows, at.num_rows) - 1);
  }

  __device__ Source sourceOf(Section section) const {
    if (section == kSinks) return sinks;
    return !C::kPrefill || section == kWindow ? window : chunk;
  }

  // Which section a tile is of, and its first row there.
  __device__ Section sectionOf(int tile, int& row0) const {
    if (tile < sink_tiles) return row0 = tile * C::kOtherKeys, kSinks;
    tile -= sink_tiles;
    if (!C::kPrefill || tile < window_tiles) return row0 = tile * C::kWindowKeys, kWindow;
    return row0 = (tile - window_tiles) * C::kOtherKeys, kChunk;
  }

  // The tile that holds a step's own token.
  __device__ int tileOf(const Position<C>& own) const {
    return own.is_sink ? own_row / C::kOtherKeys : sink_tiles + own_row / C::kWindowKeys;
  }

  // First tile from `tile` on, in a warp's strides, that holds anything.
  __device__ int next(int tile) const {
    for (; tile < end; tile += C::kWarps) {
      int row0;
      const Section section = sectionOf(tile, row0);
      if (row0 < sourceOf(section).limit && !(C::kPrefill && section == kChunk && row0 > last_token)) break;
    }
    return tile;
  }
};

}  // namespace sink_attention
}  // namespace sinkexport
