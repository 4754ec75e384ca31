/* shardproof._shm: ranks that share memory, processes or threads. The Python face; no torch.
 *
 * Addresses come as integers. Who calls has checked that they are those of contiguous CPU tensors
 * of the right lengths, and keeps the tensors until the call, or the started sum, is over. */
#include "core.h"

#include <stdlib.h>

static PyObject *disagreement; /* set when the module is loaded; there is one interpreter */
static PyObject *usage_error;  /* shardproof.errors.UsageError */
static PyTypeObject *plan_type;

static int enter(Core *core)
{
    if (core->is_busy) {
        PyErr_SetString(usage_error, /* base.py says the same where ranks wait in Python */
                        "two threads use one rank's transport at the same time, or a signal "
                        "handler uses it while the rank does. Make all collectives of an axis in "
                        "one thread of each rank, one after the other.");
        return FAILED;
    }
    if (core->is_lost || atomic_load_explicit(&core->header->is_broken, memory_order_relaxed)) {
        PyObject *answer = PyObject_CallFunction(core->tick, "d[]", 0.0);
        if (answer != NULL)
            PyErr_SetString(PyExc_RuntimeError, "this transport was interrupted before");
        Py_XDECREF(answer);
        return FAILED;
    }
    core->is_busy = 1;
    return OK;
}

static PyObject *leave(Core *core, int result)
{
    if (result == FAILED && core->is_lost && core->slot_bytes == 0)
        withdraw(core);
    take_lock(core);
    core->is_busy = 0;
    if (result == DISAGREE)
        PyErr_SetNone(disagreement);
    if (result != OK)
        return NULL;
    Py_RETURN_NONE;
}

/* Make the scratch as deep as `plan` needs; nothing is at work, so that it may move. */
static int reserve_temps(Core *core, const Plan *plan)
{
    if (plan->deepest <= core->deepest)
        return OK;
    char *temps = realloc(core->temps, (size_t)plan->deepest * BLOCK * sizeof(double));
    if (temps == NULL) {
        PyErr_NoMemory();
        return FAILED;
    }
    core->temps = temps;
    core->deepest = plan->deepest;
    return OK;
}

static int refuse_nowhere(void)
{
    PyErr_SetString(PyExc_BufferError, "a tensor has no memory");
    return FAILED;
}

/* Whether an address of `sum` is null that is read or written. */
static int is_nowhere(const Sum *sum, const Plan *plan)
{
    const Window *w = &plan->window;
    size_t out = plan->is_windowed ? w->outer * (w->stop - w->start) * w->inner : plan->numel;
    int found = out && sum->out == NULL;
    for (int part = 0; part < plan->own; part++)
        found |= plan->numel && sum->parts[part] == NULL;
    return found;
}

/* Read `plan, out, part, ...` into the next place of the queue. */
static Sum *read_sum(Core *core, PyObject *const *args, Py_ssize_t count)
{
    if (count < 2 || Py_TYPE(args[0]) != plan_type || core->num_started == MAX_STARTED) {
        PyErr_SetString(usage_error,
                        core->num_started == MAX_STARTED
                            ? "two sums are started; wait for one before the next"
                            : "a plan and addresses are wanted");
        return NULL;
    }
    Sum *sum = &core->started[(core->first_started + core->num_started) % MAX_STARTED];
    Plan *plan = (Plan *)args[0];
    if (count - 2 != plan->own) {
        PyErr_Format(PyExc_ValueError, "%zd parts, where %d are wanted", count - 2, plan->own);
        return NULL;
    }
    sum->out = PyLong_AsVoidPtr(args[1]);
    for (int part = 0; part < plan->own; part++)
        sum->parts[part] = PyLong_AsVoidPtr(args[2 + part]);
    if (PyErr_Occurred() || (is_nowhere(sum, plan) && refuse_nowhere()) ||
        reserve_temps(core, plan) < 0)
        return NULL;
    Py_INCREF((PyObject *)plan);
    sum->plan = plan;
    core->num_started++;
    return sum;
}

static PyObject *core_start(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Core *core = (Core *)self;
    if (enter(core) < 0)
        return NULL;
    Sum *sum = read_sum(core, args, count);
    const Sum *before = core->num_started > 1 ? &core->started[core->first_started] : NULL;
    return leave(core, sum == NULL ? FAILED : start_sum(core, sum, DEPTH, before));
}

static int finish_first(Core *core)
{
    Sum *sum = &core->started[core->first_started];
    int result = finish_sum(core, sum);
    if (result != OK)
        return result;
    take_lock(core);
    Py_CLEAR(sum->plan);
    core->num_started--;
    core->first_started = (core->first_started + 1) % MAX_STARTED;
    return OK;
}

static PyObject *core_finish(PyObject *self, PyObject *unused)
{
    Core *core = (Core *)self;
    (void)unused;
    if (enter(core) < 0)
        return NULL;
    if (core->num_started == 0) {
        core->is_busy = 0;
        PyErr_SetString(PyExc_RuntimeError, "no sum is started");
        return NULL;
    }
    return leave(core, finish_first(core));
}

/* The digest of a call and of what was noted before it, which then counts no more. */
static uint64_t with_noted(Core *core, uint64_t digest)
{
    digest += core->noted;
    core->noted = 0;
    return digest;
}

static int is_idle(Core *core)
{
    if (core->num_started == 0)
        return 1;
    PyErr_SetString(usage_error, "a sum is started; wait for it before the next call");
    return 0;
}

static PyObject *core_sum(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Core *core = (Core *)self;
    if (enter(core) < 0)
        return NULL;
    Sum *sum = is_idle(core) ? read_sum(core, args, count) : NULL;
    /* One chunk now, the next ones in turn: what is in use stays in the cache. */
    int result = sum == NULL ? FAILED : start_sum(core, sum, 1, NULL);
    return leave(core, result == OK ? finish_first(core) : result);
}

static PyObject *core_plan(PyObject *self, PyObject *args)
{
    return make_plan((Core *)self, plan_type, args);
}

static int read_sizes(PyObject *tuple, int size, size_t *sizes)
{
    if (PyTuple_Size(tuple) != size) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "one size for each rank is wanted");
        return FAILED;
    }
    for (int rank = 0; rank < size; rank++)
        sizes[rank] = PyLong_AsSize_t(PyTuple_GetItem(tuple, rank));
    return PyErr_Occurred() ? FAILED : OK;
}

static PyObject *core_gather(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    Core *core = (Core *)self;
    Gather it;
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "gather(x, out, outer, widths, digest)");
        return NULL;
    }
    if (enter(core) < 0)
        return NULL;
    it.x = PyLong_AsVoidPtr(args[0]);
    it.out = PyLong_AsVoidPtr(args[1]);
    it.outer = PyLong_AsSize_t(args[2]);
    it.digest = PyLong_AsUnsignedLongLong(args[4]);
    int result = PyErr_Occurred() || !is_idle(core) ? FAILED : OK;
    it.digest = with_noted(core, it.digest);
    if (result == OK)
        result = read_sizes(args[3], core->size, it.widths);
    size_t total = 0;
    for (int rank = 0; result == OK && rank < core->size; rank++)
        total += it.widths[rank];
    if (result == OK && it.outer && ((total && it.out == NULL) ||
                                     (it.widths[core->rank] && it.x == NULL)))
        result = refuse_nowhere();
    return leave(core, result == OK ? gather(core, &it) : result);
}

static PyObject *core_exchange(PyObject *self, PyObject *args)
{
    Core *core = (Core *)self;
    PyObject *send, *send_bytes, *receive, *receive_bytes;
    Py_ssize_t longest;
    unsigned long long digest;
    Exchange it;
    if (!PyArg_ParseTuple(args, "O!O!O!O!nK:exchange", &PyTuple_Type, &send, &PyTuple_Type,
                          &send_bytes, &PyTuple_Type, &receive, &PyTuple_Type, &receive_bytes,
                          &longest, &digest))
        return NULL;
    it.longest = (size_t)longest;
    it.digest = digest;
    if (core->slot_bytes == 0) {
        PyErr_SetString(PyExc_RuntimeError, "ranks that lend have no slots");
        return NULL;
    }
    if (read_sizes(send, core->size, (size_t *)it.send) < 0 ||
        read_sizes(receive, core->size, (size_t *)it.receive) < 0 ||
        read_sizes(send_bytes, core->size, it.send_bytes) < 0 ||
        read_sizes(receive_bytes, core->size, it.receive_bytes) < 0)
        return NULL;
    for (int peer = 0; peer < core->size; peer++)
        if ((it.send_bytes[peer] && it.send[peer] == NULL) ||
            (it.receive_bytes[peer] && it.receive[peer] == NULL)) {
            refuse_nowhere();
            return NULL;
        }
    if (enter(core) < 0)
        return NULL;
    it.digest = with_noted(core, it.digest);
    return leave(core, is_idle(core) ? exchange(core, &it) : FAILED);
}

static PyObject *core_meet(PyObject *self, PyObject *digest)
{
    Core *core = (Core *)self;
    uint64_t number = PyLong_AsUnsignedLongLong(digest);
    if (PyErr_Occurred() || enter(core) < 0)
        return NULL;
    return leave(core, is_idle(core) ? meet(core, with_noted(core, number)) : FAILED);
}

static PyObject *core_confer(PyObject *self, PyObject *text)
{
    Core *core = (Core *)self;
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(text, &bytes, &length) < 0 || enter(core) < 0)
        return NULL;
    PyObject *texts = confer(core, bytes, (size_t)length);
    take_lock(core);
    core->is_busy = 0;
    return texts;
}

static PyObject *core_break_off(PyObject *self, PyObject *text)
{
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(text, &bytes, &length) < 0)
        return NULL;
    return PyBool_FromLong(break_off((Core *)self, bytes, (size_t)length));
}

static PyObject *core_broken_because(PyObject *self, PyObject *unused)
{
    (void)unused;
    return broken_because((Core *)self);
}

static PyObject *core_note(PyObject *self, PyObject *text)
{
    Core *core = (Core *)self;
    char *bytes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(text, &bytes, &length) < 0)
        return NULL;
    write_note(&core->notes[core->rank], bytes, (size_t)length);
    Py_RETURN_NONE;
}

static PyObject *core_notes(PyObject *self, PyObject *unused)
{
    (void)unused;
    return read_notes((Core *)self);
}

static PyObject *core_ring(PyObject *self, PyObject *unused)
{
    (void)unused;
    ring((Core *)self);
    Py_RETURN_NONE;
}

/* During a slow wait: whether `rank` has still not come to where this rank waits. */
static PyObject *core_is_missing(PyObject *self, PyObject *number)
{
    Core *core = (Core *)self;
    long rank = PyLong_AsLong(number);
    if (PyErr_Occurred())
        return NULL;
    if (rank < 0 || rank >= core->size) {
        PyErr_SetString(PyExc_ValueError, "no such rank");
        return NULL;
    }
    return PyBool_FromLong(!has_come(core, (int)rank, core->waiting_word, core->waiting_count));
}

static PyObject *core_calls(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((Core *)self)->calls);
}

static PyObject *core_noted(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((Core *)self)->noted);
}

static int core_note_inputs(PyObject *self, PyObject *number, void *unused)
{
    (void)unused;
    if (number == NULL) {
        PyErr_SetString(PyExc_TypeError, "noted cannot be deleted");
        return -1;
    }
    unsigned long long noted = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return -1;
    ((Core *)self)->noted = noted;
    return 0;
}

static PyObject *core_is_lost(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Core *)self)->is_lost);
}

static PyObject *core_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *buffer, *tick;
    int rank, size;
    Py_ssize_t slot_bytes;
    if (keywords != NULL && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Core(area, rank, size, slot_bytes, tick)");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OiinO:Core", &buffer, &rank, &size, &slot_bytes, &tick))
        return NULL;
    if (size < 1 || size > MAX_RANKS || rank < 0 || rank >= size || slot_bytes < 0 ||
        slot_bytes % 4096 || (slot_bytes && slot_bytes < 64 * MAX_RANKS)) {
        PyErr_SetString(PyExc_ValueError, "no such rank, too many ranks, or odd slots");
        return NULL;
    }
    Core *core = (Core *)PyType_GenericAlloc(type, 0);
    if (core == NULL)
        return NULL;
    core->rank = rank;
    core->size = size;
    core->slot_bytes = (size_t)slot_bytes;
    if (open_area(core, buffer) < 0) {
        Py_DECREF(core);
        return NULL;
    }
    Py_INCREF(tick);
    core->tick = tick;
    return (PyObject *)core;
}

static int core_traverse(PyObject *self, visitproc visit, void *arg)
{
    Core *core = (Core *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(core->tick);
    return 0;
}

static int core_clear(PyObject *self)
{
    Py_CLEAR(((Core *)self)->tick);
    return 0;
}

static void core_dealloc(PyObject *self)
{
    Core *core = (Core *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    core_clear(self);
    for (int i = 0; i < MAX_STARTED; i++)
        Py_CLEAR(core->started[i].plan);
    free(core->temps);
    if (core->area.obj != NULL)
        PyBuffer_Release(&core->area);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyMethodDef core_methods[] = {
    {"plan", core_plan, METH_VARARGS,
     "plan(counts, program, numel, kind, out_kind, digest, is_sliced, window): a sum prepared."},
    {"sum", (PyCFunction)(void (*)(void))core_sum, METH_FASTCALL, "sum(plan, out, *parts)"},
    {"start", (PyCFunction)(void (*)(void))core_start, METH_FASTCALL, "start(plan, out, *parts)"},
    {"finish", core_finish, METH_NOARGS, "finish(): the sum that was started first."},
    {"gather", (PyCFunction)(void (*)(void))core_gather, METH_FASTCALL,
     "gather(x, out, outer, widths, digest)"},
    {"exchange", core_exchange, METH_VARARGS,
     "exchange(send, send_bytes, receive, receive_bytes, longest, digest)"},
    {"meet", core_meet, METH_O, "meet(digest): wait for all."},
    {"confer", core_confer, METH_O, "confer(text): all ranks' texts, after a disagreement."},
    {"break_off", core_break_off, METH_O, "break_off(text): tell all; False if told before."},
    {"broken_because", core_broken_because, METH_NOARGS, "What was told, or None."},
    {"note", core_note, METH_O, "note(text): for the others to read."},
    {"notes", core_notes, METH_NOARGS, "All ranks' notes, in rank order."},
    {"ring", core_ring, METH_NOARGS, "Make all who wait ask their tick."},
    {"is_missing", core_is_missing, METH_O, "In a tick: whether the wait is for this rank."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef core_properties[] = {
    {"calls", core_calls, NULL, "Collectives begun so far.", NULL},
    {"noted", core_noted, core_note_inputs,
     "64 bits of what this rank has noted, for the digest of its next call.", NULL},
    {"is_lost", core_is_lost, NULL, "Whether a wait was given up.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot core_slots[] = {
    {Py_tp_doc, "Core(area, rank, size, slot_bytes, tick): one rank's end of a shared area."},
    {Py_tp_new, core_new},
    {Py_tp_dealloc, core_dealloc},
    {Py_tp_traverse, core_traverse},
    {Py_tp_clear, core_clear},
    {Py_tp_methods, core_methods},
    {Py_tp_getset, core_properties},
    {0, NULL},
};

static PyType_Spec core_spec = {
    .name = "shardproof._shm.Core",
    .basicsize = sizeof(Core),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = core_slots,
};

static PyObject *module_area_bytes(PyObject *module, PyObject *args)
{
    int size;
    Py_ssize_t slot_bytes;
    (void)module;
    if (!PyArg_ParseTuple(args, "in:area_bytes", &size, &slot_bytes))
        return NULL;
    if (size < 1 || size > MAX_RANKS || slot_bytes < 0) {
        PyErr_SetString(PyExc_ValueError, "too many ranks, or none");
        return NULL;
    }
    return PyLong_FromSize_t(area_bytes(size, (size_t)slot_bytes));
}

static PyObject *module_use_portable(PyObject *module, PyObject *flag)
{
    (void)module;
    int is_portable = PyObject_IsTrue(flag);
    if (is_portable < 0)
        return NULL;
    choose_kernels(is_portable);
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {
    {"area_bytes", module_area_bytes, METH_VARARGS, "area_bytes(size, slot_bytes)"},
    {"sample", (PyCFunction)(void (*)(void))sample, METH_FASTCALL,
     "sample(address, itemsize, sizes, strides, most): bytes of some elements."},
    {"use_portable", module_use_portable, METH_O,
     "use_portable(flag): only what every processor has, for tests. Before any plan is made."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shardproof._shm",
    .m_doc = "Exchanges between ranks that share memory.",
    .m_size = -1,
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__shm(void)
{
    choose_kernels(0);
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    PyObject *errors = PyImport_ImportModule("shardproof.errors");
    usage_error = errors == NULL ? NULL : PyObject_GetAttrString(errors, "UsageError");
    Py_XDECREF(errors);
    if (usage_error == NULL) {
        Py_DECREF(module);
        return NULL;
    }
    plan_type = (PyTypeObject *)PyType_FromSpec(&plan_spec);
    PyObject *core_type = PyType_FromSpec(&core_spec);
    disagreement = PyErr_NewException("shardproof._shm.Disagreement", NULL, NULL);
    if (plan_type == NULL || core_type == NULL || disagreement == NULL ||
        PyModule_AddObjectRef(module, "Core", core_type) < 0 ||
        PyModule_AddObjectRef(module, "Plan", (PyObject *)plan_type) < 0 ||
        PyModule_AddObjectRef(module, "Disagreement", disagreement) < 0 ||
        PyModule_AddIntConstant(module, "PROTOCOL", PROTOCOL) < 0 ||
        PyModule_AddIntConstant(module, "MAX_RANKS", MAX_RANKS) < 0 ||
        PyModule_AddIntConstant(module, "MAX_OWN", MAX_OWN) < 0)
        Py_CLEAR(module);
    Py_XDECREF(core_type);
    return module;
}
