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

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float V __attribute__((vector_size(L * sizeof(float))));
typedef V Unaligned __attribute__((aligned(4), may_alias));

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }

struct Blocks {
  int64_t channels, count;
  explicit Blocks(int64_t c) : channels(c), count((c + L - 1) / L) {}
  int64_t offset(int64_t k) const { return std::min(k * L, channels - L); }
};

// Vectors, zero at first.
class Buffer {
 public:
  explicit Buffer(int64_t vectors)
      : data_(new (std::align_val_t(64)) float[vectors * L]()) {}
  ~Buffer() { operator delete[](data_, std::align_val_t(64)); }
  Buffer(Buffer&& other) : data_(std::exchange(other.data_, nullptr)) {}
  V* operator+(int64_t i) const { return reinterpret_cast<V*>(data_) + i; }
  V& operator[](int64_t i) const { return *(*this + i); }

 private:
  float* data_;
};

// Images of one size; a row of an image has width pixels of all channels.
struct Shape {
  int64_t images, channels, height, width;
};

// sum_i scales[i] * x[i] + shift, by channels; scales and shift are spread.
struct Sum {
  const Blocks blocks;
  const int64_t n;
  const float* const* x;
  Buffer scales, shift;

  // affines[i] has the scale of each channel, then the shifts; null if there are none.
  Sum(int64_t n, const float* const* x, const float* coefficients, const float* const* affines,
      int64_t channels)
      : blocks(channels), n(n), x(x), scales(n * blocks.count), shift(blocks.count) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < blocks.count; ++k) {
        V c = coefficients[i] - V{};
        if (affines) {
          const float* affine = affines[i] + blocks.offset(k);
          shift[k] += c * load(affine + channels);
          c *= load(affine);
        }
        scales[i * blocks.count + k] = c;
      }
  }

  template <int N, typename Write>
  inline void pixels(int64_t first, int64_t count, Write write) const {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t k = 0; k < blocks.count; ++k) {
        const int64_t at = (first + p) * blocks.channels + blocks.offset(k);
        V total = shift[k];
        for (int64_t i = 0; i < (N ? N : n); ++i)
          total += scales[i * blocks.count + k] * load(x[i] + at);
        write(p, k, at, total);
      }
  }

  // Calls write(pixel from 0, block, offset in a tensor, sum) for all blocks of some pixels.
  template <typename Write>
  void for_each(int64_t first, int64_t count, Write write) const {
    switch (n) {
      case 1: return pixels<1>(first, count, write);
      case 2: return pixels<2>(first, count, write);
      case 3: return pixels<3>(first, count, write);
      default: return pixels<0>(first, count, write);
    }
  }
};

// The last rows of an image that were asked for, spread, with a zero pixel at either end.
class Rows {
 public:
  Rows(int64_t width, int64_t blocks)
      : row_((width + 2) * blocks), blocks_(blocks), data_(5 * row_) {}
  // The row's first pixel. A row outside of the image is the zeros at the end.
  V* pixels(int64_t row) { return padded(row) + blocks_; }
  V* padded(int64_t row) { return data_ + (row & 3) * row_; }
  V* zeros() { return data_ + 4 * row_; }

 private:
  int64_t row_, blocks_;
  Buffer data_;
};

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
    int64_t next = std::max<int64_t>(0, first - 1);
    const auto grads_of = [&](int64_t o) {
      return o < 0 || o >= height ? grads.zeros() : grads.padded(o);
    };
    for (int64_t o = first; o < height * (piece + 1) / cuts; ++o) {
      V* three[3];
      window.around(o, three);
      for (; next <= std::min(o + 1, height - 1); ++next) {
        V* to = grads.pixels(next);
        const float* from = grad + (image * height + next) * width * c;
        for (int64_t w = 0; w < width; ++w)
          for (int64_t k = 0; k < b; ++k) to[w * b + k] = load(from + w * c + blocks.offset(k));
      }
      weight_gradient<S>(three, grads.pixels(o), b, width, totals + chunk * 9 * b);
      if (out) {
        float* row = out + (image * height + o) * width * c;
        convolve_row<S>(three, spread + 0, b, width, [=](int64_t w, int64_t k, V y) {
          store(row + w * c + blocks.offset(k), y);
        });
      }
      if (!grad_sum) continue;
      for (int64_t i = S * o; i < std::min(S * (o + 1), in.height); ++i) {
        float* row = grad_sum + (image * in.height + i) * in.width * c;
        const V* activation = window.rows.pixels(i);
        const auto write = [=](int64_t w, int64_t k, V g) {
          store(row + w * c + blocks.offset(k), activation[w * b + k] <= 0 ? V{} : g);
        };
        V* around[3] = {grads_of(o - 1), grads_of(o), grads_of(o + 1)};
        if (S == 1)
          convolve_row<1>(around, turned + 0, b, width, write);
        else
          transposed_row(i, around + 1, spread + 0, b, in.width, write);
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
