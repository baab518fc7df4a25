// What the generated kernels stand on: V, one number for each of several conformations, and its functions.
//
// On a CPU V is one vector register (ATen's portable vector class) and the conformations of a register are its lanes;
// on a GPU, or with OPENMM_BG_SCALAR defined, V is a plain number and every thread has a conformation of its own.
// The generated code is the same for both.

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define OPENMM_BG_SCALAR
#define DEVICE __device__ static inline
#else
#include <algorithm>
#include <cmath>
#include <cstdlib>
#define DEVICE static inline
#endif

#ifdef OPENMM_BG_SCALAR

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
using std::floor, std::ceil, std::exp, std::log, std::sin, std::cos, std::tan, std::asin, std::acos, std::atan;
using std::atan2, std::sinh, std::cosh, std::tanh, std::erf, std::erfc, std::pow, std::sqrt, std::fabs;
#endif
typedef T V;
typedef bool Mask;
constexpr int WIDTH = 1;

DEVICE V f_rsqrt(V a) { return T(1) / sqrt(a); }
DEVICE V f_recip(V a) { return T(1) / a; }
DEVICE V f_sqrt(V a) { return sqrt(a); }
DEVICE V f_exp(V a) { return exp(a); }
DEVICE V f_log(V a) { return log(a); }
DEVICE V f_sin(V a) { return sin(a); }
DEVICE V f_cos(V a) { return cos(a); }
DEVICE V f_tan(V a) { return tan(a); }
DEVICE V f_asin(V a) { return asin(a); }
DEVICE V f_acos(V a) { return acos(a); }
DEVICE V f_atan(V a) { return atan(a); }
DEVICE V f_atan2(V a, V b) { return atan2(a, b); }
DEVICE V f_sinh(V a) { return sinh(a); }
DEVICE V f_cosh(V a) { return cosh(a); }
DEVICE V f_tanh(V a) { return tanh(a); }
DEVICE V f_erf(V a) { return erf(a); }
DEVICE V f_erfc(V a) { return erfc(a); }
DEVICE V f_floor(V a) { return floor(a); }
DEVICE V f_ceil(V a) { return ceil(a); }
DEVICE V f_abs(V a) { return fabs(a); }
DEVICE V f_power(V a, V b) { return pow(a, b); }
DEVICE V f_min(V a, V b) { return a != a ? a : b < a ? b : b != b ? b : a; }
DEVICE V f_max(V a, V b) { return a != a ? a : b > a ? b : b != b ? b : a; }
DEVICE Mask f_ge(V a, V b) { return a >= b; }
DEVICE Mask f_gt(V a, V b) { return a > b; }
DEVICE Mask f_eq(V a, V b) { return a == b; }
DEVICE Mask f_ne(V a, V b) { return a != b; }
DEVICE V f_where(Mask m, V a, V b) { return m ? a : b; }
DEVICE void spread(V a, T* out) { out[0] = a; }
DEVICE V collect(const T* in) { return in[0]; }

#else  // vector registers

#include <ATen/cpu/vec/vec.h>
typedef at::vec::Vectorized<T> V;
typedef V Mask;
constexpr int WIDTH = V::size();

#if defined(CPU_CAPABILITY_AVX512)
// The hardware's estimate, refined by Newton: full precision at a fraction of a square root and a division.
template <typename W>
struct Estimate;
template <>
struct Estimate<float> {
  static __m512 rsqrt(__m512 a) {
    const __m512 y = _mm512_rsqrt14_ps(a);
    const __m512 h = _mm512_mul_ps(_mm512_mul_ps(a, y), _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(h, y, _mm512_set1_ps(0.5f)), y);
  }
};
template <>
struct Estimate<double> {
  static __m512d step(__m512d a, __m512d y) {
    const __m512d h = _mm512_mul_pd(_mm512_mul_pd(a, y), _mm512_set1_pd(0.5));
    return _mm512_fmadd_pd(y, _mm512_fnmadd_pd(h, y, _mm512_set1_pd(0.5)), y);
  }
  static __m512d rsqrt(__m512d a) { return step(a, step(a, _mm512_rsqrt14_pd(a))); }
};
DEVICE V f_rsqrt(const V& a) { return Estimate<T>::rsqrt(a); }
#else
DEVICE V f_rsqrt(const V& a) { return a.rsqrt(); }
#endif
DEVICE V f_recip(const V& a) { return V(T(1)) / a; }
DEVICE V f_sqrt(const V& a) { return a.sqrt(); }
DEVICE V f_exp(const V& a) { return a.exp(); }
DEVICE V f_log(const V& a) { return a.log(); }
DEVICE V f_sin(const V& a) { return a.sin(); }
DEVICE V f_cos(const V& a) { return a.cos(); }
DEVICE V f_tan(const V& a) { return a.tan(); }
DEVICE V f_asin(const V& a) { return a.asin(); }
DEVICE V f_acos(const V& a) { return a.acos(); }
DEVICE V f_atan(const V& a) { return a.atan(); }
DEVICE V f_atan2(const V& a, const V& b) { return a.atan2(b); }
DEVICE V f_sinh(const V& a) { return a.sinh(); }
DEVICE V f_cosh(const V& a) { return a.cosh(); }
DEVICE V f_tanh(const V& a) { return a.tanh(); }
DEVICE V f_erf(const V& a) { return a.erf(); }
DEVICE V f_erfc(const V& a) { return a.erfc(); }
DEVICE V f_floor(const V& a) { return a.floor(); }
DEVICE V f_ceil(const V& a) { return a.ceil(); }
DEVICE V f_abs(const V& a) { return a.abs(); }
DEVICE V f_power(const V& a, const V& b) { return a.pow(b); }
DEVICE V f_min(const V& a, const V& b) { return at::vec::minimum(a, b); }
DEVICE V f_max(const V& a, const V& b) { return at::vec::maximum(a, b); }
DEVICE Mask f_ge(const V& a, const V& b) { return a >= b; }
DEVICE Mask f_gt(const V& a, const V& b) { return a > b; }
DEVICE Mask f_eq(const V& a, const V& b) { return a == b; }
DEVICE Mask f_ne(const V& a, const V& b) { return a != b; }
DEVICE V f_where(const Mask& m, const V& a, const V& b) { return V::blendv(b, a, m); }
DEVICE void spread(const V& a, T* out) { a.store(out); }
DEVICE V collect(const T* in) { return V::loadu(in); }

#endif

// An indicator as a number; where its argument is no number, neither is the result.
DEVICE V f_step(const V& a) { return f_where(f_ge(a, V(T(0))), V(T(1)), a * V(T(0))); }
DEVICE V f_delta(const V& a) { return f_where(f_eq(a, V(T(0))), V(T(1)), V(T(0))); }
DEVICE V f_select(const V& c, const V& a, const V& b) { return f_where(f_ne(c, V(T(0))), a, b); }

// ---- tabulated functions, lane by lane: they are rare, and their gathers do not vectorise -------------------------

// The t-th power's coefficient after differentiating `order` times.
DEVICE T falling(int power, int order) {
  T product = 1;
  for (int k = 0; k < order; ++k) product *= T(power - k);
  return product;
}

// A value of a piecewise cubic in D variables, or of a table of numbers. `head` begins with what `kernel.py` writes:
// kind (0 natural, 1 periodic, 2 discrete, 3 periodic maps chosen by the first argument), then cells, lower end and spacing for each variable, then the numbers.
template <int D>
DEVICE T look_up(const T* head, const T* arguments, const int* orders) {
  const T invalid = T(0) / T(0);
  const int kind = int(head[0]);
  const T* numbers = head + 1 + 3 * D;
  long cell = 0;
  T weights[D][4];
  T flat = 1;  // of the choice of a map nothing depends smoothly
  for (int d = 0; d < D; ++d) {
    const T count = head[1 + 3 * d], lower = head[2 + 3 * d], spacing = head[3 + 3 * d];
    T position = (arguments[d] - lower) / spacing;
    if (!(position - position == 0)) return invalid;
    if (kind == 2 || (kind == 3 && d == 0)) {
      position = floor(position + T(0.5));
      if (orders[d]) flat = 0;
      if (position < 0 || position >= count) return invalid;
      cell = cell * long(count) + long(position);
      continue;
    }
    if (kind == 1 || kind == 3) position -= count * floor(position / count);
    if (kind == 0 && (position < 0 || position > count)) return 0;
    T whole = floor(position);
    if (whole > count - 1) whole = count - 1;
    const T t = position - whole;
    T scale = 1;
    for (int k = 0; k < orders[d]; ++k) scale /= spacing;
    for (int p = 0; p < 4; ++p) {
      T product = p < orders[d] ? T(0) : falling(p, orders[d]) * scale;
      for (int k = 0; k < p - orders[d]; ++k) product *= t;
      weights[d][p] = product;
    }
    cell = cell * long(count) + long(whole);
  }
  if (kind == 2) return numbers[cell] * flat;
  const int smooth = kind == 3 ? D - 1 : D;
  const int size = smooth == 1 ? 4 : smooth == 2 ? 16 : 64;
  const T* c = numbers + cell * size;
  T total = 0;
  for (int n = 0; n < size; ++n) {
    T product = c[n];
    for (int d = 0, rest = n; d < smooth; ++d, rest /= 4) product *= weights[D - 1 - d][rest % 4];
    total += product;
  }
  return total * flat;
}

template <int D>
DEVICE V f_table(const T* head, const V* arguments, const int* orders) {
  T lanes[D][WIDTH], result[WIDTH];
  for (int d = 0; d < D; ++d) spread(arguments[d], lanes[d]);
  for (int lane = 0; lane < WIDTH; ++lane) {
    T one[D];
    for (int d = 0; d < D; ++d) one[d] = lanes[d][lane];
    result[lane] = look_up<D>(head, one, orders);
  }
  return collect(result);
}
