/* A sum prepared: everything about it that is the same each time. */
#include "core.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_PARTS = 1024 };

/* The integers of a tuple, or NULL with an error set. */
static int *integers_of(PyObject *tuple, int *length)
{
    Py_ssize_t size = PyTuple_Size(tuple);
    if (size < 1 || size > 2 * MAX_PARTS) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "%zd numbers, where 1 to %d are wanted", size,
                         2 * MAX_PARTS);
        return NULL;
    }
    int *numbers = malloc((size_t)size * sizeof *numbers);
    if (numbers == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < size; i++)
        numbers[i] = (int)PyLong_AsLong(PyTuple_GetItem(tuple, i));
    if (PyErr_Occurred()) {
        free(numbers);
        return NULL;
    }
    *length = (int)size;
    return numbers;
}

static int number_parts(Plan *plan, const Core *core, PyObject *counts)
{
    int length;
    int *parts_of = integers_of(counts, &length);
    if (parts_of == NULL)
        return FAILED;
    int is_sound = length == core->size;
    for (int rank = 0; rank < length; rank++) {
        is_sound = is_sound && parts_of[rank] >= 0 && parts_of[rank] <= MAX_OWN;
        plan->parts += is_sound ? parts_of[rank] : 0;
    }
    if (!is_sound || plan->parts < 1 || plan->parts > MAX_PARTS) {
        free(parts_of);
        PyErr_SetString(PyExc_ValueError, "too many parts, fewer than none, or not one count for each rank");
        return FAILED;
    }
    plan->owners = malloc((size_t)plan->parts * sizeof(int));
    plan->places = malloc((size_t)plan->parts * sizeof(int));
    plan->sources = calloc((size_t)plan->parts, sizeof(char *));
    if (plan->owners == NULL || plan->places == NULL || plan->sources == NULL) {
        free(parts_of);
        PyErr_NoMemory();
        return FAILED;
    }
    int part = 0, most = 1;
    for (int rank = 0; rank < length; rank++) {
        if (rank == core->rank)
            plan->first = part;
        most = parts_of[rank] > most ? parts_of[rank] : most;
        for (int place = 0; place < parts_of[rank]; place++, part++) {
            plan->owners[part] = rank;
            plan->places[part] = place;
        }
    }
    plan->own = parts_of[core->rank];
    free(parts_of);
    return most;
}

/* The program has been checked in Python; here only that it cannot leave the arrays. */
static int read_program(Plan *plan, PyObject *program)
{
    plan->program = integers_of(program, &plan->steps);
    if (plan->program == NULL)
        return FAILED;
    int depth = 0, deepest = 0, is_sound = 1;
    for (int step = 0; step < plan->steps; step++) {
        int part = plan->program[step];
        depth += part >= 0 ? 1 : -1;
        deepest = depth > deepest ? depth : deepest;
        is_sound = is_sound && depth >= 1 && part < plan->parts && part >= -1;
    }
    if (!is_sound || depth != 1 || plan->steps != 2 * plan->parts - 1) {
        PyErr_SetString(PyExc_ValueError, "the program does not add the parts");
        return FAILED;
    }
    plan->deepest = deepest;
    return OK;
}

/* Cut the message into chunks that `most` parts of one rank fit a slot of. */
static void cut(Plan *plan, const Core *core, size_t most)
{
    size_t width = plan->kind->width, unit = 64 / width;
    size_t limit = core->slot_bytes ? core->slot_bytes : 512 * 1024;
    plan->chunk = limit / most / width / unit * unit;
    if (core->slot_bytes == 0 || plan->numel < plan->chunk)
        plan->chunk = plan->numel < plan->chunk ? plan->numel : plan->chunk;
    plan->chunks = plan->numel ? (plan->numel + plan->chunk - 1) / plan->chunk : 1;
    plan->stride = (plan->chunk * width + 63) / 64 * 64;
    if (plan->stride * most > limit)
        plan->stride = plan->chunk * width;
}

static int fill_plan(Plan *plan, Core *core, PyObject *args)
{
    PyObject *counts, *program, *window;
    unsigned long long digest;
    Py_ssize_t numel;
    int kind, out_kind, is_sliced;
    if (!PyArg_ParseTuple(args, "O!O!niiKpO:plan", &PyTuple_Type, &counts, &PyTuple_Type, &program,
                          &numel, &kind, &out_kind, &digest, &is_sliced, &window))
        return FAILED;
    if (kind < 0 || kind >= KINDS || out_kind < 0 || out_kind >= KINDS || numel < 0) {
        PyErr_SetString(PyExc_ValueError, "no such kind of element, or a negative number of them");
        return FAILED;
    }
    if (kind != out_kind && (kind != FLOAT32 || (out_kind != BFLOAT16 && out_kind != FLOAT16))) {
        PyErr_SetString(PyExc_ValueError, "only 32 bits are rounded, and to 16 bits alone");
        return FAILED;
    }
    plan->kind = &kinds[kind];
    plan->out_kind = &kinds[out_kind];
    plan->narrow = kind == out_kind && plan->kind->widen == NULL ? NULL : plan->out_kind->narrow;
    plan->numel = (size_t)numel;
    plan->digest = digest;
    int most = number_parts(plan, core, counts);
    if (most < 0 || read_program(plan, program) < 0)
        return FAILED;
    cut(plan, core, (size_t)most);
    plan->is_windowed = window != Py_None;
    plan->is_sliced = is_sliced && !plan->is_windowed;
    Window *w = &plan->window;
    if (plan->is_windowed &&
        !PyArg_ParseTuple(window, "nnnnn:window", &w->outer, &w->size, &w->inner, &w->start,
                          &w->stop))
        return FAILED;
    if (plan->is_windowed && (w->outer * w->size * w->inner != plan->numel ||
                              w->start > w->stop || w->stop > w->size)) {
        PyErr_SetString(PyExc_ValueError, "the window does not fit the parts");
        return FAILED;
    }
    return OK;
}

PyObject *make_plan(Core *core, PyTypeObject *type, PyObject *args)
{
    Plan *plan = (Plan *)PyType_GenericAlloc(type, 0);
    if (plan == NULL)
        return NULL;
    if (fill_plan(plan, core, args) < 0) {
        Py_DECREF(plan);
        return NULL;
    }
    return (PyObject *)plan;
}

static void free_plan(PyObject *self)
{
    Plan *plan = (Plan *)self;
    PyTypeObject *type = Py_TYPE(self);
    free(plan->program);
    free(plan->owners);
    free(plan->places);
    free((void *)plan->sources);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyType_Slot slots[] = {
    {Py_tp_dealloc, free_plan},
    {Py_tp_doc, "A sum prepared, for one rank."},
    {0, NULL},
};

PyType_Spec plan_spec = {
    .name = "shardproof._shm.Plan",
    .basicsize = sizeof(Plan),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
