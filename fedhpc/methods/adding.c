/* The innermost loop of the server step. Loaded by adding.py, which says what it computes. */

#include <stddef.h>

void add(const float *restrict term, double weight, double *restrict mean, double *restrict total, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        double wide = (double)term[i];
        if (total)
            total[i] += wide;
        mean[i] += weight * wide;
    }
}
