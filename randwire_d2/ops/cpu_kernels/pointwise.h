// 1×1 convolutions: products of pixels, whose channels lie side by side, with a weight.
//
// A tile of the result, some pixels by some vectors of channels, is added up in registers, in the
// order of the channels that are summed over: no bit depends on where tiles begin.

#pragma once

#include "common.h"

namespace randwire {

constexpr int kVectors = L == 16 ? 4 : 3;  // of a tile, at most
constexpr int kTile = L == 16 ? 24 : 12;   // registers of a tile, at most

// How many pixels tiles of N vectors have at most.
template <int N>
constexpr int kPixels = kTile / N < 8 ? kTile / N : 8;

// Pixels whose weights and data stay in the cache.
constexpr int64_t kBlock = 64;

// Where a product is written: pixels of a tensor, one after another.
struct Pixels {
  float* data;
  Blocks blocks;
  float* pixel(int64_t p) const { return data + p * blocks.channels; }
  int64_t block(int64_t k) const { return blocks.offset(k); }
};

// The same in the cache: the pixels of a row and of those after it.
struct RowPixels {
  const Rows& rows;
  int64_t first, width;
  float* pixel(int64_t p) const {
    return reinterpret_cast<float*>(rows.pixels(first + p / width) + p % width);
  }
  int64_t block(int64_t k) const { return k * rows.line * L; }
};

// Exchanges the halves of H that lie across the diagonal in every 2 H × 2 H square of two rows.
template <int H, int... I>
inline void exchange(V& upper, V& lower, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const V left = __builtin_shufflevector(upper, lower, (I & H ? L + I - H : I)...);
  lower = __builtin_shufflevector(upper, lower, (I & H ? L + I : I + H)...);
#else
  typedef int32_t Mask __attribute__((vector_size(L * sizeof(int32_t))));
  const V left = __builtin_shuffle(upper, lower, Mask{(I & H ? L + I - H : I)...});
  lower = __builtin_shuffle(upper, lower, Mask{(I & H ? L + I : I + H)...});
#endif
  upper = left;
}

template <int H = L / 2>
inline void transpose(V (&rows)[L]) {
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l)
    if (!(l & H)) exchange<H>(rows[l], rows[l + H], std::make_integer_sequence<int, L>());
  if constexpr (H > 1) transpose<H / 2>(rows);
}

// A weight as tiles read it: for each panel, a few blocks of results, by the channels summed over.
struct Panels {
  const Blocks blocks;
  const int64_t inputs, count;
  const Buffer weights;

  // From (outputs, inputs); transposed, the results are its inputs.
  Panels(const float* weight, int64_t outputs, int64_t inputs, bool transposed, int64_t threads)
      : blocks(transposed ? inputs : outputs),
        inputs(transposed ? outputs : inputs),
        count((blocks.count + kVectors - 1) / kVectors),
        weights(blocks.count * this->inputs, false) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t k = 0; k < blocks.count; ++k) {
      const int64_t panel = ((k + 1) * count - 1) / blocks.count, step = size(panel);
      V* to = at(panel) + k - first(panel);
      const float* from = weight + blocks.offset(k) * (transposed ? 1 : inputs);
      if (transposed)
        for (int64_t i = 0; i < this->inputs; ++i) to[i * step] = load(from + i * inputs);
      else
        for (int64_t i = 0; i < inputs; i += L) {
          const int64_t first = std::min(i, inputs - L);
          V rows[L];
          for (int l = 0; l < L; ++l) rows[l] = load(from + l * inputs + first);
          transpose(rows);
          for (int l = 0; l < L; ++l) to[(first + l) * step] = rows[l];
        }
    }
  }

  int64_t first(int64_t panel) const { return blocks.count * panel / count; }
  int64_t size(int64_t panel) const { return first(panel + 1) - first(panel); }
  V* at(int64_t panel) const { return weights + first(panel) * inputs; }
};

// Of M pixels N blocks, to out[m] + block[n].
template <int M, int N>
inline void multiply_tile(const float* x, int64_t pixel, const V* weights, int64_t inputs,
                          float* const* out, const int64_t (&block)[N]) {
  V total[M][N] = {};
  for (int64_t i = 0; i < inputs; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V value = x[m * pixel + i] - V{};
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) total[m][n] += value * weights[i * N + n];
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out[m] + block[n], total[m][n]);
}

template <int N, typename Out>
void multiply_panel(const float* x, int64_t pixel, int64_t pixels, const Panels& weight,
                    int64_t panel, bool fresh, const Out& out) {
  const int64_t tiles = (pixels + kPixels<N> - 1) / kPixels<N>;
  int64_t block[N];
  for (int n = 0; n < N; ++n) block[n] = out.block(weight.first(panel) + n);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = pixels * tile / tiles, own = pixels * (tile + 1) / tiles - first;
    float* to[kPixels<N>];
    for (int64_t m = 0; m < own; ++m) {
      to[m] = out.pixel(first + m);
      for (int n = 0; n < N; ++n) prefetch_write(to[m] + block[n]);
    }
    // The first panel that reads these pixels prefetches the next ones.
    const float* next = x + (first + own) * pixel;
    for (int64_t i = 0; fresh && i < own * pixel; i += 16) prefetch(next + i);
    as_constant<kPixels<N>>(own, [&](auto m) {
      multiply_tile<m, N>(x + first * pixel, pixel, weight.at(panel), weight.inputs, to, block);
    });
  }
}

// The channels of some panels, at pixels that lie that many floats apart.
template <typename Out>
void multiply(const float* x, int64_t pixel, int64_t pixels, const Panels& weight, int64_t first,
              int64_t last, const Out& out) {
  for (int64_t panel = first; panel < last; ++panel)
    as_constant<kVectors>(weight.size(panel), [&](auto n) {
      multiply_panel<n>(x, pixel, pixels, weight, panel, panel == first, out);
    });
}

// All channels at all pixels, tiles shared among threads.
inline Buffer multiply_all(const float* x, int64_t pixels, const Panels& weight, int64_t threads) {
  const int64_t channels = weight.blocks.channels;
  Buffer out((pixels * channels + L - 1) / L, false);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t task = 0; task < (pixels + kBlock - 1) / kBlock * weight.count; ++task) {
    const int64_t first = task / weight.count * kBlock, panel = task % weight.count;
    multiply(x + first * weight.inputs, weight.inputs, std::min(kBlock, pixels - first), weight,
             panel, panel + 1, Pixels{out.floats() + first * channels, weight.blocks});
  }
  return out;
}

// Adds to M rows of a weight's gradient, at N vectors of its inputs, what some pixels give.
template <int M, int N>
inline void outer_tile(const float* grad, int64_t outputs, const float* x, int64_t pixel,
                       const Blocks& blocks, int64_t first, int64_t pixels, V* out) {
  V total[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) total[m][n] = out[m * blocks.count + n];
  for (int64_t p = 0; p < pixels; ++p) {
    V values[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) values[n] = load(x + p * pixel + blocks.offset(first + n));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) total[m][n] += (grad[p * outputs + m] - V{}) * values[n];
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m * blocks.count + n] = total[m][n];
}

template <int N>
void outer_panel(const float* grad, int64_t outputs, const float* x, int64_t pixel,
                 const Blocks& blocks, int64_t first, int64_t pixels, V* out) {
  constexpr int M = kPixels<N>;
  const int64_t tiles = (outputs + M - 1) / M;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t o = outputs * tile / tiles, rows = outputs * (tile + 1) / tiles - o;
    as_constant<M>(rows, [&](auto m) {
      outer_tile<m, N>(grad + o, outputs, x, pixel, blocks, first, pixels,
                       out + o * blocks.count + first);
    });
  }
}

// The gradient of a 1×1 convolution's weight, (outputs, inputs): the sum over pixels of the products
// of its output's gradient and its input, in parts that are yet to be added up.
struct WeightGradient {
  const Blocks blocks;  // of inputs
  const int64_t outputs, parts, panels;
  const Buffer totals;

  WeightGradient(int64_t inputs, int64_t outputs, int64_t parts)
      : blocks(inputs), outputs(outputs), parts(parts),
        panels((blocks.count + kVectors - 1) / kVectors),
        totals(parts * outputs * blocks.count) {}

  V* part(int64_t i) const { return totals + i * outputs * blocks.count; }

  // Adds some pixels to a panel of a part.
  void add(int64_t i, int64_t panel, const float* grad, const float* x, int64_t pixel,
           int64_t pixels) const {
    const int64_t first = blocks.count * panel / panels;
    as_constant<kVectors>(blocks.count * (panel + 1) / panels - first, [&](auto n) {
      outer_panel<n>(grad, outputs, x, pixel, blocks, first, pixels, part(i));
    });
  }

  // Adds pixels that lie in memory, a share of them to each part.
  void add_all(const float* grad, const float* x, int64_t pixels, int64_t threads) const {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
    for (int64_t task = 0; task < parts * panels; ++task) {
      const int64_t i = task / panels, last = pixels * (i + 1) / parts;
      for (int64_t p = pixels * i / parts; p < last; p += 2 * kBlock)
        add(i, task % panels, grad + p * outputs, x + p * blocks.channels, blocks.channels,
            std::min(2 * kBlock, last - p));
    }
  }

  void write(float* out, int64_t threads) const {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t k = 0; k < blocks.count; ++k) {
        V total{};
        for (int64_t i = 0; i < parts; ++i) total += part(i)[o * blocks.count + k];
        store(out + o * blocks.channels + blocks.offset(k), total);
      }
  }
};

}  // namespace randwire
