/* Memory that a thread keeps from call to call: fresh pages would cost more than the work. What is
 * larger than MAX_KEPT is given back: there the work costs more. */
#define _GNU_SOURCE
#include "product.h"

#include <pthread.h>
#include <stdlib.h>

struct kept {
    size_t size;
    void *memory;
};

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int has_key;

static void drop(void *given) {
    struct kept *kept = given;
    free(kept->memory);
    free(kept);
}

static void make_key(void) { has_key = !pthread_key_create(&key, drop); }

void *scratch(size_t size) {
    pthread_once(&once, make_key);
    if (!has_key) return NULL;
    struct kept *kept = pthread_getspecific(key);
    if (!kept) {
        kept = calloc(1, sizeof *kept);
        if (!kept) return NULL;
        if (pthread_setspecific(key, kept)) {
            free(kept);
            return NULL;
        }
    }
    if (kept->size < size) {
        free(kept->memory);
        const size_t rounded = (size + 4095) / 4096 * 4096;
        kept->memory = aligned_alloc(4096, rounded);
        kept->size = kept->memory ? rounded : 0;
    }
    return kept->memory;
}

static struct kept *here(void) { return has_key ? pthread_getspecific(key) : NULL; }

void release_scratch(void) {
    struct kept *kept = here();
    if (!kept || kept->size <= MAX_KEPT) return;
    free(kept->memory);
    *kept = (struct kept){0};
}

size_t kept_scratch(void) {
    const struct kept *kept = here();
    return kept ? kept->size : 0;
}
