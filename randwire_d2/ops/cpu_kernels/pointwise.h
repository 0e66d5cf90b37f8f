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

// Rows of pixels in memory; strides are in floats.
template <typename T>
struct View {
  T* data;
  int64_t row, pixel;
};

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
        weights(blocks.count * this->inputs) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t k = 0; k < blocks.count; ++k) {
      const int64_t panel = ((k + 1) * count - 1) / blocks.count, step = size(panel);
      V* to = at(panel) + k - first(panel);
      const float* from = weight + blocks.offset(k) * (transposed ? 1 : inputs);
      for (int64_t i = 0; i < this->inputs; ++i) {
        V value = load(from + (transposed ? i * inputs : 0));
        if (!transposed)
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) value[l] = from[l * inputs + i];
        to[i * step] = value;
      }
    }
  }

  int64_t first(int64_t panel) const { return blocks.count * panel / count; }
  int64_t size(int64_t panel) const { return first(panel + 1) - first(panel); }
  V* at(int64_t panel) const { return weights + first(panel) * inputs; }
};

template <int M, int N>
inline void multiply_tile(const float* x, int64_t pixel, const V* weights, int64_t inputs,
                          float* const (&out)[N], int64_t out_pixel) {
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
    for (int n = 0; n < N; ++n) store(out[n] + m * out_pixel, total[m][n]);
}

// The tile of as many pixels.
template <int M, int N, typename... Args>
inline void multiply_pixels(int64_t pixels, Args&&... args) {
  if (pixels == M) return multiply_tile<M, N>(args...);
  if constexpr (M > 1) multiply_pixels<M - 1, N>(pixels, args...);
}

template <int N>
void multiply_panel(View<const float> x, int64_t rows, int64_t width, const Panels& weight,
                    int64_t panel, View<float> out, bool spread) {
  const int64_t tiles = (width + kPixels<N> - 1) / kPixels<N>;
  float* to[N];
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t w = width * tile / tiles, pixels = width * (tile + 1) / tiles - w;
      for (int n = 0; n < N; ++n) {
        const int64_t k = weight.first(panel) + n;
        to[n] = out.data + row * out.row + w * out.pixel + (spread ? k * L : weight.blocks.offset(k));
      }
      multiply_pixels<kPixels<N>, N>(pixels, x.data + row * x.row + w * x.pixel, x.pixel,
                                     weight.at(panel), weight.inputs, to, out.pixel);
    }
}

// The channels of some panels, at all pixels of some rows; see common.h for "spread".
inline void multiply(View<const float> x, int64_t rows, int64_t width, const Panels& weight,
                     int64_t first, int64_t last, View<float> out, bool spread) {
  for (int64_t panel = first; panel < last; ++panel) switch (weight.size(panel)) {
      case 1: multiply_panel<1>(x, rows, width, weight, panel, out, spread); break;
      case 2: multiply_panel<2>(x, rows, width, weight, panel, out, spread); break;
      case 3: multiply_panel<3>(x, rows, width, weight, panel, out, spread); break;
      default: multiply_panel<kVectors>(x, rows, width, weight, panel, out, spread);
    }
}

// All channels at all pixels, tiles shared among threads.
inline Buffer multiply_all(const float* x, int64_t pixels, const Panels& weight, int64_t threads) {
  const int64_t channels = weight.blocks.channels;
  Buffer out((pixels * channels + L - 1) / L);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t task = 0; task < (pixels + kBlock - 1) / kBlock * weight.count; ++task) {
    const int64_t first = task / weight.count * kBlock, panel = task % weight.count;
    multiply({x + first * weight.inputs, 0, weight.inputs}, 1, std::min(kBlock, pixels - first),
             weight, panel, panel + 1, {out.floats() + first * channels, 0, channels}, false);
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
  out += first;
  int64_t o = 0;
  for (; o + M <= outputs; o += M)
    outer_tile<M, N>(grad + o, outputs, x, pixel, blocks, first, pixels, out + o * blocks.count);
  for (; o < outputs; ++o)
    outer_tile<1, N>(grad + o, outputs, x, pixel, blocks, first, pixels, out + o * blocks.count);
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
    switch (blocks.count * (panel + 1) / panels - first) {
      case 1: return outer_panel<1>(grad, outputs, x, pixel, blocks, first, pixels, part(i));
      case 2: return outer_panel<2>(grad, outputs, x, pixel, blocks, first, pixels, part(i));
      case 3: return outer_panel<3>(grad, outputs, x, pixel, blocks, first, pixels, part(i));
      default: return outer_panel<kVectors>(grad, outputs, x, pixel, blocks, first, pixels, part(i));
    }
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
