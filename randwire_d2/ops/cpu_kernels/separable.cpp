// Nodes of a random graph but for their norms: a weighted sum, ReLU, a 3×3 depthwise convolution and
// a 1×1 one, and all their gradients. What lies between them stays in the cache.

#include "pointwise.h"

namespace {

using namespace randwire;

// Pixels of a tile of a depthwise convolution, at most.
constexpr int kWidth = 4;

// f(w, n) for tiles of n pixels from w on; n is a constant.
template <int T, typename F>
inline void for_tiles(int64_t width, F f) {
  int64_t w = 0;
  for (; w + T <= width; w += T) f(w, std::integral_constant<int, T>());
  if constexpr (T > 1) as_constant<T - 1>(width - w, [&](auto n) { f(w, n); });
}

// f(x, i, t) for each tap i of a 3×3 convolution at pixels t < T, from w on in a block's padded lines.
template <int S, int T, typename F>
inline void for_taps(V* const rows[3], int64_t line, int64_t k, int64_t w, F f) {
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
    const V* x = rows[r] + k * line + w * S;
#pragma GCC unroll 9
    for (int j = 0; j < S * (T - 1) + 3; ++j) {
      const V value = x[j];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
        if (j >= S * t && j < S * t + 3) f(value, r * 3 + j - S * t, t);
    }
  }
}

// Calls write(pixel, block, value) for a row of a 3×3 depthwise convolution of three padded rows.
template <int S, typename Write>
void convolve_row(V* const rows[3], int64_t line, const V* weight, int64_t blocks, int64_t width,
                  Write write) {
  for (int64_t k = 0; k < blocks; ++k) {
    V taps[9];
    for (int i = 0; i < 9; ++i) taps[i] = weight[k * 9 + i];
    for_tiles<kWidth>(width, [&](int64_t w, auto tile) {
      constexpr int T = tile;
      V total[T] = {};
      for_taps<S, T>(rows, line, k, w, [&](V x, int i, int t) { total[t] += x * taps[i]; });
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) write(w + t, k, total[t]);
    });
  }
}

// The weights of a depthwise convolution, 9 for each block, from (C, 1, 3, 3).
Buffer spread_weight(const float* weight, const Blocks& blocks, bool turned) {
  Buffer spread(9 * blocks.count);
  for (int64_t k = 0; k < blocks.count; ++k)
    for (int i = 0; i < 9; ++i)
      for (int l = 0; l < L; ++l)
        spread[k * 9 + i][l] = weight[(blocks.offset(k) + l) * 9 + (turned ? 8 - i : i)];
  return spread;
}

void spread_row(const float* row, const Blocks& blocks, int64_t width, V* spread, int64_t line) {
  for (int64_t w = 0; w < width; ++w)
    for (int64_t k = 0; k < blocks.count; ++k)
      spread[k * line + w] = load(row + w * blocks.channels + blocks.offset(k));
}

// How many pieces an image's rows are cut into: enough chunks for some threads, but a piece
// computes the rows next to it, too, so it has eight rows at least.
int64_t pieces(int64_t images, int64_t rows) {
  return std::max<int64_t>(1, std::min((15 + images) / images, rows / 8));
}

// The rows of ReLU's result that a chunk is at: those of one image after another.
template <int S>
struct Window {
  const Sum& sum;
  const Shape& in;
  Rows rows;
  int64_t image = -1, next = 0;  // next: the first row that was not computed

  Window(const Sum& sum, const Shape& in)
      : sum(sum), in(in), rows(in.width, sum.blocks.count, 4) {}

  // The three rows that output row o of an image is made of.
  void around(int64_t of, int64_t o, V* (&three)[3]) {
    if (of != image) next = std::max<int64_t>(0, S * o - 1);
    image = of;
    for (; next <= std::min(S * o + 1, in.height - 1); ++next) {
      V* to = rows.pixels(next);
      const int64_t line = rows.line;
      sum.for_each(in.pixel(image, next), in.width,
                   [=](int64_t p, int64_t k, int64_t, V s) { to[k * line + p] = s < 0 ? V{} : s; });
    }
    for (int r = 0; r < 3; ++r) {
      const int64_t row = S * o - 1 + r;
      three[r] = row < 0 || row >= in.height ? rows.zeros() : rows.padded(row);
    }
  }

  // What is yet to be read for the rows up to output row o, counted through all images.
  Ahead ahead(int64_t o) const {
    const int64_t height = in.strided(S).height;
    const int64_t last = std::min(S * (o % height) + 2, in.height);
    return {sum.n, sum.x, in.pixel(image, next) * in.channels,
            in.pixel(o / height, last) * in.channels};
  }
};

// Calls write(pixel from 0, block, value) for output rows of the depthwise convolution.
template <int S, typename Write>
void convolve(Window<S>& window, const V* weight, int64_t first, int64_t last, Write write) {
  const Shape size = window.in.strided(S);
  for (int64_t o = first; o < last; ++o) {
    V* three[3];
    window.around(o / size.height, o % size.height, three);
    convolve_row<S>(
        three, window.rows.line, weight, window.sum.blocks.count, size.width,
        [=](int64_t w, int64_t k, V y) { write((o - first) * size.width + w, k, y); });
  }
}

// How many rows are multiplied at once.
int64_t rows_of(int64_t width) { return std::max<int64_t>(1, kBlock / width); }

// What separable computes, for few pixels: all are convolved before they are multiplied.
template <int S>
void separable_few(const Sum& sum, const Shape& in, const V* depthwise, const float* pointwise,
                   int64_t outputs, float* out, int64_t threads) {
  const Blocks blocks = sum.blocks;
  const Shape size = in.strided(S);
  const int64_t all = in.images * size.height, pixel = (blocks.count | 1) * L;
  const Buffer buffer(all * size.width * pixel / L, false);
  float* inner = buffer.floats();
  V own;  // lanes of the last block that the one before lacks
  for (int l = 0; l < L; ++l) own[l] = l >= blocks.count * L - blocks.channels;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t chunk = 0; chunk < threads; ++chunk) {
    Window<S> window(sum, in);
    convolve(window, depthwise, all * chunk / threads, all * (chunk + 1) / threads,
             [=](int64_t p, int64_t k, V y) {
               store(inner + (all * chunk / threads * size.width + p) * pixel + k * L,
                     k + 1 < blocks.count ? y : y * own);
             });
  }
  multiply_few(inner, pixel, all * size.width, pointwise, blocks, out, outputs, threads);
}

template <int S>
void separable(const Sum& sum, const Shape& in, const float* depthwise, const float* pointwise,
               int64_t outputs, float* out, int64_t threads) {
  const Blocks blocks = sum.blocks;
  const Shape size = in.strided(S);
  const int64_t all = in.images * size.height, pixels = all * size.width;
  const Buffer weight = spread_weight(depthwise, blocks, false);
  if (pixels < kFew)
    return separable_few<S>(sum, in, weight + 0, pointwise, outputs, out, threads);
  const Weight panels(pointwise, outputs, in.channels, false, threads);
  // Enough chunks for the threads, but of some pixels, since each reads the whole weight, and of
  // rows, since it computes those beside it, too. If they are too few, threads share a chunk, and
  // its depthwise convolution is computed as often: beside the other one, that is little.
  const int64_t fit = std::min(all / 3, pixels / (pixels < 2 * 96 * threads ? 48 : 96));
  const int64_t chunks = std::clamp<int64_t>(3 * threads, 1, std::max<int64_t>(1, fit));
  const int64_t groups = std::clamp<int64_t>(2 * threads / chunks, 1, panels.count);
  const int64_t most = std::max<int64_t>(1, kMany / size.width);
  // An odd number of vectors, so that pixels do not all lie in the same places of a cache.
  const int64_t pixel = (blocks.count | 1) * L, row = size.width * pixel;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t task = 0; task < chunks * groups; ++task) {
    const int64_t chunk = task / groups, group = task % groups;
    const int64_t first = all * chunk / chunks, last = all * (chunk + 1) / chunks;
    Window<S> window(sum, in);
    const Buffer buffer(std::min(most, last - first) * row / L, false);
    float* inner = buffer.floats();
    for (int64_t o = first; o < last; o += most) {
      const int64_t rows = std::min(most, last - o);
      convolve(window, weight + 0, o, o + rows, [=](int64_t p, int64_t k, V y) {
        store(inner + p * pixel + blocks.offset(k), y);
      });
      multiply(inner, pixel, rows * size.width, panels, panels.count * group / groups,
               panels.count * (group + 1) / groups,
               Pixels{out + o * size.width * outputs, panels.blocks},
               window.ahead(std::min(o + rows + most, last) - 1));
    }
  }
}

// The gradient of an input row of stride 2, from the padded rows of the output's gradient that it
// is in: with which row of the weight, a pair of an even and an odd pixel gets which of its columns.
template <typename Write>
void transposed_row(int64_t i, V* const grads[2], int64_t line, const V* weight, int64_t blocks,
                    int64_t width, Write write) {
  for (int64_t k = 0; k < blocks; ++k)
    for (int64_t w = 0; w < width; w += 2) {
      V even{}, odd{};
      for (int r = 0; r < 1 + (i & 1); ++r) {
        // An even row is in one output row, under the weight's middle row; an odd one in two.
        const V* taps = weight + k * 9 + (i & 1 ? 6 - 6 * r : 3);
        const V* g = grads[r] + k * line + w / 2 + 1;
        even += g[0] * taps[1];
        odd += g[0] * taps[2] + g[1] * taps[0];
      }
      write(w, k, even);
      if (w + 1 < width) write(w + 1, k, odd);
    }
}

// What a chunk adds to the weight's gradient: one output row's.
template <int S>
void weight_gradient(V* const rows[3], int64_t line, const V* grad, int64_t grad_line,
                     int64_t blocks, int64_t width, V* total) {
  for (int64_t k = 0; k < blocks; ++k) {
    V sums[9] = {};
    for_tiles<kWidth>(width, [&](int64_t w, auto tile) {
      constexpr int T = tile;
      V g[T];
      for (int t = 0; t < T; ++t) g[t] = grad[k * grad_line + w + t];
      for_taps<S, T>(rows, line, k, w, [&](V x, int i, int t) { sums[i] += x * g[t]; });
    });
    for (int i = 0; i < 9; ++i) total[k * 9 + i] += sums[i];
  }
}

// The weight's gradient, (C, 1, 3, 3), from all chunks'.
void add_up(const Buffer& totals, int64_t chunks, const Blocks& blocks, float* out) {
  for (int64_t k = 0; k < blocks.count; ++k)
    for (int i = 0; i < 9; ++i) {
      V total{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += totals[(chunk * blocks.count + k) * 9 + i];
      for (int l = 0; l < L; ++l) out[(blocks.offset(k) + l) * 9 + i] = total[l];
    }
}

// The gradient of input row i, from the padded rows of the output's gradient around row i / S.
template <int S, typename Write>
void input_gradient(int64_t i, V* const grads[3], int64_t line, const V* weight, const V* turned,
                    int64_t blocks, int64_t width, Write write) {
  if constexpr (S == 1)
    convolve_row<1>(grads, line, turned, blocks, width, write);
  else
    transposed_row(i, grads + 1, line, weight, blocks, width, write);
}

// The gradient of the depthwise convolution's output: padded rows of an image, one after another.
struct InnerGradient {
  const Shape& size;
  const Weight& weight;
  const float* grad;   // of the 1×1 convolution's output
  const float* known;  // the whole gradient, if it is there already
  const int64_t image, last, most;
  int64_t next;
  Rows rows;

  InnerGradient(const Shape& size, const Weight& weight, const float* grad, const float* known,
                int64_t image, int64_t first, int64_t last)
      : size(size), weight(weight), grad(grad), known(known), image(image), last(last),
        most(rows_of(size.width)), next(first),
        rows(size.width, weight.blocks.count, most > 1 ? 2 * most : 3, first) {}

  // Rows o - 1, o and o + 1.
  void around(int64_t o, V* (&three)[3]) {
    for (int64_t some; next <= std::min(o + 1, last - 1); next += some) {
      some = std::min(most, last - next);
      const int64_t first = size.pixel(image, next);
      if (known)
        for (int64_t r = 0; r < some; ++r)
          spread_row(known + (first + r * size.width) * weight.blocks.channels, weight.blocks,
                     size.width, rows.pixels(next + r), rows.line);
      else
        multiply(grad + first * weight.inputs, weight.inputs, some * size.width, weight, 0,
                 weight.count, RowPixels{rows, next, size.width},
                 Ahead(1, &grad, size.pixel(image, next + some) * weight.inputs,
                       size.pixel(image, std::min(next + some + most, last)) * weight.inputs));
    }
    for (int r = 0; r < 3; ++r)
      three[r] = o + r < 1 || o + r > size.height ? rows.zeros() : rows.padded(o - 1 + r);
  }
};

template <int S>
void separable_backward(const Sum& sum, const Shape& in, const float* grad, const float* depthwise,
                        const float* pointwise, int64_t outputs, float* grad_sum,
                        float* grad_depthwise, float* grad_pointwise, int64_t threads) {
  const Blocks blocks = sum.blocks;
  const int64_t b = blocks.count, c = in.channels;
  const Shape size = in.strided(S);
  const int64_t cuts = pieces(in.images, size.height), chunks = in.images * cuts;
  const int64_t pixels = in.images * size.height * size.width;
  const Weight panels(pointwise, outputs, c, true, threads);
  // If a chunk's part of the 1×1 convolution's weight gradient is smaller than its pixels, it is
  // added up while they are in the cache. Else they are written, and it is after them.
  const bool near = chunks * outputs <= pixels;
  const int64_t most = rows_of(size.width);
  const int64_t pixel = (b | 1) * L;
  const Buffer inner(near ? 0 : pixels * b, false);
  const WeightGradient products(c, outputs, near ? chunks : std::clamp<int64_t>(pixels / 512, 1, 4));
  const Buffer spread = spread_weight(depthwise, blocks, false);
  const Buffer turned = spread_weight(depthwise, blocks, true);
  const Buffer totals(chunks * 9 * b);
  // With too few chunks for the threads, or too few pixels in each, they share the multiplication
  // first.
  const bool early = chunks < 2 * threads || size.height * size.width < kBlock;
  const Buffer known = multiply_all(grad, early ? pixels : 0, panels, threads);
  const float* const whole = early ? known.floats() : nullptr;
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(dynamic)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t image = chunk / cuts, piece = chunk % cuts;
    const int64_t first = size.height * piece / cuts, last = size.height * (piece + 1) / cuts;
    Window<S> window(sum, in);
    InnerGradient grads(size, panels, grad, whole, image, std::max<int64_t>(0, first - 1),
                        std::min(size.height, last + 1));
    const Buffer buffer(near ? most * size.width * pixel / L : 0, false);
    for (int64_t o = first; o < last; ++o) {
      V *three[3], *around[3];
      window.around(image, o, three);
      grads.around(o, around);
      const int64_t line = window.rows.line, grad_line = grads.rows.line;
      weight_gradient<S>(three, line, grads.rows.pixels(o), grad_line, b, size.width,
                         totals + chunk * 9 * b);
      const int64_t r = (o - first) % most, at = size.pixel(image, o);
      convolve_row<S>(three, line, spread + 0, b, size.width, [&](int64_t w, int64_t k, V y) {
        if (near)
          buffer[(r * size.width + w) * pixel / L + k] = y;
        else
          inner[products.place(k, at + w, pixels)] = y;
      });
      if (near && (r == most - 1 || o == last - 1))
        products.add(chunk, grad + size.pixel(image, o - r) * outputs, buffer.floats(), pixel,
                     (r + 1) * size.width);
      for (int64_t i = S * o; grad_sum && i < std::min(S * (o + 1), in.height); ++i) {
        const V* activation = window.rows.pixels(i);
        float* row = grad_sum + in.pixel(image, i) * c;
        input_gradient<S>(i, around, grad_line, spread + 0, turned + 0, b, in.width,
                          [=](int64_t w, int64_t k, V g) {
                            const V let_through = activation[k * line + w] <= 0 ? V{} : g;
                            prefetch_write(row + (w + in.width) * c + blocks.offset(k));
                            store(row + w * c + blocks.offset(k), let_through);
                          });
      }
    }
  }
  add_up(totals, chunks, blocks, grad_depthwise);
  if (!near) products.add_all(grad, inner.floats(), pixels, threads);
  products.write(grad_pointwise, threads);
}

}  // namespace

extern "C" {

void randwire_separable(int64_t n, const float* const* x, const float* coefficients,
                        const float* const* affines, int64_t images, int64_t channels,
                        int64_t height, int64_t width, const float* depthwise, int64_t stride,
                        const float* pointwise, int64_t outputs, float* out, int64_t threads) {
  const Sum sum(n, x, coefficients, affines, channels);
  (stride == 1 ? separable<1> : separable<2>)(sum, {images, channels, height, width}, depthwise,
                                              pointwise, outputs, out, threads);
}

// grad_sum is null where it is not asked for.
void randwire_separable_backward(const float* grad, int64_t n, const float* const* x,
                                 const float* coefficients, const float* const* affines,
                                 int64_t images, int64_t channels, int64_t height, int64_t width,
                                 const float* depthwise, int64_t stride, const float* pointwise,
                                 int64_t outputs, float* grad_sum, float* grad_depthwise,
                                 float* grad_pointwise, int64_t threads) {
  const Sum sum(n, x, coefficients, affines, channels);
  (stride == 1 ? separable_backward<1> : separable_backward<2>)(
      sum, {images, channels, height, width}, grad, depthwise, pointwise, outputs, grad_sum,
      grad_depthwise, grad_pointwise, threads);
}

}  // extern "C"
