// What the fused kernel for Hopper is handed, by value.
#pragma once

#include "cuda/fused/arguments.h"
#include "cuda/fused/sm90/order.h"
#include "cuda/simt/tile_map.h"

namespace fastattn::cuda {

// Keys or values of a region: axes (feature, key, kv head, batch entry), counted from the region's first.
struct TileMap {
    TensorMap map;
    int head_step = 1, batch_step = 1;  // 0 where all entries are the same memory
};

struct HopperArgs {
    FlashArgs flash;
    FlashOrder order;
    TileMap k, v;
};

}  // namespace fastattn::cuda
