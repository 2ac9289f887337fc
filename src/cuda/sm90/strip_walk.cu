// Fills the lists that the strip kernel walks: one CTA per panel (a tile's 256 outputs) looks at
// its block rows a thousand columns at a time.
#include <cub/block/block_scan.cuh>

#include "cuda/launch.h"
#include "cuda/sm90/strip_walk.h"

namespace block_sparse::cuda::sm90::strips {
namespace {

constexpr int kWalkThreads = 1024;  // columns of pieces that are looked at together

// What the kernel is told. Entries of the index are not trusted: whatever they say, it stays
// within its lists.
struct Source {
  const int32_t* start;   // [lines + 1]
  const int32_t* cross;   // [nnz], ascending in each line
  const int32_t* blocks;  // where each block lies, or null: in this order
  const int32_t* order;   // which line is at which place
  int lines, places, nnz, line_parts, cross_parts;
  int outputs, depth;  // of a piece
  Tile tile;
  int block_height;  // rows of a block in memory
  bool transposed;
  int columns, stages, panels;
  int item_capacity, piece_capacity, list_padding;
  Span* spans;
  int32_t* firsts;
  int32_t* counts;
  StageRecord* records;
  uint32_t* items;
  int32_t* pieces;
};

// The line at a place (of rows of pieces), and its entries; none where nothing is there.
struct Row {
  int begin = 0, end = 0, part = 0;

  __device__ Row(const Source& s, int place) {
    const int order_place = place / s.line_parts;
    part = place % s.line_parts;
    const int line = order_place < s.places ? s.order[order_place] : s.lines;
    if (line < 0 || line >= s.lines) return;
    begin = min(max(s.start[line], 0), s.nnz);
    end = max(begin, min(s.start[line + 1], s.nnz));
  }
};

// The first entry of a row whose line crosses `cross` or a later one.
__device__ int entry_from(const Source& s, const Row& row, int cross) {
  int first = row.begin;
  for (int last = row.end; first < last;) {
    const int middle = first + (last - first) / 2;
    if (s.cross[middle] < cross) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

// Where a piece lies in the matrix of values: its first row, and in the low 4 bits, which the rows
// leave free, which piece along the row it is.
__device__ int piece_at(const Source& s, int entry, int line_part, int cross_part) {
  const int block = s.blocks == nullptr ? entry : s.blocks[entry];
  const int row = s.transposed ? cross_part * s.depth : line_part * s.outputs;
  return (block * s.block_height + row) | (s.transposed ? line_part : cross_part);
}

// Counts that are summed over columns together: stages, pieces, and items of each warpgroup.
struct Counts {
  int stages = 0;
  int pieces = 0;
  int items[kMaxLists] = {};

  __device__ Counts operator+(const Counts& other) const {
    Counts sum{stages + other.stages, pieces + other.pieces, {}};
    for (int w = 0; w < kMaxLists; ++w) sum.items[w] = items[w] + other.items[w];
    return sum;
  }
};

// A column's place among the items of its stage, which fill whole batches. Neighbouring lanes have
// the columns of a stage.
struct StageItems {
  int earlier = 0;    // items of the stage that come before this column's
  int padded = 0;     // what this column adds to the sum over columns: the last one all there are
  bool fill = false;  // whether an item that is none follows this column's

  StageItems() = default;
  __device__ StageItems(const Source& s, int items) {
    const int columns = kStageDepth / s.depth, batch = batch_of(s.depth);
    const int lane = static_cast<int>(threadIdx.x % 32), first = lane / columns * columns;
    int all = 0;
    for (int i = first; i < first + columns; ++i) {
      const int others = __shfl_sync(~0u, items, i);
      if (i < lane) earlier += others;
      all += others;
    }
    const bool last = lane == first + columns - 1;
    padded = last ? (all + batch - 1) / batch * batch : 0;
    fill = last && padded > all;
  }
};

using Scan = cub::BlockScan<Counts, kWalkThreads>;

struct WalkShared {
  Scan::TempStorage scan;
  // Per column: which rows have a piece, those of the tile, then those of its neighbour.
  uint32_t present[kWalkThreads];
  int first[kWalkThreads];  // and how many pieces come before it
  int before[kMaxLists];    // pieces of earlier panels and lists
};

__device__ uint32_t rows_of(uint32_t present, int group, int group_rows) {
  return present >> group * group_rows & ((1u << group_rows) - 1);
}

// Calls f(entry, part along the depth, column) for each piece of a row in columns
// [begin, begin + kWalkThreads), the lanes of a warp together.
template <class F>
__device__ void each_piece(const Source& s, const Row& row, int begin, const F& f) {
  const int parts = s.cross_parts;
  for (int entry = entry_from(s, row, begin / parts) + static_cast<int>(threadIdx.x % 32);
       entry < row.end; entry += 32) {
    const int cross = s.cross[entry];
    if (cross >= (begin + kWalkThreads) / parts) break;
    if (cross < begin / parts) continue;
    for (int part = 0; part < parts; ++part) f(entry, part, cross * parts + part - begin);
  }
}

__global__ void __launch_bounds__(kWalkThreads) fill_walk(const Source s) {
  __shared__ WalkShared shared;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int panel = static_cast<int>(blockIdx.x);
  const int rows = s.tile.rows(s.outputs), grouped = group_rows(s.outputs);
  const int ring = s.tile.ring(s.outputs, s.depth);
  const int lists = s.tile.lists(), groups = s.tile.list_groups;

  if (thread < lists) shared.before[thread] = 0;
  __syncthreads();
  for (int w = 0; w < lists; ++w) {
    int pieces = 0;
    const int end = panel * rows + w * (rows / lists);
    for (int place = thread; place < end; place += kWalkThreads) {
      const Row row(s, place);
      pieces += (row.end - row.begin) * s.cross_parts;
    }
    atomicAdd(&shared.before[w], pieces);
  }
  __syncthreads();
  const int base = shared.before[0];
  int first_item[kMaxLists];
  for (int w = 0; w < lists; ++w) {
    first_item[w] = shared.before[w] + (panel * lists + w) * s.list_padding;
  }
  // Only an index that is no pattern leads outside.
  const auto put_item = [&](int at, uint32_t item) {
    if (static_cast<unsigned>(at) < static_cast<unsigned>(s.item_capacity)) s.items[at] = item;
  };
  const auto put_piece = [&](int at, int piece) {
    if (static_cast<unsigned>(at) < static_cast<unsigned>(s.piece_capacity)) s.pieces[at] = piece;
  };

  // Of the warps that have one: a row of this panel, or of the other one of the cluster.
  static_assert(kCluster == 2);
  const Row row(s, warp < rows ? panel * rows + warp : (panel ^ 1) * rows + warp - rows);
  const int columns = kStageDepth / s.depth;  // of a stage
  Counts sum;
  for (int begin = 0; begin < s.columns; begin += kWalkThreads) {
    shared.present[thread] = 0;
    __syncthreads();
    if (warp < 2 * rows) {
      each_piece(s, row, begin,
                 [&](int, int, int column) { atomicOr(&shared.present[column], 1u << warp); });
    }
    __syncthreads();

    const uint32_t present = shared.present[thread] & ((1u << rows) - 1);
    const int in_stage = thread % columns;
    const bool wanted =
        __ballot_sync(~0u, shared.present[thread] != 0) >> (thread % 32 - in_stage) &
        ((1u << columns) - 1);
    Counts mine{wanted && in_stage == columns - 1, __popc(present), {}}, all;
    StageItems stage_items[kMaxLists];
    for (int w = 0; w < lists; ++w) {
      int items = 0;
      for (int g = w * groups; g < (w + 1) * groups; ++g) {
        items += rows_of(present, g, grouped) != 0;
      }
      stage_items[w] = StageItems(s, items);
      mine.items[w] = stage_items[w].padded;
    }
    Scan(shared.scan)
        .ExclusiveScan(mine, mine, Counts{}, [](auto a, auto b) { return a + b; }, all);
    mine = sum + mine;
    sum = sum + all;
    shared.first[thread] = mine.pieces;
    const int column = begin + thread;
    for (int w = 0; w < lists; ++w) {
      int item = first_item[w] + mine.items[w] + stage_items[w].earlier;
      for (int g = w * groups; g < (w + 1) * groups; ++g) {
        const uint32_t mask = rows_of(present, g, grouped);
        if (mask == 0) continue;
        const int earlier = __popc(present & ((1u << g * grouped) - 1));
        put_item(item++, static_cast<uint32_t>(mine.stages * columns + in_stage) << kItemColumn |
                             (g % groups) << kItemGroup | mask << kItemRows |
                             (mine.pieces + earlier) % ring);
      }
      if (stage_items[w].fill) put_item(item, 0);
    }
    if (wanted && in_stage == 0 && column < s.columns) {
      StageRecord& record = s.records[panel * s.stages + mine.stages];
      record.depth = column / columns;
      record.first = base + mine.pieces;
      for (int w = 0; w < lists; ++w) {
        s.firsts[(panel * lists + w) * s.stages + mine.stages] = mine.items[w];
      }
    }
    __syncthreads();
    if (warp < rows) {
      each_piece(s, row, begin, [&](int entry, int part, int at) {
        put_piece(base + shared.first[at] + __popc(shared.present[at] & ((1u << warp) - 1)),
                  piece_at(s, entry, row.part, part));
      });
    }
    __syncthreads();
  }

  if (thread < lists) {
    const int w = thread;
    put_item(first_item[w] + sum.items[w], 0);
    s.spans[panel * lists + w] = {first_item[w], sum.items[w]};
  }
  const int stages = min(sum.stages, s.stages);
  if (thread == 0) s.counts[panel / kCluster] = stages;  // both panels of the cluster say the same
  StageRecord* records = s.records + panel * s.stages;
  const auto first_of = [&](int stage) {
    return stage < stages ? records[stage].first : base + sum.pieces;
  };
  for (int stage = thread; stage < stages; stage += kWalkThreads) {
    const int first = first_of(stage), end = first_of(stage + 1);
    // The last stage with a piece whose place in the ring is needed; -1: of the tile before.
    int found = max(-1, stage - s.tile.stages - 1), last = stage - 1;
    while (found < last) {
      const int middle = found + (last - found + 1) / 2;
      if (first_of(middle) <= end - 1 - ring) {
        found = middle;
      } else {
        last = middle - 1;
      }
    }
    const int held = max(max(found, stage - s.tile.stages), -1);
    int back = stage - held, early = end - first;
    if (back < s.tile.stages && held >= 0) {
      early = early_pieces(first, end, first_of(held), ring);
      ++back;
    }
    records[stage].work =
        static_cast<uint32_t>((end - first) | ((first - base) % ring) << 8 | back << 16) |
        static_cast<uint32_t>(early) << 24;
  }
}

}  // namespace

void build_walk(const PatternView& pattern, BlockShape block, bool transposed, const int32_t* order,
                int32_t* walk, void* stream) {
  const Lines lines = lines_of(pattern.grid, block, transposed);
  const WalkLayout layout(lines);
  Source s{};
  s.start = transposed ? pattern.ccol : pattern.crow;
  s.cross = transposed ? pattern.trow : pattern.col;
  s.blocks = transposed ? pattern.perm : nullptr;
  s.order = order;
  s.lines = static_cast<int>(lines.lines);
  s.places = static_cast<int>(lines.order_places());
  s.nnz = static_cast<int>(lines.nnz);
  s.line_parts = static_cast<int>(lines.line_parts());
  s.cross_parts = static_cast<int>(lines.cross_parts());
  s.outputs = lines.outputs();
  s.depth = lines.depth();
  s.tile = lines.tile();
  s.block_height = static_cast<int>(block.out);
  s.transposed = transposed;
  s.columns = static_cast<int>(lines.columns());
  s.stages = static_cast<int>(lines.stages());
  s.panels = static_cast<int>(lines.panels());
  s.item_capacity = static_cast<int>(layout.item_capacity);
  s.piece_capacity = static_cast<int>(layout.piece_capacity);
  s.list_padding = static_cast<int>(layout.list_padding);
  s.spans = reinterpret_cast<Span*>(walk + layout.spans);
  s.firsts = walk + layout.firsts;
  s.counts = walk + layout.counts;
  s.records = reinterpret_cast<StageRecord*>(walk + layout.stages);
  s.items = reinterpret_cast<uint32_t*>(walk + layout.items);
  s.pieces = walk + layout.pieces;
  if (s.panels == 0) return;
  // What the lists leave free is zero: the same pattern gives the same index.
  check_cuda(cudaMemsetAsync(walk, 0, layout.size * sizeof(int32_t), stream_of(stream)),
             "build_walk");
  fill_walk<<<static_cast<unsigned>(s.panels), kWalkThreads, 0, stream_of(stream)>>>(s);
  check_cuda(cudaGetLastError(), "build_walk");
}

}  // namespace block_sparse::cuda::sm90::strips
