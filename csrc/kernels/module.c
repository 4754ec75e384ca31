/* shardproof._kernels: arithmetic whose order of additions is fixed. The Python face; no torch.
 *
 * Addresses, sizes and strides (in elements) come as plain ints and are trusted: the Python side
 * has checked the tensors, and holds them while a call runs. What has no memory at all (a null
 * address) raises BufferError, upon which the Python side looks at the tensors again.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "fold.h"
#include "product.h"

static enum path chosen_path = PATH_NONE;

static const char EMPTY[] = "product: no fused multiply-add here, or an empty size";
static const char NOWHERE[] = "a tensor has no memory";

/* `c_modules.py` expects this number, so that an old build beside new sources is not used. It is raised
 * with what Python asks of this module and with the bits of its results. */
enum { PROTOCOL = 3 };

enum { GIL_WORK = 1 << 16 }; /* less is done before another thread would wake up */

/* One leaf, or a piece of one, as Python packs it: where it lies, partial sums to add, and if a
 * node ends here. */
struct leaf {
    int64_t start, stop, pops, is_last;
};

/* One term, as Python packs it. */
struct given_term {
    int64_t depth, a, a_row, a_col, b, b_row, b_col;
};

static int read_ints(PyObject *const *given, Py_ssize_t count, long long *into) {
    for (Py_ssize_t i = 0; i < count; i++) {
        into[i] = PyLong_AsLongLong(given[i]);
        if (into[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

/* The term that a leaf lies in, or `num_terms`. */
static size_t find_term(const struct product *p, const struct leaf *l) {
    for (size_t t = 0; t < p->num_terms; t++) {
        const struct term *of = p->terms + t;
        if (l->start >= of->first && l->start < l->stop && l->stop <= of->first + of->depth)
            return t;
    }
    return p->num_terms;
}

/* Leaves to blocks; NULL with an exception set, or an array to be freed. */
static struct segment *read_program(const struct leaf *leaves, size_t num_leaves,
                                    struct product *p) {
    size_t count = 0;
    for (size_t i = 0; i < num_leaves; i++) {
        if (find_term(p, leaves + i) == p->num_terms) {
            PyErr_SetString(PyExc_ValueError, "a leaf lies outside of the contraction");
            return NULL;
        }
        count += (size_t)((leaves[i].stop - leaves[i].start + BLOCK - 1) / BLOCK);
    }
    struct segment *segments = malloc((count + 1) * sizeof *segments);
    if (!segments) {
        PyErr_NoMemory();
        return NULL;
    }
    size_t next = 0;
    int height = 0, node = 0, levels = 1;
    for (size_t i = 0; i < num_leaves; i++) {
        const struct leaf *l = leaves + i;
        const size_t term = find_term(p, l);
        for (int64_t k = l->start; k < l->stop; k += BLOCK) {
            const int ends = k + BLOCK >= l->stop;
            struct segment *s = segments + next++;
            s->term = term;
            s->start = (ptrdiff_t)k;
            s->depth = (ptrdiff_t)(ends ? l->stop - k : BLOCK);
            s->pops = (k > l->start) + (ends ? (int32_t)l->pops : 0);
            s->slot = height -= s->pops;
            s->node = ends && l->is_last ? node++ : -1;
            if (height < 0 || height >= MAX_LEVELS || (s->node >= 0 && height)) {
                free(segments);
                PyErr_SetString(PyExc_ValueError, "the leaves make no tree");
                return NULL;
            }
            height += s->node < 0;
            levels = height > levels ? height : levels;
        }
    }
    p->segments = segments;
    p->num_segments = next;
    p->num_levels = levels;
    p->num_nodes = node;
    return segments;
}

/* Reads the leaves and computes; None, or NULL with an exception set. */
static PyObject *run(struct product *p, int is_double, PyObject *leaves) {
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(leaves, &bytes, &size)) return NULL;
    if (chosen_path == PATH_NONE || p->m < 1 || p->n < 1 || p->k < 1) {
        PyErr_SetString(PyExc_ValueError, EMPTY);
        return NULL;
    }
    int is_nowhere = !p->out;
    for (size_t t = 0; t < p->num_terms; t++)
        is_nowhere |= !p->terms[t].a || !p->terms[t].b;
    if (is_nowhere) {
        PyErr_SetString(PyExc_BufferError, NOWHERE);
        return NULL;
    }
    struct segment *segments =
        read_program((const struct leaf *)(void *)bytes, (size_t)size / sizeof(struct leaf), p);
    if (!segments) return NULL;
    int (*compute)(const struct product *, enum path) = is_double ? product_f64 : product_f32;
    const enum path path = chosen_path;
    int failed;
    if ((double)p->m * (double)p->n * (double)p->k < GIL_WORK) {
        failed = compute(p, path);
    } else {
        Py_BEGIN_ALLOW_THREADS failed = compute(p, path);
        Py_END_ALLOW_THREADS
    }
    free(segments);
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(product_doc,
             "product(is_double, threads, out, m, n, k, a, a_row, a_col, b, b_row, b_col, bias, "
             "leaves)\n--\n\n"
             "out[node] (m, n) = the node's leaves of a (m, k) @ b (k, n), plus bias (n,) unless "
             "0.\nleaves: bytes, four int64 each: start, stop, pops, is_last. All sizes positive.");

static PyObject *product(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    long long g[13];
    if (nargs != 14) {
        PyErr_SetString(PyExc_TypeError, "product takes 14 arguments");
        return NULL;
    }
    if (read_ints(args, 13, g)) return NULL;
    if (g[1] < 1) {
        PyErr_Format(PyExc_ValueError, "product: %lld threads; at least 1 is needed", g[1]);
        return NULL;
    }
    const struct term term = {
        .a = (void *)(intptr_t)g[6], .b = (void *)(intptr_t)g[9], .depth = (ptrdiff_t)g[5],
        .a_row = (ptrdiff_t)g[7], .a_col = (ptrdiff_t)g[8],
        .b_row = (ptrdiff_t)g[10], .b_col = (ptrdiff_t)g[11],
    };
    struct product p = {
        .num_threads = g[1] < INT_MAX ? (int)g[1] : INT_MAX, .out = (void *)(intptr_t)g[2],
        .m = (ptrdiff_t)g[3], .n = (ptrdiff_t)g[4], .k = (ptrdiff_t)g[5],
        .terms = &term, .num_terms = 1, .bias = (void *)(intptr_t)g[12],
    };
    return run(&p, g[0] != 0, args[13]);
}

/* Python's terms to ours; NULL with an exception set, or an array to be freed. */
static struct term *read_terms(PyObject *given, struct product *p) {
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(given, &bytes, &size)) return NULL;
    p->num_terms = (size_t)size / sizeof(struct given_term);
    struct term *terms = malloc((p->num_terms + 1) * sizeof *terms);
    if (!terms) {
        PyErr_NoMemory();
        return NULL;
    }
    for (size_t i = 0; i < p->num_terms; i++) {
        struct given_term g;
        memcpy(&g, bytes + i * sizeof g, sizeof g);
        if (g.depth < 1) {
            free(terms);
            PyErr_SetString(PyExc_ValueError, EMPTY);
            return NULL;
        }
        terms[i] = (struct term){
            .a = (void *)(intptr_t)g.a, .b = (void *)(intptr_t)g.b,
            .first = p->k, .depth = (ptrdiff_t)g.depth,
            .a_row = (ptrdiff_t)g.a_row, .a_col = (ptrdiff_t)g.a_col,
            .b_row = (ptrdiff_t)g.b_row, .b_col = (ptrdiff_t)g.b_col,
        };
        p->k += terms[i].depth;
    }
    p->terms = terms;
    return terms;
}

PyDoc_STRVAR(joined_doc,
             "joined(is_double, threads, out, m, n, terms, leaves)\n--\n\n"
             "out[node] (m, n) = the node's leaves of the products of all terms, added up.\n"
             "terms: bytes, seven int64 each: k, a, a_row, a_col, b, b_row, b_col.\n"
             "leaves: as for product, counted over the steps of all terms; a leaf may be given\n"
             "as pieces, each within one term. All sizes positive.");

static PyObject *joined(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    long long g[5];
    if (nargs != 7) {
        PyErr_SetString(PyExc_TypeError, "joined takes 7 arguments");
        return NULL;
    }
    if (read_ints(args, 5, g)) return NULL;
    if (g[1] < 1) {
        PyErr_Format(PyExc_ValueError, "product: %lld threads; at least 1 is needed", g[1]);
        return NULL;
    }
    struct product p = {
        .num_threads = g[1] < INT_MAX ? (int)g[1] : INT_MAX, .out = (void *)(intptr_t)g[2],
        .m = (ptrdiff_t)g[3], .n = (ptrdiff_t)g[4],
    };
    struct term *terms = read_terms(args[5], &p);
    if (!terms) return NULL;
    PyObject *result = run(&p, g[0] != 0, args[6]);
    free(terms);
    return result;
}

PyDoc_STRVAR(fold_doc, "fold(is_double, is_squared, out, m, n, x, row, column)\n--\n\n"
                       "out (n,) = the rows of x (m, n), or their squares, added by halving.");

static PyObject *fold(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    long long g[8];
    if (nargs != 8) {
        PyErr_SetString(PyExc_TypeError, "fold takes 8 arguments");
        return NULL;
    }
    if (read_ints(args, 8, g)) return NULL;
    const struct fold f = {
        .is_squared = g[1] != 0, .out = (void *)(intptr_t)g[2],
        .m = (ptrdiff_t)g[3], .n = (ptrdiff_t)g[4],
        .x = (void *)(intptr_t)g[5], .row = (ptrdiff_t)g[6], .column = (ptrdiff_t)g[7],
    };
    if (f.m < 1 || f.n < 1) {
        PyErr_SetString(PyExc_ValueError, "fold: an empty size");
        return NULL;
    }
    if (!f.out || !f.x) {
        PyErr_SetString(PyExc_BufferError, NOWHERE);
        return NULL;
    }
    int (*run)(const struct fold *) = g[0] ? fold_f64 : fold_f32;
    int failed;
    if ((double)f.m * (double)f.n < GIL_WORK) {
        failed = run(&f);
    } else {
        Py_BEGIN_ALLOW_THREADS failed = run(&f);
        Py_END_ALLOW_THREADS
    }
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(kept_doc, "kept()\n--\n\nBytes that this thread keeps for its next product.");

static PyObject *get_kept(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyLong_FromSize_t(kept_scratch());
}

static const char *const PATHS[] = {"none", "avx2", "avx512"};

PyDoc_STRVAR(path_doc,
             "path()\n--\n\nThe vectors in use: 'none' (no products), 'avx2' or 'avx512'.");

static PyObject *get_path(PyObject *self, PyObject *none) {
    (void)self, (void)none;
    return PyUnicode_FromString(PATHS[chosen_path]);
}

PyDoc_STRVAR(set_path_doc,
             "set_path(name)\n--\n\nUse these vectors, which give the same bits as the others.");

static PyObject *set_path(PyObject *self, PyObject *name) {
    (void)self;
    const char *wanted = PyUnicode_AsUTF8AndSize(name, NULL);
    if (!wanted) return NULL;
    for (enum path p = PATH_AVX2; p <= widest_path(); p++) {
        if (strcmp(wanted, PATHS[p]) == 0) {
            chosen_path = p;
            Py_RETURN_NONE;
        }
    }
    PyErr_Format(PyExc_ValueError, "this machine has no %s path", wanted);
    return NULL;
}

static PyMethodDef methods[] = {
    {"product", (PyCFunction)(void (*)(void))product, METH_FASTCALL, product_doc},
    {"joined", (PyCFunction)(void (*)(void))joined, METH_FASTCALL, joined_doc},
    {"fold", (PyCFunction)(void (*)(void))fold, METH_FASTCALL, fold_doc},
    {"kept", get_kept, METH_NOARGS, kept_doc},
    {"path", get_path, METH_NOARGS, path_doc},
    {"set_path", set_path, METH_O, set_path_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shardproof._kernels",
    .m_doc = "Products and sums with a fixed order of additions.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    chosen_path = widest_path();
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "PROTOCOL", PROTOCOL) < 0)
        Py_CLEAR(module);
    return module;
}
