/* The mapped area: a header, one line and one note per rank, then the slots. */
#include "core.h"

static size_t up_to(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

static size_t control_bytes(int size)
{
    return up_to(sizeof(Header) + (size_t)size * (sizeof(Line) + sizeof(Note)), 4096);
}

size_t area_bytes(int size, size_t slot_bytes)
{
    return control_bytes(size) + (size_t)size * DEPTH * slot_bytes;
}

/* Look at `buffer` as the area of `core`, whose rank, size and slot_bytes are set. */
int open_area(Core *core, PyObject *buffer)
{
    if (PyObject_GetBuffer(buffer, &core->area, PyBUF_WRITABLE) < 0)
        return FAILED;
    size_t wanted = area_bytes(core->size, core->slot_bytes);
    if ((size_t)core->area.len < wanted || (uintptr_t)core->area.buf % 256) {
        PyErr_Format(PyExc_ValueError, "an area of %zd bytes, where %zu, aligned, are wanted",
                     core->area.len, wanted);
        return FAILED;
    }
    char *start = core->area.buf;
    core->header = (Header *)start;
    core->lines = (Line *)(start + sizeof(Header));
    core->notes = (Note *)(core->lines + core->size);
    core->slots = start + control_bytes(core->size);
    return OK;
}

char *slot_of(const Core *core, int rank, uint32_t chunk)
{
    return core->slots + ((size_t)rank * DEPTH + chunk % DEPTH) * core->slot_bytes;
}
