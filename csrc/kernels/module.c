/* shardproof._kernels: arithmetic whose order of additions is fixed. The Python face; no torch. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyMethodDef methods[] = {
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "shardproof._kernels",
    .m_doc = "Products and sums with a fixed order of additions.",
    .m_size = 0,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModule_Create(&definition); }
