/* Calls the kernels with what it reads and writes what they give: test_arm.py runs it by an emulator. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int64_t fused_scratch(void *, int64_t, int64_t), fused_kept(void *, int64_t, int64_t);
int64_t images_scratch(void *, int64_t, int64_t);
void fused_prepare(void *, int64_t, int64_t, void *, int), images_prepare(void *, int64_t, int64_t, void *, int);
void fused_gradient(void *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float *, int64_t, float *, float *,
                    float *, float *, int64_t *, int64_t, float *, float *, float *, void *, void *, int);
void fused_product(void *, int64_t, int64_t, int64_t, int64_t, int64_t, float *, int64_t, float *, float *, float,
                   float, float *, void *, void *, int);
void images_gradient(void *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float *, int64_t, float *, float *,
                     float *, float *, int64_t *, int64_t, float *, float *, float *, void *, int);
void images_outputs(void *, int64_t, int64_t, int64_t, int64_t, float *, int64_t, float *, float *, void *, int);

/* A request; test_arm.py says what its parts are. ``layers`` .. ``into``: how many bytes follow, for each of them. */
typedef struct {
    int64_t images, count, rows, examples, chosen, block, parameters, times, threads, descent, layers, start, moved, x,
        targets, weights, order, scale, step, along, into, outputs;
} Request;

static void *new(int64_t bytes) { return memset(aligned_alloc(64, (bytes / 64 + 1) * 64), 0, (bytes / 64 + 1) * 64); }

/* The next so many bytes, or NULL for none. */
static void *next(int64_t bytes) {
    void *memory = bytes ? new(bytes) : NULL;
    if (bytes && !fread(memory, bytes, 1, stdin)) exit(1);
    return memory;
}

int main(void) {
    for (Request r; fread(&r, sizeof r, 1, stdin);) {
        void *layers = next(r.layers);
        float *start = next(r.start), *moved = next(r.moved), *x = next(r.x), *targets = next(r.targets);
        float *weights = next(r.weights);
        int64_t *order = next(r.order);
        float *scale = next(r.scale), *step = next(r.step), *along = next(r.along), *into = next(r.into);
        float *outputs = new(r.outputs);
        if (r.descent) moved = into;
        if (r.images) {
            void *scratch = new(r.threads * images_scratch(layers, r.count, r.block));
            images_prepare(layers, r.count, r.block, scratch, r.threads);
            images_gradient(layers, r.count, r.rows, r.examples, r.chosen, r.block, r.parameters, start, r.parameters, moved,
                            x, targets, weights, order, r.times, scale, step, into, scratch, r.threads);
            images_outputs(layers, r.count, r.rows, r.examples, r.block, start, r.parameters, x, outputs, scratch,
                           r.threads);
        } else {
            void *scratch = new(2 * r.threads * fused_scratch(layers, r.count, r.block));
            float *gradient = along ? new(r.into) : into, zero = 0.0f, one = 1.0f;
            void *kept = NULL;
            if (along) kept = new(r.rows * ((r.chosen + r.block - 1) / r.block) * fused_kept(layers, r.count, r.block));
            fused_prepare(layers, r.count, r.block, scratch, 2 * r.threads);
            fused_gradient(layers, r.count, r.rows, r.examples, r.chosen, r.block, r.parameters, start, r.parameters, moved,
                           x, targets, weights, order, r.times, along ? &zero : scale, along ? &one : step, gradient, kept,
                           scratch, r.threads);
            if (along)
                fused_product(layers, r.count, r.rows, r.examples, r.block, r.parameters, start, r.parameters, along,
                              weights, *scale, *step, into, kept, scratch, r.threads);
        }
        fwrite(into, r.into, 1, stdout);
        fwrite(outputs, r.outputs, 1, stdout);
    }
    return 0;
}
