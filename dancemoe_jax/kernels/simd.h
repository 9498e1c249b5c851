// Sixteen float lanes, on whatever vectors the instruction set has.
//
// A `Lanes` is always 16 floats: one AVX-512 register, two of AVX2, four of NEON or SSE. Every sum below is defined on these
// 16 lanes and multiplies and adds in one rounding, so that AVX-512, AVX2 and NEON give the same bits: servers with unlike
// processors agree. (Processors without fused multiply-add round twice, and agree only among themselves.)
//
// Include this from files that are compiled once for each instruction set (vector_code.cc) and from no others. All is in an
// unnamed namespace: code for one instruction set must never be linked into the place of code for another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = kLanes / kNative;

typedef float Native __attribute__((vector_size(4 * kNative)));
typedef int32_t NativeInt __attribute__((vector_size(4 * kNative)));
typedef float Quad __attribute__((vector_size(16)));

#define INLINE inline __attribute__((always_inline))

struct Lanes {
  Native part[kParts];
};

template <class F>
INLINE Lanes each(F&& f) {
  Lanes result;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; i++) result.part[i] = f(i);
  return result;
}

INLINE Native native(float value) { return value - Native{}; }
INLINE Lanes all(float value) {
  return each([&](int) { return native(value); });
}

INLINE Lanes operator+(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] + b.part[i]; });
}
INLINE Lanes operator-(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] - b.part[i]; });
}
INLINE Lanes operator*(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] * b.part[i]; });
}
INLINE Lanes operator/(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] / b.part[i]; });
}
INLINE Lanes min(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}
INLINE Lanes max(Lanes a, Lanes b) {
  return each([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}

// a * b + c.
INLINE Native fused(Native a, Native b, Native c) {
#if defined(__AVX512F__)
  return (Native)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Native)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Native)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return fused(a.part[i], b.part[i], c.part[i]); });
}

// --- Loading: float32, bfloat16 (as its bits) and int8 become float32.

INLINE Native load_native(const float* from) {
  Native result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

INLINE Native load_native(const uint16_t* from) {
#if defined(__AVX512F__)
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return (Native)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return (Native)_mm256_slli_epi32(wide, 16);
#else
  NativeInt wide;
  for (int i = 0; i < kNative; i++) wide[i] = (int32_t)((uint32_t)from[i] << 16);
  return (Native)wide;
#endif
}

INLINE Native load_native(const int8_t* from) {
#if defined(__AVX512F__)
  return (Native)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return (Native)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  Native wide;
  for (int i = 0; i < kNative; i++) wide[i] = (float)from[i];
  return wide;
#endif
}

template <class T>
INLINE Lanes load(const T* from) {
  return each([&](int i) { return load_native(from + i * kNative); });
}

template <class T>
INLINE void load(const T* from, Lanes* to) {
  *to = load(from);
}

// The first `count` < 16 elements, zeros behind them.
template <class T>
INLINE Lanes load_some(const T* from, size_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

INLINE void store(float* to, Lanes value) { std::memcpy(to, value.part, sizeof value.part); }

// --- Pairs: in each lane two numbers of bfloat16, which come from neighbours in memory.

struct Pairs {
  NativeInt part[kParts];
};

INLINE void load(const uint16_t* from, Pairs* to) { std::memcpy(to->part, from, sizeof to->part); }

INLINE Native upper(NativeInt pair) { return (Native)(pair & (int32_t)0xffff0000); }
INLINE Native lower(NativeInt pair) { return (Native)(pair << 16); }

// The products of both added to c, the upper one first, each in one rounding. That is what the instruction for it does
// (measured on AMD; documented by Intel), beside taking what is below 2^-126 as zero, as XLA has its threads do anyway.
INLINE Lanes fused(const Pairs& a, const Pairs& b, Lanes c) {
  return each([&](int i) {
#if defined(__AVX512BF16__)
    return (Native)_mm512_dpbf16_ps((__m512)c.part[i], (__m512bh)a.part[i], (__m512bh)b.part[i]);
#else
    return fused(lower(a.part[i]), lower(b.part[i]), fused(upper(a.part[i]), upper(b.part[i]), c.part[i]));
#endif
  });
}

// 32 numbers that bfloat16 holds exactly, as pairs of one and the one 16 behind it: products with such pairs are added in
// the order that float32 has, which is by sixteens.
INLINE void store_halves(uint16_t* to, Lanes first, Lanes second) {
  for (int i = 0; i < kParts; i++) {
    const NativeInt both = ((NativeInt)first.part[i] & (int32_t)0xffff0000) | (((NativeInt)second.part[i] >> 16) & 0xffff);
    std::memcpy(to + 2 * i * kNative, &both, sizeof both);
  }
}

// --- Sums over lanes: q = (quarter 0 + quarter 2) + (quarter 1 + quarter 3), then (q0 + q1) + (q2 + q3).

INLINE Quad quarters(Lanes v) {
#if defined(__AVX512F__)
  __m512 whole = (__m512)v.part[0];
  __m256 half = _mm512_castps512_ps256(whole) +
                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1));
  return (Quad)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  __m256 half = (__m256)(v.part[0] + v.part[1]);
  return (Quad)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
  return (v.part[0] + v.part[2]) + (v.part[1] + v.part[3]);
#endif
}

// The sums of four vectors at once, which shares the shuffles; each is what it would be alone.
INLINE Quad sums(Lanes a, Lanes b, Lanes c, Lanes d) {
  Quad p = quarters(a), q = quarters(b), r = quarters(c), s = quarters(d);
  Quad pq = __builtin_shufflevector(p, q, 0, 2, 4, 6) + __builtin_shufflevector(p, q, 1, 3, 5, 7);
  Quad rs = __builtin_shufflevector(r, s, 0, 2, 4, 6) + __builtin_shufflevector(r, s, 1, 3, 5, 7);
  return __builtin_shufflevector(pq, rs, 0, 2, 4, 6) + __builtin_shufflevector(pq, rs, 1, 3, 5, 7);
}

#if defined(__AVX512F__)
// The quarters of four vectors, side by side.
INLINE __m512 quarters(const Lanes* four) {
  const __m512 a = (__m512)four[0].part[0], b = (__m512)four[1].part[0], c = (__m512)four[2].part[0], d = (__m512)four[3].part[0];
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
  return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}

INLINE __m512 neighbours_added(__m512 a, __m512 b) { return _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd); }

// The sums of four times four vectors, those of the first four in front.
INLINE Lanes sums(__m512 p, __m512 q, __m512 r, __m512 s) {
  const __m512 by_column = neighbours_added(neighbours_added(p, q), neighbours_added(r, s));
  const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {{(Native)_mm512_permutexvar_ps(turned, by_column)}};
}
#endif

INLINE float sum(Lanes a) {
  Quad q = quarters(a);
  return (q[0] + q[1]) + (q[2] + q[3]);
}

INLINE float largest(Lanes a) {
  float lanes[kLanes], result;
  store(lanes, a);
  result = lanes[0];
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

// --- e^x, within two units in the last place; 0 below -87, exact at 0 (coefficients of Cephes' expf).
INLINE Lanes exp(Lanes x) {
  const Lanes too_small = each([&](int i) { return (Native)(x.part[i] < -87.0f); });
  x = max(min(x, all(88.0f)), all(-87.0f));
  // x = n ln 2 + r. Adding and subtracting 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
  const Lanes shifted = fused(x, all(1.44269504f), all(12582912.0f));
  const Lanes n = shifted - all(12582912.0f);
  const Lanes r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
  Lanes p = all(1.9875691500e-4f);
  p = fused(p, r, all(1.3981999507e-3f));
  p = fused(p, r, all(8.3334519073e-3f));
  p = fused(p, r, all(4.1665795894e-2f));
  p = fused(p, r, all(1.6666665459e-1f));
  p = fused(p, r, all(5.0000001201e-1f));
  p = fused(p, r * r, r) + all(1.0f);
  return each([&](int i) {
    NativeInt power = ((NativeInt)shifted.part[i] - (NativeInt)native(12582912.0f) + 127) << 23;
    Native result = p.part[i] * (Native)power;
    return (Native)((NativeInt)result & ~(NativeInt)too_small.part[i]);
  });
}

}  // namespace
