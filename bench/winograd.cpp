// 3 x 3 convolutions (stride 1, padding 1) of channels-last pictures by Winograd's minimal filtering, forward and backward.
//
// Lavin and Gray, 2016 (arXiv:1509.09308): tiles of A x A inputs make M x M outputs, A = M + 2.
//   forward    V = B' d B of each tile (A*A, tiles, C);  Y = A' (V U) A
//   backward   dM = A dY A';  dU = V' dM;  dx = B (dM U') B', summed where tiles overlap
// Transforms are computed in float32, what they write (and so the products) is of the input's type.
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/extension.h>

#include <algorithm>
#include <vector>

using at::Tensor;
using Vec = __m512;
constexpr int LANES = 16;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec load(const at::BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline void store(at::BFloat16* p, Vec v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}

// Each map reads one line of a tile and writes one: `bt` and `b` A to A, `at` A to M, `a` M to A; `g` and `gt` are of
// the weights, 3 to A and A to 3.
struct F4 {
  static constexpr int M = 4, A = 6;
  static inline void bt(const Vec* i, Vec* o) {
    o[0] = 4 * i[0] - 5 * i[2] + i[4];
    o[1] = i[3] + i[4] - 4 * (i[1] + i[2]);
    o[2] = i[4] - i[3] + 4 * (i[1] - i[2]);
    o[3] = i[4] - i[2] + 2 * (i[3] - i[1]);
    o[4] = i[4] - i[2] - 2 * (i[3] - i[1]);
    o[5] = 4 * i[1] - 5 * i[3] + i[5];
  }
  static inline void at(const Vec* i, Vec* o) {
    const Vec s = i[1] + i[2], d = i[1] - i[2], t = i[3] + i[4], e = i[3] - i[4];
    o[0] = i[0] + s + t;
    o[1] = d + 2 * e;
    o[2] = s + 4 * t;
    o[3] = d + 8 * e + i[5];
  }
  static inline void a(const Vec* i, Vec* o) {
    const Vec s = i[0] + i[2], d = i[1] + i[3], t = i[0] + 4 * i[2], e = 2 * i[1] + 8 * i[3];
    o[0] = i[0];
    o[1] = s + d;
    o[2] = s - d;
    o[3] = t + e;
    o[4] = t - e;
    o[5] = i[3];
  }
  static inline void b(const Vec* i, Vec* o) {
    const Vec s = i[1] + i[2], d = i[1] - i[2], t = i[3] + i[4], e = i[3] - i[4];
    o[0] = 4 * i[0];
    o[1] = 4 * (i[5] - d) - 2 * e;
    o[2] = -5 * i[0] - 4 * s - t;
    o[3] = d + 2 * e - 5 * i[5];
    o[4] = i[0] + s + t;
    o[5] = i[5];
  }
  static inline void g(const Vec* i, Vec* o) {
    const Vec s = (i[0] + i[2]) * (-1.f / 6), t = i[0] * (1.f / 24) + i[2] * (1.f / 6);
    o[0] = i[0] * 0.25f;
    o[1] = s - i[1] * (1.f / 6);
    o[2] = s + i[1] * (1.f / 6);
    o[3] = t + i[1] * (1.f / 12);
    o[4] = t - i[1] * (1.f / 12);
    o[5] = i[2];
  }
  static inline void gt(const Vec* i, Vec* o) {
    const Vec s = i[1] + i[2], d = i[1] - i[2], t = i[3] + i[4], e = i[3] - i[4];
    o[0] = i[0] * 0.25f - s * (1.f / 6) + t * (1.f / 24);
    o[1] = e * (1.f / 12) - d * (1.f / 6);
    o[2] = t * (1.f / 6) - s * (1.f / 6) + i[5];
  }
};

struct F2 {
  static constexpr int M = 2, A = 4;
  static inline void bt(const Vec* i, Vec* o) {
    o[0] = i[0] - i[2];
    o[1] = i[1] + i[2];
    o[2] = i[2] - i[1];
    o[3] = i[1] - i[3];
  }
  static inline void at(const Vec* i, Vec* o) {
    o[0] = i[0] + i[1] + i[2];
    o[1] = i[1] - i[2] - i[3];
  }
  static inline void a(const Vec* i, Vec* o) {
    o[0] = i[0];
    o[1] = i[0] + i[1];
    o[2] = i[0] - i[1];
    o[3] = -i[1];
  }
  static inline void b(const Vec* i, Vec* o) {
    o[0] = i[0];
    o[1] = i[1] - i[2] + i[3];
    o[2] = i[1] + i[2] - i[0];
    o[3] = -i[3];
  }
  static inline void g(const Vec* i, Vec* o) {
    const Vec s = i[0] + i[2];
    o[0] = i[0];
    o[1] = (s + i[1]) * 0.5f;
    o[2] = (s - i[1]) * 0.5f;
    o[3] = i[2];
  }
  static inline void gt(const Vec* i, Vec* o) {
    const Vec s = (i[1] + i[2]) * 0.5f;
    o[0] = i[0] + s;
    o[1] = (i[1] - i[2]) * 0.5f;
    o[2] = s + i[3];
  }
};

// lines first, then columns: in (R, R) of row stride A, out (S, S) of row stride A
template <int R, int S, int A, class Map>
inline void both(const Vec* in, Vec* out, Map map) {
  Vec half[A * A], line[A], made[A];
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < R; c++) line[c] = in[r * A + c];
    map(line, made);
    for (int c = 0; c < S; c++) half[r * A + c] = made[c];
  }
  for (int c = 0; c < S; c++) {
    for (int r = 0; r < R; r++) line[r] = half[r * A + c];
    map(line, made);
    for (int r = 0; r < S; r++) out[r * A + c] = made[r];
  }
}

struct Shape {
  int64_t pictures, height, width, channels, rows, columns;
  int64_t tiles() const { return pictures * rows * columns; }
};

// maps (n, H, W, C) to (A*A, tiles, C): of each tile R lines from `M * row - border` on, zeros beyond the picture
template <class F, int R, class T, class Map>
void gather(const T* x, T* v, const Shape& s, int border, Map map) {
  const int64_t plane = s.tiles() * s.channels;
  at::parallel_for(0, s.tiles(), 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t column = tile % s.columns, row = tile / s.columns % s.rows, picture = tile / (s.columns * s.rows);
      for (int64_t c = 0; c < s.channels; c += LANES) {
        Vec in[F::A * F::A], out[F::A * F::A];
        for (int i = 0; i < R; i++)
          for (int j = 0; j < R; j++) {
            const int64_t y = row * F::M + i - border, z = column * F::M + j - border;
            const bool is_in = y >= 0 && y < s.height && z >= 0 && z < s.width;
            in[i * F::A + j] =
                is_in ? load(x + ((picture * s.height + y) * s.width + z) * s.channels + c) : _mm512_setzero_ps();
          }
        both<R, F::A, F::A>(in, out, map);
        for (int t = 0; t < F::A * F::A; t++) store(v + t * plane + tile * s.channels + c, out[t]);
      }
    }
  });
}

// m (A*A, tiles, K) to y (n, H, W, K)
template <class F, class T>
void from_products(const T* m, T* y, const Shape& s) {
  const int64_t plane = s.tiles() * s.channels;
  at::parallel_for(0, s.tiles(), 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t column = tile % s.columns, row = tile / s.columns % s.rows, picture = tile / (s.columns * s.rows);
      for (int64_t c = 0; c < s.channels; c += LANES) {
        Vec in[F::A * F::A], out[F::A * F::A];
        for (int t = 0; t < F::A * F::A; t++) in[t] = load(m + t * plane + tile * s.channels + c);
        both<F::A, F::M, F::A>(in, out, F::at);
        for (int i = 0; i < F::M; i++)
          for (int j = 0; j < F::M; j++) {
            const int64_t y_ = row * F::M + i, z = column * F::M + j;
            if (y_ < s.height && z < s.width)
              store(y + ((picture * s.height + y_) * s.width + z) * s.channels + c, out[i * F::A + j]);
          }
      }
    }
  });
}

// dv (A*A, tiles, C) to dx (n, H, W, C): tiles overlap, their shares of a pixel are summed in float32
template <class F, class T>
void from_tiles(const T* dv, T* dx, const Shape& s) {
  const int64_t plane = s.tiles() * s.channels, tall = s.rows * F::M + 2, wide = s.columns * F::M + 2;
  const int64_t blocks = s.channels / LANES;
  at::parallel_for(0, s.pictures * blocks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> kept(tall * wide * LANES);
    for (int64_t at = first; at < last; at++) {
      const int64_t picture = at / blocks, c = at % blocks * LANES;
      std::fill(kept.begin(), kept.end(), 0.f);
      for (int64_t row = 0; row < s.rows; row++)
        for (int64_t column = 0; column < s.columns; column++) {
          const int64_t tile = (picture * s.rows + row) * s.columns + column;
          Vec in[F::A * F::A], out[F::A * F::A];
          for (int t = 0; t < F::A * F::A; t++) in[t] = load(dv + t * plane + tile * s.channels + c);
          both<F::A, F::A, F::A>(in, out, F::b);
          for (int i = 0; i < F::A; i++)
            for (int j = 0; j < F::A; j++) {
              float* sum = kept.data() + ((row * F::M + i) * wide + column * F::M + j) * LANES;
              store(sum, load(sum) + out[i * F::A + j]);
            }
        }
      for (int64_t y = 0; y < s.height; y++)
        for (int64_t z = 0; z < s.width; z++)
          store(dx + ((picture * s.height + y) * s.width + z) * s.channels + c,
                load(kept.data() + ((y + 1) * wide + z + 1) * LANES));
    }
  });
}

// w (K, 3, 3, C) to u (A*A, K, C)
template <class F, class T>
void to_weights(const float* w, T* u, int64_t outs, int64_t ins) {
  at::parallel_for(0, outs, 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k++)
      for (int64_t c = 0; c < ins; c += LANES) {
        Vec in[F::A * F::A], out[F::A * F::A];
        for (int i = 0; i < 3; i++)
          for (int j = 0; j < 3; j++) in[i * F::A + j] = load(w + (k * 9 + i * 3 + j) * ins + c);
        both<3, F::A, F::A>(in, out, F::g);
        for (int t = 0; t < F::A * F::A; t++) store(u + (t * outs + k) * ins + c, out[t]);
      }
  });
}

// du (A*A, K, C) to dw (K, 3, 3, C)
template <class F, class T>
void from_weights(const T* du, float* dw, int64_t outs, int64_t ins) {
  at::parallel_for(0, outs, 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k++)
      for (int64_t c = 0; c < ins; c += LANES) {
        Vec in[F::A * F::A], out[F::A * F::A];
        for (int t = 0; t < F::A * F::A; t++) in[t] = load(du + (t * outs + k) * ins + c);
        both<F::A, 3, F::A>(in, out, F::gt);
        for (int i = 0; i < 3; i++)
          for (int j = 0; j < 3; j++) store(dw + (k * 9 + i * 3 + j) * ins + c, out[i * F::A + j]);
      }
  });
}

template <class F>
Shape shape_of(const Tensor& x) {  // (n, H, W, C)
  return {x.size(0), x.size(1), x.size(2), x.size(3), (x.size(1) + F::M - 1) / F::M, (x.size(2) + F::M - 1) / F::M};
}

// x (n, H, W, C) and w (K, 3, 3, C) float32 to y (n, H, W, K), and what the way back needs
template <class F, class T>
std::vector<Tensor> forward_of(const Tensor& x, const Tensor& w) {
  Shape s = shape_of<F>(x);
  const int64_t outs = w.size(0), ins = s.channels;
  Tensor u = at::empty({F::A * F::A, outs, ins}, x.options()), v = at::empty({F::A * F::A, s.tiles(), ins}, x.options());
  to_weights<F, T>(w.data_ptr<float>(), u.data_ptr<T>(), outs, ins);
  gather<F, F::A>(x.data_ptr<T>(), v.data_ptr<T>(), s, 1, F::bt);
  const Tensor m = at::bmm(v, u.transpose(1, 2));
  Tensor y = at::empty({s.pictures, s.height, s.width, outs}, x.options());
  s.channels = outs;
  from_products<F, T>(m.data_ptr<T>(), y.data_ptr<T>(), s);
  return {y, u, v};
}

template <class F, class T>
std::vector<Tensor> backward_of(const Tensor& dy, const Tensor& u, const Tensor& v, bool wants_x) {
  Shape s = shape_of<F>(dy);
  const int64_t outs = s.channels, ins = u.size(2);
  Tensor dm = at::empty({F::A * F::A, s.tiles(), outs}, dy.options()), dx;
  gather<F, F::M>(dy.data_ptr<T>(), dm.data_ptr<T>(), s, 0, F::a);
  Tensor dw = at::empty({outs, 3, 3, ins}, dy.options().dtype(at::kFloat));
  const Tensor du = at::bmm(dm.transpose(1, 2), v);
  from_weights<F, T>(du.data_ptr<T>(), dw.data_ptr<float>(), outs, ins);
  if (wants_x) {
    const Tensor dv = at::bmm(dm, u);
    dx = at::empty({s.pictures, s.height, s.width, ins}, dy.options());
    s.channels = ins;
    from_tiles<F, T>(dv.data_ptr<T>(), dx.data_ptr<T>(), s);
  }
  return {dx, dw};
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& w, bool is_small) {
  const bool is_half = x.scalar_type() == at::kBFloat16;
  if (is_small) return is_half ? forward_of<F2, at::BFloat16>(x, w) : forward_of<F2, float>(x, w);
  return is_half ? forward_of<F4, at::BFloat16>(x, w) : forward_of<F4, float>(x, w);
}

std::vector<Tensor> backward(const Tensor& dy, const Tensor& u, const Tensor& v, bool wants_x) {
  const bool is_half = dy.scalar_type() == at::kBFloat16;
  if (u.size(0) == 16)
    return is_half ? backward_of<F2, at::BFloat16>(dy, u, v, wants_x) : backward_of<F2, float>(dy, u, v, wants_x);
  return is_half ? backward_of<F4, at::BFloat16>(dy, u, v, wants_x) : backward_of<F4, float>(dy, u, v, wants_x);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
}
