/* A few elements of a tensor, wherever its strides put them: what ranks compare of their inputs. */
#include "core.h"

#include <string.h>

enum { MAX_DIMS = 64, MAX_SAMPLE = 64, MAX_ITEM = 16 };

/* Where element `place` in row-major order lies, in elements from the first one. */
static int64_t offset_of(int dims, const int64_t *sizes, const int64_t *strides, uint64_t place)
{
    int64_t offset = 0;
    for (int dim = dims - 1; dim >= 0; dim--) {
        offset += (int64_t)(place % (uint64_t)sizes[dim]) * strides[dim];
        place /= (uint64_t)sizes[dim];
    }
    return offset;
}

/* One element of each of `count` equal runs of all elements, and of the last run the last one. The
 * place within a run varies, so that they do not all lie in one column. `notes.py` has the twin. */
static uint64_t place_of(uint64_t number, uint64_t count, uint64_t numel)
{
    uint64_t from = number * numel / count, to = (number + 1) * numel / count;
    return number + 1 == count ? numel - 1 : from + (number + 1) * 2654435761u % (to - from);
}

static int read_dims(PyObject *tuple, int64_t *numbers)
{
    Py_ssize_t dims = PyTuple_Size(tuple);
    if (dims < 0 || dims > MAX_DIMS) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "too many dims");
        return FAILED;
    }
    for (Py_ssize_t dim = 0; dim < dims; dim++)
        numbers[dim] = PyLong_AsLongLong(PyTuple_GetItem(tuple, dim));
    return PyErr_Occurred() ? FAILED : (int)dims;
}

/* sample(address, itemsize, sizes, strides, most) */
PyObject *sample(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS];
    char elements[MAX_SAMPLE * MAX_ITEM];
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "sample(address, itemsize, sizes, strides, most)");
        return NULL;
    }
    const char *first = PyLong_AsVoidPtr(args[0]);
    long width = PyLong_AsLong(args[1]), most = PyLong_AsLong(args[4]);
    if (PyErr_Occurred())
        return NULL;
    int dims = read_dims(args[2], sizes);
    if (dims < 0 || read_dims(args[3], strides) < 0)
        return NULL;
    if (width < 1 || width > MAX_ITEM || most < 1 || most > MAX_SAMPLE ||
        PyTuple_Size(args[3]) != dims) {
        PyErr_SetString(PyExc_ValueError, "too many elements, or too wide, or odd strides");
        return NULL;
    }
    uint64_t numel = 1;
    for (int dim = 0; dim < dims; dim++)
        numel *= (uint64_t)sizes[dim];
    uint64_t taken = numel < (uint64_t)most ? numel : (uint64_t)most;
    for (uint64_t i = 0; i < taken; i++) {
        int64_t offset = offset_of(dims, sizes, strides, place_of(i, taken, numel));
        memcpy(elements + i * (uint64_t)width, first + offset * width, (size_t)width);
    }
    return PyBytes_FromStringAndSize(elements, (Py_ssize_t)taken * width);
}
