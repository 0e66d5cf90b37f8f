// What the operators on a CPU are made of, for float32 in channels_last.
//
// Each goes over its operands once, by rows that stay in a core's cache. Channels are worked on in
// blocks of one vector. The last block ends with the last channel, so it overlaps the one before
// unless their number divides; both compute the same there. Buffers hold blocks side by side, each
// a vector long ("spread"); tensors are as torch has them.
//
// What is summed is cut into chunks by the operands' sizes alone, and sums over chunks have one order:
// results do not depend on the number of threads. Vectors are the compilers' own (GCC, Clang), as
// wide as -march=native has them. NaN passes through, as in torch's operators.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

namespace randwire {

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

// What will be read, or written, soon; the address may lie behind a tensor's end.
inline void prefetch(const float* p) { __builtin_prefetch(p); }
inline void prefetch_write(const float* p) { __builtin_prefetch(p, 1); }

// f(n) for n of 1 to M, as a constant.
template <int M, typename F>
inline void as_constant(int64_t n, F f) {
  if (n == M) return f(std::integral_constant<int, M>());
  if constexpr (M > 1) as_constant<M - 1>(n, f);
}

struct Blocks {
  int64_t channels, count;
  explicit Blocks(int64_t c) : channels(c), count((c + L - 1) / L) {}
  int64_t offset(int64_t k) const { return std::min(k * L, channels - L); }
};

// Vectors, zero at first unless that does not matter.
class Buffer {
 public:
  explicit Buffer(int64_t vectors, bool zero = true)
      : data_(static_cast<float*>(operator new[](vectors * sizeof(V), std::align_val_t(64)))) {
    if (zero) std::fill_n(data_, vectors * L, 0.0f);
  }
  ~Buffer() { operator delete[](data_, std::align_val_t(64)); }
  Buffer(Buffer&& other) : data_(std::exchange(other.data_, nullptr)) {}
  V* operator+(int64_t i) const { return reinterpret_cast<V*>(data_) + i; }
  V& operator[](int64_t i) const { return *(*this + i); }
  float* floats() const { return data_; }

 private:
  float* data_;
};

// Images of one size; a row of an image has width pixels of all channels.
struct Shape {
  int64_t images, channels, height, width;
  Shape strided(int64_t s) const {
    return {images, channels, (height + s - 1) / s, (width + s - 1) / s};
  }
  int64_t pixel(int64_t image, int64_t row) const { return (image * height + row) * width; }
};

// How many floats ahead a pass over several tensors prefetches: they are more streams than the
// hardware's own prefetching follows well.
constexpr int64_t kAhead = 1024;

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
        for (int64_t i = 0; i < (N ? N : n); ++i) {
          prefetch(x[i] + at + kAhead);
          total += scales[i * blocks.count + k] * load(x[i] + at);
        }
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

// The last few rows of an image, with a zero pixel at either end. A row is a line of pixels for each
// block, one after the other, so that a convolution's taps lie at fixed distances.
class Rows {
 public:
  const int64_t line;  // from a block to the next; odd, so that they lie in different places of a cache

  Rows(int64_t width, int64_t blocks, int64_t count, int64_t first = 0)
      : line((width + 2) | 1), row_(line * blocks), count_(count), first_(first),
        data_((count + 1) * row_) {}
  // The first line, from its zero pixel on. A row outside of the image is the zeros at the end.
  V* padded(int64_t row) const { return data_ + (row - first_) % count_ * row_; }
  V* pixels(int64_t row) const { return padded(row) + 1; }
  V* zeros() const { return data_ + count_ * row_; }

 private:
  int64_t row_, count_, first_;
  Buffer data_;
};

}  // namespace randwire
