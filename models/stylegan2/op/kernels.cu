// CUDA kernels of upfirdn2d and bias + leaky ReLU, with a plain C interface and no dependence on
// PyTorch or Python headers: they compile wherever there is nvcc, and are called through ctypes.
//
// Every launcher returns a cudaError_t as int (0: success). Sums are taken in float (double for
// double tensors). Sizes and offsets are 64-bit.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

template <typename T> struct Sum { using type = float; };
template <> struct Sum<double> { using type = double; };

template <typename T> __device__ __forceinline__ typename Sum<T>::type load(T v) {
    return static_cast<typename Sum<T>::type>(v);
}
template <> __device__ __forceinline__ float load<__half>(__half v) { return __half2float(v); }
template <> __device__ __forceinline__ float load<__nv_bfloat16>(__nv_bfloat16 v) {
    return __bfloat162float(v);
}
template <typename T, typename S> __device__ __forceinline__ T store(S v) {
    return static_cast<T>(v);
}
template <> __device__ __forceinline__ __half store<__half, float>(float v) {
    return __float2half_rn(v);
}
template <> __device__ __forceinline__ __nv_bfloat16 store<__nv_bfloat16, float>(float v) {
    return __float2bfloat16_rn(v);
}

// V values that travel as one memory transaction.
template <typename T, int V> struct alignas(sizeof(T) * V) Pack { T v[V]; };

__host__ __device__ __forceinline__ int64_t floor_div(int64_t a, int64_t b) {
    int64_t q = a / b;
    return q * b > a ? q - 1 : q;
}

struct Filter {
    // Output sizes, input sizes and the layout as element strides; `inner` counts the vectors of
    // V neighbouring channels of the channels-last layout (1 in the contiguous one).
    int64_t n, channels, in_h, in_w, out_h, out_w;
    int64_t in_stride[4], out_stride[4];    // n, c, h, w
    int up, down, left, top, kh, kw;
};

// Any factors and filter sizes: one thread per output.
template <typename T>
__global__ void filter_any(const T* __restrict__ x, const float* __restrict__ taps,
                           T* __restrict__ y, Filter f, bool channels_last) {
    using S = typename Sum<T>::type;
    const int64_t total = f.n * f.channels * f.out_h * f.out_w;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < total;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t rest = i, c, ox, oy;
        if (channels_last) {
            c = rest % f.channels; rest /= f.channels;
            ox = rest % f.out_w; rest /= f.out_w;
            oy = rest % f.out_h; rest /= f.out_h;
        } else {
            ox = rest % f.out_w; rest /= f.out_w;
            oy = rest % f.out_h; rest /= f.out_h;
            c = rest % f.channels; rest /= f.channels;
        }
        // Position of the first tap in the zero-inserted image; only multiples of `up` hold data.
        const int64_t x0 = ox * f.down - f.left, y0 = oy * f.down - f.top;
        const T* image = x + rest * f.in_stride[0] + c * f.in_stride[1];
        S sum = 0;
        int64_t iy = -floor_div(-y0, f.up);
        for (int ky = (int)(iy * f.up - y0); ky < f.kh; ky += f.up, ++iy) {
            if (iy < 0 || iy >= f.in_h) continue;
            int64_t ix = -floor_div(-x0, f.up);
            for (int kx = (int)(ix * f.up - x0); kx < f.kw; kx += f.up, ++ix) {
                if (ix < 0 || ix >= f.in_w) continue;
                // A convolution: the filter is flipped.
                sum += (S)taps[(f.kh - 1 - ky) * f.kw + (f.kw - 1 - kx)]
                       * load(image[iy * f.in_stride[2] + ix * f.in_stride[3]]);
            }
        }
        y[rest * f.out_stride[0] + c * f.out_stride[1] + oy * f.out_stride[2]
          + ox * f.out_stride[3]] = store<T, S>(sum);
    }
}

constexpr int kRows = 16;    // output rows a thread walks down

// Filters of up to 4x4 taps without resampling (UP = DOWN = 1) or with a factor of two. A thread
// owns one output column of V channels and walks down kRows rows, keeping the input rows its
// filter covers in registers, so each input row is read once per column and not once per tap.
template <typename T, int V, int UP, int DOWN>
__global__ void filter_small(const T* __restrict__ x, const float* __restrict__ taps,
                             T* __restrict__ y, Filter f, int64_t groups, bool channels_last) {
    using S = typename Sum<T>::type;
    constexpr int K = 4;
    constexpr int TAPS = UP == 2 ? 2 : 4;    // input samples one output sees along an axis
    S weight[K][K];                          // flipped, padded with zeros to 4x4
#pragma unroll
    for (int a = 0; a < K; ++a)
#pragma unroll
        for (int b = 0; b < K; ++b)
            weight[a][b] = a < f.kh && b < f.kw
                ? (S)taps[(f.kh - 1 - a) * f.kw + (f.kw - 1 - b)] : (S)0;

    const int64_t strips = (f.out_h + kRows - 1) / kRows;
    const int64_t total = f.n * groups * strips * f.out_w;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < total;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t rest = i, group, ox, strip;
        if (channels_last) {
            group = rest % groups; rest /= groups;
            ox = rest % f.out_w; rest /= f.out_w;
            strip = rest % strips; rest /= strips;
        } else {
            ox = rest % f.out_w; rest /= f.out_w;
            strip = rest % strips; rest /= strips;
            group = rest % groups; rest /= groups;
        }
        const T* image = x + rest * f.in_stride[0] + group * V * f.in_stride[1];
        T* target = y + rest * f.out_stride[0] + group * V * f.out_stride[1]
                    + ox * f.out_stride[3];
        const int64_t x0 = ox * DOWN - f.left;
        const int64_t ix0 = UP == 2 ? -floor_div(-x0, 2) : x0;
        const int phase_x = UP == 2 ? (int)(ix0 * 2 - x0) : 0;

        S row[K][TAPS][V];                   // the input rows under the filter, oldest first
        int64_t held = 0;                    // input row number after the newest one held
        bool filled = false;
        const int64_t first = strip * kRows;
        const int64_t last = first + kRows < f.out_h ? first + kRows : f.out_h;
        for (int64_t oy = first; oy < last; ++oy) {
            const int64_t y0 = oy * DOWN - f.top;
            const int64_t iy0 = UP == 2 ? -floor_div(-y0, 2) : y0;
            const int phase_y = UP == 2 ? (int)(iy0 * 2 - y0) : 0;
            if (!filled) { held = iy0; filled = true; }
            while (held < iy0 + TAPS) {
#pragma unroll
                for (int a = 0; a + 1 < TAPS; ++a)
#pragma unroll
                    for (int b = 0; b < TAPS; ++b)
#pragma unroll
                        for (int v = 0; v < V; ++v) row[a][b][v] = row[a + 1][b][v];
#pragma unroll
                for (int b = 0; b < TAPS; ++b) {
                    const int64_t ix = ix0 + b;
                    if (held >= 0 && held < f.in_h && ix >= 0 && ix < f.in_w) {
                        const Pack<T, V> p = *reinterpret_cast<const Pack<T, V>*>(
                            image + held * f.in_stride[2] + ix * f.in_stride[3]);
#pragma unroll
                        for (int v = 0; v < V; ++v) row[TAPS - 1][b][v] = load(p.v[v]);
                    } else {
#pragma unroll
                        for (int v = 0; v < V; ++v) row[TAPS - 1][b][v] = 0;
                    }
                }
                ++held;
            }
            Pack<T, V> out;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                S sum = 0;
#pragma unroll
                for (int a = 0; a < TAPS; ++a)
#pragma unroll
                    for (int b = 0; b < TAPS; ++b) {
                        S w;
                        if (UP == 2) {
                            // Selected without indexing, so that `weight` stays in registers.
                            const S even = phase_x ? weight[2 * a][2 * b + 1] : weight[2 * a][2 * b];
                            const S odd = phase_x ? weight[2 * a + 1][2 * b + 1]
                                                  : weight[2 * a + 1][2 * b];
                            w = phase_y ? odd : even;
                        } else {
                            w = weight[a][b];
                        }
                        sum += w * row[a][b][v];
                    }
                out.v[v] = store<T, S>(sum);
            }
            *reinterpret_cast<Pack<T, V>*>(target + oy * f.out_stride[2]) = out;
        }
    }
}

int blocks_for(int64_t threads, int per_block) {
    const int64_t wanted = (threads + per_block - 1) / per_block;
    return (int)(wanted < 1 ? 1 : wanted > (1 << 30) ? (1 << 30) : wanted);
}

template <typename T, int V>
void launch_small(const T* x, const float* taps, T* y, const Filter& f, bool channels_last,
                  cudaStream_t stream) {
    const int64_t groups = f.channels / V;
    const int64_t total = f.n * groups * ((f.out_h + kRows - 1) / kRows) * f.out_w;
    const int blocks = blocks_for(total, 128);
    if (f.up == 2)
        filter_small<T, V, 2, 1><<<blocks, 128, 0, stream>>>(x, taps, y, f, groups, channels_last);
    else if (f.down == 2)
        filter_small<T, V, 1, 2><<<blocks, 128, 0, stream>>>(x, taps, y, f, groups, channels_last);
    else
        filter_small<T, V, 1, 1><<<blocks, 128, 0, stream>>>(x, taps, y, f, groups, channels_last);
}

template <typename T>
int run_filter(const void* xv, const float* taps, void* yv, const Filter& f, cudaStream_t stream) {
    const T* x = static_cast<const T*>(xv);
    T* y = static_cast<T*>(yv);
    const bool channels_last = f.out_stride[1] == 1 && f.channels > 1;
    const bool small = f.kh <= 4 && f.kw <= 4 && f.up * f.down <= 2;
    constexpr int V = 8 / sizeof(T) < 2 ? 2 : 8 / sizeof(T);
    if (f.n * f.channels * f.out_h * f.out_w == 0) return 0;
    if (!small) {
        const int64_t total = f.n * f.channels * f.out_h * f.out_w;
        filter_any<T><<<blocks_for(total, 256), 256, 0, stream>>>(x, taps, y, f, channels_last);
    } else if (channels_last && f.channels % V == 0 && (uintptr_t)x % (sizeof(T) * V) == 0
               && (uintptr_t)y % (sizeof(T) * V) == 0) {
        launch_small<T, V>(x, taps, y, f, true, stream);
    } else {
        launch_small<T, 1>(x, taps, y, f, channels_last, stream);
    }
    return (int)cudaGetLastError();
}

// y = clamp(gain * lrelu(x + b)); with `saved` the derivative: x * gain * (1 or slope) wherever
// the saved output is inside the clamp, by the sign of the saved output.
template <typename T, int V>
__global__ void activate(const T* __restrict__ x, const T* __restrict__ bias,
                         const T* __restrict__ saved, T* __restrict__ y, int64_t n_packs,
                         int64_t inner, int64_t channels, float slope, float gain, float limit) {
    using S = typename Sum<T>::type;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n_packs;
         i += (int64_t)gridDim.x * blockDim.x) {
        const Pack<T, V> in = reinterpret_cast<const Pack<T, V>*>(x)[i];
        Pack<T, V> out, old;
        if (saved) old = reinterpret_cast<const Pack<T, V>*>(saved)[i];
        // With inner == 1 (channels last) the V values are V neighbouring channels.
        const int64_t c0 = bias ? (i * V / inner) % channels : 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            S value = load(in.v[v]);
            if (saved) {
                const S s = load(old.v[v]);
                value *= (S)gain * (s < 0 ? (S)slope : (S)1);
                if (limit >= 0 && (s >= (S)limit || s <= -(S)limit)) value = 0;
            } else {
                if (bias) value += load(bias[inner == 1 ? c0 + v : c0]);
                value *= (S)gain * (value < 0 ? (S)slope : (S)1);
                if (limit >= 0) {
                    value = value > (S)limit ? (S)limit : value;
                    value = value < -(S)limit ? -(S)limit : value;
                }
            }
            out.v[v] = store<T, S>(value);
        }
        reinterpret_cast<Pack<T, V>*>(y)[i] = out;
    }
}

template <typename T>
int run_activate(const void* xv, const void* bias, const void* saved, void* yv, int64_t total,
                 int64_t inner, int64_t channels, float slope, float gain, float limit,
                 cudaStream_t stream) {
    const T* x = static_cast<const T*>(xv);
    const T* b = static_cast<const T*>(bias);
    const T* s = static_cast<const T*>(saved);
    T* y = static_cast<T*>(yv);
    constexpr int V = 16 / sizeof(T);
    if (total == 0) return 0;
    const uintptr_t where = (uintptr_t)x | (uintptr_t)y | (uintptr_t)s;
    const bool whole = total % V == 0 && where % 16 == 0
        && (!bias || (inner == 1 ? channels % V == 0 : inner % V == 0));
    if (whole)
        activate<T, V><<<blocks_for(total / V, 256), 256, 0, stream>>>(
            x, b, s, y, total / V, inner, channels, slope, gain, limit);
    else
        activate<T, 1><<<blocks_for(total, 256), 256, 0, stream>>>(
            x, b, s, y, total, inner, channels, slope, gain, limit);
    return (int)cudaGetLastError();
}

}  // namespace

enum { kFloat = 0, kHalf = 1, kBfloat16 = 2, kDouble = 3 };

// sizes: n, c, in_h, in_w, out_h, out_w, 4 input strides, 4 output strides (n, c, h, w).
extern "C" int ksalsa_upfirdn2d(const void* x, const float* taps, void* y, const int64_t* sizes,
                                int up, int down, int left, int top, int kh, int kw, int dtype,
                                void* stream) {
    Filter f;
    f.n = sizes[0]; f.channels = sizes[1]; f.in_h = sizes[2]; f.in_w = sizes[3];
    f.out_h = sizes[4]; f.out_w = sizes[5];
    for (int i = 0; i < 4; ++i) { f.in_stride[i] = sizes[6 + i]; f.out_stride[i] = sizes[10 + i]; }
    f.up = up; f.down = down; f.left = left; f.top = top; f.kh = kh; f.kw = kw;
    cudaStream_t s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case kFloat: return run_filter<float>(x, taps, y, f, s);
        case kHalf: return run_filter<__half>(x, taps, y, f, s);
        case kBfloat16: return run_filter<__nv_bfloat16>(x, taps, y, f, s);
        case kDouble: return run_filter<double>(x, taps, y, f, s);
    }
    return (int)cudaErrorInvalidValue;
}

// bias and saved may be null. inner: elements between two channels (1 for channels last).
// limit < 0: no clamp.
extern "C" int ksalsa_activate(const void* x, const void* bias, const void* saved, void* y,
                               int64_t total, int64_t inner, int64_t channels, float slope,
                               float gain, float limit, int dtype, void* stream) {
    cudaStream_t s = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case kFloat:
            return run_activate<float>(x, bias, saved, y, total, inner, channels, slope, gain,
                                       limit, s);
        case kHalf:
            return run_activate<__half>(x, bias, saved, y, total, inner, channels, slope, gain,
                                        limit, s);
        case kBfloat16:
            return run_activate<__nv_bfloat16>(x, bias, saved, y, total, inner, channels, slope,
                                               gain, limit, s);
        case kDouble:
            return run_activate<double>(x, bias, saved, y, total, inner, channels, slope, gain,
                                        limit, s);
    }
    return (int)cudaErrorInvalidValue;
}
