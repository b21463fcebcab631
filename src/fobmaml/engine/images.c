/* Gradients of a network of convolutions, norms, activations, pools, sums and attention with a softmax cross-entropy, for many rows
of parameters and many steps in one call.

Each row has its own parameters and examples and belongs to one thread, which takes a few examples through all nodes and
back before the next, so that their signals stay in the cache. Signals are channels-last, each channel vector filled up
with zeros to whole vector registers, and padded as the nodes that read them ask for: of a window, what lies in one
line of the image is a run of consecutive numbers, and nothing is copied for it. The products are sums over tiles held
in registers. A dense layer is a convolution whose window is the whole image.

No intrinsics: the vector extensions that GCC and Clang share. */

#include <math.h>

#include "threads.h"
#include "vectors.h"

#if LANES == 8
enum { HEIGHT = 6, WIDTH = 2 }; /* a tile is HEIGHT x WIDTH vectors: 12 of AVX2's 16 registers */
#else
enum { HEIGHT = 6, WIDTH = 4 }; /* 24 of 32 */
#endif
enum { DEPTH = 64, WINDOWS = 64 }; /* summed at a time: what is read again and again has to stay in the first cache */
enum { TILES = 60, MOST_PARTS = 36 }; /* tiles transformed at a time, and places of the largest */
/* kinds of nodes, those up to EMBEDDING with parameters, and of activations */
enum { CONVOLUTION, NORM, LAYER, SHIFT, EMBEDDING, MAXIMUM, AVERAGE, SUM, ATTENTION };
enum { IDENTITY, SILU, RELU, TANH, GELU };

#define ROUND(a) (CEIL(a, LANES) * LANES)

/* What enters has ``in`` channels of height x width, what leaves ``out`` of height_out x width_out. A window takes
kernel_height x kernel_width places and moves by strides; the padding is on both sides.

CONVOLUTION: weights of ``out`` outputs and biases [out] at the places ``weight`` and ``bias`` of a row; a negative place
says that there are none. From a channel's weight to the next's it is ``channel_step`` numbers, from a window's place to
the next ``place_step``. NORM: of ``groups`` groups of channels, 0 for none, with a gain and a
shift there, then the activation. LAYER: a norm of each place's channels, by their
mean square where ``groups`` is 0. SHIFT: adds the parameters [places][channels]
at ``weight``. EMBEDDING: of each whole number that enters the channels of that number, of a table [groups][channels]
there. MAXIMUM and AVERAGE of each window. SUM of two signals, then the activation. ATTENTION of ``groups`` heads
among the places of a line, of which the channels are queries, keys and values.

The signal that enters is that number ``of``, 0 for the inputs and l + 1 for what node l gives; a sum's second is
``other``. Node 0, and convolutions or embeddings alone, take the inputs; of the others, each signal is taken by somebody, and the last
one by nobody. */
typedef struct {
    int64_t kind, in, height, width, out, height_out, width_out, kernel_height, kernel_width, stride_height,
        stride_width, pad_height, pad_width, weight, bias, channel_step, place_step, groups, activation, of, other;
    double eps;
} Node;

/* How a signal lies: [examples][top + height + ..][left + width + ..][channels]; numbers from a pixel, a line, an image to
the next. Channels are filled up to whole vectors, of the inputs not. */
typedef struct {
    int64_t pixel, line, image, top, left;
} Layout;

/* What a thread keeps of a node, for a block of examples. Windows m go over all examples. */
typedef struct {
    Layout in, in_other;
    float *h, *other;     /* what enters, and a sum's second */
    float *gh, *g_other;  /* the loss's derivative by them, as far as it comes by this node */
    float *all, *all_other; /* where the nodes behind have left theirs by the same signals, NULL for none */
    float *z, *gz;        /* what leaves, and the loss's derivative by it */
    int64_t *from, *to, *from_other; /* where window m starts in h, where its outputs go in z, and its place in other */
    float *weights;       /* as panels [kernel_height * kernel_width * in][up to WIDTH vectors of out]; a gain */
    float *transposed;    /* as panels [kernel_height][.. of kernel_width * in][out][up to WIDTH vectors of them] */
                          /* of tiles: [parts] such panels [in][.. of out], g_weights too, and [out][.. of in] */
    float *bias;          /* or a shift */
    float *g_weights;     /* the derivative by the weights, [kernel_height * kernel_width * in][out]; by the gain */
    float *g_bias;
    float *mean, *inverse, *factor; /* of a norm: [examples][in] each; 1 / deviation, and gain times that */
                          /* of a norm of each place: [examples][places] */
    float *shares;        /* of attention, [examples][heads][panels of queries][keys][queries] */
    float *room;          /* for a head's numbers in other orders: see ``Room`` */
    float *sum, *product; /* [in] each */
    float *columns;       /* room for weights in another order, [in * kernel_height * kernel_width][LANES] */
    float *tiles_in, *tiles_out; /* what enters and leaves tiles, transformed: [parts][TILES][in or out] */
} Buffers;

/* The normal distribution's function, within 2e-7 (Abramowitz and Stegun, 7.1.26); ``bell`` = e^(-y^2 / 2). */
INLINE vec normal(vec y, vec bell) {
    vec size = choose(y < 0.0f, -y, y) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * size);
    vec p = 1.061405429f * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = 0.5f * p * t * bell;
    return choose(y < 0.0f, tail, 1.0f - tail);
}

INLINE vec activate(const int activation, vec y) {
    if (activation == SILU) return y / (1.0f + exponential(-y));
    if (activation == RELU) return choose(y <= 0.0f, spread(0.0f), y);
    if (activation == TANH) return 1.0f - 2.0f / (1.0f + exponential(2.0f * y));
    if (activation == GELU) return y * normal(y, exponential(-0.5f * y * y));
    return y;
}

/* The derivative of ``activate``. */
INLINE vec slope(const int activation, vec y) {
    if (activation == SILU) {
        vec s = 1.0f / (1.0f + exponential(-y));
        return s + y * s * (1.0f - s);
    }
    if (activation == RELU) return choose(y <= 0.0f, spread(0.0f), spread(1.0f));
    if (activation == TANH) {
        vec e = exponential(2.0f * y), s = 1.0f / (1.0f + e);
        return 4.0f * s * (1.0f - s);
    }
    if (activation == GELU) {
        vec bell = exponential(-0.5f * y * y);
        return normal(y, bell) + 0.39894228f * y * bell;
    }
    return spread(1.0f);
}

/* From a channel vector of what enters to the next. */
INLINE int64_t pixel(const Node *node) { return node->of ? ROUND(node->in) : node->in; }

/* How many tiles of ``side`` x ``side`` outputs there are in an image, and of how many numbers each is made. */
INLINE int64_t tiles_of(const Node *node, int64_t side) {
    return CEIL(node->height_out, side) * CEIL(node->width_out, side);
}

INLINE int64_t parts_of(int64_t side) { return (side + 2) * (side + 2); }

/* The products of an image in tiles of ``side`` x ``side`` outputs, with two tiles more for the weights: they are laid
out and read for a few images only. */
INLINE int64_t products_of(const Node *node, int64_t side) { return parts_of(side) * (tiles_of(node, side) + 2); }

/* The side of the tiles in which a convolution is done, see ``tiles_forward``: 4, 3, 2, or 0 for none. */
INLINE int64_t tiled(const Node *node) {
    if (!node->of || node->kind != CONVOLUTION || node->kernel_height != 3 || node->kernel_width != 3 ||
        node->stride_height != 1 || node->stride_width != 1)
        return 0;
    int64_t side = products_of(node, 3) < products_of(node, 4) ? 3 : 4;
    if (products_of(node, side) < products_of(node, 2)) return side;
    return 20 * tiles_of(node, 2) <= 9 * node->height_out * node->width_out ? 2 : 0;
}

INLINE int64_t windows_of(const Node *node) { return node->height_out * node->width_out; }

/* Numbers that an output's weights take, for the products. */
INLINE int64_t depth_of(const Node *node) {
    if (node->kind == SHIFT) return windows_of(node);
    if (node->kind != CONVOLUTION) return node->kind == EMBEDDING ? node->groups : 1;
    return (tiled(node) ? parts_of(tiled(node)) : node->kernel_height * node->kernel_width) * pixel(node);
}

/* sum[i][v] += sum over p of a[i][p] * panel[p][v], for ``width`` vectors. */
INLINE void multiply(const int width, int64_t depth, const float *const a[HEIGHT], const float *panel,
                     vec sum[HEIGHT][WIDTH]) {
    for (int64_t p = 0; p < depth; p++) {
        vec b[WIDTH];
        UNROLL for (int v = 0; v < width; v++) b[v] = load(panel + (p * width + v) * LANES);
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            float factor = a[i][p];
            UNROLL for (int v = 0; v < width; v++) sum[i][v] += factor * b[v];
        }
    }
}

/* z (+)= the products of ``lines`` lines of ``run`` numbers of each window with ``panel``, from the bias on where there
is one given. */
INLINE void window_products(const int width, int64_t windows, const float *h, const int64_t *from, int64_t lines,
                            int64_t line, int64_t run, const float *panel, const float *bias, float *z,
                            const int64_t *to) {
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        vec sum[HEIGHT][WIDTH];
        const float *a[HEIGHT];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            int64_t window = MIN(m + i, windows - 1);
            a[i] = h + from[window];
            UNROLL for (int v = 0; v < width; v++) sum[i][v] = load((bias ? bias : z + to[window]) + v * LANES);
        }
        for (int64_t y = 0; y < lines; y++) {
            multiply(width, run, a, panel + y * run * width * LANES, sum);
            UNROLL for (int i = 0; i < HEIGHT; i++) a[i] += line;
        }
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            if (m + i == windows) break;
            UNROLL for (int v = 0; v < width; v++) store(z + to[m + i] + v * LANES, sum[i][v]);
        }
    }
}

/* z = W h + b. */
static void convolve(const Node *node, int64_t windows, const Buffers *at) {
    int64_t run = node->kernel_width * pixel(node), depth = node->kernel_height * run, step = at->in.line;
    int64_t lines = run < DEPTH ? MIN(DEPTH / run, node->kernel_height) : 1, some;
    EACH_PANEL(ROUND(node->out), first, width) {
        for (int64_t y = 0; y < node->kernel_height; y += lines) for (int64_t k = 0; k < run; k += some) {
            some = MIN(run - k, DEPTH);
#define PRODUCTS(width)                                                                                             \
    window_products(width, windows, at->h + y * step + k, at->from, MIN(lines, node->kernel_height - y), step, some, \
                    at->weights + first * depth + (y * run + k) * width * LANES, y + k ? NULL : at->bias + first,     \
                    at->z + first, at->to)
            BY_WIDTH(width, PRODUCTS);
#undef PRODUCTS
        }
    }
}

/* gh += gz W, for ``width`` vectors of a line of each window. */
INLINE void input_products(const int width, int64_t windows, int64_t out, const float *gz, const int64_t *to,
                           const float *panel, float *gh, const int64_t *from) {
    for (int64_t m = 0; m < windows; m += HEIGHT) {
        vec sum[HEIGHT][WIDTH];
        const float *a[HEIGHT];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            a[i] = gz + to[MIN(m + i, windows - 1)];
            UNROLL for (int v = 0; v < width; v++) sum[i][v] = spread(0.0f);
        }
        multiply(width, out, a, panel, sum);
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            if (m + i == windows) break;
            float *p = gh + from[m + i];
            UNROLL for (int v = 0; v < width; v++) store(p + v * LANES, load(p + v * LANES) + sum[i][v]);
        }
    }
}

static void input_gradient(const Node *node, int64_t examples, const Buffers *at) {
    int64_t run = node->kernel_width * pixel(node), windows = examples * windows_of(node);
    memset(at->gh, 0, examples * at->in.image * sizeof(float));
    for (int64_t y = 0; y < node->kernel_height; y++) EACH_PANEL(run, first, width) {
#define PRODUCTS(width)                                                                                              \
    input_products(width, windows, node->out, at->gz, at->to, at->transposed + (y * run + first) * node->out,       \
                   at->gh + y * at->in.line + first, at->from)
        BY_WIDTH(width, PRODUCTS);
#undef PRODUCTS
    }
}

/* g (+)= sum: added, or put there where nothing is ``there``. */
INLINE void add_rows(const int width, vec sum[HEIGHT][WIDTH], float *g, int64_t stride, int64_t rows, int there) {
    UNROLL for (int i = 0; i < HEIGHT; i++) {
        if (i == rows) break;
        float *p = g + i * stride;
        UNROLL for (int v = 0; v < width; v++)
            store(p + v * LANES, there ? load(p + v * LANES) + sum[i][v] : sum[i][v]);
    }
}

/* g[k + i] += the sum over windows of h[i][from] gz[to], for HEIGHT rows i and ``width`` vectors; ``rows`` of them
count. */
INLINE void weight_products(const int width, int64_t windows, const float *const h[HEIGHT], const int64_t *from,
                            const float *gz, const int64_t *to, float *g, int64_t stride, int64_t rows) {
    vec sum[HEIGHT][WIDTH];
    UNROLL for (int i = 0; i < HEIGHT; i++) UNROLL for (int v = 0; v < width; v++) sum[i][v] = spread(0.0f);
    for (int64_t m = 0; m < windows; m++) {
        vec b[WIDTH];
        UNROLL for (int v = 0; v < width; v++) b[v] = load(gz + to[m] + v * LANES);
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            float factor = h[i][from[m]];
            UNROLL for (int v = 0; v < width; v++) sum[i][v] += factor * b[v];
        }
    }
    add_rows(width, sum, g, stride, rows, 1);
}

static void weight_gradient(const Node *node, int64_t windows, const Buffers *at) {
    int64_t run = node->kernel_width * pixel(node), depth = node->kernel_height * run, out = ROUND(node->out);
    for (int64_t m = 0; m < windows; m += WINDOWS) {
        int64_t some = MIN(windows - m, WINDOWS);
        for (int64_t k = 0; k < depth; k += HEIGHT) {
            const float *h[HEIGHT];
            for (int i = 0; i < HEIGHT; i++) {
                int64_t place = MIN(k + i, depth - 1);
                h[i] = at->h + place / run * at->in.line + place % run;
            }
            EACH_PANEL(out, first, width) {
#define PRODUCTS(width)                                                                                             \
    weight_products(width, some, h, at->from + m, at->gz + first, at->to + m, at->g_weights + k * out + first, out, \
                    depth - k)
                BY_WIDTH(width, PRODUCTS);
#undef PRODUCTS
            }
        }
    }
}

static void bias_gradient(const Node *node, int64_t windows, const Buffers *at) {
    for (int64_t o = 0; o < ROUND(node->out); o += LANES) {
        vec sum = load(at->g_bias + o);
        for (int64_t m = 0; m < windows; m++) sum += load(at->gz + at->to[m] + o);
        store(at->g_bias + o, sum);
    }
}

/* Windows of 3 x 3 at stride 1 by Winograd's F(m x m, 3 x 3), m = 2, 3 or 4, as in Lavin and Gray, Fast algorithms for
convolutional neural networks (2016): of a tile d of (m + 2) x (m + 2) inputs and the weights g the m x m outputs are
A' [(G g G') * (B' d B)] A, ' for transposed: 16 products of channels in place of 36, 25 in place of 81, or 36 in place of
144. Its derivatives are G' [(A gz A') * (B' d B)] G and B [(G g G') * (A gz A')] B'.

The polynomials behind it are known at 0, 1, -1 and infinity for m = 2, at 0, P, -P, Q and infinity for m = 3, and at -Q,
too, for m = 4: with 3/4 and 3/2 the roundings are half of what they are with the customary 1 and 2, and twice those of
the plain sums. Here are B', A and G applied to a column; the others are their transposes. */
#define P 0.75f
#define Q 1.5f
enum { UP_TO = 6 }; /* numbers in a column */

/* A polynomial at a point and its negative, of its even and its odd powers. */
INLINE void both_signs(vec *t, int64_t step, vec even, vec odd) {
    t[0] = even + odd;
    t[step] = even - odd;
}

INLINE void inputs_apart(const int m, vec *t, int64_t step) {
    vec d[UP_TO];
    UNROLL for (int i = 0; i < m + 2; i++) d[i] = t[i * step];
    if (m == 2) {
        t[0] = d[0] - d[2];
        t[step] = d[1] + d[2];
        t[2 * step] = d[2] - d[1];
        t[3 * step] = d[1] - d[3];
    } else if (m == 3) {
        t[0] = P * P * Q * d[0] - P * P * d[1] - Q * d[2] + d[3];
        both_signs(t + step, step, d[3] - Q * d[2], P * d[2] - P * Q * d[1]);
        t[3 * step] = d[3] - P * P * d[1];
        t[4 * step] = P * P * Q * d[1] - P * P * d[2] - Q * d[3] + d[4];
    } else {
        vec even = d[4] - Q * Q * d[2], odd = P * d[3] - P * Q * Q * d[1];
        vec second = d[4] - P * P * d[2], other = Q * d[3] - Q * P * P * d[1];
        t[0] = P * P * Q * Q * d[0] - (P * P + Q * Q) * d[2] + d[4];
        both_signs(t + step, step, even, odd);
        both_signs(t + 3 * step, step, second, other);
        t[5 * step] = P * P * Q * Q * d[1] - (P * P + Q * Q) * d[3] + d[5];
    }
}

INLINE void inputs_together(const int m, vec *t, int64_t step) {
    vec v[UP_TO];
    UNROLL for (int i = 0; i < m + 2; i++) v[i] = t[i * step];
    vec sum = v[1] + v[2], less = v[1] - v[2];
    if (m == 2) {
        t[step] = less + v[3];
        t[2 * step] = sum - v[0];
        t[3 * step] = -v[3];
    } else if (m == 3) {
        t[0] = P * P * Q * v[0];
        t[step] = P * P * Q * v[4] - P * P * (v[0] + v[3]) - P * Q * less;
        t[2 * step] = P * less - Q * (v[0] + sum) - P * P * v[4];
        t[3 * step] = v[0] + sum + v[3] - Q * v[4];
    } else {
        vec second = v[3] + v[4], other = v[3] - v[4];
        t[0] = P * P * Q * Q * v[0];
        t[step] = P * P * Q * Q * v[5] - P * Q * Q * less - Q * P * P * other;
        t[2 * step] = -(P * P + Q * Q) * v[0] - Q * Q * sum - P * P * second;
        t[3 * step] = P * less + Q * other - (P * P + Q * Q) * v[5];
        t[4 * step] = v[0] + sum + second;
        t[5 * step] = v[5];
    }
}

INLINE void outputs_apart(const int m, vec *t, int64_t step) {
    vec y[UP_TO];
    UNROLL for (int i = 0; i < m; i++) y[i] = t[i * step];
    if (m == 2) {
        t[step] = y[0] + y[1];
        t[2 * step] = y[0] - y[1];
        t[3 * step] = -y[1];
    } else if (m == 3) {
        both_signs(t + step, step, y[0] + P * P * y[2], P * y[1]);
        t[3 * step] = y[0] + Q * y[1] + Q * Q * y[2];
        t[4 * step] = y[2];
    } else {
        vec even = y[0] + P * P * y[2], odd = P * y[1] + P * P * P * y[3];
        vec second = y[0] + Q * Q * y[2], other = Q * y[1] + Q * Q * Q * y[3];
        both_signs(t + step, step, even, odd);
        both_signs(t + 3 * step, step, second, other);
        t[5 * step] = y[3];
    }
}

INLINE void outputs_together(const int m, vec *t, int64_t step) {
    vec v[UP_TO];
    UNROLL for (int i = 0; i < m + 2; i++) v[i] = t[i * step];
    vec sum = v[1] + v[2], less = v[1] - v[2];
    if (m == 2) {
        t[0] = v[0] + sum;
        t[step] = less - v[3];
    } else if (m == 3) {
        t[0] = v[0] + sum + v[3];
        t[step] = P * less + Q * v[3];
        t[2 * step] = P * P * sum + Q * Q * v[3] + v[4];
    } else {
        vec second = v[3] + v[4], other = v[3] - v[4];
        t[0] = v[0] + sum + second;
        t[step] = P * less + Q * other;
        t[2 * step] = P * P * sum + Q * Q * second;
        t[3 * step] = P * P * P * less + Q * Q * Q * other + v[5];
    }
}

/* One by the differences of a point to the others: of m = 3 that of Q is twice m = 4's, times Q. */
#define SHARE_P (0.5f / (P * P * (P * P - Q * Q)))
#define SHARE_Q (0.5f / (Q * Q * (Q * Q - P * P)))

INLINE void weights_apart(const int m, vec *t, int64_t step) {
    vec g[UP_TO];
    UNROLL for (int i = 0; i < 3; i++) g[i] = t[i * step];
    if (m == 2) {
        t[step] = 0.5f * (g[0] + g[2] + g[1]);
        t[2 * step] = 0.5f * (g[0] + g[2] - g[1]);
        t[3 * step] = g[2];
    } else if (m == 3) {
        vec even = g[0] + P * P * g[2], odd = P * g[1];
        t[0] = 1.0f / (P * P * Q) * g[0];
        t[step] = SHARE_P * (P + Q) * (even + odd);
        t[2 * step] = SHARE_P * (Q - P) * (even - odd);
        t[3 * step] = 2.0f * Q * SHARE_Q * (g[0] + Q * g[1] + Q * Q * g[2]);
        t[4 * step] = g[2];
    } else {
        vec even = SHARE_P * g[0] + SHARE_P * P * P * g[2], odd = SHARE_P * P * g[1];
        vec second = SHARE_Q * g[0] + SHARE_Q * Q * Q * g[2], other = SHARE_Q * Q * g[1];
        t[0] = 1.0f / (P * P * Q * Q) * g[0];
        both_signs(t + step, step, even, odd);
        both_signs(t + 3 * step, step, second, other);
        t[5 * step] = g[2];
    }
}

INLINE void weights_together(const int m, vec *t, int64_t step) {
    vec v[UP_TO];
    UNROLL for (int i = 0; i < m + 2; i++) v[i] = t[i * step];
    vec sum = v[1] + v[2], less = v[1] - v[2];
    if (m == 2) {
        t[0] = v[0] + 0.5f * sum;
        t[step] = 0.5f * less;
        t[2 * step] = v[3] + 0.5f * sum;
    } else if (m == 3) {
        vec at_p = SHARE_P * (P + Q) * v[1], at_minus_p = SHARE_P * (Q - P) * v[2], at_q = 2.0f * Q * SHARE_Q * v[3];
        t[0] = 1.0f / (P * P * Q) * v[0] + at_p + at_minus_p + at_q;
        t[step] = P * (at_p - at_minus_p) + Q * at_q;
        t[2 * step] = P * P * (at_p + at_minus_p) + Q * Q * at_q + v[4];
    } else {
        vec second = v[3] + v[4], other = v[3] - v[4];
        t[0] = 1.0f / (P * P * Q * Q) * v[0] + SHARE_P * sum + SHARE_Q * second;
        t[step] = SHARE_P * P * less + SHARE_Q * Q * other;
        t[2 * step] = SHARE_P * P * P * sum + SHARE_Q * Q * Q * second + v[5];
    }
}
#undef SHARE_P
#undef SHARE_Q
#undef P
#undef Q

/* CALL(m, t + .., ..) for the columns, then the rows, of t, ``first`` and ``second`` of them. */
#define BOTH_WAYS(CALL, m, t, first, second)                                          \
    do {                                                                              \
        UNROLL for (int j = 0; j < (first); j++) CALL(m, (t) + j, (m) + 2);           \
        UNROLL for (int i = 0; i < (second); i++) CALL(m, (t) + ((m) + 2) * i, 1);    \
    } while (0)
/* CALL(m), with a side known to the compiler. */
#define BY_SIDE(m, CALL)         \
    do {                         \
        if ((m) == 2) CALL(2);   \
        else if ((m) == 3) CALL(3); \
        else CALL(4);            \
    } while (0)

/* Of a tile whose first output is window w of an image: how many of its lines and columns are in the image, or more. */
INLINE void inside(const Node *node, int64_t w, int64_t *lines, int64_t *columns) {
    int64_t place = w % windows_of(node);
    *lines = node->height_out - place / node->width_out;
    *columns = node->width_out - place % node->width_out;
}

/* Tiles ``first`` to ``first`` + ``some``: their first windows. */
static void tile_windows(const Node *node, int64_t m, int64_t first, int64_t some, int64_t *window) {
    int64_t across = CEIL(node->width_out, m), each = tiles_of(node, m);
    for (int64_t q = 0; q < some; q++) {
        int64_t n = (first + q) / each, tile = (first + q) % each;
        window[q] = (n * node->height_out + tile / across * m) * node->width_out + tile % across * m;
    }
}

/* B' d B for some tiles, into [parts][TILES][in]. */
INLINE void enter_tiles(const int m, const Node *node, const Buffers *at, int64_t some, const int64_t *window) {
    int64_t in = pixel(node), step = at->in.line;
    for (int64_t q = 0; q < some; q++) for (int64_t c = 0; c < in; c += LANES) {
        vec t[MOST_PARTS];
        const float *h = at->h + at->from[window[q]] + c;
        UNROLL for (int i = 0; i < m + 2; i++) UNROLL for (int j = 0; j < m + 2; j++)
            t[(m + 2) * i + j] = load(h + i * step + j * in);
        BOTH_WAYS(inputs_apart, m, t, m + 2, m + 2);
        for (int k = 0; k < (m + 2) * (m + 2); k++) store(at->tiles_in + (k * TILES + q) * in + c, t[k]);
    }
}

/* A gz A' for some tiles, into [parts][TILES][out]. */
INLINE void enter_slopes(const int m, const Node *node, const Buffers *at, int64_t some, const int64_t *window) {
    int64_t out = ROUND(node->out), lines, columns;
    for (int64_t q = 0; q < some; q++) {
        inside(node, window[q], &lines, &columns);
        for (int64_t o = 0; o < out; o += LANES) {
            vec t[MOST_PARTS];
            UNROLL for (int i = 0; i < m; i++) UNROLL for (int j = 0; j < m; j++) {
                const int64_t *to = at->to + window[q] + i * node->width_out + j;
                t[(m + 2) * i + j] = i < lines && j < columns ? load(at->gz + *to + o) : spread(0.0f);
            }
            BOTH_WAYS(outputs_apart, m, t, m, m + 2);
            for (int k = 0; k < (m + 2) * (m + 2); k++) store(at->tiles_out + (k * TILES + q) * out + o, t[k]);
        }
    }
}

/* z = A' [..] A + b. */
INLINE void leave_tiles(const int m, const Node *node, const Buffers *at, int64_t some, const int64_t *window) {
    int64_t out = ROUND(node->out), lines, columns;
    for (int64_t q = 0; q < some; q++) {
        inside(node, window[q], &lines, &columns);
        for (int64_t o = 0; o < out; o += LANES) {
            vec t[MOST_PARTS], bias = load(at->bias + o);
            for (int k = 0; k < (m + 2) * (m + 2); k++) t[k] = load(at->tiles_out + (k * TILES + q) * out + o);
            BOTH_WAYS(outputs_together, m, t, m + 2, m);
            UNROLL for (int i = 0; i < m; i++) UNROLL for (int j = 0; j < m; j++) {
                const int64_t *to = at->to + window[q] + i * node->width_out + j;
                if (i < lines && j < columns) store(at->z + *to + o, t[(m + 2) * i + j] + bias);
            }
        }
    }
}

/* gh += B [..] B'. */
INLINE void leave_slopes(const int m, const Node *node, const Buffers *at, int64_t some, const int64_t *window) {
    int64_t in = pixel(node), step = at->in.line;
    for (int64_t q = 0; q < some; q++) for (int64_t c = 0; c < in; c += LANES) {
        vec t[MOST_PARTS];
        float *gh = at->gh + at->from[window[q]] + c;
        for (int k = 0; k < (m + 2) * (m + 2); k++) t[k] = load(at->tiles_in + (k * TILES + q) * in + c);
        BOTH_WAYS(inputs_together, m, t, m + 2, m + 2);
        UNROLL for (int i = 0; i < m + 2; i++) UNROLL for (int j = 0; j < m + 2; j++)
            store(gh + i * step + j * in, load(gh + i * step + j * in) + t[(m + 2) * i + j]);
    }
}

/* For each place k of a tile, z[k] = a[k] times a matrix in panels, ``depth`` rows each of ``columns`` numbers. */
static void tile_products(int64_t parts, int64_t some, const float *a, int64_t stride, int64_t depth,
                          const float *panels, float *z, int64_t columns) {
    static const float zeros[WIDTH * LANES] __attribute__((aligned(64)));
    int64_t from[TILES], to[TILES];
    for (int64_t q = 0; q < some; q++) {
        from[q] = q * stride;
        to[q] = q * columns;
    }
    for (int64_t k = 0; k < parts; k++) EACH_PANEL(columns, first, width) {
#define PRODUCTS(width)                                                                               \
    window_products(width, some, a + k * TILES * stride, from, 1, 0, depth, panels + (k * columns + first) * depth, \
                    zeros, z + k * TILES * columns + first, to)
        BY_WIDTH(width, PRODUCTS);
#undef PRODUCTS
    }
}

/* EACH_TILES(some, window): of all tiles of the examples, TILES at a time. */
#define EACH_TILES(node, m, examples, some, window)                                                                 \
    for (int64_t first_ = 0, all_ = (examples) * tiles_of(node, m), some, window[TILES];                            \
         first_ < all_ && (some = MIN(TILES, all_ - first_)) && (tile_windows(node, m, first_, some, window), 1);    \
         first_ += some)

/* As ``convolve``. */
INLINE void tiles_forward(const int m, const Node *node, int64_t examples, const Buffers *at) {
    int64_t in = pixel(node), out = ROUND(node->out);
    EACH_TILES(node, m, examples, some, window) {
        enter_tiles(m, node, at, some, window);
        tile_products(parts_of(m), some, at->tiles_in, in, in, at->weights, at->tiles_out, out);
        leave_tiles(m, node, at, some, window);
    }
}

static void tiled_forward(const Node *node, int64_t examples, const Buffers *at) {
#define FORWARD(m) tiles_forward(m, node, examples, at)
    BY_SIDE(tiled(node), FORWARD);
#undef FORWARD
}

/* As ``weight_products``, of ``some`` tiles' inputs behind each other: fewer addresses to hold. */
INLINE void tile_weights(const int width, int64_t some, const float *h, int64_t in, const float *gz, int64_t out,
                         float *g, int64_t rows, int there) {
    vec sum[HEIGHT][WIDTH];
    UNROLL for (int i = 0; i < HEIGHT; i++) UNROLL for (int v = 0; v < width; v++) sum[i][v] = spread(0.0f);
    for (int64_t q = 0; q < some; q++, h += in, gz += out) {
        vec b[WIDTH];
        UNROLL for (int v = 0; v < width; v++) b[v] = load(gz + v * LANES);
        UNROLL for (int i = 0; i < HEIGHT; i++) UNROLL for (int v = 0; v < width; v++) sum[i][v] += h[i] * b[v];
    }
    add_rows(width, sum, g, width * LANES, rows, there);
}

/* As ``weight_gradient`` and ``input_gradient``; the former adds to what is ``there``, of other examples. */
INLINE void tiles_backward(const int m, const Node *node, int64_t examples, const Buffers *at, int there) {
    int64_t in = pixel(node), out = ROUND(node->out);
    memset(at->gh, 0, examples * at->in.image * sizeof(float));
    EACH_TILES(node, m, examples, some, window) {
        enter_tiles(m, node, at, some, window);
        enter_slopes(m, node, at, some, window);
        for (int64_t k = 0; k < parts_of(m); k++) EACH_PANEL(out, first, width) {
            const float *h = at->tiles_in + k * TILES * in, *gz = at->tiles_out + k * TILES * out + first;
            float *g = at->g_weights + (k * out + first) * in;
            for (int64_t c = 0; c < in; c += HEIGHT) {
#define PRODUCTS(width) \
    tile_weights(width, some, h + c, in, gz, out, g + c * width * LANES, in - c, there || first_)
                BY_WIDTH(width, PRODUCTS);
#undef PRODUCTS
            }
        }
        tile_products(parts_of(m), some, at->tiles_out, out, node->out, at->transposed, at->tiles_in, in);
        leave_slopes(m, node, at, some, window);
    }
}

static void tiled_backward(const Node *node, int64_t examples, const Buffers *at, int there) {
#define BACKWARD(m) tiles_backward(m, node, examples, at, there)
    BY_SIDE(tiled(node), BACKWARD);
#undef BACKWARD
}

/* The sums of ``width`` channel vectors over the windows of one example: of z, or of the squares of z - mean. */
INLINE void channel_sums(const int width, int64_t windows, const float *z, const int64_t *from, const float *mean,
                         float *sum) {
    vec total[WIDTH], middle[WIDTH];
    UNROLL for (int v = 0; v < width; v++) {
        total[v] = spread(0.0f);
        middle[v] = mean ? load(mean + v * LANES) : spread(0.0f);
    }
    for (int64_t m = 0; m < windows; m++) UNROLL for (int v = 0; v < width; v++) {
        vec part = load(z + from[m] + v * LANES) - middle[v];
        total[v] += mean ? part * part : part;
    }
    UNROLL for (int v = 0; v < width; v++) store(sum + v * LANES, total[v]);
}

/* The mean and the inverse deviation of every group of an example's channels. */
static void statistics(const Node *node, const Buffers *at, int64_t n) {
    int64_t windows = windows_of(node), in = ROUND(node->in), channels = node->in / node->groups;
    const int64_t *from = at->from + n * windows;
    float *mean = at->mean + n * in, *inverse = at->inverse + n * in, *factor = at->factor + n * in;
    for (int second = 0; second < 2; second++) {
        EACH_PANEL(in, first, width) {
#define SUMS(width) \
    channel_sums(width, windows, at->h + first, from, second ? mean + first : NULL, at->sum + first)
            BY_WIDTH(width, SUMS);
#undef SUMS
        }
        for (int64_t g = 0; g < node->in; g += channels) {
            double total = 0.0;
            for (int64_t c = g; c < g + channels; c++) total += at->sum[c];
            total /= (double)(channels * windows);
            for (int64_t c = g; c < g + channels; c++) {
                if (second) {
                    inverse[c] = (float)(1.0 / sqrt(total + node->eps));
                    factor[c] = at->weights[c] * inverse[c];
                } else {
                    mean[c] = (float)total;
                }
            }
        }
    }
}

/* h' = a(factor * (z - mean) + shift), of one example; without a norm h' = a(z). */
INLINE void pointwise(const int normed, const int activation, const Node *node, const Buffers *at, int64_t n) {
    int64_t windows = windows_of(node), in = ROUND(node->in);
    const int64_t *from = at->from + n * windows, *to = at->to + n * windows;
    for (int64_t m = 0; m < windows; m++) {
        const float *z = at->h + from[m];
        float *h = at->z + to[m];
        for (int64_t c = 0; c < in; c += LANES) {
            vec y = load(z + c);
            if (normed) y = (y - load(at->mean + n * in + c)) * load(at->factor + n * in + c) + load(at->bias + c);
            store(h + c, activate(activation, y));
        }
    }
}

/* gh = a'(y) gh', and its sums for ``width`` channel vectors: over all windows of an example, as it is and times
z - mean. */
INLINE void pointwise_slopes(const int width, const int normed, const int activation, const Node *node,
                             const Buffers *at, int64_t n, int64_t first) {
    int64_t windows = windows_of(node), in = ROUND(node->in);
    const int64_t *from = at->from + n * windows, *to = at->to + n * windows;
    vec sum[WIDTH], product[WIDTH], mean[WIDTH], factor[WIDTH], shift[WIDTH];
    UNROLL for (int v = 0; v < width; v++) {
        sum[v] = product[v] = spread(0.0f);
        if (!normed) continue;
        mean[v] = load(at->mean + n * in + first + v * LANES);
        factor[v] = load(at->factor + n * in + first + v * LANES);
        shift[v] = load(at->bias + first + v * LANES);
    }
    for (int64_t m = 0; m < windows; m++) UNROLL for (int v = 0; v < width; v++) {
        int64_t c = first + v * LANES;
        vec z = load(at->h + from[m] + c);
        if (normed) z -= mean[v];
        vec g = load(at->gz + to[m] + c) * slope(activation, normed ? z * factor[v] + shift[v] : z);
        store(at->gh + from[m] + c, g);
        sum[v] += g;
        product[v] += g * z;
    }
    UNROLL for (int v = 0; v < width; v++) {
        store(at->sum + first + v * LANES, sum[v]);
        store(at->product + first + v * LANES, product[v]);
    }
}

/* gh = factor * gh - inverse * (the group's mean of gain * gh) - (z - mean) * inverse^3 * (its mean of gain * gh *
(z - mean)), of one example, and the derivatives by gain and shift. */
static void norm_gradient(const Node *node, const Buffers *at, int64_t n) {
    int64_t windows = windows_of(node), in = ROUND(node->in), channels = node->in / node->groups;
    const float *mean = at->mean + n * in, *inverse = at->inverse + n * in, *factor = at->factor + n * in;
    for (int64_t g = 0; g < node->in; g += channels) {
        double sum = 0.0, product = 0.0, count = (double)(channels * windows);
        for (int64_t c = g; c < g + channels; c++) {
            sum += at->weights[c] * at->sum[c];
            product += at->weights[c] * at->product[c];
            at->g_bias[c] += at->sum[c];
            at->g_weights[c] += at->product[c] * inverse[c];
        }
        for (int64_t c = g; c < g + channels; c++) {
            at->sum[c] = (float)(sum / count * inverse[c]);
            at->product[c] = (float)(product / count * inverse[c] * inverse[c] * inverse[c]);
        }
    }
    for (int64_t m = n * windows; m < (n + 1) * windows; m++) {
        const float *z = at->h + at->from[m];
        float *g = at->gh + at->from[m];
        for (int64_t c = 0; c < in; c += LANES)
            store(g + c, load(factor + c) * load(g + c) - load(at->sum + c) -
                             load(at->product + c) * (load(z + c) - load(mean + c)));
    }
}

#define BY_ACTIVATION(activation, CALL)            \
    do {                                           \
        if ((activation) == SILU) CALL(SILU);      \
        else if ((activation) == RELU) CALL(RELU); \
        else if ((activation) == TANH) CALL(TANH); \
        else if ((activation) == GELU) CALL(GELU); \
        else CALL(IDENTITY);                       \
    } while (0)

static void normalize(const Node *node, int64_t examples, const Buffers *at) {
    for (int64_t n = 0; n < examples; n++) {
        if (node->groups) statistics(node, at, n);
#define VALUES(activation)                                        \
    do {                                                          \
        if (node->groups) pointwise(1, activation, node, at, n);  \
        else pointwise(0, activation, node, at, n);               \
    } while (0)
        BY_ACTIVATION(node->activation, VALUES);
#undef VALUES
    }
}

static void slopes(const Node *node, const Buffers *at, int64_t n, int64_t first, int64_t width) {
#define NORMED(width) pointwise_slopes(width, 1, kind, node, at, n, first)
#define PLAIN(width) pointwise_slopes(width, 0, kind, node, at, n, first)
#define SLOPES(activation)                        \
    do {                                          \
        enum { kind = activation };               \
        if (node->groups) BY_WIDTH(width, NORMED); \
        else BY_WIDTH(width, PLAIN);              \
    } while (0)
    BY_ACTIVATION(node->activation, SLOPES);
#undef SLOPES
#undef PLAIN
#undef NORMED
}

static void normalize_back(const Node *node, int64_t examples, const Buffers *at) {
    for (int64_t n = 0; n < examples; n++) {
        EACH_PANEL(ROUND(node->in), first, width) slopes(node, at, n, first, width);
        if (node->groups) norm_gradient(node, at, n);
    }
}

/* The maximum, which may be no number, or the mean of each window. */
static void pool(const Node *node, int64_t windows, const Buffers *at) {
    int64_t in = ROUND(node->in), step = at->in.line;
    float share = 1.0f / (float)(node->kernel_height * node->kernel_width);
    for (int64_t m = 0; m < windows; m++) for (int64_t c = 0; c < in; c += LANES) {
        const float *h = at->h + at->from[m] + c;
        vec found = node->kind == MAXIMUM ? load(h) : spread(0.0f);
        for (int64_t y = 0; y < node->kernel_height; y++) for (int64_t x = 0; x < node->kernel_width; x++) {
            vec other = load(h + y * step + x * in);
            if (node->kind == MAXIMUM) found = choose((other > found) | (other != other), other, found);
            else found += other;
        }
        store(at->z + at->to[m] + c, node->kind == MAXIMUM ? found : found * share);
    }
}

/* To the first of equal maxima, as in torch; or to all alike. */
INLINE void pool_panel(const int maximum, const int apart, const Node *node, int64_t in, int64_t step, const float *h,
                       float *gh, vec g, vec found) {
    ivec open = (ivec){0} - 1;
    for (int64_t y = 0; y < node->kernel_height; y++) for (int64_t x = 0; x < node->kernel_width; x++) {
        int64_t place = y * step + x * in;
        vec part = g;
        if (maximum) {
            ivec here = open & (load(h + place) == found);
            open &= ~here;
            part = (vec)(here & (ivec)g);
        }
        store(gh + place, apart ? part : load(gh + place) + part);
    }
}

static void pool_back(const Node *node, int64_t examples, const Buffers *at) {
    int64_t in = ROUND(node->in), step = at->in.line, windows = examples * windows_of(node);
    int apart = node->kernel_height <= node->stride_height && node->kernel_width <= node->stride_width;
    int whole = apart && node->height_out * node->kernel_height * node->width_out * node->kernel_width * in ==
                             at->in.image;
    float share = 1.0f / (float)(node->kernel_height * node->kernel_width);
    if (!whole) memset(at->gh, 0, examples * at->in.image * sizeof(float));
    for (int64_t m = 0; m < windows; m++) for (int64_t c = 0; c < in; c += LANES) {
        const float *h = at->h + at->from[m] + c;
        float *gh = at->gh + at->from[m] + c;
        vec g = load(at->gz + at->to[m] + c), found = load(at->z + at->to[m] + c);
        if (node->kind == AVERAGE) {
            if (apart) pool_panel(0, 1, node, in, step, h, gh, share * g, found);
            else pool_panel(0, 0, node, in, step, h, gh, share * g, found);
        } else {
            if (apart) pool_panel(1, 1, node, in, step, h, gh, g, found);
            else pool_panel(1, 0, node, in, step, h, gh, g, found);
        }
    }
}

/* h' = a(h + other). */
INLINE void add(const int activation, const Node *node, int64_t windows, const Buffers *at) {
    for (int64_t m = 0; m < windows; m++) for (int64_t c = 0; c < ROUND(node->in); c += LANES) {
        vec y = load(at->h + at->from[m] + c) + load(at->other + at->from_other[m] + c);
        store(at->z + at->to[m] + c, activate(activation, y));
    }
}

INLINE void add_back(const int activation, const Node *node, int64_t windows, const Buffers *at) {
    for (int64_t m = 0; m < windows; m++) for (int64_t c = 0; c < ROUND(node->in); c += LANES) {
        int64_t one = at->from[m] + c, two = at->from_other[m] + c;
        vec g = load(at->gz + at->to[m] + c);
        if (activation != IDENTITY) g *= slope(activation, load(at->h + one) + load(at->other + two));
        store(at->gh + one, g);
        store(at->g_other + two, g);
    }
}

/* The channels of each place get mean 0 and variance 1, then gain and shift. */
static void layer(const Node *node, int64_t windows, const Buffers *at) {
    float share = 1.0f / (float)node->in;
    for (int64_t m = 0; m < windows; m++) {
        const float *z = at->h + at->from[m];
        vec sum = spread(0.0f), square = spread(0.0f);
        for (int64_t c = 0; c < node->in; c += LANES) sum += load(z + c);
        vec mean = node->groups ? share * total(sum) : spread(0.0f);
        for (int64_t c = 0; c < node->in; c += LANES) {
            vec apart = only_first(load(z + c) - mean, node->in - c);
            square += apart * apart;
        }
        float inverse = 1.0f / sqrtf(share * total(square)[0] + (float)node->eps);
        at->mean[m] = mean[0];
        at->inverse[m] = inverse;
        for (int64_t c = 0; c < node->in; c += LANES)
            store(at->z + at->to[m] + c, (load(z + c) - mean) * inverse * load(at->weights + c) + load(at->bias + c));
    }
}

static void layer_back(const Node *node, int64_t windows, const Buffers *at) {
    float share = 1.0f / (float)node->in;
    for (int64_t m = 0; m < windows; m++) {
        const float *z = at->h + at->from[m], *g = at->gz + at->to[m];
        float mean = at->mean[m], inverse = at->inverse[m];
        vec sum = spread(0.0f), product = spread(0.0f);
        for (int64_t c = 0; c < node->in; c += LANES) {
            vec y = (load(z + c) - mean) * inverse, slope = load(g + c);
            store(at->g_bias + c, load(at->g_bias + c) + slope);
            store(at->g_weights + c, load(at->g_weights + c) + slope * y);
            slope *= load(at->weights + c);
            sum += slope;
            product += slope * y;
        }
        sum = node->groups ? share * total(sum) : spread(0.0f);
        product = share * total(product);
        for (int64_t c = 0; c < node->in; c += LANES) {
            vec y = (load(z + c) - mean) * inverse;
            store(at->gh + at->from[m] + c, inverse * (load(at->weights + c) * load(g + c) - sum - y * product));
        }
    }
}

static void shift(const Node *node, int64_t windows, const Buffers *at) {
    int64_t in = ROUND(node->in);
    for (int64_t m = 0; m < windows; m++) for (int64_t c = 0; c < in; c += LANES)
        store(at->z + at->to[m] + c, load(at->h + at->from[m] + c) + load(at->weights + m % windows_of(node) * in + c));
}

static void shift_back(const Node *node, int64_t windows, const Buffers *at) {
    int64_t in = ROUND(node->in);
    for (int64_t m = 0; m < windows; m++) for (int64_t c = 0; c < in; c += LANES) {
        float *sum = at->g_weights + m % windows_of(node) * in + c;
        vec g = load(at->gz + at->to[m] + c);
        store(sum, load(sum) + g);
        store(at->gh + at->from[m] + c, g);
    }
}

static void embed(const Node *node, int64_t windows, const Buffers *at) {
    int64_t out = ROUND(node->out);
    for (int64_t m = 0; m < windows; m++)
        memcpy(at->z + at->to[m], at->weights + (int64_t)at->h[at->from[m]] * out, out * sizeof(float));
}

static void embed_back(const Node *node, int64_t windows, const Buffers *at) {
    int64_t out = ROUND(node->out);
    for (int64_t m = 0; m < windows; m++) for (int64_t c = 0; c < out; c += LANES) {
        float *sum = at->g_weights + (int64_t)at->h[at->from[m]] * out + c;
        store(sum, load(sum) + load(at->gz + at->to[m] + c));
    }
}

/* Attention of a head, with queries q, keys k and values v [places][size], goes by panels of up to WIDTH vectors of
queries. The shares p[k][q] are the softmax over k of q . k / sqrt(size), and z = sum over k of p v. With g for the
derivative by z, s = p (g . v - sum over k of p (g . v)) is that by q . k / sqrt(size), and k's is the sum over q of s q,
v's that of p g. */
typedef struct {
    float *across;     /* keys or values, [size][places] */
    float *queries, *found; /* of a panel: queries or derivatives, and what comes of them, [size][panel] */
    float *slopes;     /* s, [places][panel] */
    float *beside;     /* queries or derivatives of a panel, [panel][up to WIDTH vectors of size] */
} Room;

/* How many numbers it takes; its places from ``room`` on, where that is given. */
static int64_t make_room(const Node *node, float *room, Room *at) {
    int64_t size = ROUND(node->out / node->groups), places = ROUND(windows_of(node)), panel = WIDTH * LANES;
    if (room)
        *at = (Room){room, room + size * places, room + size * (places + panel), room + size * (places + 2 * panel),
                     room + size * (places + 2 * panel) + places * panel};
    return size * (places + 2 * panel) + places * panel + panel * panel;
}

/* z[i] (+)= a[i] times a panel of ``depth`` x ``width`` vectors, for all rows i; ``more``: in addition. */
INLINE void product(const int width, const int more, int64_t rows, const float *a, int64_t step, int64_t depth,
                    const float *panel, float *z, int64_t z_step) {
    for (int64_t m = 0; m < rows; m += HEIGHT) {
        vec sum[HEIGHT][WIDTH];
        const float *row[HEIGHT];
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            row[i] = a + MIN(m + i, rows - 1) * step;
            UNROLL for (int v = 0; v < width; v++)
                sum[i][v] = more ? load(z + MIN(m + i, rows - 1) * z_step + v * LANES) : spread(0.0f);
        }
        multiply(width, depth, row, panel, sum);
        UNROLL for (int i = 0; i < HEIGHT; i++) {
            if (m + i == rows) break;
            UNROLL for (int v = 0; v < width; v++) store(z + (m + i) * z_step + v * LANES, sum[i][v]);
        }
    }
}

/* to[c][r] = factor * from[r][c], and zeros for rows up to ``filled``, which is the step of ``to``. */
static void across(const float *from, int64_t step, int64_t rows, int64_t columns, float factor, float *to,
                   int64_t filled) {
    for (int64_t c = 0; c < columns; c++) {
        for (int64_t r = 0; r < rows; r++) to[c * filled + r] = factor * from[r * step + c];
        for (int64_t r = rows; r < filled; r++) to[c * filled + r] = 0.0f;
    }
}

/* The softmax of each column of [places][width vectors]. */
INLINE void softmax(const int width, int64_t places, float *p) {
    UNROLL for (int v = 0; v < width; v++) {
        vec top = load(p + v * LANES), sum = spread(0.0f);
        for (int64_t j = 1; j < places; j++) {
            vec other = load(p + (j * width + v) * LANES);
            top = choose(other > top, other, top);
        }
        for (int64_t j = 0; j < places; j++) {
            vec e = exponential(load(p + (j * width + v) * LANES) - top);
            store(p + (j * width + v) * LANES, e);
            sum += e;
        }
        vec share = 1.0f / sum;
        for (int64_t j = 0; j < places; j++)
            store(p + (j * width + v) * LANES, load(p + (j * width + v) * LANES) * share);
    }
}

/* slopes = p (slopes - the sum of p slopes over the column). */
INLINE void softmax_slopes(const int width, int64_t places, const float *p, float *slopes) {
    UNROLL for (int v = 0; v < width; v++) {
        vec sum = spread(0.0f);
        for (int64_t j = 0; j < places; j++)
            sum += load(p + (j * width + v) * LANES) * load(slopes + (j * width + v) * LANES);
        for (int64_t j = 0; j < places; j++) {
            float *s = slopes + (j * width + v) * LANES;
            store(s, load(p + (j * width + v) * LANES) * (load(s) - sum));
        }
    }
}

/* A head of example n: where its queries lie and those of the outputs, numbers from a place to the next in both, and its
shares. */
typedef struct {
    int64_t places, size, from, to, step, step_out;
    float scale, *shares;
} Head;

INLINE Head head_of(const Node *node, const Buffers *at, int64_t n, int64_t number) {
    int64_t places = windows_of(node), size = node->out / node->groups, all = places * ROUND(places);
    const int64_t *to = at->to + n * places;
    return (Head){places, size, at->from[n * places] + number * size, *to + number * size, at->in.pixel,
                  places > 1 ? to[1] - to[0] : 0, 1.0f / sqrtf((float)size), at->shares + (n * node->groups + number) * all};
}

/* The queries from ``first`` on. */
INLINE void attend_panel(const int width, const Node *node, const Buffers *at, Head head, Room room, int64_t first) {
    int64_t panel = width * LANES, some = MIN(head.places - first, panel);
    const float *q = at->h + head.from + first * head.step, *k = at->h + head.from + node->out;
    float *p = head.shares + first * head.places;
    across(q, head.step, some, head.size, head.scale, room.queries, panel);
    product(width, 0, head.places, k, head.step, head.size, room.queries, p, panel);
    softmax(width, head.places, p);
    product(width, 0, head.size, room.across, head.places, head.places, p, room.found, panel);
    for (int64_t i = 0; i < some; i++) for (int64_t c = 0; c < head.size; c++)
        at->z[head.to + (first + i) * head.step_out + c] = room.found[c * panel + i];
}

static void attend(const Node *node, int64_t examples, const Buffers *at) {
    Room room;
    make_room(node, at->room, &room);
    for (int64_t n = 0; n < examples; n++) for (int64_t number = 0; number < node->groups; number++) {
        Head head = head_of(node, at, n, number);
        const float *v = at->h + head.from + 2 * node->out;
        across(v, head.step, head.places, head.size, 1.0f, room.across, head.places);
        EACH_PANEL(head.places, first, width) {
#define PANEL(width) attend_panel(width, node, at, head, room, first)
            BY_WIDTH(width, PANEL);
#undef PANEL
        }
    }
}

/* g[j] += the sum over ``some`` queries i of a[j][i] factor b[i], of ``size`` numbers; what fills vectors up adds zero. */
static void gather_queries(int64_t places, const float *a, int64_t panel, int64_t some, const float *b, int64_t b_step,
                           float factor, int64_t size, float *beside, float *g, int64_t step) {
    EACH_PANEL(size, first, width) {
        for (int64_t i = 0; i < some; i++) for (int64_t c = 0; c < width * LANES; c += LANES) {
            int64_t left = size - first - c;
            store(beside + i * width * LANES + c, factor * load_first(b + i * b_step + first + c, MAX(left, 0)));
        }
#define PRODUCT(width) product(width, 1, places, a, panel, some, beside, g + first, step)
        BY_WIDTH(width, PRODUCT);
#undef PRODUCT
    }
}

INLINE void attend_panel_back(const int width, const Node *node, const Buffers *at, Head head, Room room, int64_t first) {
    int64_t panel = width * LANES, some = MIN(head.places - first, panel), from = head.from + first * head.step;
    const float *v = at->h + head.from + 2 * node->out, *g = at->gz + head.to + first * head.step_out;
    const float *p = head.shares + first * head.places;
    float *gq = at->gh + from, *gk = at->gh + head.from + node->out;
    across(g, head.step_out, some, head.size, 1.0f, room.queries, panel);
    product(width, 0, head.places, v, head.step, head.size, room.queries, room.slopes, panel);
    softmax_slopes(width, head.places, p, room.slopes);
    product(width, 0, head.size, room.across, head.places, head.places, room.slopes, room.found, panel);
    for (int64_t i = 0; i < some; i++) for (int64_t c = 0; c < head.size; c++)
        gq[i * head.step + c] += head.scale * room.found[c * panel + i];
    gather_queries(head.places, room.slopes, panel, some, at->h + from, head.step, head.scale, head.size, room.beside, gk,
                   head.step);
    gather_queries(head.places, p, panel, some, g, head.step_out, 1.0f, head.size, room.beside, gk + node->out, head.step);
}

static void attend_back(const Node *node, int64_t examples, const Buffers *at) {
    Room room;
    make_room(node, at->room, &room);
    memset(at->gh, 0, examples * at->in.image * sizeof(float));
    for (int64_t n = 0; n < examples; n++) for (int64_t number = 0; number < node->groups; number++) {
        Head head = head_of(node, at, n, number);
        across(at->h + head.from + node->out, head.step, head.places, head.size, 1.0f, room.across, head.places);
        EACH_PANEL(head.places, first, width) {
#define PANEL(width) attend_panel_back(width, node, at, head, room, first)
            BY_WIDTH(width, PANEL);
#undef PANEL
        }
    }
}

/* p = softmax(outputs) in their place, and the derivative by them = weight * (p - targets). */
static void loss_gradient(int64_t examples, int64_t classes, const float *targets, const int64_t *order,
                          const float *weights, const Buffers *last) {
    for (int64_t n = 0; n < examples; n++) {
        const float *target = targets + (order ? order[n] : n) * classes;
        float *p = last->z + n * ROUND(classes), *g = last->gz + n * ROUND(classes), top = p[0], sum = 0.0f;
        for (int64_t c = 1; c < classes; c++) top = p[c] > top ? p[c] : top;
        for (int64_t c = 0; c < classes; c++) sum += p[c] = expf(p[c] - top);
        for (int64_t c = 0; c < classes; c++) {
            p[c] /= sum;
            g[c] = weights[n] * (p[c] - target[c]);
        }
    }
}

/* Copies images [channels][height][width] into the first signal. */
static void enter(const Node *node, int64_t examples, const float *x, const int64_t *order, const Buffers *at) {
    int64_t in = node->in, places = node->height * node->width;
    for (int64_t n = 0; n < examples; n++) {
        const float *own = x + (order ? order[n] : n) * in * places;
        for (int64_t i = 0; i < node->height; i++) {
            float *h = at->h + n * at->in.image + (at->in.top + i) * at->in.line + at->in.left * in;
            for (int64_t j = 0; j < node->width; j++) for (int64_t c = 0; c < in; c++)
                h[j * in + c] = own[c * places + i * node->width + j];
        }
    }
}

static void forward(const Node *nodes, int64_t count, int64_t examples, const Buffers *at) {
    for (int64_t l = 0; l < count; l++) {
        int64_t windows = examples * windows_of(nodes + l);
        if (tiled(nodes + l)) tiled_forward(nodes + l, examples, at + l);
        else if (nodes[l].kind == CONVOLUTION) convolve(nodes + l, windows, at + l);
        else if (nodes[l].kind == NORM) normalize(nodes + l, examples, at + l);
        else if (nodes[l].kind == LAYER) layer(nodes + l, windows, at + l);
        else if (nodes[l].kind == SHIFT) shift(nodes + l, windows, at + l);
        else if (nodes[l].kind == EMBEDDING) embed(nodes + l, windows, at + l);
        else if (nodes[l].kind == ATTENTION) attend(nodes + l, examples, at + l);
#define VALUES(activation) add(activation, nodes + l, windows, at + l)
        else if (nodes[l].kind == SUM) BY_ACTIVATION(nodes[l].activation, VALUES);
#undef VALUES
        else pool(nodes + l, windows, at + l);
    }
}

/* all += own, of so many whole vectors; nothing where there is no ``all``. */
static void gather(float *all, const float *own, int64_t number) {
    for (int64_t i = 0; all && i < number; i += LANES) store(all + i, load(all + i) + load(own + i));
}

/* ``there``: whether the derivatives by weights are there, of other examples. */
static void backward(const Node *nodes, int64_t count, int64_t examples, const Buffers *at, int there) {
    for (int64_t l = count - 1; l >= 0; l--) {
        const Node *node = nodes + l;
        int64_t windows = examples * windows_of(node);
        if (node->kind == CONVOLUTION) {
            if (node->bias >= 0) bias_gradient(node, windows, at + l);
            if (tiled(node)) {
                tiled_backward(node, examples, at + l, there);
            } else {
                weight_gradient(node, windows, at + l);
                if (node->of) input_gradient(node, examples, at + l); /* nobody asks for that of the inputs */
            }
        } else if (node->kind == NORM) {
            normalize_back(node, examples, at + l);
        } else if (node->kind == LAYER) {
            layer_back(node, windows, at + l);
        } else if (node->kind == SHIFT) {
            shift_back(node, windows, at + l);
        } else if (node->kind == EMBEDDING) {
            embed_back(node, windows, at + l);
        } else if (node->kind == ATTENTION) {
            attend_back(node, examples, at + l);
        } else if (node->kind == SUM) {
#define SLOPES(activation) add_back(activation, node, windows, at + l)
            BY_ACTIVATION(node->activation, SLOPES);
#undef SLOPES
            gather(at[l].all_other, at[l].g_other, examples * at[l].in_other.image);
        } else {
            pool_back(node, examples, at + l);
        }
        gather(at[l].all, at[l].gh, examples * at[l].in.image);
    }
}

/* For LANES outputs from ``o`` on, columns[u] = the u-th weight of each. */
static void columns_of(const Node *node, const float *a, const float *b, int64_t o, float *columns) {
    int64_t each = node->in * node->kernel_height * node->kernel_width, rows = MIN(LANES, node->out - o);
    for (int64_t u = 0; u < each; u += LANES) {
        vec v[LANES];
        UNROLL for (int i = 0; i < LANES; i++) {
            int64_t place = (o + i) * each + u;
            v[i] = i < rows ? load_first(a + place, each - u) : spread(0.0f);
            if (b && i < rows) v[i] += load_first(b + place, each - u);
        }
        transpose(v);
        UNROLL for (int i = 0; i < LANES; i++) store(columns + (u + i) * LANES, v[i]);
    }
}

/* The other way round: into = scale * into + step * columns. */
static void update_columns(const Node *node, float *into, float scale, float step, int64_t o, const float *columns) {
    int64_t each = node->in * node->kernel_height * node->kernel_width, rows = MIN(LANES, node->out - o);
    for (int64_t u = 0; u < each; u += LANES) {
        vec v[LANES];
        UNROLL for (int i = 0; i < LANES; i++) v[i] = load(columns + (u + i) * LANES);
        transpose(v);
        UNROLL for (int i = 0; i < LANES; i++) {
            float *p = into + (o + i) * each + u;
            if (i == rows) break;
            vec old = scale == 0.0f ? spread(0.0f) : scale * load_first(p, each - u);
            store_first(p, old + step * v[i], each - u);
        }
    }
}

/* From panels [deep][up to WIDTH vectors of columns], ``rows`` of them, a multiple of LANES, from the ``skip``-th on: such
panels of the other way round, [some][up to WIDTH vectors of rows], of the first ``some`` columns. */
static void turn(const float *from, int64_t deep, int64_t skip, int64_t rows, int64_t columns, int64_t some, float *to) {
    EACH_PANEL(columns, first, width) for (int64_t o = first; o < first + width * LANES; o += LANES) {
        const float *panel = from + first * deep + skip * width * LANES + o - first;
        EACH_PANEL(rows, top, height) for (int64_t c = top; c < top + height * LANES; c += LANES) {
            vec v[LANES];
            UNROLL for (int i = 0; i < LANES; i++) v[i] = load(panel + (c + i) * width * LANES);
            transpose(v);
            for (int64_t i = 0; i < MIN(LANES, some - o); i++)
                store(to + top * some + (o + i) * height * LANES + c - top, v[i]);
        }
    }
}

/* to = a + b, or what is ``missing``; b may be NULL. */
static void take(float *to, const float *a, const float *b, int64_t place, int64_t number, float missing) {
    for (int64_t i = 0; i < number; i++) to[i] = place < 0 ? missing : a[place + i] + (b ? b[place + i] : 0.0f);
}

/* G g G' and G' [..] G, of LANES outputs: the windows' places are ``step`` vectors apart, those of a tile ``tile_step``
numbers. */
INLINE void weights_into_tiles(const int m, const float *from, int64_t step, float *to, int64_t tile_step) {
    vec t[MOST_PARTS];
    UNROLL for (int k = 0; k < 9; k++) t[k / 3 * (m + 2) + k % 3] = load(from + k * step * LANES);
    BOTH_WAYS(weights_apart, m, t, 3, m + 2);
    for (int k = 0; k < (m + 2) * (m + 2); k++) store(to + k * tile_step, t[k]);
}

INLINE void weights_of_tiles(const int m, const float *from, int64_t tile_step, float *to, int64_t step) {
    vec t[MOST_PARTS];
    for (int k = 0; k < (m + 2) * (m + 2); k++) t[k] = load(from + k * tile_step);
    BOTH_WAYS(weights_together, m, t, m + 2, 3);
    UNROLL for (int k = 0; k < 9; k++) store(to + k * step * LANES, t[k / 3 * (m + 2) + k % 3]);
}

/* Lays out the parameters start + moved for the products. What fills vectors up stays zero. */
static void pack(const Node *node, const float *start, const float *moved, const Buffers *at) {
    int64_t in = pixel(node), out = ROUND(node->out), area = node->kernel_height * node->kernel_width;
    take(at->bias, start, moved, node->bias, node->out, 0.0f);
    if (node->kind != CONVOLUTION) {
        for (int64_t m = 0; m < depth_of(node); m++) {
            int64_t place = node->weight < 0 ? -1 : node->weight + m * node->out;
            take(at->weights + m * out, start, moved, place, node->out, 1.0f);
        }
        return;
    }
    EACH_PANEL(out, first, width) for (int64_t o = first; o < first + width * LANES; o += LANES) {
        columns_of(node, start + node->weight, moved ? moved + node->weight : NULL, o, at->columns);
        for (int64_t c = 0; c < node->in; c++) {
            float *to = at->weights + c * width * LANES + o - first;
            const float *from = at->columns + c * node->channel_step * LANES;
            if (tiled(node)) {
#define TILES_APART(m) weights_into_tiles(m, from, node->place_step, to + first * in, out * in)
                BY_SIDE(tiled(node), TILES_APART);
#undef TILES_APART
            } else {
                for (int64_t k = 0; k < area; k++)
                    store(to + first * area * in + k * in * width * LANES, load(from + k * node->place_step * LANES));
            }
        }
    }
    if (!node->of) return;
    int64_t stacks = tiled(node) ? parts_of(tiled(node)) : node->kernel_height, rows = tiled(node) ? in : node->kernel_width * in;
    for (int64_t k = 0; k < stacks; k++) {
        float *to = at->transposed + k * rows * node->out;
        if (tiled(node)) turn(at->weights + k * out * in, in, 0, in, out, node->out, to);
        else turn(at->weights, area * in, k * rows, rows, out, node->out, to);
    }
}

/* into = scale * into + step * g. */
static void update(float *into, const float *g, int64_t number, float scale, float step) {
    for (int64_t i = 0; i < number; i++) into[i] = (scale == 0.0f ? 0.0f : scale * into[i]) + step * g[i];
}

static void unpack(const Node *node, const Buffers *at, float *into, float scale, float step) {
    int64_t in = pixel(node), out = ROUND(node->out), area = node->kernel_height * node->kernel_width;
    if (node->bias >= 0) update(into + node->bias, at->g_bias, node->out, scale, step);
    if (node->weight < 0) return;
    into += node->weight;
    if (node->kind != CONVOLUTION) {
        for (int64_t m = 0; m < depth_of(node); m++)
            update(into + m * node->out, at->g_weights + m * out, node->out, scale, step);
        return;
    }
    EACH_PANEL(out, first, width) for (int64_t o = first; o < first + width * LANES; o += LANES) {
        for (int64_t c = 0; c < node->in; c++) {
            float *to = at->columns + c * node->channel_step * LANES;
            if (tiled(node)) {
                const float *from = at->g_weights + first * in + c * width * LANES + o - first;
#define OF_TILES(m) weights_of_tiles(m, from, in * out, to, node->place_step)
                BY_SIDE(tiled(node), OF_TILES);
#undef OF_TILES
            } else {
                const float *from = at->g_weights + c * out + o;
                for (int64_t k = 0; k < area; k++) store(to + k * node->place_step * LANES, load(from + k * in * out));
            }
        }
        update_columns(node, into, scale, step, o, at->columns);
    }
}

/* Zeros what backward sums up. */
static void clear(const Node *node, const Buffers *at) {
    int64_t out = ROUND(node->out);
    if (node->kind > EMBEDDING) return;
    memset(at->g_bias, 0, out * sizeof(float));
    if (!tiled(node)) memset(at->g_weights, 0, depth_of(node) * out * sizeof(float));
}

/* How the signals lie, [count + 1]. */
static void lay(const Node *nodes, int64_t count, Layout *signals) {
    int64_t below[count + 1], right[count + 1]; /* the padding there */
    for (int64_t v = 0; v <= count; v++) {
        signals[v] = (Layout){0};
        below[v] = right[v] = 0;
    }
    for (int64_t l = 0; l < count; l++) {
        const Node *node = nodes + l;
        Layout *in = signals + node->of;
        in->top = MAX(in->top, node->pad_height);
        in->left = MAX(in->left, node->pad_width);
        int64_t side = MAX(tiled(node), 1); /* with room for the last tile, of zeros */
        below[node->of] = MAX(below[node->of], node->pad_height + CEIL(node->height_out, side) * side - node->height_out);
        right[node->of] = MAX(right[node->of], node->pad_width + CEIL(node->width_out, side) * side - node->width_out);
    }
    for (int64_t v = 0; v <= count; v++) {
        Layout *s = signals + v;
        s->pixel = v ? ROUND(nodes[v - 1].out) : nodes->in;
        s->line = (s->left + (v ? nodes[v - 1].width_out : nodes->width) + right[v]) * s->pixel;
        s->image = (s->top + (v ? nodes[v - 1].height_out : nodes->height) + below[v]) * s->line;
    }
}

/* Whether the derivative by what enters can take the place of that by what leaves. */
INLINE int in_place(const Node *nodes, int64_t count, int64_t l, const Layout *signals) {
    int64_t kind = nodes[l].kind;
    return (kind == NORM || kind == LAYER || kind == SHIFT || kind == SUM) && l + 1 < count &&
           !memcmp(signals + nodes[l].of, signals + l + 1, sizeof(Layout));
}

#define PLACE(pointer, number)                                                   \
    do {                                                                         \
        if (memory) (pointer) = (void *)(memory + used);                         \
        used += (CEIL((number) * (int64_t)sizeof *(pointer), 64) + 1) * 64;      \
        if (memory) ASAN_POISON_MEMORY_REGION(memory + used - 64, 64);           \
    } while (0)

/* Whether all that the products read of weights is weights, and nothing fills vectors up. */
INLINE int in_full(const Node *node) { return node->out == ROUND(node->out) && node->in == pixel(node); }

/* Gives every buffer its place, from ``memory`` on if it is given; returns how many bytes that takes, and ``zeros`` how
many of them, the first ones, have to be zero. */
static int64_t arrange(const Node *nodes, int64_t count, int64_t block, char *memory, Buffers *at, int64_t *zeros) {
    int64_t used = 0, widest = 0, most = 0, largest = 0;
    float *tiles_in = NULL, *tiles_out = NULL, *columns = NULL, *room = NULL, *h[count + 1], *gh[count + 1];
    Layout signals[count + 1];
    lay(nodes, count, signals);
    for (int64_t v = 0; v <= count; v++) { /* the last: the outputs, then their softmax */
        h[v] = gh[v] = NULL;
        PLACE(h[v], block * signals[v].image);
    }
    PLACE(gh[count], block * signals[count].image);
    for (int64_t l = 0; l < count; l++) {
        const Node *node = nodes + l;
        Buffers *b = at + l;
        int64_t out = ROUND(node->out);
        *b = (Buffers){.in = signals[node->of], .h = h[node->of], .z = h[l + 1]};
        most = MAX(most, node->in * node->kernel_height * node->kernel_width);
        if (tiled(node)) widest = MAX(widest, parts_of(tiled(node)) * MAX(pixel(node), out));
        if (node->of && !in_place(nodes, count, l, signals)) PLACE(b->gh, block * b->in.image + (node->kind == ATTENTION ? LANES : 0)); /* whole vectors are added there */
        PLACE(b->from, block * windows_of(node));
        PLACE(b->to, block * windows_of(node));
        if (node->kind == SUM) {
            b->in_other = signals[node->other];
            b->other = h[node->other];
            PLACE(b->g_other, block * b->in_other.image);
            PLACE(b->from_other, block * windows_of(node));
        }
        if (node->kind == ATTENTION) {
            PLACE(b->shares, block * node->groups * windows_of(node) * ROUND(windows_of(node)));
            largest = MAX(largest, make_room(node, NULL, NULL));
        }
        if (node->kind > EMBEDDING) continue;
        if (!in_full(node)) PLACE(b->weights, depth_of(node) * out);
        PLACE(b->bias, out);
        PLACE(b->g_bias, out);
        if (node->kind != NORM && node->kind != LAYER) continue;
        PLACE(b->mean, block * (node->kind == LAYER ? windows_of(node) : out));
        PLACE(b->inverse, block * (node->kind == LAYER ? windows_of(node) : out));
        if (node->kind == LAYER) continue;
        PLACE(b->factor, block * out);
        PLACE(b->sum, out);
        PLACE(b->product, out);
    }
    *zeros = used;
    for (int64_t l = 0; l < count; l++) {
        const Node *node = nodes + l;
        int64_t size = depth_of(node) * ROUND(node->out);
        if (node->kind > EMBEDDING) continue;
        if (in_full(node)) PLACE(at[l].weights, size);
        PLACE(at[l].g_weights, size);
        if (node->kind == CONVOLUTION && node->of) PLACE(at[l].transposed, depth_of(node) * node->out);
    }
    PLACE(tiles_in, TILES * widest + HEIGHT); /* whose last rows are read beyond */
    PLACE(tiles_out, TILES * widest);
    PLACE(columns, ROUND(most) * LANES);
    PLACE(room, largest);
    for (int64_t l = count - 1; memory && l >= 0; l--) { /* as backward goes */
        Buffers *b = at + l;
        b->tiles_in = tiles_in;
        b->tiles_out = tiles_out;
        b->columns = columns;
        b->room = room;
        b->gz = gh[l + 1];
        if (in_place(nodes, count, l, signals)) b->gh = b->gz;
        b->all = gh[nodes[l].of];
        if (!b->all) gh[nodes[l].of] = b->gh;
        if (nodes[l].kind != SUM) continue;
        b->all_other = gh[nodes[l].other];
        if (!b->all_other) gh[nodes[l].other] = b->g_other;
    }
    return used;
}
#undef PLACE

/* How many bytes of scratch memory a thread needs. */
int64_t images_scratch(const Node *nodes, int64_t count, int64_t block) {
    Buffers at[count];
    int64_t zeros;
    return arrange(nodes, count, block, NULL, at, &zeros);
}

/* Where the place (i, j) of example n lies in a signal, from its ``up``-th padded line and ``left``-th padded place on. */
INLINE int64_t place_in(const Layout *s, int64_t n, int64_t i, int64_t j, int64_t up, int64_t left) {
    return n * s->image + (s->top - up + i) * s->line + (s->left - left + j) * s->pixel;
}

/* Makes scratch memory ready. What pads a signal, and fills vectors up, stays what it is from then on. */
void images_prepare(const Node *nodes, int64_t count, int64_t block, char *scratch, int threads) {
    Buffers at[count];
    Layout signals[count + 1];
    int64_t zeros;
    lay(nodes, count, signals);
    arrange(nodes, count, block, NULL, at, &zeros);
    for (int thread = 0; thread < threads; thread++) {
        memset(scratch, 0, zeros);
        scratch += arrange(nodes, count, block, scratch, at, &zeros);
        for (int64_t l = 0; l < count; l++) {
            const Node *node = nodes + l;
            int64_t m = 0;
            for (int64_t n = 0; n < block; n++)
                for (int64_t i = 0; i < node->height_out; i++) for (int64_t j = 0; j < node->width_out; j++, m++) {
                    at[l].from[m] = place_in(&at[l].in, n, i * node->stride_height, j * node->stride_width,
                                             node->pad_height, node->pad_width);
                    at[l].to[m] = place_in(signals + l + 1, n, i, j, 0, 0);
                    if (node->kind == SUM) at[l].from_other[m] = place_in(&at[l].in_other, n, i, j, 0, 0);
                }
            if (node->kind == MAXIMUM && (node->pad_height || node->pad_width)) /* signals are written over the rest */
                for (int64_t i = 0; i < block * at[l].in.image; i++) at[l].h[i] = -INFINITY;
        }
    }
}

/* What images_gradient and images_outputs are told, see there, and what they do of a row. */
typedef struct Job {
    void (*row)(const struct Job *job, int64_t r, const Buffers *at);
    const Node *nodes;
    int64_t count, examples, chosen, block, parameters;
    const float *start;
    int64_t stride;
    const float *moved, *x, *targets, *weights;
    const int64_t *order;
    int64_t times;
    const float *scale, *step;
    float *into;
    char *scratch;
} Job;

static void each_row(Shared *shared, int thread) {
    const Job *job = shared->job;
    Buffers at[job->count];
    int64_t bytes = images_scratch(job->nodes, job->count, job->block), zeros, r;
    arrange(job->nodes, job->count, job->block, job->scratch + thread * bytes, at, &zeros);
    while ((r = next_row(shared)) >= 0) job->row(job, r, at);
}

static void gradient_row(const Job *job, int64_t r, const Buffers *at) {
    const Node *nodes = job->nodes;
    int64_t count = job->count, classes = nodes[count - 1].out, inputs = nodes->in * nodes->height * nodes->width;
    float *into = job->into + r * job->parameters;
    for (int64_t t = 0; t < job->times; t++) {
        for (int64_t l = 0; l < count; l++) {
            clear(nodes + l, at + l);
            if (nodes[l].kind <= EMBEDDING)
                pack(nodes + l, job->start + r * job->stride, job->moved ? job->moved + r * job->parameters : NULL, at + l);
        }
        for (int64_t n = 0; n < job->chosen; n += job->block) {
            int64_t some = MIN(job->block, job->chosen - n), first = r * job->examples + (job->order ? 0 : n);
            int64_t weight = (job->order ? r * job->times + t : r) * job->chosen + n;
            const int64_t *which = job->order ? job->order + weight : NULL;
            enter(nodes, some, job->x + first * inputs, which, at);
            forward(nodes, count, some, at);
            loss_gradient(some, classes, job->targets + first * classes, which, job->weights + weight, at + count - 1);
            backward(nodes, count, some, at, n > 0);
        }
        for (int64_t l = 0; l < count; l++)
            if (nodes[l].kind <= EMBEDDING) unpack(nodes + l, at + l, into, job->scale[t], job->step[t]);
    }
}

static void outputs_row(const Job *job, int64_t r, const Buffers *at) {
    const Node *nodes = job->nodes;
    int64_t count = job->count, classes = nodes[count - 1].out, inputs = nodes->in * nodes->height * nodes->width;
    for (int64_t l = 0; l < count; l++)
        if (nodes[l].kind <= EMBEDDING) pack(nodes + l, job->start + r * job->stride, NULL, at + l);
    for (int64_t n = 0; n < job->examples; n += job->block) {
        int64_t some = MIN(job->block, job->examples - n), first = r * job->examples + n;
        enter(nodes, some, job->x + first * inputs, NULL, at);
        forward(nodes, count, some, at);
        for (int64_t i = 0; i < some; i++)
            memcpy(job->into + (first + i) * classes, at[count - 1].z + i * ROUND(classes), classes * sizeof(float));
    }
}

/* At t = 0, ..., times - 1: into[r] = scale[t] * into[r] + step[t] * the gradient at phi[r] of the sum over n of
weights[r][n] * cross-entropy.

phi[r] = start[r] + moved[r], or start[r] where ``moved`` is NULL; ``into`` may be ``moved``, which makes it gradient
descent, without a thread waiting for another between the steps. start [rows][parameters], with ``stride`` numbers from
a row to the next, moved and into [rows][parameters]; x [rows][examples][channels][height][width];
targets [rows][examples][classes], one-hot; weights [rows][examples].

Where ``order`` [rows][times][chosen] is given, the examples at time t are those at order[r][t] of x and targets, and
weights are [rows][times][chosen]; otherwise chosen = examples. Examples are taken in blocks of ``block``. ``scratch``:
threads * images_scratch(nodes, count, block) prepared bytes, aligned to 64. What it returns does not depend on the
number of threads. */
void images_gradient(const Node *nodes, int64_t count, int64_t rows, int64_t examples, int64_t chosen, int64_t block,
                     int64_t parameters, const float *start, int64_t stride, const float *moved, const float *x,
                     const float *targets, const float *weights, const int64_t *order, int64_t times,
                     const float *scale, const float *step, float *into, char *scratch, int threads) {
    Job job = {.row = gradient_row, .nodes = nodes, .count = count, .examples = examples, .chosen = chosen,
               .block = block, .parameters = parameters, .start = start, .stride = stride, .moved = moved, .x = x,
               .targets = targets, .weights = weights, .order = order, .times = times, .scale = scale, .step = step,
               .into = into, .scratch = scratch};
    share(each_row, &job, rows, threads);
}

/* outputs [rows][examples][classes] at the parameters start[r]; all else is as there. */
void images_outputs(const Node *nodes, int64_t count, int64_t rows, int64_t examples, int64_t block, const float *start,
                    int64_t stride, const float *x, float *outputs, char *scratch, int threads) {
    Job job = {.row = outputs_row, .nodes = nodes, .count = count, .examples = examples, .block = block, .start = start,
               .stride = stride, .x = x, .into = outputs, .scratch = scratch};
    share(each_row, &job, rows, threads);
}
