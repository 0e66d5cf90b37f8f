// Batch norms, and weighted sums of images.

#include "common.h"

#include <cmath>
#include <vector>

namespace {

using namespace randwire;

// Pixels of a chunk: 256 KiB of a tensor.
int64_t chunk_pixels(int64_t channels) { return std::max<int64_t>(8, 65536 / channels); }

void weighted_sum(const Sum& sum, int64_t pixels, float* out, int64_t threads) {
  const int64_t size = chunk_pixels(sum.blocks.channels);
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t first = 0; first < pixels; first += size)
    sum.for_each(first, std::min(size, pixels - first),
                 [=](int64_t, int64_t, int64_t at, V s) { store(out + at, s); });
}

// Pixels of a short run: they stay in the cache for all blocks, and their sums round less. Each run
// prefetches the next one: read block by block, it is nothing that the hardware foresees.
constexpr int64_t kRun = 32;

// By channels, sums over pixels of N gradients and of their products with x - mean.
template <int N>
void channel_sums(const float* const* grads, const float* x, const V* mean, const Blocks& blocks,
                  int64_t first, int64_t last, V* totals) {
  const int64_t next = kRun * blocks.channels;
  for (; first < last; first += kRun)
    for (int64_t k = 0; k < blocks.count; ++k) {
      V sums[N] = {}, products[N] = {};
      for (int64_t p = first; p < std::min(first + kRun, last); ++p) {
        const int64_t at = p * blocks.channels + blocks.offset(k);
        const V centred = load(x + at) - mean[k];
        prefetch(x + at + next);
        for (int i = 0; i < N; ++i) {
          const V g = load(grads[i] + at);
          prefetch(grads[i] + at + next);
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
      as_constant<4>(std::min<int64_t>(n - i, 4), [&](auto count) {
        channel_sums<count>(grads + i, x, mean, blocks, first, last, to);
      });
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

void randwire_weighted_sum_backward(int64_t n, const float* const* grads,
                                    const float* coefficients, const float* x, const float* affine,
                                    int64_t pixels, int64_t channels, float* grad_x,
                                    float* grad_coefficients, int64_t threads) {
  const Blocks blocks(channels);
  const Buffer zeros(blocks.count);
  const auto sums = all_channel_sums(n, grads, x, zeros + 0, blocks, pixels, threads);
  for (int64_t i = 0; i < n; ++i) {
    double product = 0;
    for (int64_t c = 0; c < channels; ++c)
      product += affine[c] * sums[(2 * i + 1) * channels + c] +
                 affine[channels + c] * sums[2 * i * channels + c];
    grad_coefficients[i] = static_cast<float>(product);
  }
  std::vector<float> scale(2 * channels);  // without the shift
  std::copy_n(affine, channels, scale.data());
  const std::vector<const float*> scales(n, scale.data());
  weighted_sum(Sum(n, grads, coefficients, scales.data(), channels), pixels, grad_x, threads);
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
    for (int64_t p = first; p < last; p += kRun)
      for (int64_t k = 0; k < b; ++k) {
        V sums{}, squares{};
        for (int64_t q = p; q < std::min(p + kRun, last); ++q) {
          const V above = load(x + q * channels + blocks.offset(k)) - origin[k];
          prefetch(x + (q + kRun) * channels + blocks.offset(k));
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
