// The operators of randwire_d2.ops on a CPU, for float32 in channels_last; cpu_kernels.py calls them.
//
// Each goes over its operands once, by rows that stay in a core's cache. Channels are worked on in
// blocks of one vector. The last block ends with the last channel, so it overlaps the one before
// unless their number divides; both compute the same there. Buffers hold blocks side by side, each
// a vector long ("spread"); tensors are as torch has them.
//
// Work is cut into chunks by the operands' sizes alone, and sums over chunks have one order: results
// do not depend on the number of threads. Vectors are the compilers' own (GCC, Clang), of the width
// that -march=native has. NaN passes through, as in torch's operators.

#include "cpu_kernels.h"

#include <cmath>
#include <vector>

namespace {

using namespace randwire;

// Output pixels [w, w + T) of a 3×3 depthwise convolution of three padded rows.
template <int S, int T>
inline void convolve(V* const rows[3], const V* weight, int64_t blocks, int64_t k, int64_t w,
                     V (&total)[T]) {
  for (int t = 0; t < T; ++t) total[t] = V{};
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
    const V* x = rows[r] + w * S * blocks + k;
#pragma GCC unroll 9
    for (int j = 0; j < S * (T - 1) + 3; ++j) {
      const V value = x[j * blocks];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        if (j >= S * t && j < S * t + 3) total[t] += value * weight[(r * 3 + j - S * t) * blocks + k];
    }
  }
}

template <int S, typename Write>
void convolve_row(V* const rows[3], const V* weight, int64_t blocks, int64_t width, Write write) {
  constexpr int T = 4;
  int64_t w = 0;
  for (; w + T <= width; w += T)
    for (int64_t k = 0; k < blocks; ++k) {
      V total[T];
      convolve<S>(rows, weight, blocks, k, w, total);
      for (int t = 0; t < T; ++t) write(w + t, k, total[t]);
    }
  for (; w < width; ++w)
    for (int64_t k = 0; k < blocks; ++k) {
      V total[1];
      convolve<S>(rows, weight, blocks, k, w, total);
      write(w, k, total[0]);
    }
}

// The weights of a depthwise convolution: 9 × blocks, spread, from (C, 1, 3, 3).
Buffer spread_weight(const float* weight, const Blocks& blocks, bool turned) {
  Buffer spread(9 * blocks.count);
  for (int64_t k = 0; k < blocks.count; ++k)
    for (int i = 0; i < 9; ++i)
      for (int l = 0; l < L; ++l)
        spread[i * blocks.count + k][l] = weight[(blocks.offset(k) + l) * 9 + (turned ? 8 - i : i)];
  return spread;
}

void spread_row(const float* row, const Blocks& blocks, int64_t width, V* spread) {
  for (int64_t w = 0; w < width; ++w)
    for (int64_t k = 0; k < blocks.count; ++k)
      spread[w * blocks.count + k] = load(row + w * blocks.channels + blocks.offset(k));
}

// How many pieces an image's rows are cut into: enough chunks for some threads, but a piece
// computes the rows next to it, too, so it has eight rows at least.
int64_t pieces(int64_t images, int64_t rows) {
  return std::max<int64_t>(1, std::min((31 + images) / images, rows / 8));
}

// Pixels of a chunk: 256 KiB of a tensor.
int64_t chunk_pixels(int64_t channels) { return std::max<int64_t>(8, 65536 / channels); }

// One chunk of the rows of an image, and what of it is in the caches.
template <int S>
struct Window {
  const Sum& sum;
  const Shape& in;
  const int64_t image;
  Rows rows;
  int64_t next;  // the first row that was not computed

  Window(const Sum& sum, const Shape& in, int64_t image, int64_t first)
      : sum(sum), in(in), image(image), rows(in.width, sum.blocks.count),
        next(std::max<int64_t>(0, S * first - 1)) {}

  // The three rows of ReLU's result that output row o is made of.
  void around(int64_t o, V* (&three)[3]) {
    for (; next <= std::min(S * o + 1, in.height - 1); ++next) {
      V* to = rows.pixels(next);
      const int64_t blocks = sum.blocks.count;
      sum.for_each((image * in.height + next) * in.width, in.width,
                   [=](int64_t p, int64_t k, int64_t, V s) { to[p * blocks + k] = s < 0 ? V{} : s; });
    }
    for (int r = 0; r < 3; ++r) {
      const int64_t row = S * o - 1 + r;
      three[r] = row < 0 || row >= in.height ? rows.zeros() : rows.padded(row);
    }
  }
};

template <int S>
void aggregate(const Sum& sum, const Shape& in, const float* weight, float* out, int64_t threads) {
  const Blocks blocks = sum.blocks;
  const int64_t height = (in.height + S - 1) / S, width = (in.width + S - 1) / S;
  const int64_t cuts = pieces(in.images, height);
  const Buffer spread = spread_weight(weight, blocks, false);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t chunk = 0; chunk < in.images * cuts; ++chunk) {
    const int64_t image = chunk / cuts, piece = chunk % cuts, first = height * piece / cuts;
    Window<S> window(sum, in, image, first);
    for (int64_t o = first; o < height * (piece + 1) / cuts; ++o) {
      V* three[3];
      window.around(o, three);
      float* row = out + (image * height + o) * width * in.channels;
      convolve_row<S>(three, spread + 0, blocks.count, width, [=](int64_t w, int64_t k, V y) {
        store(row + w * in.channels + blocks.offset(k), y);
      });
    }
  }
}

// The gradient of an input row of stride 2, from the padded rows of the output's gradient that it
// is in: with which row of the weight, a pair of an even and an odd pixel gets which of its columns.
template <typename Write>
void transposed_row(int64_t i, V* const grads[2], const V* weight, int64_t blocks, int64_t width,
                    Write write) {
  for (int64_t w = 0; w < width; w += 2)
    for (int64_t k = 0; k < blocks; ++k) {
      V even{}, odd{};
      for (int r = 0; r < 1 + (i & 1); ++r) {
        // An even row is in one output row, under the weight's middle row; an odd one in two.
        const V* tap = weight + (i & 1 ? 6 - 6 * r : 3) * blocks + k;
        const V* g = grads[r] + (w / 2 + 1) * blocks + k;
        even += g[0] * tap[blocks];
        odd += g[0] * tap[2 * blocks] + g[blocks] * tap[0];
      }
      write(w, k, even);
      if (w + 1 < width) write(w + 1, k, odd);
    }
}

// What a chunk adds to the weight's gradient: one output row's.
template <int S>
void weight_gradient(V* const rows[3], const V* grad, int64_t blocks, int64_t width, V* total) {
  for (int64_t k = 0; k < blocks; ++k) {
    V sums[9] = {};
    for (int64_t w = 0; w < width; ++w) {
      const V g = grad[w * blocks + k];
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) sums[i] += g * rows[i / 3][(w * S + i % 3) * blocks + k];
    }
    for (int i = 0; i < 9; ++i) total[i * blocks + k] += sums[i];
  }
}

// The gradient of input row i, from the padded rows of the output's gradient around row i / S.
template <int S, typename Write>
void input_gradient(int64_t i, V* const grads[3], const V* weight, const V* turned, int64_t blocks,
                    int64_t width, Write write) {
  if constexpr (S == 1)
    convolve_row<1>(grads, turned, blocks, width, write);
  else
    transposed_row(i, grads + 1, weight, blocks, width, write);
}

template <int S>
void aggregate_backward(const Sum& sum, const Shape& in, const float* grad, const float* weight,
                        float* grad_sum, float* grad_weight, float* out, int64_t threads) {
  const Blocks blocks = sum.blocks;
  const int64_t b = blocks.count, c = in.channels;
  const int64_t height = (in.height + S - 1) / S, width = (in.width + S - 1) / S;
  const int64_t cuts = pieces(in.images, height), chunks = in.images * cuts;
  const Buffer spread = spread_weight(weight, blocks, false);
  const Buffer turned = spread_weight(weight, blocks, true);
  const Buffer totals(chunks * 9 * b);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t image = chunk / cuts, piece = chunk % cuts, first = height * piece / cuts;
    Window<S> window(sum, in, image, first);
    Rows grads(width, b);
    for (int64_t o = first, next = std::max<int64_t>(0, first - 1);
         o < height * (piece + 1) / cuts; ++o) {
      V *three[3], *around[3];
      window.around(o, three);
      for (; next <= std::min(o + 1, height - 1); ++next)
        spread_row(grad + (image * height + next) * width * c, blocks, width, grads.pixels(next));
      for (int r = 0; r < 3; ++r)
        around[r] = o + r < 1 || o + r > height ? grads.zeros() : grads.padded(o - 1 + r);
      weight_gradient<S>(three, grads.pixels(o), b, width, totals + chunk * 9 * b);
      if (out)
        convolve_row<S>(three, spread + 0, b, width, [=](int64_t w, int64_t k, V y) {
          store(out + ((image * height + o) * width + w) * c + blocks.offset(k), y);
        });
      for (int64_t i = S * o; grad_sum && i < std::min(S * (o + 1), in.height); ++i) {
        const V* activation = window.rows.pixels(i);
        float* row = grad_sum + (image * in.height + i) * in.width * c;
        input_gradient<S>(i, around, spread + 0, turned + 0, b, in.width,
                          [=](int64_t w, int64_t k, V g) {
                            const V let_through = activation[w * b + k] <= 0 ? V{} : g;
                            store(row + w * c + blocks.offset(k), let_through);
                          });
      }
    }
  }
  for (int64_t k = 0; k < b; ++k)
    for (int i = 0; i < 9; ++i) {
      V total{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += totals[(chunk * 9 + i) * b + k];
      for (int l = 0; l < L; ++l) grad_weight[(blocks.offset(k) + l) * 9 + i] = total[l];
    }
}

void weighted_sum(const Sum& sum, int64_t pixels, float* out, int64_t threads) {
  const int64_t size = chunk_pixels(sum.blocks.channels);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t first = 0; first < pixels; first += size)
    sum.for_each(first, std::min(size, pixels - first),
                 [=](int64_t, int64_t, int64_t at, V s) { store(out + at, s); });
}

// By channels, sums over pixels of N gradients and of their products with x - mean. They are
// gathered in short runs of pixels, which stay in the cache for all blocks, and round less.
template <int N>
void channel_sums(const float* const* grads, const float* x, const V* mean, const Blocks& blocks,
                  int64_t first, int64_t last, V* totals) {
  constexpr int64_t kRun = 32;
  for (; first < last; first += kRun)
    for (int64_t k = 0; k < blocks.count; ++k) {
      V sums[N] = {}, products[N] = {};
      for (int64_t p = first; p < std::min(first + kRun, last); ++p) {
        const int64_t at = p * blocks.channels + blocks.offset(k);
        const V centred = load(x + at) - mean[k];
        for (int i = 0; i < N; ++i) {
          const V g = load(grads[i] + at);
          sums[i] += g;
          products[i] += g * centred;
        }
      }
      for (int i = 0; i < N; ++i) {
        totals[2 * i * blocks.count + k] += sums[i];
        totals[(2 * i + 1) * blocks.count + k] += products[i];
      }
    }
}

// The same for any number of gradients, in double: for gradient i, rows 2 i and 2 i + 1 of C sums.
std::vector<double> all_channel_sums(int64_t n, const float* const* grads, const float* x,
                                     const V* mean, const Blocks& blocks, int64_t pixels,
                                     int64_t threads) {
  const int64_t size = chunk_pixels(blocks.channels), chunks = (pixels + size - 1) / size;
  const int64_t b = blocks.count;
  const Buffer totals(chunks * 2 * n * b);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * size, last = std::min(first + size, pixels);
    for (int64_t i = 0; i < n; i += 4) {
      V* to = totals + (chunk * n + i) * 2 * b;
      switch (std::min<int64_t>(n - i, 4)) {
        case 1: channel_sums<1>(grads + i, x, mean, blocks, first, last, to); break;
        case 2: channel_sums<2>(grads + i, x, mean, blocks, first, last, to); break;
        case 3: channel_sums<3>(grads + i, x, mean, blocks, first, last, to); break;
        default: channel_sums<4>(grads + i, x, mean, blocks, first, last, to);
      }
    }
  }
  std::vector<double> sums(2 * n * blocks.channels);
  for (int64_t i = 0; i < 2 * n; ++i)
    for (int64_t k = 0; k < b; ++k)
      for (int l = 0; l < L; ++l) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += totals[(chunk * 2 * n + i) * b + k][l];
        sums[i * blocks.channels + blocks.offset(k) + l] = total;
      }
  return sums;
}

}  // namespace

extern "C" {

int64_t randwire_lanes() { return L; }

void randwire_weighted_sum(int64_t n, const float* const* x, const float* coefficients,
                           const float* const* affines, int64_t pixels, int64_t channels,
                           float* out, int64_t threads) {
  weighted_sum(Sum(n, x, coefficients, affines, channels), pixels, out, threads);
}

void randwire_aggregate(int64_t n, const float* const* x, const float* coefficients,
                        const float* const* affines, int64_t images, int64_t channels,
                        int64_t height, int64_t width, const float* weight, int64_t stride, float* out,
                        int64_t threads) {
  const Sum sum(n, x, coefficients, affines, channels);
  (stride == 1 ? aggregate<1> : aggregate<2>)(sum, {images, channels, height, width}, weight, out,
                                              threads);
}

// grad_sum and out are null where they are not asked for.
void randwire_aggregate_backward(const float* grad, int64_t n, const float* const* x,
                                 const float* coefficients, const float* const* affines,
                                 int64_t images, int64_t channels, int64_t height, int64_t width,
                                 const float* weight, int64_t stride, float* grad_sum,
                                 float* grad_weight, float* out, int64_t threads) {
  const Sum sum(n, x, coefficients, affines, channels);
  (stride == 1 ? aggregate_backward<1> : aggregate_backward<2>)(
      sum, {images, channels, height, width}, grad, weight, grad_sum, grad_weight, out, threads);
}

// Each chunk sums up what its pixels are above its first one, and the squares of that, so that a
// mean far from 0 costs no digits; the chunks' means and variances are put together in double.
void randwire_moments(const float* x, int64_t pixels, int64_t channels, float* moments,
                      int64_t threads) {
  const Blocks blocks(channels);
  const int64_t b = blocks.count, size = chunk_pixels(channels), chunks = (pixels + size - 1) / size;
  const Buffer origins(chunks * b), totals(chunks * 2 * b);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * size, last = std::min(first + size, pixels);
    V *origin = origins + chunk * b, *total = totals + chunk * 2 * b;
    for (int64_t k = 0; k < b; ++k) origin[k] = load(x + first * channels + blocks.offset(k));
    for (int64_t p = first; p < last; p += 32)
      for (int64_t k = 0; k < b; ++k) {
        V sums{}, squares{};
        for (int64_t q = p; q < std::min(p + 32, last); ++q) {
          const V above = load(x + q * channels + blocks.offset(k)) - origin[k];
          sums += above;
          squares += above * above;
        }
        total[k] += sums;
        total[b + k] += squares;
      }
  }
  for (int64_t k = 0; k < b; ++k)
    for (int l = 0; l < L; ++l) {
      double count = 0, mean = 0, square = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const double m = static_cast<double>(std::min(size, pixels - chunk * size));
        const double sum = totals[chunk * 2 * b + k][l];
        const double own = totals[(chunk * 2 + 1) * b + k][l] - sum * sum / m;
        const double delta = origins[chunk * b + k][l] + sum / m - mean;
        square += own + delta * delta * count * m / (count + m);
        count += m;
        mean += delta * m / count;
      }
      moments[blocks.offset(k) + l] = static_cast<float>(mean);
      moments[channels + blocks.offset(k) + l] = static_cast<float>(std::max(square, 0.0) / count);
    }
}

void randwire_batch_norm_backward(int64_t n, const float* const* grads, const float* coefficients,
                                  const float* x, const float* weight, const float* bias,
                                  const float* moments, double eps, int64_t pixels,
                                  int64_t channels, float* grad_x, float* grad_coefficients,
                                  float* grad_weight, float* grad_bias, int64_t threads) {
  const Blocks blocks(channels);
  const Buffer mean(blocks.count);
  for (int64_t k = 0; k < blocks.count; ++k) mean[k] = load(moments + blocks.offset(k));
  const auto sums = all_channel_sums(n, grads, x, mean + 0, blocks, pixels, threads);
  // ∂x is a sum of the gradients and of x, each with an affine of its own.
  std::vector<float> affines(2 * (n + 1) * channels), ones(n + 1, 1.0f);
  std::vector<double> products(n);
  const double count = static_cast<double>(pixels);
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse = 1 / std::sqrt(static_cast<double>(moments[channels + c]) + eps);
    const double scale = weight[c] * inverse;
    double total = 0, product = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double own = sums[2 * i * channels + c], with_x = sums[(2 * i + 1) * channels + c];
      total += coefficients[i] * own;
      product += coefficients[i] * with_x;
      products[i] += scale * with_x + bias[c] * own;
      affines[2 * i * channels + c] = static_cast<float>(scale * coefficients[i]);
    }
    const double slope = -scale * inverse * inverse * product / count;
    affines[2 * n * channels + c] = static_cast<float>(slope);
    affines[(2 * n + 1) * channels + c] = static_cast<float>(-scale * total / count - slope * moments[c]);
    grad_weight[c] = static_cast<float>(product * inverse);
    grad_bias[c] = static_cast<float>(total);
  }
  for (int64_t i = 0; i < n; ++i) grad_coefficients[i] = static_cast<float>(products[i]);
  std::vector<const float*> inputs(grads, grads + n), terms(n + 1);
  inputs.push_back(x);
  for (int64_t i = 0; i <= n; ++i) terms[i] = affines.data() + 2 * i * channels;
  weighted_sum(Sum(n + 1, inputs.data(), ones.data(), terms.data(), channels), pixels, grad_x,
               threads);
}

}  // extern "C"
