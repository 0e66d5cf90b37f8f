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

// Pixels whose weights and data stay in the cache; and those for which others are worth reading.
constexpr int64_t kBlock = 64, kMany = 112;

// Fewer pixels are not worth a weight's way into panels.
constexpr int64_t kFew = 96;

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

// f(i, n) for tiles of about the same size: the n numbers from i on; n is a constant, at most T.
template <int T, typename F>
inline void for_even_tiles(int64_t first, int64_t last, F f) {
  const int64_t count = last - first, tiles = (count + T - 1) / T;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t at = count * tile / tiles;
    as_constant<T>(count * (tile + 1) / tiles - at, [&](auto n) { f(first + at, n); });
  }
}

// Blocks by panels of as many as a tile is wide at most, of about the same size.
struct Panels {
  const Blocks blocks;
  const int64_t count;

  explicit Panels(int64_t channels)
      : blocks(channels), count((blocks.count + kVectors - 1) / kVectors) {}
  int64_t first(int64_t panel) const { return blocks.count * panel / count; }
  int64_t size(int64_t panel) const { return first(panel + 1) - first(panel); }
  int64_t of(int64_t block) const { return ((block + 1) * count - 1) / blocks.count; }
};

// A weight as tiles read it: for each panel of results, by the channels summed over.
struct Weight : Panels {
  const int64_t inputs;
  const Buffer weights;

  // From (outputs, inputs); transposed, the results are its inputs.
  Weight(const float* weight, int64_t outputs, int64_t inputs, bool transposed, int64_t threads)
      : Panels(transposed ? inputs : outputs),
        inputs(transposed ? outputs : inputs),
        weights(blocks.count * this->inputs, false) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t k = 0; k < blocks.count; ++k) {
      const int64_t panel = of(k), step = size(panel);
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

  V* at(int64_t panel) const { return weights + first(panel) * inputs; }
};

// The sums of the lanes of L vectors, one for each.
template <int H = L / 2>
inline V lane_sums(V (&rows)[L]) {
#pragma GCC unroll 8
  for (int l = 0; l < H; ++l) {
    exchange<H>(rows[l], rows[l + H], std::make_integer_sequence<int, L>());
    rows[l] += rows[l + H];
  }
  if constexpr (H > 1) return lane_sums<H / 2>(rows);
  return rows[0];
}

// All channels of few pixels: a weight that is read once is read as it is, (outputs, inputs), and
// sums are by lanes first. Pixels are spread, with zeros for what the last block has a second time.
inline void multiply_few(const float* x, int64_t pixel, int64_t pixels, const float* weight,
                         const Blocks& inputs, float* out, int64_t outputs, int64_t threads) {
  constexpr int M = L / 2;  // results of two pixels are a vector
  const int64_t tiles = (outputs + M - 1) / M;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t o = std::min(tile * M, outputs - M);
    const float* rows = weight + o * inputs.channels;
    for (int64_t p = 0; p < pixels; p += 2) {
      const int64_t second = std::min(p + 1, pixels - 1);
      V total[L] = {};
      for (int64_t k = 0; k < inputs.count; ++k) {
        const V one = load(x + p * pixel + k * L), two = load(x + second * pixel + k * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const V row = load(rows + m * inputs.channels + inputs.offset(k));
          total[m] += one * row;
          total[m + M] += two * row;
        }
      }
      const V sums = lane_sums(total);
      // Not what the tile before has too: that may be another thread's.
      for (int m = static_cast<int>(tile * M - o); m < M; ++m) {
        out[p * outputs + o + m] = sums[m];
        out[second * outputs + o + m] = sums[m + M];
      }
    }
  }
}

// What will be read from memory next, the same floats of n tensors: prefetched little by little, into
// the second cache, while the first one is computed with.
class Ahead {
 public:
  static constexpr int64_t kStep = 64;  // channels that are summed over between two steps

  Ahead() = default;
  Ahead(int64_t n, const float* const* x, int64_t first, int64_t last)
      : x_(x), n_(first < last ? n : 0), first_(first), last_(last), at_(first) {}
  // Not too many at once: what is computed with would wait for them.
  void spread(int64_t steps) {
    lines_ = std::min<int64_t>(n_ * (last_ - first_) / 16 / steps + 1, 8);
  }
  void step() {
    for (int64_t line = 0; line < lines_ && n_ > 0; ++line) {
      __builtin_prefetch(x_[n_ - 1] + at_, 0, 2);
      if ((at_ += 16) < last_) continue;
      at_ = first_;
      --n_;
    }
  }

 private:
  const float* const* x_ = nullptr;
  int64_t n_ = 0, first_ = 0, last_ = 0, at_ = 0, lines_ = 0;
};

// Of M pixels N blocks, to out[m] + block[n].
template <int M, int N>
inline void multiply_tile(const float* x, int64_t pixel, const V* weights, int64_t inputs,
                          float* const* out, const int64_t (&block)[N], Ahead& ahead) {
  V total[M][N] = {};
  for (int64_t i = 0; i < inputs;) {
    ahead.step();
    for (const int64_t last = std::min(i + Ahead::kStep, inputs); i < last; ++i)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V value = x[m * pixel + i] - V{};
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) total[m][n] += value * weights[i * N + n];
      }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out[m] + block[n], total[m][n]);
}

template <int N, typename Out>
void multiply_panel(const float* x, int64_t pixel, int64_t pixels, const Weight& weight,
                    int64_t panel, Ahead& ahead, const Out& out) {
  int64_t block[N];
  for (int n = 0; n < N; ++n) block[n] = out.block(weight.first(panel) + n);
  for_even_tiles<kPixels<N>>(0, pixels, [&](int64_t first, auto own) {
    float* to[own];
    for (int m = 0; m < own; ++m) {
      to[m] = out.pixel(first + m);
      for (int n = 0; n < N; ++n) prefetch_write(to[m] + block[n]);
    }
    multiply_tile<own, N>(x + first * pixel, pixel, weight.at(panel), weight.inputs, to, block,
                          ahead);
  });
}

// The channels of some panels, at pixels that lie that many floats apart.
template <typename Out>
void multiply(const float* x, int64_t pixel, int64_t pixels, const Weight& weight, int64_t first,
              int64_t last, const Out& out, Ahead ahead = {}) {
  ahead.spread((last - first) * (pixels / kPixels<kVectors> + 1) *
               ((weight.inputs + Ahead::kStep - 1) / Ahead::kStep));
  for (int64_t panel = first; panel < last; ++panel)
    as_constant<kVectors>(weight.size(panel), [&](auto n) {
      multiply_panel<n>(x, pixel, pixels, weight, panel, ahead, out);
    });
}

// All channels at all pixels, tiles shared among threads.
inline Buffer multiply_all(const float* x, int64_t pixels, const Weight& weight, int64_t threads) {
  const int64_t channels = weight.blocks.channels;
  Buffer out((pixels * channels + L - 1) / L, false);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t task = 0; task < (pixels + kMany - 1) / kMany * weight.count; ++task) {
    const int64_t first = task / weight.count * kMany, panel = task % weight.count;
    multiply(x + first * weight.inputs, weight.inputs, std::min(kMany, pixels - first), weight,
             panel, panel + 1, Pixels{out.floats() + first * channels, weight.blocks});
  }
  return out;
}

// Adds to M rows of a weight's gradient, at N vectors of its inputs, what some pixels give; step and
// pixel are the floats from a pixel to the next, of grad and of x.
template <int M, int N>
inline void outer_tile(const float* grad, int64_t step, const float* x, int64_t pixel,
                       int64_t pixels, V* out, int64_t row) {
  V total[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) total[m][n] = out[m * row + n];
  for (int64_t p = 0; p < pixels; ++p) {
    const V* values = reinterpret_cast<const V*>(x + p * pixel);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) total[m][n] += (grad[p * step + m] - V{}) * values[n];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) out[m * row + n] = total[m][n];
}

// The gradient of a 1×1 convolution's weight, (outputs, inputs): the sum over pixels of the products
// of its output's gradient and its input, in parts that are yet to be added up. The input is spread.
struct WeightGradient : Panels {  // of inputs
  const int64_t outputs, parts;
  const Buffer totals;

  WeightGradient(int64_t inputs, int64_t outputs, int64_t parts)
      : Panels(inputs), outputs(outputs), parts(parts),
        totals(parts * outputs * blocks.count) {}

  // Where block k of a pixel is, of pixels that lie panel by panel, in vectors.
  int64_t place(int64_t k, int64_t pixel, int64_t pixels) const {
    const int64_t panel = of(k);
    return first(panel) * pixels + pixel * size(panel) + k - first(panel);
  }
  V* at(int64_t part, int64_t output, int64_t panel) const {
    return totals + (part * outputs + output) * blocks.count + first(panel);
  }

  // Adds some pixels, which are in the cache, to a part.
  void add(int64_t part, const float* grad, const float* x, int64_t pixel, int64_t pixels) const {
    for (int64_t panel = 0; panel < count; ++panel)
      as_constant<kVectors>(size(panel), [&](auto n) {
        for_even_tiles<kPixels<n>>(0, outputs, [&](int64_t o, auto m) {
          outer_tile<m, n>(grad + o, outputs, x + first(panel) * L, pixel, pixels,
                           at(part, o, panel), blocks.count);
        });
      });
  }

  // Adds pixels that lie in memory, panel by panel, a share of them to each part. A run of pixels
  // stays in the cache, and a tile of their gradients for all panels.
  void add_all(const float* grad, const float* x, int64_t pixels, int64_t threads) const {
    constexpr int M = kPixels<kVectors>;
    const int64_t run = std::max<int64_t>(kBlock, (1 << 19) / (blocks.count * sizeof(V)));
    const int64_t shares = std::min(2 * threads, outputs);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
    for (int64_t task = 0; task < parts * shares; ++task) {
      const int64_t part = task / shares, share = task % shares;
      const int64_t last = pixels * (part + 1) / parts;
      const Buffer tile((run * M + L - 1) / L, false);
      for (int64_t p = pixels * part / parts; p < last; p += run) {
        const int64_t some = std::min(run, last - p);
        const int64_t from = outputs * share / shares, to = outputs * (share + 1) / shares;
        for_even_tiles<M>(from, to, [&](int64_t o, auto m) {
          for (int64_t q = 0; q < some; ++q)
            for (int i = 0; i < m; ++i) tile.floats()[q * m + i] = grad[(p + q) * outputs + o + i];
          for (int64_t panel = 0; panel < count; ++panel)
            as_constant<kVectors>(size(panel), [&](auto n) {
              outer_tile<m, n>(tile.floats(), m, x + (first(panel) * pixels + p * n) * L, n * L,
                               some, at(part, o, panel), blocks.count);
            });
        });
      }
    }
  }

  void write(float* out, int64_t threads) const {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t k = 0; k < blocks.count; ++k) {
        V total{};
        for (int64_t i = 0; i < parts; ++i) total += at(i, o, 0)[k];
        store(out + o * blocks.channels + blocks.offset(k), total);
      }
  }
};

}  // namespace randwire
